"""Hessian-free and constrained methods side by side: the paper's toys, one problem per class, and the price of a step.

    python benchmarks/constrained.py                       # all sections
    python benchmarks/constrained.py --section toys --out docs/tutorials/lvhba_toys.png
    python benchmarks/constrained.py --section members
    python benchmarks/constrained.py --section price

toys     LV-HBA on its two toy problems (n = 100) from their official starts, no step size set by hand; beside it a
         re-implementation of the published method and settings (raw rows, one saddle step, c_k = c0 (k+1)^p).
members  every member of the family on one strongly convex, one non-singleton and two constrained problems with known
         solutions.
price    the time of one LV-HBA step against the gradients that it is made of.

All in float64. Times include no compilation (the second of two runs is timed).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import Problem, run
from bilevel.solvers.penalty import (
    BLOCC,
    BOME,
    BVFSM,
    F2BA,
    F2SA,
    GALET,
    GAM,
    GPBGD,
    LVHBA,
    MEHA,
    SFLCB,
    VPBGD,
    AiPOD,
    BiCGAFFA,
    CentralF2SA,
    Polynomial,
)

jax.config.update("jax_enable_x64", True)


# The two toy problems ------------------------------------------------------------------------------------------------


def toy_llc(n=100):
    """Merely convex: x* = -0.3, y1* = 0.7, y2* = -0.4 in every component."""
    problem = Problem(
        lambda x, y: 0.5 * jnp.sum((x - y[1]) ** 2) + 0.5 * jnp.sum((y[0] - 1) ** 2),
        lambda x, y: 0.5 * jnp.sum(y[0] ** 2) - x @ y[0] + jnp.sum(y[1]),
        equality=lambda x, y: jnp.sum(x) + jnp.sum(y[0]) + jnp.sum(y[1]),
    )
    return problem, jnp.full(n, -20.0), (jnp.full(n, 10.0), jnp.full(n, 10.0))


def toy_llsc(n=100, seed=0):
    """Strongly convex: y(x) is the projection of x on {y : Ay + Hx = 0}; x in the null space of B (rank 45)."""
    random = np.random.default_rng(seed)
    A, H = random.uniform(size=(90, n)), random.uniform(size=(90, n))
    B = random.uniform(size=(90, 45)) @ random.uniform(size=(45, n))
    c, d = random.uniform(size=n), random.uniform(size=n)
    plus = np.linalg.pinv(A)
    X = jnp.asarray(np.eye(n) - np.linalg.pinv(B, rcond=1e-10) @ B)
    solution = jnp.asarray((np.eye(n) - plus @ A) - plus @ H)
    problem = Problem(
        lambda x, y: jnp.sin(c @ x + d @ y) + jnp.log(jnp.sum((x + y) ** 2) + 1),
        lambda x, y: 0.5 * jnp.sum((x - y) ** 2),
        equality=lambda x, y: A @ y + H @ x,
        project_upper=lambda x: X @ x,
    )
    x0 = X @ jnp.full(n, 10.0)
    y0 = jnp.full(n, 10.0)
    return problem, x0, y0 - plus @ (A @ y0 + H @ x0), solution


def published(problem, x, y, theta, steps, *, alpha, beta, eta, gamma, c0, p, r, lam0=1.0, z0=-1.0):
    """LV-HBA as published, for toy LLC: raw rows, one simultaneous saddle step. Returns x after every step."""
    rows = lambda x, y: jnp.atleast_1d(problem.equality(x, y))
    lower, upper = problem.lower, problem.upper

    def onto(u):
        value, pull = jax.vjp(lambda u: rows(*u), u)
        norm = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(pull(jnp.ones(1))[0]))
        return jax.tree.map(lambda a, b: a - b, u, pull(value / norm)[0])

    def step(state, k):
        x, y, z, theta, lam = state
        c = c0 * (k + 1.0) ** p
        d_theta = jax.grad(lambda t: lower(x, t) + lam @ rows(x, t))(theta)
        d_theta = jax.tree.map(lambda d, t, y: d + (t - y) / gamma[0], d_theta, theta, y)
        d_lam = -rows(x, theta) + (lam - z) / gamma[1]
        theta = jax.tree.map(lambda t, d: t - eta * d, theta, d_theta)
        lam = jnp.clip(lam - eta * d_lam, -r, r)

        def psi(x, y):
            prox = sum(jnp.sum((t - y) ** 2) for t, y in zip(theta, y, strict=True)) / (2 * gamma[0])
            return upper(x, y) / c + lower(x, y) - lower(x, theta) - lam @ rows(x, theta) - prox

        d_x, d_y = jax.grad(psi, argnums=(0, 1))(x, y)
        x, y = onto(jax.tree.map(lambda a, d: a - alpha * d, (x, y), (d_x, d_y)))
        z = jnp.clip(z + beta * (lam - z) / gamma[1], -r, r)
        return (x, y, z, theta, lam), x

    x, y = onto((x, y))
    start = (x, y, jnp.full(1, z0), theta, jnp.full(1, lam0))
    return jax.lax.scan(step, start, jnp.arange(steps))[1]


def below(errors, level):
    """The first step from which the error stays below a level."""
    late = np.nonzero(~(errors < level))[0]
    first = late[-1] + 1 if len(late) else 0
    return "never" if first >= len(errors) else str(first)


def toys(steps, out):
    problem, x0, y0 = toy_llc()
    error = lambda x: jnp.linalg.norm(x + 0.3, axis=-1) / jnp.linalg.norm(jnp.full(x0.shape, 0.3))
    official = dict(alpha=0.008, beta=0.02, eta=0.01, gamma=(10.0, 10.0), c0=0.025, p=0.3, r=1000.0)
    theta0 = tuple(jnp.full(100, 1.0) for _ in range(2))
    curves = {
        "published settings": np.asarray(
            error(jax.jit(lambda: published(problem, x0, y0, theta0, steps, **official))())
        ),
        "published method, stable steps": np.asarray(
            error(
                jax.jit(
                    lambda: published(
                        problem,
                        x0,
                        y0,
                        theta0,
                        steps,
                        **{
                            **official,
                            "alpha": 0.01,
                            "beta": 0.01,
                            "eta": 0.01,
                            "gamma": (10.0, 1.0),
                            "c0": 1.0,
                            "p": 0.49,
                        },
                    )
                )()
            )
        ),
    }

    def follow(solver):
        def body(state, k):
            state, metrics = solver.step(problem, state, key._replace_step(k))
            return state, (error(state.x), metrics)

        key = _Key()
        return jax.lax.scan(
            body, solver.init(problem, x0, y0, key._replace_step(0)), jnp.arange(steps, dtype=jnp.uint32)
        )[1]

    found = {}
    for name, solver in (
        ("LVHBA()", LVHBA()),
        ("LVHBA(penalty=Polynomial())", LVHBA(penalty=Polynomial())),
        ("LVHBA(extragradient=False)", LVHBA(extragradient=False)),
        ("BiCGAFFA()", BiCGAFFA()),
        ("SFLCB()", SFLCB()),
    ):
        errors, metrics = jax.jit(follow, static_argnums=())(solver)
        curves[name], found[name] = np.asarray(errors), metrics
    print(f"\nToy LLC, n = 100, official start, {steps} steps: relative error of x")
    print(f"  {'':<32} {'stays below 1e-2':>17} {'1e-3':>7} {'1e-5':>7} {'at 1000':>9} {'at the end':>11}")
    for name, errors in curves.items():
        print(
            f"  {name:<32} {below(errors, 1e-2):>17} {below(errors, 1e-3):>7} {below(errors, 1e-5):>7} "
            f"{errors[999]:>9.1e} {errors[-1]:>11.1e}"
        )

    llsc, x, y, solution = toy_llsc()
    key = _Key()

    def track(state, k):
        state, metrics = LVHBA().step(llsc, state, key._replace_step(k))
        away = jnp.linalg.norm(state.y - solution @ state.x)
        return state, (
            metrics["hypergradient_norm"],
            metrics["violation"],
            away,
            metrics["upper_loss"],
            metrics["penalty"],
        )

    def all_steps():
        state = LVHBA().init(llsc, x, y, key._replace_step(0))
        return jax.lax.scan(track, state, jnp.arange(steps, dtype=jnp.uint32))[1]

    residual, violation, away, loss, c = (np.asarray(a) for a in jax.jit(all_steps)())
    print(f"\nToy LLSC, n = 100, official start, LVHBA(), {steps} steps")
    print(f"  {'step':>6} {'residual':>9} {'violation':>10} {'|y - y(x)|':>11} {'F':>8} {'c':>7}")
    for k in (0, 9, 99, 999, steps - 1):
        print(f"  {k + 1:>6} {residual[k]:>9.1e} {violation[k]:>10.1e} {away[k]:>11.1e} {loss[k]:>8.3f} {c[k]:>7.0f}")
    if out is not None:
        draw(out, curves, residual, away, violation)
        print(f"  picture: {out}")


class _Key:
    """Step keys of one run."""

    def __init__(self):
        from bilevel.data import as_step_key

        self.base = as_step_key(0)

    def _replace_step(self, k):
        from bilevel.data import StepKey

        return StepKey(self.base.base, jnp.asarray(k, jnp.uint32), self.base.stream)


def draw(path, curves, residual, away, violation):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, errors in curves.items():
        left.plot(np.arange(1, len(errors) + 1), np.clip(errors, 1e-9, 1e4), lw=1, label=name)
    left.set(title="toy LLC: relative error of x", xlabel="step", xscale="log", yscale="log")
    left.legend(fontsize=7)
    for name, values in (("residual", residual), ("|y - y(x)|", away), ("violation", violation)):
        right.plot(np.arange(1, len(values) + 1), np.maximum(values, 1e-16), lw=1, label=name)
    right.set(title="toy LLSC: LVHBA()", xlabel="step", xscale="log", yscale="log")
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# Every member -----------------------------------------------------------------------------------------------------


def quadratic(n=5, m=7, seed=0):
    random = np.random.default_rng(seed)
    M, B = random.normal(size=(m, m)), random.normal(size=(m, n))
    Q, a, b = M @ M.T / m + 0.5 * np.eye(m), random.normal(size=n), random.normal(size=m)
    K = np.linalg.solve(Q, B)
    x = np.linalg.solve(np.eye(n) + K.T @ K, a + K.T @ b)
    problem = Problem(
        lambda x, y: 0.5 * jnp.sum((x - a) ** 2) + 0.5 * jnp.sum((y - b) ** 2),
        lambda x, y: 0.5 * y @ Q @ y - y @ (B @ x),
    )
    return problem, (x, K @ x), (jnp.zeros(n), jnp.zeros(m))


def nonsingleton(n=4):
    problem = Problem(
        lambda x, y: 0.5 * jnp.sum((x - y[1]) ** 2) + 0.5 * jnp.sum((y[0] - 1) ** 2),
        lambda x, y: 0.5 * jnp.sum(y[0] ** 2) - x @ y[0],
    )
    return problem, (np.ones(n), np.ones((2, n))), (-jnp.ones(n), 2 * jnp.ones((2, n)))


def active():
    problem = Problem(
        lambda x, y: 0.5 * jnp.sum((x - 2) ** 2) + 0.5 * jnp.sum((y - 1) ** 2),
        lambda x, y: 0.5 * jnp.sum((y - x) ** 2),
        constraint=lambda x, y: x + y - 1,
    )
    return problem, (np.ones(1), np.zeros(1)), (-jnp.ones(1), -jnp.ones(1))


def equality(seed=3):
    random = np.random.default_rng(seed)
    n, m, p = 6, 8, 3
    A, H, C, b = (
        random.normal(size=(p, m)),
        random.normal(size=(p, n)),
        random.normal(size=(m, n)),
        random.normal(size=p),
    )
    c, d = random.normal(size=n), random.normal(size=m)
    plus = np.linalg.pinv(A)
    S, s = (np.eye(m) - plus @ A) @ C - plus @ H, plus @ b
    x = np.linalg.solve(np.eye(n) + S.T @ S, c + S.T @ (d - s))
    problem = Problem(
        lambda x, y: 0.5 * jnp.sum((x - c) ** 2) + 0.5 * jnp.sum((y - d) ** 2),
        lambda x, y: 0.5 * jnp.sum((y - C @ x) ** 2),
        equality=lambda x, y: A @ y + H @ x - b,
    )
    return problem, (x, S @ x + s), (jnp.zeros(n), jnp.zeros(m))


FREE = (
    (MEHA(), 5000),
    (VPBGD(), 5000),
    (GPBGD(), 5000),
    (BOME(), 5000),
    (F2SA(), 300),
    (F2BA(), 200),
    (CentralF2SA(), 200),
    (BVFSM(), 200),
    (GALET(), 200),
)
BOUND = ((LVHBA(), 5000), (BiCGAFFA(), 5000), (SFLCB(), 5000), (BLOCC(), 100), (GAM(), 100))
CASES = (
    ("strongly convex quadratic", quadratic, FREE),
    ("lower solution not unique", nonsingleton, FREE),
    ("active coupled inequality", active, BOUND),
    ("coupled equalities", equality, (*BOUND, (AiPOD(), 100))),
)


def name_of(solver):
    if isinstance(solver, F2SA):
        return "CentralF2SA" if solver.central else "F2SA" if isinstance(solver.penalty, Polynomial) else "F2BA"
    return type(solver).__name__


def members():
    for title, make, solvers in CASES:
        problem, solution, start = make()
        flat = lambda u: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(u)])
        scale = max(1.0, float(np.linalg.norm(flat(solution))))
        print(f"\n{title}")
        print(
            f"  {'':<12} {'steps':>6} {'rel. error':>11} {'residual':>9} {'gap':>9} "
            f"{'violation':>10} {'penalty':>8} {'ms/step':>8}"
        )
        for solver, steps in solvers:
            go = jax.jit(lambda solver, start: run(problem, solver, *start, steps))
            jax.block_until_ready(go(solver, start))
            began = time.perf_counter()
            state, metrics = jax.block_until_ready(go(solver, start))
            each = 1000 * (time.perf_counter() - began) / steps
            error = np.linalg.norm(flat((state.x, state.y)) - flat(solution)) / scale
            last = {name: float(value[-1]) for name, value in metrics.items()}
            print(
                f"  {name_of(solver):<12} {steps:>6} {error:>11.1e} "
                f"{last['hypergradient_norm']:>9.1e} {last['gap']:>9.1e} "
                f"{last['violation']:>10.1e} {last['penalty']:>8.0f} {each:>8.3f}"
            )


# The price of a step ------------------------------------------------------------------------------------------------


def price(samples=4000, width=512, repeats=30):
    """A regression whose gradients dominate: lower level with an l2 weight, one coupled equality."""
    random = np.random.default_rng(0)
    data = (jnp.asarray(random.normal(size=(samples, width))), jnp.asarray(random.normal(size=samples)))
    loss = lambda y, batch: 0.5 * jnp.mean((jnp.tanh(batch[0] @ y) - batch[1]) ** 2)
    problem = Problem(
        lambda x, y, batch: loss(y, batch),
        lambda x, y, batch: loss(y, batch) + 0.5 * jnp.sum(jnp.exp(x) * y**2),
        upper_data=data,
        lower_data=data,
        equality=lambda x, y: jnp.sum(y) + 0.1 * jnp.sum(x),
    )
    x, y = jnp.zeros(width), jnp.zeros(width)
    solver = LVHBA(alpha=1e-3)
    state = solver.init(problem, x, y, _Key()._replace_step(0))
    steps = jax.jit(
        lambda problem, state: jax.lax.scan(
            lambda s, k: solver.step(problem, s, _Key()._replace_step(k)),
            state,
            jnp.arange(1, 1 + repeats, dtype=jnp.uint32),
        )
    )

    def gradients(problem, y):
        """The six: f_y twice in the saddle step, F, f twice in the joint step (at y and theta), and one more."""
        lower, upper = problem.draw_lower(0), problem.draw_upper(0)

        def body(y, k):
            total = y
            for i in range(6):
                level = upper if i == 2 else lower
                total = total - 1e-6 * jax.grad(lambda y, level=level: level(x, y))(total)
            return total, None

        return jax.lax.scan(body, y, jnp.arange(repeats))[0]

    six = jax.jit(gradients)
    times = {}
    for name, call in (("LV-HBA step", lambda: steps(problem, state)), ("six gradients", lambda: six(problem, y))):
        jax.block_until_ready(call())
        times[name] = min(_seconds(call) for _ in range(5)) / repeats
    print(f"\nOne step on {samples} samples of {width} features, best of 5 times {repeats}")
    for name, seconds in times.items():
        print(f"  {name:<14} {1000 * seconds:8.3f} ms")
    print(f"  ratio          {times['LV-HBA step'] / times['six gradients']:8.2f}")


def _seconds(call):
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=("toys", "members", "price"), default=None)
    parser.add_argument("--steps", type=int, default=5000, help="of the toys")
    parser.add_argument("--out", type=Path, default=None, help="a picture of the toys")
    args = parser.parse_args()
    if args.section in (None, "toys"):
        toys(args.steps, args.out)
    if args.section in (None, "members"):
        members()
    if args.section in (None, "price"):
        price()


if __name__ == "__main__":
    main()
