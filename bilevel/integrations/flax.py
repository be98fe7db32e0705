"""A Flax module as the pair that `bilevel` works with: a dictionary of parameters, and a pure function of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx


def _names(path: Any) -> tuple[Any, ...]:
    """The dictionary keys along a leaf's path (a Variable's own `value` is no key)."""
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))


def _to_dictionary(tree: Any) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *parents, last = _names(path)
        node = root
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return root


def _from_dictionary(like: Any, values: dict[str, Any]) -> Any:
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    leaves = []
    for path, _ in paths:
        node: Any = values
        for name in _names(path):
            if not isinstance(node, dict) or name not in node:
                raise KeyError(f"The parameters lack {'.'.join(map(str, _names(path)))}, which this module has.")
            node = node[name]
        leaves.append(node)
    return treedef.unflatten(leaves)  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True, eq=False)
class Apply:
    """A Flax module as a pure function of its parameters; made by `from_nnx`.

    `state` holds what is not trained (the running statistics of batch normalisation), as a dictionary.
    """

    graphdef: Any
    param_structure: Any
    state_structure: Any
    state: dict[str, Any]

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """`module(*args, **kwargs)` with these parameters; changes of the state are dropped."""
        return self.with_state(params, self.state, *args, **kwargs)[0]

    def with_state(self, params: Any, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """`(module(*args, **kwargs), new state)` with these parameters and this state."""
        module = nnx.merge(
            self.graphdef,
            _from_dictionary(self.param_structure, params),
            _from_dictionary(self.state_structure, state),
        )
        output = module(*args, **kwargs)
        _, _, after = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
        return output, _to_dictionary(after)


def from_nnx(module: nnx.Module) -> tuple[dict[str, Any], Apply]:
    """Split a Flax module into its parameters and a pure function of them.

    Training on plain dictionaries spares the milliseconds that `nnx.jit` and `nnx.grad` spend per call on walking the
    module, and is the form in which `bilevel.solve` takes a variable.

    Args:
        module: any `flax.nnx` module.

    Returns:
        `(params, apply)`: the trained variables as nested dictionaries of arrays, and `apply(params, *args, **kwargs)`,
        the module's call. `apply.state` and `apply.with_state` reach what is not trained.
    """
    graphdef, params, state = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
    structures = [jax.tree.map(lambda leaf: 0, values) for values in (params, state)]
    return _to_dictionary(params), Apply(graphdef, structures[0], structures[1], _to_dictionary(state))
