"""A network whose parameters lie over a mesh: gradients on four devices against one, their shardings, what is gathered.

python tests/sharded_run.py [--float64 | --rounding] [--mesh 1x4] [--through] name...      # with four forced devices

It prints a table, and as its last line JSON for test_mesh.py: by name the distance |g_1 - g_n| / |g_1|, whether
gradient, y and moments lie as y does, the elements of the largest array gathered, what a device holds at most over what
one alone does; and with --rounding the distances of g_1 and g_n to float64's. --through leaves x out of the upper loss,
so that g is what comes through the training alone.
"""

from __future__ import annotations

import argparse
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bilevel import Problem, data, hypergradients, linear, lower, runs, solvers
from bilevel.hypergradients import value_and_hypergradient

LAYERS, WIDTH, SAMPLES = 12, 32, 8
ADAM = lower.GradientDescent(optax.adam(1e-2, eps_root=1e-8), 9)
ESTIMATORS = {
    "all": hypergradients.Unrolled(checkpoint="all"),
    "sqrt": hypergradients.Unrolled(checkpoint="sqrt"),
    "log": hypergradients.Unrolled(checkpoint="log"),
    "plain": hypergradients.Unrolled(checkpoint=False),
    "one step": hypergradients.OneStep(),
    "truncated": hypergradients.Unrolled(last=3),
    "CG": hypergradients.Implicit(linear.CG(tol=None, max_steps=3, damping=1.0)),
    "MINRES": hypergradients.Implicit(linear.MINRES(tol=None, max_steps=3, damping=1.0)),
    "NormalCG": hypergradients.Implicit(linear.NormalCG(tol=None, max_steps=3, damping=1.0)),
    "Robust": hypergradients.Implicit(linear.Robust(max_steps=20, damping=1.0)),
    "Robust, any": hypergradients.Implicit(linear.Robust(max_steps=20, damping=1.0, symmetric=False)),
    "GMRES": hypergradients.Implicit(linear.GMRES(tol=None, max_steps=5, damping=1.0, restart=3)),
    "BiCGStab": hypergradients.Implicit(linear.BiCGStab(tol=None, max_steps=3, damping=1.0)),
    "Neumann": hypergradients.Implicit(linear.Neumann(0.05, 3)),
    "Richardson": hypergradients.Implicit(linear.Richardson(0.05, 3)),
    "Jacobian-free": hypergradients.JacobianFree(),
    "least squares": hypergradients.LeastSquares(3, 0.05),
    "stochastic": hypergradients.StochasticImplicit(step_size=0.05, steps=3),
    "forward": hypergradients.Forward(directions=2),
    "forward, normal": hypergradients.Forward(directions=2, distribution="normal"),
    "finite difference": hypergradients.FiniteDifference(0.1),
    "first order": hypergradients.FirstOrder(),
    "SAMA": hypergradients.SAMA(0.1),
    "PZOBO": hypergradients.PZOBO(2),
    "HOZOG": hypergradients.HOZOG(2),
}
# Their differences amplify rounding: by one over the perturbation.
DIFFERENCES = ("finite difference", "SAMA", "PZOBO", "HOZOG")
METHODS = {
    "SOBA": solvers.SOBA(0.01, 0.01),
    "F2SA": solvers.F2SA(lower_solver=0.01, upper_optimizer=0.01),
    "descent": solvers.HypergradientDescent(hypergradients.Unrolled(), ADAM, optax.adam(1e-2)),
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
    return through(x, y, batch) + 1e-3 * sum(jnp.sum(jnp.sin(a + 1)) for a in jax.tree.leaves(x))


def through(x, y, batch):
    rows, targets = batch
    return jnp.mean((network(y, rows) - targets) ** 2)


def made(dtype=jnp.float32, upper=validation, layers=LAYERS):
    """Problem, x (one penalty per parameter) and y on one device."""
    rng = np.random.default_rng(0)
    batch = lambda: tuple(jnp.asarray(rng.normal(size=(SAMPLES, WIDTH)), dtype) for _ in range(2))
    y = {name: jnp.asarray(rng.normal(size=(layers, WIDTH, WIDTH)) / 20, dtype) for name in ("in", "out")}
    return Problem(upper, training, batch(), batch()), jax.tree.map(jnp.zeros_like, y), y


def specs(mesh):
    """By tensors along "model", the columns of one matrix and the rows of the next; and, where there is more than one
    device along "data", by the other axis of each along that (FSDP)."""
    over = "data" if mesh.shape["data"] > 1 else None
    return {"in": P(None, over, "model"), "out": P(None, "model", over)}


def placed(mesh, problem, x, y):
    """The samples along "data", x and y as `specs` says."""
    put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    split = lambda tree: {name: put(tree[name], spec) for name, spec in specs(mesh).items()}
    return jax.tree.map(lambda rows: put(rows, P("data")), problem), split(x), split(y)


def gathered(text):
    """The elements of the largest array that a compiled programme gathers whole."""
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? all-gather", text)
    return max((int(np.prod([int(d) for d in shape.split(",") if d])) for shape in shapes), default=0)


def peak(programme):
    """The bytes that a device holds at once, at most: arguments, results and temporaries."""
    m = programme.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes


def evaluation(name):
    """(what is compiled, its arguments from (problem, x, y), what of its result is compared, what lies as y does): an
    estimate, or a step of a method, its second one."""
    if name in ESTIMATORS:
        of = lambda problem, x, y: value_and_hypergradient(problem, ESTIMATORS[name], ADAM)(x, y)
        moments = lambda e: (e.gradient, e.lower.y, e.lower.memory[0].mu, e.lower.memory[0].nu)
        return of, lambda *at: at, lambda e: e.gradient, moments
    solver, key = METHODS[name], data.as_step_key(0)
    step = lambda problem, state: solver.step(problem, state, key)[0]

    def first(problem, x, y):
        begun = jax.jit(lambda problem, x, y: step(problem, solver.init(problem, x, y, key)))
        return problem, begun(problem, x, y)

    return step, first, lambda state: state.x, lambda state: (state.x, state.y)  # x began at zero


def distance(a, b):
    """|a - b| / |a|, over all leaves together."""
    a, b = (np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(t)]) for t in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--float64", action="store_true")
    parser.add_argument("--rounding", action="store_true")
    parser.add_argument("--through", action="store_true")
    parser.add_argument("--mesh", default="1x4")
    given = parser.parse_args(arguments)
    upper = through if given.through else validation
    jax.config.update("jax_enable_x64", given.float64 or given.rounding)
    shape = tuple(int(n) for n in given.mesh.split("x"))
    mesh = jax.make_mesh(shape, ("data", "model"), (AxisType.Auto,) * 2)
    alone, found = made(jnp.float64 if given.float64 else jnp.float32, upper), {}
    spread = placed(mesh, *alone)
    print(f"{'':20} distance  kept  gathered  peak" + ("  one and many against float64" if given.rounding else ""))
    for name in given.names or [*ESTIMATORS, *METHODS, "metagradient"]:
        at = alone, spread
        if name == "metagradient":
            of = lambda problem, x, y: runs.metagradient(problem, x, y, ADAM, segment=4)
            _, arguments, compared, like_y = evaluation("all")
            one, four = (of(*each) for each in at)
            texts, ratio = "", 0.0
        else:
            of, arguments, compared, like_y = evaluation(name)
            of, at = jax.jit(of), [arguments(*each) for each in at]
            programmes = [of.lower(*each).compile() for each in at]
            one, four = (run(*each) for run, each in zip(programmes, at, strict=True))
            texts = programmes[1].as_text()
            ratio = peak(programmes[1]) / peak(programmes[0])
        kept = all(
            a.sharding.is_equivalent_to(b.sharding, a.ndim)
            for tree in like_y(four)
            for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(spread[2]), strict=True)
        )
        found[name] = [distance(compared(one), compared(four)), kept, gathered(texts), ratio]
        if given.rounding:
            wide = compared(of(*arguments(*made(jnp.float64, upper))))
            found[name] += [distance(wide, compared(one)), distance(wide, compared(four))]
        far, _, elements, ratio, *rounding = found[name]
        print(
            f"{name:20} {far:.1e}   {kept!s:5} {elements:7}  {ratio:.3f}", *(f" {r:.1e}" for r in rounding), flush=True
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
