"""Two decorators that give the package its two kinds of value: hyperparameters and states."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

from bilevel._arguments import explained, explained_class
from bilevel._pickling import storable

T = TypeVar("T")
P = ParamSpec("P")

_NUMBER = (float, complex, np.ndarray, np.number, jax.Array, jax.ShapeDtypeStruct)


def _is_dynamic(value: Any) -> bool:
    """Whether a hyperparameter travels as data (numbers, and containers of nothing but numbers)."""
    if isinstance(value, _NUMBER):
        return True
    if getattr(type(value), "__bilevel_hyperparameters__", False):
        return True
    if isinstance(value, (tuple, list, dict)):
        leaves = jax.tree.leaves(value)
        return bool(leaves) and all(isinstance(leaf, _NUMBER) for leaf in leaves)
    return False


@typing.dataclass_transform(frozen_default=True)
def hyperparameters(cls: type[T]) -> type[T]:
    """Make a frozen dataclass that is a pytree: floats and arrays are leaves, all else is static.

    Changing a leaf does not recompile, and a sweep over it is a `vmap`; changing a count, a flag or a function does
    recompile. An integer given to a field annotated `float` becomes a float, so that `SOBA(1)` and `SOBA(1.0)` are one
    program. Fields that are themselves hyperparameter classes (a linear solver in an estimator) are sub-trees. Values
    are validated in `__post_init__`, which runs where a person writes the constructor and not when JAX rebuilds the
    object from its leaves.
    """
    check = getattr(cls, "__post_init__", None)
    float_fields: list[str] = []
    int_fields: list[str] = []

    def __post_init__(self: Any) -> None:
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), np.integer):
                object.__setattr__(self, field.name, int(value))  # a count is no number to trace
            _refuse_kind(self, field)
        for name in float_fields:
            value = getattr(self, name)
            if isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, name, float(value))
        if check is not None:
            check(self)
        for field in dataclasses.fields(self):  # from here on after the class's own words for it
            _refuse_uncallable(self, field)
        for name in int_fields:
            if isinstance(value := getattr(self, name), (float, np.floating)):
                raise ValueError(
                    f"{type(self).__name__}({name}={value!r}): a whole number is needed, such as {name}=10."
                )

    def __repr__(self: Any) -> str:
        return f"{name_of(self)}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    if "__repr__" not in vars(cls):
        cls.__repr__ = __repr__  # type: ignore[assignment]
    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    cls = dataclasses.dataclass(frozen=True)(cls)
    explained_class(cls)
    storable(cls)
    cls.__bilevel_hyperparameters__ = True  # type: ignore[attr-defined]
    names = tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
    float_fields += [field.name for field in dataclasses.fields(cls) if "float" in str(field.type)]  # type: ignore[arg-type]
    int_fields += [field.name for field in dataclasses.fields(cls) if _kinds(field) <= {"int", "None"}]  # type: ignore[arg-type]

    def partition(self: Any) -> tuple[str, ...]:
        # An object that JAX rebuilt may hold anything in its leaves (axes, None): it remembers which they were.
        dynamic = self.__dict__.get("_dynamic")
        return dynamic if dynamic is not None else tuple(n for n in names if _is_dynamic(getattr(self, n)))

    def flatten_with_keys(self: Any) -> tuple[Any, Any]:
        dynamic = partition(self)
        children = tuple((jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in dynamic)
        static = tuple(getattr(self, n) for n in names if n not in dynamic)
        return children, (dynamic, static, vars(self).get("_name"))

    def flatten(self: Any) -> tuple[Any, Any]:
        dynamic = partition(self)
        static = tuple(getattr(self, n) for n in names if n not in dynamic)
        return tuple(getattr(self, n) for n in dynamic), (dynamic, static, vars(self).get("_name"))

    def unflatten(aux: Any, children: Any) -> Any:
        dynamic, static, name = aux
        self = object.__new__(cls)
        static_values = iter(static)
        dynamic_values = iter(children)
        for field in names:
            object.__setattr__(self, field, next(dynamic_values if field in dynamic else static_values))
        object.__setattr__(self, "_dynamic", dynamic)
        if name is not None:
            object.__setattr__(self, "_name", name)
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def _kinds(field: dataclasses.Field[Any]) -> set[str]:
    """The parts of a field's annotation."""
    kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    return {part.strip() for part in kind.split("|")}


_EXPECTED = {"float": "a number", "int": "a whole number", "bool": "True or False", "None": "None"}


def _refuse_kind(self: Any, field: dataclasses.Field[Any]) -> None:
    """A sentence where a hyperparameter is of a kind that its annotation excludes, and nothing later would say so: text
    for a number, a class for what is made of it."""
    value, kinds = getattr(self, field.name), _kinds(field)
    given = f"{type(self).__name__}({field.name}={value!r})"
    if isinstance(value, type) and not kinds & {"Any", "PyTree"} and not any("type" in kind for kind in kinds):
        raise TypeError(
            f"{type(self).__name__}({field.name}={value.__name__}): this is the class; make one of it, "
            f"{field.name}={value.__name__}(...)."
        )
    if value is field.default:
        return
    if kinds <= set(_EXPECTED):
        wrong = isinstance(value, (str, bytes, list, tuple, dict, set)) or (value is None and "None" not in kinds)
        wrong = wrong or (kinds == {"bool"} and isinstance(value, (*_NUMBER, np.ndarray)))
        if wrong or callable(value):
            expected = " or ".join(_EXPECTED[kind] for kind in ("float", "int", "bool", "None") if kind in kinds)
            raise TypeError(f"{given}: {expected} is expected, not a {type(value).__name__}.")


def _refuse_uncallable(self: Any, field: dataclasses.Field[Any]) -> None:
    """Likewise where a function is expected."""
    value, optional = getattr(self, field.name), _kinds(field) - {"None"}
    one = next(iter(optional)) if len(optional) == 1 else ""
    if one.startswith("Callable") and value is not None and value is not field.default and not callable(value):
        given = f"{type(self).__name__}({field.name}={value!r})"
        raise TypeError(f"{given}: a function is expected, not a {type(value).__name__}.")


def name_of(part: Any) -> str:
    """What a solver is called where a person reads it: as its constructor is, `AID` and not the class that it makes."""
    return getattr(part, "__dict__", {}).get("_name") or type(part).__name__


def constructor(make: Callable[P, T]) -> Callable[P, T]:
    """A function whose name is that of a method, and which makes a more general class: what it makes has its name."""

    fitting = explained(make)

    @functools.wraps(make)
    def named(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            made = fitting(*args, **kwargs)
        except (TypeError, ValueError) as error:
            cls, rest = str(error)[: str(error).find("(")], str(error)[str(error).find("(") :]
            made_by = getattr(make.__globals__.get(cls), "__constructs__", False)  # type: ignore[attr-defined]
            if made_by or (cls.isidentifier() and f"-> {cls}" in f"-> {make.__annotations__.get('return')}"):
                raise type(error)(make.__name__ + rest) from None
            raise
        object.__setattr__(made, "_name", make.__name__)
        return made

    named.__constructs__ = True  # type: ignore[attr-defined]
    return named


@typing.dataclass_transform(frozen_default=True)
def state(cls: type[T]) -> type[T]:
    """Make a frozen dataclass whose fields are all pytrees of arrays."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    return jax.tree_util.register_dataclass(cls)  # type: ignore[return-value, type-var]
