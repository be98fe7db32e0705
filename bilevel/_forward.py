"""What has no derivative in reverse mode says so itself, where JAX would speak of a loop that the user never wrote."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from bilevel.typing import PyTree

__all__ = ["forward_only"]


def forward_only(tree: PyTree, sentence: str) -> PyTree:
    """The tree as it is, in every mode but reverse: a derivative taken back through it raises the sentence.

    Raises:
      ValueError: at the transposition, with the sentence.
    """
    floating = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.floating)  # noqa: E731
    return jax.tree.map(lambda leaf: _forward.bind(leaf, say=sentence) if floating(leaf) else leaf, tree)


def _refuse(cotangent: Any, leaf: Any, *, say: str) -> Any:
    raise ValueError(say)


_forward = Primitive("forward_only")
_forward.def_impl(lambda leaf, *, say: leaf)
_forward.def_abstract_eval(lambda leaf, *, say: leaf)
ad.deflinear2(_forward, _refuse)
batching.defvectorized(_forward)
mlir.register_lowering(_forward, lambda ctx, leaf, *, say: [leaf])
