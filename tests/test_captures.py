"""What losses capture is never stale, and changed numbers do not compile anew."""

from __future__ import annotations

import array
import collections
import contextvars
import copy
import ctypes
import dataclasses
import functools
import importlib
import os
import pickle
import queue
import sys
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque

import captured
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel import Problem, data, hypergradients, prox, sets, solve, solvers
from bilevel.captures import Captured, described, host_generators, taken
from bilevel.checkpoint import CheckpointError
from bilevel.lower import GradientDescent

LAM = 1.0
SETTINGS = {"lam": 1.0}
ARRAY = np.ones(2)
NAMESPACE = types.SimpleNamespace(lam=1.0)


DRAWN, BESIDE = np.random.default_rng(0), np.random.default_rng(1)


class Net:
    """An object whose attribute a loss reads."""

    def __init__(self, lam):
        self.lam = lam

    def loss(self, x, y):
        return (y - 1) ** 2 + self.lam * x**2

    __call__ = loss


@dataclasses.dataclass(frozen=True)
class Frozen:
    lam: float

    def __call__(self, x, y):
        return (y - 1) ** 2 + self.lam * x**2


def by_global(x, y):
    return (y - 1) ** 2 + LAM * x**2


def penalty(x):
    return LAM * x**2


def by_helper(x, y):
    return (y - 1) ** 2 + penalty(x)


def by_dict(x, y):
    return (y - 1) ** 2 + SETTINGS["lam"] * x**2


def by_array(x, y):
    return (y - 1) ** 2 + ARRAY[0] * x**2


def by_namespace(x, y):
    return (y - 1) ** 2 + NAMESPACE.lam * x**2


def by_branch(x, y):
    return (y - 1) ** 2 + (LAM * x**2 if LAM > 0 else 0.0)


def by_type(x, y):
    return (y - 1) ** 2 + (LAM * x**2 if isinstance(LAM, float) else 0.0)


by_jit = jax.jit(by_global)


@jax.custom_vjp
def penalty_by_vjp(x):
    return LAM * x**2


penalty_by_vjp.defvjp(lambda x: (LAM * x**2, x), lambda x, g: (2 * LAM * x * g,))


@jax.custom_jvp
def penalty_by_jvp(x):
    return LAM * x**2


penalty_by_jvp.defjvps(lambda t, ans, x: 2 * LAM * x * t)
VARIABLE = contextvars.ContextVar("lam", default=1.0)


def by_attribute(x, y):
    return (y - 1) ** 2 + by_attribute.lam * x**2


def by_import(x, y):
    from captured import LAM as lam

    return (y - 1) ** 2 + lam * x**2


def by_imported_module(x, y):
    import captured

    return (y - 1) ** 2 + captured.LAM * x**2


class ByClass:
    """A loss that reads its class."""

    LAM = 1.0

    @classmethod
    def loss(cls, x, y):
        return (y - 1) ** 2 + cls.LAM * x**2


class Slotted:
    """An object without a dictionary."""

    __slots__ = ("lam",)

    def __call__(self, x, y):
        return (y - 1) ** 2 + self.lam * x**2


SLOTTED = Slotted()
KEPT = Net(1.0)


MADE = types.ModuleType("made_by_hand")
sys.modules["made_by_hand"] = MADE
ORDERED, DEFAULT, QUEUE = OrderedDict(lam=1.0), defaultdict(float, lam=1.0), deque([1.0], maxlen=2)
NUMBER = np.float32(1)


@functools.lru_cache
def cached():
    return LAM


@functools.singledispatch
def dispatched(x):
    return LAM * x**2


def written():
    with open(captured.FILE) as file:
        return float(file.read())


def plus(penalty):
    """A loss with this penalty."""
    return lambda x, y: (y - 1) ** 2 + penalty(x)


def closure(lam):
    return lambda x, y: (y - 1) ** 2 + lam * x**2


def set_all(lam):
    global LAM, NUMBER
    NUMBER, captured.OTHER = np.float32(lam), int(lam)
    captured.Settings.lam = captured.Settings.parts["a"][0] = MADE.lam = lam
    ORDERED["lam"] = DEFAULT["lam"] = QUEUE[0] = lam
    sys.modules["captured"].FILE.write_text(str(lam))
    os.environ["BILEVEL_TEST_LAM"] = str(lam)
    cached.cache_clear()
    LAM = SETTINGS["lam"] = NAMESPACE.lam = KEPT.lam = lam
    ARRAY[:] = lam  # in place
    captured.LAM = by_attribute.lam = ByClass.LAM = SLOTTED.lam = lam
    VARIABLE.set(lam)


MOVING = {
    "global": lambda lam: by_global,
    "helper": lambda lam: by_helper,
    "dict": lambda lam: by_dict,
    "array in place": lambda lam: by_array,
    "namespace": lambda lam: by_namespace,
    "the user's jit": lambda lam: by_jit,
    "method": lambda lam: KEPT.loss,
    "another object": lambda lam: Net(lam).loss,
    "callable": Net,
    "frozen dataclass": Frozen,
    "closure": closure,
    "closure over an array": lambda lam: closure(jnp.asarray(lam)),
    "default": lambda lam: lambda x, y, lam=lam: (y - 1) ** 2 + lam * x**2,
    "partial": lambda lam: functools.partial(lambda lam, x, y: (y - 1) ** 2 + lam * x**2, lam),
    "closure in a closure": lambda lam: (lambda f: lambda x, y: f(x, y))(closure(lam)),
    "vmap": lambda lam: (lambda f: lambda x, y: f(x[None], y[None])[0])(jax.vmap(closure(lam))),
}
MOVING |= {
    "an attribute of the function": lambda lam: by_attribute,
    "checkpoint": lambda lam: lambda x, y: (y - 1) ** 2 + jax.checkpoint(penalty)(x),
}
MOVING |= {
    "a module's attribute": lambda lam: plus(lambda x: captured.LAM * x**2),
    "a module's function": lambda lam: plus(lambda x: captured.penalty(x)),
    "a module's namespace": lambda lam: plus(lambda x: captured.Settings.lam * x**2),
    "a dictionary of a namespace": lambda lam: plus(lambda x: captured.Settings.parts["a"][0] * x**2),
    "a module that was made by hand": lambda lam: plus(lambda x: MADE.lam * x**2),
    "an ordered dictionary": lambda lam: plus(lambda x: ORDERED["lam"] * x**2),
    "a dictionary with a default": lambda lam: plus(lambda x: DEFAULT["lam"] * x**2 + DEFAULT.get("none", 0)),
    "a queue": lambda lam: plus(lambda x: QUEUE[0] * x**2),
    "a number of numpy's": lambda lam: plus(lambda x: NUMBER * x**2),
}
FIXED = {
    "a cache": lambda lam: plus(lambda x: cached() * x**2),
    "a dispatched function": lambda lam: plus(lambda x: dispatched(x)),
    "the environment": lambda lam: plus(lambda x: float(os.environ["BILEVEL_TEST_LAM"]) * x**2),
    "the environment by getenv": lambda lam: plus(lambda x: float(os.getenv("BILEVEL_TEST_LAM")) * x**2),
    "sys.modules": lambda lam: plus(lambda x: sys.modules["captured"].LAM * x**2),
    "a module imported by its name": lambda lam: plus(lambda x: importlib.import_module("captured").LAM * x**2),
    "getattr": lambda lam: plus(lambda x: getattr(captured, "LA" + "M"[:1]) * x**2),
    "a file": lambda lam: plus(lambda x: written() * x**2),
    "a caller's globals": lambda lam: plus(lambda x: sys._getframe().f_globals["LAM"] * x**2),
    "branch": lambda lam: by_branch,
    "type": lambda lam: by_type,
    "custom_vjp": lambda lam: lambda x, y: (y - 1) ** 2 + penalty_by_vjp(x),
    "custom_jvp": lambda lam: lambda x, y: (y - 1) ** 2 + penalty_by_jvp(x),
    "context variable": lambda lam: lambda x, y: (y - 1) ** 2 + VARIABLE.get() * x**2,
    "import": lambda lam: by_import,
    "import of a module": lambda lam: by_imported_module,
    "all globals": lambda lam: lambda x, y: (y - 1) ** 2 + globals()["LAM"] * x**2,
    "class": lambda lam: ByClass.loss,
    "slots": lambda lam: SLOTTED,
}


@pytest.fixture(autouse=True)
def file_of_a_number(tmp_path):
    captured.FILE = tmp_path / "number"


@pytest.mark.parametrize("name", [*MOVING, *FIXED])
def test_a_captured_number_has_its_value_of_now_and_travels_where_it_can(name):
    traces = []
    call = jax.jit(lambda fn, x, y: traces.append(0) or fn(x, y))
    two = jnp.asarray(2.0)
    for lam in (1.0, 3.0, 0.5, 7.0):
        set_all(lam)
        fn = taken((MOVING | FIXED)[name](lam), (two, two))
        assert isinstance(fn, Captured)
        assert call(fn, two, two) == 1 + 4 * lam
    assert len(traces) == (1 if name in MOVING else 4)


def in_all_places(x, y):
    """(y - 1)^2 + LAM x^2, the number read from a dozen places."""
    objects = LAM + SETTINGS["lam"] + ARRAY[0] + NAMESPACE.lam + NUMBER + KEPT.lam + ORDERED["lam"] + QUEUE[0]
    modules = captured.LAM + captured.Settings.lam + captured.Settings.parts["a"][0] + MADE.lam
    return (y - 1) ** 2 + (objects + modules) / 12 * x**2


@pytest.mark.parametrize("loss", [pytest.param(by_global, marks=pytest.mark.slow), in_all_places])
def test_fifty_solves_with_another_number_each_are_right_and_compile_once(loss):
    solver = solvers.AID(upper_optimizer=0.1)
    compiled = []
    count = lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(count)
    for i, lam in enumerate(np.linspace(0.2, 5, 50)):
        set_all(float(lam))
        solution = solve(
            Problem(loss, lambda x, y: (y - x) ** 2), jnp.zeros(()), jnp.zeros(()), solver, steps=200, tol=1e-5
        )
        np.testing.assert_allclose(solution.x, 1 / (1 + lam), atol=1e-4)
        if i == 1:
            compiled.clear()
    assert not compiled


MADE_ANEW = {
    "none": lambda: None, "AID": solvers.AID, "F2BA": solvers.F2BA,
    "optax": lambda: solvers.AID(GradientDescent(optax.adam(0.1), 5), upper_optimizer=optax.sgd(0.1)),
}  # fmt: skip


@pytest.mark.parametrize(("made", "tol"), [
    pytest.param(made, tol, id=f"{tol}-{name}", marks=[pytest.mark.slow] * (tol is not None and name != "none"))
    for tol in (None, 1e-3) for name, made in MADE_ANEW.items()
])  # fmt: skip
def test_a_solver_that_is_made_anew_for_each_solve_compiles_nothing_anew(made, tol):
    compiled = []
    count = lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    problem = Problem(by_global, lambda x, y: (y - x) ** 2 + 0.1 * y**4)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for k in range(3):
            if k == 2:
                compiled.clear()
            solve(problem, jnp.zeros(()), jnp.zeros(()), made(), steps=20, tol=tol, progress=False)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert not compiled


def test_a_solver_with_another_rule_is_another_programme():
    problem = Problem(by_global, lambda x, y: (y - x) ** 2)
    ends = [
        solve(problem, 0.0, 0.0, solvers.SOBA(optax.sgd(rate), 0.3), steps=3, progress=False).x
        for rate in (0.1, 0.01, 0.1)
    ]
    assert ends[0] == ends[2] > 2 * ends[1]


def test_solvers_made_anew_with_other_numbers_are_one_programme():
    """A loop over step sizes, each in a new solver, compiles once; another count or function does not pass for it."""
    compiled = []
    count = lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(count)
    problem = Problem(closure(1.0), lambda x, y: (y - x) ** 2)
    for make in (lambda a: solvers.SOBA(a, 0.3), lambda a: solvers.ITD(5, 0.2, a), lambda a: solvers.AID(0.2, a)):
        for i, a in enumerate((0.05, 0.1, 0.2)):
            set_all(1.0)
            solve(problem, jnp.zeros(()), jnp.zeros(()), make(a), steps=3)
            if i == 1:
                compiled.clear()
        assert not compiled
    two = [solve(problem, jnp.zeros(()), jnp.zeros(()), solvers.ITD(n, 0.2, 0.1), steps=3).x for n in (1, 5)]
    assert two[0] != two[1]


def test_a_function_without_captures_is_itself():
    assert taken(jnp.sum) is jnp.sum
    assert taken(None) is None


@pytest.mark.parametrize("pair", [(Net(1.0).loss, Net(50.0).loss), (Net(1.0), Net(50.0)), (Frozen(1.0), Frozen(50.0))])
def test_another_object_is_another_run(tmp_path, pair):
    run = lambda fn: solve(
        Problem(fn, lambda x, y: (y - x) ** 2), jnp.zeros(()), jnp.zeros(()), solvers.OneStep(), steps=2,
        checkpoint=tmp_path,
    )  # fmt: skip
    run(pair[0])
    with pytest.raises(CheckpointError, match=r"lam=1\.0.*is now.*lam=50\.0"):
        run(pair[1])


def test_the_text_of_a_function_has_no_address_and_names_what_differs():
    set_all(2.0)
    assert " at 0x" not in described(by_helper)
    assert described(by_helper) == "by_helper[LAM=2.0]"
    assert described(closure(1.0)) != described(closure(2.0))


def test_a_samplers_function_is_not_stale():
    scale = {"by": 1.0}
    source = data.Sampler(lambda key, arrays: arrays * scale["by"], jnp.ones(3))
    draw = jax.jit(lambda source: source.example())
    assert draw(source.captured())[0] == 1
    scale["by"] = 2.0
    assert draw(source.captured())[0] == 2


@pytest.mark.parametrize(
    "estimator",
    [
        hypergradients.Unrolled(), hypergradients.OneStep(), hypergradients.Unrolled(last=5),
        hypergradients.Implicit(), hypergradients.SAMA(None), hypergradients.StochasticImplicit(),
    ],
    ids=lambda e: f"{type(e).__name__} {getattr(e, 'last', '')}",
)  # fmt: skip
def test_an_estimate_is_differentiated_in_the_data_and_in_what_a_loss_captures(x64, estimator):
    @jax.jit
    def of(scale, captured):
        problem = Problem(
            lambda x, y, b: jnp.sum((y - b) ** 2 * captured) + jnp.sum(x**2),
            lambda x, y, b: jnp.sum((y - x * b) ** 2 * captured) / 2 + jnp.sum(y**4) / 9,
            scale * jnp.arange(1.0, 3.0),
            scale * jnp.arange(2.0, 4.0),
        )
        solver = GradientDescent(0.1, 12)
        estimate = hypergradients.value_and_hypergradient(problem, estimator, solver)
        return jnp.sum(jnp.sin(estimate(jnp.array([0.3, 0.7]), jnp.array([0.1, 0.2])).gradient))

    at, h = (jnp.asarray(0.8), jnp.asarray(1.3)), 1e-5
    for i, reverse in enumerate(jax.jit(jax.grad(of, (0, 1)))(*at)):
        ends = [of(*(a + sign * h * (i == j) for j, a in enumerate(at))) for sign in (1, -1)]
        np.testing.assert_allclose(reverse, (ends[0] - ends[1]) / (2 * h), rtol=1e-6)


def test_what_a_module_holds_beside_a_loss_is_not_walked_through():
    """A function that was taken apart was looked into for generators, its compiled form and with it all globals."""
    of = lambda fn: host_generators(taken(fn, (1.0, 1.0)))[2:]
    assert isinstance(taken(lambda x, y: LAM * x * y, (1.0, 1.0)), Captured)
    assert of(lambda x, y: LAM * x * y) == []
    assert of(lambda x, y: LAM * x * y * DRAWN.normal()) == [DRAWN]
    noisy = taken(lambda x, y: LAM * x * y * DRAWN.normal(), (1.0, 1.0))
    assert of(lambda x, y: LAM * noisy(x, y)) == [DRAWN]


def test_what_was_taken_apart_before_is_one_form_over_its_numbers():
    def outer(lam):
        inner = taken(lambda x, y: (y - 1) ** 2 + lam * x**2, (1.0, 1.0))
        return lambda x, y: 2 * inner(x, y) + (y - x) ** 2

    one, other = (taken(outer(lam), (1.0, 1.0)) for lam in (1.0, 3.0))
    assert one._form == other._form and one != other
    traces = []
    compiled = jax.jit(lambda fn, x, y: (traces.append(1), fn(x, y))[1])
    for fn, lam in ((one, 1.0), (other, 3.0)):
        np.testing.assert_allclose(compiled(fn, 2.0, 0.5), 2 * (0.25 + 4 * lam) + 2.25, rtol=1e-6)
    assert len(traces) == 1
    assert described(outer(1.0)) != described(outer(3.0))


OF_ARRAYS = {
    "Box": lambda a: sets.Box(-a, a),
    "Box of a tree": lambda a: sets.Box(-9.0, {"a": a}).bounds({"a": a})[1]["a"],
    "Simplex": lambda a: sets.Simplex(a[0, ...]),
    "SparseSimplex": lambda a: sets.SparseSimplex(1, a[0, ...]),
    "Ball": lambda a: sets.Ball(a[0, ...], centre=a),
    "Sphere": lambda a: sets.Sphere(a[0, ...], centre=a),
    "Hyperplane": lambda a: sets.Hyperplane(a, a[0, ...]),
    "Halfspace": lambda a: sets.Halfspace(a, a[0, ...]),
    "Affine": lambda a: sets.Affine(a[None], a[:1]),
    "Polyhedron": lambda a: sets.Polyhedron(G=np.eye(2), h=a),
    "Polyhedron's rows": lambda a: sets.Polyhedron(a[None], a[:1], a[None], 9 * a[:1]),
    "BoxSection": lambda a: sets.BoxSection(-a, 2 * a, a, a[0, ...]),
    "Transport": lambda a: sets.Transport(a, a),
    "Product": lambda a: sets.Product((sets.Box(-a, a),)),
    "Intersection": lambda a: sets.Intersection([sets.Box(-a, a), sets.Halfspace(a, a[0, ...])]),
}


@pytest.mark.parametrize("name", OF_ARRAYS)
def test_a_set_is_what_its_arrays_were_when_it_was_made(name):
    """Its key is remembered: compiled code kept the old bounds where the set itself, and `run`, had the new ones."""
    array = np.ones(2)
    made, kept = OF_ARRAYS[name](array), OF_ARRAYS[name](np.ones(2))
    array[:] = 2.0
    assert all(map(np.array_equal, jax.tree.leaves(made), jax.tree.leaves(kept)))
    if isinstance(made, sets.Set):
        assert made == kept and hash(made) == hash(kept) and made != OF_ARRAYS[name](array)
        assert not any(leaf.flags.writeable for leaf in jax.tree.leaves(made) if isinstance(leaf, np.ndarray))
    with pytest.raises(ValueError, match="read-only"):
        sets.Box(0.0, array).upper[:] = 3.0


def test_a_copy_of_a_set_that_is_written_to_is_another_set():
    made = sets.Box(-1.0, np.ones(2))
    hash(made)
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), jax.tree.map(np.array, made)):
        assert copied == made
        copied.upper[:] = 2.0
        assert copied != made and copied == sets.Box(-1.0, np.full(2, 2.0))


def test_a_product_keeps_its_parts():
    parts = {"a": sets.Box(-1.0, 1.0)}
    made = sets.Product(parts)
    parts["a"] = sets.Box(-1.0, 2.0)
    assert made == sets.Product({"a": sets.Box(-1.0, 1.0)}) and float(made({"a": jnp.asarray(9.0)})["a"]) == 1.0


class OwnSet(sets.Set):
    """A set of one's own, whose bound may be changed."""

    def __init__(self, high):
        self.high = high

    def __call__(self, z):
        return jnp.clip(z, -1.0, self.high)

    def bounds(self, z):
        return jnp.full_like(z, -1.0), jnp.full_like(z, self.high)


class Described:
    """A function of one's own with bounds, that is no `Set`."""

    def __init__(self, high):
        self.high = np.full((), high)

    def __call__(self, z):
        return jnp.clip(z, -1.0, self.high)

    bounds = OwnSet.bounds
    inequality, equality = sets.Set.inequality, sets.Set.equality


HIGH = {"high": np.ones(())}
CHANGED = {
    "a set of one's own": (OwnSet(1.0), lambda one, high: setattr(one, "high", high)),
    "an object with bounds": (Described(1.0), lambda one, high: one.high.fill(high)),
    "a function in a product": (
        sets.Product((lambda z: jnp.clip(z, -1.0, HIGH["high"]),)),
        lambda _, high: HIGH["high"].fill(high),
    ),
    "a function in an intersection": (
        sets.Intersection([lambda z: jnp.clip(z, -1.0, HIGH["high"]), sets.Box(-5.0, 5.0)]),
        lambda _, high: HIGH["high"].fill(high),
    ),
    "a set of one's own in a product": (
        sets.Product((sets.Product((OwnSet(1.0),)),)),
        lambda one, high: setattr(one.sets[0].sets[0], "high", high),
    ),
}


@pytest.mark.parametrize("level", ["project_upper", "project_lower"])
@pytest.mark.parametrize("name", CHANGED)
def test_what_a_set_of_ones_own_holds_has_its_value_of_now(name, level):
    one, change = CHANGED[name]
    flat = lambda z: jax.tree.leaves(z)[0]
    start = jnp.zeros(2)
    for _ in range(name.count("product")):
        start = (start,)
    if "own in a product" in name:
        start = (start,)
    problem = Problem(
        lambda x, y: jnp.sum((flat(y) - 3) ** 2) + jnp.sum((flat(x) - 3) ** 2),
        lambda x, y: jnp.sum((flat(y) - flat(x)) ** 2),
        **{level: one},
    )
    traces = []
    call = jax.jit(lambda problem, z: traces.append(0) or getattr(problem, level)(z))
    for high in (1.0, 2.0, 2.0, 1.0):
        change(one, high)
        found = solve(problem, start, start, solvers.AID(GradientDescent(0.5, 3), upper_optimizer=0.5), steps=30)
        np.testing.assert_allclose(flat(found.x if level == "project_upper" else found.y), high, rtol=1e-5)
        now = problem.captured(start, start)
        big = jax.tree.map(lambda a: a + 9, start)
        np.testing.assert_allclose(flat(call(now, big)), high, rtol=1e-6)
        assert hasattr(getattr(now, level), "bounds") and repr(getattr(now, level)) == repr(one)
    assert len(traces) == 2


@pytest.mark.parametrize("make", [
    lambda a: prox.lasso(a), lambda a: prox.least_squares(a[None], a[:1], 1.0),
    lambda a: prox.chain(prox.ridge(a), prox.none()), lambda a: prox.projection(lambda z: jnp.clip(z, -1.0, a)),
], ids=["lasso", "least_squares", "chain", "projection"])  # fmt: skip
def test_what_a_proximal_operator_holds_has_its_value_of_now(make):
    call = jax.jit(lambda fn, y: fn(jnp.zeros(()), y, 1.0))
    array, y = np.ones(2, np.float32), jnp.full(2, 5.0)
    operator = make(array)
    for value in (1.0, 2.0):
        array[:] = value
        now = taken(operator, (jnp.zeros(()), y, 1.0))
        np.testing.assert_allclose(call(now, y), make(np.full(2, value, np.float32))(None, y, 1.0), rtol=1e-6)


class AttrDict(dict):
    """The usual one: what raises is a KeyError."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


class OwnDict(dict):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class OwnList(list):
    factor = 1.0


class Raising:
    """Whose unknown attributes raise what they like."""

    def __init__(self, lam):
        self.lam = lam

    def __getattr__(self, name):
        raise RuntimeError(name)


class HoldsRaising:
    """A class that holds one, beside code."""

    config = AttrDict(lam=1.0)

    def loss(self, x, y):
        return (y - 1) ** 2 + self.config.lam * x**2


class Lazy:
    @functools.cached_property
    def lam(self):
        return SETTINGS["lam"]


class Adding(functools.partial):
    """A partial function of a class of one's own."""


class Plain:
    pass


LOCAL, REFERRED = threading.local(), Plain()
CTYPE, POINTS = ctypes.c_double(1.0), (ctypes.c_double * 2)(1.0, 1.0)
OF_C, BYTES = array.array("d", [1.0]), bytearray(8)
VIEW = memoryview(np.ones(1))
OWN = {"dict": AttrDict(lam=1.0), "itself": OwnDict(lam=1.0), "list": OwnList([1.0]), "array": AttrDict(lam=np.ones(2))}
PLAIN, ORDER, QUEUED = {"lam": 1.0}, OrderedDict(lam=1.0), queue.Queue()
QUEUED.put(1.0)
LISTED, OF_NUMPY = [1.0], np.ones(2)
USER_LIST, USER_DICT = collections.UserList([1.0]), collections.UserDict(lam=1.0)
MEMBERS = {REFERRED}
GET, ITEM, AT, OPERATOR = PLAIN.get, LISTED.__getitem__, OF_NUMPY.item, LISTED.__len__
VALUES, ITEMS, ORDERED_VALUES, USER_VALUES = PLAIN.values(), PLAIN.items(), ORDER.values(), USER_DICT.values()
REFERENCE, PROXY, RAISING = weakref.ref(REFERRED), weakref.proxy(REFERRED), Raising(1.0)
PARTIAL, ADDING = jax.tree_util.Partial(lambda d, x: d["lam"] * x**2, PLAIN), Adding(lambda d: d["lam"], PLAIN)


def change_all(lam):
    """All of these in place."""
    SETTINGS["lam"] = LOCAL.lam = REFERRED.lam = CTYPE.value = POINTS[1] = OF_C[0] = VIEW[0] = RAISING.lam = lam
    BYTES[:] = np.float64(lam).tobytes()
    OWN["dict"].lam = OWN["itself"].lam = OWN["list"][0] = HoldsRaising.config["lam"] = lam
    PLAIN["lam"] = ORDER["lam"] = LISTED[0] = OF_NUMPY[1] = OWN["array"]["lam"][1] = lam
    QUEUED.queue[0] = USER_LIST[0] = USER_DICT["lam"] = lam


READ = {
    "array.array": (lambda: OF_C[0], False), "bytearray": (lambda: float(np.frombuffer(BYTES)[0]), False),
    "memoryview": (lambda: VIEW[0], False), "threading.local": (lambda: LOCAL.lam, False),
    "weakref.ref": (lambda: REFERENCE().lam, False), "weakref.proxy": (lambda: PROXY.lam, False),
    "a number of C": (lambda: CTYPE.value, False), "an array of C": (lambda: POINTS[1], False),
    "dict.get": (lambda: GET("lam"), True), "list.__getitem__": (lambda: ITEM(0), True),
    "ndarray.item": (lambda: AT(1), False), "dict.values": (lambda: next(iter(VALUES)), True),
    "dict.items": (lambda: dict(ITEMS)["lam"], True), "OrderedDict.values": (lambda: next(iter(ORDERED_VALUES)), True),
    "UserDict.values": (lambda: next(iter(USER_VALUES)), False), "UserList": (lambda: USER_LIST[0], False),
    "queue": (lambda: QUEUED.queue[0], False), "Partial": (lambda: PARTIAL(1.0), True),
    "a partial of one's own": (lambda: ADDING(), False), "a cell": (lambda: CELL.cell_contents["lam"], False),
    "a member of a set": (lambda: next(iter(MEMBERS)).lam, False), "cached_property": (lambda: LAZY.lam, False),
    "an attribute dictionary": (lambda: OWN["dict"].lam, True), "its own dict": (lambda: OWN["itself"].lam, True),
    "an array in one": (lambda: OWN["array"].lam[1], True), "a list of one's own": (lambda: OWN["list"][0], True),
    "an object that raises": (lambda: RAISING.lam, False),
}  # fmt: skip
LAZY = Lazy()
CELL = (lambda: PLAIN and (lambda held: lambda: held)(PLAIN))().__closure__[0]


@pytest.mark.parametrize("name", READ)
def test_what_pythons_own_types_hold_has_its_value_of_now(name):
    read, travels = READ[name]
    traces = []
    call = jax.jit(lambda fn, x, y: traces.append(0) or fn(x, y))
    two = jnp.asarray(2.0)
    for lam in (1.0, 3.0, 3.0, 0.5):
        vars(LAZY).clear()
        change_all(lam)
        fn = taken(lambda x, y: (y - 1) ** 2 + read() * x**2, (two, two))
        assert call(fn, two, two) == 1 + 4 * lam
    assert len(traces) == (1 if travels else 3)


def test_an_attribute_dictionary_stops_no_solve():
    """Its __getattr__ raises a KeyError, and where it was looked at nothing else was caught than an AttributeError."""
    one, settings = HoldsRaising(), AttrDict(lam=1.0)
    for lam in (1.0, 3.0):
        settings.lam = HoldsRaising.config["lam"] = lam
        for upper in (one.loss, lambda x, y: (y - 1) ** 2 + settings.lam * x**2):
            found = solve(Problem(upper, lambda x, y: (y - x) ** 2), jnp.zeros(()), jnp.zeros(()), tol=1e-5)
            np.testing.assert_allclose(found.x, 1 / (1 + lam), atol=1e-4)


def test_a_generators_method_draws_on_the_host():
    """Captured without its generator, it drew a constant of compiled code."""
    draw = DRAWN.normal
    assert host_generators(lambda x, y: x * draw())[2:] == [DRAWN]
    with pytest.raises(ValueError, match="upper draws random numbers of numpy's or Python's"):
        solve(Problem(lambda x, y: x * y * draw(), lambda x, y: (y - x) ** 2), 0.5, 0.5)


def test_the_text_of_an_array_of_c_is_its_contents():
    texts = {described(lambda x, of=of: of[0] * x) for of in (array.array("d", [v]) for v in (1.0, 1.0, 2.0))}
    assert len(texts) == 2


@pytest.mark.parametrize("installed", [True, False])
def test_a_package_that_was_installed_elsewhere_is_not_walked_through(tmp_path, monkeypatch, installed):
    """`pip install --target` leaves a record; a package of one's own on the path has none, and is seen as it is now."""
    name = f"beside_{installed}".lower()
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("LAM = 1.0\n\n\ndef penalty(x):\n    return LAM * x**2\n")
    (tmp_path / f"{name}-1.0.dist-info").mkdir()
    listed = f"{name}/__init__.py,sha256=0,1\n" if installed else "other/__init__.py,sha256=0,1\n"
    (tmp_path / f"{name}-1.0.dist-info" / "RECORD").write_text(listed)
    monkeypatch.syspath_prepend(tmp_path)
    package = importlib.import_module(name)
    fn = taken(lambda x, y: (y - 1) ** 2 + package.penalty(x), (1.0, 1.0))
    held = [leaf.value for leaf in fn._form.leaves] if isinstance(fn, Captured) else []
    assert set(held) == (set() if installed else {1.0})


def test_relative_imports_inside_of_a_loss_are_seen(tmp_path, monkeypatch):
    """A module that a loss imports with dots is read as it is at each call, like one by its whole name."""
    package = tmp_path / "relative_package"
    (package / "deep").mkdir(parents=True)
    for folder in (package, package / "deep"):
        (folder / "__init__.py").write_text("")
    (package / "rates.py").write_text("RATE = 1.0\n")
    (package / "deep" / "losses.py").write_text(
        "def taken(x, y):\n    from ..rates import RATE\n    return (y - RATE * x) ** 2\n\n\n"
        "def module(x, y):\n    from .. import rates\n    return (y - rates.RATE * x) ** 2\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from relative_package import rates
    from relative_package.deep import losses

    solver = solvers.AID(GradientDescent(0.5, 20), 0.1)
    for loss in (losses.taken, losses.module):
        for rate in (1.0, 3.0):
            monkeypatch.setattr(rates, "RATE", rate)
            y = solve(Problem(lambda x, y: (y - 1.0) ** 2, loss), jnp.asarray(0.5), jnp.asarray(0.0), solver, steps=1).y
            assert float(y) == pytest.approx(0.5 * rate, rel=1e-4)
