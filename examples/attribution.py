"""Which training samples made the model what it is: the metagradient of a whole training, held to retrainings.

One weight x_i per training sample, all of them 1, above a training of 1,000 steps:

    F(x, y_T(x)) = mean over the validation set of CE(y_T; image, label)
    y_T(x)       = 1,000 Adam steps on mean over the batch of x_i CE(y; image_i, label_i), a tanh network

The score of sample i is -dF/dx_i, what leaving it out adds to the validation loss by the derivative. Held to the truth:
random groups of samples are left out (their weights 0, all else as it was, batches included) and the training repeated;
the sums of the groups' scores are compared with what the loss really did, by Spearman's rank correlation. The same
training with a large learning rate is differentiated as exactly, and its scores are worth nothing:
`diagnostics.metasmoothness` tells the two apart beforehand.

    python examples/attribution.py            # half a minute on two cores
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import Problem, data, datasets, diagnostics, lower
from bilevel.hypergradients import Unrolled, value_and_hypergradient
from bilevel.keys import as_step_key

HIDDEN, CLASSES, L2 = 32, 10, 1e-3
TRAININGS = {"smooth": (3e-3, 3e-2), "not smooth": (3e-2, 1e-8)}  # Adam's learning rate and eps


def network(y, images):
    return jnp.tanh(images @ y["hidden"]) @ y["out"]


def cross_entropy(y, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(network(y, images), labels)


def validation_loss(x, y, batch):
    return cross_entropy(y, *batch).mean()


def weighted_loss(x, y, batch):
    images, labels, sample = batch
    decay = L2 * (jnp.sum(y["hidden"] ** 2) + jnp.sum(y["out"] ** 2))
    return (x[sample] * cross_entropy(y, images, labels)).mean() + decay


def rank_correlation(a, b):
    """Spearman's."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def attribute(problem, x, y0, training, groups):
    """(scores, what leaving each group out adds to F by the scores, and by training again)."""
    estimate = jax.jit(
        lambda problem, x, y0: value_and_hypergradient(problem, Unrolled(checkpoint="sqrt"), training)(x, y0)
    )
    found = estimate(problem, x, y0)

    @jax.jit
    def retrained(problem, x, y0):
        upper, level = problem.levels(as_step_key(0))
        return upper(x, training(level, x, training.init(y0)).y)

    without = jax.lax.map(lambda group: retrained(problem, x.at[group].set(0.0), y0), groups)
    scores = -np.asarray(found.gradient)
    return scores, scores[np.asarray(groups)].sum(1), np.asarray(without) - float(found.value)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=500, help="training samples")
    parser.add_argument("--steps", type=int, default=1000, help="of Adam")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--groups", type=int, default=60, help="groups that are left out, one training each")
    parser.add_argument("--size", type=int, default=25, help="samples of a group")
    parser.add_argument("--rate", type=float, default=0.1, help="share of the training labels that are wrong")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("attribution.png"))
    args = parser.parse_args(args)
    began, n = time.perf_counter(), args.samples

    images, labels = datasets.digits()
    (train, truth), validation = datasets.split((images / 16, labels), (n, 400), args.seed)
    given, wrong = datasets.corrupt_labels(truth, args.rate, CLASSES, args.seed)
    problem = Problem(
        upper=validation_loss,
        lower=weighted_loss,
        upper_data=validation,
        lower_data=data.Minibatches((train, given, np.arange(n, dtype=np.int32)), args.batch),
    )
    rng = np.random.default_rng(args.seed)
    y0 = {
        "hidden": jnp.asarray(rng.normal(size=(64, HIDDEN)) / 8, jnp.float32),
        "out": jnp.asarray(rng.normal(size=(HIDDEN, CLASSES)) / HIDDEN**0.5, jnp.float32),
    }
    x, groups = jnp.ones(n), jnp.asarray(np.stack([rng.permutation(n)[: args.size] for _ in range(args.groups)]))
    left_out = jnp.zeros(n).at[groups[0]].set(-0.5)

    rows = {}
    for name, (rate, eps) in TRAININGS.items():
        training = lower.GradientDescent(optax.adam(rate, eps=eps, eps_root=1e-10), args.steps)
        smooth = diagnostics.metasmoothness(problem, x, y0, training, along=left_out)
        scores, predicted, actual = attribute(problem, x, y0, training, groups)
        rows[name] = smooth, scores, predicted, actual, rank_correlation(predicted, actual)
        harmful = np.argsort(scores)[: wrong.sum()]
        print(f"Adam({rate:g}, eps={eps:g}), {args.steps} steps: {name}")
        print(f"  {smooth}".replace("\n", "\n  "))
        print(f"  rank correlation over {args.groups} groups of {args.size} left out: {rows[name][-1]:.3f}")
        print(f"  of the {wrong.sum()} samples with the lowest scores, {wrong[harmful].sum()} have wrong labels")
    draw(args.out, rows, train, given, truth, wrong)
    print(f"picture: {args.out}; {time.perf_counter() - began:.1f} s in all")
    return rows


def draw(path, rows, images, given, truth, wrong):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.5, 1))
    axes = top.subplots(1, 3)
    for axis, (name, (smooth, _, predicted, actual, correlation)) in zip(axes, rows.items(), strict=False):
        axis.scatter(predicted, actual, s=14, color="C0" if name == "smooth" else "C3")
        axis.axline((0, 0), slope=1, color="0.6", lw=1)
        axis.locator_params(axis="x", nbins=5)
        axis.set(
            title=f"{name}: rank correlation {correlation:.2f}\n(metasmoothness {smooth.smoothness:.2f})",
            xlabel="change of the validation loss by the scores",
            ylabel="by training again without the group",
        )
    scores = rows["smooth"][1]
    axes[2].hist([scores[~wrong], scores[wrong]], bins=30, stacked=True, color=["C2", "C3"], label=["right", "wrong"])
    axes[2].set(title="scores of the samples (smooth)", xlabel="leaving the sample out adds to the loss")
    axes[2].locator_params(axis="x", nbins=5)
    axes[2].legend(title="label", fontsize=8)
    bottom.suptitle("the lowest scores: given label (true label)", fontsize=10)
    for axis, i in zip(bottom.subplots(2, 10).flat, np.argsort(scores)[:20], strict=True):
        axis.imshow(images[i].reshape(8, 8), cmap="gray_r")
        axis.set_title(f"{given[i]} ({truth[i]})", fontsize=8, color="C3" if wrong[i] else "C2")
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
