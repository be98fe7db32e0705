"""Hessian-free and constrained methods side by side: the paper's toys, one problem per class, and the price of a step.

    python benchmarks/constrained.py                       # all sections
    python benchmarks/constrained.py --section toys --out docs/methods/lvhba_toys.png
    python benchmarks/constrained.py --section members
    python benchmarks/constrained.py --section price

toys     LV-HBA on its two toy problems (n = 100) from their official starts, no step size set by hand; beside it a
         re-implementation of the published method and settings (raw rows, one saddle step, c_k = c0 (k+1)^p).
members  every member of the family on one strongly convex, one non-singleton and two constrained problems with known
         solutions, and beside it the same member with the steps and penalties of its public code ("published").
price    the time of one LV-HBA step against its six gradient evaluations (f_y at theta and at y, f_x at theta and at
         y, F_x, F_y), on a problem where they dominate and on toy LLC.

All in float64. Times are CPU seconds of the process on one core without compilation: medians of interleaved rounds.
"""

from __future__ import annotations

import functools
from pathlib import Path

import _harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import Problem, run
from bilevel.solvers import (
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


# Steps of the public code of LV-HBA on toy LLC.
OFFICIAL = {"alpha": 0.008, "beta": 0.02, "eta": 0.01, "gamma": (10.0, 10.0), "c0": 0.025, "p": 0.3, "r": 1000.0}


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
    """LV-HBA as published, for affine rows: raw, one simultaneous saddle step. Returns (x, y) after every step."""
    inequality = problem.equality is None
    coupled = problem.constraint if inequality else problem.equality
    rows = lambda x, y: jnp.atleast_1d(coupled(x, y))
    lower, upper = problem.lower, problem.upper
    low = 0.0 if inequality else -r

    def onto(u):
        """The projection on affine rows; on an inequality where there is one of them."""
        value, pull = jax.vjp(lambda u: rows(*u), u)
        adjoint = lambda w: pull(w)[0]
        push = lambda w: jax.jvp(lambda u: rows(*u), (u,), (adjoint(w),))[1]
        gram = jax.vmap(push)(jnp.eye(value.shape[0]))
        broken = jnp.maximum(value, 0) if inequality else value
        return jax.tree.map(lambda a, b: a - b, u, adjoint(jnp.linalg.solve(gram, broken)))

    def step(state, k):
        x, y, z, theta, lam = state
        c = c0 * (k + 1.0) ** p
        d_theta = jax.grad(lambda t: lower(x, t) + lam @ rows(x, t))(theta)
        d_theta = jax.tree.map(lambda d, t, y: d + (t - y) / gamma[0], d_theta, theta, y)
        d_lam = -rows(x, theta) + (lam - z) / gamma[1]
        theta = jax.tree.map(lambda t, d: t - eta * d, theta, d_theta)
        lam = jnp.clip(lam - eta * d_lam, low, r)

        def psi(x, y):
            prox = optax.tree.norm(optax.tree.sub(theta, y), squared=True) / (2 * gamma[0])
            return upper(x, y) / c + lower(x, y) - lower(x, theta) - lam @ rows(x, theta) - prox

        d_x, d_y = jax.grad(psi, argnums=(0, 1))(x, y)
        x, y = onto(jax.tree.map(lambda a, d: a - alpha * d, (x, y), (d_x, d_y)))
        z = jnp.clip(z + beta * (lam - z) / gamma[1], low, r)
        return (x, y, z, theta, lam), (x, y)

    x, y = onto((x, y))
    count = rows(x, y).shape[0]
    start = (x, y, jnp.full(count, z0), theta, jnp.full(count, lam0))
    return jax.lax.scan(step, start, jnp.arange(steps))[1]


def below(errors, level):
    """The first step from which the error stays below a level."""
    late = np.nonzero(~(errors < level))[0]
    first = late[-1] + 1 if len(late) else 0
    return "never" if first >= len(errors) else str(first)


def toys(steps, out):
    problem, x0, y0 = toy_llc()
    error = lambda x: jnp.linalg.norm(x + 0.3, axis=-1) / jnp.linalg.norm(jnp.full(x0.shape, 0.3))
    official = OFFICIAL
    theta0 = tuple(jnp.full(100, 1.0) for _ in range(2))
    curves = {
        "published settings": np.asarray(
            error(jax.jit(lambda: published(problem, x0, y0, theta0, steps, **official)[0])())
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
                    )[0]
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
    ("MEHA", MEHA(), 5000),
    ("  published", MEHA(alpha=1e-3, eta=1e-3, gamma=1.0, penalty=Polynomial(1.0, 0.49)), 5000),
    ("VPBGD", VPBGD(), 5000),
    ("  published", VPBGD(alpha=0.1, penalty=10.0), 5000),
    ("GPBGD", GPBGD(), 5000),
    ("BOME", BOME(), 5000),
    ("F2SA", F2SA(), 300),
    ("  published", F2SA(lower_solver=0.1, upper_optimizer=0.1, penalty=10.0), 300),
    ("F2BA", F2BA(), 200),
    ("CentralF2SA", CentralF2SA(), 200),
    ("BVFSM", BVFSM(), 200),
    ("GALET", GALET(), 200),
)
BOUND = (
    ("LVHBA", LVHBA(), 5000),
    ("  published", None, 5000),
    ("BiCGAFFA", BiCGAFFA(), 5000),
    (
        "  published",
        BiCGAFFA(alpha=1e-3, beta=1e-3, eta=0.01, gamma1=10.0, gamma2=1.0, penalty=Polynomial(1.0, 0.3, 10.0)),
        5000,
    ),
    ("SFLCB", SFLCB(), 5000),
    ("  published", SFLCB(step_size=1e-3, rho=0.1, penalty=10.0), 5000),
    ("BLOCC", BLOCC(), 100),
    ("  published", BLOCC(penalty=5.0, upper_optimizer=0.01), 100),
    ("GAM", GAM(), 100),
)
CASES = (
    ("strongly convex quadratic", quadratic, FREE),
    ("lower solution not unique", nonsingleton, FREE),
    ("active coupled inequality", active, BOUND),
    ("coupled equalities", equality, (*BOUND, ("AiPOD", AiPOD(), 100))),
)


def flat(u):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(u)])


def members(rounds, most):
    for title, make, solvers in CASES:
        problem, solution, start = make()
        solvers = [(name, solver, min(steps, most)) for name, solver, steps in solvers]
        scale = max(1.0, float(np.linalg.norm(flat(solution))))
        calls = []
        for _, solver, steps in solvers:
            if solver is None:
                call = jax.jit(
                    lambda problem=problem, start=start, steps=steps: published(
                        problem, *start, start[1], steps, **OFFICIAL, lam0=0.0, z0=0.0
                    )
                )
            else:
                go = jax.jit(lambda solver, start, problem=problem, steps=steps: run(problem, solver, *start, steps))
                call = functools.partial(go, solver, start)
            calls.append((call, jax.block_until_ready(call())))
        times = _harness.interleaved(
            {name: call for (name, _, _), (call, _) in zip(solvers, calls, strict=True)}, rounds
        )
        print(f"\n{title}")
        print(
            f"  {'':<12} {'steps':>6} {'to 1e-2':>8} {'rel. error':>11} {'residual':>9} {'gap':>9} "
            f"{'violation':>10} {'penalty':>8} {'us/step':>8}"
        )
        for (name, solver, steps), (_, found) in zip(solvers, calls, strict=True):
            each = times[name].median(unit=1e6) / steps
            if solver is None:
                end, last = jax.tree.map(lambda path: path[-1], found), {}
            else:
                state, metrics = found
                end, last = (state.x, state.y), {name: float(value[-1]) for name, value in metrics.items()}
            error = np.linalg.norm(flat(end) - flat(solution)) / scale
            shown = "".join(
                f"{last[key]:>{width}.1e} " if key in last else f"{'':>{width}} "
                for key, width in (("hypergradient_norm", 9), ("gap", 9), ("violation", 10))
            )
            c = f"{OFFICIAL['c0'] * steps ** OFFICIAL['p']:.1f}"
            if last:
                c = f"{last['penalty']:.0f}" if "penalty" in last else "-"
            reached = _first_within(problem, solver, start, steps, solution, scale, found)
            print(f"  {name:<12} {steps:>6} {reached:>8} {error:>11.1e} {shown}{c:>8} {each:>8.1f}")


def _first_within(problem, solver, start, steps, solution, scale, found, level=1e-2):
    """The first step from which (x, y) stays within `level` of the solution."""
    if solver is None:
        points = found
    else:
        key = _Key()

        def body(state, k):
            state = solver.step(problem, state, key._replace_step(k))[0]
            return state, (state.x, state.y)

        def follow():
            state = solver.init(problem, *start, key._replace_step(0))
            return jax.lax.scan(body, state, jnp.arange(steps, dtype=jnp.uint32))[1]

        points = jax.jit(follow)()
    points = np.concatenate([np.reshape(leaf, (steps, -1)) for leaf in jax.tree.leaves(points)], axis=1)
    return below(np.linalg.norm(points - flat(solution), axis=1) / scale, level)


# The price of a step ------------------------------------------------------------------------------------------------


def weighted_regression(samples=4000, width=512):
    """One weight per sample and one coupled equality: every gradient is a pass over the data."""
    random = np.random.default_rng(0)
    data = (jnp.asarray(random.normal(size=(samples, width))), jnp.asarray(random.normal(size=samples)))
    losses = lambda y, batch: 0.5 * (jnp.tanh(batch[0] @ y) - batch[1]) ** 2
    problem = Problem(
        lambda x, y, batch: jnp.mean(losses(y, batch)),
        lambda x, y, batch: jnp.mean(jax.nn.sigmoid(x) * losses(y, batch)) + 0.5 * jnp.sum(y**2),
        upper_data=data,
        lower_data=data,
        equality=lambda x, y: jnp.sum(y) + 0.1 * jnp.mean(x),
    )
    return problem, jnp.zeros(samples), jnp.zeros(width)


def six_gradients(problem, x, y, theta):
    """f_y at theta and at y, f_x at theta and at y, F_x and F_y, each at a point of its own so that none is shared."""
    lower, upper = problem.draw_lower(0), problem.draw_upper(0)
    small = lambda u, d: jax.tree.map(lambda a, b: a - 1e-9 * b, u, d)
    theta = small(theta, jax.grad(lower, argnums=1)(x, theta))
    y = small(y, jax.grad(lower, argnums=1)(x, y))
    x = small(x, jax.grad(lower)(x, theta))
    x = small(x, jax.grad(lower)(x, y))
    x = small(x, jax.grad(upper)(x, y))
    return x, small(y, jax.grad(upper, argnums=1)(x, y)), theta


def price(rounds, most):
    key = _Key()
    for title, (problem, x, y), repeats in (
        ("4,000 samples of 512 features, a weight each", weighted_regression(), 20),
        ("toy LLC, n = 100", toy_llc(), 2000),
    ):
        calls, repeats = {}, min(repeats, most)
        for name, solver in (("LVHBA()", LVHBA()), ("LVHBA(extragradient=False)", LVHBA(extragradient=False))):
            state = solver.init(problem, x, y, key._replace_step(0))
            go = jax.jit(
                lambda problem, state, solver=solver, repeats=repeats: jax.lax.scan(
                    lambda s, k: solver.step(problem, s, key._replace_step(k)),
                    state,
                    jnp.arange(1, 1 + repeats, dtype=jnp.uint32),
                )
            )
            calls[name] = functools.partial(go, problem, state)
        six = jax.jit(
            lambda problem, x, y, theta, repeats=repeats: jax.lax.scan(
                lambda u, _: (six_gradients(problem, *u), None), (x, y, theta), None, length=repeats
            )[0]
        )
        calls["six gradients"] = functools.partial(six, problem, x, y, jax.tree.map(lambda leaf: leaf + 0.01, y))
        times = _harness.interleaved(calls, rounds)
        base = times["six gradients"]
        print(f"\nOne step, {title}: medians of {rounds} rounds of {repeats}")
        for name, taken in times.items():
            each = taken.median(unit=1e6) / repeats
            print(f"  {name:<28} {each:10.1f} us   {_harness.ratio(taken, base)}")


def main():
    parser = _harness.arguments(__doc__, rounds=7)
    parser.add_argument("--section", choices=("toys", "members", "price"), default=None)
    parser.add_argument("--steps", type=int, default=5000, help="of the toys")
    parser.add_argument("--out", type=Path, default=None, help="a picture of the toys")
    args = _harness.start(parser, "optax", section="price", steps=1000)
    most = 20 if args.quick else 1_000_000
    if args.section in (None, "toys"):
        toys(args.steps, args.out)
    if args.section in (None, "members"):
        members(args.rounds, most)
    if args.section in (None, "price"):
        price(args.rounds, most)


if __name__ == "__main__":
    main()
