"""Population weights: how much the population counts against the single window, by noise level and pair of channels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import Problem, data, lower
from bilevel.applications.application import Application
from bilevel.applications.time_series.denoiser import Denoiser
from bilevel.applications.time_series.diffusion import Schedule
from bilevel.applications.time_series.population import EVALUATION, TRAINING, cross_correlations, mmd, pairs
from bilevel.applications.time_series.windows import check_disjoint, check_windows

PyTree = Any
Weights = dict[str, Array]


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Population(Application[Weights, dict[str, Array]]):
    """The problem that `population` makes.

    x0 has the logarithms {"noise": (bins,), "pairs": (pairs,)}; y0 are the denoiser's first parameters.

    Attributes:
        denoiser, schedule: of the diffusion.
        pairs: the pairs of channels, in the order of x["pairs"].
        fixed: `alpha -> x`, the paper's one weight for all levels and pairs; 0 is plain diffusion.
        terms: `(y, batch) -> (discrepancy, error)`, the two parts of the upper loss.
        training: `steps -> lower solver`: Adam of the rate 1e-3 that falls to 0 over `steps` in all (`per_call` a
            call).
        sample: `(y, key, n, **options) -> windows`, see `Schedule.sample`.
    """

    denoiser: Denoiser
    schedule: Schedule
    pairs: list[tuple[int, int]]
    fixed: Callable[[float], Weights]
    terms: Callable[[PyTree, Any], tuple[Array, Array]]
    training: Callable[..., lower.GradientDescent]
    sample: Callable[..., Array]
    name: str = "population weights"
    description: str = "The population loss's weight by noise level and pair of channels; a diffusion model of windows."
    source: str = 'Li et al., "Population Aware Diffusion for Time Series Generation", AAAI 2025 (with one weight)'


def population(
    train: Any,
    validation: Any,
    *,
    denoiser: Denoiser | None = None,
    noise_levels: int = 50,
    bins: int = 5,
    batch: int = 64,
    kappa: float = 1.0,
    levels: int = 4,
    held_out: int = 128,
    alpha: float = 8e-4,
    seed: int = 0,
) -> Population:
    """Learn the weights of PaD-TS's population loss from a validation set:

        lower  f(x, y) = |x0 - y(x_t, t)|^2 + exp(a_b(t)) mean over pairs of exp(c_ij) MMD(CC_ij(x0), CC_ij(y(x_t, t)))
        upper  F(x, y) = mean over t of [ mean over pairs of MMD'(CC(x0), CC(y(x_t, t))) + kappa |x0 - y(x_t, t)|^2 ]

    CC are the correlations of two channels over each window, MMD the discrepancy of their distributions over the batch
    (seven bandwidths, nine above). x = (a, c), by bin of noise level and by pair; at equal a and c = 0 it is the
    paper's loss. t is one and the same for all windows of a batch: correlations of different noise levels would mix.
    The lower level is a training run: differentiate it forward, `hypergradients.Forward()`, which keeps a copy of y and
    Adam's moments for each of the few numbers in x. Without the error above (kappa = 0) more weight is always better.

    Args:
        train, validation: windows (n, length, channels), -1..1, that share no time step (`split_in_time`).
        denoiser: the network; by default one of width 32 with two decoders.
        noise_levels: T of the schedule.
        bins: of the noise levels, equally wide.
        batch: windows per training step.
        kappa: the error's share of the upper loss.
        levels: noise levels of the upper loss, fixed, in the middle of equal parts of all.
        held_out: validation windows of the upper loss, evenly spaced in time, with fixed noise.
        alpha: where all weights start: that of the paper for stocks.
        seed: of the parameters and the upper level's noise.

    Raises:
        ValueError: windows of other shapes, missing values, constant channels, or a split that leaks; named.
    """
    train = check_windows("training", train, None if denoiser is None else denoiser.length)
    length, channels = train.shape[1:]
    validation = check_windows("validation", validation, length, channels)
    if channels < 2:
        raise ValueError("The windows have one channel, and correlations need two: give more channels.")
    check_disjoint(train, validation)
    net = Denoiser(length, channels, 32, 1, 2) if denoiser is None else denoiser
    if (net.length, net.channels) != (length, channels):
        raise ValueError(f"{net} is for windows of another shape than (n, {length}, {channels}).")
    if not 1 <= bins <= noise_levels or not 1 <= levels <= noise_levels:
        raise ValueError(f"population(bins={bins}, levels={levels}): 1 to {noise_levels} noise levels are there.")
    for name, value in (("batch", batch), ("held_out", held_out)):
        if value < 1:
            raise ValueError(f"population({name}={value}): at least one window is needed.")
    if not (kappa >= 0 and alpha > 0):
        raise ValueError(f"population(kappa={kappa}, alpha={alpha}): kappa >= 0 and alpha > 0 are needed.")
    schedule, members = Schedule(noise_levels), pairs(channels)
    at = tuple(int((k + 0.5) * noise_levels / levels) for k in range(levels))

    def lower_loss(x: Weights, y: PyTree, batch: Any) -> Array:
        x0, key = batch
        of_t, of_noise = jax.random.split(key.random)
        t = jax.random.randint(of_t, (), 0, noise_levels)
        found = net(y, schedule.noisy(x0, t, jax.random.normal(of_noise, x0.shape, x0.dtype)), t)
        gap = mmd(cross_correlations(x0), cross_correlations(found), TRAINING)
        weight = jnp.exp(x["noise"][t * bins // noise_levels])
        return jnp.square(found - x0).mean() + weight * (jnp.exp(x["pairs"]) * gap).mean()

    def terms(y: PyTree, batch: Any) -> tuple[Array, Array]:
        x0, noise = batch
        real = cross_correlations(x0)

        def term(one: tuple[Array, Array]) -> tuple[Array, Array]:
            t, noise = one
            found = net(y, schedule.noisy(x0, t, noise), t)
            return mmd(real, cross_correlations(found), EVALUATION).mean(), jnp.square(found - x0).mean()

        # One after the other: the network is compiled once, and not once for each level.
        gaps, errors = jax.lax.map(term, (jnp.asarray(at), jnp.moveaxis(jnp.asarray(noise), 1, 0)))
        return gaps.mean(), errors.mean()

    def upper_loss(x: Weights, y: PyTree, batch: Any) -> Array:
        gap, error = terms(y, batch)
        return gap + kappa * error

    chosen = validation[np.linspace(0, len(validation) - 1, min(held_out, len(validation))).round().astype(int)]
    noise = np.random.default_rng(seed).normal(size=(len(chosen), levels, length, channels)).astype(chosen.dtype)
    problem = Problem(
        upper=upper_loss,
        lower=lower_loss,
        upper_data=(chosen, noise),
        lower_data=data.Keyed(data.Minibatches(train, min(batch, len(train)))),
    )

    def fixed(alpha: float) -> Weights:
        if alpha < 0:
            raise ValueError(f"fixed(alpha={alpha}): a weight is not negative.")
        log = math.log(alpha) if alpha > 0 else -jnp.inf
        return {"noise": jnp.full(bins, log, jnp.float32), "pairs": jnp.zeros(len(members))}

    def training(steps: int, per_call: int | None = None, rate: float = 1e-3) -> lower.GradientDescent:
        import optax

        # One vector for all parameters: a step and its tangents are a few operations, and not a few for each of fifty.
        rule = optax.flatten(optax.adam(optax.linear_schedule(rate, 0.0, steps), eps_root=1e-16))
        return lower.GradientDescent(rule, steps if per_call is None else per_call)

    def sample(y: PyTree, key: Array, n: int, **options: Any) -> Array:
        return schedule.sample(lambda x, t: net(y, x, t), key, (n, length, channels), **options)

    y0 = jax.jit(net.init)(jax.random.key(seed))  # one program, and not one for each parameter
    metrics = {
        "discrepancy": (lambda x, y, batch: terms(y, batch)[0], (chosen, noise)),
        "error": (lambda x, y, batch: terms(y, batch)[1], (chosen, noise)),
    }
    return Population(
        problem,
        fixed(alpha),
        y0,
        metrics,
        denoiser=net,
        schedule=schedule,
        pairs=members,
        fixed=fixed,
        terms=terms,
        training=training,
        sample=sample,
    )
