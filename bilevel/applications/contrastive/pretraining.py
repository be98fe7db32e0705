"""Pretraining: one of three contrastive losses on any encoder, as a lower level, and the rule that trains it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bilevel import Problem, data, lower, run
from bilevel.applications.contrastive.augment import Augmentation
from bilevel.applications.contrastive.encoders import MLP, Parameters, apply_head, head
from bilevel.applications.contrastive.losses import byol, nt_xent, simsiam
from bilevel.applications.contrastive.routes import Held
from bilevel.solvers import HypergradientDescent

METHODS = ("simclr", "simsiam", "byol")


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """A contrastive pretraining: parameters, its loss of a batch of views, and its step rule.

    The parameters are those of "encoder" and "projector", with SimSiam and BYOL a "predictor" as well, and with BYOL a
    "target", the slow copy xi of encoder and projector. Its average xi <- m xi + (1 - m) theta is a gradient step of
    length 1 - m on the term |xi - sg theta|^2 / 2, which the loss holds: BYOL is a lower level like the others,
    whose `rule` moves the target so and all else by Adam.

    Args:
        method: "simclr", "simsiam" or "byol".
        encoder: `MLP`, `Conv`, or any hashable object with `init(key) -> params`, `(params, images) -> features` and
            the features' `width`. The defences that prune channels need `activations` and `kernels` besides.
        projection: the width of the projections.
        temperature: of SimCLR.
        momentum: m, of BYOL, at the start; it rises to 1 over `steps` of the rule.
        decay: of the weights, as a term decay / 2 |y|^2 of the loss (without BYOL's target).
        rate: of Adam.
        batch: images per step.
        augmentation: what the views are.
    """

    method: str = "simclr"
    encoder: Any = dataclasses.field(default_factory=MLP)
    projection: int = 16
    temperature: float = 0.5
    momentum: float = 0.99
    decay: float = 1e-4
    rate: float = 3e-3
    batch: int = 64
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"Pretraining(method={self.method!r}): the methods are {', '.join(METHODS)}.")
        if isinstance(self.encoder, type):
            raise ValueError(
                f"Pretraining(encoder={self.encoder.__name__}): that is the class; give {self.encoder.__name__}()."
            )
        if not (callable(self.encoder) and hasattr(self.encoder, "init") and hasattr(self.encoder, "width")):
            raise ValueError(
                f"Pretraining(encoder={self.encoder!r}): an encoder is MLP(), Conv(), or an object with init(key) -> "
                "params, (params, images) -> features, and the features' width."
            )
        if not isinstance(self.projection, int) or self.projection < 1:
            raise ValueError(f"Pretraining(projection={self.projection!r}): a width is a positive integer.")
        if not isinstance(self.batch, int) or self.batch < 2:
            raise ValueError(f"Pretraining(batch={self.batch!r}): a contrast needs two images at least.")
        for name in ("temperature", "rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Pretraining({name}={getattr(self, name)!r}): a positive number is needed.")
        if not self.decay >= 0:
            raise ValueError(f"Pretraining(decay={self.decay!r}): the decay of the weights is not negative.")
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"Pretraining(momentum={self.momentum!r}): an average's momentum lies in 0..1.")

    def init(self, key: Array) -> Parameters:
        """Parameters before the first step."""
        of_encoder, of_projector, of_predictor = jax.random.split(key, 3)
        d = self.projection
        params = {
            "encoder": self.encoder.init(of_encoder),
            "projector": head(of_projector, self.encoder.width, 2 * d, d),
        }
        if self.method == "byol":
            params["target"] = jax.tree.map(jnp.copy, dict(params))
        if self.method != "simclr":
            params["predictor"] = head(of_predictor, d, d, d)
        return params

    def loss(self, params: Parameters, first: Array, second: Array) -> Array:
        """The loss of two views (batch, 8, 8) of the same images. Heads normalise by the statistics of each view."""

        def through(name: str, params: Parameters, z: Array) -> Array:
            return jax.vmap(functools.partial(apply_head, params[name]))(z)

        def project(params: Parameters) -> Array:
            return through("projector", params, self.encoder(params["encoder"], views))

        views = jnp.stack([first, second])
        z = project(params)
        online = {name: part for name, part in params.items() if name != "target"}
        decay = 0.5 * self.decay * optax.tree.norm(online, squared=True)
        if self.method == "simclr":
            return nt_xent(z[0], z[1], self.temperature) + decay
        p = through("predictor", params, z)
        if self.method == "simsiam":
            return simsiam(*p, *z) + decay
        slow = params["target"]
        theta = jax.lax.stop_gradient({name: params[name] for name in slow})
        average = 0.5 * optax.tree.norm(optax.tree.sub(slow, theta), squared=True)
        return byol(*p, *project(jax.lax.stop_gradient(slow))) + average + decay

    def rule(self, steps: int) -> optax.GradientTransformation:
        """The step rule of a pretraining of `steps` steps: Adam, and for BYOL's target its average."""
        adam = optax.adam(self.rate)
        if self.method != "byol":
            return adam
        whole = float(steps)  # optax counts in int32, whose quotients are float32 under x64 too
        slow = lambda k: (  # noqa: E731
            (1 - self.momentum) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(jnp.asarray(k, float) / whole, 1)))
        )
        parts = {"online": adam, "target": optax.sgd(slow)}
        label = lambda tree: {name: "target" if name == "target" else "online" for name in tree}  # noqa: E731
        return optax.partition(parts, label)

    def views(self, arrays: Any) -> data.Sampler:
        """Batches drawn in the compiled loop: `arrays` at `batch` random samples, and the draws of two views."""

        def draw(key: Array, arrays: Any) -> Any:
            of_rows, of_views = jax.random.split(key)
            rows = jax.random.randint(of_rows, (self.batch,), 0, jax.tree.leaves(arrays)[0].shape[0])
            return jax.tree.map(lambda a: jnp.asarray(a)[rows], arrays), self.augmentation.draw(
                of_views, 2 * self.batch
            )

        return data.Sampler(draw, arrays)

    def augmented(self, first: Array, second: Array, draws: Any) -> Array:
        """Views (2, batch, 8, 8) of two batches of images (batch, 8, 8)."""
        views = self.augmentation.apply(draws, jnp.concatenate([first, second]))
        return views.reshape(2, -1, *views.shape[1:])

    def on(self, params: Parameters, images: Array, draws: Any) -> Array:
        """The loss on images, whose two views were drawn."""
        return self.loss(params, *self.augmented(images, images, draws))

    def train(self, images: Array, key: Array, steps: int, start: Parameters | None = None) -> Parameters:
        """Parameters after `steps` steps on images (n, 8, 8): pure, `vmap` over images, keys and starts."""
        problem = Problem(
            lambda x, y: jnp.sum(0.0 * x), lambda x, y, batch: self.on(y, *batch), lower_data=self.views(images)
        )
        of_start, of_run = jax.random.split(key)
        y0 = self.init(of_start) if start is None else start
        solver = HypergradientDescent(Held(), lower.GradientDescent(self.rule(steps), steps), optax.set_to_zero())
        state, _ = run(problem, solver, jnp.zeros(1), y0, 1, of_run)
        return state.y
