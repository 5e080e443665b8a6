"""One instant of training: the operator M = J Jᵀ, and where the error sits in its spectrum.

``observables`` says what f is, ``operator`` multiplies by M. ``lanczos`` finds coefficients,
``measure`` bounds the spectral measure, ``shells`` bins it, ``nulls`` holds what a profile is
compared with. ``functions`` has f(M) u, Ritz pairs and traces.

Linear programs, which know no network, are in :mod:`grsd.spectrum.programs`: recorded, transposed,
simplified. In :mod:`grsd.spectrum.operator`, ``trace`` records where parameters enter and ``rules``
says how, ``factors`` holds the blocks of K, ``own_positions`` takes out layers that need no pass,
``factored`` puts them together; ``double_backward`` is the plain form. ``ntk``, ``batches`` and
``shards`` are the operators made of either, ``cross`` goes from one batch to another, ``layers``
splits one by modules, ``algebra`` adds them up.
"""

from grsd.spectrum import nulls
from grsd.spectrum.functions import apply, evolve, log_determinant, ritz, trace
from grsd.spectrum.lanczos import lanczos, lanczos_batches
from grsd.spectrum.measure import SpectralMeasure, Tridiagonal
from grsd.spectrum.observables import BinaryLogits, ClassLogits, Observable, Outputs, TokenLogProb
from grsd.spectrum.operator.algebra import GGN
from grsd.spectrum.operator.batches import NTKBatches
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
    "GGN",
    "NTK",
    "AveragedProfile",
    "BinaryLogits",
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
    "apply",
    "average",
    "coherence",
    "evolve",
    "lanczos",
    "lanczos_batches",
    "log_determinant",
    "micro_batches",
    "nulls",
    "ritz",
    "statistics",
    "trace",
]
