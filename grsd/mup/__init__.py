"""Width–depth μP: which norms weights and updates must have, and the hyperparameter rules that follow.

``norms`` measures, ``rules`` holds the exponents as data and derives them a second time, ``plan`` applies them to a model,
``optimizers`` has what no library has in the paper's form.
"""

from grsd.mup import norms, optimizers, rules
from grsd.mup.plan import Plan, plan

__all__ = ["Plan", "norms", "optimizers", "plan", "rules"]
