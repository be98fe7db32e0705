"""What a user of the installed package does first; it runs outside the checkout, on the dependencies alone."""

import jax.numpy as jnp

import bilevel
from bilevel import Problem, Result, solve

problem = Problem(lambda x, y: (y - 1) ** 2 + x**2, lambda x, y: (y - x) ** 2)
solution = solve(problem, jnp.array(0.0), jnp.array(0.0), tol=1e-4)
assert "site-packages" in bilevel.__file__, bilevel.__file__
assert solution.result is Result.CONVERGED, solution
assert abs(float(solution.x) - 0.5) < 1e-3, solution
print(bilevel.__version__, solution)
