"""Hessian-vector products per outer step, by linear solver, on a slowly moving sequence of hypergradient systems.

Regularised logistic regression on synthetic data (n = 4,000 samples, d = 200 features of different scales, condition
number of the Hessian near 100). The upper variable is one log-regularisation per feature; each of 40 outer steps solves
the lower level by Newton's method, so that the systems are exact, and then the system H v = b of the hypergradient with
every solver, each warm-started from its own last solution. The outer trajectory is that of the exact hypergradient.

Products are counted where they are executed (a callback in the matvec), with those that build a preconditioner in a
column of their own: they are batched, as in one matrix product, and so cheaper than as many iterations. Run with

    python benchmarks/linear_solves.py [--steps 40] [--n 4000] [--d 200]
"""

from __future__ import annotations

from collections import Counter

import _harness
import jax
import jax.numpy as jnp
import numpy as np

from bilevel import derivatives
from bilevel.linear import CG, Jacobi, NormalCG, NystromPreconditioner, Richardson, StaleCholesky

CONDITION = 100.0  # of the data's second moment; the Hessian's is printed


def synthetic_logistic(n: int, d: int, seed: int = 0):
    """Gaussian features, weakly correlated, whose variances spread by CONDITION; noisy linear labels."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(d) + 0.3 * rng.normal(size=(d, d)) / np.sqrt(d)
    scales = rng.permutation(np.geomspace(1, np.sqrt(CONDITION), d))
    standard = rng.normal(size=(2 * n, d)) @ mixing
    features = standard * scales / np.sqrt(CONDITION)
    labels = np.sign(standard @ rng.normal(size=d) * 3 / np.sqrt(d) + rng.logistic(size=2 * n))
    return (features[:n], labels[:n]), (features[n:], labels[n:])


def main() -> None:
    parser = _harness.arguments(__doc__, rounds=1)  # counts: one round says all
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--n", type=int, default=4000)
    parser.add_argument("--d", type=int, default=200)
    parser.add_argument("--lr", type=float, default=20.0)
    options = _harness.start(parser, steps=2, n=400, d=60)
    jax.config.update("jax_enable_x64", True)
    train, validation = jax.tree.map(jnp.asarray, synthetic_logistic(options.n, options.d))

    def logistic(y, data):
        return jnp.mean(jnp.logaddexp(0, -data[1] * (data[0] @ y)))

    def lower(x, y, data):
        return logistic(y, data) + 0.5 * jnp.sum(jnp.exp(x) * y**2)

    @jax.jit
    def newton(x, y, train):
        gradient, hessian = jax.grad(lower, 1), jax.hessian(lower, 1)
        step = lambda _, y: y - jnp.linalg.solve(hessian(x, y, train), gradient(x, y, train))
        return jax.lax.fori_loop(0, 8, step, y)

    @jax.jit
    def exact(x, y, train, validation):
        h, b = jax.hessian(lower, 1)(x, y, train), jax.grad(logistic)(y, validation)
        v = jnp.linalg.solve(h, b)
        return -derivatives.cross_product(lambda x, y: lower(x, y, train), x, y, v), b, v, jnp.linalg.eigvalsh(h)

    # the outer trajectory, once
    x, y = jnp.full(options.d, jnp.log(2e-3)), jnp.zeros(options.d)
    points, losses, eigenvalues = [], [], None
    for _ in range(options.steps):
        y = newton(x, y, train)
        hypergradient, b, v, eigenvalues = exact(x, y, train, validation)
        points.append((x, y, b, v, hypergradient))
        losses.append(float(logistic(y, validation)))
        x = x - options.lr * hypergradient
    kappa, largest = float(eigenvalues[-1] / eigenvalues[0]), float(eigenvalues[-1])
    print(f"synthetic logistic regression, n={options.n}, d={options.d}, float64, {options.steps} outer steps")
    print(f"condition number of H at the last step {kappa:.0f}, validation loss {losses[0]:.4f} -> {losses[-1]:.4f}")

    products: Counter = Counter()

    def hvp(data, x, y, count=True):
        def multiply(v):
            if count:
                jax.debug.callback(lambda _: products.update(["all"]), v[0])
            return derivatives.hvp(lambda x, y: lower(x, y, data), x, y, v)

        return multiply

    def solvers(tol):
        common = dict(tol=tol, max_steps=2000)
        return {
            "normal CG, cold": NormalCG(**common, warm_start=False),
            "CG, cold": CG(**common, warm_start=False),
            "CG, warm": CG(**common),
            "PCG warm, Nystrom(20), refresh 10": CG(**common, preconditioner=NystromPreconditioner(20, refresh=10)),
            "PCG warm, Nystrom(50), built once": CG(**common, preconditioner=NystromPreconditioner(50, refresh=None)),
            "PCG warm, stale Cholesky, refresh 10": CG(**common, preconditioner=StaleCholesky(refresh=10)),
            "PCG warm, stale Cholesky, built once": CG(**common, preconditioner=StaleCholesky(refresh=None)),
            "PCG warm, Jacobi, refresh 10": CG(**common, preconditioner=Jacobi(refresh=10)),
            "PCG warm, Jacobi, built once": CG(**common, preconditioner=Jacobi(refresh=None)),
            "PCG warm, Jacobi(20 probes), refresh 10": CG(**common, preconditioner=Jacobi(probes=20, refresh=10)),
        }

    def measure(solver):
        """Products per outer step in iterations and in builds, and the largest relative error of a hypergradient."""
        transposes = isinstance(
            solver, NormalCG
        )  # a callback has no transpose: count by 2 per iteration and 1 at the start

        @jax.jit
        def solve(data, x, y, b, carry):
            v, carry, info = solver(hvp(data, x, y, count=not transposes), b, carry)
            cross = derivatives.cross_product(lambda x, y: lower(x, y, data), x, y, v)
            return -cross, carry, info.iterations

        products.clear()
        carry = solver.init(points[0][2])
        worst, iterations = 0.0, 0
        for x, y, b, _, truth in points:
            hypergradient, carry, k = solve(train, x, y, b, carry)
            iterations += int(k)
            worst = max(worst, float(jnp.linalg.norm(hypergradient - truth) / jnp.linalg.norm(truth)))
        jax.effects_barrier()
        solving = (2 if transposes else 1) * iterations + (len(points) if transposes or solver.warm_start else 0)
        building = 0 if transposes else products["all"] - solving
        return solving / len(points), building / len(points), worst

    print(f"\n{'':42}{'tol 1e-3':^34}{'tol 1e-6':^34}")
    print(f"{'HVPs per outer step':42}" + 2 * f"{'solving':>10}{'building':>10}{'error':>10}    ")
    table = {tol: solvers(tol) for tol in (1e-3, 1e-6)}
    for name in table[1e-3]:
        cells = ["{:10.1f}{:10.1f}{:10.1e}    ".format(*measure(table[tol][name])) for tol in table]
        print(f"{name:42}{''.join(cells)}", flush=True)

    # Richardson, one step per call until the residual meets tol (its v and its count do not depend on how H is applied)
    richardson = Richardson(1 / largest, 1)
    one_step = jax.jit(lambda h, b, carry: richardson(lambda v: h @ v, b, carry))
    hessian = jax.jit(jax.hessian(lower, 1))
    row = f"{'Richardson 1/L, warm':42}"
    for tol in table:
        carry, count = richardson.init(points[0][2]), 0
        for x, y, b, _, _ in points:
            h, residual = hessian(x, y, train), jnp.inf
            while residual > tol * jnp.linalg.norm(b):
                _, carry, info = one_step(h, b, carry)
                residual, count = float(info.residual), count + 1
        row += f"{count / len(points):10.1f}{0:10.1f}{'':14}"
    print(row)
    print("\nerror: the largest relative error of a hypergradient over the outer steps")


if __name__ == "__main__":
    main()
