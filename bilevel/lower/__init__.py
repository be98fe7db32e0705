"""Lower-level solvers: how y*(x) is found.

A lower solver has two pure methods, `init(y) -> LowerState` (y together with what the method remembers) and
`__call__(level, x, state) -> LowerState`, where `level` is a `bilevel.Level`, a plain function of (x, y) with
`.gradient(x, y)`, `.batch`, `.redraw(i, total)`. Most are made of steps (`Steps`), for a count of them (`repeat`) or
until a tolerance (`until`). Any function `(level, x, y) -> y` is accepted in place of a solver (`as_lower_solver`), so
a closed form, or a solver of another library, is one line.
"""

from bilevel.lower.accurate import Accurate
from bilevel.lower.foreign import Function, Identity, as_lower_solver, jaxopt, optimistix
from bilevel.lower.levenberg_marquardt import LeastSquares, LevenbergMarquardt
from bilevel.lower.loops import LowerState, repeat, until
from bilevel.lower.newton import Newton
from bilevel.lower.proximal import ProximalGradient
from bilevel.lower.reinitialized import Reinitialized
from bilevel.lower.scaled import EqualityDescent, ScaledDescent
from bilevel.lower.steps import LBFGS, GradientDescent, MomentumSGD, Relative, Steps

__all__ = [
    "LBFGS", "Accurate", "EqualityDescent", "Function", "GradientDescent", "Identity", "LeastSquares",
    "LevenbergMarquardt", "LowerState", "MomentumSGD", "Newton", "ProximalGradient", "Reinitialized", "Relative",
    "ScaledDescent", "Steps", "as_lower_solver", "jaxopt", "optimistix", "repeat", "until",
]  # fmt: skip
