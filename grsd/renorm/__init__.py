"""When learning renormalizes, 2512.18209: its conditions as measurements, its theorems under test.

`diagnostics` splits the Jacobian of any model by depth (`blocks`; `splitting` finds the stack,
`block_matrices` holds the pieces in function space) and measures `bandedness` (D1), `coherence`
(D2, and D3 sizes), `couplings` (D4), `collapse` (D5, D6); `conditions` runs them all in one call
and `report` shows the result. `theorems` tests what the paper proves.
"""

from grsd.renorm.diagnostics import bandedness, blocks, coherence, collapse, conditions, couplings
from grsd.renorm.theorems import covariance, depth, products, recurrence

__all__ = [
    "bandedness",
    "blocks",
    "coherence",
    "collapse",
    "conditions",
    "couplings",
    "covariance",
    "depth",
    "products",
    "recurrence",
]
