"""Width–depth μP: which norms weights and updates must have, and the hyperparameter rules that follow.

``norms`` measures, ``rules`` holds the exponents as data and derives them a second time, ``plan`` applies them to a model.
"""

from grsd.mup import norms, rules
from grsd.mup.plan import Plan, plan

__all__ = ["Plan", "norms", "plan", "rules"]
