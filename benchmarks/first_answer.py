"""What a first and a second call of `solve` cost, taken apart, beside hand-written loops of the same methods.

    python benchmarks/first_answer.py
    python benchmarks/first_answer.py --only quadratic,F2BA

Each first call is the first one of its own process, after the imports: CPU seconds, the programmes compiled, and the
seconds that JAX traced, lowered and compiled for (wall clock; what is left is Python and the run). The second call has
other numbers and the solver made anew. With and without a tolerance, on a linear-quadratic problem of two variables,
whose end is looked at exactly, and on one with a quartic term, whose end is searched around. By hand: the method's
steps as a page of the paper has them, 200 in one compiled scan, with constants that a user would have chosen; no start
is checked, no step found, nothing recorded, no end looked at. Rounds take turns; medians.

Below it the README's data cleaning, real images: 1,000 steps, cold and warm, and how much of the CPU time is spent on
looking at the end. It prints no ratio to a peer: none has a certificate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import _harness
import numpy as np

SOLVERS = ("the choice", "AID", "ITD", "SOBA", "F2BA", "MEHA", "BOME", "LVHBA", "ProbedSingleLoop")
BY_HAND = {"the choice": "AID"}
"""The method that a row is beside, where it is another than the row's own."""
PROBLEMS = ("quadratic", "quartic")
STEPS = 200


STAGES = {
    "jaxpr_trace_duration": "trace",
    "jaxpr_to_mlir_module_duration": "lower",
    "backend_compile_duration": "compile",
}


class Seen:
    """What JAX reports of its work: programmes, and the seconds it was tracing, lowering and compiling."""

    def __init__(self) -> None:
        import jax

        self.spans: list[tuple[str, float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._seen)

    def _seen(self, name: str, seconds: float, **_: Any) -> None:
        stage = STAGES.get(name.rsplit("/", 1)[-1])
        if stage is not None:
            now = time.time()
            self.spans.append((stage, now - seconds, now))

    def taken(self) -> dict[str, float]:
        """Programmes and seconds since the last call; a second in several stages at once counts for the latest."""
        spans, self.spans = self.spans, []
        ends = sorted({end for _, start, stop in spans for end in (start, stop)})
        found = {"programmes": float(sum(stage == "compile" for stage, *_ in spans))}
        for stage in STAGES.values():
            found[stage] = 0.0
        for left, right in zip(ends, ends[1:], strict=False):
            inside = {stage for stage, start, stop in spans if start <= left and right <= stop}
            for stage in reversed(STAGES.values()):
                if stage in inside:
                    found[stage] += right - left
                    break
        return found


def losses(problem: str) -> tuple[Any, Any]:
    """F(x, y, centre) and f(x, y)."""
    import jax.numpy as jnp

    lower = {
        "quadratic": lambda x, y: jnp.sum((y - x) ** 2),
        "quartic": lambda x, y: jnp.sum((y - x) ** 2 + 0.1 * y**4),
    }
    return lambda x, y, c: jnp.sum((y - c) ** 2) + 0.1 * jnp.sum(x**2), lower[problem]


def by_solve(problem: str, name: str, tol: float | None) -> Any:
    """A call of `solve` as a function of the centre; what it returns is how the run ended."""
    import jax.numpy as jnp

    from bilevel import Problem, solve, solvers

    upper, lower = losses(problem)
    rows = {"constraint": lambda x, y: y - 3} if name == "LVHBA" else {}
    make = {"the choice": lambda: None, "ITD": lambda: solvers.ITD(10, 0.1)}.get(name) or getattr(solvers, name)

    start = jnp.zeros(2)

    def call(centre: Any) -> str:
        given = Problem(upper, lower, upper_data=centre, **rows)
        return solve(given, start, start, make(), steps=STEPS, tol=tol, progress=False).result.name

    return call


def by_hand(problem: str, name: str) -> Any:
    """A hand-written loop of the method, as a function of the centre."""
    import jax
    import jax.numpy as jnp

    F, f = losses(problem)
    f_y, row = jax.grad(f, 1), lambda x, y: y - 3.0

    def descend(of: Any, y: Any, rate: float = 0.1, steps: int = 10) -> Any:
        return jax.lax.fori_loop(0, steps, lambda _, y: y - rate * jax.grad(of)(y), y)

    def product(x: Any, y: Any, v: Any) -> Any:
        return jax.jvp(lambda y: f_y(x, y), (y,), (v,))[1]

    def cross(x: Any, y: Any, v: Any) -> Any:
        return jax.grad(lambda x: jnp.vdot(f_y(x, y), v))(x)

    def aid(state: Any, c: Any) -> Any:
        x, y = state
        y = descend(lambda y: f(x, y), y)
        F_x, F_y = jax.grad(F, (0, 1))(x, y, c)
        v = jax.scipy.sparse.linalg.cg(lambda v: product(x, y, v), F_y, maxiter=10)[0]
        return x - 0.1 * (F_x - cross(x, y, v)), y

    def itd(state: Any, c: Any) -> Any:
        x, y = state

        def objective(x: Any) -> Any:
            lower = jax.lax.scan(lambda y, _: (y - 0.1 * f_y(x, y), None), y, None, 10)[0]
            return F(x, lower, c), lower

        g, y = jax.grad(objective, has_aux=True)(x)
        return x - 0.1 * g, y

    def soba(state: Any, c: Any) -> Any:
        x, y, v = state
        F_x, F_y = jax.grad(F, (0, 1))(x, y, c)
        D_x, D_v = F_x - cross(x, y, v), product(x, y, v) - F_y
        return x - 0.1 * D_x, y - 0.1 * f_y(x, y), v - 0.1 * D_v

    def f2ba(state: Any, c: Any) -> Any:
        x, y, z = state
        z = descend(lambda z: f(x, z), z)
        y = descend(lambda y: f(x, y) + F(x, y, c) / 10, y)
        slope = jax.grad(lambda x: F(x, y, c) + 10 * (f(x, y) - f(x, z)))(x)
        return x - 0.01 * slope, y, z

    def meha(state: Any, c: Any) -> Any:
        x, y, theta = state
        theta = theta - 0.1 * (f_y(x, theta) + (theta - y) / 2)
        slope = jax.grad(lambda x, y: F(x, y, c) / 10 + f(x, y) - f(x, theta) - jnp.sum((theta - y) ** 2) / 4, (0, 1))
        D_x, _ = slope(x, y)
        x = x - 0.1 * D_x
        return x, y - 0.1 * slope(x, y)[1], theta

    def bome(state: Any, c: Any) -> Any:
        x, y = state
        w = descend(lambda y: f(x, y), y)
        up = jax.grad(F, (0, 1))(x, y, c)
        down = jax.grad(lambda x, y: f(x, y) - f(x, w), (0, 1))(x, y)
        size = sum(jnp.vdot(d, d) for d in down)
        lam = jnp.maximum(0.5 - sum(jnp.vdot(u, d) for u, d in zip(up, down, strict=True)) / (size + 1e-8), 0.0)
        return tuple(p - 0.01 * (u + lam * d) for p, u, d in zip(state, up, down, strict=True))

    def lvhba(state: Any, c: Any) -> Any:
        x, y, theta, z = state
        saddle = lambda theta, lam: f(x, theta) + jnp.vdot(lam, row(x, theta)) + jnp.sum((theta - y) ** 2) / 2
        lam = z
        theta = theta - 0.1 * jax.grad(saddle)(theta, lam)
        lam = jnp.clip(lam + 0.1 * (row(x, theta) - (lam - z) / 10), 0, 100)
        psi = lambda x, y: F(x, y, c) / 10 + f(x, y) - f(x, theta) - jnp.vdot(lam, row(x, theta))
        near = lambda x, y: psi(x, y) - jnp.sum((theta - y) ** 2) / 2
        D_x, D_y = jax.grad(near, (0, 1))(x, y)
        return x - 0.1 * D_x, jnp.minimum(y - 0.1 * D_y, 3.0), theta, jnp.clip(z + 0.1 * (lam - z), 0, 100)

    zero = jnp.zeros(2)
    step, copies = {
        "AID": (aid, 2), "ITD": (itd, 2), "SOBA": (soba, 3), "F2BA": (f2ba, 3), "MEHA": (meha, 3), "BOME": (bome, 2),
        "LVHBA": (lvhba, 4),
    }[name]  # fmt: skip

    @jax.jit
    def run(state: Any, c: Any) -> Any:
        return jax.lax.scan(lambda state, _: (step(state, c), None), state, None, STEPS)[0]

    def call(centre: Any) -> str:
        return "finite" if np.isfinite(np.asarray(run((zero,) * copies, centre)[0])).all() else "not finite"

    return call


def one(problem: str, name: str, side: str) -> dict[str, Any]:
    """What a first and a second call cost in this process; `side`: "hand", or a tolerance ("none")."""
    import jax.numpy as jnp

    seen = Seen()
    centres = jnp.array([1.0]), jnp.array([1.5])
    if side == "hand":
        call = by_hand(problem, name)
    else:
        call = by_solve(problem, name, None if side == "none" else float(side))
    seen.taken()
    found: dict[str, Any] = {}
    for which, centre in zip(("first", "second"), centres, strict=True):
        start = time.process_time()
        ended = call(centre)
        found[which] = {"cpu": time.process_time() - start, **seen.taken(), "ended": ended}
    return found


def in_a_process(*of: str) -> dict[str, Any]:
    """`one` in a new process."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", *of], capture_output=True, text=True, check=False, timeout=600
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(of)}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def compared(problem: str, name: str, rounds: int) -> list[tuple[str, ...]]:
    """The rows of a solver on a problem: with and without a tolerance."""
    hand = BY_HAND.get(name, name)
    sides = {"none": name, "1e-4": name} | ({} if hand == "ProbedSingleLoop" else {"hand": hand})
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, whose in sides.items():
            found[side].append(in_a_process(problem, whose, side))

    def median(side: str, which: str, what: str) -> float:
        return statistics.median(run[which][what] for run in found[side])

    rows = []
    for side in ("none", "1e-4"):
        first = [f"{median(side, 'first', what):.2f}" for what in ("cpu", "trace", "lower", "compile")]
        second = f"{1e3 * median(side, 'second', 'cpu'):.0f}", f"{median(side, 'second', 'programmes'):.0f}"
        row = (
            name,
            side,
            f"{median(side, 'first', 'programmes'):.0f}",
            *first,
            *second,
            found[side][0]["first"]["ended"],
        )
        if "hand" in sides:
            pairs = zip(found[side], found["hand"], strict=True)
            over = statistics.median(a["first"]["cpu"] / b["first"]["cpu"] for a, b in pairs)
            row = *row, f"{median('hand', 'first', 'cpu'):.2f}", f"{over:.1f}"
        rows.append(row if "hand" in sides else (*row, "", ""))
    return rows


def data_cleaning() -> tuple[Any, Any]:
    """The README's problem and solver."""
    import jax
    import jax.numpy as jnp
    import optax

    from bilevel import Problem, datasets, lower, solvers

    images, labels = datasets.digits()
    (X, t), clean = datasets.split((images / 16, labels), sizes=(1000, 200), seed=0)
    noisy, _ = datasets.corrupt_labels(t, rate=0.5, classes=10, seed=0)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels

    def weighted(x: Any, y: Any, batch: Any) -> Any:
        images, labels, sample = batch
        return (jax.nn.sigmoid(x)[sample] * cross_entropy(images @ y, labels)).mean() + 1e-3 * jnp.sum(y**2)

    problem = Problem(
        lambda x, y, batch: cross_entropy(batch[0] @ y, batch[1]).mean(), weighted,
        upper_data=clean, lower_data=(X, noisy, jnp.arange(1000)),
    )  # fmt: skip
    return problem, solvers.AID(lower.GradientDescent(1.0, steps=10), upper_optimizer=optax.adam(0.1))


def cleaning(steps: int, rounds: int) -> None:
    """The README's problem: how much of a run is spent on looking at its end."""
    from unittest import mock

    import jax.numpy as jnp

    from bilevel import solve
    from bilevel.solvers import certificate

    problem, solver = data_cleaning()
    table = [("README's problem", "tolerance", "steps", "CPU s", "of which the certificate", "looks", "share")]
    for tol in (None, 1e-3):
        for k in range(1 + rounds):
            spent: list[float] = []

            def look(*given: Any, spent: list[float] = spent) -> Any:
                start = time.process_time()
                found = certificate.certify(*given)
                spent.append(time.process_time() - start)
                return found

            with mock.patch("bilevel.solve.certify", look):
                start = time.process_time()
                solution = solve(
                    problem, jnp.zeros(1000), jnp.zeros((64, 10)), solver, steps=steps, tol=tol, progress=False
                )
                seconds = time.process_time() - start
            row = f"{solution.steps}", f"{seconds:.2f}", f"{sum(spent):.3f}", f"{len(spent)}"
            table.append(("warm" if k else "cold", f"{tol or 'none'}", *row, f"{sum(spent) / seconds:.1%}"))
    _harness.table(*table)


def main() -> None:
    """Print the tables."""
    parser = _harness.arguments(__doc__, rounds=3)
    parser.add_argument("--steps", type=int, default=1000, help="of the README's problem")
    parser.add_argument("--only", help="problem,solver: these rows alone")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    if "--one" in sys.argv:
        print(json.dumps(one(*parser.parse_args().one)))
        return
    args = _harness.start(parser, "optax", pin=False, steps=50, only="quadratic,SOBA")
    header = (
        "tolerance", "programmes", "CPU s", "trace", "lower", "compile", "second: ms", "programmes", "ended",
        "by hand: CPU s", "ratio",
    )  # fmt: skip
    for problem in PROBLEMS:
        chosen = [name for name in SOLVERS if args.only in (None, f"{problem},{name}")]
        if chosen:
            _harness.table(
                (problem, *header), *(row for name in chosen for row in compared(problem, name, args.rounds))
            )
    if args.only is None or args.quick:
        cleaning(args.steps, args.rounds)


if __name__ == "__main__":
    main()
