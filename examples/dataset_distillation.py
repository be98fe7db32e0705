"""Dataset distillation: ten images, one per digit, on which a model learns what it would learn from a thousand.

The upper variable x is ten images. The lower level is a run of gradient descent on these images alone; the upper loss
is the error of its last iterate on the real training set, and its gradient is the derivative through the whole run:

    min over x   F(y_T(x)) = CE(y_T(x); real training set)
    s.t.         y_{t+1} = y_t - eta * grad over y of [ CE(y_t; images x, labels 0, ..., 9) + l2 |y_t|^2 ],    y_0 = 0

The number of steps is part of the problem, and the exact derivative is that of the run: this is a case for unrolling.
The test compares with the same run on ten real images, drawn at random, and on the ten mean images of the classes.

Wang, Zhu, Torralba, Efros, "Dataset Distillation", arXiv:1811.10959 (2018).

    python examples/dataset_distillation.py
    python examples/dataset_distillation.py --lower-steps 30 --seed 1
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import Problem, datasets, hypergradients, lower, solve, solvers

CLASSES, L2 = 10, 1e-3
LABELS = np.arange(CLASSES)


def cross_entropy(y, images, labels):
    logits = images @ y["kernel"] + y["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def real_loss(x, y, batch):
    return cross_entropy(y, *batch)


def distilled_loss(x, y):
    return cross_entropy(y, x, LABELS) + L2 * jnp.sum(y["kernel"] ** 2)


def ink(x):
    """Pixels stay between paper (0) and ink (1)."""
    return jnp.clip(x, 0, 1)


def accuracy(x, y, batch):
    images, labels = batch
    return (jnp.argmax(images @ y["kernel"] + y["bias"], axis=1) == labels).mean()


def zeros(pixels):
    return {"kernel": jnp.zeros((pixels, CLASSES)), "bias": jnp.zeros(CLASSES)}


def train_on(images, solver):
    """The lower level's run on any ten images."""
    level = Problem(real_loss, distilled_loss).draw_lower(0)
    return solver(level, images, solver.init(zeros(images.shape[1]))).y


def class_means(images, labels):
    return np.stack([images[labels == digit].mean(0) for digit in LABELS])


def random_images(images, labels, draws, seed):
    """One real image of each class, `draws` times: (draws, 10, pixels)."""
    random = np.random.default_rng(seed)
    return np.stack([[images[random.choice(np.flatnonzero(labels == k))] for k in LABELS] for _ in range(draws)])


def distil(train, test, x0, solver, rate, steps, seed):
    rule = optax.adam(optax.cosine_decay_schedule(rate, steps))
    method = solvers.HypergradientDescent(hypergradients.Unrolled(), solver, rule, warm_start=False)
    problem = Problem(real_loss, distilled_loss, upper_data=train, project_upper=ink)
    return solve(
        problem, x0, zeros(x0.shape[1]), method, steps=steps, key=seed, metrics={"test accuracy": (accuracy, test)}
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="outer steps")
    parser.add_argument("--lower-steps", type=int, default=100, help="gradient steps on the ten images")
    parser.add_argument("--lower-rate", type=float, default=0.5, help="their step size")
    parser.add_argument("--rate", type=float, default=0.05, help="step size of Adam on the images")
    parser.add_argument("--draws", type=int, default=100, help="draws of ten random real images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("dataset_distillation.png"))
    args = parser.parse_args(arguments)
    began = time.perf_counter()

    images, labels = datasets.digits()
    train, test = datasets.split((images / 16, labels), (1000, -1), args.seed)
    solver = lower.GradientDescent(args.lower_rate, args.lower_steps)
    score = jax.jit(lambda x: accuracy(x, train_on(x, solver), test))

    drawn = random_images(*train, args.draws, args.seed)
    by_chance = np.asarray(jax.jit(jax.vmap(score))(drawn))
    means = class_means(*train)
    solution = distil(train, test, jnp.asarray(drawn[0]), solver, args.rate, args.steps, args.seed)
    print(solution)
    x = np.asarray(solution.x)

    def on_everything(x, y, batch):
        return cross_entropy(y, *batch) + L2 * jnp.sum(y["kernel"] ** 2)

    level = Problem(real_loss, on_everything, lower_data=train).draw_lower(0)
    everything = lower.LBFGS(300)
    limit = float(accuracy(None, everything(level, None, everything.init(zeros(x.shape[1]))).y, test))
    rows = {
        f"ten random real images (mean of {args.draws} draws)": by_chance.mean(),
        "    the best of these draws, chosen on the test set": by_chance.max(),
        "the ten class means": float(score(means)),
        "ten distilled images": float(score(x)),
        f"all {len(train[1])} training images, to convergence": limit,
    }
    print(f"\ndigits: accuracy on {len(test[1])} test images of softmax regression after training on")
    for name, value in rows.items():
        print(f"  {name:<52} {value:.3f}")
    print(f"  (standard deviation over the draws {by_chance.std(ddof=1):.3f})")
    draw(
        args.out, {"a random draw (the start)": drawn[0], "class means": means, "distilled": x}, score, solution.history
    )
    print(f"  picture: {args.out}; {time.perf_counter() - began:.1f} s in all")
    return rows


def draw(path, sets, score, history):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.2, 1))
    for part, (name, images) in zip(left.subfigures(len(sets), 1), sets.items(), strict=True):
        part.suptitle(f"{name}: test accuracy {float(score(images)):.3f}", fontsize=10)
        for axis, image in zip(part.subplots(1, CLASSES), images, strict=True):
            axis.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
            axis.axis("off")
    accuracy_axis = right.subplots()
    accuracy_axis.plot(history.steps["test accuracy"], history["test accuracy"], color="C0", label="distilled")
    accuracy_axis.axhline(float(score(sets["class means"])), color="C3", ls="--", lw=1, label="class means")
    accuracy_axis.set(xlabel="outer step", ylabel="test accuracy")
    accuracy_axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
