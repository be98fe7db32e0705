"""Four ways to the weights of `sources`, a line each: solvers of the package, with numbers for language models."""

from __future__ import annotations

from typing import Any

import optax

from bilevel import linear, lower, solvers
from bilevel.hypergradients import Implicit, Unrolled
from bilevel.solvers import F2SA, HypergradientDescent


def penalty(rate: Any = 1e-3, upper_rate: Any = 0.03, alpha: float = 3.0) -> F2SA:
    """First derivatives alone: ScaleBiO's minimax form, by the package's `solvers.F2SA` with one step a level.

        min over x, w   max over u   F(x, w) + alpha (f(x, w) - f(x, u))

        w <- w - Adam(F_y(x, w) / alpha + f_y(x, w)),    u <- u - Adam(f_y(x, u)),      on the same batches,
        x <- x - Adam(F_x(x, w) + alpha (f_x(x, w) - f_x(x, u)))

    It is the paper's objective; the weights are a softmax as in the authors' code. Here x moves after w and u, at their
    new values (the authors': at the old ones), and alpha stays, where the authors multiply it by a factor from epoch to
    epoch. Two copies of y and their moments move, and a third is what was found last. Besides the three gradients that
    the method needs a step takes those of its report. No second derivative is taken anywhere.

    Give `sources` a trained model (`params=`), as the authors do: one that knows nothing yet learns the letters from
    noise too, and the shares can go to the noise and stay there (`examples/language_sources.py --first`).

    Args:
        rate: of y's Adam, a number or a schedule.
        upper_rate: of x's Adam.
        alpha: the penalty.

    References: Pan et al., "ScaleBiO: Scalable Bilevel Optimization for LLM Data Reweighting", ACL 2025 (arXiv
    2406.19976); Kwon, Kwon, Wright, Nowak, ICML 2023 (F2SA).
    """
    return F2SA(lower_solver=_adam(rate, 1), upper_optimizer=optax.adam(upper_rate), penalty=alpha)


def one_step(steps: int = 1, rate: Any = 1e-3, upper_rate: Any = 0.03) -> HypergradientDescent:
    """`steps` of Adam on y, the last of them differentiated: one gradient, one product, and no second copy of y.

    Reference: Bolte, Pauwels, Vaiter, "One-step differentiation of iterative algorithms", NeurIPS 2023.
    """
    return solvers.OneStep(steps, _rule(rate), optax.adam(upper_rate))


def whole_run(steps: int, rate: Any = 1e-3, upper_rate: Any = 0.1, checkpoint: Any = True) -> HypergradientDescent:
    """Each outer step is a training of `steps` from y0, differentiated from its end to its beginning.

    Exact for that training, whatever is left of f_y at its end. `checkpoint`: which states are kept
    (`hypergradients.Unrolled`); for runs of days `runs.metagradient`.

    Reference: Maclaurin, Duvenaud, Adams, ICML 2015.
    """
    return HypergradientDescent(
        Unrolled(checkpoint=checkpoint), _adam(rate, steps), optax.adam(upper_rate), warm_start=False
    )


def implicit(
    steps: int = 10, rate: Any = 1e-3, upper_rate: Any = 0.03, products: int = 5, damping: float = 0.1
) -> HypergradientDescent:
    """`steps` of Adam on y, and a linear system with f_yy + damping by `products` of CG: for a small y, an adapter.

    A training of a few steps is at no minimum and f_yy is not definite there: the damping says how far a direction's
    curvature is trusted, and the estimate is as good as that.

    Reference: Grazzi et al., "On the Iteration Complexity of Hypergradient Computation", ICML 2020.
    """
    system = linear.CG(tol=None, max_steps=products, damping=damping, warm_start=False)
    return HypergradientDescent(Implicit(system), _adam(rate, steps), optax.adam(upper_rate))


def _rule(rate: Any) -> optax.GradientTransformation:
    return optax.adam(rate, eps_root=1e-12)  # smooth where a gradient is zero


def _adam(rate: Any, steps: int) -> lower.GradientDescent:
    return lower.GradientDescent(_rule(rate), steps)
