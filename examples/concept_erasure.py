"""Take one digit out of a text-to-image flow, and leave the others: erasure only, and six ways of keeping the rest.

The base model draws coloured digits from four words. Each route moves one LoRA adapter with Adam, the same step sizes
and the same number of batches; the scores are means over seeds, with the least and the most.

    python examples/concept_erasure.py
    python examples/concept_erasure.py --steps 150 --seeds 0 1 2 --targets add_q_proj add_k_proj add_v_proj
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import Problem, run, solvers
from bilevel.applications.erasure import attack, closed_form, digits, erasure, sample

ERASED = 3


def make(base, train, seed, targets, prompts_seed=0, **options):
    """The problem: erase a word (the base's own images of it), keep real images of the other digits."""
    ink, labels = train
    others = labels != ERASED
    kept, colours = labels[others], np.arange(others.sum()) % 3
    numeral = np.arange(len(kept)) % 2 == 1
    wanted = [ERASED] * 48
    drawn, shades = jax.jit(lambda key: digits.draw(base, base.params, wanted, False, key))(
        jax.random.key(99 + prompts_seed)
    )
    return erasure(
        base.model,
        base.params,
        base.words,
        word=digits.NUMBERS[ERASED],
        synonym=digits.NUMERALS[ERASED],
        irrelevant=("seven", "zero", "five"),
        prompts=digits.prompts_for(wanted, shades, [False] * 48, prompts_seed),
        images=drawn,
        kept_prompts=digits.prompts_for(kept, colours, numeral, prompts_seed),
        kept_images=digits.to_tokens(digits.coloured(ink[others], colours)),
        targets=targets,
        seed=seed,
        **options,
    )


def routes(rate, steps):
    """Each with what it costs: batches of the lower and of the upper level."""
    adam = lambda: optax.adamw(rate, weight_decay=1e-5)
    return {
        "alternation (the paper's two rules)": solvers.Alternating(adam(), optax.adamw(rate / 2, weight_decay=1e-5)),
        "alternation (equal rates)": solvers.Alternating(adam(), adam()),
        "plain sum": solvers.WeightedSum(adam()),
        "dynamic barrier": solvers.DynamicBarrier(adam()),
        "multiplier (EraseAnything++)": solvers.LossMultiplier(adam(), step_size=rate),
        "penalty (V-PBGD)": solvers.PenaltyDescent(adam(), period=steps / 4),
    }


def judged(base, held_out, per_word, guidance):
    """A compiled function of the network's parameters and a key: the six scores."""
    ink, labels = held_out
    rest = [d for d in range(10) if d != ERASED]
    real = digits.to_tokens(digits.coloured(ink[labels != ERASED], np.arange((labels != ERASED).sum()) % 3))
    features = base.judge.features(real)
    wanted = np.repeat(rest, max(per_word // 3, 1))
    hard = [ERASED] * per_word
    known = digits.to_tokens(digits.coloured(ink[labels == ERASED], np.arange((labels == ERASED).sum()) % 3))[:per_word]
    ids = base.words.ids(digits.prompts_for(hard, np.arange(per_word) % 3, [False] * per_word, 0))[: len(known)]

    @jax.jit
    def evaluate(params, key):
        one, two, three, four, five = jax.random.split(key, 5)
        erased, _ = digits.draw(base, params, hard, False, one, guidance=guidance)
        synonym, _ = digits.draw(base, params, hard, True, two, guidance=guidance)
        kept, colours = digits.draw(base, params, wanted, False, three, guidance=guidance)
        # A moved embedding for each prompt: found on noise of its own, judged on other noise.
        prompt = base.words.table[ids]
        moved = attack(base.model, params, prompt, known, four, radius=1.0, steps=10)
        noise = jax.random.normal(five, known.shape)
        null = jnp.broadcast_to(base.words.table[0], prompt.shape)
        back = sample(base.model, params, noise, moved, null, guidance=guidance)
        is_it = lambda tokens: (base.judge.digit(tokens) == ERASED).mean()
        scores = {
            "Acc_e": is_it(erased),
            "Acc_g": is_it(synonym),
            "Acc_ir": (base.judge.digit(kept) == wanted).mean(),
            "colour": (base.judge.colour(kept) == colours).mean(),
            "attacked": is_it(back),
        }
        return scores, base.judge.features(kept), (erased, synonym, kept)

    def scores(params, key):
        found, of_kept, images = evaluate(params, key)
        return {**{k: float(v) for k, v in found.items()}, "Frechet": digits.frechet(of_kept, features)}, images

    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--per-word", type=int, default=30)
    parser.add_argument("--targets", nargs="+", default=["add_q_proj", "add_k_proj"])
    parser.add_argument("--out", type=Path, default=Path("concept_erasure.png"))
    args = parser.parse_args()
    base = digits.base()
    train, held_out = digits.real()
    scores = judged(base, held_out, args.per_word, 2.5)
    names = ("Acc_e", "Acc_g", "Acc_ir", "colour", "Frechet", "attacked")
    print(f"{'route':<38}" + "".join(f"{name:>20}" for name in names) + f"{'CPU s':>8}")

    def show(route, found, seconds):
        cells = []
        for name in names:
            values = [f[name] for f in found]
            cells.append(f"{np.mean(values):.3f} ({min(values):.2f}, {max(values):.2f})")
        print(f"{route:<38}" + "".join(f"{c:>20}" for c in cells) + f"{seconds:8.1f}", flush=True)

    runs, pictures = {}, {}
    keys = {seed: jax.random.key(1000 + seed) for seed in args.seeds}
    results = [scores(base.params, keys[s]) for s in args.seeds]
    show("base", [r[0] for r in results], 0.0)
    pictures["before"] = (base.params, results[0][1])
    number = lambda word: base.words.table[digits.WORDS.index(word)]
    rest = jnp.stack([number(w) for w in digits.WORDS[1:] if w not in ("three", "3")])
    edited = closed_form(base.params, number("three"), number(""), rest)
    show("closed form (UCE's)", [scores(edited, keys[s])[0] for s in args.seeds], 0.0)

    apps = {seed: make(base, train, seed, args.targets) for seed in args.seeds}
    first = apps[args.seeds[0]]
    lower = first.problem
    adam = optax.adamw(args.rate, weight_decay=1e-5)
    alone = Problem(lambda x, y, b: 0.0 * first.problem.upper(x, y, b), lower.lower, lower.upper_data, lower.lower_data)
    harsh = make(base, train, args.seeds[0], args.targets, attack=(0.5, 2))
    todo = {"erasure alone (ESD, attention)": (alone, solvers.WeightedSum(adam))}
    todo |= {name: (first.problem, solver) for name, solver in routes(args.rate, args.steps).items()}
    todo["barrier, trained against attacks"] = (harsh.problem, solvers.DynamicBarrier(adam))
    for name, (problem, solver) in todo.items():
        start = time.process_time()
        move = jax.jit(
            lambda problem, y, key, solver=solver: run(problem, solver, None, y, steps=args.steps, key=key)[0].y
        )
        found = []
        for seed in args.seeds:
            y = move(problem, apps[seed].y0, jax.random.key(seed))
            found.append((first.adapted(y), y))
        seconds = (time.process_time() - start) / len(args.seeds)
        results = [scores(params, keys[s]) for (params, _), s in zip(found, args.seeds, strict=True)]
        runs[name] = [r[0] for r in results]
        pictures[name] = (found[0][0], results[0][1])
        show(name, runs[name], seconds)
    picture(args.out, base, pictures, first)


def picture(path, base, pictures, app):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = {"before": pictures["before"], "erasure alone": pictures["erasure alone (ESD, attention)"],
              "dynamic barrier": pictures["dynamic barrier"]}  # fmt: skip
    (image, prompt, column), noise, t = app.problem.draw_lower(0).batch
    figure, axes = plt.subplots(len(chosen), 15, figsize=(15, 3.4), squeeze=False)
    for line, (name, (params, (erased, synonym, kept))) in zip(axes, chosen.items(), strict=True):
        step = max(len(kept) // 5, 1)
        shown = [*digits.to_images(erased)[:4], *digits.to_images(synonym)[:4], *digits.to_images(kept)[::step][:5]]
        x = 0.5 * noise + 0.5 * image
        maps = base.model.attend(params, x, prompt, jnp.full(len(t), 0.5))[1]
        onto = np.asarray(jnp.einsum("bhqw,bw->q", maps, column)).reshape(4, 4) / len(t) / maps.shape[1]
        for axis, picture in zip(line, shown, strict=False):
            axis.imshow(np.clip((np.asarray(picture) + 1) / 2, 0, 1))
        line[13].imshow(onto, vmin=0, vmax=0.3, cmap="magma")
        line[14].axis("off")
        line[14].text(0, 0.5, name, va="center")
    for axis in axes.ravel():
        axis.set_xticks([]), axis.set_yticks([])
    for place, title in ((0, '"three"'), (4, '"3"'), (8, "kept words"), (13, "attention")):
        axes[0, place].set_title(title, fontsize=9, loc="left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(path)


if __name__ == "__main__":
    main()
