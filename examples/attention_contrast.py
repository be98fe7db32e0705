"""Does it help to divide the attention under a question by that under a general instruction? Ask the hypergradient.

A small transformer reads canvases of 5 x 5 places: three real digits, one in red, one in green and one in blue, among
up to 22 digits whose pixels are shuffled, in the same colours. Under a question (a colour) it says that colour's digit,
under the general instruction which digits there are. Its attention maps then make a soft mask (`masking`): a head is
trained on the masked pixels to say the digit, anew for every mask, and the layers' weights, the threshold, its width
and the contrast's lambda are learnt by the head's loss on other canvases. lambda far above A_G leaves A_Q as it is,
lambda far below it divides in full: where does it go, and is the head any better for it?

    python examples/attention_contrast.py
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import datasets, run, solvers
from bilevel.applications.attention_contrast import clutter, contrast, crop, entropy, fuse, masking, regions

SIDE, PIXELS, COLOURS, CLASSES = 5, 8, 3, 10
PLACES, GENERAL = SIDE * SIDE, COLOURS  # the instructions: one question per colour, and the general one


def draw(key, images, labels):
    """A canvas: its places (25, 3, 64), the digits of red, green and blue, their places, and how many distractors."""
    of_digits, of_places, of_pixels, of_colours, of_count = jax.random.split(key, 5)
    chosen = jax.random.randint(of_digits, (PLACES,), 0, len(images))
    order = jax.random.permutation(of_places, PLACES)  # the first three are the targets
    count = jax.random.randint(of_count, (), 0, PLACES - COLOURS + 1)
    pixels = images[chosen]
    shuffled = jax.vmap(jax.random.permutation)(jax.random.split(of_pixels, PLACES), pixels)
    rank = jnp.arange(PLACES)
    colour = jnp.where(rank < COLOURS, rank, jax.random.randint(of_colours, (PLACES,), 0, COLOURS))
    pixels = jnp.where((rank < COLOURS)[:, None], pixels, shuffled) * (rank < COLOURS + count)[:, None]
    places = jax.nn.one_hot(colour, COLOURS)[:, :, None] * pixels[:, None]
    return jnp.zeros_like(places).at[order].set(places), labels[chosen[:COLOURS]], order[:COLOURS], count


def init(key, width, layers):
    def layer(key, n_in, n_out):
        return {"w": jax.random.normal(key, (n_in, n_out)) * n_in**-0.5, "b": jnp.zeros(n_out)}

    keys = iter(jax.random.split(key, 4 + 4 * layers))
    block = lambda: {
        "qkv": layer(next(keys), width, 3 * width), "out": layer(next(keys), width, width),
        "up": layer(next(keys), width, 2 * width), "down": layer(next(keys), 2 * width, width),
    }  # fmt: skip
    return {
        "embed": layer(next(keys), COLOURS * PIXELS**2, width),
        "place": 0.02 * jax.random.normal(next(keys), (PLACES, width)),
        "instruction": 0.5 * jax.random.normal(next(keys), (COLOURS + 1, width)),
        "answer": layer(next(keys), width, CLASSES),
        "blocks": [block() for _ in range(layers)],
    }


def transformer(params, places, instruction, heads=4):
    """Logits of the digits (10,), and the attention of the instruction, the last token, to the places (layers, 25)."""
    linear = lambda layer, x: x @ layer["w"] + layer["b"]
    normal = lambda x: (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)
    x = linear(params["embed"], places.reshape(PLACES, -1)) + params["place"]
    x = jnp.concatenate([x, params["instruction"][instruction][None]])
    maps = []
    for block in params["blocks"]:
        q, k, v = (
            a.reshape(len(x), heads, -1).swapaxes(0, 1) for a in jnp.split(linear(block["qkv"], normal(x)), 3, -1)
        )
        attention = jax.nn.softmax(q @ k.swapaxes(1, 2) * q.shape[-1] ** -0.5)
        maps.append(attention[:, -1, :PLACES].mean(0))
        x = x + linear(block["out"], (attention @ v).swapaxes(0, 1).reshape(len(x), -1))
        x = x + linear(block["down"], jax.nn.gelu(linear(block["up"], normal(x))))
    return linear(params["answer"], normal(x[-1])), jnp.stack(maps)


def train(key, images, labels, args):
    """The transformer's parameters after `args.steps` steps of Adam on fresh canvases."""
    params = init(jax.random.fold_in(key, 0), args.width, args.layers)
    rule = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 3e-3, args.steps // 10, args.steps))

    def loss(params, key):
        of_canvas, of_colour = jax.random.split(key)
        places, digits, _, _ = draw(of_canvas, images, labels)
        colour = jax.random.randint(of_colour, (), 0, COLOURS)
        answer = optax.softmax_cross_entropy_with_integer_labels(transformer(params, places, colour)[0], digits[colour])
        there = jnp.zeros(CLASSES).at[digits].set(1.0)
        return answer + optax.sigmoid_binary_cross_entropy(transformer(params, places, GENERAL)[0], there).mean()

    @jax.jit
    def fit(params, images, labels, key):
        def step(carry, key):
            params, memory = carry
            keys = jax.random.split(key, args.batch)
            updates, memory = rule.update(jax.grad(lambda p: jax.vmap(loss, (None, 0))(p, keys).mean())(params), memory)
            return (optax.apply_updates(params, updates), memory), None

        return jax.lax.scan(step, (params, rule.init(params)), jax.random.split(key, args.steps))[0][0]

    return fit(params, images, labels, jax.random.fold_in(key, 1))


def read(params, key, images, labels, n):
    """n canvases with one question each: what the transformer attends to and answers."""

    def one(key):
        of_canvas, of_colour = jax.random.split(key)
        places, digits, order, count = draw(of_canvas, images, labels)
        colour = jax.random.randint(of_colour, (), 0, COLOURS)
        logits, question = transformer(params, places, colour)
        return {
            "places": places, "question": question, "general": transformer(params, places, GENERAL)[1],
            "answer": digits[colour], "at": order[colour], "count": count, "right": logits.argmax() == digits[colour],
        }  # fmt: skip

    return jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=100))(jax.random.split(key, n))


def picture_of(places):
    """A canvas as an image (40, 40, 3)."""
    grid = np.asarray(places).reshape(SIDE, SIDE, COLOURS, PIXELS, PIXELS)
    return grid.transpose(0, 3, 1, 4, 2).reshape(SIDE * PIXELS, SIDE * PIXELS, COLOURS)


def diagnose(found):
    """Print what the contrast supposes: that clutter spreads attention, and that A_Q and A_G share what draws it."""
    edges, hues = clutter(np.stack([picture_of(p) for p in found["places"]]))
    spread = np.asarray(entropy(found["question"]))
    correlation = lambda a, b: float(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])
    q, g = (np.log(np.asarray(found[name])) for name in ("question", "general"))
    top = lambda maps: np.asarray(maps).argmax(-1) == np.asarray(found["at"])[:, None]
    full = top(contrast(found["question"], found["general"], 1e-8))
    print(f"the transformer answers {np.mean(found['right']):.3f} of {len(edges)} test canvases")
    print("layer  entropy of A_Q  with edges  with hues  with right  log A_Q with log A_G  top of A_Q  of A_Q / A_G")
    for k in range(q.shape[1]):
        columns = (
            spread[:, k].mean(), correlation(spread[:, k], edges), correlation(spread[:, k], hues),
            correlation(spread[:, k], found["right"]), correlation(q[:, k], g[:, k]),
            top(found["question"])[:, k].mean(), full[:, k].mean(),
        )  # fmt: skip
        print("{:<5}  {:14.2f}  {:10.2f}  {:9.2f}  {:10.2f}  {:20.2f}  {:10.3f}  {:13.3f}".format(k, *columns))
    print("(with: the correlation of the entropy, at most log 25 = 3.22, with it; top: the most salient place is the "
          "answer's)")  # fmt: skip


def head_data(found):
    """What the mask is made of, and what is masked: the pixels of each place without their colours."""
    return found["question"], found["general"], found["places"].sum(2), found["answer"]


def learn(app, x0, steps, fixed=()):
    """The mask and the head at the end; what is in `fixed` stays."""
    labels = {name: "stays" if name in fixed else "moves" for name in x0}
    rule = optax.partition({"moves": optax.adam(0.1), "stays": optax.set_to_zero()}, labels)
    state, metrics = run(app.problem, solvers.AID(upper_optimizer=rule), x0, app.y0, steps)
    return state.x, state.y, float(metrics["upper_loss"][-1])


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="of the transformer's training")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--canvases", type=int, default=400, help="for the head, and as many for its validation")
    parser.add_argument("--mask-steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("attention_contrast.png"))
    args = parser.parse_args(given)
    began = time.perf_counter()
    images, labels = datasets.digits()
    parts = datasets.split((images / 16, labels), sizes=(900, 300, 300, 297), seed=args.seed)
    parts = [tuple(map(jnp.asarray, part)) for part in parts]
    key = jax.random.key(args.seed)
    params = train(key, *parts[0], args)
    found = [read(params, jax.random.fold_in(key, 2 + k), *part, args.canvases) for k, part in enumerate(parts[1:])]
    print(f"trained and read in {time.perf_counter() - began:.0f} s")
    diagnose(found[2])

    app = masking(*map(head_data, found[:2]), classes=CLASSES, test=head_data(found[2]))
    test = head_data(found[2])
    typical = jnp.log(jnp.median(found[0]["general"], (0, 2)))  # of A_G by layer
    start = lambda shift: {**app.x0, "strength": typical + shift}
    everything = {**start(0.0), "threshold": jnp.asarray(-1e3)}
    rows = {
        "no mask": learn(app, everything, 3, fixed=tuple(app.x0)),
        "A_Q (lambda = 1e4 A_G)": learn(app, start(jnp.log(1e4)), args.mask_steps, fixed=("strength",)),
        "A_Q / A_G (lambda = 1e-4 A_G)": learn(app, start(jnp.log(1e-4)), args.mask_steps, fixed=("strength",)),
        "lambda learnt from A_G / 10": learn(app, start(jnp.log(0.1)), args.mask_steps),
        "lambda learnt from 10 A_G": learn(app, start(jnp.log(10.0)), args.mask_steps),
    }
    print(f"{'':31}  validation CE   test CE  test accuracy  kept   weight of layers; lambda over the median A_G")
    results = {}
    for name, (x, y, loss) in rows.items():
        kept = app.mask(x, *test[:2])
        results[name] = {
            "validation": loss,
            "test": float(app.problem.upper(x, y, test)), "accuracy": float(app.accuracy(x, y, test)),
            "weights": np.asarray(jax.nn.softmax(x["layers"])), "ratio": np.asarray(jnp.exp(x["strength"] - typical)),
        }  # fmt: skip
        r, shown = results[name], lambda a: " ".join(f"{v:.2g}" for v in a)
        numbers = f"{r['validation']:13.4f}  {r['test']:8.4f}  {r['accuracy']:13.3f}  {float(kept.mean()):4.2f}"
        print(f"{name:31}  {numbers}   " f"{shown(r['weights'])}; {shown(r['ratio'])}", flush=True)  # fmt: skip
    plain, full = (results[name] for name in list(rows)[1:3])
    name = min(list(results)[3:], key=lambda name: results[name]["validation"])
    learnt = results[name]
    best = int(learnt["weights"].argmax())
    print(f"The learnt mask looks at layer {best}, with lambda {learnt['ratio'][best]:.2g} times the median A_G there.")
    verdict = "helps" if min(full["test"], learnt["test"]) < 0.95 * plain["test"] else "does not help"
    print(
        f"Contrast {verdict} here: the head's test loss is {plain['test']:.4f} with A_Q alone, {full['test']:.4f} with"
    )
    print(f"the full contrast and {learnt['test']:.4f} with the learnt one (it helps if one is 5 % below A_Q's).")
    show(args.out, app, rows[name][0], found[2], best)
    print(f"picture: {args.out}; {time.perf_counter() - began:.0f} s in all")
    return results


def show(path, app, x, found, layer):
    from matplotlib.figure import Figure

    size = SIDE * PIXELS
    picked = np.argsort(-np.asarray(found["count"]), kind="stable")[[0, len(found["count"]) // 3, -1]]
    figure = Figure(figsize=(13, 6.8), layout="constrained")
    titles = ("canvas", f"A_Q, layer {layer}", f"A_G, layer {layer}", "contrast, learnt lambda", "soft mask", "crop")
    for row, k in zip(figure.subplots(len(picked), len(titles)), picked, strict=True):
        image, question, general = picture_of(found["places"][k]), found["question"][k], found["general"][k]
        maps = contrast(question, general, jnp.exp(x["strength"])[:, None])
        weights = jax.nn.softmax(x["layers"]) / maps.mean(-1)
        saliency = np.asarray(fuse(maps[:, None], weights, (size, size), (SIDE, SIDE)))
        region, _ = regions(saliency, share=1 / PLACES, most=1)
        mask = app.mask(x, question[None], general[None])[0]
        grids = [np.asarray(a).reshape(SIDE, SIDE) for a in (question[layer], general[layer], maps[layer], mask)]
        for axis, title, what in zip(row, titles, [image, *grids, crop(image, region, margin=2)], strict=True):
            scale = {"vmin": 0, "vmax": 1} if title == "soft mask" else {}
            axis.imshow(what, **({} if np.ndim(what) == 3 else {"cmap": "viridis", **scale}))
            axis.set(title=title, xticks=[], yticks=[])
            at, shape = int(found["at"][k]), np.shape(what)
            if title != "crop":  # a frame around the answer's place
                unit = shape[0] / SIDE
                corner = (at % SIDE * unit - 0.5, at // SIDE * unit - 0.5)
                axis.add_patch(_frame(corner, unit))
        row[0].set_ylabel(f"digit in {('red', 'green', 'blue')[int(found['places'][k, at].sum(-1).argmax())]}: "
                          f"{int(found['answer'][k])}")  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _frame(corner, unit):
    from matplotlib.patches import Rectangle

    return Rectangle(corner, unit, unit, fill=False, edgecolor="w", linewidth=1.5)


if __name__ == "__main__":
    main()
