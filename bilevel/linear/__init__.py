"""Matrix-free solvers of H v = b on pytrees, made for hypergradients.

H is given as a `matvec`, usually a Hessian-vector product; b and v are pytrees of its argument's structure. A solver
is a frozen dataclass of hyperparameters with two pure methods,

    solver.init(b) -> carry
    solver(matvec, b, carry=None) -> (v, carry, info)

The carry is what outlives an outer step: the last solution (the next warm start) and the preconditioner. All solvers
run under `jit`, `vmap` and `scan`, keep the dtypes of b, and are differentiable in both modes and to any order with
respect to b and to whatever the matvec closes over (not to the carry).

| H is | solver |
|---|---|
| symmetric positive definite | `CG`, with `Jacobi`, `NystromPreconditioner` or `StaleCholesky` |
| symmetric, indefinite or singular | `MINRES` |
| not symmetric | `GMRES`, `BiCGStab`, `NormalCG` |
| small | `Dense` |
| to be inverted roughly, at a fixed cost | `Neumann`, `Richardson`, `Nystrom`, `Identity` |
"""

from bilevel.linear._common import LinearCarry, LinearInfo, LinearSolver
from bilevel.linear.direct import Dense, Nystrom
from bilevel.linear.krylov import CG, MINRES
from bilevel.linear.nonsymmetric import GMRES, BiCGStab, NormalCG
from bilevel.linear.preconditioners import (
    Jacobi,
    NystromPreconditioner,
    Preconditioner,
    PreconditionerState,
    StaleCholesky,
)
from bilevel.linear.series import Identity, Neumann, Richardson

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "BiCGStab",
    "Dense",
    "Identity",
    "Jacobi",
    "LinearCarry",
    "LinearInfo",
    "LinearSolver",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "NystromPreconditioner",
    "Preconditioner",
    "PreconditionerState",
    "Richardson",
    "StaleCholesky",
]
