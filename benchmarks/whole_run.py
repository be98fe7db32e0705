"""The metagradient of a whole training: memory and time of each schedule, against the training and hand-written JAX.

    python benchmarks/whole_run.py [--steps 10000]

Adam steps on a multilayer perceptron of 59,146 parameters (64 - 128 x 4 - 10, gelu, batches of 64 of 1,000 synthetic
samples that a linear teacher has labelled), one weight per sample as upper variable. The training alone is the unit of
time. By hand: `jax.grad` through optax and two nested `jax.lax.scan`s of checkpoints, each of sqrt(T) steps, and one
scan of checkpoints that stores all states. `metagradient` keeps its states in the host's memory. Temporaries are those
that XLA reserves for the compiled programme, in states (y and Adam's two moments). Times are CPU times on one core,
interleaved in one process.
"""

from __future__ import annotations

import math

import _harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from unrolled import losses, validation

from bilevel import Problem, data, lower, runs
from bilevel.hypergradients import Unrolled, value_and_hypergradient
from bilevel.keys import as_step_key

WIDTHS, SAMPLES, BATCH = (64, 128, 128, 128, 128, 10), 1000, 64
ALL = "Unrolled('all')"
RULE = optax.adam(1e-3, eps=1e-2, eps_root=1e-8)  # smooth: rounding does not grow along the run


def training(x, y, batch):
    return jnp.mean(jax.nn.sigmoid(x)[batch[2]] * losses(y, batch))


def main():
    parser = _harness.arguments(__doc__, rounds=1)
    parser.add_argument("--steps", type=int, default=10_000, help="of Adam (default 10,000)")
    args = _harness.start(parser, "optax", steps=400)
    steps, rng = args.steps, np.random.default_rng(0)
    y = [
        (jnp.asarray(rng.normal(size=s) * np.sqrt(2 / s[0]), jnp.float32), jnp.zeros(s[1]))
        for s in zip(WIDTHS[:-1], WIDTHS[1:], strict=True)
    ]
    images = rng.normal(size=(SAMPLES, WIDTHS[0])).astype(np.float32)
    labels = (images @ rng.normal(size=(WIDTHS[0], 10))).argmax(1)
    samples = jnp.asarray(images), jnp.asarray(labels), jnp.arange(SAMPLES)
    x = jnp.zeros(SAMPLES)
    solver = lower.GradientDescent(RULE, steps)
    size = sum(leaf.size for leaf in jax.tree.leaves(y))
    state_bytes = 3 * 4 * size

    def problem(samples):
        return Problem(validation, training, samples, data.Minibatches(samples, BATCH))

    def train(x, y, samples):
        return solver(problem(samples).draw_lower(as_step_key(0)), x, solver.init(y)).y

    def ours(keep):
        return lambda x, y, samples: value_and_hypergradient(problem(samples), Unrolled(checkpoint=keep), solver)(x, y)

    def by_hand(nested):
        def objective(x, y, samples):
            level = problem(samples).draw_lower(as_step_key(0))

            def step(carry, i):
                y, memory = carry
                gradient = jax.grad(training, 1)(x, y, level.redraw(i, steps).batch)
                update, memory = RULE.update(gradient, memory, y)
                return (optax.apply_updates(y, update), memory), None

            scan = lambda carry, over: jax.lax.scan(jax.checkpoint(step, prevent_cse=False), carry, over)
            state, length = (y, RULE.init(y)), math.isqrt(steps)
            if nested:
                segments = jnp.arange(length * length).reshape(length, length)
                state, _ = jax.lax.scan(jax.checkpoint(scan, prevent_cse=False), state, segments)
                rest = jnp.arange(length * length, steps)
            else:
                rest = jnp.arange(steps)
            if len(rest):
                state, _ = scan(state, rest)
            return validation(x, state[0], samples)

        return jax.value_and_grad(objective)

    programmes = {
        "training alone": train,
        "by hand, all": by_hand(False),
        "by hand, nested scans": by_hand(True),
        ALL: ours("all"),
        "Unrolled('sqrt')": ours("sqrt"),
        "Unrolled('log')": ours("log"),
    }
    compiled = {name: jax.jit(f).lower(x, y, samples).compile() for name, f in programmes.items()}
    compiled["metagradient"] = lambda x, y, samples: runs.metagradient(problem(samples), x, y, solver)
    results = {}

    def call(name):
        found = compiled[name](x, y, samples)
        results[name] = found.gradient if hasattr(found, "gradient") else found[-1]  # by hand, after the value
        return found

    times = _harness.interleaved({name: lambda n=name: call(n) for name in compiled}, args.rounds, warm=0)
    unit, stored, whole = times["training alone"].median(), times[ALL].median(), results[ALL]
    print(f"{steps:,} steps of Adam, {size:,} parameters; 2 sqrt(T) = {2 * math.sqrt(steps):.0f} states")
    for name, programme in compiled.items():
        cpu, memory = times[name].median(), "on the host and the device"
        if hasattr(programme, "memory_analysis"):
            temporaries = programme.memory_analysis().temp_size_in_bytes
            memory = f"temporaries {temporaries / state_bytes:8.1f} states ({temporaries / 1e6:7.1f} MB)"
        line = f"{name:<22} {memory:<42} CPU {cpu:6.1f} s, {cpu / unit:5.2f} trainings"
        if name != "training alone":
            line += f", {cpu / stored:5.2f} of 'all', differs by {_harness.difference(results[name], whole):.1e}"
        print(line)


if __name__ == "__main__":
    main()
