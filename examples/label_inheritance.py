"""Sentences that inherit their document's label: which of them are wrong, found with documents' labels alone.

Reviews and editorials whose sentences people rated (VADER's snippets). Each sentence of a training document gets the
document's label, the sign of its sentences' mean rating, as is usual with interviews; people say how often that is
wrong. A weight per sentence, or a model of weights by five numbers, is learnt so that other documents, classified by
the mean of their sentences' logits, come out right. It prints how well wrong labels are found, and both accuracies.

The picture is of a small hierarchical transformer trained on the same documents: the relevance of a document's
sentences and tokens, by gradient-weighted attention at both levels.

    pip download --no-deps --no-binary vaderSentiment vaderSentiment==3.3.2
    python examples/label_inheritance.py --data vaderSentiment-3.3.2.tar.gz
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import lower, solve, solvers
from bilevel.applications.sequence import (
    HierarchicalTransformer,
    Interview,
    NGrams,
    Vocabulary,
    auc,
    by_document,
    in_documents,
    inherited_labels,
    linear_classifier,
    rule_scores,
    snippets,
    tokenise,
    weak_labels,
)
from bilevel.linear import CG

DECAY = 5e-5
LONGEST, SENTENCES = 24, 12


def load(path):
    """Texts, human ratings, documents and the documents' labels, of reviews and editorials together."""
    texts, human, documents = [], [], []
    for kind in ("amazon", "nyt"):
        part = snippets(kind, path)
        offset = documents[-1] + 1 if documents else 0
        texts += part.texts
        human += part.human.tolist()
        documents += (part.documents + offset).tolist()
    human, documents = np.array(human), np.array(documents)
    means = np.bincount(documents, human) / np.bincount(documents)
    return texts, human, documents, means


def solver():
    return solvers.AID(lower.LBFGS(10), optax.adam(0.2), CG(tol=1e-2, max_steps=10))


def trained(app, steps=60):
    """The lower level alone, at the weights of the start."""
    rule = lower.LBFGS(steps)
    level = app.problem.full_lower()
    return jax.jit(lambda x, y: rule(level, x, rule.init(y)).y)(app.x0, app.y0)


def compare(texts, human, documents, means, scores, seed, steps):
    """{method: (document accuracy, sentence accuracy, AUC or nan)} of one seed."""
    clear = np.flatnonzero(np.abs(means) > 0.1)
    order = np.random.default_rng(seed).permutation(clear)
    n = len(order)
    groups = {"train": order[: n // 2], "validation": order[n // 2 : 5 * n // 8], "test": order[5 * n // 8 :]}
    rows = {name: np.flatnonzero(np.isin(documents, part)) for name, part in groups.items()}
    label = (means > 0).astype(np.int32)
    grams = NGrams.of([texts[k] for k in rows["train"]], most=12_000)
    inputs = {name: grams.encode([texts[k] for k in part], 80) for name, part in rows.items()}
    samples = {name: (inputs[name], documents[part], label[np.unique(documents[part])]) for name, part in rows.items()}
    inherited = label[documents[rows["train"]]]
    opinion = np.abs(human[rows["train"]]) > 0.5
    wrong = (inherited != (human[rows["train"]] > 0))[opinion]
    make = lambda features=None: inherited_labels(
        linear_classifier, grams.init(), samples["train"], samples["validation"], test=samples["test"],
        features=features, decay=DECAY,
    )  # fmt: skip
    plain = make()
    whole = by_document(*samples["test"][:2]), samples["test"][2]
    judged = rows["test"][np.abs(human[rows["test"]]) > 0.5]
    sentences = grams.encode([texts[k] for k in judged], 80)

    def score(y, weights=None):
        right = np.asarray(linear_classifier(y, sentences))[:, 0] > 0
        known = np.nan if weights is None else auc(-weights[opinion], wrong)
        return float(plain.accuracy(None, y, whole)), float((right == (human[judged] > 0)).mean()), known

    found = {"inherited labels": score(trained(plain))}
    of_documents = weak_labels(
        in_documents(linear_classifier), grams.init(), (by_document(*samples["train"][:2]), samples["train"][2]),
        (by_document(*samples["validation"][:2]), samples["validation"][2]), decay=DECAY,
    )  # fmt: skip
    found["documents' labels"] = score(trained(of_documents))
    # What the weights may know of a sentence: its inherited label and how the rule's score goes with it.
    side = 2.0 * inherited - 1
    compound = scores.compound[rows["train"]]
    features = np.stack([np.ones_like(side), side, side * compound, np.abs(compound), compound == 0], 1)
    for name, known in (("weights per sentence", None), ("weights by features", features)):
        app = make(known)
        solution = solve(app.problem, app.x0, app.y0, solver(), steps=steps, key=seed, progress=False)
        found[name] = score(solution.y, np.asarray(app.weights(solution.x)))
    truth = weak_labels(
        linear_classifier, grams.init(), (inputs["train"], (human[rows["train"]] > 0).astype(np.int32)),
        (inputs["train"], inherited), decay=DECAY,
    )  # fmt: skip
    found["human labels (oracle)"] = score(trained(truth))
    return found, wrong.mean(), groups


def interviews(texts, documents, which, vocabulary):
    """A batch of documents for the hierarchical transformer: their first sentences and words."""
    tokens = np.zeros((len(which), SENTENCES, LONGEST), np.int32)
    lengths, counts = np.zeros((len(which), SENTENCES), np.int32), np.zeros(len(which), np.int32)
    for d, document in enumerate(which):
        rows = np.flatnonzero(documents == document)[:SENTENCES]
        ids, sizes = vocabulary.encode([texts[k] for k in rows], LONGEST)
        tokens[d, : len(rows), : ids.shape[1]], lengths[d, : len(rows)], counts[d] = ids, sizes, len(rows)
    return Interview(*map(jnp.asarray, (counts, tokens, lengths)))


def train_transformer(texts, documents, means, groups, steps):
    vocabulary = Vocabulary.of(texts, least=3)
    model = HierarchicalTransformer(
        len(vocabulary), features=32, heads=4, longest=LONGEST, sentences=SENTENCES, layers=2
    )
    batch = interviews(texts, documents, groups["train"], vocabulary)
    labels = jnp.asarray(means[groups["train"]] > 0)
    rule = optax.adam(2e-3)

    @jax.jit
    def run(params):
        def step(carry, key):
            params, memory = carry
            i = jax.random.randint(key, (16,), 0, len(labels))
            part = jax.tree.map(lambda a: a[i], batch)
            loss = lambda p: jax.nn.softplus(jnp.where(labels[i], -1, 1) * model(p, part)).mean()
            updates, memory = rule.update(jax.grad(loss)(params), memory)
            return (optax.apply_updates(params, updates), memory), None

        return jax.lax.scan(step, (params, rule.init(params)), jax.random.split(jax.random.key(0), steps))[0][0]

    params = run(model.init(jax.random.key(0)))
    test = interviews(texts, documents, groups["test"], vocabulary)
    logits = np.asarray(jax.jit(model)(params, test))
    print(f"hierarchical transformer: document accuracy {((logits > 0) == (means[groups['test']] > 0)).mean():.3f}")
    return model, params, test, logits


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the source distribution of vaderSentiment; else in the folder BILEVEL_DATA")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="outer steps")
    parser.add_argument("--training", type=int, default=150, help="training steps of the transformer")
    parser.add_argument("--out", type=Path, default=Path("label_inheritance.png"))
    args = parser.parse_args(given)
    began = time.perf_counter()
    texts, human, documents, means = load(args.data)
    scores = rule_scores(texts, args.data)
    rows = {}
    for seed in range(args.seeds):
        found, share, groups = compare(texts, human, documents, means, scores, seed, args.steps)
        sizes = ", ".join(f"{len(part)} {name}" for name, part in groups.items())
        print(f"seed {seed}: {sizes} documents; {share:.1%} of opinionated sentences inherit a wrong label", flush=True)
        for name, values in found.items():
            rows.setdefault(name, []).append(values)
    print(f"{'mean over seeds':<24} documents  sentences  AUC of wrong labels")
    for name, values in rows.items():
        mean = np.mean(values, 0)
        known = "-" if np.isnan(mean[2]) else f"{mean[2]:.3f}"
        print(f"  {name:<22} {mean[0]:.3f}      {mean[1]:.3f}      {known}")
    draw(args.out, texts, documents, groups, *train_transformer(texts, documents, means, groups, args.training))
    print(f"picture: {args.out}; {time.perf_counter() - began:.0f} s in all")
    return rows


def draw(path, texts, documents, groups, model, params, test, logits):
    from matplotlib.figure import Figure

    chosen = int(np.argmax(np.where(np.asarray(test.sentences) >= 8, logits, -np.inf)))
    found = model.relevance(params, jax.tree.map(lambda a: a[chosen : chosen + 1], test))
    lines = [texts[k] for k in np.flatnonzero(documents == groups["test"][chosen])[:SENTENCES]]
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    bars, words = figure.subplots(1, 2, width_ratios=(1, 5), sharey=True)
    relevance = np.asarray(found.sentences)[0, : len(lines)]
    bars.barh(np.arange(len(lines)), relevance, color="C0")
    bars.set(title="sentences", yticks=np.arange(len(lines)), xlabel="relevance")
    tokens = np.asarray(found.tokens_in_interview)[0]
    most = max(float(tokens.max()), 1e-12)
    for row, line in enumerate(lines):
        x = 0.0
        for j, token in enumerate(tokenise(line)[:LONGEST]):
            shade = float(tokens[row, j]) / most
            box = {"facecolor": (1, 1 - 0.6 * shade, 1 - 0.9 * shade), "edgecolor": "none", "pad": 1.5}
            words.text(x, row, token, fontsize=7.5, family="monospace", va="center", bbox=box)
            x += len(token) + 1.2
    words.set(xlim=(0, 150), title=f"tokens within the document (logit {logits[chosen]:.2f})")
    words.axis("off")
    bars.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
