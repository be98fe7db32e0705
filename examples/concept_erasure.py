"""Take one digit out of a text-to-image flow, and leave the others: erasure alone, and nine ways of keeping the rest.

The base model draws coloured digits from four words. Each route moves one LoRA adapter with Adam at one step size, and
takes `--steps` gradients of either level. Hypergradient routes take so many in their lower level, which has all four
losses, and every five of them move the losses' weights and the adapter's gates by a held-out loss.

Scores are means over seeds, with the least and the most: how often the erased word, its numeral and the other words are
drawn, their colours, the Frechet distance of the others' features to real ones, and how often the erased word comes
back when each of its vectors may move by 1 (attacked).

    python examples/concept_erasure.py
    python examples/concept_erasure.py --all    # the two slowest routes as well
    python examples/concept_erasure.py --steps 300 --seeds 0 1 2 3 4 --targets add_q_proj add_k_proj add_v_proj
"""

from __future__ import annotations

import argparse
import functools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import Problem, hypergradients, linear, lower, run, solvers
from bilevel.applications.erasure import attack, closed_form, digits, erasure, sample, weighted

ERASED = 3
INNER = 5  # lower steps to a hypergradient
QUICK = {"xla_backend_optimization_level": 1}  # compiles in half the time to code as fast


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
    """Both levels own y: every iteration takes a gradient of each."""
    adam = lambda: optax.adamw(rate, weight_decay=1e-5)
    return {
        "alternation, the paper's two rules": solvers.Alternating(adam(), optax.adamw(rate / 2, weight_decay=1e-5)),
        "alternation, equal rates": solvers.Alternating(adam(), adam()),
        "plain sum": solvers.WeightedSum(adam()),
        "dynamic barrier": solvers.DynamicBarrier(adam()),
        "multiplier (EraseAnything++)": solvers.LossMultiplier(adam(), step_size=rate),
        "penalty (V-PBGD)": solvers.PenaltyDescent(adam(), period=steps / 4),
    }


def implicit_routes(rate):
    """Weights and gates above, the adapter below; every iteration takes INNER steps below and one above."""
    estimators = {
        "hypergradient, AID": hypergradients.Implicit(linear.CG(max_steps=3, damping=1.0)),
        "hypergradient, one step": hypergradients.OneStep(),
        "hypergradient, unrolled": hypergradients.Unrolled(),
    }
    below = lower.GradientDescent(optax.adamw(rate, weight_decay=1e-5, eps_root=1e-12), steps=INNER)
    return {n: solvers.HypergradientDescent(e, below, optax.adam(0.05)) for n, e in estimators.items()}


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

    @functools.partial(jax.jit, compiler_options=QUICK)
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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--per-word", type=int, default=30)
    parser.add_argument("--targets", nargs="+", default=["add_q_proj", "add_k_proj"])
    parser.add_argument("--workers", type=int, default=2, help="routes that are trained at a time")
    parser.add_argument("--routes", nargs="+", default=[""], help="only those whose name has one of these in it")
    parser.add_argument("--all", action="store_true", help="the hypergradients of one step and unrolled, too")
    parser.add_argument("--out", type=Path, default=Path("concept_erasure.png"))
    args, started = parser.parse_args(argv), time.perf_counter()
    base = digits.base()
    train, held_out = digits.real()
    scores = judged(base, held_out, args.per_word, 2.5)
    names = ("Acc_e", "Acc_g", "Acc_ir", "colour", "Frechet", "attacked")
    print(f"{'route':<38}" + "".join(f"{name:>20}" for name in names) + f"{'wall s':>8}")

    def show(route, found, seconds):
        cells = []
        for name in names:
            values = [f[name] for f in found]
            cells.append(f"{np.mean(values):.3f} ({min(values):.2f}, {max(values):.2f})")
        print(f"{route:<38}" + "".join(f"{c:>20}" for c in cells) + f"{seconds:8.1f}", flush=True)

    rows, pictures = {}, {}
    keys = {seed: jax.random.key(1000 + seed) for seed in args.seeds}

    def row(name, params, seconds):
        results = [scores(p, keys[s]) for p, s in zip(params, args.seeds, strict=True)]
        rows[name], pictures[name] = [found for found, _ in results], (params[0], results[0][1])
        show(name, rows[name], seconds)

    row("base", [base.params] * len(args.seeds), 0.0)
    vector = lambda word: base.words.table[digits.WORDS.index(word)]
    rest = jnp.stack([vector(w) for w in digits.WORDS[1:] if w not in ("three", "3")])
    edited = closed_form(base.params, vector("three"), vector(""), rest)
    row("closed form (after UCE)", [edited] * len(args.seeds), 0.0)

    apps = {seed: make(base, train, seed, args.targets) for seed in args.seeds}
    app = apps[args.seeds[0]]
    plain = app.problem
    alone = Problem(lambda x, y, b: jnp.zeros(()), plain.lower, plain.upper_data, plain.lower_data)
    harsh = make(base, train, args.seeds[0], args.targets, attack=(0.5, 2))
    above = weighted(app, make(base, held_out, args.seeds[0], args.targets, prompts_seed=1))
    adam = optax.adamw(args.rate, weight_decay=1e-5)
    todo = {"erasure alone (ESD, attention)": (alone, solvers.WeightedSum(adam), None, args.steps)}
    todo |= {n: (plain, solver, None, args.steps) for n, solver in routes(args.rate, args.steps).items()}
    todo["barrier, trained against attacks"] = (harsh.problem, solvers.DynamicBarrier(adam), None, args.steps)
    steps = args.steps // INNER
    implicit = implicit_routes(args.rate)
    names_of = implicit if args.all else list(implicit)[:1]
    todo |= {n: (above.problem, implicit[n], above.x0, steps) for n in names_of}
    todo = {n: route for n, route in todo.items() if any(part in n for part in args.routes)}

    def trained(route):
        """The network for each seed, and the seconds that it took, compilation within."""
        problem, solver, x0, steps = route
        start = time.perf_counter()
        move = jax.jit(
            lambda problem, x, y, key: run(problem, solver, x, y, steps=steps, key=key)[0], compiler_options=QUICK
        )
        states = [move(problem, x0, apps[seed].y0, jax.random.key(seed)) for seed in args.seeds]
        params = jax.block_until_ready([app.adapted(state.y, state.x) for state in states])
        return params, time.perf_counter() - start

    with ThreadPoolExecutor(args.workers) as pool:
        for name, (params, seconds) in zip(todo, pool.map(trained, todo.values()), strict=True):
            row(name, params, seconds)
    verdicts(rows)
    print(f"CPU {time.process_time():.0f} s, wall {time.perf_counter() - started:.0f} s")
    picture(args.out, base, pictures, app)
    return rows


def verdicts(rows):
    """What holds beyond the spread: which routes keep more than erasure alone on every pair of seeds."""
    if "erasure alone (ESD, attention)" not in rows:
        return
    alone = [f["Acc_ir"] for f in rows["erasure alone (ESD, attention)"]]
    trained = [n for n in rows if n not in ("base", "closed form (after UCE)", "erasure alone (ESD, attention)")]
    better = [n for n in trained if min(f["Acc_ir"] for f in rows[n]) > max(alone)]
    good = [
        n for n in trained
        if np.mean([f["Acc_ir"] for f in rows[n]]) >= 0.95 and np.mean([f["Acc_e"] for f in rows[n]]) <= 0.3
    ]  # fmt: skip
    print(f"Keep more of the others than erasure alone, beyond the spread: {'; '.join(better) or 'none'}.")
    print(f"Acc_e at most .3 and Acc_ir at least .95: {'; '.join(good) or 'none'}.")
    least = {n: max(f["attacked"] for f in rows[n]) for n in trained}
    hard = [n for n in trained if all(least[n] < min(f["attacked"] for f in rows[m]) for m in trained if m != n)]
    print(f"Withstands the attack better than every other, beyond the spread: {'; '.join(hard) or 'none'}.")


def picture(path, base, pictures, app):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = {"base": "before", "erasure alone (ESD, attention)": "erasure alone", "dynamic barrier": "dynamic barrier"}
    chosen = {label: pictures[name] for name, label in lines.items() if name in pictures}
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
