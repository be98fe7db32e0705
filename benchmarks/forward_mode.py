"""Forward mode along PaD-TS's training run: time per step against a training step, and memory against reverse mode.

    python benchmarks/forward_mode.py
    python benchmarks/forward_mode.py --width 32 --length 24
    python benchmarks/forward_mode.py --quick

Windows of 16 steps and 4 channels, a denoiser of width 16, batches of 32, Adam; p = 10 upper variables. Times are CPU
times, interleaved in one process. The time per step is also taken apart: one gradient of the lower loss against its p
tangents, by `jvp` under `vmap` as `Forward` has them, and by `linearize` under `vmap`, with the operations that XLA
counts. A product's tangent is two products, so that where products are all of the time p tangents cost 2 p gradients;
where the rest (functions of single numbers, copies, the start of small operations) counts, less. Temporaries are those
that XLA reserves for the compiled program; reverse mode keeps all states up to 256 steps, and then, unless all are
asked for, about the root of them (`Unrolled`).
"""

from __future__ import annotations

import _harness
import jax

from bilevel.applications.time_series import Denoiser, population, sines_windows
from bilevel.hypergradients import Forward, Unrolled, value_and_hypergradient


def main():
    parser = _harness.arguments(__doc__, rounds=5)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100, help="of the runs; memory is compared with 16 times as many")
    args = _harness.start(parser, width=8, length=8, batch=8, steps=20)
    parts = [sines_windows(200, args.length, 4, seed) for seed in (0, 1)]
    net = Denoiser(args.length, 4, args.width, 1, 1)
    app = population(*parts, denoiser=net, bins=4, batch=args.batch, held_out=64)
    p = sum(leaf.size for leaf in jax.tree.leaves(app.x0))
    at = (app.problem, app.x0, app.y0)

    def gradient(problem, x, y):
        return problem.draw_lower(0).gradient(x, y)

    def jvps(problem, x, y, dx, dy):
        f = lambda x, y: gradient(problem, x, y)
        return jax.vmap(lambda dx, dy: jax.jvp(f, (x, y), (dx, dy))[1])(dx, dy)

    def linearised(problem, x, y, dx, dy):
        return jax.vmap(jax.linearize(lambda x, y: gradient(problem, x, y), x, y)[1])(dx, dy)

    normal = lambda a: jax.random.normal(jax.random.key(0), (p, *a.shape))
    along = (*at, jax.tree.map(normal, app.x0), jax.tree.map(normal, app.y0))
    arguments = {"gradient": at, "vmap of jvp": along, "vmap of linearize": along}
    functions = {"gradient": gradient, "vmap of jvp": jvps, "vmap of linearize": linearised}
    programs = {name: jax.jit(f).lower(*arguments[name]).compile() for name, f in functions.items()}
    calls = {name: lambda name=name: programs[name](*arguments[name]) for name in programs}
    times = _harness.interleaved(calls, 10 * args.rounds, warm=2)
    flops = {name: program.cost_analysis()["flops"] for name, program in programs.items()}
    print(f"\nwidth {args.width}, {args.length} x 4, batch {args.batch}, p = {p}: one gradient, and its tangents")
    _harness.table(
        ("", "CPU ms", "over p gradients", "operations over p gradients"),
        *(
            (name, t.median(unit=1e3), t.median() / times["gradient"].median() / p, flops[name] / flops["gradient"] / p)
            for name, t in times.items()
        ),
    )

    def train(problem, x, y, steps):
        solver = app.training(steps)
        return solver(problem.draw_lower(0), x, solver.init(y)).y

    def estimate(estimator):
        return lambda problem, x, y, steps: (
            value_and_hypergradient(problem, estimator, app.training(steps))(x, y).gradient
        )

    def compiled(f, steps):
        return jax.jit(f, static_argnums=3).lower(*at, steps).compile()

    counts = (args.steps, 16 * args.steps)
    runs = {"training": [compiled(train, args.steps)]}
    estimators = {"forward": Forward(), "reverse": Unrolled(), "reverse, all states": Unrolled(checkpoint="all")}
    for name, estimator in estimators.items():
        runs[name] = [compiled(estimate(estimator), n) for n in counts]
    times = _harness.interleaved({name: lambda r=r: r[0](*at) for name, r in runs.items()}, args.rounds, warm=1)
    print(f"\n{args.steps} steps of training, and the hypergradient of it")
    _harness.table(
        ("", "CPU ms a step", "over training", "over p trainings"),
        *(
            (name, t.median(unit=1e3) / args.steps, _harness.ratio(t, times["training"]),
             t.median() / times["training"].median() / p)
            for name, t in times.items()
        ),
    )  # fmt: skip
    print()
    _harness.table(
        ("temporaries, MB", *(f"{n:,} steps" for n in counts)),
        *((name, *(r.memory_analysis().temp_size_in_bytes / 1e6 for r in runs[name])) for name in estimators),
    )


if __name__ == "__main__":
    main()
