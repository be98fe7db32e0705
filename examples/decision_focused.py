"""A quadratic programme as a layer: a model of prices is trained by the cost of the decisions that it leads to.

A buyer sees features z of a day and has to order n goods before the prices p(z) are known. The order is a quadratic
programme in the predicted prices,

    y*(x; z) = argmin over y of  y' Q y / 2 + (x' z) . y     subject to  sum y = 1,  0 <= y <= 0.4,

and costs what the true prices say: the upper level is min over x of the mean of y*' Q y* / 2 + p(z) . y*. The model
x' z is linear and the truth is not, so a fit of the prices by least squares spends its few parameters where they
decide nothing. Both are trained on the same days; the regret is the cost above that of orders with the prices known.

    python examples/decision_focused.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import implicit

GOODS, FEATURES = 5, 4
Q = 0.1 * jnp.eye(GOODS)
EQUATION = jnp.ones((1, GOODS)), jnp.ones(1)
BOUNDS = (
    jnp.concatenate([-jnp.eye(GOODS), jnp.eye(GOODS)]),
    jnp.concatenate([jnp.zeros(GOODS), jnp.full(GOODS, 0.4)]),
)


@jax.jit
@jax.vmap
def order(prices):
    """The best order for these prices, with derivatives."""
    return implicit.qp(Q, prices, *EQUATION, *BOUNDS).y


def cost(orders, prices):
    return jnp.mean(jnp.sum(0.5 * orders * (orders @ Q) + prices * orders, axis=1))


def predict(x, features):
    return features @ x["slope"] + x["level"]


def days(rng, number, truth):
    """Features, and prices that are not linear in them: an even part that no linear model can see."""
    features = rng.normal(size=(number, FEATURES)).astype(np.float32)
    prices = 0.4 * features @ truth["odd"] + np.abs(features @ truth["even"]) ** 1.5
    return jnp.asarray(features), jnp.asarray(prices + 0.1 * rng.normal(size=prices.shape), jnp.float32)


def train(loss, x, steps):
    rule = optax.adam(0.02)

    def step(carry, _):
        x, memory = carry
        value, gradient = jax.value_and_grad(loss)(x)
        move, memory = rule.update(gradient, memory)
        return (optax.apply_updates(x, move), memory), (value, x)

    (x, _), (values, path) = jax.jit(lambda x: jax.lax.scan(step, (x, rule.init(x)), length=steps))(x)
    return x, values, path


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--days", type=int, default=200, help="to train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("decision_focused.png"))
    args = parser.parse_args(argv)

    rng = np.random.default_rng(args.seed)
    truth = {name: rng.normal(size=(FEATURES, GOODS)).astype(np.float32) for name in ("odd", "even")}
    seen, later = days(rng, args.days, truth), days(rng, 500, truth)
    best = float(cost(order(later[1]), later[1]))

    design = jnp.concatenate([seen[0], jnp.ones((len(seen[0]), 1))], axis=1)
    fitted = jnp.linalg.lstsq(design, seen[1])[0]
    start = {"slope": fitted[:-1], "level": fitted[-1]}  # the exact least-squares fit: the usual two stages
    x, values, path = train(lambda x: cost(order(predict(x, seen[0])), seen[1]), start, args.steps)

    regrets = {}
    for name, model in (("prices fitted, then ordered", start), ("trained through the layer", x)):
        predicted = predict(model, later[0])
        regrets[name] = float(cost(order(predicted), later[1])) - best
        error = float(jnp.mean((predicted - later[1]) ** 2))
        print(f"{name}: regret {regrets[name]:.4f} on new days, squared error of the prices {error:.3f}")
    uniform = float(cost(jnp.full((500, GOODS), 1 / GOODS), later[1])) - best
    print(f"the same order every day: regret {uniform:.4f}")

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    every = max(1, args.steps // 30)
    marks = jax.tree.map(lambda a: a[::every], path)
    on_new = jax.lax.map(lambda x: cost(order(predict(x, later[0])), later[1]) - best, marks)
    known = cost(order(seen[1]), seen[1])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    left.plot(values - known, color="C0", alpha=0.6, label="training days")
    left.plot(np.arange(0, args.steps, every), on_new, "o-", color="C1", ms=3, label="new days")
    left.axhline(regrets["prices fitted, then ordered"], color="C1", ls="--", lw=1, label="new days, least squares")
    left.set(
        xlabel="step of Adam through the layer",
        ylabel="regret",
        title="The cost of the decisions falls",
        ylim=(0, None),
    )
    left.legend()
    sample = jnp.argsort(later[0][:, 0])[:: 500 // 12]
    for k, model in enumerate((None, start, x)):
        prices = later[1] if model is None else predict(model, later[0])
        orders = order(prices[sample])
        bottom = np.zeros(len(sample))
        for good in range(GOODS):
            right.bar(
                np.arange(len(sample)) + 0.27 * (k - 1),
                orders[:, good],
                0.25,
                bottom=bottom,
                color=f"C{good}",
                label=f"good {good + 1}" if k == 0 else None,
                alpha=0.85,
            )
            bottom += np.asarray(orders[:, good])
    right.set(
        xlabel="some new days: known prices, least squares, layer", ylabel="order, by good", title="Orders", xticks=[]
    )
    right.legend(ncols=GOODS, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    figure.savefig(args.out, dpi=120)
    print(f"saved {args.out}")
    return regrets


if __name__ == "__main__":
    main()
