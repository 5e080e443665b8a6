"""When learning renormalizes: the conditions of 2512.18209 as measurements, and its theorems under test.

``blocks`` splits the Jacobian of any model by depth (``splitting`` finds the stack) and multiplies with its pieces; ``grams`` holds them in
function space. Diagnostics: ``bandedness`` (D1), ``coherence`` (D2, and D3 sizes), ``couplings`` (D4), ``collapse`` (D5, D6);
``conditions`` runs them all in one call and ``reading`` shows the result. The other modules test the theorems, each named after its subject.
"""
