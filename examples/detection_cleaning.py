"""Find wrong annotations while a detector with routing attention is trained on them.

Scenes of real Fashion-MNIST items on canvases with clutter; in 30 % of the training images all boxes are misplaced and
all classes wrong. One weight per image is learnt above the detector, so that it does well on a few clean images
(`bilevel.applications.detection.trust`), and a detector is trained afresh under the weights found. It is compared with
training on the annotations as they are, on the clean images alone, and on the true annotations, all for the same
number of steps from the same start. The picture shows training scenes with annotated boxes coloured by their weight
and boxes predicted, the weights of right and wrong images, and the regions to which the region of one box routes.

    python examples/detection_cleaning.py
    python examples/detection_cleaning.py --seeds 1 --steps 400 --items digits
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import data, run
from bilevel.applications import detection

CLOTHES = (1, 5, 8)  # trousers, sandals, bags
METHODS = ("annotations as given", "clean images alone", "weights learnt", "true annotations")


def learning_rule(rate):
    return optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate))


class Training(NamedTuple):
    """The lower level on its own, as a solver: x stays, y takes the rule's steps."""

    rule: optax.GradientTransformation

    def init(self, problem, x, y, key):
        return At(x, y, self.rule.init(y))

    def step(self, problem, at, key):
        gradient = problem.draw_lower(key).gradient(at.x, at.y)
        updates, memory = self.rule.update(gradient, at.memory, at.y)
        return At(at.x, optax.apply_updates(at.y, updates), memory), {"slope": optax.tree.norm(gradient)}


class At(NamedTuple):
    x: Any
    y: Any
    memory: Any


@functools.partial(jax.jit, static_argnames=("steps", "rate"))
def train(problem, x, y, key, steps, rate):
    """The detector trained with the weights where they are."""
    training = Training(learning_rule(optax.cosine_decay_schedule(rate, steps)))
    return run(problem, training, x, y, steps, key)[0].y


@functools.partial(jax.jit, static_argnames=("app", "steps", "rate", "upper_rate"))
def learn(app, problem, x, y, key, steps, rate, upper_rate):
    """Weights and network together: one step of each in turn."""
    solver = detection.OneGradient(app, learning_rule(rate), optax.adam(upper_rate))
    return run(problem, solver, x, y, steps, key)


@functools.partial(jax.jit, static_argnames="app")
def look(app, y, images):
    """What the detector says of images, 64 at a time."""
    return jax.lax.map(
        lambda part: app.detect(y, part, confidence=0.01, most=20), images.reshape(-1, 64, *images.shape[1:])
    )


def found(app, y, images):
    """Detections as arrays, by name."""
    parts = jax.tree.map(lambda a: np.asarray(a).reshape(-1, *a.shape[2:]), look(app, y, jnp.asarray(images)))
    return {name: getattr(parts, name) for name in ("boxes", "scores", "classes", "mask")}


def logit(weights):
    """The x that has these weights."""
    w = np.clip(weights, 1e-6, 1 - 1e-6)
    return {"images": jnp.asarray(np.log(w / (1 - w)), jnp.float32)}


def ranking_quality(weights, wrong):
    """The chance that a right image has a larger weight than a wrong one (area under the ROC curve)."""
    ranks = np.argsort(np.argsort(weights, kind="stable"), kind="stable")
    right = ~wrong
    return (ranks[right].mean() - (right.sum() - 1) / 2) / wrong.sum()


def make_data(args, seed):
    """Training scenes as annotated and as they are, which are wrong, clean and test scenes."""
    source = detection.fashion_items if args.items == "fashion" else detection.digit_items
    classes = CLOTHES if args.items == "fashion" else (0, 1, 4)
    items, others = source(classes, "train"), source(classes, "test")
    truth = detection.scenes(items, args.train, seed=1000 + seed, clutter=args.clutter)
    clean = detection.scenes(items, args.clean, seed=2000 + seed, clutter=args.clutter)
    test = detection.scenes(others, args.test, seed=3000, clutter=args.clutter)
    noisy, spoilt = detection.corrupt(truth, args.rate, len(classes), seed=seed)
    return truth, noisy, spoilt.images, clean, test, items.names


def swapped(app, batch, count):
    """The problem with other training images (repeated to as many: one compiled programme)."""
    rows = np.resize(np.arange(len(batch["mask"])), count)
    arrays = {**{name: batch[name][rows] for name in ("image", "boxes", "classes", "mask")}}
    arrays["row"] = np.arange(count, dtype=np.int32)
    return dataclasses.replace(app.problem, lower_data=data.Minibatches(arrays, app.problem.lower_data.size))


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=256, help="training images")
    parser.add_argument("--clean", type=int, default=32, help="clean images")
    parser.add_argument("--test", type=int, default=64, help="test images, a multiple of 64")
    parser.add_argument("--rate", type=float, default=0.3, help="share of images with wrong annotations")
    parser.add_argument("--items", choices=("fashion", "digits"), default="fashion")
    parser.add_argument("--clutter", type=int, default=3, help="scraps per scene")
    parser.add_argument("--steps", type=int, default=160, help="training steps of each method")
    parser.add_argument("--learning", type=int, default=110, help="steps in which the weights are learnt")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--upper-lr", type=float, default=0.1, help="of the weights, whose x starts at 0")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("detection_cleaning.png"))
    args = parser.parse_args(given)
    began = time.perf_counter()
    app, rows = None, []
    for seed in range(args.seeds):
        truth, noisy, wrong, clean, test, names = make_data(args, seed)
        if app is None:
            app = detection.trust(noisy, clean, len(names), learn="images", batch=args.batch)
            count = sum(map(np.size, jax.tree.leaves(app.y0)))
            print(f"{args.train} training images, {wrong.sum()} wrong; {args.clean} clean; {count:,} parameters")
        key, problem = jax.random.key(seed), swapped(app, noisy, args.train)
        problem = dataclasses.replace(problem, upper_data=data.Minibatches(clean, args.batch))
        state, _ = learn(app, problem, app.x0, app.y0, key, args.learning, args.lr, args.upper_lr)
        weights = np.asarray(app.weights(state.x)["images"])
        ones = logit(np.ones(args.train))
        fit = lambda samples, x: train(swapped(app, samples, args.train), x, app.y0, key, args.steps, args.lr)
        ys = dict(zip(METHODS, (fit(noisy, ones), fit(clean, ones), fit(noisy, logit(weights)), fit(truth, ones)),
                      strict=True))  # fmt: skip
        scores = {name: detection.average_precision(found(app, y, test["image"]), test) for name, y in ys.items()}
        quality = ranking_quality(weights, wrong)
        rows.append((scores, quality))
        each = ", ".join(f"{name} {s.at_50:.3f} ({s.at_50_95:.3f})" for name, s in scores.items())
        clock = time.perf_counter() - began
        print(f"seed {seed}, {clock:.0f} s: AUC of wrong images {quality:.3f}; mAP@.5 (@.5:.95): {each}", flush=True)
        if seed == 0:
            shown = (app, ys["weights learnt"], weights, noisy, wrong, names)
    print(f"mean over {args.seeds} seeds (least, most)")
    for name in METHODS:
        for kind in ("at_50", "at_50_95"):
            values = [getattr(scores[name], kind) for scores, _ in rows]
            print(f"  {name:<22} {'mAP@.5' if kind == 'at_50' else 'mAP@.5:.95':<11} {np.mean(values):.3f} "
                  f"({min(values):.3f}, {max(values):.3f})")  # fmt: skip
    for kind, label in (("at_50", "mAP@.5"), ("at_50_95", "mAP@.5:.95")):
        gains = [getattr(s["weights learnt"], kind) - getattr(s["annotations as given"], kind) for s, _ in rows]
        print(f"  gain of weights learnt, seed by seed, {label}: {', '.join(f'{gain:+.3f}' for gain in gains)}")
    aucs = [quality for _, quality in rows]
    print(f"  AUC of wrong images {np.mean(aucs):.3f} ({min(aucs):.3f}, {max(aucs):.3f})")
    draw(args.out, *shown, rows)
    clock = time.perf_counter() - began
    print(f"picture: {args.out}; {clock:.0f} s in all, {time.process_time():.0f} s of processor time")
    return rows


def draw(path, app, y, weights, noisy, wrong, names, rows):
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1))
    order = np.concatenate([np.argsort(weights)[:6], np.argsort(-weights)[:4]])
    several = np.resize(noisy["image"][order], (64, *noisy["image"].shape[1:]))
    said = found(app, y, several)
    colours = colormaps["RdYlGn"]
    top.suptitle(
        "lowest and highest weights: annotated boxes by weight (red: low), predicted ones in white", fontsize=10
    )
    for axis, i, k in zip(top.subplots(2, 5).flat, order, range(10), strict=True):
        axis.imshow(noisy["image"][i])
        for j in np.flatnonzero(noisy["mask"][i]):
            colour = colours(float(weights[i]))
            box(axis, noisy["boxes"][i, j], colour, names[noisy["classes"][i, j]])
        for j in np.flatnonzero(said["mask"][k] & (said["scores"][k] > 0.3)):
            box(axis, said["boxes"][k, j], "white", names[said["classes"][k, j]], below=True)
        axis.set_title(f"weight {weights[i]:.2f}, {'wrong' if wrong[i] else 'right'}", fontsize=8)
        axis.axis("off")
    hist, bars, *maps = bottom.subplots(1, 4)
    hist.hist([weights[~wrong], weights[wrong]], bins=25, stacked=True, color=["C2", "C3"], label=["right", "wrong"])
    hist.set(title="weights of the training images", xlabel="sigmoid(x)")
    hist.legend(fontsize=8)
    for place, name in enumerate(METHODS):
        values = [scores[name].at_50 for scores, _ in rows]
        bars.barh(place, np.mean(values), color="C0", alpha=0.7)
        bars.plot(values, np.full(len(values), place), "k|")
    bars.set_yticks(range(len(METHODS)), METHODS, fontsize=8)
    bars.invert_yaxis()
    bars.set_title("mAP@.5 on test scenes, each seed a tick", fontsize=10)

    # Routing at strides 8 and 4: of the region in which the first box's centre lies, in a scene of the highest weight.
    i = order[6]
    routings = jax.jit(lambda y, x: app.apply(y, x, train=True, return_routing=True)[1])(y, noisy["image"][i : i + 1])
    side = noisy["image"].shape[1]
    target = noisy["boxes"][i, 0]
    for axis, row, stride in zip(maps, ("row29", "row25"), (8, 4), strict=True):
        index = np.asarray(routings[row].index[0])
        regions = int(np.sqrt(len(index)))
        cell = side / regions
        column, line = (int(c // cell) for c in ((target[0] + target[2]) / 2, (target[1] + target[3]) / 2))
        axis.imshow(noisy["image"][i])
        for region, colour in [*((r, "C1") for r in index[line * regions + column]), (line * regions + column, "C0")]:
            r, c = divmod(int(region), regions)
            box(axis, (c * cell, r * cell, (c + 1) * cell - 1, (r + 1) * cell - 1), colour, fill=True)
        box(axis, target, "white")
        axis.set_title(f"stride {stride}: a box's region (blue) looks at these", fontsize=9)
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def box(axis, corners, colour, name="", *, below=False, fill=False):
    from matplotlib.patches import Rectangle

    x1, y1, x2, y2 = corners
    axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.5))
    if fill:
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, color=colour, alpha=0.25))
    if name:
        axis.text(x1 + 1, y2 - 1 if below else y1 + 1, name, color=colour, fontsize=6, va="bottom" if below else "top")


if __name__ == "__main__":
    main()
