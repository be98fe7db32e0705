"""Bilevel problems over a detector: how far to trust each annotation or image, weights of classes, gains of the loss.

The lower level trains the detector, the upper one asks how it does on a few clean images. Four rules make that a
problem with an answer:

- The upper loss has fixed gains: with those that are learnt it would be least where the gains vanish.
- Learnt gains have a fixed sum, and learnt class weights a fixed mean: their scale is a step size's.
- Each image has its own normaliser Z, so that a weight of one scales its loss alone.
- Assignment of anchors and routing of attention are discrete and constants to derivatives. What a hypergradient is the
  derivative of, is the upper loss with both *frozen*: `Trust.freeze` puts them into a batch, `Trust.frozen` makes the
  problem of frozen batches, and `FrozenUpper` has a solver freeze them at the start of each of its steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax

from bilevel import Problem, data, hyperparameters, state
from bilevel.applications.application import Application
from bilevel.applications.detection.boxes import Detections, Overlap, suppress
from bilevel.applications.detection.detector import Detector, bgf_nano
from bilevel.applications.detection.losses import GAINS, Gains, Predictions, as_gains, loss, task_aligned
from bilevel.integrations.flax import Apply, from_nnx
from bilevel.keys import Draw

PyTree = Any
Batch = Mapping[str, Any]
Part = Literal["images", "boxes", "classes", "gains"]
PARTS = ("images", "boxes", "classes", "gains")
UPPER_GAINS = Gains(1.0, 1.0, 0.25)
ARRAYS = ("image", "boxes", "classes", "mask")


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Trust(Application[dict[str, Array], PyTree]):
    """The problem that `trust` makes; x0 is a dictionary of zeros, y0 the detector's initial parameters.

    Attributes:
        apply: the detector as a function of its parameters: `apply(y, images) -> Predictions`.
        weights: `x -> {"images": (n,), "boxes": (n, M), "classes": (C,), "gains": (3,)}`, what is learnt of these.
        detect: `(y, images, **options of suppress) -> Detections`.
        freeze: `(y, batch) -> batch` with the targets and the routing that it has under y.
        frozen: `(y, upper batch, lower batch) -> Problem` whose data are these batches, frozen at y.
        loss: `(y, batch) ->` the upper loss of a batch.
        weighted: `(y, batch, weights) ->` the loss of which both levels are made, weights being those of the batch's
            images, boxes, the classes and the gains.
        lower_weights, upper_weights: `(x, batch) ->` and `batch ->` those of the two levels.
        decay: weight decay of the lower level.
    """

    apply: Apply
    weights: Callable[[Any], dict[str, Array]]
    detect: Callable[..., Detections]
    freeze: Callable[[PyTree, Batch], dict[str, Any]]
    frozen: Callable[[PyTree, Batch, Batch], Problem]
    loss: Callable[[PyTree, Batch], Array]
    weighted: Callable[[PyTree, Batch, Mapping[str, Array]], Array]
    lower_weights: Callable[[Any, Batch], dict[str, Array]]
    upper_weights: Callable[[Batch], dict[str, Array]]
    decay: float
    name: str = "trust in annotations"
    description: str = "Weights of annotations, images or classes, or the loss's gains; a detector trained under them."
    source: str = 'Ren et al., "Learning to Reweight Examples for Robust Deep Learning", ICML 2018'


def trust(
    train: Batch,
    clean: Batch,
    classes: int,
    *,
    learn: Part | Sequence[Part] = "images",
    detector: Detector | None = None,
    test: Batch | None = None,
    batch: int = 16,
    decay: float = 1e-4,
    gains: Any = GAINS,
    upper_gains: Any = UPPER_GAINS,
    kind: Overlap = "ciou",
    topk: int = 10,
    seed: int = 0,
) -> Trust:
    """Learn how far to trust annotations from a few clean images:

        min over x   F(x, y) = mean over clean images of L(y; upper_gains)
        s.t.         y in argmin of f(x, y) = mean over images i of w_i L_i(y; gains, box and class weights)
                                              + decay / 2 |y|^2

    where L is `losses.loss` with a normaliser for each image. Of x there is, and of the weights follows,

        images    (n,)    w_i = sigmoid(x_i)                     boxes   (n, M)   sigmoid(x_ij)
        classes   (C,)    C softmax(x), of mean 1                gains   (3,)     softmax(x + log gains) sum(gains)

    Args:
        train: "image" (n, H, W, 3) in 0..1, "boxes" (n, M, 4) as (x1, y1, x2, y2) in pixels, "classes" (n, M), "mask"
            (n, M), whether there is a box. Some annotations are wrong.
        clean: the same, fewer and right.
        classes: how many there are.
        learn: what x has: one or several of "images", "boxes", "classes", "gains".
        detector: `bgf_nano(classes)` for images of this size by default. One with batch normalisation is normalised by
            each batch's own statistics.
        test: the same as `clean`, for the metric "loss"; by default the clean ones.
        batch: images per batch, of either level.
        decay: weight decay of the lower level.
        gains: of the lower loss (where they start, if they are learnt).
        upper_gains: of the upper loss; fixed.
        kind: the overlap of the box loss. CIoU's weight a is a constant to derivatives by its definition, so that even
            frozen losses are not quite what hypergradients are the derivatives of; with "diou" or "giou" they are.
        topk: of the assignment.
        seed: of the default detector's initial parameters.

    Raises:
        ValueError: annotations that are none (swapped corners, outside of the image, NaN, unknown classes), named by
            the image; an empty or unknown `learn`.
    """
    parts: tuple[str, ...] = (learn,) if isinstance(learn, str) else tuple(learn)
    unknown = [part for part in parts if part not in PARTS]
    if not parts or unknown or len(set(parts)) < len(parts):
        raise ValueError(f"learn={learn!r}: give one or several of {', '.join(PARTS)}, each once.")
    train, clean = checked(train, classes, "train"), checked(clean, classes, "clean")
    held = clean if test is None else checked(test, classes, "test")
    n, most = train["mask"].shape
    if not clean["mask"].any():
        raise ValueError("clean has no box in any image: there is nothing to judge a detector by.")
    if detector is None:
        detector = bgf_nano(classes, image=train["image"].shape[1], rngs=nnx.Rngs(seed))
    if detector.classes != classes:
        raise ValueError(f"The detector has {detector.classes} classes, and classes={classes}: make them equal.")
    y0, apply = from_nnx(detector)
    gains, upper_gains = as_gains(gains), as_gains(upper_gains)
    given = np.asarray(gains, np.float32)
    if (given <= 0).any() and "gains" in parts:
        raise ValueError(f"gains={tuple(gains)}: learnt gains start at positive numbers.")

    def weights(x: Mapping[str, Array]) -> dict[str, Array]:
        of: dict[str, Callable[[Array], Array]] = {
            "images": jax.nn.sigmoid,
            "boxes": jax.nn.sigmoid,
            "classes": lambda v: classes * jax.nn.softmax(v),
            "gains": lambda v: given.sum() * jax.nn.softmax(v + jnp.log(given)),
        }
        return {part: of[part](x[part]) for part in parts}

    def predict(y: PyTree, batch: Batch) -> Predictions:
        options = {"routing_index": batch["routing"]} if "routing" in batch else {}
        return apply(y, batch["image"], train=True, **options)

    def each(y: PyTree, batch: Batch, gains: Any, **options: Any) -> Array:
        found = loss(
            predict(y, batch), batch, gains=gains, targets=batch.get("targets"), per="image", kind=kind, topk=topk,
            **options,
        )  # fmt: skip
        return found.total

    def weighted(y: PyTree, batch: Batch, w: Mapping[str, Array]) -> Array:
        total = each(y, batch, w["gains"], weights=w["boxes"], class_weights=w["classes"])
        return (w["images"] * total).mean()

    def plain_weights(batch: Batch, gains: Any) -> dict[str, Array]:
        ones = jnp.ones(batch["mask"].shape)
        of_gains = jnp.stack([jnp.asarray(g, jnp.result_type(float)) for g in gains])
        return {"images": ones[:, 0], "boxes": ones, "classes": jnp.ones(classes), "gains": of_gains}

    def lower_weights(x: Any, batch: Batch) -> dict[str, Array]:
        mine = {part: x[part][batch["row"]] if part in ("images", "boxes") else x[part] for part in parts}
        return {**plain_weights(batch, gains), **weights(mine)}

    def upper_weights(batch: Batch) -> dict[str, Array]:
        return plain_weights(batch, upper_gains)

    def clean_loss(y: PyTree, batch: Batch) -> Array:
        return weighted(y, batch, upper_weights(batch))

    def upper(x: Any, y: PyTree, batch: Batch) -> Array:
        return clean_loss(y, batch)

    def lower(x: Any, y: PyTree, batch: Batch) -> Array:
        loss = weighted(y, batch, lower_weights(x, batch))
        return loss + 0.5 * decay * optax.tree.norm(y, squared=True)

    def freeze(y: PyTree, batch: Batch) -> dict[str, Any]:
        predictions, routings = apply(y, batch["image"], train=True, return_routing=True)
        targets = task_aligned(predictions.scores, predictions.boxes, predictions.points, batch, topk=topk)
        index = {name: routing.index for name, routing in routings.items()}
        return lax.stop_gradient({**batch, "targets": targets, "routing": index})

    def frozen(y: PyTree, upper_batch: Batch, lower_batch: Batch) -> Problem:
        """`row`, which of the training images they are, is put in where the lower batch has none: all, in order."""
        rows = {"row": np.arange(len(lower_batch["mask"]), dtype=np.int32), **lower_batch}
        return dataclasses.replace(problem, upper_data=freeze(y, upper_batch), lower_data=freeze(y, rows))

    def detect(y: PyTree, images: Array, **options: Any) -> Detections:
        found = apply(y, images, train=True)
        return suppress(found.boxes, found.scores, **options)

    problem = Problem(
        upper=upper,
        lower=lower,
        upper_data=data.Minibatches(clean, min(batch, len(clean["mask"]))),
        lower_data=data.Minibatches({**train, "row": np.arange(n, dtype=np.int32)}, min(batch, n)),
    )
    shapes = {"images": (n,), "boxes": (n, most), "classes": (classes,), "gains": (3,)}
    x0 = {part: jnp.zeros(shapes[part]) for part in parts}
    metrics = {"loss": (lambda x, y, batch: clean_loss(y, batch), held)}
    return Trust(
        problem, x0, y0, metrics, apply=apply, weights=weights, detect=detect, freeze=freeze, frozen=frozen,
        loss=clean_loss, weighted=weighted, lower_weights=lower_weights, upper_weights=upper_weights, decay=decay,
    )  # fmt: skip


@hyperparameters
class FrozenUpper:
    """A solver whose upper batch has its targets and its routing frozen at the y with which each of its steps begins.

    Without it a solver that takes several lower steps before it looks above (`ITD`, `OneStep`) has the upper targets of
    the y that it arrives at. They are constants to its derivatives either way, but only frozen ones are those of a
    function of x, which differences can be taken of.

    Args:
        solver: of `bilevel.solvers`.
        freeze: `Trust.freeze`.
    """

    solver: Any
    freeze: Callable[[PyTree, Batch], Any]

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: Any) -> Any:
        """The solver's own start."""
        return self.solver.init(self._at(problem, y, key), x, y, key)

    def step(self, problem: Problem, state: Any, key: Any) -> Any:
        """The solver's step on the upper batch of this key, frozen."""
        return self.solver.step(self._at(problem, state.y, key), state, key)

    def _at(self, problem: Problem, y: PyTree, key: Any) -> Problem:
        batch = problem.sources[0].draw(data.as_step_key(key).fold_in(Draw.UPPER))
        return dataclasses.replace(problem, upper_data=self.freeze(y, batch))


@state
class Alternated:
    """x and y and the memories of their step rules."""

    x: PyTree
    y: PyTree
    memories: tuple[PyTree, PyTree]


@hyperparameters
class OneGradient:
    """T1-T2 for a `Trust`, one compiled gradient of the detector for both levels.

        g, F_y = f_y(x, y), F_y(y)          the same programme, first on a training batch and then on a clean one
        x <- upper_optimizer(-f_xy F_y)     f_xy v = d/dx of the derivative of f along v: one forward pass, and no HVP
        y <- lower_optimizer(g)

    Compiling is what a small detector costs: this is a quarter of what `solvers.T1T2` has to compile, which linearises
    the whole lower gradient. Everything is looked at in one y, so that targets and routing are frozen within a
    hypergradient.

    Args:
        app: the `Trust`; both levels have batches of one size, both frozen or neither.
        lower_optimizer, upper_optimizer: optax rules.

    Source: Luketina et al., ICML 2016 (T1-T2); Ren et al., ICML 2018.
    """

    app: Any
    lower_optimizer: Any
    upper_optimizer: Any

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: Any) -> Alternated:
        """The rules' own starts."""
        return Alternated(x, y, (self.upper_optimizer.init(x), self.lower_optimizer.init(y)))

    def step(self, problem: Problem, now: Alternated, key: Any) -> tuple[Alternated, dict[str, Array]]:
        """One step of x and one of y."""
        app, x, y, key = self.app, now.x, now.y, data.as_step_key(key)
        clean, train = (
            source.draw(key.fold_in(draw))
            for source, draw in zip(problem.sources, (Draw.UPPER, Draw.LOWER), strict=True)
        )
        if clean["mask"].shape != train["mask"].shape:
            raise ValueError(
                f"OneGradient takes batches of one size and at most as many boxes; the levels' masks are "
                f"{train['mask'].shape} and {clean['mask'].shape}. Change the batch size, or pad the boxes."
            )
        pairs = [
            ({name: leaf for name, leaf in batch.items() if name != "row"}, w)
            for batch, w in ((train, app.lower_weights(x, train)), (clean, app.upper_weights(clean)))
        ]
        if unlike := pairs[0][0].keys() ^ pairs[1][0].keys():
            raise ValueError(
                f"OneGradient runs one programme on both levels' batches, of which one alone has "
                f"{', '.join(sorted(unlike))}. Give both the same arrays (`Trust.frozen` freezes both)."
            )
        both = jax.tree.map(lambda a, b: jnp.stack([a, b]), *pairs)
        values, gradients = lax.map(lambda pair: jax.value_and_grad(app.weighted)(y, *pair), both)
        lower_y, v = (jax.tree.map(lambda a, i=i: a[i], gradients) for i in range(2))

        def along(x: PyTree) -> Array:
            return jax.jvp(lambda y: app.weighted(y, pairs[0][0], app.lower_weights(x, train)), (y,), (v,))[1]

        hypergradient = optax.tree.scale(-1.0, jax.grad(along)(x))
        lower_y = optax.tree.add_scale(lower_y, app.decay, y)
        of_x, x_memory = self.upper_optimizer.update(hypergradient, now.memories[0], x)
        of_y, y_memory = self.lower_optimizer.update(lower_y, now.memories[1], y)
        after = Alternated(optax.apply_updates(x, of_x), optax.apply_updates(y, of_y), (x_memory, y_memory))
        metrics = {"upper_loss": values[1], "hypergradient_norm": optax.tree.norm(hypergradient)}
        return after, {**metrics, "lower_residual": optax.tree.norm(lower_y)}


def checked(batch: Batch, classes: int, name: str = "batch") -> dict[str, np.ndarray]:
    """A set of annotated images as arrays, of which every annotation is one.

    Args:
        batch: "image" (n, H, W, 3), "boxes" (n, M, 4), "classes" (n, M), "mask" (n, M), and perhaps "crowd" (n, M): a
            box around many is no example of one, and its mask is set to False (`average_precision` asks for it).
        classes: how many there are.
        name: of the set, for errors.

    Raises:
        ValueError: an array is missing or of another shape; pixels outside 0..1; a box with swapped corners or outside
            of the image, a number that is not finite, or an unknown class. The image and the row are said.
    """
    missing = [key for key in ARRAYS if key not in batch]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}; it needs {', '.join(ARRAYS)}.")
    image, boxes, labels, mask = (np.asarray(batch[key]) for key in ARRAYS)
    n, most = boxes.shape[:2] if boxes.ndim == 3 else (-1, -1)
    if image.ndim != 4 or image.shape[-1] != 3 or len(image) != n or boxes.shape != (n, most, 4) or not n:
        raise ValueError(
            f"{name} has images of shape {image.shape} and boxes of shape {boxes.shape}; (n, height, width, 3) and "
            "(n, M, 4) were expected, n at least 1."
        )
    if labels.shape != (n, most) or mask.shape != (n, most):
        raise ValueError(
            f"{name} has classes of shape {labels.shape} and a mask of shape {mask.shape}; both should be {(n, most)}."
        )
    if mask.dtype != bool or labels.dtype.kind not in "iu":
        raise ValueError(f"{name}: the mask is {mask.dtype} and classes are {labels.dtype}; give bool and integers.")
    if image.dtype.kind != "f" or not np.isfinite(image).all() or image.min() < 0 or image.max() > 1:
        raise ValueError(f"{name}: images are floats between 0 and 1; divide bytes by 255.")
    if "crowd" in batch:
        crowd = np.asarray(batch["crowd"])
        if crowd.shape != mask.shape or crowd.dtype != bool:
            raise ValueError(
                f"{name} has crowds of {crowd.dtype}{list(crowd.shape)}; bool of {list(mask.shape)} is needed."
            )
        mask = mask & ~crowd
    height, width = image.shape[1:3]
    faults = {
        "a number that is not finite": ~np.isfinite(boxes).all(-1),
        "swapped corners (x1 <= x2 and y1 <= y2 are asked for)": (boxes[..., 2:] < boxes[..., :2]).any(-1),
        f"a place outside of the image of {width} x {height} pixels": (
            (boxes < -0.5).any(-1) | (boxes[..., 2] > width + 0.5) | (boxes[..., 3] > height + 0.5)
        ),
        f"a class that is none of 0 to {classes - 1}": (labels < 0) | (labels >= classes),
    }
    for fault, where in faults.items():
        found = np.argwhere(where & mask)
        if len(found):
            i, j = found[0]
            raise ValueError(
                f"{name}: box {j} of image {i}, {boxes[i, j].tolist()} of class {labels[i, j]}, has {fault}"
                f"{f'; so have {len(found) - 1} more' if len(found) > 1 else ''}. Mend it, or set its mask to False."
            )
    boxes = boxes if boxes.dtype.kind == "f" else boxes.astype(np.float32)
    return {
        "image": image,
        "boxes": np.where(mask[..., None], boxes, np.zeros((), boxes.dtype)),
        "classes": np.where(mask, labels, 0).astype(np.int32),
        "mask": mask,
    }
