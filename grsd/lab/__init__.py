"""Things to measure: nets, corpora, checkpoint suites, the checkpoint loader, resumable runs.

This is the only room that names a data set, a checkpoint or a device, and the only one that touches disk
and network. The theory rooms (`grsd.spectrum` and its neighbours) take what is made here as an argument.

| module | what |
|---|---|
| `models` | small nets with explicit seeds, for checks of the theory |
| `corpora` | text as token arrays, cut into batches |
| `suites` | the mini-Pythia suite: trained here, one folder per checkpoint |
| `hub` | loads a checkpoint: mini suite, local folder, Hugging Face hub |
| `runs` | spectra over many batches and checkpoints, resumable |
| `protocol` | the runs of section 7 of 2512.10427 with their controls, at two scales |
| `twolayer` | the two-layer net in closed form, fast enough for n of several hundred |
| `experiments` | experiments made of stored pieces, and the registry behind `grsd experiment` |
| `drift_series` | the experiment ``drift``: fluxes of error energy against the size of the net |
| `reports` | what the command line prints and draws of a run |
"""

from grsd.lab import corpora, hub, models, protocol, runs, suites

__all__ = ["corpora", "hub", "models", "protocol", "runs", "suites"]
