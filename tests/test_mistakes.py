"""Sixty typical mistakes: each message names the thing that is wrong and the cure."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel import Problem, data, hypergradients, linear, lower, run, sets, solve, solvers
from bilevel.hypergradients import value_and_hypergradient

A = jnp.asarray


def F(x, y):
    return (y - 1) ** 2 + 0.1 * x**2


def f(x, y):
    return (y - x) ** 2


def Fd(x, y, batch):
    return jnp.mean((y - batch) ** 2) + 0.1 * x**2


def fd(x, y, batch):
    return jnp.mean((y - x - batch) ** 2)


Q = Problem(F, f)
ROWS = np.ones((4,), np.float32)
WIDE = np.ones((3, 2), np.float32)
OBJECTS = np.array([1, "a"], object)


def at(problem=Q, x0=0.0, y0=0.0, solver=None, **options):
    given = lambda z: A(z) if isinstance(z, float) else z
    return lambda: solve(problem, given(x0), given(y0), solver, **{"steps": 2, **options})


def of(upper=F, lower=f, x0=0.0, y0=0.0, **more):
    return lambda: at(Problem(upper, lower, **more), x0, y0)()


# name: (the mistake, what its message has to say: the thing and the cure)
MISTAKES = {
    # the solver
    "a solver's class": (at(solver=solvers.SingleLoop), "SingleLoop", r"SingleLoop\(\)"),
    "a solver's constructor": (at(solver=solvers.SOBA), "SOBA", r"SOBA\(\)"),
    "a solver by its name": (at(solver="SOBA"), "SOBA", r"solvers\.SOBA\(\)"),
    "an optax rule as solver": (at(solver=optax.adam(0.1)), "optax", r"upper_optimizer="),
    "a lower solver as solver": (at(solver=lower.LBFGS()), "GradientDescent", r"solvers\.AID\("),
    "an estimator as solver": (at(solver=hypergradients.Implicit()), "Implicit", r"HypergradientDescent\("),
    "a linear solver as solver": (at(solver=linear.CG()), "CG", r"solvers\.AID\("),
    "a misspelt keyword of a solver": (lambda: solvers.SOBA(uper_optimizer=0.1), "uper_optimizer", "SOBA"),
    "a misspelt keyword of solve": (at(step=3), "step", "solve"),
    "a misspelt keyword of Problem": (lambda: Problem(F, f, uper_data=ROWS), "uper_data", "Problem|__init__"),
    # steps, tolerances, keys
    "tol as a string": (at(tol="1e-3"), "tol='1e-3'", "number"),
    "a negative tol": (at(tol=-1.0), "tol", "positive"),
    "a NaN tol": (at(tol=float("nan")), "tol", "positive"),
    "negative steps": (at(steps=-3), "steps=-3", "positive integer"),
    "steps as a float": (at(steps=1e3), "steps=1000.0", "positive integer"),
    "steps as a string": (at(steps="10"), "steps='10'", "positive integer"),
    "a key of strings": (at(key="0"), "key", "seed|jax.random.key"),
    "a key of floats": (at(key=0.5), "key", "seed|jax.random.key"),
    "two keys": (at(key=jax.random.split(jax.random.key(0))), "key", "one key|seed"),
    # metrics, callbacks
    "metrics as a list": (at(metrics=[F]), "metrics", r"\{"),
    "metrics as a function": (at(metrics=F), "metrics", r"\{"),
    "a metric of three arguments": (at(metrics={"m": Fd}), "'m'", r"\(function, data\)"),
    "a metric of one argument": (at(metrics={"m": lambda y: y}), "'m'", r"\(x, y\)"),
    "a metric that is a number": (at(metrics={"m": 3.0}), "'m'", "function"),
    "a metric's value that is no array": (at(metrics={"m": lambda x, y: "good"}), "'m'", "array|scalar|traced"),
    "a metric of a name of the solver": (at(metrics={3: F}), "metrics", "name|string"),
    "a callback that is no function": (at(callback=3), "callback", "function"),
    # the start
    "y0=None": (at(y0=None), "y0", r"solve\(problem, x0, y0\)"),
    "an empty y0": (at(y0={}), "y0", "floating-point array"),
    "an integer x0": (at(x0=0), "x0", r"jnp\.asarray"),
    "an integer array y0": (at(y0=jnp.arange(3)), "y0", "float"),
    "a complex y0": (at(y0=A(1j)), "y0", "float"),
    "a NaN in y0": (at(y0=A(np.nan)), "y0", "finite"),
    "a string in x0": (at(x0={"a": "b"}), r"x0\['a'\]", r"jnp\.asarray|floating"),
    "nested lists": (at(y0=[[1.0, 2.0], [3.0]]), "y0", "leaf|leaves|array"),
    "an object array": (at(x0=np.array([1.0, None], object)), "x0", "object"),
    "x0 and y0 swapped": (
        at(Problem(lambda x, y: jnp.sum(x @ WIDE * y), lambda x, y: jnp.sum((x @ WIDE - y) ** 2)),
           x0=jnp.ones(2), y0=jnp.ones(3)),
        "upper", r"float32\[2\]",
    ),
    # the losses
    "a vector loss": (of(lambda x, y: y * jnp.ones(3)), "upper", "mean or a sum"),
    "a loss of one element": (of(lower=lambda x, y: (y - x) ** 2 * jnp.ones(1)), "lower", "mean or a sum"),
    "aux from a loss": (of(lambda x, y: (y**2, {"aux": x})), "upper", "aux|metrics="),
    "a loss of None": (of(lambda x, y: None), "upper", "return"),
    "an integer loss": (of(lambda x, y: jnp.int32(3)), "upper", "floating"),
    "a loss of three arguments without data": (of(Fd), "upper", "upper_data"),
    "a loss of two arguments with data": (of(upper_data=ROWS), "upper", r"\(x, y, batch\)"),
    "an if in a loss": (of(lambda x, y: y if x > 0 else -y), "upper", r"jnp\.where"),
    "float() in a loss": (of(lower=lambda x, y: float(x) * y), "lower", "jnp|jax"),
    "numpy in a loss": (of(lower=lambda x, y: np.square(np.asarray(y - x))), "lower", "jnp|jax"),
    "a loss that is no function": (lambda: Problem(F, 3.0), "lower", "function"),
    "data in the place of a loss": (lambda: Problem((ROWS, ROWS), (ROWS, ROWS)), "upper", "function"),
    "no Problem": (lambda: solve(F, A(0.0), A(0.0)), "Problem", r"Problem\(upper="),
    "two losses": (lambda: value_and_hypergradient(F, f), "Problem", r"Problem\(upper="),
    # the data
    "data of different lengths": (of(Fd, fd, upper_data=(ROWS, ROWS[:3])), "upper_data", "sample"),
    "a scalar among the data": (of(Fd, fd, upper_data=np.float32(1), lower_data=ROWS), "upper_data", "axis"),
    "a list of numbers as data": (of(Fd, fd, upper_data=[1.0, 2.0], lower_data=ROWS), "upper_data", r"asarray"),
    "object arrays as data": (of(Fd, fd, upper_data=OBJECTS, lower_data=ROWS), "upper_data", "numbers"),
    "a NaN in the data": (of(Fd, fd, upper_data=np.array([1.0, np.nan]), lower_data=ROWS), "upper_data", "NaN"),
    "a batch larger than the data": (lambda: data.Minibatches(ROWS, 10), "10", "4"),
    "a batch of no samples": (lambda: data.Minibatches(ROWS, 0), "size", "positive"),
    # sets and constraints
    "a project that changes the shape": (of(project_upper=lambda x: jnp.stack([x, x])), "project_upper", "keep"),
    "a project that changes the structure": (of(project_lower=lambda y: (y, y)), "project_lower", "keep"),
    "a project that is a set's class": (of(project_lower=sets.Box), "project_lower", r"sets\.Box\("),
    "a constraint of nothing": (of(constraint=lambda x, y: None), "constraint", "return"),
    "a constraint of truth values": (of(constraint=lambda x, y: y <= 1), "constraint", r"y - 1|values"),
    "a constraint that fails": (of(constraint=lambda x, y: y["w"]), "constraint", "float32"),
    "a prox in another order": (of(prox_lower=lambda x, scaling: x), "prox_lower", r"\(x, y, scaling\)"),
    # estimators, lower solvers, rules
    "a linear solver as an estimator": (lambda: value_and_hypergradient(Q, linear.CG()), "CG", r"Implicit\(linear"),
    "a linear solver as an estimator of a solver": (
        lambda: solvers.HypergradientDescent(linear.CG()), "CG", r"Implicit\(linear",
    ),
    "an estimator's class": (lambda: value_and_hypergradient(Q, hypergradients.Implicit), "Implicit", r"Implicit\(\)"),
    "an estimator as a linear solver": (
        lambda: solvers.AID(linear_solver=hypergradients.Implicit()), "Implicit", r"linear\.CG",
    ),
    "a linear solver's class": (lambda: solvers.AID(linear_solver=linear.CG), "CG", r"CG\(\)"),
    "an uncalled optax rule": (lambda: solvers.SOBA(optax.adam), "adam", r"optax\.adam\("),
    "an uncalled lower rule": (lambda: lower.GradientDescent(optax.adam), "adam", r"optax\.adam\("),
    "a lower solver's class": (lambda: solvers.AID(lower.Newton), "Newton", r"Newton\(\)"),
    "a step size as a string": (lambda: solvers.SOBA("0.1"), "0.1", "step size"),
    "a negative step size": (lambda: solvers.SOBA(-0.1), "-0.1", "positive"),
    "no lower steps": (lambda: lower.GradientDescent(0.1, 0), "steps", "positive"),
    "a rule that looks at values": (
        at(Problem(F, f), solver=solvers.SOBA(optax.polyak_sgd(0.1))), "values", "optax.adam",
    ),
    "a stream in run": (
        lambda: run(Problem(F, fd, lower_data=data.Stream([ROWS])), solvers.SOBA(), A(0.0), A(0.0), 2),
        "Stream", "solve",
    ),
    "a solver in the place of x0": (lambda: solve(Q, solvers.SOBA(), A(0.0), A(0.0)), "x0", "solve|float"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_the_message_names_the_thing_and_the_cure(name):
    mistake, thing, cure = MISTAKES[name]
    with pytest.raises((TypeError, ValueError)) as caught:
        mistake()
    message = str(caught.value)
    assert re.search(thing, message), message
    assert re.search(cure, message), message
    assert len(message) < 900, "a sentence or two, not a dump"


def test_there_are_sixty():
    assert len(MISTAKES) >= 60
