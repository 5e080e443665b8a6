"""Runs: spectra over batches and checkpoints, kept batch by batch; conditions along them."""

from grsd.lab.runs.record import DTYPES, STARTS, TARGETS, BatchResult, RunResult, RunSpec
from grsd.lab.runs.run import Progress, shell_run

__all__ = ["DTYPES", "STARTS", "TARGETS", "BatchResult", "Progress", "RunResult", "RunSpec"]
__all__ += ["shell_run"]
