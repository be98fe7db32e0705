"""Ridge regression with one penalty per feature, learnt by hospitals that talk to their neighbours only.

    min over x   mean_i |A_i' y*(x) - t_i'|^2 / (2 n') + prior |x|^2 / 2      (each hospital's own validation patients)
    s.t.         y*(x) = argmin over y of  mean_i |A_i y - t_i|^2 / (2 n) + sum_j exp(x_j) y_j^2 / 2

The patients of the diabetes data are sorted by how far their disease has progressed and dealt out in blocks: hospitals
differ. The reference solution is the centralised one on the pooled data. The methods run on several graphs; what is
drawn is the distance to that solution and the hospitals' disagreement, against what one hospital has sent to each
neighbour.

    python examples/decentralized_hyperparameters.py
    python examples/decentralized_hyperparameters.py --agents 16 --steps 10000
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from bilevel import Problem, data, datasets, network, solve
from bilevel.solvers import DSOBA, GTDSBO, MADSBO, SPARKLE

PRIOR = 0.1


def upper(x, y, batch):
    inputs, targets = batch
    return jnp.mean((inputs @ y - targets) ** 2) / 2 + PRIOR * jnp.sum(x**2) / 2


def lower(x, y, batch):
    inputs, targets = batch
    return jnp.mean((inputs @ y - targets) ** 2) / 2 + jnp.sum(jnp.exp(x) * y**2) / 2


def hospitals(agents: int, seed: int) -> tuple[data.Agents, data.Agents]:
    """(validation, training) patients of each hospital: blocks of like progression."""
    features, targets = datasets.diabetes()
    order = np.argsort(targets, kind="stable")
    order = order[: len(order) // agents * agents].reshape(agents, -1)
    order = np.random.default_rng(seed).permuted(order, axis=1)
    inputs = (features - features.mean(axis=0)) / features.std(axis=0)
    targets = (targets - targets.mean()) / targets.std()
    held = order.shape[1] // 3

    def pick(rows):
        return data.Agents((inputs[rows].astype(np.float32), targets[rows].astype(np.float32)))

    return pick(order[:, :held]), pick(order[:, held:])


def distance(x, y, reference):
    return jnp.linalg.norm(jnp.mean(x, axis=0) - reference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agents", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3000, help="outer steps of the single-loop methods")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("decentralized_hyperparameters.png"))
    given = parser.parse_args()

    n, p = given.agents, 10
    problem = Problem(upper, lower, *hospitals(n, given.seed))
    x0, y0 = jnp.full(p, -2.0), jnp.zeros(p)

    pooled = Problem(upper, lower, problem.upper_data.full(), problem.lower_data.full())
    central = solve(pooled, x0, y0, steps=200, tol=1e-5)
    print(
        f"pooled data: {central.result.name} after {central.steps} steps, validation loss "
        f"{central.history['upper_loss'][-1]:.4f}"
    )

    graphs = {"ring": network.ring(n), "exponential": network.exponential(n), "complete": network.complete(n)}
    few = given.steps // 5  # methods with five inner steps
    methods = {
        "DSOBA": lambda w: (DSOBA(w, 0.2, 0.1, 0.1), given.steps),
        "MADSBO": lambda w: (MADSBO(w.lazy(), 0.2, 0.1, 0.05), few),
        "SPARKLE (ED)": lambda w: (SPARKLE(w, 0.2, 0.1, 0.1), given.steps),
        "all tracked": lambda w: (GTDSBO(w, 0.5, 0.1, 0.1), few),
    }
    found = {}
    print(
        f"\n{'graph':<12} {'method':<13} {'|x - x*|':>9} {'disagreement':>13} {'floats to each neighbour':>25} "
        f"{'seconds':>8}"
    )
    for name, graph in graphs.items():
        for method, make in methods.items():
            solver, steps = make(graph)
            began = time.perf_counter()
            run = solve(problem, x0, y0, solver, steps=steps, metrics={"distance": (distance, central.x)})
            sent = np.concatenate([[0], np.cumsum(run.history["communication_floats"], dtype=np.float64)])
            found[name, method] = (sent, run.history)
            print(
                f"{name:<12} {method:<13} {run.history['distance'][-1]:>9.2e} {run.history['consensus_x'][-1]:>13.2e} "
                f"{sent[-1]:>25.3g} {time.perf_counter() - began:>8.1f}"
            )

    ring = graphs["ring"]
    print(f"\n{ring!r}; {graphs['exponential']!r}")
    draw(found, list(graphs), list(methods), given.figure)
    print(f"figure: {given.figure}")


def draw(found, graphs, methods, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, len(graphs), figsize=(4.2 * len(graphs), 6.4), sharex=True, sharey="row", layout="constrained"
    )
    for column, graph in enumerate(graphs):
        for k, method in enumerate(methods):
            sent, history = found[graph, method]
            steps = history.steps["distance"]
            axes[0, column].semilogy(sent[steps] / 1000, history["distance"], color=f"C{k}", label=method)
            every = max(1, len(history["consensus_x"]) // 400)
            drawn = slice(1, None, every)
            disagreement = np.maximum(history["consensus_x"][drawn], 1e-9)
            axes[1, column].semilogy(sent[1:][drawn] / 1000, disagreement, color=f"C{k}", label=method)
        axes[0, column].set_title(graph)
        axes[1, column].set_xlabel("thousands of floats sent to each neighbour")
    axes[0, 0].set_ylabel("distance of the mean to the pooled solution")
    axes[1, 0].set_ylabel("disagreement of x")
    axes[0, 0].legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
