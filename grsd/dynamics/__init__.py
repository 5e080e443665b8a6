"""How the picture moves: error in function space, modes, shells, fluxes, transport, test loss.

``problem`` is a network on its data as functions of one parameter vector, ``flow`` moves it,
``modes`` reads one instant in the eigenbasis of M. ``balance`` says what changes the energy of a
shell at an instant, ``crossings`` integrates that over time, ``drift`` bins what moves along the λ
axis. ``transport`` and ``transport_solvers`` are the continuum, ``generalization`` is test loss.
"""

from grsd.dynamics import (
    balance,
    crossings,
    drift,
    flow,
    generalization,
    modes,
    problem,
    transport,
    transport_solvers,
)

__all__ = [
    "balance",
    "crossings",
    "drift",
    "flow",
    "generalization",
    "modes",
    "problem",
    "transport",
    "transport_solvers",
]
