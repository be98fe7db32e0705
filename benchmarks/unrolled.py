"""Unrolled hypergradients of a deep network: memory and time, plain reverse mode against ours.

    python benchmarks/unrolled.py

16 SGD steps on a multilayer perceptron (64 - 128 x 12 - 10, gelu, batch 1,024, synthetic data), one weight per sample
as upper variable. Plain: `jax.grad` through a scan of `y - eta jax.grad(f)`. Ours: `Unrolled()`, one checkpoint per
step and the mixed-mode gradient; also each of the two alone. Temporaries are those that XLA reserves for the compiled
program; times are interleaved in one process.
"""

from __future__ import annotations

import _harness
import jax
import jax.numpy as jnp
import numpy as np

from bilevel import Problem, lower
from bilevel.derivatives import mixed_mode_gradient
from bilevel.hypergradients import Unrolled, value_and_hypergradient

WIDTHS, BATCH, STEPS, ETA = (64, *[128] * 12, 10), 1024, 16, 0.05


def network(y, images):
    for w, b in y[:-1]:
        images = jax.nn.gelu(images @ w + b)
    return images @ y[-1][0] + y[-1][1]


def losses(y, batch):
    return -jnp.take_along_axis(jax.nn.log_softmax(network(y, batch[0])), batch[1][:, None], 1)[:, 0]


def training(x, y, batch):
    return jnp.mean(jax.nn.sigmoid(x) * losses(y, batch))


def validation(x, y, batch):
    return jnp.mean(losses(y, batch))


def main():
    args = _harness.start(_harness.arguments(__doc__, rounds=5))
    rng = np.random.default_rng(0)
    y = [
        (jnp.asarray(rng.normal(size=s) * np.sqrt(2 / s[0]), jnp.float32), jnp.zeros(s[1]))
        for s in zip(WIDTHS[:-1], WIDTHS[1:], strict=True)
    ]
    make = lambda: (
        jnp.asarray(rng.normal(size=(BATCH, WIDTHS[0])), jnp.float32),
        jnp.asarray(rng.integers(0, 10, BATCH)),
    )
    train, val, x = make(), make(), jnp.zeros(BATCH)

    def hand(checkpoint, mixed):
        gradient = mixed_mode_gradient(training) if mixed else jax.grad(training, 1)

        def objective(x, y, train, val):
            def step(y, _):
                return jax.tree.map(lambda v, g: v - ETA * g, y, gradient(x, y, train)), None

            y, _ = jax.lax.scan(jax.checkpoint(step, prevent_cse=False) if checkpoint else step, y, None, length=STEPS)
            return validation(x, y, val)

        return jax.jit(jax.grad(objective))

    def ours(x, y, train, val):
        problem = Problem(upper=validation, lower=training, upper_data=val, lower_data=train)
        return value_and_hypergradient(problem, Unrolled(), lower.GradientDescent(ETA, STEPS))(x, y).gradient

    programs = {
        "plain reverse": hand(False, False),
        "checkpoint": hand(True, False),
        "mixed mode": hand(False, True),
        "Unrolled()": jax.jit(ours),
    }
    compiled = {name: f.lower(x, y, train, val).compile() for name, f in programs.items()}
    results = {name: c(x, y, train, val) for name, c in compiled.items()}
    times = _harness.interleaved(
        {name: lambda c=c: c(x, y, train, val) for name, c in compiled.items()}, args.rounds, warm=0
    )
    plain = results["plain reverse"]
    base = compiled["plain reverse"].memory_analysis().temp_size_in_bytes
    for name, c in compiled.items():
        memory = c.memory_analysis().temp_size_in_bytes
        print(
            f"{name:<14} temporaries {memory / 1e6:8.1f} MB (1/{base / memory:.1f} of plain), "
            f"CPU {times[name].median(unit=1e3):7.1f} ms, ratio {_harness.ratio(times[name], times['plain reverse'])}, "
            f"differs by {_harness.difference(results[name], plain):.1e}"
        )


if __name__ == "__main__":
    main()
