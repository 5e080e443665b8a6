"""The command line: `grsd doctor`, `suite`, `model-check`, `shells`, `conditions`, `mup-plan`,
`mup-check`, `protocol`, `experiment`, `claims`, `results`, `new-chapter`.

Tables go to stdout, progress and errors to stderr; `--json` turns stdout into one JSON object. A
failure is one sentence and exit code 2. Heavy imports happen inside the commands, so that `grsd
doctor` works where torch does not. One module holds one family of commands; importing it adds them
to `main`.
"""

from grsd.cli import (  # noqa: F401
    authoring,
    diagnostics,
    environment,
    ledger,
    measurements,
    parametrization,
    profiles,
    training,
)
from grsd.cli.common import main

__all__ = ["main"]
