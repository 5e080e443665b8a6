"""When learning renormalizes: the conditions of 2512.18209 as measurements, and its theorems under test.

``blocks`` splits the Jacobian of any model by depth and multiplies with the pieces; ``bandedness``, ``coherence``, ``sizes``, ``couplings`` and
``fields`` are the diagnostics made from them, and ``conditions`` is the one call that runs them all.
"""
