"""Meta-Weight-Net: learn how much a sample should count from its loss, on a long-tailed training set.

The training classes shrink geometrically. A small network of x maps a sample's loss to its weight, and is trained so
that the classifier y*(x), which the weighted losses give, does well on a small balanced set:

    min over x   F(x, y*(x)) = mean over the balanced set of CE(y*(x))
    s.t.         y*(x) = argmin over y of  mean_i V(CE_i(y); x) CE_i(y) + l2 |y|^2

    python examples/reweighting.py                          # scikit-learn's digits, needs nothing else
    python examples/reweighting.py --data fashion-mnist     # the loader says how to get it where it is missing
    python examples/reweighting.py --solver SAMA            # another method of bilevel.solvers

Reference: Shu et al., "Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting", NeurIPS 2019. The paper's
algorithm (a virtual step, the derivative through it, a real step) is `solvers.OneStep(lower_steps=1)`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import Problem, data, datasets, solve, solvers

CLASSES, HIDDEN, L2 = 10, 64, 1e-3


def classifier(key, features):
    """The parameters of a network with one hidden layer."""
    a, b = jax.random.split(key)
    first = jax.random.normal(a, (features, HIDDEN)) / np.sqrt(features)
    return {
        "first": first,
        "bias": jnp.zeros(HIDDEN),
        "last": jax.random.normal(b, (HIDDEN, CLASSES)) / np.sqrt(HIDDEN),
    }


def logits(y, images):
    return jax.nn.relu(images @ y["first"] + y["bias"]) @ y["last"]


def cross_entropy(y, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits(y, images), labels)


def weight_net(key, hidden=100):
    """The parameters of V: one hidden layer of 100, as in the paper."""
    a, b = jax.random.split(key)
    return {
        "first": jax.random.normal(a, (hidden,)),
        "bias": jax.random.normal(b, (hidden,)),
        "last": jnp.zeros(hidden),
    }


def weight(x, loss):
    """V(loss; x) in (0, 1), one half at the start."""
    return jax.nn.sigmoid(jax.nn.relu(loss[..., None] * x["first"] + x["bias"]) @ x["last"])


def balanced_loss(x, y, batch):
    return cross_entropy(y, *batch).mean()


def weighted_loss(x, y, batch):
    losses = cross_entropy(y, *batch)
    # The weights are inputs of the training step and not to be gamed by it: no gradient in y through V.
    weights = weight(x, jax.lax.stop_gradient(losses))
    return (weights * losses).mean() / 0.5 + L2 * sum(jnp.sum(a**2) for a in jax.tree.leaves(y))


def accuracy(x, y, batch):
    images, labels = batch
    return (jnp.argmax(logits(y, images), axis=1) == labels).mean()


def balanced(labels, per_class, seed):
    """`per_class` indices of each class, and the rest."""
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = np.concatenate([order[labels[order] == c][:per_class] for c in range(CLASSES)])
    return chosen, np.setdiff1d(order, chosen)


def load(name, ratio, seed):
    """(train, held, test): a long tail, ten samples of each class, and balanced classes."""
    if name == "digits":
        images, labels = datasets.digits()
        images = images / np.float32(16)
        test, rest = balanced(labels, 60, seed)
        test_set = images[test], labels[test]
        images, labels = images[rest], labels[rest]
    else:
        images, labels = datasets.fashion_mnist("train")
        test_images, test_labels = datasets.fashion_mnist("test")
        images, test_images = (a.reshape(len(a), -1) / np.float32(255) for a in (images, test_images))
        test_set = test_images, test_labels.astype(np.int32)
    held, rest = balanced(labels, 10, seed + 1)
    tail = rest[datasets.long_tail(labels[rest], ratio, seed)]
    return (images[tail], labels[tail].astype(np.int32)), (images[held], labels[held].astype(np.int32)), test_set


def make_solver(name):
    if name == "OneStep":
        return solvers.OneStep(lower_steps=1, lower_optimizer=0.1, upper_optimizer=optax.adam(1e-3))
    if name == "SAMA":
        return solvers.SAMA(upper_optimizer=optax.adam(1e-3), lower_optimizer=optax.adam(1e-3))
    if name == "SOBA":
        return solvers.SOBA(upper_optimizer=optax.adam(1e-3), lower_optimizer=0.1, linear_optimizer=0.01, decay=None)
    return getattr(solvers, name)()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument("--solver", default="OneStep", help="a name in bilevel.solvers: OneStep, SOBA, SAMA, ...")
    parser.add_argument("--ratio", type=float, default=50.0, help="largest class over smallest")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("reweighting.png"))
    args = parser.parse_args()

    train, held, test = load(args.data, args.ratio, args.seed)
    counts = np.bincount(train[1], minlength=CLASSES)
    keys = jax.random.split(jax.random.key(args.seed))
    x0, y0 = weight_net(keys[0]), classifier(keys[1], train[0].shape[1])
    batches = data.Minibatches(train, min(args.batch, len(train[1])))
    problem = Problem(upper=balanced_loss, lower=weighted_loss, upper_data=held, lower_data=batches)
    print(
        f"{args.data}: {len(train[1])} training samples, {counts.max()} to {counts.min()} a class; "
        f"{len(held[1])} balanced; {len(test[1])} test"
    )

    began = time.perf_counter()
    metrics = {"test accuracy": (accuracy, test)}
    learnt = solve(problem, x0, y0, make_solver(args.solver), steps=args.steps, key=args.seed, metrics=metrics)
    # The same steps with all weights equal: an upper step of zero.
    frozen = solvers.OneStep(lower_steps=1, lower_optimizer=0.1, upper_optimizer=optax.set_to_zero())
    plain = solve(problem, x0, y0, frozen, steps=args.steps, key=args.seed, metrics=metrics)
    print(learnt)

    print(f"\n{'':<18}{'test accuracy':>14}   by class, from the largest to the smallest")
    for name, solution in (("equal weights", plain), (args.solver, learnt)):
        by_class = [
            float(accuracy(None, solution.y, (test[0][test[1] == c], test[1][test[1] == c])))
            for c in np.argsort(-counts)
        ]
        print(f"{name:<18}{solution.history['test accuracy'][-1]:>14.3f}   " + " ".join(f"{a:.2f}" for a in by_class))
    plot(learnt, plain, train, counts, args)
    print(f"saved {args.out}; {time.perf_counter() - began:.1f} s")


def plot(learnt, plain, train, counts, args):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name, solution, colour in (("equal weights", plain, "C7"), (args.solver, learnt, "C0")):
        left.plot(solution.history.steps["test accuracy"], solution.history["test accuracy"], color=colour, label=name)
    left.set(
        xlabel="step",
        ylabel="accuracy on balanced test data",
        title=f"{args.data}, {counts.max()} to {counts.min()} a class",
    )
    left.legend()
    losses = cross_entropy(learnt.y, *train)
    grid = jnp.linspace(0, float(losses.max()) * 1.05, 200)
    middle.plot(grid, weight(learnt.x, grid), color="C0")
    middle.plot(losses, np.zeros(len(losses)), "|", color="C7", label="training losses")
    middle.set(xlabel="loss of a sample", ylabel="weight", title="what the weight net learnt", ylim=(-0.03, None))
    middle.legend()
    shares = np.asarray([weight(learnt.x, losses[train[1] == c]).mean() for c in range(CLASSES)])
    right.bar(np.arange(CLASSES), shares, color="C0")
    right.set(
        xlabel="class, from the largest to the smallest",
        ylabel="mean weight",
        title="weight by class",
        xticks=np.arange(CLASSES),
    )
    right.set_xticklabels([str(c) for c in np.argsort(-counts)])
    for patch, c in zip(right.patches, np.argsort(-counts), strict=True):
        patch.set_height(shares[c])
    figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()
