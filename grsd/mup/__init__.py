"""Width–depth μP: which norms weights and updates must have, and the hyperparameter rules that follow.

``norms`` measures, ``rules`` holds the exponents as data and derives them a second time.
"""

from grsd.mup import norms, rules

__all__ = ["norms", "rules"]
