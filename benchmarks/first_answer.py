"""What a first and a second call of `solve` cost: programmes compiled and CPU seconds, and the certificate's share.

    python benchmarks/first_answer.py

Each row is one process's first call of that solver (JAX's caches are emptied before it) and a second call with other
numbers and the solver made anew, with and without a tolerance: on a linear-quadratic problem of two variables, whose
end is looked at exactly, and on one with a quartic term, whose end is searched around. Below it the README's data
cleaning, real images: 1,000 steps, cold and warm, and how much of the CPU time is spent on looking at the end. It
prints no ratio to a peer: none has a certificate.
"""

from __future__ import annotations

import functools
import time
from unittest import mock

import _harness
import jax
import jax.numpy as jnp
import optax

from bilevel import Problem, datasets, lower, solve, solvers
from bilevel.solvers import certificate

COMPILED = "/jax/core/compile/backend_compile_duration"
SOLVERS = {
    "the choice": lambda: None, "AID": solvers.AID, "ITD": lambda: solvers.ITD(10, 0.1), "SOBA": solvers.SOBA,
    "F2BA": solvers.F2BA, "MEHA": solvers.MEHA, "BOME": solvers.BOME, "LVHBA": solvers.LVHBA,
    "ProbedSingleLoop": solvers.ProbedSingleLoop,
}  # fmt: skip


class Programmes:
    """How many programmes were compiled."""

    count = 0

    def __init__(self):
        jax.monitoring.register_event_duration_secs_listener(self._seen)

    def _seen(self, name, *_, **__):
        self.count += name == COMPILED


def quadratic(name, centre):
    rows = {"constraint": lambda x, y: y - 3} if name == "LVHBA" else {}
    return Problem(
        lambda x, y, c: jnp.sum((y - c) ** 2) + 0.1 * jnp.sum(x**2), lambda x, y: jnp.sum((y - x) ** 2),
        upper_data=centre, **rows,
    )  # fmt: skip


def quartic(name, centre):
    rows = {"constraint": lambda x, y: y - 3} if name == "LVHBA" else {}
    return Problem(
        lambda x, y, c: jnp.sum((y - c) ** 2) + 0.1 * jnp.sum(x**2),
        lambda x, y: jnp.sum((y - x) ** 2 + 0.1 * y**4), upper_data=centre, **rows,
    )  # fmt: skip


def data_cleaning():
    """The README's problem and solver."""
    images, labels = datasets.digits()
    (X, t), clean = datasets.split((images / 16, labels), sizes=(1000, 200), seed=0)
    noisy, _ = datasets.corrupt_labels(t, rate=0.5, classes=10, seed=0)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels

    def weighted(x, y, batch):
        images, labels, sample = batch
        return (jax.nn.sigmoid(x)[sample] * cross_entropy(images @ y, labels)).mean() + 1e-3 * jnp.sum(y**2)

    problem = Problem(
        lambda x, y, batch: cross_entropy(batch[0] @ y, batch[1]).mean(), weighted,
        upper_data=clean, lower_data=(X, noisy, jnp.arange(1000)),
    )  # fmt: skip
    return problem, solvers.AID(lower.GradientDescent(1.0, steps=10), upper_optimizer=optax.adam(0.1))


def timed(call, programmes):
    before, start = programmes.count, time.process_time()
    out = call()
    return time.process_time() - start, programmes.count - before, out


def main():
    parser = _harness.arguments(__doc__, rounds=3)
    parser.add_argument("--steps", type=int, default=1000, help="of the README's problem")
    args = _harness.start(parser, "optax", pin=False, steps=50)
    programmes = Programmes()
    for make_problem in (quadratic, quartic):
        counted = "first: programmes", "CPU s", "second: programmes", "CPU s", "ended"
        table = [(make_problem.__name__, "tolerance", *counted)]
        for name, make in SOLVERS.items():
            for tol in (None, 1e-4):
                jax.clear_caches()

                zero, centres = jnp.zeros(2), jnp.array([[1.0], [1.5]])

                def call(centre, given=make_problem, name=name, make=make, tol=tol, zero=zero):
                    return solve(given(name, centre), zero, zero, make(), steps=200, tol=tol, progress=False)

                first, second = (timed(functools.partial(call, centre), programmes) for centre in list(centres))
                row = f"{first[1]}", f"{first[0]:.2f}", f"{second[1]}", f"{second[0]:.3f}", first[2].result.name
                table.append((name, tol or "none", *row))
        _harness.table(*table)

    problem, solver = data_cleaning()
    table = [("README's problem", "tolerance", "steps", "CPU s", "of which the certificate", "looks", "share")]
    for tol in (None, 1e-3):
        for k in range(1 + args.rounds):
            spent = []

            def look(*given, spent=spent):
                start = time.process_time()
                found = certificate.certify(*given)
                spent.append(time.process_time() - start)
                return found

            with mock.patch("bilevel.solve.certify", look):
                call = lambda t=tol: solve(
                    problem, jnp.zeros(1000), jnp.zeros((64, 10)), solver, steps=args.steps, tol=t, progress=False
                )
                seconds, _, solution = timed(call, programmes)
            row = f"{solution.steps}", f"{seconds:.2f}", f"{sum(spent):.3f}", f"{len(spent)}"
            table.append(("warm" if k else "cold", tol or "none", *row, f"{sum(spent) / seconds:.1%}"))
    _harness.table(*table)


if __name__ == "__main__":
    main()
