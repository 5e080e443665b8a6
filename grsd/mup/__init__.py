"""Width–depth μP: which norms weights and updates must have, and the hyperparameter rules that follow.

``norms`` measures, ``rules`` holds the exponents as data and derives them a second time, ``plan`` applies them to a model,
``optimizers`` has what no library has in the paper's form, ``audit`` measures the exponents of one step, ``schedules`` keep the ratios of
the rates, ``coordcheck`` looks whether it worked and says what did not, ``sweep`` trains over a grid and ``curves`` reads off what transfers, and
``alignment`` measures how tight the bounds behind the rules are.
"""

from grsd.mup import alignment, curves, norms, optimizers, rules, schedules, sweep
from grsd.mup.audit import UpdateAudit, audit_update_norms
from grsd.mup.coordcheck import CoordCheck, coord_check
from grsd.mup.plan import Plan, plan

__all__ = [
    "CoordCheck",
    "Plan",
    "UpdateAudit",
    "alignment",
    "audit_update_norms",
    "coord_check",
    "curves",
    "norms",
    "optimizers",
    "plan",
    "rules",
    "schedules",
    "sweep",
]
