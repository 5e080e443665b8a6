"""Width–depth μP: which norms weights and updates must have, and the hyperparameter rules that
follow.

``norms`` measures, ``rules`` holds the exponents as data and derives them a second time,
``planning`` applies them to a model (``families``: what names of transformers say; ``initial``: how
weights are drawn again; ``attention``: heads that grow; ``sharding``: many processes),
``contributions`` measures whether a plan is complete, ``optimizers`` has what no library has in the
paper's form, ``combined`` makes one of several, ``monitoring`` watches norms while a model trains,
``audit`` measures the exponents of one step, ``schedules`` keep the ratios of the rates,
``coordcheck`` looks whether it worked and says what did not, ``sweeps`` trains over a grid and
``optima`` reads off what transfers, and ``alignment`` measures how tight the bounds behind the
rules are.
"""

from grsd.mup import alignment, norms, optima, optimizers, rules, schedules, sweeps
from grsd.mup.audit import UpdateAudit, audit_update_norms
from grsd.mup.coordcheck import CoordCheck, coord_check
from grsd.mup.monitoring import Monitor, monitor
from grsd.mup.planning import Plan, plan
from grsd.mup.plans import NO_DECAY

__all__ = [
    "NO_DECAY",
    "CoordCheck",
    "Monitor",
    "Plan",
    "UpdateAudit",
    "alignment",
    "audit_update_norms",
    "coord_check",
    "monitor",
    "norms",
    "optima",
    "optimizers",
    "plan",
    "rules",
    "schedules",
    "sweeps",
]
