"""Expressions as data: a register program of fixed length, so that one compiled program runs every expression.

Registers 0, 1, ... hold the variables, then the parameters; instruction i reads two registers (or has a constant) and
writes register `variables + parameters + i`. The last register is the value: short programs end with copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel._module import state
from bilevel.proposers.expressions import OPERATIONS, Expression, GrammarError, Node, finite

__all__ = ["Program", "assemble", "assemble_terms", "execute"]

_CODES = ["const", "copy", *OPERATIONS]


@state
class Program:
    """Instructions; arrays of one length, with leading axes where there are many programs.

    Attributes:
      code: which operation.
      first, second: the registers that it reads.
      value: the number, where the operation is a constant.
    """

    code: Any
    first: Any
    second: Any
    value: Any


def assemble(node: Node, names: Sequence[str], length: int) -> Program:
    """The program of a tree over registers of these names.

    Raises:
      GrammarError: the tree needs more than `length` instructions.
    """
    rows: list[tuple[int, int, int, float]] = []
    places: dict[Node, int] = {("var", name): i for i, name in enumerate(names)}

    def place(node: Node) -> int:
        if node not in places:
            reads = [place(child) for child in node[1:]] if node[0] != "const" else [0]
            rows.append((_CODES.index(node[0]), reads[0], reads[-1], node[1] if node[0] == "const" else 0.0))
            places[node] = len(names) + len(rows) - 1
        return places[node]

    last = place(node)
    if len(rows) > length:
        raise GrammarError(f"the expression needs {len(rows)} instructions; programs have {length}")
    rows += [(_CODES.index("copy"), last, last, 0.0)] * (length - len(rows))
    code, first, second, value = zip(*rows, strict=True)
    whole = lambda numbers: np.asarray(numbers, np.int32)  # noqa: E731
    return Program(whole(code), whole(first), whole(second), np.asarray(value, float))


def assemble_terms(expression: Expression, variables: Sequence[str], terms: int, length: int) -> Program:
    """The programs of an additive law's terms, stacked; a law of fewer terms is filled with zeros."""
    nodes = [*expression.terms, *[("const", 0.0)] * (terms - len(expression.terms))]
    if not expression.additive or len(nodes) > terms:
        raise GrammarError(f"an additive law of at most {terms} terms is needed")
    programs = [assemble(node, variables, length) for node in nodes]
    return jax.tree.map(lambda *parts: np.stack(parts), *programs)


def execute(program: Program, variables: Sequence[Any], parameters: Sequence[Any] = ()) -> Any:
    """The value of one program at fields of one shape; equal to the walk over its tree, bit for bit.

    `vmap` over programs, or over parameters, is many of them in one compiled program.
    """
    shape = jnp.broadcast_shapes(*(jnp.shape(v) for v in variables))
    dtype = jnp.result_type(float, *variables)
    fields = [jnp.broadcast_to(jnp.asarray(v, dtype), shape) for v in (*variables, *parameters)]
    return finite(_run, program)(*fields)


def _run(program: Program, *fields: Any) -> Any:
    count, length = len(fields), program.code.shape[-1]
    registers = jnp.concatenate([jnp.stack(fields), jnp.zeros((length, *fields[0].shape), fields[0].dtype)])
    branches = [lambda a, b, c: c, lambda a, b, c: a] + [
        lambda a, b, c, op=op: op(a, b) for _, op in OPERATIONS.values()
    ]

    def step(registers: Any, instruction: Any) -> Any:
        i, row = instruction
        constant = jnp.full(fields[0].shape, row.value, registers.dtype)
        out = jax.lax.switch(row.code, branches, registers[row.first], registers[row.second], constant)
        return jax.lax.dynamic_update_index_in_dim(registers, out, count + i, 0), None

    rows = jax.tree.map(jnp.asarray, program)
    return jax.lax.scan(step, registers, (jnp.arange(length), rows))[0][-1]
