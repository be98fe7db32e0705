"""Typical mistakes at every entry of the package: each message names the thing that is wrong and the cure."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import random
import re
from enum import Enum
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel import (
    Problem,
    Solution,
    data,
    datasets,
    diagnostics,
    distributed,
    hypergradients,
    implicit,
    linear,
    lower,
    multistart,
    network,
    optimality,
    optimizers,
    proposers,
    prox,
    run,
    search,
    sets,
    solve,
    solvers,
    splits,
    sweep,
)  # fmt: skip
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


NOISE = np.random.default_rng(0)
RANDOM = random.Random(0)
COUPLED = Problem(F, f, constraint=lambda x, y: y - 1)
ADAM = optax.adam(0.1)


def estimate(problem=Q, *more, **at):
    return lambda: value_and_hypergradient(problem, *more)(**{"x": A(0.0), "y": A(0.0), **at})


def folds(loss=lambda y, s: (s[0] @ y - s[1]) ** 2, penalty=None, **options):
    def made():
        problem, y0 = splits.cross_validation(loss, penalty, (WIDE, ROWS[:3]), jnp.zeros(2), **{"folds": 3, **options})
        return problem.validate(A(0.0), y0)

    return made


def batch_of(**more):
    return of(Fd, fd, **{"upper_data": ROWS, "lower_data": ROWS, **more})


def of(upper=F, lower=f, x0=0.0, y0=0.0, **more):
    return lambda: at(Problem(upper, lower, **more), x0, y0)()


@dataclasses.dataclass
class Parts:
    """A dataclass that JAX does not know."""

    a: object


class AttrDict(dict):
    """An attribute dictionary, which raises a KeyError where it has no attribute."""

    __getattr__ = dict.__getitem__


def gone(shape=()):
    """An array whose memory has been taken."""
    array = jnp.zeros(shape)
    array.delete()
    return array


def gone_data():
    array = jnp.ones(4)
    problem = Problem(Fd, fd, upper_data=(array,), lower_data=ROWS)
    array.delete()
    return problem


UNKNOWN = r"register its class, jax\.tree_util\.register_dataclass\(Parts\).*or give a dict of arrays"
DELETED = "has been deleted: it was given away to a compiled function .donate_argnums., or its delete"

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
    "a dataclass that JAX does not know": (at(y0=Parts(ROWS)), "y0 is of type Parts", UNKNOWN),
    "one within x0": (at(x0={"k": Parts(ROWS)}), r"x0\['k'\] is of type Parts", UNKNOWN),
    "one in run": (lambda: run(Q, solvers.SOBA(), A(0.0), Parts(ROWS), 2), "y0 is of type Parts", UNKNOWN),
    "an attribute dictionary": (at(y0=AttrDict(a=ROWS)), "y0 is of type AttrDict", r"write dict\(y0\)"),
    "an attribute dictionary of data": (of(Fd, upper_data=AttrDict(a=ROWS)), "a AttrDict", r"give dict\(upper_data\)"),
    "text as y0": (at(y0="start"), "y0 is of type str", "give an array, or a dict of arrays"),
    "a deleted y0": (at(y0=gone()), f"y0 {DELETED}", "a copy"),
    "a deleted part of x0": (at(x0={"k": gone(2)}), rf"x0\['k'\] {DELETED}", "a copy"),
    "a deleted x0 in run": (lambda: run(Q, solvers.SOBA(), gone(), A(0.0), 2), f"x0 {DELETED}", "a copy"),
    "a deleted y in an own loop": (estimate(y=gone()), f"y {DELETED}", "a copy"),
    "deleted data": (lambda: at(gone_data())(), rf"upper_data\[0\] {DELETED}", "a copy"),
    "deleted data in an own loop": (lambda: estimate(gone_data())(), rf"upper_data\[0\] {DELETED}", "a copy"),
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


# And further ones, found by trying: some were silent before they were said.
FURTHER = {
    # the losses
    "a loss in a dictionary": (of(lambda x, y: {"loss": F(x, y)}), "upper.*dict", "the value itself"),
    "a loss in a list": (of(lower=lambda x, y: [f(x, y)]), "lower.*list", "the value itself"),
    "a loss of text": (of(lambda x, y: "0.1"), "upper", "one scalar"),
    "a batch as several arguments": (
        of(lambda x, y, X, t: jnp.mean(X * y - t), fd, upper_data=(ROWS, ROWS), lower_data=ROWS),
        "upper", "X, t = batch",
    ),
    "a batch of Keyed that is not taken apart": (batch_of(lower_data=data.Keyed(ROWS)), "lower.*StepKey", "batch, key"),
    "numpy's noise in a loss": (of(lambda x, y: F(x, y) + np.random.normal()), "upper draws random", r"data\.Keyed"),
    "a generator's noise in a loss": (of(lower=lambda x, y: f(x, y) * NOISE.uniform()), "lower draws", "jax.random"),
    "Python's noise in a loss": (of(lambda x, y: F(x, y) + RANDOM.random()), "upper draws random", "jax.random"),
    # variables
    "a problem for x0": (lambda: solve(Q, Q, A(0.0)), "x0 is a Problem", r"solve\(problem, x0, y0, solver\)"),
    "a function for x0": (at(x0=F), "x0 is of type function", "call it"),
    "a shape for x0": (at(x0=jax.ShapeDtypeStruct((2,), jnp.float32)), "x0 is a shape", r"jnp\.zeros"),
    # data
    "a sampler's function of one argument": (
        batch_of(upper_data=data.Sampler(lambda key: ROWS)), "upper_data, Sampler", r"fn\(key, arrays\)",
    ),
    "a sampler by numpy": (
        batch_of(upper_data=data.Sampler(lambda key, a: a[np.random.randint(0, 4, 2)], ROWS)), "upper_data", "a key",
    ),
    "a sampler that returns nothing": (
        batch_of(lower_data=data.Sampler(lambda key, a: None, ROWS)), "lower_data", "return the batch",
    ),
    "a function as data": (batch_of(upper_data=lambda: ROWS), "upper_data is a function", r"data\.Sampler"),
    "a source's class": (batch_of(upper_data=data.Minibatches), "upper_data is the class", r"Minibatches\(\.\.\.\)"),
    "dates as data": (batch_of(upper_data=np.array(["2020-01-01"], "datetime64[D]")), "upper_data", "encode"),
    "arrays one after the other": (lambda: data.Minibatches(WIDE, ROWS), "size", r"Minibatches\(\(X, t\), size\)"),
    "one array for all clients": (lambda: data.Clients(ROWS), "Clients.*ndarray", r"data\.Agents"),
    "a generator as a stream": (
        at(Problem(Fd, fd, data.Stream(row for row in [ROWS, ROWS]), ROWS), solver=solvers.SOBA()),
        "stream is used up", "function start",
    ),
    # sets and proxes
    "bounds in the place of a set": (lambda: Problem(F, f, project_upper=(0.0, 1.0)), "project_upper", r"sets\.Box"),
    "a projection that returns nothing": (of(project_upper=lambda x: None), "project_upper", "returns x0, projected"),
    "a set as a prox": (of(prox_lower=sets.Box(0.0, 1.0)), "prox_lower", r"project_lower=.*prox\.projection"),
    "a set as a constraint": (of(constraint=sets.Box(0.0, 1.0)), "constraint", "project_lower="),
    "a prox as a projection": (of(project_lower=prox.lasso(0.1)), "project_lower", "prox_lower="),
    "a prox that was not called": (of(prox_lower=prox.lasso), "prox_lower", r"prox_lower=prox\.lasso\("),
    "one set to be intersected": (lambda: sets.Intersection(sets.Box(0, 1)), "Intersection", r"\[first, second\]"),
    "parts that are frozen by name": (of(frozen="body"), "frozen.*'body'", r"\{'body': True"),
    # rules, counts
    "a lower solver for the steps": (
        lambda: solvers.ITD(lower.GradientDescent(0.1)), "ITD.*GradientDescent", r"ITD\(lower_steps=10, lower_opt",
    ),
    "a rule for the steps": (lambda: solvers.MAML(ADAM), "MAML.*optax rule", "lower_optimizer=rule"),
    "the step size before the steps": (lambda: solvers.TruncatedITD(0.1, 5), r"TruncatedITD\(lower_steps", "before"),
    "steps as a float in MAML": (lambda: solvers.MAML(5.0), r"MAML\(lower_steps=5\.0", "integer"),
    "a start that is a name": (lambda: solvers.MAML(start="head"), "MAML.*'head'", r'lambda x, y: x\["head"\]'),
    "a start that is an array": (lambda: lower.GradientDescent(start=ROWS), "start", "function"),
    "a schedule as a rule": (
        lambda: solvers.AID(upper_optimizer=optax.cosine_decay_schedule(0.1, 9)), "schedule", r"optax\.sgd\(schedule\)",
    ),
    "a list of rules": (lambda: solvers.SOBA([optax.clip(1.0), ADAM]), "several rules", r"optax\.chain"),
    "a lower solver as a rule": (
        lambda: solvers.AID(upper_optimizer=lower.GradientDescent()), "upper_optimizer=GradientDescent", r"optax\.adam",
    ),
    "an estimator as a lower solver": (lambda: solvers.AID(hypergradients.Unrolled()), "Unrolled", "HypergradientDesc"),
    "a linear solver as a lower one": (lambda: solvers.AID(linear.CG()), "CG", r"AID\(linear_solver=linear\.CG"),
    "a lower solver as an estimator": (estimate(Q, lower.Newton()), "Newton is a lower solver", "lower_solver=lower"),
    "a lower tolerance as text": (lambda: lower.GradientDescent(0.1, 9, "1e-3"), r"tol='1e-3'", "number"),
    "lower steps as text": (lambda: lower.Newton("10"), r"Newton\(steps='10'", "whole number"),
    "a step size for L-BFGS": (lambda: lower.LBFGS(0.1), r"LBFGS\(steps=0\.1", "no step size"),
    "a flag as text": (lambda: solvers.ITD(warm_start="no"), "warm_start='no'", "True or False"),
    "implicit MAML without its proximal term": (
        at(Problem(lambda x, y: jnp.sum(y**2), lambda x, y: jnp.sum((y - 1) ** 2)), 0.0, jnp.zeros(3), solvers.IMAML()),
        "IMAML", r"proximal term.*solvers\.MAML",
    ),
    # a lower solver of one's own
    "a lower function of two arguments": (at(solver=solvers.AID(lambda x, y: y)), "lower solver", r"\(lower, x, y\)"),
    "a lower function that returns nothing": (at(solver=solvers.AID(lambda f, x, y: None)), "None", "lower variable"),
    "a lower function that returns a pair": (at(solver=solvers.AID(lambda f, x, y: (y, 3))), "int32", "nothing else"),
    "a lower function in numpy": (at(solver=solvers.AID(lambda f, x, y: np.asarray(x))), "numpy", r"jax\.numpy"),
    # linear solvers
    "iterations in the place of the tolerance": (lambda: linear.CG(10), r"CG\(tol=10\.0", "max_steps=10"),
    "iterations as a float": (lambda: linear.CG(max_steps=10.0), r"CG\(max_steps=10\.0", "whole number"),
    "a tolerance as text": (lambda: linear.GMRES(tol="1e-3"), r"GMRES\(tol='1e-3'", "number"),
    "a preconditioner's class": (lambda: linear.CG(preconditioner=linear.Jacobi), "Jacobi", r"Jacobi\(\.\.\.\)"),
    "a preconditioner by its name": (lambda: linear.CG(preconditioner="jacobi"), "'jacobi'", r"linear\.Jacobi\(\)"),
    "a matrix for its product": (lambda: linear.CG()(jnp.eye(2), jnp.ones(2)), "matvec", r"lambda v: H @ v"),
    "a vector for the carry": (lambda: linear.CG()(lambda v: v, ROWS, ROWS), "carry", r"solver\.init\(b\)"),
    # hypergradients
    "an integer x in an own loop": (estimate(x=1), "x has dtype int32", r"jnp\.asarray\(x, float\)"),
    "a list for y in an own loop": (estimate(y=[1.0, 2.0]), "y is a list", r"jnp\.asarray"),
    "a vector loss in an own loop": (estimate(Problem(lambda x, y: y * ROWS, f)), "upper", "mean or a sum"),
    "data forgotten in an own loop": (estimate(Problem(Fd, fd, ROWS)), "lower", "lower_data"),
    "a constraint in an own loop": (estimate(COUPLED), "Implicit cannot honour constraint=", "ActiveSet"),
    "a stream in an own loop": (estimate(Problem(F, fd, lower_data=data.Stream([ROWS]))), "Stream", "each batch"),
    "an estimate handed back whole": (lambda: estimate(y=estimate()())(), "whole estimate", r"estimate\.lower"),
    # run, sweep, multistart
    "no solver in run": (lambda: run(Q, None, A(0.0), A(0.0), 2), "run's solver is None", r"run\(problem, solver, x0"),
    "solve's order in run": (lambda: run(Q, A(0.0), A(0.0), solvers.SOBA(), 2), "run's solver", r"run\(problem, so"),
    "a class in run": (lambda: run(Q, solvers.SingleLoop, A(0.0), A(0.0), 2), "SingleLoop", r"SingleLoop\(\)"),
    "integers in run": (lambda: run(Q, solvers.SOBA(), 0, 0, 2), "x0 has dtype int32", r"jnp\.asarray\(x0, float\)"),
    "steps as a float in run": (lambda: run(Q, solvers.SOBA(), A(0.0), A(0.0), 2.0), r"run\(steps=2\.0\)", "integer"),
    "a traced number of steps": (
        lambda: jax.jit(lambda n: run(Q, solvers.SOBA(), A(0.0), A(0.0), n))(2), "steps.*traced", "give an int",
    ),
    "a host's solver in run": (lambda: run(Q, solvers.MPCC(), A(0.0), A(0.0), 2), "MPCC", "call solve"),
    "no problem in run": (lambda: run(F, solvers.SOBA(), A(0.0), A(0.0), 2), "Problem", r"run\(problem"),
    "one solver in a sweep": (lambda: sweep(Q, solvers.SOBA(), A(0.0), A(0.0)), "SingleLoop", r"\[SOBA"),
    "a sweep's order": (lambda: sweep([solvers.SOBA()], Q, A(0.0), A(0.0)), "Problem first", r"sweep\(problem, \["),
    "constructors in a sweep": (lambda: sweep(Q, [solvers.SOBA], A(0.0), A(0.0)), "SOBA", r"SOBA\(\)"),
    "a score of three arguments": (
        lambda: sweep(Q, [solvers.SOBA()], A(0.0), A(0.0), score=Fd), "score", r"function of \(x, y\)",
    ),
    "a multistart's order": (lambda: multistart(Q, solvers.SOBA(), ROWS, ROWS), "multistart's solver", "solvers"),
    "a problem for the check's point": (lambda: diagnostics.check(A(0.0), Q, A(0.0)), "Problem", r"check\(problem"),
    # metrics and callbacks
    "a metric of a solver's name": (at(metrics={"upper_loss": F}), "upper_loss", "another name"),
    "float() in a metric": (at(metrics={"m": lambda x, y: float(y)}), "'m'", "callback"),
    "a callback of no argument": (at(callback=lambda: None), "callback", "Event"),
    "a callback of two arguments": (at(callback=lambda x, y: None), "callback", r"event\.step"),
    "a callback that returns an array": (at(callback=lambda e: ROWS), "callback returned", "return True"),
    # implicit
    "the solver beside the condition": (
        lambda: implicit.custom_root(lambda y, x: y - x, lambda y, x: x), "has_aux", r"\(optimality_fun\)\(solver\)",
    ),
    "a solver that returns nothing": (
        lambda: implicit.custom_root(lambda y, x: y - x)(lambda y, x: None)(None, 1.0), "None", "returns the solution",
    ),
    "a linear solver's class in custom_root": (
        lambda: implicit.custom_root(lambda y, x: y - x, solve=linear.CG), "class CG", r"CG\(\)",
    ),
    "a step size in argmin": (lambda: implicit.argmin(f, 0.1), "argmin.*float", "value_and_hypergradient"),
    "a lower solver in argmin": (lambda: implicit.argmin(f, lower.Newton()), "Newton", "value_and_hypergradient"),
    # folds, files
    "folds as a float": (folds(folds=2.5), r"folds=2\.5", r"KFold\(5\)"),
    "a loss of x in cross-validation": (folds(lambda x, y, s: y), r"score\(y, samples\)", "other arguments"),
    "a penalty of y alone": (folds(penalty=lambda y: jnp.sum(y**2)), r"penalty\(x, y\)", "other arguments"),
    "a mean in cross-validation": (folds(lambda y, s: jnp.mean(s[0] @ y)), "score", "without a mean"),
    "a number for a file": (lambda: Solution.save(None, 3), "save", "path of a file"),
    "a file that is not there": (lambda: Solution.load("/nowhere/at.all"), "load.*nowhere", r"Solution\.save"),
}  # fmt: skip


def taking(call, *args, **options):
    """A call whose arguments do not fit its signature."""
    return lambda: call(*args, **options)


RAGGED = [np.ones((2, 3)), np.ones((2, 4))]
GRAMMAR = proposers.Grammar(("a", "b"))
NOTHING = proposers.ReplayProposer(())
VECTORS = Problem(lambda x, y: jnp.sum((y - 1) ** 2), lambda x, y: jnp.sum((y - x) ** 2))

# Calls that do not fit: another library's words for the arguments, one too many, one too few; parts that do not fit.
CALLS = {
    "steps by their place": (taking(solve, Q, A(0.0), A(0.0), solvers.SOBA(), 9), "and 9 is one more", "steps=9"),
    "steps of a sweep by their place": (taking(sweep, Q, [], A(0.0), A(0.0), 9), "sweep.*9 is one more", "steps=9"),
    "evaluations by their place": (taking(search, F, NOTHING, 9), "search.*9 is one more", "evaluations=9"),
    "a learning rate": (
        taking(solvers.AID, learning_rate=0.1), r"AID\(learning_rate=0\.1", "mean upper_optimizer=.*step s",
    ),
    "lr": (taking(solvers.SOBA, lr=0.1), r"SOBA\(lr=", "upper_optimizer= or lower_optimizer="),
    "lr of an engine": (taking(solvers.DSOBA, network.ring(3), lr=0.1), r"DSOBA\(lr=", "upper_optimizer= or lower_op"),
    "the step size of a descent": (
        taking(lower.GradientDescent, step_size=0.1), r"step_size", "mean optimizer=.*step size",
    ),
    "an inner learning rate": (taking(solvers.MAML, inner_lr=0.1), "inner_lr", "mean lower_optimizer="),
    "inner steps": (taking(solvers.ITD, inner_steps=10), "inner_steps", "mean lower_steps="),
    "an inner solver": (taking(solvers.AID, inner_solver=lower.Newton()), "inner_solver", r"mean lower_solver=\?"),
    "maxiter of solve": (taking(solve, Q, A(0.0), A(0.0), maxiter=10), "maxiter", r"mean steps=\?"),
    "max_iter of CG": (taking(linear.CG, max_iter=10), r"CG\(max_iter=10", r"mean max_steps=\?"),
    "maxiter of L-BFGS": (taking(lower.LBFGS, maxiter=10), r"LBFGS\(maxiter=10", r"mean steps=\?"),
    "a rate of quasi_newton": (taking(optimizers.quasi_newton, lr=1), r"quasi_newton\(lr=1", "takes memory, largest"),
    "a seed": (taking(solve, Q, A(0.0), A(0.0), seed=1), "seed=1", r"mean key=\?"),
    "verbose": (taking(solve, Q, A(0.0), A(0.0), verbose=True), "verbose", r"mean progress=\?"),
    "a method's name": (taking(solve, Q, A(0.0), A(0.0), method="SOBA"), "method", r"solvers\.AID\(\)"),
    "batches in solve": (taking(solve, Q, A(0.0), A(0.0), batch_size=3), "batch_size", r"data\.Minibatches\("),
    "a batch's size": (taking(data.Minibatches, ROWS, batch_size=3), "batch_size", r"mean size=\?"),
    "shuffled batches": (taking(data.Minibatches, ROWS, 3, shuffle=True), "shuffle", "anew in each epoch"),
    "outer and inner": (taking(Problem, outer=F, inner=f), r"Problem\(outer", r"mean upper=\?"),
    "upper_loss": (taking(Problem, upper_loss=F, lower_loss=f), "upper_loss", r"mean upper=\?"),
    "one loss": (taking(Problem, F), "Problem is not given lower", r"Problem\(upper, lower\)"),
    "bounds of a Problem": (taking(Problem, F, f, bounds=(0, 1)), "bounds", r"project_upper=sets\.Box"),
    "data of a Problem": (taking(Problem, F, f, train_data=ROWS), "train_data", "upper_data= or lower_data="),
    "x in solve": (taking(solve, Q, x=A(0.0)), "no argument x=", r"mean x0=\?"),
    "x0 twice": (taking(solve, Q, A(0.0), x0=A(0.0)), "x0 twice", "by its place.*by its name"),
    "run without steps": (taking(run, Q, solvers.SOBA(), A(0.0), A(0.0)), "not given steps", r"x0, y0, steps\)"),
    "a sweep without a start": (taking(sweep, Q, []), "not given x0 and y0", r"sweep\(problem, solvers, x0, y0\)"),
    "steps of an estimator": (
        taking(hypergradients.Unrolled, steps=3), "steps=3", r"lower\.GradientDescent\(0\.1, steps",
    ),
    "the lower solution of an estimate": (lambda: estimate()().y, "Estimate has no attribute 'y'", "lower"),
    "an estimate's grad": (lambda: estimate()().grad, "no attribute 'grad'", r"mean gradient\?"),
    "an estimate taken apart": (lambda: [*estimate()()], "Estimate is no tuple", "value, gradient"),
    "jax.grad of an estimate": (
        lambda: jax.grad(value_and_hypergradient(Q))(A(0.0), A(0.0)), "Estimate", r"\.gradient is the hypergradient",
    ),
    "an estimate without y": (lambda: value_and_hypergradient(Q)(A(0.0)), "not given y", r"\(problem\)\(x, y\)"),
    "a solution taken apart": (lambda: [*at()()], "Solution is no tuple", "x, y, result"),
    "a solution's loss": (lambda: at()().loss, "no attribute 'loss'", "history"),
    "a history's attribute": (lambda: at()().history.upper_loss, "upper_loss", r'history\["upper_loss"\]'),
    "a box's low": (taking(sets.Box, low=0, high=1), "low=0", r"mean lower=\?"),
    "a ball's r": (taking(sets.Ball, r=1), "r=1", r"mean radius=\?"),
    "a lasso's lam": (taking(prox.lasso, lam=0.1), r"lasso\(lam=", r"mean strength=\?"),
    "an elastic net of one strength": (
        taking(prox.elastic_net, 0.1), "not given ridge", r"elastic_net\(lasso, ridge\)",
    ),
    "a graph's p": (taking(network.erdos_renyi, 5, p=0.3), "p=0.3", r"mean probability=\?"),
    "a method without its network": (taking(solvers.DSOBA), "not given network", r"DSOBA\(network\)"),
    "folds by n_splits": (
        taking(splits.cross_validation, F, None, WIDE, A(0.0), n_splits=3), "n_splits", r"mean folds=\?",
    ),
    "trials of a search": (taking(search, F, NOTHING, n_trials=9), "n_trials", r"mean evaluations=\?"),
    "a proposer's class": (taking(search, F, proposers.ReplayProposer), "the class", r"ReplayProposer\(\.\.\.\)"),
    "seconds as text": (taking(search, F, NOTHING, seconds="3"), r"search\(seconds='3'\)", "a number or None"),
    "a linear solver of custom_root": (
        taking(implicit.custom_root, f, linear_solver=linear.CG()), "linear_solver", r"mean solve=\?",
    ),
    "a quadratic programme in words": (taking(implicit.qp, "Q", "c"), "qp: Q is a str", r"Give Q \(n, n\), c \(n,\)"),
    "a quadratic programme of functions": (taking(implicit.qp, WIDE[:2], len), "qp: c is a builtin", "Give Q"),
    "a quadratic programme of P": (taking(implicit.qp, P=WIDE, q=ROWS), r"qp\(P=", "takes Q, c, A, b, G, h"),
    "a solver of two arguments in argmin": (
        lambda: implicit.argmin(f, lambda x, y: y)(A(0.0), A(0.0)), r"solver\(lower, x, y\)", "is one more",
    ),
    "shares for sizes": (taking(datasets.split, (WIDE,), sizes=(0.5, 0.5), seed=0), r"0\.5, 0\.5", "counts of samples"),
    "the size of a mesh": (taking(distributed.mesh, shape=3), "shape=3", "sizes of the axes are whole numbers"),
    "no mesh": (taking(distributed.place, ROWS, 4), "place.*int", r"distributed\.mesh\("),
    "an infinite step": (taking(solvers.SOBA, float("inf")), "inf", "positive and finite"),
    "a step size per entry": (
        at(solver=solvers.AID(upper_optimizer=jnp.ones(3))), r"AID\(upper_optimizer", "A step size is one number",
    ),
    "a rule for other parts": (
        at(VECTORS, jnp.zeros(2), jnp.zeros(2), solvers.AID(upper_optimizer=optax.masked(ADAM, {"a": True}))),
        "does not fit x", "given a tree like x",
    ),
    "labels without a rule": (
        at(VECTORS, jnp.zeros(2), jnp.zeros(2), solvers.AID(0.1, optax.multi_transform({"a": ADAM}, "b"))),
        r"AID\(upper_optimizer", "given a tree like x",
    ),
    "a file as data": (batch_of(upper_data=Path("train.csv")), "upper_data is a path", "arrays"),
    "clients of other shapes": (taking(data.Clients, RAGGED), "client 1.*4.*client 0.*3", "make them alike"),
    "feasible as text": (
        taking(multistart, Q, ROWS, ROWS, solvers.SOBA(), feasible="no"), r"feasible='no'", "a number is needed",
    ),
    "progress as text": (at(progress="bar"), "progress='bar'", "True, False or None"),
    "a directory for a file": (lambda: Solution.load("/"), r"load\('/'\)", "Solution.save writes a file"),
}  # fmt: skip


ROOMS = (
    solvers, hypergradients, lower, linear, data, sets, prox, network, proposers, implicit, optimality, splits,
    datasets, distributed, diagnostics,
)  # fmt: skip
# What calls return, what others are built on, and what takes its options on to others.
NOT_CALLED = {
    "Check", "Description", "Estimate", "EstimatorCheck", "Expression", "LeastSquares", "LinearCarry", "LinearInfo",
    "LowerState", "Metasmoothness", "Path", "PreconditionerState", "Program", "QPSolution", "Refused", "Set", "Source",
    "Steps", "StepKey", "Tangents", "Trial", "as_lower_solver", "as_source", "as_step_key", "assemble",
    "assemble_terms", "consensus_error", "default_solver", "execute", "finite", "jaxopt", "optimistix", "refuse",
    "repeat", "seen", "shutdown", "until",
}  # fmt: skip


def test_every_public_call_with_an_unknown_argument_says_so():
    silent = []
    for room in ROOMS:
        for name in room.__all__:
            call = getattr(room, name)
            error = isinstance(call, type) and (issubclass(call, (Exception, Enum)) or hasattr(call, "_is_protocol"))
            if callable(call) and not error and name not in NOT_CALLED:
                with pytest.raises(TypeError) as caught:
                    call(no_such_argument=1)
                said = f"{name}(no_such_argument=1): there is no argument", f"{name} is not given network"
                silent += [] if str(caught.value).startswith(said) else [f"{room.__name__}.{name}: {caught.value}"]
    assert not silent, "\n".join(silent)


def test_a_search_in_which_nothing_was_solved_says_why():
    found = search(lambda proposal: None, proposers.GrammarProposer(GRAMMAR), evaluations=2, batch=2, progress=False)
    assert re.search("None was solved; of 2: TypeError: problem_of returned a NoneType", repr(found))


def test_an_error_from_within_a_call_that_fits_is_what_it_was():
    def broken(lower, x, y):
        return f(1, 2, 3)

    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        implicit.argmin(f, broken)(A(0.0), A(0.0))


def test_what_is_taken_apart_by_name_is_copied_and_stored():
    kept = pickle.loads(pickle.dumps(copy.copy(at()())))
    assert hasattr(kept, "x") and not hasattr(kept, "loss") and copy.deepcopy(kept.history)["upper_loss"].size == 2


@pytest.mark.parametrize("name", [*MISTAKES, *FURTHER, *CALLS])
def test_the_message_names_the_thing_and_the_cure(name):
    mistake, thing, cure = (MISTAKES | FURTHER | CALLS)[name]
    with pytest.raises((TypeError, ValueError, FileNotFoundError, AttributeError)) as caught:
        mistake()
    message = str(caught.value)
    assert re.search(thing, message), message
    assert re.search(cure, message), message
    assert len(message) < 900, "a sentence or two, not a dump"


def test_there_are_sixty_and_more_than_forty_further_ones():
    kinds = MISTAKES, FURTHER, CALLS
    assert len(MISTAKES) >= 60 and min(len(FURTHER), len(CALLS)) >= 40
    assert len(set().union(*kinds)) == sum(map(len, kinds))
