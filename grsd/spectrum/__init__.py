"""One instant of training: the operator M = J Jᵀ, and where the error sits in its spectrum.

``observables`` says what f is, ``ntk`` multiplies by M, ``krylov`` runs Lanczos, ``measure`` bounds the spectral measure,
``shells`` bins it, ``nulls`` holds what a profile must be compared with.

How ``ntk`` multiplies: ``uses`` records where parameters enter, ``recording`` and ``tape`` turn the backward pass into linear
programs, ``factors`` holds the blocks of K, ``folding`` takes own-position layers out, ``factored`` puts them together;
``retained`` is the plain form. ``kernel`` is what all forms of M share, ``layers`` splits one by modules, ``lockstep`` multiplies
by the kernels of many independent batches at once, ``shards`` by one whose rows sit in micro-batches or several processes
(``halves``), ``memory`` measures what an operator takes.
"""

from grsd.spectrum import nulls
from grsd.spectrum.lanczos import lanczos
from grsd.spectrum.measure import SpectralMeasure, Tridiagonal
from grsd.spectrum.observables import ClassLogits, Observable, Outputs, TokenLogProb
from grsd.spectrum.operator.batches import NTKBatches, lanczos_batches
from grsd.spectrum.operator.layers import coherence
from grsd.spectrum.operator.ntk import NTK
from grsd.spectrum.operator.shards import NTKShards, micro_batches
from grsd.spectrum.shells import (
    AveragedProfile,
    LogShells,
    ProfileStatistics,
    ShellProfile,
    average,
    statistics,
)

__all__ = [
    "NTK",
    "AveragedProfile",
    "ClassLogits",
    "LogShells",
    "NTKBatches",
    "NTKShards",
    "Observable",
    "Outputs",
    "ProfileStatistics",
    "ShellProfile",
    "SpectralMeasure",
    "TokenLogProb",
    "Tridiagonal",
    "average",
    "coherence",
    "lanczos",
    "lanczos_batches",
    "micro_batches",
    "nulls",
    "statistics",
]
