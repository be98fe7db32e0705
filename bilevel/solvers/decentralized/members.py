"""The named members of the decentralised family: a paper's name is a choice of corrections and loops."""

from __future__ import annotations

from typing import Any

from bilevel._module import constructor
from bilevel.network import Network
from bilevel.solvers.decentralized.solver import Decentralized

__all__ = ["DSOBA", "GTDSBO", "MADSBO", "SLDBO", "SPARKLE"]


@constructor
def MADSBO(
    network: Network,
    upper_optimizer: Any = 0.01,
    lower_optimizer: Any = 0.1,
    linear_optimizer: Any = 0.05,
    *,
    lower_steps: int = 5,
    linear_steps: int = 5,
    averaging: float = 0.2,
    **options: Any,
) -> Decentralized:
    """MA-DSBO: gossip for y and x, gradient tracking for v (the HIGP oracle), a moving average of hypergradients, used
    one step late.

        y <- W y - beta f_y                                                  lower_steps times
        v <- W v - gamma d,   d <- W d + s - s_before,   s = f_yy v - F_y    linear_steps times
        x <- W x - alpha r,   then   r <- (1 - a) r + a (F_x - f_xy v)

    The combine-then-adapt forms have small stable steps on graphs with negative eigenvalues (`network.lazy()` helps),
    and the gossip of x and y leaves a bias of O(alpha) and O(beta) where agents differ: `GTDSBO` has neither. The
    paper ties a to alpha; here it is a number of its own. The recursion is reconstructed from the paper's description
    and not compared with code of its authors: order and indices may differ from theirs. One known deviation: d persists
    from one outer step to the next.

    Reference: Chen, Huang, Ma, Balasubramanian, "Decentralized Stochastic Bilevel Optimization with Improved
    per-Iteration Complexity", ICML 2023.
    """
    loops = {"lower_steps": lower_steps, "linear_steps": linear_steps, "averaging": averaging}
    options = {"x": "none-cta", "y": "none-cta", "v": "gt-cta", "late": True, **loops, **options}
    return Decentralized(network, upper_optimizer, lower_optimizer, linear_optimizer, **options)


@constructor
def GTDSBO(
    network: Network,
    upper_optimizer: Any = 0.01,
    lower_optimizer: Any = 0.1,
    linear_optimizer: Any = 0.1,
    *,
    lower_steps: int = 5,
    linear_steps: int = 5,
    averaging: float = 1.0,
    **options: Any,
) -> Decentralized:
    """MA-DSBO's loops with adapt-then-combine gradient tracking of y, v and x in place of gossip, and no average.

    No bias from heterogeneous agents; the one to begin with. Reference: as `MADSBO` and `Decentralized`.
    """
    options |= {"lower_steps": lower_steps, "linear_steps": linear_steps, "averaging": averaging}
    return Decentralized(network, upper_optimizer, lower_optimizer, linear_optimizer, **options)


@constructor
def DSOBA(
    network: Network,
    upper_optimizer: Any = 0.01,
    lower_optimizer: Any = 0.1,
    linear_optimizer: Any = 0.1,
    *,
    averaging: float = 0.2,
    **options: Any,
) -> Decentralized:
    """D-SOBA: one diffusion step of y, v and x at once, from one linearisation, and a moving average of hypergradients.

    The least communication, p + 2 q numbers to each neighbour a step; biased where agents differ.

    Reference: Kong, Zhu, Lu, Huang, Yuan, "Decentralized Bilevel Optimization: A Perspective from Transient Iteration
    Complexity", JMLR 26(240), 2025.
    """
    options = {"x": "none", "y": "none", "v": "none", "simultaneous": True, "averaging": averaging, **options}
    return Decentralized(network, upper_optimizer, lower_optimizer, linear_optimizer, **options)


@constructor
def SPARKLE(
    network: Network,
    upper_optimizer: Any = 0.01,
    lower_optimizer: Any = 0.1,
    linear_optimizer: Any = 0.1,
    *,
    x: str = "ed",
    y: str = "ed",
    v: str = "ed",
    averaging: float = 0.2,
    **options: Any,
) -> Decentralized:
    """SPARKLE: single loop, a moving average, and for each variable its own correction (by default exact diffusion).

    ED and EXTRA send p + 2 q numbers to each neighbour a step, gradient tracking twice that. Correcting y and v
    matters more than correcting x.

    Reference: Zhu, Kong, Lu, Lin, Yuan, NeurIPS 2024.
    """
    options["averaging"] = averaging
    return Decentralized(network, upper_optimizer, lower_optimizer, linear_optimizer, x, y, v, **options)


@constructor
def SLDBO(
    network: Network,
    upper_optimizer: Any = 0.01,
    lower_optimizer: Any = 0.1,
    linear_optimizer: Any = 0.1,
    *,
    radius: float | None = None,
    **options: Any,
) -> Decentralized:
    """SLDBO: SOBA's simultaneous directions with gradient tracking of all three, and v kept in a ball (`radius=`).

    Deterministic, any heterogeneity.

    Reference: Dong, Ma, Yang, Yin, "A Single-Loop Algorithm for Decentralized Bilevel Optimization", Mathematics of
    Operations Research 2025.
    """
    options = {"simultaneous": True, "radius": radius, **options}
    return Decentralized(network, upper_optimizer, lower_optimizer, linear_optimizer, **options)
