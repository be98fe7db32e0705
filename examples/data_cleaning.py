"""Data hyper-cleaning: find the wrong labels of a training set with a few clean samples.

Half of the training labels are flipped. One weight sigmoid(x_i) per training sample is learnt, so that the softmax
regression y*(x) that the weighted training loss gives does well on a small clean set:

    min over x   F(x, y*(x)) = mean over the clean set of CE(y*(x); image, label)
    s.t.         y*(x) = argmin over y of  mean_i sigmoid(x_i) CE(y; image_i, noisy label_i) + l2 |y|^2

    python examples/data_cleaning.py                          # scikit-learn's digits, needs nothing else
    python examples/data_cleaning.py --data fashion-mnist     # the loader says how to get it where it is missing
    python examples/data_cleaning.py --solver SOBA            # another method of bilevel.solvers
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import Problem, data, datasets, lower, solve, solvers

CLASSES, L2 = 10, 1e-3


def cross_entropy(y, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(images @ y["kernel"] + y["bias"], labels)


def clean_loss(x, y, batch):
    images, labels = batch
    return cross_entropy(y, images, labels).mean()


def weighted_loss(x, y, batch):
    images, labels, sample = batch
    return (jax.nn.sigmoid(x[sample]) * cross_entropy(y, images, labels)).mean() + L2 * jnp.sum(y["kernel"] ** 2)


def accuracy(x, y, batch):
    images, labels = batch
    return (jnp.argmax(images @ y["kernel"] + y["bias"], axis=1) == labels).mean()


def load(name, clean_samples, seed):
    """(train, clean, test), each images in [0, 1] as rows, and labels."""
    if name == "digits":
        images, labels = datasets.digits()
        return datasets.split((images / 16, labels), (1000, clean_samples or 100, -1), seed)
    flat = lambda part: tuple(a.reshape(len(a), -1) if a.ndim == 3 else a for a in datasets.fashion_mnist(part))
    images, labels = flat("train")
    train, clean = datasets.split((images / np.float32(255), labels), (-1, clean_samples or 5000), seed)
    images, labels = flat("test")
    return train, clean, (images / np.float32(255), labels)


def make_solver(name, n):
    """Step sizes that suit the two data sets; one row is all that a method needs."""
    if name == "AID":
        return solvers.AID(lower.LBFGS(), upper_optimizer=optax.adam(0.3))
    if name == "SOBA":  # the gradient in x is 1/n per sample
        return solvers.SOBA(upper_optimizer=optax.adam(0.03), lower_optimizer=0.1)
    return getattr(solvers, name)()


def fit(batch, y):
    """The model on a data set as it is: the lower level with all weights 1."""
    level = Problem(upper=weighted_loss, lower=weighted_loss, lower_data=batch).draw_lower(0)
    solver = lower.LBFGS(300)
    return solver(level, jnp.full(len(batch[1]), 40.0), solver.init(y)).y


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument(
        "--solver", default=None, help="a name in bilevel.solvers; default AID for digits, SOBA for fashion-mnist"
    )
    parser.add_argument("--rate", type=float, default=0.5, help="share of the training labels that are flipped")
    parser.add_argument(
        "--clean", type=int, default=None, help="size of the clean set; default 100 for digits, 5000 for fashion-mnist"
    )
    parser.add_argument("--steps", type=int, default=None, help="outer steps")
    parser.add_argument("--batch", type=int, default=256, help="batch size of stochastic solvers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("data_cleaning.png"))
    args = parser.parse_args()
    began = time.perf_counter()

    (images, truth), clean, test = load(args.data, args.clean, args.seed)
    noisy, flipped = datasets.corrupt_labels(truth, args.rate, CLASSES, args.seed)
    n = len(noisy)
    train = (images, noisy, np.arange(n, dtype=np.int32))
    name = args.solver or ("AID" if args.data == "digits" else "SOBA")
    full_batch = name in ("AID", "ITD", "TruncatedITD", "OneStep", "T1T2")
    steps = args.steps or (60 if full_batch else 20_000)
    y0 = {"kernel": jnp.zeros((images.shape[1], CLASSES)), "bias": jnp.zeros(CLASSES)}

    score = jax.jit(accuracy)
    alone = (*clean, np.arange(len(clean[1]), dtype=np.int32))
    sets = {"noisy labels": train, "clean set alone": alone, "true labels": (images, truth, train[2])}
    before = {what: float(score(None, fit(batch, y0), test)) for what, batch in sets.items()}

    problem = Problem(
        upper=clean_loss,
        lower=weighted_loss,
        upper_data=clean
        if full_batch
        else data.Minibatches(clean, args.batch if len(clean[1]) > args.batch else len(clean[1])),
        lower_data=train if full_batch else data.Minibatches(train, args.batch),
    )
    solution = solve(
        problem,
        jnp.zeros(n),
        y0,
        make_solver(name, n),
        steps=steps,
        key=args.seed,
        metrics={"test accuracy": (accuracy, test)},
    )
    print(solution)

    weights = np.asarray(jax.nn.sigmoid(solution.x))
    dropped = weights < 0.5
    found = (dropped & flipped).sum()
    print(
        f"\n{args.data}: {n} training samples, {flipped.sum()} labels flipped, {len(clean[1])} clean samples, "
        f"{len(test[1])} for the test"
    )
    for what, value in before.items():
        print(f"  test accuracy, trained on the {what:<16} {value:.3f}")
    print(f"  test accuracy, learnt weights               {solution.history['test accuracy'][-1]:.3f}")
    kept = np.concatenate([images[~dropped], clean[0]]), np.concatenate([noisy[~dropped], clean[1]])
    refit = fit((*kept, np.arange(len(kept[1]), dtype=np.int32)), y0)
    print(f"  test accuracy, retrained on kept and clean  {float(score(None, refit, test)):.3f}")
    print(
        f"  flips found (weight < 0.5): precision {found / max(dropped.sum(), 1):.3f}, "
        f"recall {found / flipped.sum():.3f}"
    )
    draw(args.out, solution.history, weights, flipped, images, noisy, truth, before)
    print(f"  picture: {args.out}; {time.perf_counter() - began:.1f} s in all")


def draw(path, history, weights, flipped, images, noisy, truth, before):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.4, 1))
    loss, acc, hist = top.subplots(1, 3)
    loss.plot(history.steps["upper_loss"], history["upper_loss"], color="C0")
    loss.set(title="loss on the clean set", xlabel="outer step", ylabel="cross-entropy")
    acc.plot(history.steps["test accuracy"], history["test accuracy"], color="C0", label="learnt weights")
    for (what, value), color in zip(before.items(), ("C3", "C7", "C2"), strict=True):
        acc.axhline(value, color=color, ls="--", lw=1, label=what)
    acc.set(xlabel="outer step", ylabel="test accuracy", ylim=(min(before.values()) - 0.1, 1))
    acc.legend(fontsize=8)
    hist.hist(
        [weights[~flipped], weights[flipped]], bins=30, label=["clean", "flipped"], color=["C2", "C3"], stacked=True
    )
    hist.set(title="weights of the training samples", xlabel="sigmoid(x)", ylabel="samples")
    hist.legend(fontsize=8, loc="upper center")
    side = int(np.sqrt(images.shape[1]))
    bottom.suptitle("the lowest weights: given label (true label)", fontsize=10)
    for axis, i in zip(bottom.subplots(2, 10).flat, np.argsort(weights)[:20], strict=True):
        axis.imshow(images[i].reshape(side, side), cmap="gray_r")
        axis.set_title(f"{noisy[i]} ({truth[i]})", fontsize=8, color="C3" if noisy[i] != truth[i] else "C2")
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
