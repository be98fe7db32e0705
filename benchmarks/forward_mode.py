"""Forward mode along PaD-TS's training run: time per step against a training step, and memory against reverse mode.

    python benchmarks/forward_mode.py
    python benchmarks/forward_mode.py --quick

Windows of 16 steps and 4 channels, a denoiser of width 16, batches of 32, Adam; p = 10 upper variables. Times are CPU
times per step, interleaved in one process; temporaries those that XLA reserves for the compiled program.
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
    parser.add_argument("--steps", type=int, default=100)
    args = _harness.start(parser, width=8, length=8, batch=8, steps=20)
    parts = [sines_windows(200, args.length, 4, seed) for seed in (0, 1)]
    net = Denoiser(args.length, 4, args.width, 1, 1)
    app = population(*parts, denoiser=net, bins=4, batch=args.batch, held_out=64)
    p = sum(leaf.size for leaf in jax.tree.leaves(app.x0))

    def train(problem, x, y, steps):
        solver = app.training(steps)
        return solver(problem.draw_lower(0), x, solver.init(y)).y

    def estimate(estimator):
        return lambda problem, x, y, steps: (
            value_and_hypergradient(problem, estimator, app.training(steps))(x, y).gradient
        )

    def compiled(f, steps):
        return jax.jit(f, static_argnums=3).lower(app.problem, app.x0, app.y0, steps).compile()

    arguments = (app.problem, app.x0, app.y0)
    programs = {"training": compiled(train, args.steps), "forward": compiled(estimate(Forward()), args.steps)}
    calls = {name: lambda c=c: c(*arguments) for name, c in programs.items()}
    times = _harness.interleaved(calls, args.rounds, warm=1)
    for name, each in times.items():
        print(f"{name:<9} {each.median(unit=1e3) / args.steps:7.2f} ms a step")
    print(f"p = {p}: forward over training {_harness.ratio(times['forward'], times['training'])}, to be divided by p")
    for name, estimator in (("forward", Forward()), ("reverse", Unrolled())):
        sizes = [compiled(estimate(estimator), n).memory_analysis().temp_size_in_bytes / 1e6 for n in (100, 1600)]
        print(f"{name}: temporaries {sizes[0]:.2f} MB for 100 steps, {sizes[1]:.2f} MB for 1,600")


if __name__ == "__main__":
    main()
