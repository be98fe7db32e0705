"""Denoising diffusion: the cosine schedule, the noisy windows, and the two samplers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The cosine schedule of T noise levels t = 0, ..., T - 1.

        abar(s) = cos^2(pi/2 (s + 0.008) / 1.008),    beta_t = min(1 - abar((t + 1)/T) / abar(t/T), 0.999)

    Args:
        steps: T; the paper's is 250 (sines, stocks) or 500.

    Reference: Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", ICML 2021.
    """

    steps: int = 250

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 2:
            raise ValueError(f"Schedule(steps={self.steps!r}): at least two noise levels are needed.")

    @property
    def betas(self) -> np.ndarray:
        """beta_t, float64 (T,)."""
        bar = np.cos((np.arange(self.steps + 1) / self.steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - bar[1:] / bar[:-1], 0.999)

    @property
    def alphas_bar(self) -> np.ndarray:
        """The products of 1 - beta up to t, float64 (T,)."""
        return np.cumprod(1 - self.betas)

    def noisy(self, x0: Array, t: Array, noise: Array) -> Array:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, for t one number or one per window."""
        bar = jnp.asarray(self.alphas_bar, x0.dtype)[t]
        signal, rest = jnp.sqrt(bar), jnp.sqrt(1 - bar)
        if jnp.ndim(t):
            signal, rest = (a.reshape(-1, *(1,) * (x0.ndim - 1)) for a in (signal, rest))
        return signal * x0 + rest * noise

    def ddpm_step(self, x: Array, x0: Array, t: Array, noise: Array) -> Array:
        """x_{t-1} from x_t and the clipped x_0: the posterior's mean, and noise of variance beta_t (none at t = 0)."""
        x0, (beta, bar, before) = jnp.clip(x0, -1, 1), self._at(t, x.dtype)
        mean = (jnp.sqrt(before) * beta * x0 + jnp.sqrt(1 - beta) * (1 - before) * x) / (1 - bar)
        return mean + jnp.where(t > 0, jnp.sqrt(beta), 0) * noise

    def ddim_step(
        self, x: Array, x0: Array, t: Array, noise: Array, eta: float = 0.0, target: Array | None = None
    ) -> Array:
        """x at the level `target` (t - 1 by default, -1 being none) from x_t and the clipped x_0; eta = 0: no noise."""
        x0, (_, bar, before) = jnp.clip(x0, -1, 1), self._at(t, x.dtype, target)
        epsilon = (x - jnp.sqrt(bar) * x0) / jnp.sqrt(1 - bar)
        sigma = eta * jnp.sqrt((1 - before) / (1 - bar) * (1 - bar / before))
        return jnp.sqrt(before) * x0 + jnp.sqrt(1 - before - sigma**2) * epsilon + sigma * noise

    def _at(self, t: Array, dtype: jnp.dtype, target: Array | None = None) -> tuple[Array, Array, Array]:
        bar, before = self.alphas_bar, t - 1 if target is None else target
        padded = jnp.asarray(np.concatenate([[1.0], bar]), dtype)
        return jnp.asarray(self.betas, dtype)[t], padded[t + 1], padded[before + 1]

    def sample(
        self,
        denoise: Callable[[Array, Array], Array],
        key: Array,
        shape: tuple[int, int, int],
        *,
        sampler: str = "ddpm",
        steps: int | None = None,
        eta: float = 0.0,
    ) -> Array:
        """New windows, from noise.

        Args:
            denoise: `(x, t) -> x_0` for windows x (n, length, channels) and one level t.
            key: of the noise.
            shape: (n, length, channels).
            sampler: "ddpm", through all levels, or "ddim".
            steps: of ddim, how many levels, evenly spaced; None: all.
            eta: of ddim, the share of fresh noise.
        """
        if sampler not in ("ddpm", "ddim"):
            raise ValueError(f"sample(sampler={sampler!r}): the samplers are 'ddpm' and 'ddim'.")
        if sampler == "ddpm" and steps not in (None, self.steps):
            raise ValueError(f"sample(sampler='ddpm', steps={steps}): ddpm takes all {self.steps}; 'ddim' takes fewer.")
        if not 0 <= eta <= 1 or (eta and sampler == "ddpm"):
            raise ValueError(f"sample(sampler={sampler!r}, eta={eta}): eta is ddim's share of fresh noise, 0 to 1.")
        count = self.steps if steps is None else steps
        if not 1 <= count <= self.steps:
            raise ValueError(f"sample(steps={steps}): the number of levels lies in 1..{self.steps}.")
        levels = np.unique(np.linspace(0, self.steps - 1, count).round().astype(np.int32))[::-1]
        if count == 1:
            levels = np.array([self.steps - 1], np.int32)
        targets = np.append(levels[1:], -1).astype(np.int32)
        first, key = jax.random.split(key)

        def step(x: Array, now: tuple[Array, Array, Array]) -> tuple[Array, None]:
            t, target, key = now
            noise = jax.random.normal(key, shape, x.dtype)
            x0 = denoise(x, t)
            if sampler == "ddpm":
                return self.ddpm_step(x, x0, t, noise), None
            return self.ddim_step(x, x0, t, noise, eta, target), None

        keys = jax.random.split(key, len(levels))
        x = jax.random.normal(first, shape)
        return jax.lax.scan(step, x, (jnp.asarray(levels.copy()), jnp.asarray(targets), keys))[0]
