"""What a function captures: closures, defaults, the globals it names, its object's attributes, and what those hold.

A compiled programme knows a function by its identity, and a number that the function reads from elsewhere is baked into
it: changed later, it would have no effect. `taken(fn)` takes the function apart once. Its numbers and arrays become
leaves of a pytree, hence arguments of compiled code; everything else becomes the *form*, which is compared by value:
the same code over other numbers is one programme, and another form is another one. `described(value)` is the same walk
as a text, for checkpoints.
"""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import copy
import dataclasses
import dis
import enum
import functools
import hashlib
import importlib.util
import inspect
import os
import pickle
import random
import sys
import sysconfig
import threading
import types
import weakref
import zlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, MappingView
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel._arguments import has, look
from bilevel._traces import Outlines

__all__ = [
    "Apart", "Captured", "Divided", "Functions", "described", "described_apart", "form",
    "generator_state", "host_generators", "taken",
]  # fmt: skip

_ATOMS = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), range, slice, np.dtype)
# A function that asks what a value is would answer otherwise for a traced number, and nothing would fail.
_ASKS = frozenset({"isinstance", "type", "hash", "id", "issubclass", "callable", "hasattr", "getattr"})
_LIBRARY: list[str] = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_EVERYTHING = frozenset({"globals", "eval", "exec", "__import__", "open"})
_FRAMES = frozenset({"_getframe", "currentframe"})
# By these a name may be read that no code has a word for.
_LOOKING = _EVERYTHING | {"getattr", "hasattr", "vars", "dir", "__dict__", "attrgetter", "getmembers"}
_PLACES = tuple(str(Path(p).resolve()) + os.sep for p in (*_LIBRARY, str(Path(__file__).parent)))
_JITTED = type(jax.jit(lambda: None))
_VIEWS = {type(getattr(of(), kind)()): kind for of in (dict, OrderedDict) for kind in ("keys", "values", "items")}
_BOUND = (types.BuiltinMethodType, types.MethodWrapperType)
_CODE = (types.FunctionType, types.MethodType, functools.partial, _JITTED)
_HOUSEKEEPING = frozenset(
    {"__init__", "__post_init__", "__repr__", "__str__", "__eq__", "__hash__", "__setattr__", "__delattr__"}
)
_WORKED = Outlines()
_DEEP, _MANY = 100, 50_000  # objects within objects, and objects: beyond these they are compared by identity
_CODES = 100_000  # code objects whose names are remembered: one large package has more than five thousand
_SINGLY = 12  # values that are tried one by one, where not all of them can be arguments


def taken(fn: Any, args: tuple[Any, ...] | None = None) -> Any:
    """The function with its captured values as leaves of a pytree; itself where nothing can change in it.

    Args:
      fn: a function, method, partial or callable object. A solver looks at a set's bounds and rows besides, so that
        none of its numbers is an argument: all that it holds is part of the form.
      args: what it will be called with (arrays or their shapes). Numbers are arguments only where the function can be
        traced so; with None, or where it branches on them or asks for their type, they are part of the form: another
        value compiles anew.
    """
    if isinstance(fn, (Apart, Held)) or fn is None:
        return fn
    if not _apart(fn):
        return fn if _immutable(fn) else _held(fn)
    walk, build = _walked(fn)
    if not walk.leaves and not walk.rebuilt:
        return fn
    places = [i for i, leaf in enumerate(walk.leaves) if leaf.may_travel]
    travelling: frozenset[int] = frozenset()
    if args is not None and places and not walk.asks:
        if walk.captured(fn, build, frozenset(places)).works(args):
            travelling = frozenset(places)
        elif len(places) <= _SINGLY:
            for place in places:
                if walk.captured(fn, build, travelling | {place}).works(args):
                    travelling |= {place}
    return walk.captured(fn, build, travelling)


class Divided:
    """A value that holds functions, as an optax rule does, for a trial of which of its numbers can be leaves.

    Attributes:
      places: those that may.
    """

    def __init__(self, value: Any) -> None:
        self._walk, self._build = _walked(value)
        self._value = value
        may = () if self._walk.asks else (i for i, leaf in enumerate(self._walk.leaves) if leaf.may_travel)
        self.places = tuple(may)

    def only(self, places: tuple[int, ...]) -> Captured:
        """The value with the numbers in these places as leaves, and all others in its form."""
        return self._walk.captured(self._value, self._build, frozenset(places))


def form(value: Any) -> Hashable:
    """What all functions within a value hold, to be compared by value; the value itself is used as it is."""
    return _walked(value, held=True)[0].form(value, None, frozenset())


def host_generators(fn: Any) -> list[Any]:
    """Generators of random numbers on the host that a function may draw from: numpy's and Python's own, and those that
    it captures. What it draws while it is traced is a constant of compiled code."""
    walk, _ = _walked(fn)
    return [np.random.mtrand._rand, random._inst, *walk.generators]  # type: ignore[attr-defined]


def generator_state(generator: Any) -> Any:
    """Where it stands, to be compared."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    bits = generator._bit_generator if isinstance(generator, np.random.RandomState) else generator.bit_generator
    return pickle.dumps(bits.state)


def described(value: Any) -> str:
    """A text that is equal in two processes where the value means the same: never an address, never a hash.

    Functions go in by name and by what they hold, not by their code, so that a run goes on after a comment was mended.
    """
    text = _texts(value)
    if not text or isinstance(value, (tuple, list, dict)):
        return f"{_name(type(value))}({', '.join(text)})"
    return text[0] + (f"[{', '.join(text[1:])}]" if text[1:] else "")


def described_apart(value: Any) -> tuple[str, dict[str, str]]:
    """`described`, with what a function (or another value that is no container) holds by its path."""
    name, *held = _texts(value) or [_name(type(value))]
    return name, dict(text.split("=", 1) for text in held)


def _texts(value: Any) -> list[str]:
    walk = _Walk(words=True)
    value = value._form.original if isinstance(value, Captured) else value
    value = value.original if isinstance(value, Held) else value
    walk.node(value, "")
    return walk.text


def _walked(value: Any, held: bool = False) -> tuple[_Walk, Callable[[_Build], Any]]:
    """The walk that looks, in the user's modules, at the names alone that some code on its way has words for.

    A module holds much that no loss reads. So the walk is done again until it finds no code with other names than it
    began with.
    """
    names: frozenset[str] | None = frozenset()
    while True:
        walk = _Walk(names=names)
        build: Callable[[_Build], Any] = lambda _: value  # noqa: E731
        if held:
            walk.hold({"": value}, "")
        else:
            build = walk.node(value, "")
        if not walk.met_module or names is None or walk.spoken <= names:
            return walk, build
        names = None if _LOOKING & walk.spoken else names | walk.spoken


class _Form:
    """What of a function is compared by value when compiled code is looked up: `key`; how it is built is not."""

    def __init__(
        self,
        key: tuple[Any, ...],
        original: Any,
        build: Callable[[_Build], Any] | None,
        leaves: list[_Leaf],
        generators: list[Any],
    ) -> None:
        self.key, self.original, self.build, self.leaves, self.generators = key, original, build, leaves, generators
        self.hash = hash(key)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Form) and self.hash == other.hash and self.key == other.key)

    def __hash__(self) -> int:
        return self.hash


class Apart:
    """A function that is a pytree: a `Problem` has its leaves among its own."""


class Captured(Apart):
    """A function whose captured numbers and arrays are leaves of a pytree: see `taken`. Called as the function is."""

    def __init__(self, form: _Form, travelling: tuple[int, ...], values: tuple[Any, ...]) -> None:
        self._form, self._travelling, self._values = form, travelling, values
        self._built: Any = None
        for name in ("__name__", "__qualname__", "__doc__", "__module__"):
            if has(form.original, name):
                setattr(self, name, look(form.original, name))
        self.__wrapped__ = form.original  # whose signature this is

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's value."""
        return self.built(*args, **kwargs)

    @property
    def built(self) -> Any:
        """The function, put together again from its leaves."""
        if self._built is None:
            values = [leaf.value for leaf in self._form.leaves]
            for place, value in zip(self._travelling, self._values, strict=True):
                values[place] = value
            assert self._form.build is not None  # only forms of values that are used as they are have none
            self._built = self._form.build(_Build(values))
        return self._built

    @property
    def places(self) -> tuple[int, ...]:
        """Which of its numbers and arrays are leaves."""
        return self._travelling

    @property
    def kind(self) -> Hashable:
        """What it is but for the values of its leaves, to be compared."""
        return self._form, self._travelling

    @property
    def whole(self) -> bool:
        """Whether all numbers and arrays that it holds are leaves, so that its trace holds none."""
        return len(self._travelling) == len(self._form.leaves)

    def works(self, args: tuple[Any, ...]) -> bool:
        """Whether the function can be traced with its values as arguments."""
        if _WORKED.have((self, args)):
            return True
        try:
            jax.eval_shape(lambda mine, args: mine(*args), self, args)
        except Exception:  # whatever a function raises that is given a tracer where it counted on a number
            return False
        _WORKED.add((self, args))
        return True

    def __eq__(self, other: object) -> bool:
        """Whether they are the same function of the same values, as far as that can be seen without computing."""
        same = lambda a, b: a is b or (type(a) is type(b) is float and a.hex() == b.hex())  # noqa: E731
        return self is other or (
            isinstance(other, Captured)
            and (self._form, self._travelling) == (other._form, other._travelling)
            and all(map(same, self._values, other._values))
        )

    def __hash__(self) -> int:
        return hash((self._form, self._travelling))

    def __repr__(self) -> str:
        return repr(self._form.original)


jax.tree_util.register_pytree_node(
    Captured,
    lambda c: (c._values, (c._form, c._travelling)),
    lambda aux, values: Captured(*aux, tuple(values)),
)


class Held:
    """A function of which more is looked at than its values: compared by all that it held when it was seen.

    What is called is a copy with the arrays of then, where it can be copied: JAX remembers the cast of an array of 64
    bits by the array's identity, and would not see that it was written to.
    """

    def __init__(self, original: Any, copied: Any, held: Hashable) -> None:
        self.original, self.copied, self.held = original, copied, held
        self.__wrapped__ = original  # whose signature this is

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's value."""
        return self.copied(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "copied" not in vars(self):  # a copy that is not yet filled
            raise AttributeError(name)
        return getattr(self.copied, name)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Held) and self.held == other.held)

    def __hash__(self) -> int:
        return hash(self.held)

    def __repr__(self) -> str:
        return repr(self.original)


def _held(fn: Any) -> Held:
    walk, build = _walked(fn)
    return Held(fn, build(_Build([leaf.value for leaf in walk.leaves])), walk.form(fn, None, frozenset()))


class Functions:
    """Functions by name, as a pytree: what was taken apart has leaves, others are static."""

    def __init__(self, by_name: dict[str, Any]) -> None:
        self.by_name = by_name

    def split(self) -> tuple[dict[str, Apart], tuple[tuple[str, Any], ...]]:
        """Those with leaves, and the others."""
        apart = {name: fn for name, fn in self.by_name.items() if isinstance(fn, Apart)}
        return apart, tuple((name, fn) for name, fn in self.by_name.items() if name not in apart)


def _flatten_functions(functions: Functions) -> Any:
    apart, others = functions.split()
    return tuple(apart.values()), (tuple(functions.by_name), tuple(apart), others)


def _unflatten_functions(aux: Any, children: Any) -> Functions:
    order, apart, others = aux
    found = dict(zip(apart, children, strict=True)) | dict(others)
    return Functions({name: found[name] for name in order})


jax.tree_util.register_pytree_node(Functions, _flatten_functions, _unflatten_functions)


@dataclasses.dataclass
class _Leaf:
    """A number or array that was found, as it was then."""

    value: Any
    kind: tuple[Any, ...]  # what of it is in the form where it is an argument
    may_travel: bool

    @functools.cached_property
    def content(self) -> tuple[Any, ...]:
        """What of it is in the form where it is no argument."""
        if type(self.value) is float:
            return ("float", self.value.hex())
        if isinstance(self.value, jax.Array):
            return ("this array", _Same(self.value))
        array = np.asarray(self.value)
        return (*self.kind, repr(array.tolist()) if array.dtype.hasobject else _digest(array))


@dataclasses.dataclass
class _Build:
    """A function that is being put together again from these values."""

    values: list[Any]
    made: dict[Any, Any] = dataclasses.field(default_factory=dict)


class _Same:
    """An object that is compared by identity, and kept, so that no other one takes its address."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class _Walk:
    """One walk over all that a value holds, in an order that depends on the value's form alone.

    Attributes:
      leaves: the numbers and arrays, in that order.
      rebuilt: whether anything was found that is put together again.
      asks: whether a function asks what a value is: all of them stay what they are.
      generators: of random numbers on the host, that were found.
      met_module: whether one of the user's modules was found.
      spoken: the names and texts in the code that was found.
      text: what was found, in words that another process would use too.
    """

    def __init__(self, words: bool = False, names: frozenset[str] | None = None) -> None:
        self._names, self.met_module, self.spoken = names, False, set[str]()
        self.leaves: list[_Leaf] = []
        self.rebuilt = False
        self.text: list[str] = []
        self._words, self._key = words, list[Any]()
        self._numbers: dict[tuple[int, bool], int] = {}  # of an object: in which order it was met
        self._builds: dict[int, Callable[[_Build], Any]] = {}
        self._kept: list[Any] = []  # so that no id is used twice
        self._worlds: dict[int, int] = {}  # of a module's globals: likewise
        self._fixed = 0  # within something that is used as it is
        self.asks = False  # whether a function asks what a value is
        self.generators: list[Any] = []  # of random numbers on the host
        self._unsaid = 0  # within a function that is reached by its name only, as code is

    def captured(self, original: Any, build: Callable[[_Build], Any], travelling: frozenset[int]) -> Captured:
        """The function, with the leaves in these places as arguments and the others in its form."""
        order = tuple(sorted(travelling))
        return Captured(self.form(original, build, travelling), order, tuple(self.leaves[i].value for i in order))

    def form(self, original: Any, build: Callable[[_Build], Any] | None, travelling: frozenset[int]) -> _Form:
        """The form, but for the leaves in these places."""
        leaves = (leaf.kind if i in travelling else leaf.content for i, leaf in enumerate(self.leaves))
        return _Form((*self._key, *leaves), original, build, self.leaves, self.generators)

    def hold(self, held: Mapping[str, Any], path: str) -> None:
        """What something holds that is used as it is: all of it is part of the form."""
        self._fixed += 1
        for name, inside in held.items():
            self._key.append(name)
            self.node(inside, f"{path}.{name}" if name else path)
        self._fixed -= 1

    def node(self, value: Any, path: str) -> Callable[[_Build], Any]:
        """Note what the value is and holds; returns how it is put together again."""
        if type(value) is float or isinstance(value, (np.ndarray, np.generic, jax.Array)):
            return self._leaf(value, path)
        if isinstance(value, enum.Enum) or type(value) in _ATOMS:
            self._key.append((type(value), _hashable(value), repr(value)))
            self._say(path, str(value) if isinstance(value, enum.Enum) else repr(value))
            return lambda _: value
        met = id(value), bool(self._fixed)
        if met in self._numbers:
            number = self._numbers[met]
            self._key.append(("again", number))
            return lambda b: self._builds[number](b)
        number = self._numbers[met] = len(self._numbers)
        self._kept.append(value)
        make = self._composite(value, path) if number < _MANY and path.count(".") < _DEEP else self._same(value, path)

        def build(b: _Build) -> Any:
            if number not in b.made:
                b.made[number] = make(b, number)
            return b.made[number]

        self._builds[number] = build
        return build

    # ------------------------------------------------------------ kinds of values

    def _say(self, path: str, word: str) -> None:
        if self._words:
            self.text.append(f"{path.lstrip('.')}={word}" if path else word)

    def _same(self, value: Any, path: str) -> Callable[[_Build, int], Any]:
        self._key.append(_Same(value))
        if not self._unsaid:
            self._say(path, _name(value))
        return lambda _b, _n: value

    def _leaf(self, value: Any, path: str) -> Callable[[_Build], Any]:
        if isinstance(value, jax.Array):
            kind: tuple[Any, ...] = ("array", jax.typeof(value))
            may = not isinstance(value, jax.core.Tracer)
        elif type(value) is float:
            kind, may = ("float",), True
        else:
            snapshot = np.array(value, subok=True)  # it may be changed in place
            kind = ("numpy", type(value), snapshot.dtype.str, snapshot.shape)
            may = (
                type(snapshot) is np.ndarray
                and snapshot.dtype.kind in ("fiub" if snapshot.ndim else "f")
                and snapshot.dtype.itemsize <= 8
            )
            value = snapshot if isinstance(value, np.ndarray) else value
        if self._words:
            self._say(path, repr(value) if type(value) is float else array_text(value))
        place = len(self.leaves)
        self.leaves.append(_Leaf(value, kind, may and not self._fixed))
        return lambda b: b.values[place]

    def _again(self, value: Captured, path: str) -> Callable[[_Build, int], Any]:
        """A function that has been taken apart before: its form and its values, and not what these are made of."""
        if self._words:
            original = self.node(value._form.original, path)
            return lambda b, _: original(b)
        self.rebuilt = True
        self.generators += value._form.generators
        self._key.append((Captured, value._form, value._travelling))
        values = self.node(value._values, path)
        return lambda b, _: Captured(value._form, value._travelling, values(b))

    def _composite(self, value: Any, path: str) -> Callable[[_Build, int], Any]:
        if isinstance(value, Captured):
            return self._again(value, path)
        if isinstance(value, Held):
            self._key.append(value)
            return lambda _b, _n: value
        if isinstance(value, types.FunctionType):
            return self._function(value, path)
        if isinstance(value, types.MethodType):
            self._key.append("method")
            fn, owner = self.node(value.__func__, path), self.node(value.__self__, f"{path}.__self__")
            return lambda b, _: types.MethodType(fn(b), owner(b))
        if type(value) in (functools.partial, jax.tree_util.Partial):
            self._key.append((type(value), len(value.args), tuple(value.keywords)))
            fn = self.node(value.func, f"{path}.func")
            args, keywords = self.node(value.args, path), self.node(value.keywords, path)
            return lambda b, _: type(value)(fn(b), *args(b), **keywords(b))
        if isinstance(value, _JITTED):  # its cache would give what was captured when it was first called
            if _library(value.__wrapped__):  # type: ignore[attr-defined]
                return self._same(value, path)
            self.rebuilt = True
            fn = self.node(value.__wrapped__, path)  # type: ignore[attr-defined]
            return lambda b, _: fn(b)
        if type(value) in (tuple, list, deque) or (isinstance(value, tuple) and hasattr(value, "_fields")):
            self._key.append((type(value), len(value)))
            items = [self.node(item, f"{path}.{i}") for i, item in enumerate(value)]
            if type(value) in (list, deque):
                empty: Any = [] if type(value) is list else deque(maxlen=value.maxlen)
                return lambda b, number: _filled(
                    b, number, copy.copy(empty), lambda new: new.extend(item(b) for item in items)
                )
            if type(value) is tuple:
                return lambda b, _: tuple(item(b) for item in items)
            return lambda b, _: type(value)(*(item(b) for item in items))
        if type(value) in (dict, OrderedDict, defaultdict):
            self._key.append((type(value), tuple(map(_hashable, value))))
            if type(value) is defaultdict:
                self.hold({"default_factory": value.default_factory}, path)
            inside = {k: self.node(v, f"{path}.{_word(k)}") for k, v in value.items()}
            return lambda b, number: _filled(b, number, copy.copy(value), _setting(b, inside))
        if type(value) in _VIEWS:
            self._key.append(type(value))
            viewed = self.node(dict(value.mapping), path)
            return lambda b, _: getattr(viewed(b), _VIEWS[type(value)])()
        if isinstance(value, _BOUND) and _of_an_object(value):  # d.get, values.item
            self._key.append(("bound", value.__name__))
            if not self._unsaid:
                self._say(path, value.__name__)
            owner = self.node(value.__self__, f"{path}.__self__")
            return lambda b, _: getattr(owner(b), value.__name__)
        if isinstance(value, (set, frozenset)):
            self._key.append((type(value), frozenset(map(_hashable, value))))
            self._say(path, f"{{{', '.join(sorted(map(_word, value)))}}}")
            objects = (v for v in value if type(v) not in _ATOMS and not isinstance(v, (float, enum.Enum)))
            if not self._words:
                self.hold({str(i): v for i, v in enumerate(objects)}, path)
            return lambda _b, _n: value
        if isinstance(value, types.ModuleType):
            return self._module(value, path)
        if isinstance(value, type) and _namespace(value):
            self._key.append((value, tuple(_contents(value))))
            inside = {k: self.node(v, f"{path}.{k}") for k, v in _contents(value).items()}
            return lambda b, number: _filled(
                b, number, type(value.__name__, (), dict(_contents(value))), lambda new: _set_all(b, inside, new)
            )
        if isinstance(value, type):
            same = self._same(value, path)
            self.hold(_settings(value), path)
            return same
        return self._object(value, path)

    def _function(self, fn: types.FunctionType, path: str) -> Callable[[_Build, int], Any]:
        users, code, cells = _users(fn.__code__.co_filename), fn.__code__, fn.__closure__ or ()
        if not self._unsaid:
            self._say(path, _name(fn))
        if _library(fn):
            self._key.append(_Same(fn))
            return lambda _b, _n: fn
        self.spoken |= _words(code)
        if hasattr(fn, "registry") and hasattr(fn, "dispatch"):  # functools.singledispatch, which has a memory
            self._key.append(_Same(fn))
            self.hold({str(i): implementation for i, implementation in enumerate(fn.registry.values())}, path)
            return lambda _b, _n: fn
        self.rebuilt = True
        reads, asks, writes = _names(code)
        self.asks = self.asks or (users and asks)
        self._key.append(("function", code))
        self._fixed += writes  # it must not write into a copy of its module's globals
        inside = {}
        for name, cell in zip(code.co_freevars, cells, strict=True):
            own = name in _written(code)  # optax's cosine schedule makes 60 a 60.0 when it is first called
            self._fixed += own
            with contextlib.suppress(ValueError):  # not filled yet
                inside[name] = self.node(cell.cell_contents, f"{path}.{name}")
            self._fixed -= own
        self._key.append(tuple(inside))
        first = len(code.co_varnames[: code.co_argcount]) - len(fn.__defaults__ or ())
        named_defaults = dict(zip(code.co_varnames[first:], fn.__defaults__ or (), strict=False))
        defaults = {name: self.node(value, f"{path}.{name}") for name, value in named_defaults.items()}
        keywords = {k: self.node(v, f"{path}.{k}") for k, v in (fn.__kwdefaults__ or {}).items()}
        self._key.append((tuple(defaults), tuple(keywords)))
        attributes = {k: self.node(v, f"{path}.{k}") for k, v in vars(fn).items() if k != "__wrapped__"}
        self._key.append(tuple(attributes))
        world = fn.__globals__
        which = self._worlds.setdefault(id(world), len(self._worlds))
        self._unsaid += 1
        named = {}
        for name in reads:
            if users and name in world:
                self._key.append(name)
                named[name] = self.node(world[name], name)
        if users:
            self._reached_otherwise(code, world)
        self._unsaid -= 1
        self._fixed -= writes
        if writes:
            return lambda _b, _n: fn

        def build(b: _Build, number: int) -> Any:
            where = b.made.setdefault(("globals", which), dict(world)) if users else world  # one for all its functions
            empty = {name: types.CellType() for name in code.co_freevars}
            new = types.FunctionType(code, where, fn.__name__, None, tuple(empty.values()))
            b.made[number] = new
            new.__qualname__, new.__doc__, new.__module__ = fn.__qualname__, fn.__doc__, fn.__module__
            new.__dict__.update(fn.__dict__)
            _setting(b, attributes)(new.__dict__)
            for name, content in inside.items():
                empty[name].cell_contents = content(b)
            new.__defaults__ = tuple(made(b) for made in defaults.values()) or None
            new.__kwdefaults__ = {name: made(b) for name, made in keywords.items()} or None
            for name, content in named.items():
                where[name] = content(b)
            return new

        return build

    def _reached_otherwise(self, code: types.CodeType, world: Mapping[str, Any]) -> None:
        """What a function reads by imports inside of it, or by modules' names in texts (of the user's modules, each as
        it is); the environment; and by looking at all globals, or into files, which is never the same programme."""
        words = _words(code)
        by_name = words & set(sys.modules) if {"import_module", "modules"} & words else set()
        for imported in (*(_absolute(name, world) for name in _imports(code)), *sorted(by_name)):
            module = sys.modules.get(imported)
            if module is not None and _users_module(module):
                self._key.append(("imports", imported))
                self.hold({"": module}, imported)
        if {"environ", "getenv"} & words:
            self._key.append(("environment", tuple(sorted(os.environ.items()))))
        if _FRAMES & words or any(name not in world for name in _EVERYTHING.intersection(_names(code)[0])):
            self._key.append(_Same(object()))

    def _module(self, module: types.ModuleType, path: str) -> Callable[[_Build, int], Any]:
        if not _users_module(module):
            return self._same(module, path)
        self._key.append(("module", module.__name__))
        self.met_module = True
        named = {k: v for k, v in vars(module).items() if self._names is None or k in self._names}
        own = {k: v for k, v in named.items() if look(v, "__module__", "") == module.__name__}
        code = {k: v for k, v in own.items() if isinstance(v, (types.FunctionType, _JITTED))}
        found = code | {k: v for k, v in named.items() if not k.startswith("__") and _setting_like(v)}
        inside = {k: self.node(v, f"{path}.{k}") for k, v in found.items()}
        # Classes are used as they are, and so is what they read.
        self.hold({k: v for k, v in own.items() if isinstance(v, type) and k not in found}, path)

        def build(b: _Build, number: int) -> Any:
            new = types.ModuleType(module.__name__)
            new.__dict__.update(vars(module))
            return _filled(b, number, new, lambda new: _setting(b, inside)(new.__dict__))

        return build

    def _object(self, value: Any, path: str) -> Callable[[_Build, int], Any]:
        """An object that is no more than its attributes is copied with others; another one is used as it is."""
        cls = type(value)
        if not self._unsaid:
            self._say(path, _name(cls))
        if isinstance(value, (np.random.Generator, np.random.RandomState, random.Random)):
            self.generators.append(value)
        of_functions = cls.__module__ == "bilevel.sets" and not self._words and not _immutable(value)
        if of_functions or _copied(value):
            self.rebuilt = True
            own = {k: v for k, v in vars(value).items() if not (of_functions and k == "_key")}
            self._key.append((cls, tuple(own)))
            inside = {k: self.node(v, f"{path}.{k}") for k, v in own.items()}
            self.hold(_settings(cls), path)
            make = cls if cls is types.SimpleNamespace else lambda: object.__new__(cls)
            return lambda b, number: _filled(b, number, make(), lambda new: _setting(b, inside)(vars(new)))
        if _subclassed(value):
            self.rebuilt = True
            attributes = {} if vars(value) is value else vars(value)
            items = dict(dict.items(value) if isinstance(value, dict) else enumerate(list.__iter__(value)))
            self._key.append((cls, tuple(map(_hashable, items)), tuple(attributes)))
            inside = {k: self.node(v, f"{path}.[{_word(k)}]") for k, v in items.items()}
            beside = {k: self.node(v, f"{path}.{k}") for k, v in attributes.items()}
            self.hold(_settings(cls), path)
            empty: Any = dict if isinstance(value, dict) else list
            return lambda b, number: _filled(
                b, number, empty.__new__(cls), lambda new: _fill(b, value, new, inside, beside)
            )
        held: dict[str, Any] = {}
        if isinstance(wrapped := look(value, "__wrapped__"), _CODE):  # functools.cache
            held["__wrapped__"] = wrapped
        # Python's own objects (a logger) count what they did. Another process finds more of a package's as it was.
        opened = cls.__module__ not in sys.stdlib_module_names or cls.__module__ in ("collections", "queue")
        opened = opened and cls.__module__.partition(".")[0] != "jax"
        if self._words:
            opened = _users_type(cls) or dataclasses.is_dataclass(cls)
        if cls.__module__.partition(".")[0] in ("jax", "jaxlib"):  # custom_jvp, custom_vjp: the functions in them
            held |= {k: v for k, v in _attributes(value).items() if isinstance(v, _CODE)}
        if isinstance(value, contextvars.ContextVar):
            held["value"] = value.get(None)
        held |= _of_python(value)
        if opened:
            held |= _attributes(value)
            if not self._words and _by_value(cls):  # a set's memory of its own digest
                held.pop("_key", None)
            for name in (name for c in cls.__mro__ for name in _slots(c)):
                if has(value, name):
                    held[name] = look(value, name)
        if isinstance(value, Mapping):
            held |= {f"[{_word(k)}]": v for k, v in value.items()}
        elif isinstance(value, (list, deque)):
            held |= {f"[{i}]": v for i, v in enumerate(value)}
        if _by_value(cls):
            self._key.append((cls, tuple(held)))
        else:
            self._key.append(_hashable(value) if not held and cls.__hash__ is not object.__hash__ else _Same(value))
        self.hold(held | _settings(cls), path)
        return lambda _b, _n: value


# ---------------------------------------------------------------- what things are


def _filled(b: _Build, number: int, new: Any, fill: Callable[[Any], Any]) -> Any:
    """A container that may hold itself: known before it is filled."""
    b.made[number] = new
    fill(new)
    return new


@functools.lru_cache(_CODES)
def _imports(code: types.CodeType) -> tuple[str, ...]:
    """The modules that a code object and those within it import, relative ones with their dots."""
    found: dict[str, None] = {}
    for inside in _codes(code):
        name, level, last = "", None, None
        for instruction in dis.get_instructions(inside):
            if instruction.opname == "IMPORT_NAME":  # after its level, and what it imports from there
                name = "." * (level if type(level) is int else 0) + str(instruction.argval)
                found[name] = None
            elif instruction.opname == "IMPORT_FROM":  # which may be a module of a package
                found[f"{name}{'' if name.endswith('.') else '.'}{instruction.argval}"] = None
            level, last = last, instruction.argval
    return tuple(found)


def _absolute(name: str, world: Mapping[str, Any]) -> str:
    """A module's name as a function with these globals imports it."""
    if not name.startswith("."):
        return name
    package = world.get("__package__") or str(world.get("__name__", "")).rpartition(".")[0]
    with contextlib.suppress(ImportError):  # beyond its package: the import itself says so
        return importlib.util.resolve_name(name, package)
    return name


@functools.lru_cache(_CODES)
def _words(code: types.CodeType) -> frozenset[str]:
    """All names in a code object and those within it: of globals, attributes, methods, imports, and in texts."""
    names = (name for inside in _codes(code) for name in inside.co_names)
    texts = (text for inside in _codes(code) for text in inside.co_consts if isinstance(text, str))
    return frozenset((*names, *(name for text in texts for name in (text, *text.split(".")))))


@functools.lru_cache(_CODES)
def _names(code: types.CodeType) -> tuple[tuple[str, ...], bool, bool]:
    """The globals that a code object and those within it read, whether it asks for types, whether it writes globals."""
    reads: dict[str, None] = {}
    writes = asks = False
    for inside in _codes(code):
        for instruction in dis.get_instructions(inside):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                reads[str(instruction.argval)] = None
            asks = asks or instruction.opname == "MATCH_CLASS"
            writes = writes or instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")
    return tuple(reads), asks or not _ASKS.isdisjoint(reads), writes


@functools.lru_cache(4096)
def _written(code: types.CodeType) -> frozenset[str]:
    """The names of an outer function that a code object and those within it write: what it holds there now says nothing
    of what it will hold, and is no argument, so that a run has the same bits whether it was called before or not."""
    stores = (i for inside in _codes(code) for i in dis.get_instructions(inside) if i.opname == "STORE_DEREF")
    return frozenset(str(i.argval) for i in stores) & frozenset(code.co_freevars)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


@functools.lru_cache(_CODES)
def _users(file: str | None) -> bool:
    """Whether code from this file is the user's own, not that of Python, an installed package or this one."""
    if file is None or file.startswith("<frozen"):
        return False
    if file.startswith("<"):  # a console or a notebook
        return True
    path = Path(file).resolve()
    if str(path).startswith(_PLACES) or not {"site-packages", "dist-packages"}.isdisjoint(path.parts):
        return False
    # What `pip install --target` put into a folder of its own; an editable install lists no file of the user's there.
    of_imports = {Path(entry).resolve() for entry in sys.path if entry}
    folders = (folder for folder in path.parents if folder in of_imports)
    return not any(path.relative_to(folder).parts[0] in _installed(folder) for folder in folders)


@functools.lru_cache(256)
def _installed(folder: Path) -> frozenset[str]:
    """The packages and modules that an installer put into a folder, by the records that it left beside them."""
    found: set[str] = set()
    for record in folder.glob("*.dist-info/RECORD"):
        with contextlib.suppress(OSError, UnicodeError):
            found |= {line.strip('"').partition("/")[0].partition(",")[0] for line in record.read_text().splitlines()}
    return frozenset(found)


def _users_module(module: types.ModuleType) -> bool:
    """Likewise of a module; one that was made by hand has neither a file nor an origin."""
    file = look(module, "__file__")
    if file is None and look(module, "__spec__") is None:
        return module.__name__ not in sys.builtin_module_names
    return _users(file)


def _namespace(cls: type) -> bool:
    """Whether a user's class is no more than settings: nothing above it, no code in it."""
    code = (types.FunctionType, staticmethod, classmethod, property, functools.cached_property, _JITTED)
    values = _contents(cls).values()
    return type(cls) is type and cls.__bases__ == (object,) and _users_type(cls) and not _slots(cls) and not (
        dataclasses.is_dataclass(cls) or any(isinstance(v, code) or hasattr(type(v), "__get__") for v in values)
    )  # fmt: skip


def _contents(cls: type) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if not (name.startswith("__") and name.endswith("__"))}


def _set_all(b: _Build, inside: dict[str, Callable[[_Build], Any]], new: Any) -> None:
    for name, made in inside.items():
        setattr(new, name, made(b))


def _library(fn: Any) -> bool:
    """Whether a function is of an installed package and captures nothing: it is the same for ever."""
    if not isinstance(fn, types.FunctionType):
        return not isinstance(fn, types.MethodType)
    if _users(fn.__code__.co_filename):
        return False
    fn = inspect.unwrap(fn, stop=lambda f: not hasattr(f, "__explained__"))
    if not isinstance(fn, types.FunctionType):  # a cache of an installed package's
        return True
    held = [cell.cell_contents for cell in fn.__closure__ or () if cell != types.CellType()]
    held += [*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]
    return "<locals>" not in fn.__qualname__ and all(type(value) in _ATOMS or isinstance(value, type) for value in held)


def _users_type(cls: type) -> bool:
    module = sys.modules.get(cls.__module__)
    file = look(module, "__file__")
    return (module is None or cls.__module__ == "__main__") if file is None else _users(file)


def _by_value(cls: type) -> bool:
    """Whether objects of a class are what their fields are, as a frozen dataclass's: solvers, sets, settings."""
    parameters = getattr(cls, "__dataclass_params__", None)
    return parameters is not None and parameters.frozen and parameters.eq


def _copied(value: Any) -> bool:
    """Whether an object is no more than its attributes, and may be copied with others."""
    cls = type(value)
    if cls in (types.SimpleNamespace, argparse.Namespace):
        return True
    own = [c for c in cls.__mro__ if c is not object and c.__module__ not in ("typing", "abc")]
    watched = {"__getattribute__", "__new__", "__del__"} | (
        set() if dataclasses.is_dataclass(cls) else {"__setattr__", "__getattr__"}
    )
    return (
        has(value, "__dict__")
        and type(cls).__module__ in ("builtins", "abc", "typing")
        and all(_users_type(c) and not _slots(c) and watched.isdisjoint(vars(c)) for c in own)
    )


def _settings(cls: type) -> dict[str, Any]:
    """What a user's class holds: settings, and methods, which read other things."""
    found: dict[str, Any] = {}
    for c in reversed(cls.__mro__):
        if c is not object and _users_type(c):
            for name, value in vars(c).items():
                if isinstance(value, (staticmethod, classmethod)):
                    value = value.__func__
                value = (look(type(value), "fget") and look(value, "fget")) or value
                code = isinstance(value, (types.FunctionType, _JITTED)) and name not in _HOUSEKEEPING
                if code or not name.startswith("__"):
                    found[name] = value
    return {name: value for name, value in found.items() if type(value).__name__ != "member_descriptor"}


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return tuple(s for s in ((slots,) if isinstance(slots, str) else slots) if s not in ("__dict__", "__weakref__"))


def _setting_like(value: Any) -> bool:
    """What a module holds beside code."""
    if isinstance(value, types.ModuleType):
        return _users_module(value)
    if isinstance(value, type):
        return _namespace(value)
    return not isinstance(value, (types.FunctionType, types.BuiltinFunctionType, _JITTED))


def _apart(fn: Any) -> bool:
    """Whether a problem's function is taken apart: not a set, whose bounds and rows a solver looks at."""
    if isinstance(fn, (types.FunctionType, types.MethodType, functools.partial, _JITTED)):
        return True
    return not has(fn, "bounds") and not getattr(type(fn), "__bilevel_hyperparameters__", False)


def _immutable(value: Any) -> bool:
    """Whether it is one of this package's objects that hold no function, and whose arrays are their own: a box."""
    if isinstance(value, (tuple, list, dict)):
        return all(map(_immutable, value.values() if isinstance(value, dict) else value))
    if type(value).__module__.startswith("bilevel.") and not isinstance(value, types.FunctionType):
        return all(_immutable(inside) for name, inside in vars(value).items() if name != "_key")
    return isinstance(value, (*_ATOMS, np.generic, jax.Array)) or (
        isinstance(value, np.ndarray) and not value.flags.writeable
    )


def _name(value: Any) -> str:
    """The qualified name without the module, so that a script and a notebook that imports it are the same run."""
    name = look(value, "__qualname__")
    return (name if isinstance(name, str) else str(type(value).__qualname__)).replace(".<locals>", "")


def _attributes(value: Any) -> dict[str, Any]:
    found = look(value, "__dict__", {})
    return dict(found) if isinstance(found, Mapping) else {}


def _of_an_object(bound: Any) -> bool:
    """Whether a method of a type written in C is bound to an object, as `d.get` is, and `print` is not."""
    owner = bound.__self__
    if owner is None or isinstance(owner, (types.ModuleType, type)):
        return False
    return type(look(owner, bound.__name__)) is type(bound)  # a capsule's functions are no attributes of it


def _of_python(value: Any) -> dict[str, Any]:
    """What an object of Python's own types holds that may change in place."""
    if isinstance(value, threading.local):
        return _attributes(value)
    if isinstance(value, weakref.ref):
        return {"()": value()}
    if isinstance(value, (weakref.ProxyType, weakref.CallableProxyType)):
        return {"()": look(look(value, "__repr__"), "__self__")}
    if isinstance(value, MappingView):
        return {"mapping": look(value, "_mapping")}
    if isinstance(value, types.CellType):
        return {"contents": look(value, "cell_contents")}
    if isinstance(value, (functools.partial, functools.partialmethod)):  # a class of one's own above it
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    if isinstance(value, (functools.cached_property, functools.singledispatchmethod)):
        return {"func": value.func}
    try:  # array.array, bytearray, memoryview, ctypes, mmap
        with memoryview(value) as view:
            return {"bytes": (view.format, view.shape, hashlib.blake2b(view.tobytes()).hexdigest())}
    except (TypeError, ValueError, BufferError):
        return {}


def _subclassed(value: Any) -> bool:
    """Whether it is a dictionary or list of a user's class, and no more than its items and attributes."""
    cls = type(value)
    watched = {"__getattribute__", "__new__", "__del__"}
    return (
        type(cls) is type
        and cls.__mro__[-2:] in ((dict, object), (list, object))
        and has(value, "__dict__")
        and all(_users_type(c) and not _slots(c) and watched.isdisjoint(vars(c)) for c in cls.__mro__[:-2])
    )


def _fill(
    b: _Build,
    old: Any,
    new: Any,
    items: dict[Any, Callable[[_Build], Any]],
    attributes: dict[str, Callable[[_Build], Any]],
) -> None:
    """Put the contents of a user's dictionary or list into another, past what its class does when it is written to."""
    made = {k: item(b) for k, item in items.items()}
    if isinstance(old, dict):
        dict.update(new, made)
    else:
        list.extend(new, made.values())
    if vars(old) is old:  # an attribute dictionary that is its own __dict__
        object.__setattr__(new, "__dict__", new)
    else:
        vars(new).update({k: attribute(b) for k, attribute in attributes.items()})


def _word(key: Any) -> str:
    return str(key) if isinstance(key, (*_ATOMS, enum.Enum)) else _name(key)


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except Exception:  # whatever a hash of someone's own can raise
        return _Same(value)
    return type(value), value


def _setting(b: _Build, inside: dict[Any, Callable[[_Build], Any]]) -> Callable[[dict[Any, Any]], None]:
    return lambda new: new.update({k: made(b) for k, made in inside.items()})


def _digest(array: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, digest_size=16).digest()


def array_text(leaf: Any) -> str:
    """An array in a word: dtype, shape, and its number or a checksum of its contents."""
    if np.size(leaf) == 1 and not is_key(leaf):
        return f"{shape_text(leaf)} {np.asarray(leaf).reshape(()).item()!r}"
    return f"{shape_text(leaf)} {checksum(leaf)}"


def shape_text(leaf: Any) -> str:
    """Its dtype and shape."""
    return f"{leaf.dtype if hasattr(leaf, 'dtype') else np.asarray(leaf).dtype}{list(np.shape(leaf))}"


def checksum(leaf: Any) -> str:
    """A checksum of its contents."""
    array = np.ascontiguousarray(whole(leaf))
    if array.dtype.hasobject:
        return repr(array.tolist())
    return f"crc32:{zlib.crc32(array.reshape(-1).view(np.uint8).data):08x}"


def is_key(leaf: Any) -> bool:
    """Whether it holds typed PRNG keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def whole(leaf: Any) -> np.ndarray:
    """The whole array on the host, whatever devices of whatever processes it lies on; all processes call it.

    What is written is the global array, by one process, so that any other number of processes can read it.
    """
    array = jax.random.key_data(leaf) if is_key(leaf) else leaf
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
