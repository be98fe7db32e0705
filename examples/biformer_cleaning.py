"""Find wrong labels of Fashion-MNIST while a BiFormer is trained on them.

Half of the training labels are wrong. One weight per training sample is learnt with the network, so that the network
does well on a few hundred clean samples: see `bilevel.applications.biformer.cleaning` for the problem. Two solvers are
compared, a single-loop one (y, the linear system and x move together) and an implicit one with the identity for the
inverse Hessian, with training on the labels as they are, on the clean set alone, and on the true labels, all for the
same number of steps. The picture shows what was found, and for one image which regions a query region routes to.

    python examples/biformer_cleaning.py
    python examples/biformer_cleaning.py --rate 0.7 --weigh samples --steps 1500 --seeds 3
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import data, datasets, solve, solvers
from bilevel.applications.biformer import calibrated, cleaning, prepare

NAMES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def make_solvers():
    """The network's rule is Adam in both; v solves the damped system (H + I) v = -F_y by clipped steps."""
    damped = optax.chain(optax.add_decayed_weights(1.0), optax.clip_by_global_norm(10.0), optax.sgd(0.02))
    return {
        "single loop": solvers.SingleLoop(optax.adam(2e-3), optax.adam(0.03), damped),
        "identity for H": solvers.T1T2(optax.adam(2e-3), optax.adam(0.03)),
    }


@functools.partial(jax.jit, static_argnames="steps")
def train(problem, x, y, key, steps):
    """The lower level on its own by the same rule, with the weights where they are."""
    rule = optax.adam(2e-3)

    def step(carry, k):
        y, memory = carry
        gradient = problem.draw_lower(jax.random.fold_in(key, k)).gradient(x, y)
        updates, memory = rule.update(gradient, memory, y)
        return (optax.apply_updates(y, updates), memory), None

    return jax.lax.scan(step, (y, rule.init(y)), jnp.arange(steps))[0][0]


def train_plainly(task, samples, steps, seed, test):
    """Test accuracy after training on these samples, all of weight 1 (repeated to one number: one compiled program)."""
    _, old, groups = task.problem.lower_data.arrays
    repeated = [np.resize(part, (len(old), *part.shape[1:])) for part in samples]
    problem = dataclasses.replace(
        task.problem, lower_data=data.Minibatches((*repeated, groups), task.problem.lower_data.size)
    )
    y = train(problem, jnp.full_like(task.x0, 20.0), task.y0, jax.random.key(seed), steps)
    return float(jax.jit(task.accuracy)(task.x0, y, test))


def ranking_quality(weights, flipped):
    """The chance that a right label has a larger weight than a wrong one (area under the ROC curve)."""
    ranks = np.empty(len(weights))
    ranks[np.argsort(weights, kind="stable")] = np.arange(len(weights))
    right = ~flipped
    return (ranks[right].mean() - (right.sum() - 1) / 2) / flipped.sum()


def run(args, seed):
    images, labels = datasets.fashion_mnist("train")
    train_set, clean = datasets.split((images, labels), (args.train, args.clean), seed)
    test_images, test_labels = datasets.fashion_mnist("test")
    test = (test_images[: args.test], test_labels[: args.test])
    noisy, flipped = datasets.corrupt_labels(train_set[1], args.rate, 10, seed)

    ours = cleaning((train_set[0], noisy), clean, test=test, weigh=args.weigh, batch=args.batch)
    accuracies = {
        name: train_plainly(ours, samples, args.steps, seed, test)
        for name, samples in {
            "labels as given": (train_set[0], noisy),
            "clean set alone": clean,
            "true labels": train_set,
        }.items()
    }
    found = {}
    for name, solver in make_solvers().items():
        began = time.perf_counter()
        solution = solve(
            ours.problem,
            ours.x0,
            ours.y0,
            solver,
            steps=args.steps,
            key=seed,
            metrics=ours.metrics,
            metrics_every=max(args.steps // 5, 1),
        )
        weights = np.asarray(ours.weights(solution.x))
        accuracies[name] = float(solution.history["accuracy"][-1])
        found[name] = (ours, solution, weights)
        lowest = np.argsort(weights)[: flipped.sum()]
        print(
            f"  seed {seed}, {name}: {time.perf_counter() - began:.0f} s, test accuracy {accuracies[name]:.3f}; "
            f"a right label outranks a wrong one in {ranking_quality(weights, flipped):.1%} of pairs; "
            f"of the {flipped.sum()} lowest weights {flipped[lowest].mean():.1%} are wrong labels",
            flush=True,
        )
    return accuracies, found, (train_set[0], noisy, train_set[1], flipped), test


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=2000, help="training samples")
    parser.add_argument("--clean", type=int, default=300, help="clean samples")
    parser.add_argument("--test", type=int, default=1000, help="test samples")
    parser.add_argument("--rate", type=float, default=0.5, help="share of wrong labels")
    parser.add_argument("--weigh", choices=("samples", "classes"), default="samples")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("biformer_cleaning.png"))
    args = parser.parse_args()
    began = time.perf_counter()
    print(
        f"{args.train} training samples, {args.rate:.0%} wrong labels, {args.clean} clean samples, {args.steps} steps"
    )
    rows = []
    for seed in range(args.seeds):
        accuracies, found, samples, test = run(args, seed)
        print(f"  seed {seed}: {time.perf_counter() - began:.0f} s since the start", flush=True)
        rows.append(accuracies)
    print("test accuracy" + (", mean over seeds and largest difference between seeds" if args.seeds > 1 else ""))
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        spread = f"  {np.ptp(values):.3f}" if args.seeds > 1 else ""
        print(f"  {name:<16} {values.mean():.3f}{spread}")
    draw(args.out, rows[-1], found, samples, test)
    print(f"picture: {args.out}; {time.perf_counter() - began:.0f} s in all")


def draw(path, accuracies, found, samples, test):
    from matplotlib.figure import Figure

    images, noisy, truth, flipped = samples
    ours, solution, weights = max(found.values(), key=lambda entry: ranking_quality(entry[2], flipped))
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(1.5, 1, 1.2))
    curves, hist = top.subplots(1, 2)
    for name, (_, each, _) in found.items():
        curves.plot(each.history.steps["accuracy"], each.history["accuracy"], label=name)
    for name, color in (("labels as given", "C3"), ("clean set alone", "C7"), ("true labels", "C2")):
        curves.axhline(accuracies[name], color=color, ls="--", lw=1, label=name)
    curves.set(title="test accuracy", xlabel="outer step")
    curves.legend(fontsize=8)
    hist.hist(
        [weights[~flipped], weights[flipped]], bins=40, stacked=True, color=["C2", "C3"], label=["right", "wrong"]
    )
    hist.set(title="weights of the training samples", xlabel="sigmoid(x)")
    hist.legend(fontsize=8)
    middle.suptitle("the lowest weights: given label (true label)", fontsize=10)
    for axis, i in zip(middle.subplots(1, 10).flat, np.argsort(weights)[:10], strict=True):
        axis.imshow(images[i], cmap="gray_r")
        axis.set_title(f"{NAMES[noisy[i]]}\n({NAMES[truth[i]]})", fontsize=7, color="C3" if flipped[i] else "C2")
        axis.axis("off")

    # The first stage's routing: 7 x 7 regions of 4 x 4 pixels, each looking at 4 of them.
    image = test[0][0]

    @jax.jit
    def route(y, some, one):
        return calibrated(ours.apply, y, some)(prepare(one), return_routing=True)[1]

    routings = route(solution.y, jnp.asarray(images[:500]), jnp.asarray(image[None]))
    chosen, logits = np.asarray(routings[0].index[0, 0]), np.asarray(routings[0].logits[0, 0])
    bottom.suptitle(
        "stage 1: the regions (red) that a query region (blue) looks at, over its affinity to all", fontsize=10
    )
    queries = (10, 17, 24, 31, 38, 22, 26, 3)
    for axis, query in zip(bottom.subplots(1, len(queries)).flat, queries, strict=True):
        axis.imshow(image, cmap="gray_r")
        affinity = np.kron(logits[query].reshape(7, 7), np.ones((4, 4)))
        axis.imshow(affinity, cmap="viridis", alpha=0.35)
        for region, color in [*((r, "C3") for r in chosen[query]), (query, "C0")]:
            row, column = divmod(int(region), 7)
            corner = (4 * column - 0.5, 4 * row - 0.5)
            axis.add_patch(rectangle(corner, color))
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def rectangle(corner, color):
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 4, 4, fill=False, edgecolor=color, linewidth=2)


if __name__ == "__main__":
    main()
