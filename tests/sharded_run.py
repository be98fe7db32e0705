"""A network whose parameters lie over a mesh: gradients on four devices against one, their shardings, what is gathered.

python sharded_run.py estimator...      # started by test_long_runs.py with four forced devices; prints JSON
"""

from __future__ import annotations

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bilevel import Problem, hypergradients, linear, lower, runs
from bilevel.hypergradients import value_and_hypergradient

LAYERS, WIDTH, SAMPLES = 6, 32, 16
ADAM = lower.GradientDescent(optax.adam(1e-2, eps_root=1e-8), 9)
ESTIMATORS = {
    "all": (hypergradients.Unrolled(checkpoint="all"), ADAM),
    "sqrt": (hypergradients.Unrolled(checkpoint="sqrt"), ADAM),
    "log": (hypergradients.Unrolled(checkpoint="log"), ADAM),
    "one step": (hypergradients.OneStep(), ADAM),
    "CG": (hypergradients.Implicit(linear.CG(tol=None, max_steps=3, damping=1.0)), ADAM),
    "Neumann": (hypergradients.Implicit(linear.Neumann(0.05, 3)), ADAM),
    "forward": (hypergradients.Forward(directions=2), ADAM),
    "finite difference": (hypergradients.FiniteDifference(0.1), ADAM),
    "SAMA": (hypergradients.SAMA(0.1), ADAM),
    "zeroth order": (hypergradients.PZOBO(2), ADAM),
}


def network(y, rows):
    """Layers in a scan, so that one layer at a time is all that anybody needs whole."""

    def layer(h, w):
        return h + jnp.tanh(h @ w["in"]) @ w["out"], None

    return jax.lax.scan(jax.checkpoint(layer), rows, y)[0]


def training(x, y, batch):
    rows, targets = batch
    penalty = sum(jnp.sum(jnp.exp(a) * b**2) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))
    return jnp.mean((network(y, rows) - targets) ** 2) + 1e-3 * penalty


def validation(x, y, batch):
    rows, targets = batch
    return jnp.mean((network(y, rows) - targets) ** 2)


def made():
    """Problem, x (one penalty per parameter) and y on one device."""
    rng = np.random.default_rng(0)
    batch = lambda: tuple(jnp.asarray(rng.normal(size=(SAMPLES, WIDTH)), jnp.float32) for _ in range(2))
    y = {name: jnp.asarray(rng.normal(size=(LAYERS, WIDTH, WIDTH)) / 20, jnp.float32) for name in ("in", "out")}
    return Problem(validation, training, batch(), batch()), jax.tree.map(jnp.zeros_like, y), y


def placed(mesh, problem, x, y):
    """The samples over one axis of the mesh, and over the other the columns of one matrix and the rows of the next."""
    put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    split = lambda y: {"in": put(y["in"], P(None, None, "model")), "out": put(y["out"], P(None, "model", None))}
    return jax.tree.map(lambda rows: put(rows, P("data")), problem), split(x), split(y)


def gathered(text):
    """The elements of the largest array that a compiled programme gathers whole."""
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? all-gather", text)
    return max((int(np.prod([int(d) for d in shape.split(",") if d])) for shape in shapes), default=0)


def main(names):
    mesh = jax.make_mesh((1, 4) if len(jax.devices()) == 4 else (1, 1), ("data", "model"), (AxisType.Auto,) * 2)
    alone, found = made(), {}
    spread = placed(mesh, *alone)
    for name in names:
        if name == "metagradient":
            one, four = (runs.metagradient(*at, ADAM, segment=4) for at in (alone, spread))
            texts, memories = "", [1, 0]
        else:
            of = lambda problem, x, y: value_and_hypergradient(problem, *ESTIMATORS[name])(x, y)
            programmes = [jax.jit(of).lower(*at).compile() for at in (alone, spread)]
            one, four = (run(*at) for run, at in zip(programmes, (alone, spread), strict=True))
            texts = programmes[1].as_text()
            memories = [p.memory_analysis().temp_size_in_bytes for p in programmes]
        difference = max(
            float(jnp.linalg.norm(a - np.asarray(b)) / jnp.linalg.norm(a))
            for a, b in zip(jax.tree.leaves(one.gradient), map(np.asarray, jax.tree.leaves(four.gradient)), strict=True)
        )
        like = jax.tree.leaves(spread[2])
        kept = all(
            a.sharding.is_equivalent_to(b.sharding, a.ndim)
            for tree in (four.gradient, four.lower.y, four.lower.memory[0].mu, four.lower.memory[0].nu)
            for a, b in zip(jax.tree.leaves(tree), like, strict=True)
        )
        found[name] = [difference, kept, gathered(texts), memories[1] / memories[0]]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:] or [*ESTIMATORS, "metagradient"])
