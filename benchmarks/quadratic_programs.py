"""Quadratic programmes as layers: `implicit.qp` against qpax, jaxopt's OSQP and MPAX, where they are installed.

Accuracy (the largest violation of the optimality conditions, relative), derivatives in both modes against central
differences, degenerate, infeasible and unbounded programmes, compile time and time of a batch. All in one process on
one core, in float64 unless said.

    python benchmarks/quadratic_programs.py
    python benchmarks/quadratic_programs.py --sizes 10 50 --batch 32
"""

from __future__ import annotations

import warnings

import _harness
import numpy as np


def programme(seed, n, kind="strict"):
    """A feasible programme with about n rows, a third of them active."""
    random = np.random.default_rng(seed)
    root = random.normal(size=(n, n)) / np.sqrt(n)
    A, inside = random.normal(size=(max(1, n // 5), n)), random.normal(size=n)
    G = random.normal(size=(n, n))
    h = G @ inside + random.uniform(0, 1, n) * (random.uniform(size=n) < 0.7)
    Q, c = root @ root.T + 0.1 * np.eye(n), 3 * random.normal(size=n)
    b = A @ inside
    if kind == "rows twice":
        G, h = np.vstack([G, G[: n // 2]]), np.concatenate([h, h[: n // 2]])
        A, b = np.vstack([A, A[:1]]), np.concatenate([b, b[:1]])
    if kind == "linear":
        Q, G, h = 0 * Q, np.vstack([G, np.eye(n), -np.eye(n)]), np.concatenate([h, np.full(2 * n, 5.0)])
    if kind == "units of 1e6":
        Q, c, G, h = 1e6 * Q, 1e6 * c, 1e-6 * G, 1e-6 * h
    return Q, c, A, b, G, h


def residual(solution, Q, c, A, b, G, h):
    """The largest relative violation of the conditions; inf where there is no number."""
    y, nu, lam = (np.asarray(v, float) for v in solution)
    if not all(np.isfinite(v).all() for v in (y, nu, lam)):
        return np.inf
    size = np.abs(G).max()
    force = max(np.abs(c).max(), np.abs(Q @ y).max())
    slack = (h - G @ y) / (size * max(1, np.abs(y).max()))
    return max(
        np.abs(Q @ y + c + A.T @ nu + G.T @ lam).max() / force,
        np.abs(A @ y - b).max() / (np.abs(A).max() * max(1, np.abs(y).max())),
        max(-slack.min(), 0),
        max(-lam.min() * size / force, 0),
        np.minimum(np.abs(lam) * size / force, np.abs(slack)).max(),
    )


def sides():
    """Functions (Q, c, A, b, G, h) -> (y, nu, lam), and what each says of how it ended."""
    import jax
    import jax.numpy as jnp

    from bilevel import implicit

    def ours(*args):
        found = implicit.qp(*args)
        return (found.y, found.nu, found.lam), found.status

    found = {"implicit.qp": ours}
    try:
        import qpax

        def with_qpax(Q, c, A, b, G, h):
            y, _, lam, nu, converged, _ = qpax.solve_qp(Q, c, A, b, G, h, solver_tol=1e-9)
            return (y, nu, lam), converged

        def layer(*args):
            return (qpax.solve_qp_primal(*args, solver_tol=1e-9, target_kappa=1e-9),) * 3, 0

        found["qpax"] = with_qpax
        found["qpax"].layer = layer
    except ImportError:
        print("qpax is not installed: left out")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            import jaxopt

        def with_osqp(Q, c, A, b, G, h):
            osqp = jaxopt.OSQP(tol=1e-8, maxiter=20_000)
            found, state = osqp.run(None, (Q, c), (A, b), (G, h))
            return (found.primal, found.dual_eq, found.dual_ineq), state.status

        found["jaxopt OSQP"] = with_osqp
    except ImportError:
        print("jaxopt is not installed: left out")
    try:
        import mpax

        def with_mpax(Q, c, A, b, G, h):
            wide = jnp.full(c.shape, jnp.inf)
            stated = mpax.create_qp(Q, c, A, b, -G, -h, -wide, wide, use_sparse_matrix=False)
            found = mpax.raPDHG(eps_abs=1e-8, eps_rel=1e-8, iteration_limit=50_000).optimize(stated)
            p = b.shape[0]
            return (found.primal_solution, -found.dual_solution[:p], found.dual_solution[p:]), found.termination_status

        found["MPAX raPDHG"] = with_mpax
    except ImportError:
        print("MPAX is not installed: left out")
    return {name: jax.jit(side) if name != "MPAX raPDHG" else side for name, side in found.items()}, found


def attempted(call):
    """A number as text, or the kind of error."""
    try:
        return f"{call():.1e}"
    except Exception as error:
        return type(error).__name__


def derivative_error(side, args, mode):
    """|J - central differences| of y by c, relative."""
    import jax
    import jax.numpy as jnp

    of_c = lambda c: side(args[0], c, *args[2:])[0][0]
    exact = jax.jit(lambda c: sides_reference(args[0], c, *args[2:]))
    eps = 1e-5
    expected = np.stack(
        [(exact(args[1] + eps * e) - exact(args[1] - eps * e)) / (2 * eps) for e in np.eye(len(args[1]))], -1
    )
    jacobian = (jax.jacfwd if mode == "forward" else jax.jacrev)(of_c)(jnp.asarray(args[1]))
    return _harness.difference(jacobian, expected)


def sides_reference(*args):
    from bilevel import implicit

    return implicit.qp(*args).y


def main():
    parser = _harness.arguments(__doc__, rounds=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 40])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--programmes", type=int, default=10, help="of each kind")
    options = _harness.start(parser, "qpax", "jaxopt", "mpax", sizes=[6], batch=4, programmes=2)

    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    compiled, plain = sides()
    for n in options.sizes:
        print(f"\nn = {n}: worst violation of the conditions over {options.programmes} programmes")
        kinds = ("strict", "linear", "rows twice", "units of 1e6")
        rows = []
        for name, side in compiled.items():
            cells = []
            for kind in kinds:
                each = [programme(seed, n, kind) for seed in range(options.programmes)]
                cells.append(attempted(lambda: max(residual(side(*map(jnp.asarray, p))[0], *p) for p in each)))
            single = [tuple(a.astype(np.float32) for a in programme(seed, n)) for seed in range(options.programmes)]
            cells.append(attempted(lambda: max(residual(side(*map(jnp.asarray, p))[0], *p) for p in single)))
            rows.append((name, *cells))
        _harness.table(("", *kinds, "float32"), *rows)

    n = options.sizes[0]
    args = tuple(map(jnp.asarray, programme(0, n)))
    print(f"\nn = {n}: derivatives of y by c against central differences, and of second order")
    rows = []
    for name, side in plain.items():
        side = getattr(side, "layer", side)
        second = lambda: float(
            jnp.linalg.norm(jax.hessian(lambda c: jnp.sum(side(args[0], c, *args[2:])[0][0] ** 2))(args[1]))
        )
        rows.append(
            (
                name,
                *(attempted(lambda: derivative_error(side, args, m)) for m in ("forward", "reverse")),
                attempted(second),
            )
        )
    _harness.table(("", "forward", "reverse", "norm of a Hessian"), *rows)

    print("\nwhat is said of programmes without a solution (and whether y holds a NaN)")
    empty = (np.eye(2), np.zeros(2), np.ones((1, 2)), np.ones(1), np.array([[1.0, 0], [-1, 0]]), np.array([-1.0, -1]))
    falling = (
        np.diag([1.0, 0]),
        np.array([0.0, 1]),
        np.array([[1.0, 0]]),
        np.ones(1),
        np.array([[0.0, 1]]),
        np.ones(1),
    )
    rows = []
    for name, side in compiled.items():
        cells = []
        for p in (empty, falling):
            try:
                (y, _, _), status = side(*map(jnp.asarray, p))
                cells.append(f"{int(status)} ({'NaN' if np.isnan(np.asarray(y)).any() else f'{np.abs(y).max():.1e}'})")
            except Exception as error:
                cells.append(type(error).__name__)
        rows.append((name, *cells))
    _harness.table(("", "infeasible", "unbounded"), *rows)

    print(f"\na batch of {options.batch}: seconds to compile, ms for y and for a gradient by c (CPU time)")
    for n in options.sizes:
        batch = [
            jnp.stack(a) for a in zip(*(map(jnp.asarray, programme(s, n)) for s in range(options.batch)), strict=True)
        ]
        calls, gradients, rows = {}, {}, {}
        for name, side in plain.items():
            layer = getattr(side, "layer", side)
            value = jax.jit(jax.vmap(lambda *p: side(*p)[0][0]))
            gradient = jax.jit(
                jax.grad(
                    lambda c: jnp.sum(jax.vmap(lambda c, *p: layer(p[0], c, *p[1:])[0][0])(c, batch[0], *batch[2:]))
                )
            )
            try:
                program, time = _harness.compiled(value, *batch)
                calls[name] = lambda program=program: program(*batch)
                rows[name] = time.median()
            except Exception as error:
                rows[name] = type(error).__name__
                continue
            try:
                program, _ = _harness.compiled(gradient, batch[1])
                gradients[name] = lambda program=program: program(batch[1])
            except Exception as error:
                print(f"{name}: no gradient of a batch ({type(error).__name__})")
        times = _harness.interleaved(calls, options.rounds), _harness.interleaved(gradients, options.rounds)
        cells = [
            (name, rows[name], *(t[name].median(unit=1e3) if name in t else "-" for t in times),
             *(_harness.ratio(times[0]["implicit.qp"], times[0][name]) if name in times[0] else "-" for _ in (0,)))
            for name in rows
        ]  # fmt: skip
        print(f"n = {n}")
        _harness.table(("", "compile s", "y ms", "gradient ms", "ours / theirs"), *cells)


if __name__ == "__main__":
    main()
