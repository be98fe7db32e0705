"""Which source of text to train a language model on: a weight for each, learnt from a few clean texts.

Three sources are at hand: texts of the wanted kind, texts of another kind, and texts of the wanted kind that were
corrupted (the letters of every word drawn anew), which are noise. A small transformer is trained on bytes under a
share for each source, and the shares are learnt so that it predicts clean texts:

    min over x   F(x, y*(x)) = mean over target sequences of -log p(byte | bytes before)
    s.t.         y*(x) = argmin over y of  sum_k softmax(x)_k  mean over source k of -log p(byte | bytes before)

by first derivatives alone (`language.penalty`, ScaleBiO's minimax form). Then the model is trained afresh on sequences
drawn by the learnt shares, by equal ones, without the noise, and by equal ones with the target's texts, which the upper
level spends, as a fourth source; the test is on texts that none of them saw.

Without options the texts are English that comes with every installation: Python's language reference is the kind
wanted, NumPy's documentation the other kind. With `--corpus` they are from your copy of a corpus.

    python examples/language_sources.py
    python examples/language_sources.py --corpus brown --data brown.zip --wanted news --other romance --first 600

`--first`: steps by equal shares before the shares are learnt. A model that knows no letters yet learns them from noise
too, and on some texts the shares go to the noise and stay there.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import Problem, lower, solve
from bilevel.applications.language import (
    Bytes,
    Transformer,
    brown,
    corrupted,
    documentation,
    folder,
    newsgroups,
    penalty,
    reuters,
    sequences,
    sources,
)
from bilevel.keys import as_step_key

CORPORA = {"brown": brown, "newsgroups": newsgroups, "reuters": reuters, "folder": folder}
NOISE, TARGET = "noise", "target"


def texts(args):
    """The texts of the kind wanted and of the other kind."""
    if args.corpus is None:
        return documentation("python"), documentation("numpy")
    found = CORPORA[args.corpus](args.data)
    for name in (args.wanted, args.other):
        if name not in found:
            raise SystemExit(f"{name!r} is no source of the corpus; it has {', '.join(found)}.")
    return found[args.wanted], found[args.other]


def prepare(wanted, other, args, seed):
    """Sequences of each source, of the target and of the test; no text is in two of wanted, target and test."""
    random = np.random.default_rng(seed)
    order = [wanted[k] for k in random.permutation(len(wanted))]
    half = len(order) // 2

    def cut(part, count):
        rows = sequences(part, Bytes(), args.length)
        if len(rows) < count:
            raise SystemExit(
                f"There are {len(rows)} sequences of a part that needs {count}: lower --items or --length."
            )
        return rows[random.permutation(len(rows))[:count]]

    train = {
        args.wanted: cut(order[:half], args.items),
        args.other: cut(other, args.items),
        NOISE: cut(corrupted(order[:half], seed=seed), args.items),
    }
    clean = [order[half::2], order[half + 1 :: 2]]
    return train, cut(clean[0], args.target), cut(clean[1], args.test)


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", choices=CORPORA, help="by default texts that every installation carries")
    parser.add_argument("--data", type=Path, help="the corpus's folder or archive; else in the folder BILEVEL_DATA")
    parser.add_argument("--wanted", default="python", help="source of the kind wanted")
    parser.add_argument("--other", default="numpy", help="source of another kind")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--items", type=int, default=2000, help="sequences of each source")
    parser.add_argument("--target", type=int, default=400, help="clean sequences for the upper level")
    parser.add_argument("--test", type=int, default=400)
    parser.add_argument("--length", type=int, default=48, help="bytes of a sequence")
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--first", type=int, default=0, help="steps by equal shares before the shares are learnt")
    parser.add_argument("--outer", type=int, default=300, help="steps of the shares")
    parser.add_argument("--training", type=int, default=600, help="steps of each training afresh")
    parser.add_argument("--rate", type=float, default=3e-3, help="of the model's Adam")
    parser.add_argument("--alpha", type=float, default=3.0, help="the penalty")
    parser.add_argument("--out", type=Path, default=Path("language_sources.png"))
    args = parser.parse_args(given)
    began = time.perf_counter()
    wanted, other = texts(args)
    names = (args.wanted, args.other, NOISE)
    model = Transformer(256, args.width, args.blocks, 4, args.length)
    solver = penalty(args.rate / 3 if args.first else args.rate, 0.05, alpha=args.alpha)
    decayed = optax.adam(optax.linear_schedule(args.rate, 0.0, args.training))
    training = lower.GradientDescent(decayed, args.training)

    def loss(x, y, tokens):
        return model.loss(y, tokens).mean()

    @jax.jit
    def begun(drawn, y0, key, clean):
        """A model trained from y0 on these batches for `--first` steps."""
        rule = optax.adam(optax.linear_schedule(args.rate, args.rate / 10, args.first))
        first = lower.GradientDescent(rule, args.first)
        return first(Problem(loss, loss, clean, drawn).draw_lower(key), None, first.init(y0)).y

    @jax.jit
    def judge(drawn, y0, key, test):
        """The test loss of a model that was trained from y0 on these batches."""
        problem = Problem(loss, loss, test, drawn)
        y = training(problem.draw_lower(key), None, training.init(y0)).y
        return loss(None, y, test)

    rows, paths = {}, []
    for seed in range(args.seeds):
        train, target, test = prepare(wanted, other, args, seed)
        app = sources(model, train, target, batch=args.batch, seed=seed)
        if args.first:
            y = begun(app.mixed([1, 1, 1]), app.y0, as_step_key(seed), jnp.asarray(target))
            app = sources(model, train, target, params=y, batch=args.batch, seed=seed)
        solution = solve(
            app.problem, app.x0, app.y0, solver, steps=args.outer, key=seed, metrics=app.metrics, metrics_every=5
        )
        paths.append(np.stack([solution.history[f"weight {name}"] for name in names], -1))
        learnt = np.asarray(app.shares(solution.x))

        four = sources(model, {**train, TARGET: target}, target, batch=args.batch, seed=seed)
        shares = {
            "equal shares": [1, 1, 1, 0],
            "learnt shares": [*learnt, 0],
            "without the noise": [1, 1, 0, 0],
            "equal shares and the target": [1, 1, 1, 1],
        }
        print(
            f"seed {seed}: " + ", ".join(f"{name} {w:.3f}" for name, w in zip(names, learnt, strict=True)), flush=True
        )
        for name, each in shares.items():
            found = float(judge(four.mixed(each), four.y0, as_step_key(seed), jnp.asarray(test)))
            rows.setdefault(name, []).append(found)
            print(f"  {name:<28} {found:.3f}", flush=True)

    rows = {name: np.array(values) for name, values in rows.items()}
    paths = np.array(paths)
    print(f"test loss in nats per byte, mean over {args.seeds} seeds (least, most)")
    for name, values in rows.items():
        print(f"  {name:<28} {values.mean():.3f} ({values.min():.3f}, {values.max():.3f})")
    gain = rows["equal shares"] - rows["learnt shares"]
    print(f"learnt below equal shares by {gain.mean():.3f} ({gain.min():.3f}, {gain.max():.3f})")
    print(f"share of the noise at the end: {paths[:, -1, 2].max():.4f} at most")
    draw(args.out, rows, paths, names, train, args.outer)
    print(f"picture: {args.out}; {time.perf_counter() - began:.0f} s in all")
    return rows, paths


def draw(path, rows, paths, names, train, outer):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(2.2, 1))
    lines, bars = top.subplots(1, 2)
    steps = np.linspace(0, outer, paths.shape[1])
    for k, name in enumerate(names):
        for seed, history in enumerate(paths):
            lines.plot(steps, history[:, k], color=f"C{k}", lw=1.5, alpha=0.8, label=name if not seed else None)
    lines.axhline(0.05, color="0.6", lw=0.8, ls=":")
    lines.set(title="share of each source, a line per seed", xlabel="outer step", ylim=(0, 1))
    lines.legend(fontsize=9)
    for row, values in enumerate(rows.values()):
        bars.barh(row, values.mean(), 0.6, color="C4", alpha=0.6)
        bars.plot(values, np.full(len(values), row), "k|", ms=14)
    bars.set_yticks(np.arange(len(rows)), list(rows), fontsize=9)
    bars.invert_yaxis()
    low, high = min(v.min() for v in rows.values()), max(v.max() for v in rows.values())
    bars.set(title="test loss of trainings afresh, each seed a tick", xlim=(low - (high - low) / 3, None))
    bars.set_xlabel("nats per byte")
    axis = bottom.subplots()
    axis.axis("off")
    for k, name in enumerate(names):
        shown = " ".join(Bytes().decode(np.concatenate(train[name][:4])).split())[:120]
        axis.text(0, 0.85 - 0.33 * k, f"{name}:", color=f"C{k}", weight="bold", fontsize=9, transform=axis.transAxes)
        axis.text(0.09, 0.85 - 0.33 * k, shown, fontsize=8, family="monospace", transform=axis.transAxes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
