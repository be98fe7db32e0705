"""Scenes made of real items on a canvas, annotated exactly: photographs of clothes, or handwritten digits.

What is seen is real, where it stands is drawn: no set of annotated photographs is to be had offline.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from bilevel import datasets
from bilevel.applications.detection.matching import covered, overlaps

Batch = dict[str, np.ndarray]

FASHION = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
"""The classes of Fashion-MNIST."""

INK = 0.15
"""From here on a pixel of an item belongs to it: what its box is drawn around."""


class Items(NamedTuple):
    """Things to put into scenes.

    Attributes:
        images: (n, rows, columns) in 0..1, 0 being no item.
        labels: their classes, int32 (n,), from 0.
        names: of the classes.
    """

    images: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]

    def only(self, classes: Sequence[int]) -> Items:
        """The items of these classes, which are numbered anew in the order given.

        Raises:
            ValueError: a class that there is none of, or one twice.
        """
        wrong = [c for c in classes if not 0 <= c < len(self.names)]
        if wrong or len(set(classes)) != len(classes) or not len(classes):
            raise ValueError(
                f"classes={tuple(classes)} was given; give different numbers from 0 to {len(self.names) - 1}: "
                f"{', '.join(f'{k} {name}' for k, name in enumerate(self.names))}."
            )
        number = np.full(len(self.names), -1, np.int32)
        number[list(classes)] = np.arange(len(classes))
        rows = number[self.labels] >= 0
        return Items(self.images[rows], number[self.labels[rows]], tuple(self.names[c] for c in classes))


def fashion_items(
    classes: Sequence[int] | None = None, split: str = "train", path: str | os.PathLike[str] | None = None
) -> Items:
    """The clothes of Fashion-MNIST (28 x 28).

    Args:
        classes: which, by their place in `FASHION`; None: all ten.
        split: "train" or "test".
        path: see `datasets.fashion_mnist`.
    """
    images, labels = datasets.fashion_mnist(split, path)
    items = Items(images.astype(np.float32) / 255, labels, FASHION)
    return items if classes is None else items.only(classes)


def digit_items(
    classes: Sequence[int] | None = None, split: str = "train", path: str | os.PathLike[str] | None = None
) -> Items:
    """scikit-learn's handwritten digits (8 x 8): the first 1,297 to train on, the other 500 for a test.

    Args:
        classes: which; None: all ten.
        split: "train" or "test".
        path: see `datasets.digits`.

    Raises:
        ValueError: `split` is neither of the two.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} was given; the digits have 'train' and 'test'. Use one of the two.")
    images, labels = datasets.digits(path)
    rows = slice(1297) if split == "train" else slice(1297, None)
    items = Items(images[rows].reshape(-1, 8, 8) / 16, labels[rows], tuple("0123456789"))
    return items if classes is None else items.only(classes)


def scenes(
    items: Items,
    n: int,
    *,
    seed: int,
    size: int = 64,
    objects: tuple[int, int] = (1, 3),
    sides: tuple[float, float] = (0.25, 0.5),
    clutter: int = 6,
    overlap: float = 0.2,
) -> Batch:
    """Scenes of a few items each over scraps of others, with their boxes.

    An item is cut to its ink, scaled, tinted at random (so that colour says nothing of the class) and laid over a
    shaded, noisy ground; scraps are pieces of items without a box, at half the contrast.

    Args:
        items: what to draw from; other items for a test set, so that nothing is seen twice.
        n: the number of scenes.
        seed: of all draws; equal seeds give equal scenes.
        size: of the square canvas, in pixels.
        objects: the fewest and the most of them. Where no place is left there are fewer, but one at least.
        sides: the longer side of an item as a share of the canvas, from and to.
        clutter: scraps per scene.
        overlap: the largest share of an item that another one may cover.

    Returns:
        "image" float32 (n, size, size, 3) in 0..1, "boxes" float32 (n, M, 4), x1, y1, x2, y2 in pixels, "classes" int32
        (n, M), "mask" bool (n, M), false where there is no object; M = objects[1].

    Raises:
        ValueError: an argument out of its range.
    """
    _check(items, size, n)
    if not 1 <= objects[0] <= objects[1]:
        raise ValueError(f"objects={objects} was given; it is the fewest and the most objects, 1 at least.")
    if not 0 < sides[0] <= sides[1] <= 1:
        raise ValueError(f"sides={sides} was given; it is a range of shares of the canvas, within 0 to 1.")
    rng = np.random.default_rng(seed)
    batch = _blank(n, objects[1], size)
    for k in range(n):
        canvas = _ground(rng, size)
        _scraps(canvas, items, clutter, rng)
        placed = np.zeros((0, 4))
        for _ in range(int(rng.integers(objects[0], objects[1] + 1))):
            which = int(rng.integers(len(items.labels)))
            item = _scaled(items.images[which], rng.uniform(*sides) * size)
            for _ in range(30):
                x, y = (int(rng.integers(0, size - side + 1)) for side in item.shape[::-1])
                box = np.array([[x, y, x + item.shape[1], y + item.shape[0]]], float)
                if not len(placed) or max(covered(placed, box).max(), covered(box, placed).max()) <= overlap:
                    break
            else:
                continue
            _paste(canvas, item, x, y, _tint(rng))
            row = len(placed)
            batch["boxes"][k, row], batch["classes"][k, row], batch["mask"][k, row] = box[0], items.labels[which], True
            placed = np.concatenate([placed, box])
        batch["image"][k] = _noisy(canvas, rng)
    return batch


class Corruption(NamedTuple):
    """What `corrupt` changed.

    Attributes:
        labels: (n, M), true where a class is wrong now.
        boxes: (n, M), true where a box is wrong now.
    """

    labels: np.ndarray
    boxes: np.ndarray

    @property
    def any(self) -> np.ndarray:
        """Where anything is wrong, (n, M)."""
        return self.labels | self.boxes

    @property
    def images(self) -> np.ndarray:
        """The images with anything wrong, (n,)."""
        return np.asarray(self.any.any(1))


def corrupt(
    batch: Batch,
    rate: float,
    classes: int,
    *,
    seed: int,
    by: Literal["image", "box"] = "image",
    labels: bool = True,
    boxes: bool = True,
    overlap: float = 0.5,
) -> tuple[Batch, Corruption]:
    """Spoil a share of the annotations; images stay as they are.

    A spoilt class is another one, uniformly. A spoilt box is moved and stretched within the image until its
    intersection over union with the true one is below `overlap`.

    Args:
        batch: "image", "boxes", "classes", "mask", and whatever else, which is kept.
        rate: the share to spoil, 0 to 1: exactly `round(rate * count)` images that have a box, or boxes.
        classes: the number of classes.
        seed: of the draws.
        by: whether all boxes of an image are spoilt or none ("image"), or each by itself ("box").
        labels, boxes: what is spoilt.
        overlap: see above; above 0.

    Returns:
        The batch with new "boxes" and "classes", and what is wrong in them.

    Raises:
        ValueError: an argument out of its range.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate={rate} was given; the share of spoilt annotations lies between 0 and 1.")
    if by not in ("image", "box"):
        raise ValueError(f"by={by!r} was given; annotations are spoilt by 'image' or by 'box'.")
    if not 0 < overlap <= 1:
        raise ValueError(f"overlap={overlap} was given; it lies above 0 and is 1 at most.")
    rng = np.random.default_rng(seed)
    mask, height, width = np.asarray(batch["mask"], bool), *np.shape(batch["image"])[1:3]
    units = np.flatnonzero(mask.any(1) if by == "image" else mask)
    chosen = rng.permutation(units)[: round(rate * len(units))]
    spoilt = np.zeros(mask.shape if by == "box" else len(mask), bool)
    spoilt.flat[chosen] = True
    spoilt = mask & (spoilt if by == "box" else spoilt[:, None])
    new_classes, new_boxes = np.array(batch["classes"]), np.array(batch["boxes"])
    if labels and spoilt.any():
        new_classes[spoilt], _ = datasets.corrupt_labels(new_classes[spoilt], 1.0, classes, int(rng.integers(2**31)))
    if boxes:
        for row in zip(*np.nonzero(spoilt), strict=True):
            new_boxes[row] = _misplaced(new_boxes[row], width, height, overlap, rng)
    nothing = np.zeros_like(spoilt)
    return {**batch, "classes": new_classes, "boxes": new_boxes}, Corruption(
        spoilt if labels else nothing, spoilt if boxes else nothing
    )


class Behaviour(NamedTuple):
    """A state of an identity, and how it shows.

    Attributes:
        name: in a word or two.
        sign: the class of the item that is held.
        swing: how often per frame it moves to and fro; 0: it is held still.
    """

    name: str
    sign: int
    swing: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Film:
    """Moving scenes with P identities over T frames.

    Attributes:
        image: float32 (T, size, size, 3) in 0..1.
        boxes: of the persons, float32 (T, P, 4).
        mask: whether a person can be seen, (T, P): it is there, and not hidden by nearer ones.
        behaviour: numbers of the behaviours, int32 (T, P); also of those that can't be seen.
        sign_boxes: of what they hold, float32 (T, P, 4).
        signs: its class, int32 (T, P).
        sign_mask: whether it can be seen, (T, P).
        behaviours: all that there are.
    """

    image: np.ndarray
    boxes: np.ndarray
    mask: np.ndarray
    behaviour: np.ndarray
    sign_boxes: np.ndarray
    signs: np.ndarray
    sign_mask: np.ndarray
    behaviours: tuple[Behaviour, ...]

    def __repr__(self) -> str:
        frames, persons = self.mask.shape
        names = ", ".join(each.name for each in self.behaviours)
        return f"Film({frames} frames of {self.image.shape[1]} pixels, {persons} identities; {names})"

    def batch(self) -> Batch:
        """Its frames for a detector: class 0 is a person, 1 + k a sign of class k; M = 2 P."""
        return {
            "image": self.image,
            "boxes": np.concatenate([self.boxes, self.sign_boxes], 1),
            "classes": np.concatenate([np.zeros_like(self.signs), 1 + self.signs], 1),
            "mask": np.concatenate([self.mask, self.sign_mask], 1),
        }

    def truth(self) -> list[Batch]:
        """For each frame the persons who can be seen: "boxes", "ids" (from 1) and "labels", their behaviours."""
        return [
            {"boxes": boxes[seen], "ids": 1 + np.flatnonzero(seen), "labels": doing[seen]}
            for boxes, seen, doing in zip(self.boxes, self.mask, self.behaviour, strict=True)
        ]


def moving_scenes(
    bodies: Items,
    signs: Items,
    behaviours: Sequence[Behaviour],
    *,
    seed: int,
    frames: int = 60,
    size: int = 96,
    identities: int = 4,
    sides: tuple[float, float] = (0.28, 0.38),
    held: float = 0.5,
    speed: float = 0.012,
    dwell: float = 20.0,
    hidden: float = 0.25,
    clutter: int = 6,
) -> Film:
    """A film of persons who walk about and do one thing after the other.

    A person is one item with one tint, the same in all frames, that walks at nearly constant velocity and turns at the
    border; nearer ones (lower on the canvas) hide those behind. What a person does shows by what it holds in front of
    it, an item of the behaviour's class on a dark plate, and by how that moves. Some persons come late, some go early.

    Args:
        bodies: the persons' items.
        signs: what they hold, its classes being those of `behaviours`.
        behaviours: at least two.
        seed: of all draws.
        frames: T.
        size: of the square canvas, in pixels.
        identities: P.
        sides: the longer side of a person as a share of the canvas, from and to.
        held: the longer side of a sign as a share of the person's.
        speed: mean length of a step, as a share of the canvas.
        dwell: frames that a behaviour lasts on average (at least a quarter of that).
        hidden: the chance that a sign is not shown in a frame.
        clutter: scraps on the ground.

    Raises:
        ValueError: an argument out of its range, a behaviour whose sign there is no item of.
    """
    _check(bodies, size, frames)
    _check(signs, size, frames)
    if not (0 < sides[0] <= sides[1] <= 1 and 0 < held <= 1):
        raise ValueError(
            f"sides={sides} and held={held} were given; shares lie above 0 and are 1 at most, from and to."
        )
    if identities < 1 or not 0 <= hidden < 1 or dwell < 1 or speed < 0:
        raise ValueError(
            f"identities={identities}, hidden={hidden}, dwell={dwell} and speed={speed} were given; expected are 1 at "
            "least, a chance below 1, 1 at least, and no negative speed."
        )
    lacking = [each for each in behaviours if each.sign not in signs.labels]
    if len(behaviours) < 2 or lacking:
        what = (
            f"there is no item of the class {lacking[0].sign} for {lacking[0].name!r}"
            if lacking
            else "give two or more"
        )
        raise ValueError(f"behaviours of the names {[each.name for each in behaviours]}: {what}.")
    rng = np.random.default_rng(seed)
    blank = lambda kind, *rest: np.zeros((frames, identities, *rest), kind)  # noqa: E731
    film = Film(
        image=np.zeros((frames, size, size, 3), np.float32),
        boxes=blank(np.float32, 4),
        mask=blank(bool),
        behaviour=blank(np.int32),
        sign_boxes=blank(np.float32, 4),
        signs=blank(np.int32),
        sign_mask=blank(bool),
        behaviours=tuple(behaviours),
    )
    ground = _ground(rng, size)
    _scraps(ground, signs, clutter, rng)
    people = [_Person.draw(rng, bodies, signs, film, sides, held, speed, dwell) for _ in range(identities)]
    film.behaviour[:] = np.stack([person.doing for person in people], 1)
    for t in range(frames):
        canvas = ground.copy()
        there = [k for k, person in enumerate(people) if person.first <= t < person.last]
        for k in sorted(there, key=lambda k: people[k].path[t, 1] + len(people[k].body)):  # the nearest is painted last
            people[k].paint(canvas, film, t, k, rng, rng.random() < hidden)
        film.image[t] = _noisy(canvas, rng)
    return film


class _Person(NamedTuple):
    """One identity: its looks, its path and what it does."""

    body: np.ndarray
    colour: np.ndarray
    signs: list[np.ndarray]  # one for each behaviour
    sign_colour: np.ndarray
    path: np.ndarray  # (T, 2), where the body begins
    doing: np.ndarray  # (T,)
    phase: float
    first: int
    last: int

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        bodies: Items,
        signs: Items,
        film: Film,
        sides: tuple[float, float],
        held: float,
        speed: float,
        dwell: float,
    ) -> _Person:
        """Choose its looks, and draw its path and what it does."""
        frames, size = film.image.shape[:2]
        body = _scaled(bodies.images[rng.integers(len(bodies.labels))], rng.uniform(*sides) * size)
        chosen = [rng.choice(np.flatnonzero(signs.labels == each.sign)) for each in film.behaviours]
        items = [_scaled(signs.images[which], held * max(body.shape)) for which in chosen]
        border = np.array([size - body.shape[1], size - body.shape[0]], float)
        angle = rng.uniform(0, 2 * np.pi)
        place, velocity = rng.uniform(0, border), speed * size * np.array([np.cos(angle), np.sin(angle)])
        path = np.zeros((frames, 2))
        for t in range(frames):
            path[t] = place
            place = place + velocity
            velocity = np.where((place < 0) | (place > border), -velocity, velocity) + rng.normal(
                0, 0.1 * speed * size, 2
            )
            velocity *= min(1, 2 * speed * size / max(np.hypot(*velocity), 1e-9))
            place = np.clip(place, 0, border)
        doing, left = np.zeros(frames, np.int32), 0.0
        for t in range(frames):
            if left <= 0:
                others = np.arange(len(film.behaviours))
                doing[t] = rng.choice(others if t == 0 else others[others != doing[t - 1]])
                left = max(dwell / 4, rng.exponential(dwell * 0.75) + dwell / 4)
            else:
                doing[t] = doing[t - 1]
            left -= 1
        late, early = rng.random(2) < 0.25
        first = int(rng.integers(frames // 6, frames // 3 + 1)) if late else 0
        last = frames - int(rng.integers(frames // 6, frames // 3 + 1)) if early else frames
        return cls(body, _tint(rng), items, _tint(rng), path, doing, rng.uniform(0, 1), first, last)

    def paint(self, canvas: np.ndarray, film: Film, t: int, k: int, rng: np.random.Generator, hidden: bool) -> None:
        """Draw this person over the canvas, and write down what can be seen of it and no more of those behind."""
        size = len(canvas)
        x, y = (int(v) for v in np.round(self.path[t]))
        box = np.array([x, y, x + self.body.shape[1], y + self.body.shape[0]], np.float32)
        _paste(canvas, self.body, x, y, self.colour * np.float32(rng.uniform(0.9, 1)))
        film.boxes[t, k], film.mask[t, k] = box, True
        behaviour, sign = film.behaviours[self.doing[t]], self.signs[self.doing[t]]
        room = max(0, self.body.shape[1] - sign.shape[1] - 2)
        swing = np.sin(2 * np.pi * (behaviour.swing * t + self.phase)) if behaviour.swing else 0.0
        left = int(np.clip(x + 1 + round(room / 2 * (1 + swing)), 0, size - sign.shape[1]))
        top = int(np.clip(y + 0.9 * (self.body.shape[0] - sign.shape[0]), 0, size - sign.shape[0]))
        held = np.array([left, top, left + sign.shape[1], top + sign.shape[0]], np.float32)
        film.sign_boxes[t, k], film.signs[t, k], film.sign_mask[t, k] = held, behaviour.sign, not hidden
        if not hidden:
            plate = np.full([side + 2 for side in sign.shape], 0.85, np.float32)
            _paste(canvas, plate, left - 1, top - 1, np.full(3, 0.05, np.float32))
            _paste(canvas, sign, left, top, self.sign_colour)
        for mask, boxes in ((film.mask, film.boxes), (film.sign_mask, film.sign_boxes)):
            behind = np.arange(len(mask[t])) != k
            gone = covered(boxes[t], box[None])[:, 0] > 0.6
            mask[t] &= ~(behind & gone)


def _misplaced(box: np.ndarray, width: int, height: int, overlap: float, rng: np.random.Generator) -> np.ndarray:
    """A box like this one elsewhere; by and by anywhere and of any size, since a box may fill its image."""
    limits = np.array([width, height], float)
    side = box[2:] - box[:2]
    for attempt in range(10_000):
        if attempt < 50:
            sides = np.clip(side * np.exp(rng.uniform(-0.5, 0.5, 2)), np.minimum(2, limits), limits)
            centre = (box[:2] + box[2:]) / 2 + rng.uniform(-1, 1, 2) * side
        else:
            sides, centre = rng.uniform(0.1, 0.6, 2) * limits, rng.uniform(0, 1, 2) * limits
        corner = np.clip(centre - sides / 2, 0, limits - sides)
        new = np.concatenate([corner, corner + sides]).astype(box.dtype)
        if overlaps(new, box)[0, 0] < overlap:
            return new
    raise ValueError(f"No box of a {width} x {height} image overlaps {box.tolist()} by less than {overlap}: raise it.")


def _check(items: Items, size: int, n: int) -> None:
    if not len(items.images) or len(items.images) != len(items.labels):
        raise ValueError(
            f"items: {len(items.images)} images and {len(items.labels)} labels; give as many, one at least."
        )
    if n < 1 or size < 16:
        raise ValueError(f"n={n} and size={size} were given; one scene and 16 pixels are the least.")


def _blank(n: int, most: int, size: int) -> Batch:
    return {
        "image": np.zeros((n, size, size, 3), np.float32),
        "boxes": np.zeros((n, most, 4), np.float32),
        "classes": np.zeros((n, most), np.int32),
        "mask": np.zeros((n, most), bool),
    }


def _ground(rng: np.random.Generator, size: int) -> np.ndarray:
    """A ground of one colour, shaded in a random direction."""
    angle, line = rng.uniform(0, 2 * np.pi), np.linspace(-0.5, 0.5, size)
    shade = np.cos(angle) * line[:, None] + np.sin(angle) * line[None, :]
    return np.clip(rng.uniform(0.1, 0.35, 3) + rng.uniform(0, 0.25) * shade[..., None], 0, 1).astype(np.float32)


def _noisy(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(canvas + rng.normal(0, 0.02, canvas.shape).astype(np.float32), 0, 1)


def _tint(rng: np.random.Generator) -> np.ndarray:
    """A light colour: the brightest channel is 1."""
    colour = rng.uniform(0.4, 1, 3)
    return (colour / colour.max()).astype(np.float32)


def _scraps(canvas: np.ndarray, items: Items, count: int, rng: np.random.Generator) -> None:
    """Pieces of items, a third to a half of one each way, at half the contrast."""
    size = len(canvas)
    for _ in range(count):
        image = items.images[rng.integers(len(items.labels))]
        part = [max(2, round(rng.uniform(0.3, 0.5) * side)) for side in image.shape]
        y, x = (int(rng.integers(0, side - p + 1)) for side, p in zip(image.shape, part, strict=True))
        piece = _resized(image[y : y + part[0], x : x + part[1]], *(max(3, size // 8),) * 2)
        at = rng.integers(0, size - len(piece) + 1, 2)
        _paste(canvas, 0.5 * piece, int(at[0]), int(at[1]), _tint(rng))


def _paste(canvas: np.ndarray, item: np.ndarray, x: int, y: int, colour: np.ndarray) -> None:
    """Lay an item over the canvas, its ink being how much of the ground it hides; what is outside is cut."""
    rows, columns = (
        slice(max(0, low), max(0, min(limit, low + side)))
        for low, side, limit in zip((y, x), item.shape, canvas.shape, strict=False)
    )
    ink = item[rows.start - y : rows.stop - y, columns.start - x : columns.stop - x, None]
    canvas[rows, columns] = canvas[rows, columns] * (1 - ink) + ink * colour


def _scaled(image: np.ndarray, longest: float) -> np.ndarray:
    """An item cut to its ink, whose darkest becomes 1, its longer side scaled to this many pixels."""
    inside = image > min(INK, 0.5 * float(image.max()))
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    cut = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else image
    cut = cut / max(float(cut.max()), INK)
    factor = longest / max(cut.shape)
    return _resized(cut, *(max(2, round(factor * side)) for side in cut.shape))


def _resized(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Linear interpolation, smoothed where the image shrinks."""
    return (_weights(len(image), rows) @ image @ _weights(image.shape[1], columns).T).astype(np.float32)


def _weights(before: int, after: int) -> np.ndarray:
    """A triangle around the place of each new pixel, as wide as two old ones or two new ones; rows sum to 1."""
    centre = (np.arange(after)[:, None] + 0.5) * before / after - 0.5
    distance = np.abs(centre - np.arange(before)) / max(1.0, before / after)
    weights = np.clip(1 - distance, 0, None)
    return weights / weights.sum(1, keepdims=True)
