"""Linear solvers at a condition number of 1e8: errors of a hypergradient that is known, and what the solvers report.

    python benchmarks/ill_conditioned.py

The lower level is the contrast of attention maps in closed form (`applications.attention_contrast.oracle`): two pairs
of maps of 36 tokens, a diagonal Hessian, in float64. All but the solvers of a fixed number of steps are asked for a
relative residual of 1e-14, for the error is up to the condition number times larger.
"""

from __future__ import annotations

import _harness
import jax
import jax.numpy as jnp
import numpy as np

from bilevel import linear
from bilevel.applications.attention_contrast import oracle
from bilevel.hypergradients import Implicit, value_and_hypergradient


def problem(strength):
    """Maps whose general attention spans four decades: the Hessian's condition number is the square of that."""
    rng = np.random.default_rng(0)
    general = np.stack([rng.permutation(np.geomspace(1, 1e4, 36)) for _ in range(2)])
    general *= 0.8 / general.sum(-1, keepdims=True)
    question, mask = 0.8 * rng.dirichlet(np.ones(36), 2), rng.dirichlet(np.full(36, 0.3), 2)
    return oracle(question, general, mask, strength)


def solvers(steps):
    tight = {"tol": 1e-14, "max_steps": steps}
    return {
        "Dense()": linear.Dense(),
        "CG": linear.CG(**tight),
        "CG, Jacobi": linear.CG(**tight, preconditioner=linear.Jacobi()),
        "CG, NystromPreconditioner(10)": linear.CG(**tight, preconditioner=linear.NystromPreconditioner(rank=10)),
        "CG, StaleCholesky": linear.CG(**tight, preconditioner=linear.StaleCholesky()),
        "Robust": linear.Robust(**tight),
        "TaskCG": linear.TaskCG(**tight),
        "MINRES": linear.MINRES(**tight),
        "GMRES, restart 72": linear.GMRES(**tight, restart=72),
        "NormalCG": linear.NormalCG(**tight),
        "BiCGStab": linear.BiCGStab(**tight),
        "CG(tol=1e-3)": linear.CG(tol=1e-3, max_steps=steps),
        "CG()": linear.CG(),
        "Nystrom(36, 1e-10)": linear.Nystrom(rank=36, rho=1e-10),
        f"Neumann(0.5, {steps})": linear.Neumann(0.5, steps),
        f"Richardson(0.5, {steps})": linear.Richardson(0.5, steps),
        "Identity()": linear.Identity(1.0),
    }


def main():
    parser = _harness.arguments(__doc__, rounds=1)
    parser.add_argument("--steps", type=int, default=4000, help="the most iterations")
    parser.add_argument("--strength", type=float, default=1e-10, help="lambda")
    args = _harness.start(parser, steps=200)
    jax.config.update("jax_enable_x64", True)
    app = problem(args.strength)
    exact = app.hypergradient(app.x0)
    b = jax.grad(app.problem.full_upper(), 1)(app.x0, app.solution(app.x0))
    rows = []
    for name, solver in solvers(args.steps).items():
        f = value_and_hypergradient(app.problem, Implicit(solver), lambda level, x, y: app.solution(x))
        found = jax.jit(f)(app.x0, app.y0)
        error = float(abs(found.gradient - exact) / abs(exact))
        residual = float(found.metrics["linear_residual"] / jnp.linalg.norm(b))
        rows.append((name, f"{error:.0e}", f"{residual:.0e}", str(int(found.metrics["linear_iterations"]))))
    print(f"condition number {float(app.condition(app.x0)):.2g}, 72 unknowns, float64\n")
    _harness.table(("", "error of the hypergradient", "reported residual over |b|", "iterations"), *rows)


if __name__ == "__main__":
    main()
