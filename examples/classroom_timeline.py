"""Who does what in a classroom: detection, tracking, and the fusion of what three models say over each track.

A film of "pupils" (clothes of Fashion-MNIST that walk about) who hold up what they do: a bag that is still is reading,
one that swings is writing, a boot is raising the hand, trousers are talking. A quarter of the time it is hidden.

1. A nano detector with routed attention finds persons and signs in each frame, trained on other films.
2. `follow` makes tracks of the persons; a small network reads clips of six frames along a track, the only one that can
   tell swinging from still.
3. `Fusion` gives signs to persons and smooths the scores of both models over each track.

Printed: the detector's mAP, MOTA and IDF1 of the tracks, and for each identity the share of frames with the right
behaviour: from the boxes of each frame alone, from the clips alone, and fused. Picture: frames with their tracks, and a
timeline of behaviours for each identity.

    python examples/classroom_timeline.py
    python examples/classroom_timeline.py --steps 200 --films 1
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from bilevel.applications.detection import (
    Behaviour,
    Clip,
    Fusion,
    average_precision,
    bgf_nano,
    by_identity,
    fashion_items,
    flip,
    follow,
    jitter,
    loss,
    moving_scenes,
    of_classes,
    suppress,
    track_scores,
)
from bilevel.integrations.flax import from_nnx

BODIES, SIGNS = (0, 2, 4, 6), (1, 8, 9)  # T-shirt, pullover, coat and shirt; trousers, bag and boot
BEHAVIOURS = (
    Behaviour("reading", 1),
    Behaviour("writing", 1, 0.21),
    Behaviour("raising hand", 2),
    Behaviour("talking", 0),
)
CLASSES = 1 + len(SIGNS)
CROP, LENGTH = 16, 6  # side of a crop, frames of a clip

# Which behaviours a sign may mean, (signs, behaviours): a bag is reading or writing.
MEANING = np.array([[each.sign == sign for each in BEHAVIOURS] for sign in range(len(SIGNS))], float)


def films(count, seed, split, size, frames):
    bodies, signs = fashion_items(BODIES, split), fashion_items(SIGNS, split)
    looks = {"size": size, "frames": frames, "identities": 3, "sides": (0.38, 0.48), "held": 0.55}
    return [moving_scenes(bodies, signs, BEHAVIOURS, seed=seed + k, **looks) for k in range(count)]


def train_detector(arrays, steps, batch, seed):
    """The nano detector on single frames, by Adam with a falling step; the whole run is one compiled loop."""
    size = arrays["image"].shape[1]
    y, apply = from_nnx(bgf_nano(CLASSES, image=size, rngs=nnx.Rngs(seed)))
    rule = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(4e-3, steps)))

    @jax.jit
    def run(y, arrays, key):
        def step(carry, key):
            y, memory = carry
            of_rows, of_flip, of_jitter = jax.random.split(key, 3)
            rows = jax.random.randint(of_rows, (batch,), 0, len(arrays["image"]))
            drawn = jitter(flip({name: leaf[rows] for name, leaf in arrays.items()}, of_flip), of_jitter)
            value, gradient = jax.value_and_grad(lambda y: loss(apply(y, drawn["image"]), drawn).total / batch)(y)
            updates, memory = rule.update(gradient, memory, y)
            return (optax.apply_updates(y, updates), memory), value

        (y, _), values = jax.lax.scan(step, (y, rule.init(y)), jax.random.split(key, steps))
        return y, values

    y, values = run(y, arrays, jax.random.key(seed))
    return y, apply, np.asarray(values)


def make_detect(apply):
    """Boxes of each frame by their best class, with the scores of all classes at their anchors, "every"."""

    @jax.jit
    def detect(y, images):
        said = apply(y, images)
        found = suppress(said.boxes, said.scores, confidence=0.05, most=20, candidates=100, across_classes=True)
        every = jnp.take_along_axis(said.scores, found.anchors[..., None], 1)
        return {name: getattr(found, name) for name in ("boxes", "scores", "classes", "mask")} | {"every": every}

    def all_frames(y, images):
        parts = [detect(y, jnp.asarray(images[k : k + 20])) for k in range(0, len(images), 20)]
        return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}

    return all_frames


@jax.jit
def crops(images, boxes):
    """What is in one box of each of n images, scaled to CROP x CROP: (n, CROP, CROP, 3)."""

    def one(image, box):
        scale = CROP / jnp.maximum(box[2:] - box[:2], 1.0)
        shape = (CROP, CROP, 3)
        return jax.image.scale_and_translate(image, shape, (0, 1), scale[::-1], -(box[:2] * scale)[::-1], "linear")

    return jax.vmap(one)(images, boxes)


def clip_features(images, boxes):
    """Clips (n, LENGTH, ...) of crops: their means and, for what moves, their deviations over the frames."""
    n = len(boxes)
    if not n:
        return np.zeros((0, 2 * CROP * CROP * 3), np.float32)
    flat = np.asarray(crops(images.reshape(-1, *images.shape[2:]), boxes.reshape(-1, 4)))
    clip = flat.reshape(n, LENGTH, -1)
    return np.concatenate([clip.mean(1), 3 * clip.std(1)], 1)


def clips_of_truth(film, rng):
    """Clips around persons who do one thing for LENGTH frames, their boxes a little off; with that behaviour."""
    starts, whom = [], []
    for start in range(0, len(film.image) - LENGTH + 1, 3):
        span = slice(start, start + LENGTH)
        same = film.mask[span].all(0) & (film.behaviour[span] == film.behaviour[start]).all(0)
        starts += [start] * same.sum()
        whom += np.flatnonzero(same).tolist()
    rows = np.array(starts)[:, None] + np.arange(LENGTH)
    boxes = film.boxes[rows, np.array(whom)[:, None]]
    boxes = boxes + rng.normal(0, 1, boxes.shape).astype(np.float32)
    return clip_features(film.image[rows], boxes), film.behaviour[rows[:, 0], whom]


def train_clips(features, labels, steps, seed):
    """A network of one hidden layer over the features of clips; returns a function to probabilities."""
    mean, deviation = features.mean(0), features.std(0) + 1e-2
    a, b = jax.random.split(jax.random.key(seed))
    weights = {
        "in": jax.random.normal(a, (features.shape[1], 48)) / np.sqrt(features.shape[1]),
        "out": jax.random.normal(b, (48, len(BEHAVIOURS))) / np.sqrt(48),
        "bias": jnp.zeros(48),
    }
    rule = optax.adamw(2e-3, weight_decay=3e-2)
    logits = lambda w, x: jax.nn.relu((x - mean) / deviation @ w["in"] + w["bias"]) @ w["out"]

    @jax.jit
    def run(weights, features, labels, key):
        def step(carry, key):
            w, memory = carry
            rows = jax.random.randint(key, (64,), 0, len(labels))
            cost = lambda w: optax.softmax_cross_entropy_with_integer_labels(
                logits(w, features[rows]), labels[rows]
            ).mean()
            updates, memory = rule.update(jax.grad(cost)(w), memory, w)
            return (optax.apply_updates(w, updates), memory), None

        return jax.lax.scan(step, (weights, rule.init(weights)), jax.random.split(key, steps))[0][0]

    weights = run(weights, features, labels, jax.random.key(seed + 1))
    return lambda x: np.asarray(jax.nn.softmax(logits(weights, x)))


def clips_of_tracks(film, tracks, judge):
    """What the clip network says of each track that is seen in all frames of a clip; clips overlap by half."""
    found = []
    for start in range(0, len(film.image) - LENGTH + 1, LENGTH // 2):
        frames = [
            dict(zip(frame["ids"].tolist(), frame["boxes"], strict=True)) for frame in tracks[start : start + LENGTH]
        ]
        ids = sorted(set.intersection(*(set(frame) for frame in frames)))
        if ids:
            boxes = np.array([[frame[name] for frame in frames] for name in ids], np.float32)
            images = np.broadcast_to(
                film.image[start : start + LENGTH], (len(ids), *film.image[start : start + LENGTH].shape)
            )
            found.append(Clip(start, start + LENGTH, np.array(ids), judge(clip_features(images, boxes))))
    return found


def signs_of(found):
    """Frame by frame the boxes of signs, with scores of the behaviours that each may mean."""
    frames = []
    for boxes, classes, mask, every in zip(*(found[n] for n in ("boxes", "classes", "mask", "every")), strict=True):
        rows = mask & (classes > 0)
        frames.append({"boxes": boxes[rows], "scores": every[rows][:, 1:] @ (MEANING / MEANING.sum(1, keepdims=True))})
    return frames


WAYS = {
    "boxes, frame by frame": Fusion(rate=1.0, clip_weight=0.0),
    "boxes, smoothed": Fusion(rate=0.5, clip_weight=0.0),
    "clips, frame by frame": Fusion(rate=1.0, box_weight=0.0),
    "both, frame by frame": Fusion(rate=1.0),
    "fused": Fusion(rate=0.5),
}


def analyse(film, y, detect, judge):
    """Detections, tracks, and the behaviours by each way."""
    found = detect(y, film.image)
    persons = of_classes(found, [0])
    tracks = follow(persons)
    clips = clips_of_tracks(film, tracks, judge)
    said = {name: way(tracks, signs_of(found), len(BEHAVIOURS), clips) for name, way in WAYS.items()}
    return found, tracks, said


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=int, default=3, help="films to look at")
    parser.add_argument("--frames", type=int, default=60, help="of each")
    parser.add_argument("--train", type=int, default=30, help="films to train on")
    parser.add_argument("--size", type=int, default=64, help="of a frame, in pixels; divisible by 32")
    parser.add_argument("--steps", type=int, default=600, help="of the detector's training")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("classroom_timeline.png"))
    args = parser.parse_args(argv)
    began = time.perf_counter()

    training = films(args.train, 1000 + args.seed, "train", args.size, args.frames)
    parts = [film.batch() for film in training]
    arrays = {name: jnp.asarray(np.concatenate([part[name][::3] for part in parts])) for name in parts[0]}
    y, apply, losses = train_detector(arrays, args.steps, args.batch, args.seed)
    print(
        f"detector: {sum(map(np.size, jax.tree.leaves(y))):,} parameters, {len(arrays['image'])} frames, loss "
        f"{losses[:20].mean():.2f} -> {losses[-20:].mean():.2f}; {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    rng = np.random.default_rng(args.seed)
    clips = [clips_of_truth(film, rng) for film in training]
    held = max(1, len(clips) // 8)  # films that the clip network is not trained on
    seen, unseen = (map(np.concatenate, zip(*part, strict=True)) for part in (clips[held:], clips[:held]))
    judge = train_clips(*seen, 300, args.seed)
    features, labels = unseen
    right = (judge(features).argmax(1) == labels).mean()
    print(
        f"clips: {right:.3f} of {len(labels)} from {held} other films are right; {time.perf_counter() - began:.0f} s",
        flush=True,
    )

    detect = make_detect(apply)
    tests = films(args.films, 1 + args.seed, "test", args.size, args.frames)
    rows = []
    for number, film in enumerate(tests):
        found, tracks, said = analyse(film, y, detect, judge)
        precision, scores = average_precision(found, film.batch()), track_scores(tracks, film.truth())
        print(
            f"film {number}: mAP@.5 {precision.at_50:.3f}, @.5:.95 {precision.at_50_95:.3f}; MOTA {scores.mota:.3f}, "
            f"IDF1 {scores.idf1:.3f}, {scores.switches} switches"
        )
        lines = {name: by_identity(tracks, each, film.truth()) for name, each in said.items()}
        if number == 0:
            first = film, found, tracks, said["fused"], lines
        for person in lines["fused"]:
            rows.append({name: each[person].accuracy for name, each in lines.items()})
            print(f"  identity {person}: " + ", ".join(f"{name} {value:.2f}" for name, value in rows[-1].items()))
    print(f"right frames by identity, mean over {len(rows)} identities (standard error)")
    means = {}
    for name in WAYS:
        values = np.array([row[name] for row in rows])
        means[name] = values.mean()
        print(f"  {name:<22} {values.mean():.3f} ({values.std(ddof=1) / np.sqrt(len(values)):.3f})")
    gain = np.array([row["fused"] - row["boxes, frame by frame"] for row in rows])
    print(f"  fused minus frame by frame: {gain.mean():+.3f} ({gain.std(ddof=1) / np.sqrt(len(gain)):.3f})")
    draw(args.out, *first)
    print(f"picture: {args.out}; {time.perf_counter() - began:.0f} s in all")
    return means


def draw(path, film, found, tracks, fused, lines):
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    colours = [f"C{k}" for k in range(len(BEHAVIOURS))]
    names = [each.name for each in BEHAVIOURS]
    figure = Figure(figsize=(13, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.5))
    shown = np.linspace(0, len(film.image) - 1, 6).round().astype(int)
    top.suptitle("persons' boxes by track, in the colour of the fused behaviour; signs' boxes in white", fontsize=10)
    for axis, t in zip(top.subplots(1, 6), shown, strict=True):
        axis.imshow(film.image[t])
        axis.set_title(f"frame {t}", fontsize=9)
        axis.axis("off")
        for name, box, label in zip(tracks[t]["ids"], tracks[t]["boxes"], fused[t]["labels"], strict=True):
            colour = colours[label] if label >= 0 else "0.6"
            axis.add_patch(rectangle(Rectangle, box, colour, 2))
            axis.text(box[0] + 1, box[1] + 7, str(name), color="w", fontsize=8, backgroundcolor=colour)
        for box in found["boxes"][t][found["mask"][t] & (found["classes"][t] > 0)]:
            axis.add_patch(rectangle(Rectangle, box, "w", 1))

    alone = lines["boxes, frame by frame"]
    axes = bottom.subplots(len(alone), 1, sharex=True, squeeze=False)[:, 0]
    for person, axis in zip(alone, axes, strict=True):
        rows = {"true": alone[person].true, "fused": lines["fused"][person].said, "frame by frame": alone[person].said}
        for row, line in enumerate(rows.values()):
            for t in np.flatnonzero(line >= 0):
                axis.add_patch(Rectangle((t - 0.5, -row - 0.42), 1, 0.84, color=colours[line[t]], lw=0))
        axis.set(xlim=(-0.5, len(film.image) - 0.5), ylim=(-len(rows) + 0.4, 0.6), ylabel=f"identity {person}")
        axis.set_yticks(-np.arange(len(rows)), list(rows), fontsize=8)
    axis.set_xlabel("frame")
    bottom.legend(
        handles=[Patch(color=c, label=n) for c, n in zip(colours, names, strict=True)], loc="outside right upper"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def rectangle(kind, box, colour, width):
    return kind((box[0] - 0.5, box[1] - 0.5), *(box[2:] - box[:2]), fill=False, edgecolor=colour, linewidth=width)


if __name__ == "__main__":
    main()
