"""Matrix-free solvers of H v = b on pytrees, made for hypergradients.

H is given as a `matvec`, usually a Hessian-vector product; b and v are pytrees of its argument's structure. A solver
is a frozen dataclass of hyperparameters with two pure methods,

    solver.init(b) -> carry
    solver(matvec, b, carry=None) -> (v, carry, info)

The carry is what outlives an outer step: the last solution (the next warm start) and the preconditioner. All solvers
run under `jit`, `vmap` and `scan`, keep the dtypes of b, and are differentiable in both modes and to any order with
respect to b and to whatever the matvec closes over (not to the carry).

The Krylov solvers differ from what stands in a textbook in five points, each for a hypergradient's sake:

1. A warm start whose residual exceeds ||b|| (after a long outer step, or a NaN) is dropped for v = 0.
2. The system is divided by the power of two next to max |b|, so that the squares of a small gradient do not vanish.
3. No tolerance is taken below what b's dtype can hold, so `tol=1e-12` in float32 ends instead of stagnating.
4. Where an iteration breaks down it stands still instead of dividing by zero, and `info.residual` says what is left.
5. The derivative is another solve, that of the exact solution, and not that of the iterations. Only the truncated
   series (`Neumann`, `Richardson`, `Identity`) are differentiated as what they are.

A solver cannot see from its iterations whether H is what it needs: one that needs a symmetric H says so in `symmetric`.
`hypergradients.Implicit` refuses it for a lower level with a projection or prox; `implicit.custom_root` looks at two
products of a condition that does not say that it is symmetric, and takes a general solver where they disagree. `Dense`
holds the matrix and sees for itself.

| H is | solver |
|---|---|
| symmetric, and not known to be more | `Robust`, the default of `hypergradients.Implicit` |
| symmetric positive definite | `CG`, with `Jacobi`, `NystromPreconditioner` or `StaleCholesky` |
| symmetric, indefinite or singular | `MINRES` |
| not symmetric | `GMRES`, `BiCGStab`, `NormalCG`, `Robust(symmetric=False)` |
| block-diagonal, the blocks stacked (tasks) | `TaskCG` |
| small | `Dense` |
| to be inverted roughly, at a fixed cost | `Neumann`, `Richardson`, `Nystrom`, `Identity` |
"""

from bilevel.linear._common import LinearCarry, LinearInfo, LinearSolver
from bilevel.linear.direct import Dense, Nystrom
from bilevel.linear.krylov import CG, GMRES, MINRES, BiCGStab, NormalCG, Robust, TaskCG
from bilevel.linear.preconditioners import (
    Jacobi,
    NystromPreconditioner,
    Preconditioner,
    PreconditionerState,
    StaleCholesky,
)
from bilevel.linear.series import Identity, Neumann, Richardson

__all__ = [
    "CG", "GMRES", "MINRES", "BiCGStab", "Dense", "Identity", "Jacobi", "LinearCarry", "LinearInfo", "LinearSolver",
    "Neumann", "NormalCG", "Nystrom", "NystromPreconditioner", "Preconditioner", "PreconditionerState", "Richardson",
    "Robust", "StaleCholesky", "TaskCG",
]  # fmt: skip
