"""The study: attacks and defences side by side, on digits, over seeds; one entry point."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import run, solve
from bilevel.applications.contrastive import defences as by
from bilevel.applications.contrastive.defences import Found, Suspect
from bilevel.applications.contrastive.digits import check_target, split
from bilevel.applications.contrastive.evaluate import auroc, knn, logits, probe, tpr_at, wilson
from bilevel.applications.contrastive.losses import normalised
from bilevel.applications.contrastive.perturbation import Perturbation
from bilevel.applications.contrastive.pretraining import Pretraining
from bilevel.applications.contrastive.problem import problem_of
from bilevel.applications.contrastive.routes import ROUTES, route

FEWEST_CLEAN = 3


class Rule(NamedTuple):
    """How a defence is run and read.

    Attributes:
        kind: "encoder", "pool" or "input" (detectors), "preprocessing" (input, and a repair), "repair".
        run: `(encode, suspect, key) -> Found`; None: a bilevel problem, solved for all encoders at once.
        threshold: of the statistic; None: it has none, or is the share of labels that a repair changes.
        below: flagged below the threshold, and not above.
    """

    kind: str
    run: Any
    threshold: float
    below: bool = False


CHANGED = 0.05
"""A repair flags an encoder where it changes more than this share of the pool's labels (ours)."""

DEFENCES = {
    "DECREE": Rule("encoder", by.decree, 0.1, True),
    "SSL-Cleanse": Rule("encoder", by.ssl_cleanse, 2.0),
    "Neural Cleanse, patch": Rule("encoder", by.neural_cleanse, 2.0),
    "Neural Cleanse, additive": Rule("encoder", functools.partial(by.neural_cleanse, additive=True), 2.0),
    "spectral signatures": Rule("pool", by.spectral, 0.5),
    "activation clustering": Rule("pool", by.activation_clustering, 0.5),
    "ASSET": Rule("pool", None, 0.1),
    "reconstruction error": Rule("input", by.reconstruction, 0.1),
    "masking trajectory": Rule("input", by.masking_trajectory, 0.1),
    "blur": Rule("preprocessing", by.preprocessing, 0.1),
    "quantisation": Rule("preprocessing", functools.partial(by.preprocessing, change=by.quantised), 0.1),
    "CLP": Rule("repair", by.clp, 3.0),
    "fine-pruning": Rule("repair", by.fine_pruning, CHANGED),
    "ANP": Rule("repair", by.anp, CHANGED),
    "I-BAU": Rule("repair", None, CHANGED),
    "label-free unlearning": Rule("repair", None, CHANGED),
    "fine-tuning": Rule("repair", by.fine_tuning, CHANGED),
    "distillation": Rule("repair", by.distillation, CHANGED),
}
"""By name: each defence's kind, its function and its threshold."""


@dataclasses.dataclass(frozen=True)
class Share:
    """A share of test images, counted over all seeds, with Wilson's interval.

    Attributes:
        by_seed: the share of each seed.
        successes, trials: in all.
    """

    by_seed: tuple[float, ...]
    successes: int
    trials: int

    @property
    def value(self) -> float:
        """The share."""
        return self.successes / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, at 95 %."""
        return wilson(self.successes, self.trials)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} ({low:.3f}, {high:.3f})"


@dataclasses.dataclass(frozen=True)
class Attack:
    """What a perturbation does to encoders that were pretrained on a pool with some of it.

    Attributes:
        accuracy, neighbours: of the probe and of nearest neighbours on clean test images.
        success: the share of test images of other classes that the probe gives the target's label when perturbed.
        kept: the probe's accuracy on perturbed test images.
        surrogate: the success on the surrogate that the perturbation was tuned with; None for the fixed one.
        control: the success on clean encoders, which have never met the perturbation.
        together: by seed, the mean cosine between features of perturbed test images.
    """

    accuracy: Share
    neighbours: Share
    success: Share
    kept: Share
    surrogate: Share | None
    control: Share
    together: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Defence:
    """What a defence says of the perturbed encoders and of clean ones, and what it leaves of accuracy and attack.

    Attributes:
        kind: "encoder", "pool", "input", "preprocessing" or "repair".
        threshold: of the statistic; `below`: flagged below it.
        statistic, clean_statistic: of each perturbed and of each clean encoder.
        flagged: the share of the perturbed encoders that is flagged.
        false_positives: the share of the clean encoders that is flagged.
        sample_false_positives: the share of clean samples above the detector's cut, on clean encoders; else None.
        auroc, tpr: by seed, of detectors of samples: of perturbed against clean ones, and the true-positive rate at a
            false-positive rate of 5 %; else None.
        before, after: (accuracy, success) of repairs and preprocessing; else None.
        seconds: of the run per encoder, compilation aside where `solve` is not used.
    """

    kind: str
    threshold: float
    below: bool
    statistic: tuple[float, ...]
    clean_statistic: tuple[float, ...]
    flagged: float
    false_positives: float
    sample_false_positives: float | None
    auroc: tuple[float, ...] | None
    tpr: tuple[float, ...] | None
    before: tuple[Share, Share] | None
    after: tuple[Share, Share] | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class Claim:
    """An ordering that is claimed, and whether it holds here.

    Attributes:
        claim: in words.
        difference: by seed, of what is claimed to be larger less what is claimed to be smaller.
        holds: on each seed.
        apart: the intervals over all seeds do not overlap, in the claimed order.
    """

    claim: str
    difference: tuple[float, ...]
    apart: bool

    @property
    def holds(self) -> bool:
        """On each seed."""
        return min(self.difference) > 0

    def __str__(self) -> str:
        differences = ", ".join(f"{d:+.3f}" for d in self.difference)
        said = (
            "holds" if self.holds and self.apart else "holds on each seed, intervals overlap" if self.holds else "FAILS"
        )
        return f"{said}: {self.claim} ({differences})"


@dataclasses.dataclass(frozen=True, repr=False)
class Study:
    """Attacks and defences, always both. It stays in memory: it cannot be pickled, and holds no generator.

    Attributes:
        attacks: by name ("fixed", and the routes), what they do.
        defences: by name, against the attack named `attacked`.
        attacked: the route whose encoders the defences are given.
        claims: orderings that papers claim, as they came out.
        seeds, settings: of the study.
        pictures: of the first seed, for a figure: test images and their perturbed versions, features of both, labels.
        seconds: in all.
    """

    attacks: dict[str, Attack]
    defences: dict[str, Defence]
    attacked: str
    claims: tuple[Claim, ...]
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    pictures: dict[str, np.ndarray]
    seconds: float

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "A Study stays in memory: it is an evaluation of defences, and its perturbed images are not written to "
            "disk. Write down its table, print(study)."
        )

    def __repr__(self) -> str:
        lines = [
            "Attacks, over all seeds, with Wilson intervals",
            f"  {'perturbation':14} {'accuracy':20} {'10 neighbours':20} {'attack success':20} {'on the surrogate':20} "
            f"{'on clean encoders':20} alike",
        ]
        for name, a in self.attacks.items():
            surrogate = "-" if a.surrogate is None else str(a.surrogate)
            lines.append(
                f"  {name:14} {a.accuracy!s:20} {a.neighbours!s:20} {a.success!s:20} {surrogate:20} {a.control!s:20} "
                f"{np.mean(a.together):.2f}"
            )
        lines += [
            f"Defences, against the attack {self.attacked!r}",
            f"  {'defence':25} {'statistic':21} {'on clean encoders':21} {'flags':>9} {'flagged':>7} {'FPR':>5} "
            f"{'FPR, samples':>12} {'AUROC':>6} {'TPR@5%':>6}  {'accuracy':14} {'attack success':14} {'seconds':>7}",
        ]
        for name, d in self.defences.items():
            spread = lambda values: f"{np.mean(values):.3g} ({min(values):.3g}..{max(values):.3g})"  # noqa: E731
            number = lambda v, width: f"{'-' if v is None else f'{np.mean(v):.2f}':>{width}}"  # noqa: E731
            change = lambda k, d=d: (  # noqa: E731
                "-" if d.before is None else f"{d.before[k].value:.3f}->{d.after[k].value:.3f}"
            )
            lines.append(
                f"  {name:25} {spread(d.statistic):21} {spread(d.clean_statistic):21} "
                f"{('< ' if d.below else '> ') + f'{d.threshold:g}':>9} {d.flagged:7.2f} {d.false_positives:5.2f} "
                f"{number(d.sample_false_positives, 12)} {number(d.auroc, 6)} {number(d.tpr, 6)}  {change(0):14} "
                f"{change(1):14} {d.seconds:7.2f}"
            )
        lines += ["Claims", *(f"  {claim}" for claim in self.claims)]
        return "\n".join(lines)


def robustness_study(
    seeds: Sequence[int] = (0, 1, 2),
    *,
    target: int = 0,
    bound: float = 0.25,
    share: float = 0.04,
    pretraining: Pretraining | None = None,
    attacks: Sequence[str] = ROUTES,
    attacked: str | None = None,
    defences: Sequence[str] = tuple(DEFENCES),
    clean_encoders: int = FEWEST_CLEAN,
    steps: int = 500,
    rounds: int = 100,
    inner: int = 5,
    every: int = 40,
    repair_steps: int = 100,
    data: Any = "digits",
) -> Study:
    """Which defences hold against perturbations tuned through contrastive pretraining? On digits, over seeds.

    Per seed the digits are split anew; a perturbation is tuned by each route; an encoder is pretrained on the pool
    with `share` of it perturbed; the encoder of `attacked` and clean ones are given to each defence. All of it is
    `vmap`ped over seeds. Attack and defence columns come together, always; nothing is written to disk.

    Args:
        seeds: different integers.
        target: the class that perturbed images shall be taken for.
        bound: L-infinity, in (0, 1], of pixels in 0..1. The literature's 8/255 is for photographs; digits of 8x8
            pixels hold little that could be hidden in it.
        share: of the pool that is perturbed, images of the target class.
        pretraining: the lower level, of surrogate and victims alike; None: SimCLR on a small MLP.
        attacks: routes (`routes.ROUTES`), besides the "fixed" pattern, which is always there.
        attacked: one of `attacks`; None: the first.
        defences: names of `DEFENCES`, at least one.
        clean_encoders: at least three, for the false-positive rates.
        steps: of each pretraining.
        rounds, inner, every: of the tuning: outer steps, steps of the surrogate between them, and rounds from one fresh
            surrogate to the next. The paper does not give its own.
        repair_steps: outer steps of the bilevel defences.
        data: "digits"; anything else is refused.

    Raises:
        ValueError: other data, a bound outside (0, 1], a class that does not occur, a share that the class cannot hold,
            fewer than three clean encoders, an unknown route or defence, none of them.
    """
    began = time.perf_counter()
    seeds, attacks, defences = tuple(seeds), tuple(attacks), tuple(defences)
    attacked = _check(
        seeds, attacks, attacked, defences, clean_encoders, target, steps, rounds, inner, every, repair_steps
    )
    g, learner = Perturbation(bound), pretraining or Pretraining()
    encode = learner.encoder
    if clean_encoders > len(seeds):
        spare = tuple(k for k in range(len(seeds) + clean_encoders) if k not in seeds)
    else:
        spare = ()
    every_seed = (*seeds, *spare[: max(clean_encoders - len(seeds), 0)])
    stack = lambda *parts: np.stack(parts)  # noqa: E731
    splits = jax.tree.map(stack, *(split(seed, target, share, data) for seed in every_seed))
    digits, n = jax.tree.map(lambda a: a[: len(seeds)], splits), len(seeds)
    keys = lambda tag, seeds=seeds: jnp.stack([jax.random.fold_in(jax.random.key(s), tag) for s in seeds])  # noqa: E731

    # clean encoders, and from their first steps on nothing else is needed for the surrogate that stays frozen
    clean = _train(learner, steps, splits.pool, keys(1, every_seed))

    # the perturbations
    tuned = {}
    for name in attacks:
        tuned[name] = _tuned(name, g, learner, digits, target, keys(2), clean, n, rounds, inner, every)
    patterns = jax.vmap(lambda key: g.fixed(20 * jax.random.rademacher(key, (64,), float)))(keys(3))
    perturbations = {"fixed": patterns, **{name: psi for name, (psi, _) in tuned.items()}}

    # the victims: all attacks and seeds in one batch
    names = list(perturbations)
    psis = jax.tree.map(lambda *p: jnp.concatenate(p), *perturbations.values())
    tile = lambda tree, k: jax.tree.map(lambda a: jnp.concatenate([jnp.asarray(a)] * k), tree)  # noqa: E731
    perturb = jax.jit(jax.vmap(lambda psi, d: jnp.where(d.flags[:, None, None], g(psi, d.pool), d.pool)))
    pools = perturb(psis, tile(digits, len(names)))
    victims = _train(learner, steps, pools, jnp.concatenate([keys(4 + k) for k in range(len(names))]))

    judge = functools.partial(_judge, encode, target)
    show = jax.jit(jax.vmap(g))
    triggered = show(psis, tile(digits, len(names)).test)
    of_victims = judge(victims["encoder"], tile(digits, len(names)), triggered)
    take = lambda tree, k: jax.tree.map(lambda a: a[k * n : (k + 1) * n], tree)  # noqa: E731
    others = np.asarray(digits.test_labels != target)
    first = jax.tree.map(lambda a: a[:n], clean["encoder"])
    of_clean = judge(tile(first, len(names)), tile(digits, len(names)), triggered)
    found = {}
    for k, name in enumerate(names):
        v, c = take(of_victims, k), take(of_clean, k)
        surrogate = None
        if name in tuned:
            s = judge(tuned[name][1]["encoder"], digits, take(triggered, k))
            surrogate = _share(s["hit"], others)
        found[name] = Attack(
            _share(v["right"]),
            _share(v["neighbour"]),
            _share(v["hit"], others),
            _share(v["kept"]),
            surrogate,
            _share(c["hit"], others),
            tuple(float(a) for a in v["alike"]),
        )

    # the defences: the attacked encoders and the clean ones in one batch
    k = names.index(attacked)
    whole = lambda a, b: jnp.concatenate([jnp.asarray(a), jnp.asarray(b)[:clean_encoders]])  # noqa: E731
    with_trigger = show(
        jax.tree.map(lambda a: jnp.resize(a, (len(every_seed), *a.shape[1:])), take(psis, k)), splits.test
    )
    fit = functools.partial(_fit, encode)
    encoders = jax.tree.map(whole, take(victims["encoder"], k), clean["encoder"])
    arrays = jax.tree.map(whole, digits, splits)
    suspects = Suspect(
        encoders,
        fit(encoders, arrays.trusted, arrays.trusted_labels),
        whole(take(pools, k), splits.pool),
        whole(digits.flags, np.zeros_like(splits.flags)),
        arrays.trusted,
        arrays.trusted_labels,
        arrays.test,
        arrays.test_labels,
        whole(take(triggered, k), with_trigger),
    )
    defended = {}
    for name in defences:
        answer, seconds = _answer(name, encode, suspects, repair_steps)
        defended[name] = _read(DEFENCES[name], encode, suspects, answer, seconds, n, target)
    features = jax.jit(encode)(
        jax.tree.map(lambda a: a[0], suspects.encoder), jnp.concatenate([suspects.test[0], suspects.triggered[0]])
    )
    pictures = {
        "images": np.asarray(suspects.test[0]), "perturbed": np.asarray(suspects.triggered[0]),
        "labels": np.asarray(suspects.test_labels[0]), "features": np.asarray(normalised(features)),
    }  # fmt: skip
    settings = {
        "target": target, "bound": bound, "share": share, "clean_encoders": clean_encoders, "steps": steps,
        "rounds": rounds, "inner": inner, "every": every, "repair_steps": repair_steps, "pretraining": learner,
    }  # fmt: skip
    claims = _claims(found, defended, attacked)
    return Study(found, defended, attacked, claims, seeds, settings, pictures, time.perf_counter() - began)


def _check(
    seeds: Any, attacks: Any, attacked: Any, defences: Any, clean_encoders: Any, target: Any, steps: Any, rounds: Any,
    inner: Any, every: Any, repair_steps: Any,
) -> str:  # fmt: skip
    """Raise a sentence where a part of the study cannot be run; the attack that is defended against."""
    if not seeds or len(set(seeds)) != len(seeds) or not all(type(s) is int and s >= 0 for s in seeds):
        raise ValueError(f"seeds={seeds}: give different integers that are not negative, at least one.")
    check_target(target)
    for name in attacks:
        if name not in ROUTES:
            raise ValueError(f"attacks: {name!r} is no route to a hypergradient; these are {', '.join(ROUTES)}.")
    if not attacks or len(set(attacks)) != len(attacks):
        raise ValueError(f"attacks={attacks}: name at least one route, each once; they are {', '.join(ROUTES)}.")
    attacked = attacks[0] if attacked is None else attacked
    if attacked not in attacks:
        raise ValueError(f"attacked={attacked!r} is not among the attacks {', '.join(attacks)}.")
    for name in defences:
        if name not in DEFENCES:
            raise ValueError(f"defences: {name!r} is none of {', '.join(DEFENCES)}.")
    if not defences or len(set(defences)) != len(defences):
        raise ValueError(
            f"defences={defences}: attacks are shown beside defences alone, so name at least one, each once."
        )
    if type(clean_encoders) is not int or clean_encoders < FEWEST_CLEAN:
        raise ValueError(
            f"clean_encoders={clean_encoders!r}: a defence's false-positive rate is measured on at least "
            f"{FEWEST_CLEAN} clean encoders."
        )
    counts = {"steps": steps, "rounds": rounds, "inner": inner, "every": every, "repair_steps": repair_steps}
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}={value!r}: a positive integer is needed.")
    return attacked


def _tuned(
    name: str, g: Perturbation, learner: Pretraining, digits: Any, target: int, keys: Any, clean: Any, n: int,
    rounds: int, inner: int, every: int,
) -> tuple[Any, Any]:  # fmt: skip
    """The perturbation's parameters that a route finds for each seed, and the surrogate at its end."""
    start = jax.tree.map(lambda a: a[:n], clean)

    def one(digits: Any, key: Any, start: Any) -> tuple[Any, Any]:
        of_x, of_y, of_draws, of_run = jax.random.split(key, 4)
        solver = route(name, learner.rule(inner * every), learner.init, inner=inner, every=every, key=of_draws)
        y0 = start if name == "frozen" else learner.init(of_y)
        state, _ = run(problem_of(g, learner, digits, target), solver, g.init(of_x), y0, rounds, of_run)
        return state.x, state.y

    return jax.jit(jax.vmap(one))(digits, keys, start)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train(learner: Pretraining, steps: int, images: Any, keys: Any) -> Any:
    """Pretrained parameters, an encoder per leading entry."""
    return jax.vmap(functools.partial(learner.train, steps=steps))(images, keys)


@functools.partial(jax.jit, static_argnums=0)
def _fit(encode: Any, encoders: Any, images: Any, labels: Any) -> Any:
    """A probe for each encoder."""
    return jax.vmap(lambda e, x, t: probe(encode(e, x), t))(encoders, images, labels)


@functools.partial(jax.jit, static_argnums=0)
def _labels(encode: Any, encoders: Any, probes: Any, images: Any) -> Any:
    """What each encoder's probe says of its images."""
    return jax.vmap(lambda e, p, x: logits(p, encode(e, x)).argmax(-1))(encoders, probes, images)


@jax.jit
def _told_apart(scores: Any, positive: Any) -> Any:
    """AUROC and true-positive rate, by encoder."""
    return jax.vmap(lambda s, p: (auroc(s, p), tpr_at(s, p)))(scores, positive)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _judge(encode: Any, target: int, encoders: Any, digits: Any, triggered: Any, probes: Any = None) -> Any:
    """`_judged` of each encoder."""
    if probes is None:
        probes = _fit(encode, encoders, digits.trusted, digits.trusted_labels)
    images = {"trusted": digits.trusted, "trusted_labels": digits.trusted_labels, "test": digits.test}
    images["test_labels"] = digits.test_labels
    return jax.vmap(functools.partial(_judged, encode, target))(encoders, images, triggered, probes)


def _judged(encode: Any, target: int, encoder: Any, digits: dict[str, Any], triggered: Any, fitted: Any) -> Any:
    """By test image: right, right by neighbours, right though perturbed, taken for the target; and how alike."""
    trusted, clean, changed = (encode(encoder, x) for x in (digits["trusted"], digits["test"], triggered))
    said, then = logits(fitted, clean).argmax(-1), logits(fitted, changed).argmax(-1)
    z = normalised(changed)
    m = len(z)
    return {
        "right": said == digits["test_labels"],
        "neighbour": knn(trusted, digits["trusted_labels"], clean) == digits["test_labels"],
        "kept": then == digits["test_labels"],
        "hit": then == target,
        "alike": (jnp.sum(z.sum(0) ** 2) - m) / (m * (m - 1)),
    }


def _share(hits: Any, among: Any = None) -> Share:
    """A share by seed, and counted over all."""
    hits = np.asarray(hits)
    among = np.ones_like(hits) if among is None else np.asarray(among)
    successes, trials = (hits & among).sum(-1), among.sum(-1)
    return Share(tuple((successes / trials).tolist()), int(successes.sum()), int(trials.sum()))


def _answer(name: str, encode: Any, suspects: Suspect, repair_steps: int) -> tuple[Found, float]:
    """What a defence says of each encoder, and its seconds per encoder."""
    count = suspects.pool.shape[0]
    if DEFENCES[name].run is not None:
        keys = jax.random.split(jax.random.key(0), count)
        compiled = jax.jit(jax.vmap(functools.partial(DEFENCES[name].run, encode))).lower(suspects, keys).compile()
        began = time.perf_counter()
        answer = jax.block_until_ready(compiled(suspects, keys))
        return answer, (time.perf_counter() - began) / count
    began = time.perf_counter()
    if name == "I-BAU":
        classify = lambda params, images: logits(params[1], encode(params[0], images))  # noqa: E731
        start = (suspects.encoder, suspects.probe)
        app = by.ibau(classify, start, suspects.trusted, suspects.trusted_labels, stacked=True)
        solution = solve(app.problem, app.x0, app.y0, by.ibau_solver(), steps=repair_steps, progress=False)
        answer = Found(encoder=solution.x[0], probe=solution.x[1])
    elif name == "ASSET":
        app = by.asset(encode, suspects.encoder, suspects.trusted, suspects.pool, stacked=True)
        solver = by.asset_solver(suspects.pool.shape[1])
        solution = solve(app.problem, app.x0, app.y0, solver, steps=repair_steps, progress=False)
        scores, held = (
            jax.vmap(functools.partial(by.offsets, encode))(suspects.encoder, solution.x, images)
            for images in (suspects.pool, suspects.trusted)
        )
        cut = jnp.quantile(held, 0.95, axis=1)
        answer = Found(statistic=jnp.mean(scores > cut[:, None], 1), scores=scores, cut=cut)
    else:
        app = by.unlearning(encode, suspects.encoder, suspects.trusted, stacked=True)
        solution = solve(app.problem, app.x0, app.y0, by.unlearning_solver(), steps=repair_steps, progress=False)
        answer = Found(encoder=solution.x)
    return jax.block_until_ready(answer), (time.perf_counter() - began) / count


def _read(rule: Rule, encode: Any, suspects: Suspect, answer: Found, seconds: float, n: int, target: int) -> Defence:
    """A defence's columns: of the first n encoders, which are the perturbed ones, and of the rest, which are clean."""
    statistic, areas, rates, false, before, after = answer.statistic, None, None, None, None, None
    others = np.asarray(suspects.test_labels != target)[:n]
    judge = functools.partial(_judge, encode, target)
    if answer.encoder is not None:
        was = judge(suspects.encoder, suspects, suspects.triggered, suspects.probe)
        changed = suspects if answer.test is None else suspects._replace(test=answer.test)
        triggered = suspects.triggered if answer.triggered is None else answer.triggered
        fitted = answer.probe
        if fitted is None:
            fitted = _fit(encode, answer.encoder, suspects.trusted, suspects.trusted_labels)
        now = judge(answer.encoder, changed, triggered, fitted)
        before, after = ((_share(j["right"][:n]), _share(j["hit"][:n], others)) for j in (was, now))
        if statistic is None:
            old = _labels(encode, suspects.encoder, suspects.probe, suspects.pool)
            new = _labels(encode, answer.encoder, fitted, suspects.pool)
            statistic = jnp.mean(old != new, 1)
    if answer.scores is not None:
        positive = suspects.flags
        if rule.kind != "pool":
            m = suspects.test.shape[1]
            positive = jnp.broadcast_to(jnp.arange(2 * m) >= m, answer.scores.shape)
        areas, rates = (tuple(map(float, a)) for a in _told_apart(answer.scores[:n], positive[:n]))
        negative = ~np.asarray(positive)[n:]
        false = float(
            ((np.asarray(answer.scores) > np.asarray(answer.cut)[:, None])[n:] & negative).sum() / negative.sum()
        )
    values = np.asarray(statistic, float)
    flags = values < rule.threshold if rule.below else values > rule.threshold
    return Defence(
        rule.kind, rule.threshold, rule.below, tuple(values[:n].tolist()), tuple(values[n:].tolist()),
        float(flags[:n].mean()), float(flags[n:].mean()), false, areas, rates, before, after, seconds,
    )  # fmt: skip


def _claims(attacks: dict[str, Attack], defences: dict[str, Defence], attacked: str) -> tuple[Claim, ...]:
    """The orderings that papers claim, as far as the study holds both sides."""
    claims = []

    def compare(claim: str, larger: Share, smaller: Share) -> None:
        differences = tuple(a - b for a, b in zip(larger.by_seed, smaller.by_seed, strict=True))
        claims.append(Claim(claim, differences, larger.interval[0] > smaller.interval[1]))

    compare(
        f"an optimised perturbation ({attacked}) succeeds more often than a fixed one of the same bound",
        attacks[attacked].success,
        attacks["fixed"].success,
    )
    for name in attacks:
        if name not in ("fixed", "frozen") and "frozen" in attacks:
            compare(
                f"{name} succeeds more often than the frozen surrogate",
                attacks[name].success,
                attacks["frozen"].success,
            )
    compare(
        f"{attacked} succeeds more often on encoders pretrained with it than on clean ones",
        attacks[attacked].success,
        attacks[attacked].control,
    )
    if {"label-free unlearning", "fine-tuning"} <= defences.keys():
        free, tuned = (defences[name].after for name in ("label-free unlearning", "fine-tuning"))
        assert free is not None and tuned is not None
        compare("label-free unlearning leaves less success than fine-tuning with labels", tuned[1], free[1])
    return tuple(claims)


__all__ = ["DEFENCES", "Attack", "Claim", "Defence", "Share", "Study", "robustness_study"]
