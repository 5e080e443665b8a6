"""Things to measure: nets, text and images, checkpoints, resumable runs.

This is the lowest room that names a data set, a checkpoint or a device, or touches disk and
network. The theory rooms (`grsd.spectrum` and its neighbours) take what is made here as an
argument.

| room | what |
|---|---|
| `nets` | small nets with explicit seeds, families of architectures, stock and planted models |
| `data` | text as token arrays cut into batches, images, functions |
| `checkpoints` | the suite trained here, and the loader: suite, local folder, Hugging Face hub |
| `runs` | spectra over many batches and checkpoints, resumable |
"""

from grsd.lab import runs
from grsd.lab.checkpoints import hub, opened, suites
from grsd.lab.data import corpora
from grsd.lab.nets import models

__all__ = ["corpora", "hub", "models", "opened", "runs", "suites"]
