"""The bilevel problem under study, on the digits alone: a bounded perturbation above a contrastive pretraining.

Not exported: `robustness_study` solves it, and shows what it finds beside the defences.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bilevel import Problem, data
from bilevel.applications.application import Application
from bilevel.applications.contrastive.digits import Split, split
from bilevel.applications.contrastive.encoders import Parameters
from bilevel.applications.contrastive.losses import cosine
from bilevel.applications.contrastive.perturbation import Perturbation
from bilevel.applications.contrastive.pretraining import Pretraining


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Alignment(Application[Parameters, Parameters]):
    """The alignment problem, with its parts.

    Attributes:
        digits: the split.
        perturbation: g.
        pretraining: the lower level's.
    """

    digits: Split
    perturbation: Perturbation
    pretraining: Pretraining


def alignment(
    seed: int = 0,
    *,
    target: int = 0,
    share: float = 0.03,
    perturbation: Perturbation | None = None,
    pretraining: Pretraining | None = None,
    anchor: float = 0.0,
    data: Any = "digits",
) -> Alignment:
    """Align perturbed digits with a class, through the pretraining of the encoder.

        max over psi  E cos( f(t1(g_psi(x))), f(t2(x_r)) ),    f the encoder of
        theta*(psi) in argmin over theta  E contrastive loss of the pool, whose flagged images are g_psi(x)

    x = psi, y = theta and its heads. x is any image of the pool, x_r one of the target class, t1 and t2 augmentations.

    The lower minimisers are not isolated: cosines see neither the length of the projections nor a rotation of them, and
    the decay does not see a rotation either (and shrinks the length for ever). The implicit function theorem needs an
    isolated one, which `anchor` gives: the term anchor/2 |y - y0|^2 makes the lower level strongly convex about its
    start. What SimSiam and BYOL hold by a stop_gradient is held in second derivatives too.

    Args:
        seed: of the split of the digits and of the variables' starts.
        target: the class, 0 to 9.
        share: of the pool that is flagged; all of the target class, as in the work that the paper follows (the paper's
            own choice of images is not on record).
        perturbation, pretraining: g (bound 8/255) and the lower level (SimCLR on an MLP).
        anchor: of the lower level to its start y0; 0: none.
        data: "digits"; nothing else is taken.

    Raises:
        ValueError: other data, a class that does not occur, a share that the class cannot hold.

    Reference: Sun et al., "Backdoor Contrastive Learning via Bi-level Trigger Optimization", ICLR 2024.
    """
    g, learner = perturbation or Perturbation(), pretraining or Pretraining()
    digits = split(seed, target, share, data)
    of_x, of_y = jax.random.split(jax.random.key(seed))
    y0 = learner.init(of_y)
    problem = problem_of(g, learner, digits, target, anchor, y0)
    return Alignment(
        problem,
        g.init(of_x),
        y0,
        name="trigger alignment",
        description="a bounded perturbation of digits is chosen above, an encoder is pretrained on them below",
        source="Sun et al., ICLR 2024; digits of the UCI machine learning repository",
        digits=digits,
        perturbation=g,
        pretraining=learner,
    )


def problem_of(
    g: Perturbation, learner: Pretraining, digits: Split, target: int, anchor: float = 0.0, centre: Any = None
) -> Problem:
    """The problem on a split; with stacked splits, `vmap` over it is one problem per seed."""

    def upper(psi: Parameters, theta: Parameters, batch: Any) -> Array:
        (images, references), draws = batch
        features = learner.encoder(theta["encoder"], learner.augmented(g(psi, images), references, draws))
        return -jnp.mean(cosine(*features))

    def lower(psi: Parameters, theta: Parameters, batch: Any) -> Array:
        (images, flags), draws = batch
        loss = learner.on(theta, jnp.where(flags[:, None, None], g(psi, images), images), draws)
        return loss + 0.5 * anchor * optax.tree.norm(optax.tree.sub(theta, centre), squared=True) if anchor else loss

    def draw(key: Array, arrays: Any) -> Any:
        pool, labels, members = map(jnp.asarray, arrays)
        of_images, of_references, of_views = jax.random.split(key, 3)
        images = pool[jax.random.randint(of_images, (learner.batch,), 0, pool.shape[0])]
        # A member by its number among them: a categorical draw takes a logarithm for each image of the pool.
        number = jax.random.randint(of_references, (learner.batch,), 0, jnp.sum(labels == target))
        references = pool[members[number]]
        return (images, references), learner.augmentation.draw(of_views, 2 * learner.batch)

    members = jnp.argsort(jnp.asarray(digits.pool_labels) != target)  # those of the class first
    return Problem(
        upper,
        lower,
        upper_data=data.Sampler(draw, (digits.pool, digits.pool_labels, members)),
        lower_data=learner.views((digits.pool, digits.flags)),
    )
