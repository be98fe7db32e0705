"""Which made-up questions to learn reading from: a weight for each template of gaps, under a small BiDAF.

Sentences with a gap cost nothing: a name, a number, a date or any word is taken out, and is the answer. Real questions
are few. Five sources, four templates and a few questions by people, are weighed so that the reader trained on them
answers other questions by people:

    min over x   F(x, y*(x)) = mean of -log p(first) p(last) on validation questions
    s.t.         y*(x) = argmin over y of  mean_i sigmoid(x_{source of i}) (-log p(first_i) p(last_i))

The weights come from one differentiated step on minibatches; the reader is then trained afresh, each item drawn as
often as its source weighs. Compared are the few questions alone, all sources alike, the questions k times (k chosen on
the validation questions), and plain training on both the few and the validation questions, which the upper level needs.

**This is small**: a reader 16 wide, some hundred steps, no word vectors made elsewhere. It shows the problem, not how
well BiDAF reads. Without `--data` the paragraphs and questions are invented, by rules that are below; with it they
are those of a file in SQuAD's format, such as `xquad.en.json` (1,190 questions, CC BY-SA 4.0).

    python examples/reading_sources.py
    python examples/reading_sources.py --data xquad.en.json
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import data, solvers
from bilevel.applications.sequence import (
    BiDAF,
    Question,
    Vocabulary,
    best_span,
    cloze,
    encode_questions,
    exact_match,
    f1,
    one_hot,
    span_loss,
    squad,
    weighted,
)

SOURCES = ("entity", "number", "date", "word", "questions")
TIMES = (1, 5, 25, 125)
LETTERS, ASKED, BATCH = 10, 40, 32


def invented(count, seed=0):
    """Questions on `count` paragraphs about people who do not exist; six for each."""
    random = np.random.default_rng(seed)
    name = lambda: "".join(random.choice(["ma", "lo", "ri", "ken", "ta", "vis", "dor", "an"], 3)).capitalize()
    questions = []
    for k in range(count):
        who, friend, born, lived, moved = f"{name()} {name()}", f"{name()} {name()}", name(), name(), name()
        year, later, pupils, boats = *sorted(random.integers(1100, 1990, 2)), *random.integers(2, 99, 2)
        trade = random.choice(["sailor", "farmer", "painter", "doctor"])
        sentences = [
            f"The {trade} {who} was born in {born} in {year}.",
            f"At the old school of {lived}, {pupils} pupils were taught by {who}.",
            f"In {later} the whole family moved to {moved} and built {boats} wooden boats there.",
            f"Their neighbour {friend} always called this work important.",
        ]
        context = " ".join(sentences[j] for j in random.permutation(4))
        for j, (question, answer) in enumerate([
            (f"In which year was {who} born?", f"{year}"),
            (f"Where was {who} born?", born),
            (f"How many pupils did {who} teach?", f"{pupils}"),
            ("To which place did the family move?", moved),
            ("How many boats were built?", f"{boats}"),
            ("Who called the work important?", friend),
        ]):  # fmt: skip
            questions.append(Question(f"{k}.{j}", question, context, (answer,), context.index(answer), f"{k}"))
    return questions


def draw_parts(questions, seed, args):
    """Training items, the source of each, validation and test questions; no article is in two of the three parts."""
    random = np.random.default_rng(seed)
    articles = random.permutation(sorted({each.article for each in questions}))
    half, rest = articles[: len(articles) // 2], articles[len(articles) // 2 :]

    def by(part):
        chosen = set(part.tolist())
        found = [each for each in questions if each.article in chosen]
        return [found[k] for k in random.permutation(len(found))]

    few, validation, test = by(half), by(rest[::2])[: args.validation], by(rest[1::2])[: args.test]
    made, sources = cloze(sorted({each.context for each in few}), args.gaps, seed)
    chosen = np.sort(random.permutation(len(made))[: args.items])
    items = [made[k] for k in chosen] + few[: args.few]
    return items, np.append(sources[chosen], np.full(len(items) - len(chosen), 4, np.int32)), validation, test


def encoded(parts, vocabulary, longest):
    """Each part as arrays of one width, with what its texts and answers are; too long ones are left out."""
    found = []
    for part in parts:
        arrays = encode_questions(part, vocabulary, longest=longest, longest_question=ASKED, letters=LETTERS)
        wide = lambda passage, to: type(passage)(*(
            np.pad(a, [(0, 0), (0, to - a.shape[1]), (0, 0)][: a.ndim]) if a.ndim > 1 else a for a in passage
        ))  # fmt: skip
        samples = {**arrays.samples, "context": wide(arrays.context, longest), "question": wide(arrays.question, ASKED)}
        found.append((arrays, samples, [part[k] for k in arrays.kept]))
    return found


class Reader:
    """A small BiDAF with trained word vectors: its loss, its training, its answers, and the weights above it."""

    def __init__(self, words, args):
        width, self.words, self.args = args.width, words, args
        self.model = BiDAF(102, word_features=width, character_features=8, filters=width, hidden=width, dropout=0.0)
        self.rule = optax.adam(5e-3)
        self.read = jax.jit(self.reading)
        self.app = None

    def init(self, seed):
        one, two = jax.random.split(jax.random.key(seed))
        return {"reader": self.model.init(one), "table": 0.3 * jax.random.normal(two, (self.words, self.args.width))}

    def reading(self, y, samples):
        return self.model(y["reader"], samples["context"], samples["question"], table=y["table"])

    def loss(self, y, samples):
        return span_loss(self.reading(y, samples), samples["first"], samples["last"])

    @functools.partial(jax.jit, static_argnums=0)
    def fit(self, y, samples, share, key):
        """Adam on minibatches in which an item is as often as its share says."""

        def step(carry, key):
            y, memory = carry
            i = jax.random.choice(key, len(share), (BATCH,), p=share / share.sum())
            part = jax.tree.map(lambda a: a[i], samples)
            updates, memory = self.rule.update(jax.grad(lambda y: self.loss(y, part).mean())(y), memory)
            return (optax.apply_updates(y, updates), memory), None

        return jax.lax.scan(step, (y, self.rule.init(y)), jax.random.split(key, self.args.training))[0][0]

    def judge(self, y, part):
        """(exact match, F1, loss) on a part's questions."""
        arrays, samples, questions = part
        reading = self.read(y, samples)
        spans = np.asarray(best_span(reading.p1, reading.p2, 8))
        said = [arrays.text(k, span, each.context) for k, (span, each) in enumerate(zip(spans, questions, strict=True))]
        scores = [
            [score(a, each.answers) for a, each in zip(said, questions, strict=True)] for score in (exact_match, f1)
        ]
        loss = span_loss(reading, samples["first"], samples["last"]).mean()
        return float(np.mean(scores[0])), float(np.mean(scores[1])), float(loss)

    def learn(self, y0, train, sources, validation, seed):
        """The weight of each source at every outer step, by one differentiated step on minibatches."""
        features = one_hot(sources, len(SOURCES))
        if self.app is None:
            self.app = weighted(self.loss, y0, train, validation, features=features)
        # One problem with other data: the loop below is compiled for the first seed alone.
        problem = dataclasses.replace(
            self.app.problem,
            upper_data=data.Minibatches(validation, BATCH),
            lower_data=data.Minibatches((train, features), BATCH),
        )
        path = self._run(problem, self.app.x0, y0, data.as_step_key(seed))
        return np.asarray(jax.nn.sigmoid(path))

    @functools.partial(jax.jit, static_argnums=0)
    def _run(self, problem, x0, y0, key):
        solver = solvers.OneStep(2, optax.adam(5e-3), optax.adam(0.1))

        def step(state, k):
            state, _ = solver.step(problem, state, dataclasses.replace(key, step=k))
            return state, state.x

        start = solver.init(problem, x0, y0, key)
        return jnp.concatenate([x0[None], jax.lax.scan(step, start, jnp.arange(self.args.outer, dtype=jnp.uint32))[1]])


def prepare(questions, args, seed):
    """A seed's parts as arrays, the source of each training item, and the vocabulary of these."""
    items, sources, *others = draw_parts(questions, seed, args)
    vocabulary = Vocabulary.of([text for each in items for text in (each.context, each.question)], most=6000)
    parts = encoded((items, *others), vocabulary, args.longest or (60 if args.data is None else 120))
    return parts, sources[parts[0][0].kept], len(vocabulary)


def compare(reader, parts, sources, seed):
    """{method: (exact match, F1)} on the test questions, the weights' path, and answers to look at."""
    train, validation, test = parts
    counts = ", ".join(f"{n} {name}" for n, name in zip(np.bincount(sources, minlength=5), SOURCES, strict=True))
    print(f"seed {seed}: {counts}; {len(validation[2])} for validation, {len(test[2])} for the test", flush=True)
    y0, key = reader.init(seed), jax.random.key(seed + 100)
    both = jax.tree.map(lambda *a: jnp.asarray(np.concatenate(a)), train[1], validation[1])
    ours = np.append(sources == 4, np.zeros(len(validation[2]))).astype(np.float32)
    made = np.append(sources < 4, np.zeros(len(validation[2]))).astype(np.float32)
    fit = lambda share: reader.fit(y0, both, jnp.asarray(share, jnp.float32), key)
    ys = {"not trained": y0, "few questions": fit(ours), "all sources alike": fit(made + ours)}
    mixed = {1: ys["all sources alike"], **{k: fit(made + k * ours) for k in TIMES[1:]}}
    best = min(TIMES, key=lambda k: reader.judge(mixed[k], validation)[2])
    ys["questions k times, k chosen"] = mixed[best]
    path = reader.learn(y0, train[1], sources, validation[1], seed)
    weights = path[-1]
    ys["learnt weights"] = fit(np.append(weights[sources], np.zeros(len(validation[2]))))
    ys["few and validation questions"] = fit(1 - made)
    found = {name: reader.judge(y, test)[:2] for name, y in ys.items()}
    for name, (exact, overlap) in found.items():
        print(
            f"  {name:<30} EM {exact:.3f}  F1 {overlap:.3f}{f'  (k = {best})' if 'k times' in name else ''}", flush=True
        )
    print("  weights: " + ", ".join(f"{name} {w:.2f}" for name, w in zip(SOURCES, weights, strict=True)), flush=True)
    reading = reader.read(ys["learnt weights"], test[1])
    return found, path, (test[2], np.asarray(reading.p1), np.asarray(reading.p2), test[0].offsets)


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a JSON file in SQuAD's format; by default invented paragraphs")
    parser.add_argument("--paragraphs", type=int, default=240, help="that are invented")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--gaps", type=int, default=3, help="of each template in a paragraph, at most")
    parser.add_argument("--items", type=int, default=900, help="made-up items, at most")
    parser.add_argument("--few", type=int, default=60, help="questions by people among the training items")
    parser.add_argument("--validation", type=int, default=200)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--outer", type=int, default=60, help="outer steps")
    parser.add_argument("--training", type=int, default=150, help="training steps of each reader")
    parser.add_argument("--longest", type=int, help="words of a context that are read (60 of invented ones, else 120)")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("reading_sources.png"))
    args = parser.parse_args(given)
    began = time.perf_counter()
    questions = invented(args.paragraphs) if args.data is None else squad(args.data)
    prepared = [prepare(questions, args, seed) for seed in range(args.seeds)]
    reader = Reader(max(words for *_, words in prepared), args)
    runs = [compare(reader, parts, sources, seed) for seed, (parts, sources, _) in enumerate(prepared)]
    rows = {name: np.array([found[name] for found, *_ in runs]) for name in runs[0][0]}
    paths = np.array([path for _, path, _ in runs])
    print(f"test questions, mean over {args.seeds} seeds (least, most)")
    for name, values in rows.items():
        exact, overlap = (f"{v.mean():.3f} ({v.min():.3f}, {v.max():.3f})" for v in values.T)
        print(f"  {name:<30} EM {exact}  F1 {overlap}")
    print("  weights: " + ", ".join(f"{name} {w:.2f}" for name, w in zip(SOURCES, paths[:, -1].mean(0), strict=True)))
    draw(args.out, rows, paths, runs[0][2])
    print(f"picture: {args.out}; {time.perf_counter() - began:.0f} s in all")
    return rows, paths


def draw(path, rows, paths, shown):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1))
    bars, lines = top.subplots(1, 2)
    for row, values in enumerate(rows.values()):
        for which, (label, color) in enumerate((("exact match", "C0"), ("F1", "C1"))):
            place = row + 0.2 - 0.4 * (which == 0)
            bars.barh(place, values[:, which].mean(), 0.38, color=color, alpha=0.7, label=label if not row else None)
            bars.plot(values[:, which], np.full(len(values), place), "k|")
    bars.set_yticks(np.arange(len(rows)), list(rows), fontsize=8)
    bars.invert_yaxis()
    bars.set(title="test questions, each seed a tick", xlim=(0, 1))
    bars.legend(fontsize=8)
    for k, name in enumerate(SOURCES):
        for seed, history in enumerate(paths):
            lines.plot(history[:, k], color=f"C{k}", lw=1.2, alpha=0.8, label=name if not seed else None)
    lines.set(title="weight of each source, a line per seed", xlabel="outer step", ylim=(0, 1))
    lines.legend(fontsize=8)
    axes = bottom.subplots(3, 1)
    questions, p1, p2, offsets = shown
    for axis, k in zip(axes, (0, 1, 2), strict=True):
        axis.axis("off")
        axis.set(xlim=(0, 150), ylim=(0, 5))
        words = [questions[k].context[a:b] for a, b in offsets[k]]
        axis.text(
            0, 5, f"{questions[k].question}   ({questions[k].answers[0]})", fontsize=9, weight="bold", va="center"
        )
        x, y = 0.0, 3.8
        shades = np.maximum(p1[k], p2[k])
        for word, shade in zip(words, shades, strict=False):
            if x + len(word) > 148:
                x, y = 0.0, y - 1.1
            box = {"facecolor": (1, 1 - 0.6 * shade, 1 - 0.9 * shade), "edgecolor": "none", "pad": 1.2}
            axis.text(x, y, word, fontsize=7.5, family="monospace", va="center", bbox=box)
            x += len(word) + 1.3
    bottom.suptitle(
        "answers of the reader under learnt weights: probability of first or last word (darker: more)", fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
