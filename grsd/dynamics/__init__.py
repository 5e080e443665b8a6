"""How the picture moves: error in function space, its modes, shells and fluxes, transport, and test loss.

``flow`` moves a network in float64; ``modes`` reads one instant in the eigenbasis of M.
"""

from grsd.dynamics import flow, modes

__all__ = ["flow", "modes"]
