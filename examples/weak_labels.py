"""Weak labels cleaned by 300 human ones: which answers of a rule to trust, under a linear learner and a BiLSTM.

VADER's rule says of a movie review's snippet whether it is kind; it is wrong for a third of those that it speaks
of, and for half of the unkind ones. 15 people rated each snippet. 300 of their labels are used, and all others only to
say how well it went:

    min over x   F(x, y*(x)) = mean of the cross-entropy on the 300 snippets with human labels
    s.t.         y*(x) = argmin over y of  mean_i w_i(x) CE(y; snippet_i, the rule's label_i) + decay/2 |y|^2

with a weight per snippet, or w_i = sigmoid(features_i . x) of five numbers that the rule gives. They are compared
with the weak labels as they are, the clean ones alone, both mixed (each clean one k times, k chosen on a third of
them), and with human labels throughout, which nobody has. The BiLSTM is trained afresh under the weights that it has
found, with hypergradients of one differentiated step and of a single loop (SOBA).

    pip download --no-deps --no-binary vaderSentiment vaderSentiment==3.3.2
    python examples/weak_labels.py --data vaderSentiment-3.3.2.tar.gz
    python examples/weak_labels.py --data ... --vectors wordllama-*.whl   # static word vectors in place of trained ones
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import Problem, lower, solve, solvers
from bilevel.applications.sequence import (
    AttentiveBiLSTM,
    NGrams,
    Vocabulary,
    auc,
    cross_entropy,
    linear_classifier,
    rule_scores,
    snippets,
    weak_labels,
    wordllama_table,
)
from bilevel.linear import CG

CLEAN, MIXTURES = 300, (3, 30, 300)
LONGEST, WIDTH, WORDS, GRAMS = 32, 80, 6000, 20_000


@dataclasses.dataclass
class Learner:
    """A classifier, its data, how it is trained under weights, and how weights are learnt above it."""

    classify: Callable[..., Any]
    y0: Any
    inputs: dict[str, Any]  # "train", "clean", "test"
    fit: Callable[..., Any]  # (inputs, labels, weights) -> y
    methods: dict[str, tuple[bool, Any, int]]  # name: (by features, solver, steps)
    options: dict[str, Any]  # of weak_labels
    retrain: bool


def draw_parts(corpus, scores, seed, count):
    """Which snippets are for the test, clean and weak; opinions only, and weak ones where the rule has a word."""
    opinions = np.random.default_rng(seed).permutation(np.flatnonzero(np.abs(corpus.human) > 0.5))
    tests = len(opinions) // 4
    weak = opinions[tests + CLEAN :]
    weak = weak[scores.compound[weak] != 0][:count]
    return {"train": weak, "clean": opinions[tests : tests + CLEAN], "test": opinions[:tests]}


def linear_learner(texts, args):
    grams = NGrams.of(texts["train"] + texts["clean"], most=GRAMS)
    inputs = {name: grams.encode(part, WIDTH) for name, part in texts.items()}
    decay = 5e-5

    def fit(inputs, labels, weights):
        loss = lambda x, y, batch: _weighted(linear_classifier, y, batch, decay)
        level = Problem(upper=loss, lower=loss, lower_data=(inputs, labels, weights)).draw_lower(0)
        solver = lower.LBFGS(60)
        return solver(level, jnp.zeros(()), solver.init(grams.init())).y

    aid = solvers.AID(lower.LBFGS(10), optax.adam(0.2), CG(tol=1e-2, max_steps=10))
    methods = {"weights per example": (False, aid, args.steps), "weights by features": (True, aid, args.steps)}
    return Learner(linear_classifier, grams.init(), inputs, jax.jit(fit), methods, {"decay": decay}, False)


def bilstm(texts, args, seed):
    vocabulary = Vocabulary.of(texts["train"] + texts["clean"], most=WORDS)
    inputs = {
        name: dict(zip(("ids", "lengths"), vocabulary.encode(part, LONGEST), strict=True))
        for name, part in texts.items()
    }
    if args.vectors is None:
        model = AttentiveBiLSTM(len(vocabulary), 32, args.hidden, layers=1, trained=True)
        start = 0.3 * jax.random.normal(jax.random.key(seed + 100), (len(vocabulary), 32))
        classify = lambda y, x, **options: model(y, x["ids"], x["lengths"], **options)
        y0 = model.init(jax.random.key(seed), start)
    else:
        table = wordllama_table(vocabulary, args.vectors)
        table = jnp.asarray(0.5 * table / table.std())
        model = AttentiveBiLSTM(len(vocabulary), table.shape[1], args.hidden, layers=1)
        classify = lambda y, x, **options: model(y, x["ids"], x["lengths"], table=table, **options)
        y0 = model.init(jax.random.key(seed))
    decay, batch, rule = 1e-4, 64, optax.adam(3e-3)

    @functools.partial(jax.jit, static_argnums=4)
    def run(y, inputs, labels, weights, steps):
        def step(carry, key):
            y, memory = carry
            i = jax.random.randint(key, (batch,), 0, len(labels))
            part = jax.tree.map(lambda a: a[i], inputs), labels[i], weights[i]
            updates, memory = rule.update(jax.grad(lambda y: _weighted(classify, y, part, decay))(y), memory)
            return (optax.apply_updates(y, updates), memory), None

        return jax.lax.scan(step, (y, rule.init(y)), jax.random.split(jax.random.key(seed), steps))[0][0]

    def fit(inputs, labels, weights):
        steps = args.training if len(labels) > CLEAN else args.training // 3
        return run(y0, jax.tree.map(jnp.asarray, inputs), jnp.asarray(labels), jnp.asarray(weights), steps)

    adam = optax.adam(3e-3)
    one = lambda rate: solvers.OneStep(2, adam, optax.adam(rate))
    single = solvers.SOBA(optax.adam(0.03), optax.adam(3e-3), 0.05, decay=None)
    methods = {
        "weights per example, one step": (False, one(0.3), args.outer),
        "weights by features, one step": (True, one(0.05), args.outer),
        "weights by features, SOBA": (True, single, args.outer),
    }
    options = {"decay": decay, "batch": batch, "clean_batch": batch}
    return Learner(classify, y0, inputs, fit, methods, options, True)


def _weighted(classify, y, batch, decay):
    inputs, labels, weights = batch
    loss = (weights * cross_entropy(classify(y, inputs), labels)).mean()
    return loss + decay / 2 * optax.tree.norm(y, squared=True)


def compare(learner, labels, scores, seed):
    """{method: (test accuracy, balanced)}, {method: weights}, {method: y} of one learner and one seed."""
    truth, weak, inputs = labels["truth"], labels["weak"], learner.inputs
    half = lambda n: np.full(n, 0.5, np.float32)
    make = functools.partial(
        weak_labels, learner.classify, learner.y0, (inputs["train"], weak), (inputs["clean"], truth["clean"]),
        test=(inputs["test"], truth["test"]), **learner.options,
    )  # fmt: skip
    plain = make()
    score = jax.jit(lambda y, part: (plain.accuracy(None, y, part), plain.balanced_accuracy(None, y, part)))
    test = inputs["test"], truth["test"]
    both = jax.tree.map(lambda a, b: np.concatenate([a, b]), inputs["train"], inputs["clean"])
    both_labels = np.concatenate([weak, truth["clean"]])
    ys = {"weak labels": learner.fit(inputs["train"], weak, half(len(weak)))}
    ys["300 clean labels"] = learner.fit(inputs["clean"], truth["clean"], half(CLEAN))

    def mixed(k, used):
        counts = np.where(np.arange(CLEAN) < used, 0.5 * k, 0).astype(np.float32)
        return learner.fit(both, both_labels, np.concatenate([half(len(weak)), counts]))

    held = jax.tree.map(lambda a: a[200:], (inputs["clean"], truth["clean"]))
    best = max(MIXTURES, key=lambda k: float(score(mixed(k, 200), held)[1]))
    ys[f"weak + {best} x clean"] = mixed(best, CLEAN)
    weights = {}
    for name, (by_features, solver, steps) in learner.methods.items():
        app = make(features=scores.features if by_features else None)
        solution = solve(app.problem, app.x0, app.y0, solver, steps=steps, key=seed, progress=False)
        weights[name] = np.asarray(app.weights(solution.x))
        fresh = weights[name] * np.float32(0.5 / weights[name].mean())
        ys[name] = learner.fit(inputs["train"], weak, fresh) if learner.retrain else solution.y
    ys["human labels (oracle)"] = learner.fit(inputs["train"], truth["train"], half(len(weak)))
    return {name: tuple(map(float, score(y, test))) for name, y in ys.items()}, weights, ys


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the source distribution of vaderSentiment; else in the folder BILEVEL_DATA")
    parser.add_argument("--kind", choices=("movie", "nyt", "amazon"), default="movie")
    parser.add_argument("--learners", nargs="+", choices=("linear", "bilstm"), default=("linear", "bilstm"))
    parser.add_argument("--vectors", help="wordllama's wheel or folder; by default the vectors are trained")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=6200, help="weak labels that are used")
    parser.add_argument("--steps", type=int, default=80, help="outer steps above the linear learner")
    parser.add_argument("--outer", type=int, default=120, help="outer steps above the BiLSTM")
    parser.add_argument("--training", type=int, default=250, help="training steps of the BiLSTM")
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("weak_labels.png"))
    args = parser.parse_args(given)
    began = time.perf_counter()
    corpus = snippets(args.kind, args.data)
    scores = rule_scores(corpus.texts, args.data)
    truth = (corpus.human > 0).astype(np.int32)
    rows, shown = {}, None
    for seed in range(args.seeds):
        parts = draw_parts(corpus, scores, seed, args.train)
        texts = {name: [corpus.texts[k] for k in part] for name, part in parts.items()}
        train = parts["train"]
        labels = {"weak": scores.labels[train], "truth": {name: truth[part] for name, part in parts.items()}}
        wrong = labels["weak"] != labels["truth"]["train"]
        print(
            f"seed {seed}: {len(train)} weak labels, {wrong.mean():.1%} wrong; {CLEAN} clean; {len(parts['test'])} for "
            "the test",
            flush=True,
        )
        for name in args.learners:
            clock = time.perf_counter()
            learner = linear_learner(texts, args) if name == "linear" else bilstm(texts, args, seed)
            found, weights, ys = compare(learner, labels, scores[train], seed)
            print(f"  {name}, {time.perf_counter() - clock:.0f} s")
            for method, (accuracy, balanced) in found.items():
                known = f", AUC of wrong labels {auc(-weights[method], wrong):.3f}" if method in weights else ""
                print(f"    {method:<30} {accuracy:.3f} (balanced {balanced:.3f}){known}", flush=True)
                key = "weak + k x clean, k chosen" if " x clean" in method else method
                rows.setdefault(name, {}).setdefault(key, []).append(accuracy)
            if seed == 0:
                shown = {**(shown or {}), name: (learner, weights, ys)}
                first = texts, labels, scores[train], wrong
    print(f"test accuracy, mean over {args.seeds} seeds (least, most)")
    for name, methods in rows.items():
        for method, values in methods.items():
            print(f"  {name:<7} {method:<30} {np.mean(values):.3f} ({min(values):.3f}, {max(values):.3f})")
    draw(args.out, rows, shown, first)
    print(f"picture: {args.out}; {time.perf_counter() - began:.0f} s in all")
    return rows


def draw(path, rows, shown, first):
    from matplotlib.figure import Figure

    texts, labels, scores, wrong = first
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.2, 1))
    bars, *scatters = top.subplots(1, 3)
    place, names = 0, []
    for color, (name, methods) in zip(("C0", "C1"), rows.items(), strict=False):
        for method, values in methods.items():
            bars.barh(place, np.mean(values), color=color, alpha=0.7)
            bars.plot(values, np.full(len(values), place), "k|")
            names.append(f"{method} [{name}]")
            place += 1
    bars.set_yticks(np.arange(place), names, fontsize=7)
    bars.invert_yaxis()
    bars.set(xlim=(0.5, 0.85), title="test accuracy, each seed a tick")
    learner, weights, ys = shown.get("bilstm") or shown["linear"]
    kinds = [next((m for m in weights if kind in m), None) for kind in ("per example", "by features")]
    for axis, method in zip(scatters, kinds, strict=True):
        if method is None:
            continue
        for mask, color, said in ((~wrong, "C2", "the rule is right"), (wrong, "C3", "the rule is wrong")):
            axis.plot(scores.compound[mask], weights[method][mask], ".", ms=2, color=color, alpha=0.5, label=said)
        axis.set(title=method, xlabel="the rule's score", ylabel="weight", ylim=(-0.03, 1.03))
        axis.legend(fontsize=7, markerscale=4)
    method = kinds[0] or kinds[1]
    worst = [k for k in np.argsort(weights[method]) if wrong[k] and 5 < len(texts["train"][k].split()) <= 16][:8]
    axis = bottom.subplots()
    axis.axis("off")
    if "bilstm" in shown:
        learner, _, ys = shown["bilstm"]
        of = next(name for name in ys if name.startswith("weights"))
        attention = _attention(learner, ys[of], worst)
        axis.set_title("wrong labels with the least weights: attention of the BiLSTM (darker: more)", fontsize=10)
    else:
        attention = None
        axis.set_title("wrong labels with the least weights", fontsize=10)
    from bilevel.applications.sequence import tokenise

    for row, k in enumerate(worst):
        y = 1 - (row + 1) / (len(worst) + 1)
        said = "kind" if labels["weak"][k] else "unkind"
        axis.text(0, y, f"{weights[method][k]:.2f}  rule: {said}", fontsize=8, family="monospace", va="center")
        x = 0.16
        tokens = tokenise(texts["train"][k])[:LONGEST]
        for j, token in enumerate(tokens):
            shade = 0.0 if attention is None else float(attention[row][j] / attention[row].max()) ** 2
            box = {"facecolor": (1, 1 - 0.6 * shade, 1 - 0.9 * shade), "edgecolor": "none", "pad": 1.5}
            axis.text(x, y, token, fontsize=8, family="monospace", va="center", bbox=box)
            x += 0.0068 * (len(token) + 1)
    axis.set(xlim=(0, 1), ylim=(0, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _attention(learner, y, which):
    inputs = jax.tree.map(lambda a: a[np.array(which, int)], learner.inputs["train"])
    return np.asarray(learner.classify(y, inputs, return_attention=True)[1])


if __name__ == "__main__":
    main()
