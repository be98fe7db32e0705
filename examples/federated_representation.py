"""A shared representation over 100 clients that hold two classes each: federated hyper-representation.

    min over x   F(x, y*(x))
    s.t.         y*(x) = argmin over y of f(x, y)

x is the body of a network (features) and y its head, F the cross-entropy on the clients' validation samples, f that on
their training samples with a weight decay.

The samples are sorted by label, cut into shards, and each client is dealt two. In every round the server samples n
clients, and SimFBO moves body, head and the linear system's variable with one exchange. What is drawn is the accuracy
on unseen samples against rounds, for n = 1, 5, 10 and 50, and FedMBO with n = 10, which needs many rounds per step.

    python examples/federated_representation.py                       # digits, well under a minute of CPU time
    python examples/federated_representation.py --data fashion-mnist --rounds 3000 --hidden 64
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import Problem, datasets, solve, splits
from bilevel.solvers import FedMBO, SimFBO

CLASSES = 10
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def features(x, images):
    return jnp.tanh(images @ x["weights"] + x["bias"])


def logits(x, y, images):
    return features(x, images) @ y["weights"] + y["bias"]


def upper(x, y, batch):
    images, labels = batch
    return cross_entropy(logits(x, y, images), labels).mean()


def lower(x, y, batch):
    images, labels = batch
    decay = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y))
    return cross_entropy(logits(x, y, images), labels).mean() + 0.05 * decay


def accuracy(x, y, test):
    images, labels = test
    return jnp.mean(jnp.argmax(logits(x, y, images), axis=1) == labels)


def load(name: str, seed: int):
    """(training, test) images and labels."""
    if name == "digits":
        images, labels = datasets.digits()
        return datasets.split((images / 16, labels), sizes=(1300, -1), seed=seed)

    def flat(images, labels):
        return (images.reshape(len(images), -1).astype(np.float32) / 255, labels)

    return datasets.split(flat(*datasets.fashion_mnist("train")), sizes=(20_000,), seed=seed)[0], flat(
        *datasets.fashion_mnist("test")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=1500)
    parser.add_argument("--hidden", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("federated_representation.png"))
    given = parser.parse_args()

    train, test = load(given.data, given.seed)
    split = splits.shards(train[1], given.clients, per_client=2, seed=given.seed)
    print(split)
    problem = Problem(upper, lower, *split.levels(train, validation=0.35, size=4))

    generator = np.random.default_rng(given.seed)
    inputs = train[0].shape[1]
    body = generator.normal(size=(inputs, given.hidden)) / np.sqrt(inputs)
    x0 = {"weights": jnp.asarray(body, jnp.float32), "bias": jnp.zeros(given.hidden)}
    y0 = {"weights": jnp.zeros((given.hidden, CLASSES)), "bias": jnp.zeros(CLASSES)}

    runs = {f"SimFBO, n = {n}": (SimFBO(n, 0.15, 0.2, 0.2, radius=10.0), given.rounds) for n in (1, 5, 10, 50)}
    per_step = 3 + 5 + 1
    # On 784 pixels FedMBO ends at chance with an upper step of 0.15.
    mbo = FedMBO(10, 0.15 if given.data == "digits" else 0.01, 0.1, lower_rounds=3, terms=5)
    runs["FedMBO, n = 10"] = (mbo, max(1, given.rounds // per_step))
    curves = {}
    print(f"\n{'method':<15} {'rounds':>7} {'accuracy':>9} {'floats to and from all':>23} {'seconds':>8}")
    for name, (solver, steps) in runs.items():
        began = time.perf_counter()
        run = solve(
            problem,
            x0,
            y0,
            solver,
            steps=steps,
            key=given.seed,
            metrics={"accuracy": (accuracy, test)},
            metrics_every=max(1, steps // 50),
        )
        rounds = np.concatenate([[0], np.cumsum(run.history["communication_rounds"])])
        curves[name] = (rounds[run.history.steps["accuracy"]], run.history["accuracy"])
        last = run.history["accuracy"][-5:].mean()
        floats = run.history["communication_floats"].sum(dtype=np.float64)
        print(
            f"{name:<15} {rounds[-1]:>7.0f} {last:>9.3f} {floats:>23.3g} {time.perf_counter() - began:>8.1f}",
            flush=True,
        )

    draw(curves, split, given.figure)
    print(f"figure: {given.figure}")


def draw(curves, split, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", width_ratios=(3, 2))
    for k, (name, (rounds, values)) in enumerate(curves.items()):
        left.plot(
            rounds, values, color=f"C{k}", linestyle="--" if "MBO, n" in name and "FedMBO" in name else "-", label=name
        )
    left.set(xlabel="rounds of communication", ylabel="accuracy on unseen samples", ylim=(0, 1))
    left.legend(loc="lower right")
    left.grid(alpha=0.3)
    picture = right.imshow(split.label_shares, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    right.set(xlabel="class", ylabel="client", title="who holds what")
    right.set_xticks(range(split.label_shares.shape[1]))
    figure.colorbar(picture, ax=right, label="share of the client's samples")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
