"""A Flax module, of nnx or linen, as the pair that `bilevel` works with: a dictionary of parameters, a pure function.

params, apply = from_nnx(Net(rngs=nnx.Rngs(0)))
logits = apply.train()(params, images, key=key)             # dropout by this key, the batch's own statistics
fixed = calibrated(apply, params, images)                   # the statistics of these images under these parameters
logits = fixed(params, new_images)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.errors
import jax
from flax import linen, nnx

from bilevel._arguments import explained
from bilevel.data import as_step_key
from bilevel.integrations import _modules
from bilevel.integrations._modules import Apply, calibrated, flat, from_dictionary, nested, untouched

__all__ = ["Apply", "calibrated", "from_linen", "from_nnx"]

_EVALUATION = {"deterministic": True, "use_running_average": True}


def _names(path: Any) -> tuple[Any, ...]:
    """The dictionary keys along a leaf's path (a Variable's own `value` is no key)."""
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))


def _to_dictionary(tree: Any) -> dict[Any, Any]:
    return _modules.to_dictionary(tree, _names)


@dataclasses.dataclass(frozen=True, eq=False)
class _Nnx(Apply):
    graphdef: Any
    structures: tuple[Any, Any, Any]  # of the parameters, the random state and all other state
    random: dict[Any, Any]  # keys and counts as the module was made with them
    kept: frozenset[Any]  # names of the state that is neither statistics nor looked at once
    cuts_derivatives = True

    def run(self, params: Any, state: Any, key: Any, args: Any, kwargs: Any) -> tuple[Any, Any, list[str]]:
        random = self.random
        if key is not None and random:
            base = as_step_key(key).random
            random = {path: _drawn(base, i, leaf) for i, (path, leaf) in enumerate(random.items())}
        elif key is not None:
            kwargs = {**kwargs, "key": key}
        given = zip(self.structures, (params, nested(random), state), strict=True)
        module = nnx.merge(self.graphdef, *(from_dictionary(like, values, _names) for like, values in given))
        output = module(*args, **kwargs)
        _, _, used, after = nnx.split(module, nnx.Param, nnx.RngState, ...)  # type: ignore[misc]
        drawn: list[str] = []
        if key is None and random:
            counts = dict(flat(_to_dictionary(used)))
            drawn = [".".join(map(str, path[:-1])) for path in random if counts[path] is not random[path]]
        return output, _to_dictionary(after), drawn

    def _mode(self, **attributes: Any) -> _Nnx:
        module = nnx.merge(self.graphdef, *self.structures)
        module.set_attributes(**attributes, raise_if_not_found=False)
        if attributes.get("deterministic") == attributes.get("use_running_average"):
            module.eval() if attributes["deterministic"] else module.train()
        graphdef, *_ = nnx.split(module, nnx.Param, nnx.RngState, ...)  # type: ignore[misc]
        return dataclasses.replace(self, graphdef=graphdef)

    def train(self) -> _Nnx:
        return self._mode(**dict.fromkeys(_EVALUATION, False))

    def eval(self) -> _Nnx:
        return self._mode(**_EVALUATION)

    def by_batch(self) -> _Nnx:
        return self._mode(**_EVALUATION)._mode(deterministic=True, use_running_average=False)

    def calibrated_for_use(self) -> _Nnx:
        return self.eval()

    def memory(self, after: Any) -> list[Any]:
        before, now = dict(flat(self.state)), dict(flat(after))
        return [path for path in before if path in self.kept and now.get(path) is not before[path]]


def _drawn(base: jax.Array, i: int, leaf: Any) -> Any:
    """The i-th leaf of the random state anew: a key (or a stack of keys) of its own; counts stay."""
    if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    key = jax.random.fold_in(base, i)
    return jax.random.split(key, leaf.shape) if leaf.shape else key


@explained
def from_nnx(module: nnx.Module) -> tuple[dict[str, Any], Apply]:
    """Split a Flax nnx module into its parameters and a pure function of them.

    Training on plain dictionaries spares the milliseconds that `nnx.jit` and `nnx.grad` spend per call on walking the
    module, and is the form in which `bilevel.solve` takes a variable.

    Args:
        module: any `flax.nnx` module. Its mode (`module.train()`, `module.eval()`) is the function's;
            `apply.train()` and `apply.eval()` are the function in another.

    Returns:
        `(params, apply)`: the trained variables as nested dictionaries of arrays, and `apply(params, *args, key=None,
        **kwargs)`, the module's call. A module that draws random numbers (dropout) needs the key and is refused
        without; equal keys give equal masks. `apply.state` are the running statistics; `calibrated` computes them,
        `apply.with_state(params, state, ...)` carries them along in a loop of your own.
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(f"from_nnx takes an nnx module, {_instead(module)}.")
    graphdef, params, random, state = nnx.split(module, nnx.Param, nnx.RngState, ...)  # type: ignore[misc]
    structures = tuple(jax.tree.map(lambda leaf: 0, values) for values in (params, random, state))
    others = _to_dictionary(state)
    of_kind = lambda kinds: dict(flat(_to_dictionary(nnx.split(module, kinds, ...)[1])))  # type: ignore[misc]  # noqa: E731
    kept = frozenset(dict(flat(others))) - frozenset(of_kind((nnx.BatchStat, nnx.Intermediate)))
    apply = _Nnx(others, frozenset(), graphdef, structures, dict(flat(_to_dictionary(random))), kept)  # type: ignore[arg-type]
    return _to_dictionary(params), dataclasses.replace(apply, stale=untouched(apply.statistics(others)))


def _instead(module: Any) -> str:
    """What was given in the place of a module, and what to write."""
    if isinstance(module, type):
        made = "rngs=nnx.Rngs(0)" if issubclass(module, nnx.Module) else "..."
        return f"not the class {module.__name__}: make one of it, {module.__name__}({made})"
    if isinstance(module, linen.Module):
        return "not one of linen: from_linen(module, module.init(key, inputs))"
    if isinstance(module, nnx.Module):
        return "not one of nnx: from_nnx(module)"
    return f"not {type(module).__name__}: give the module itself; its parameters come back with the function to call"


@dataclasses.dataclass(frozen=True, eq=False)
class _Linen(Apply):
    module: Any
    method: Any = None

    def run(self, params: Any, state: Any, key: Any, args: Any, kwargs: Any) -> tuple[Any, Any, list[str]]:
        # A stream that is not there falls back on "params": one key serves streams of any name.
        rngs = None if key is None else {"params": as_step_key(key).random}
        mutable = list(state)
        try:
            found = self.module.apply(
                {"params": params, **state}, *args, rngs=rngs, mutable=mutable, method=self.method, **kwargs
            )
        except flax.errors.InvalidRngError as error:
            if key is not None:
                raise
            return None, state, [str(error).split("(")[0].strip()[:120]]
        output, after = found
        return output, {**state, **jax.tree.map(lambda leaf: leaf, dict(after))}, []

    def calibrating(self) -> _Linen:
        return self

    def memory(self, after: Any) -> list[Any]:
        before, now = dict(flat(self.state)), dict(flat(after))
        own = [path for path in before if path[0] not in ("batch_stats", "intermediates", "losses")]
        return [path for path in own if now.get(path) is not before[path]]

    def train(self) -> _Linen:
        raise NotImplementedError("A linen module takes its mode in the call: apply(params, x, train=True).")

    def by_batch(self) -> _Linen:
        raise NotImplementedError("A linen module takes its mode in the call: give it a flag of each kind.")

    def eval(self) -> _Linen:
        raise NotImplementedError("A linen module takes its mode in the call: apply(params, x, train=False).")


@explained
def from_linen(
    module: linen.Module, variables: Mapping[str, Any], *, method: Callable[..., Any] | str | None = None
) -> tuple[dict[str, Any], Apply]:
    """Split a Flax linen module and its variables into the parameters and a pure function of them.

    Args:
        module: any `flax.linen` module.
        variables: of `module.init(key, inputs)`.
        method: the module's method to call; None: `__call__`.

    Returns:
        `(params, apply)`, as `from_nnx`'s; `apply.state` holds the other collections, such as "batch_stats". The key
        serves all random streams. The mode is the call's: `apply(params, x, train=True, key=key)`.

    Raises:
        TypeError: the variables have no collection "params".
    """
    if not isinstance(module, linen.Module):
        raise TypeError(f"from_linen takes a linen module and its variables, {_instead(module)}.")
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise TypeError(
            "from_linen(module, variables) takes what module.init(key, inputs) returned, a dictionary with the "
            f"collection 'params', not {sorted(variables) if isinstance(variables, Mapping) else type(variables)}."
        )
    plain = _modules.to_dictionary(variables)
    params = plain.pop("params")
    apply = _Linen(plain, frozenset(), module, method)
    return params, dataclasses.replace(apply, stale=untouched(apply.statistics(plain)))
