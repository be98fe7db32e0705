"""Convolutional networks in the compiled loop: a gradient alone, in a plain `lax.scan`, and in `run`, CPU time of each.

    python benchmarks/convolutions.py

Three layers of 3 x 3 convolutions over 16 channels of 16 images of 32 x 32 places (synthetic). XLA:CPU has a kernel for
one order of axes and brings convolutions into it outside of loops alone; `run` and `solve` do so in their loop. All
sides take the same steps from the same start, whose ends are compared first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import _harness


def main() -> None:
    parser = _harness.arguments(__doc__, rounds=5)
    args = _harness.start(parser, "optax")
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bilevel import Problem, run

    random, steps = np.random.default_rng(0), 5
    image = jnp.asarray(random.standard_normal((16, 32, 32, 16)), jnp.float32)
    y = [jnp.asarray(0.1 * random.standard_normal((3, 3, 16, 16)), jnp.float32) for _ in range(3)]

    def loss(x: Any, y: Any, batch: Any) -> Any:
        for kernel in y:
            order = ("NHWC", "HWIO", "NHWC")
            batch = jax.nn.silu(jax.lax.conv_general_dilated(batch, kernel, (1, 1), "SAME", dimension_numbers=order))
        return jnp.mean(batch**2) + jnp.sum(x**2)

    problem = Problem(loss, loss, upper_data=image, lower_data=image)
    descend = lambda y: jax.tree.map(lambda a, b: a - 0.1 * b, y, jax.grad(loss, 1)(jnp.zeros(1), y, image))

    class At(NamedTuple):
        x: Any
        y: Any

    class Descent(NamedTuple):
        def init(self, problem: Any, x: Any, y: Any, key: Any) -> At:
            return At(x, y)

        def step(self, problem: Any, at: At, key: Any) -> tuple[At, dict[str, Any]]:
            slope = problem.draw_lower(key).gradient(at.x, at.y)
            return At(at.x, jax.tree.map(lambda a, b: a - 0.1 * b, at.y, slope)), {}

    one = jax.jit(descend)

    def alone() -> Any:
        now = y
        for _ in range(steps):
            now = one(now)
        return now

    scan = jax.jit(lambda y: jax.lax.scan(lambda y, _: (descend(y), None), y, None, length=steps)[0])
    ours = jax.jit(lambda y: run(problem, Descent(), jnp.zeros(1), y, steps)[0].y)
    calls = {"steps one by one": alone, "lax.scan": lambda: scan(y), "run": lambda: ours(y)}
    ends = {name: np.concatenate([np.ravel(leaf) for leaf in call()]) for name, call in calls.items()}
    print("ends differ by", {name: f"{_harness.difference(end, ends['lax.scan']):.1e}" for name, end in ends.items()})
    times = _harness.interleaved(calls, args.rounds)
    rows = [
        (name, f"{t.median(unit=1e3) / steps:.1f}", _harness.ratio(t, times["lax.scan"])) for name, t in times.items()
    ]
    _harness.table(("", "CPU ms per step", "over lax.scan"), *rows)


if __name__ == "__main__":
    main()
