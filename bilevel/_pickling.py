"""Pickles of values that hold functions: solvers, problems and solutions.

pickle stores a function as the name by which another process imports it. An optax rule, and a proximal operator of this
package, are functions made inside functions, which have no such name; they are stored here as where they were made and
what they close over. A lambda, or a function of the user's own made inside another, is refused by the name of the
argument that holds it.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import pickle
import sys
import types
from collections.abc import Iterator
from typing import Any, TypeVar

__all__ = ["storable"]

T = TypeVar("T")

# Packages whose inner functions are found again by name: they are installed, and not the user's script.
_KNOWN = ("optax", "bilevel", "jax")


def storable(cls: type[T]) -> type[T]:
    """Give a class whose values are their attributes a way into pickles; copies take functions as they are."""
    cls.__reduce__ = _reduced  # type: ignore[assignment,method-assign]
    cls.__copy__ = _copied  # type: ignore[attr-defined]
    cls.__deepcopy__ = _deeply_copied  # type: ignore[attr-defined]
    return cls


def _copied(value: Any) -> Any:
    return _restored(type(value), vars(value))


def _deeply_copied(value: Any, memo: dict[int, Any]) -> Any:
    return _restored(type(value), {name: copy.deepcopy(part, memo) for name, part in vars(value).items()})


def _reduced(value: Any) -> tuple[Any, ...]:
    cls = type(value)
    fields = {name: _storable(part, f"{cls.__name__}({name}=...)") for name, part in vars(value).items()}
    return _restored, (cls, fields)


def _restored(cls: type, fields: dict[str, Any]) -> Any:
    value: Any = object.__new__(cls)
    vars(value).update(fields)
    return value


class _Inner:
    """A function on its way into a pickle, by its name or by how it is made; it comes out as the function."""

    def __init__(self, *recipe: Any) -> None:
        self.recipe = recipe

    def __reduce__(self) -> tuple[Any, ...]:
        return (_imported if len(self.recipe) == 2 else _remade), self.recipe


def _storable(value: Any, where: str, above: tuple[int, ...] = ()) -> Any:
    """The value with every inner function replaced by its recipe; an error that says where one has none."""
    if id(value) in above:
        raise pickle.PicklingError(f"{where} cannot be pickled: a function in it refers to itself.")
    inner = functools.partial(_storable, where=where, above=(*above, id(value)))
    if isinstance(value, types.FunctionType):
        return value if _importable(value) else _inner(value, where, inner)
    if type(value) in (tuple, list):
        return type(value)(inner(part) for part in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(inner(part) for part in value))
    if type(value) is dict:
        return {key: inner(part) for key, part in value.items()}
    if type(value) is functools.partial:
        return functools.partial(inner(value.func), *map(inner, value.args), **inner(value.keywords))
    wrapped = getattr(value, "__wrapped__", None)  # jax.jit and its like, which are stored as what they wrap
    if isinstance(wrapped, types.FunctionType) and not _importable(wrapped):
        return _Inner(value.__module__, value.__qualname__) if _importable(value) else inner(wrapped)
    try:
        pickle.dumps(value)
    except Exception as error:
        if isinstance(error, pickle.PicklingError) and "cannot be pickled" in str(error):
            raise
        raise pickle.PicklingError(
            f"{where} cannot be pickled: it holds a {type(value).__name__} ({error}). Give a value that can be stored, "
            "such as arrays, or a function defined with def at the top of a module."
        ) from error
    return value


def _importable(function: Any) -> bool:
    found: Any = sys.modules.get(getattr(function, "__module__", None) or "")
    for name in getattr(function, "__qualname__", "").split("."):
        found = getattr(found, name, None)
    return found is function


def _inner(function: types.FunctionType, where: str, storable: Any) -> _Inner:
    outer = function.__qualname__.partition(".<locals>")[0]
    code = function.__code__
    known = (function.__module__ or "").partition(".")[0] in _KNOWN
    if not known or _code(function.__module__, outer, code.co_qualname, code.co_firstlineno) is None:
        what = "a lambda" if function.__name__ == "<lambda>" else f"the function {function.__qualname__}"
        raise pickle.PicklingError(
            f"{where} cannot be pickled: it holds {what}, which another process cannot find by name. Define it with "
            "def at the top of a module (functools.partial binds what it closes over); to keep numbers alone, save "
            "solution.x and solution.y."
        )
    cells = tuple(storable(cell.cell_contents) for cell in function.__closure__ or ())
    defaults = storable(function.__defaults__), storable(function.__kwdefaults__)
    return _Inner(function.__module__, outer, code.co_qualname, code.co_firstlineno, cells, *defaults)


def _code(module: str, outer: str, qualname: str, line: int) -> types.CodeType | None:
    """The code of an inner function, in that of the function which makes it."""
    found: Any = importlib.import_module(module)
    for name in outer.split("."):
        found = getattr(found, name, None)
    found = inspect.unwrap(found) if callable(found) else None
    inside = [code for code in _nested(getattr(found, "__code__", None)) if code.co_qualname == qualname]
    exact = [code for code in inside if code.co_firstlineno == line]
    return exact[0] if len(exact) == 1 else inside[0] if len(inside) == 1 else None


def _nested(code: types.CodeType | None) -> Iterator[types.CodeType]:
    for part in () if code is None else code.co_consts:
        if isinstance(part, types.CodeType):
            yield part
            yield from _nested(part)


def _imported(module: str, qualname: str) -> Any:
    found: Any = importlib.import_module(module)
    for name in qualname.split("."):
        found = getattr(found, name)
    return found


def _remade(module: str, outer: str, qualname: str, line: int, cells: Any, defaults: Any, kwdefaults: Any) -> Any:
    code = _code(module, outer, qualname, line)
    if code is None or len(code.co_freevars) != len(cells):
        raise pickle.UnpicklingError(
            f"The pickle holds {module}.{qualname}, which the installed version of {module.partition('.')[0]} does not "
            "have: install the version that it was written with."
        )
    scope = vars(importlib.import_module(module))
    function = types.FunctionType(code, scope, code.co_name, defaults, tuple(map(types.CellType, cells)))
    function.__kwdefaults__ = kwdefaults
    function.__qualname__, function.__module__ = qualname, module
    return function
