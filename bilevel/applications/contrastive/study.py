"""The study: attacks and defences side by side, on digits, over seeds; one entry point."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import run, solve
from bilevel.applications.contrastive.defences import DEFENCES, Found, Rule, Suspect
from bilevel.applications.contrastive.digits import Split, check_target, split
from bilevel.applications.contrastive.evaluate import auroc, knn, logits, probe, tpr_at
from bilevel.applications.contrastive.losses import normalised
from bilevel.applications.contrastive.perturbation import Perturbation
from bilevel.applications.contrastive.pretraining import Pretraining
from bilevel.applications.contrastive.problem import problem_of
from bilevel.applications.contrastive.report import Attack, Claim, Defence, Share, Study
from bilevel.applications.contrastive.routes import ROUTES, route

FEWEST_CLEAN = 3


class Schedule(NamedTuple):
    """Of the tuning: outer steps, steps of the surrogate between them, and rounds from one fresh surrogate on."""

    rounds: int
    inner: int
    every: int


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
    rounds: int = 300,
    inner: int = 5,
    every: int = 100,
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
    seeds, learner = _check_seeds(seeds), Pretraining() if pretraining is None else pretraining
    why = "they are routes to a hypergradient, and one of them is defended against"
    attacks = _names("attacks", attacks, ROUTES, why)
    defences = _names("defences", defences, DEFENCES, "attacks are shown beside defences alone")
    attacked = attacks[0] if attacked is None else attacked
    _check(attacks, attacked, defences, clean_encoders, target, learner)
    _check_counts(steps=steps, rounds=rounds, inner=inner, every=every, repair_steps=repair_steps)
    g = Perturbation(bound)
    schedule, n = Schedule(rounds, inner, every), len(seeds)
    spare = (k for k in range(n + clean_encoders) if k not in seeds)
    every_seed = (*seeds, *(next(spare) for _ in range(clean_encoders - n)))
    splits = jax.tree.map(lambda *parts: np.stack(parts), *(split(s, target, share, data) for s in every_seed))
    digits = _first(splits, n)

    clean = _train(learner, steps, splits.pool, _keys(every_seed, 1))  # the frozen surrogates are among them
    _check_finite(clean, "pretraining")
    tuned = {name: _tuned(name, g, learner, int(target), schedule, digits, _keys(seeds, 2), clean) for name in attacks}
    _check_finite(tuned, "the tuning of the perturbation")
    patterns = jax.vmap(lambda key: g.fixed(20 * jax.random.rademacher(key, (64,), float)))(_keys(seeds, 3))
    perturbations = {"fixed": patterns, **{name: psi for name, (psi, _) in tuned.items()}}

    # the victims of all attacks and seeds
    names = list(perturbations)
    psis = jax.tree.map(lambda *parts: jnp.concatenate(parts), *perturbations.values())
    tiled = _tile(digits, len(names))
    pools = _flagged(g, psis, tiled.pool, tiled.flags)
    keys = jnp.concatenate([_keys(seeds, 4 + ("fixed", *ROUTES).index(name)) for name in names])
    victims = _in_blocks(functools.partial(_train, learner, steps), len(every_seed), pools, keys)["encoder"]
    _check_finite(victims, "pretraining on a perturbed pool")
    triggered = _perturbed(g, psis, tiled.test)

    judge = functools.partial(_judge, learner.encoder, int(target))
    of_victims = judge(victims, tiled, triggered)
    of_clean = judge(_tile(_first(clean["encoder"], n), len(names)), tiled, triggered)
    surrogates = [theta["encoder"] for _, theta in tuned.values()]
    surrogates = jax.tree.map(lambda *parts: jnp.concatenate(parts), _first(clean["encoder"], n), *surrogates)
    of_surrogates = judge(surrogates, tiled, triggered)  # of the fixed pattern there is none: a clean one stands there
    others = np.asarray(digits.test_labels != target)
    found = {}
    for k, name in enumerate(names):
        victim, control, surrogate = (_block(judged, k, n) for judged in (of_victims, of_clean, of_surrogates))
        found[name] = Attack(
            accuracy=_share(victim["right"]),
            neighbours=_share(victim["neighbour"]),
            success=_share(victim["hit"], others),
            kept=_share(victim["kept"]),
            surrogate=_share(surrogate["hit"], others) if name in tuned else None,
            control=_share(control["hit"], others),
            together=tuple(map(float, victim["alike"])),
        )

    # the defences: the attacked encoders and the clean ones in one batch
    k = names.index(attacked)
    psi = jax.tree.map(lambda a: jnp.resize(a, (len(every_seed), *a.shape[1:])), _block(psis, k, n))
    both = lambda a, b: jnp.concatenate([jnp.asarray(a), jnp.asarray(b)[:clean_encoders]])  # noqa: E731
    encoders = jax.tree.map(both, _block(victims, k, n), clean["encoder"])
    arrays = jax.tree.map(both, digits, splits)
    suspects = Suspect(
        encoder=encoders,
        probe=_fit(learner.encoder, encoders, arrays.trusted, arrays.trusted_labels),
        pool=both(_block(pools, k, n), splits.pool),
        flags=both(digits.flags, np.zeros_like(splits.flags)),
        trusted=arrays.trusted,
        trusted_labels=arrays.trusted_labels,
        test=arrays.test,
        test_labels=arrays.test_labels,
        triggered=both(_block(triggered, k, n), _perturbed(g, psi, splits.test)),
        share=jnp.full(n + clean_encoders, share),
    )
    defended = {}
    for name in defences:
        answer, seconds = _answer(name, learner.encoder, suspects, repair_steps)
        defended[name] = _read(DEFENCES[name], learner.encoder, suspects, answer, seconds, n, int(target))

    first = jax.tree.map(lambda a: a[0], suspects)
    features = _features(learner.encoder, first.encoder, jnp.concatenate([first.test, first.triggered]))
    pictures = {
        "images": np.asarray(first.test), "perturbed": np.asarray(first.triggered),
        "labels": np.asarray(first.test_labels), "features": np.asarray(features),
        "taken": np.asarray(of_victims["hit"][k * n]),
    }  # fmt: skip
    settings = {
        "target": target, "bound": bound, "share": share, "clean_encoders": clean_encoders, "steps": steps,
        "rounds": rounds, "inner": inner, "every": every, "repair_steps": repair_steps, "pretraining": learner,
    }  # fmt: skip
    claims = _claims(found, defended, attacked)
    return Study(found, defended, attacked, claims, seeds, settings, pictures, time.perf_counter() - began)


def _names(what: str, given: Any, known: Iterable[str], why: str) -> tuple[str, ...]:
    """The names as a tuple; raise where they are not different names among the known, at least one."""
    listed = ", ".join(known)
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ValueError(f"{what}={given!r}: give a sequence of names, such as ({next(iter(known))!r},).")
    given = tuple(given)
    for name in given:
        if name not in known:
            raise ValueError(f"{what}: {name!r} is none of {listed}.")
    if not given or len(set(given)) != len(given):
        raise ValueError(f"{what}={given}: {why}, so name at least one, each once; they are {listed}.")
    return given


def _whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check_seeds(seeds: Any) -> tuple[int, ...]:
    """The seeds as a tuple."""
    given = tuple(seeds) if isinstance(seeds, Iterable) and not isinstance(seeds, str) else ()
    if not given or len(set(given)) != len(given) or not all(_whole(s) and 0 <= s < 2**32 for s in given):
        raise ValueError(
            f"seeds={seeds!r}: give different integers that are not negative, at least one, as a tuple (below 2^32)."
        )
    return tuple(map(int, given))


def _check(
    attacks: tuple[str, ...], attacked: Any, defences: tuple[str, ...], clean_encoders: Any, target: Any, learner: Any
) -> None:
    """Raise a sentence where a part of the study cannot be run."""
    check_target(target)
    if attacked not in attacks:
        raise ValueError(f"attacked={attacked!r} is not among the attacks {', '.join(attacks)}.")
    if not _whole(clean_encoders) or clean_encoders < FEWEST_CLEAN:
        raise ValueError(
            f"clean_encoders={clean_encoders!r}: a defence's false-positive rate is measured on at least "
            f"{FEWEST_CLEAN} clean encoders."
        )
    if not isinstance(learner, Pretraining):
        raise ValueError(
            f"pretraining={learner!r}: give a Pretraining, such as Pretraining('byol', Conv()), or leave it out."
        )
    pruning = [name for name in defences if DEFENCES[name].channels]
    missing = [name for name in ("activations", "kernels") if not hasattr(learner.encoder, name)]
    if pruning and missing:
        raise ValueError(
            f"{type(learner.encoder).__name__} has no {' and no '.join(missing)}, and {', '.join(pruning)} prune its "
            "channels by them: write them as MLP and Conv have them, or leave these defences out."
        )


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if not _whole(value) or value < 1:
            raise ValueError(f"{name}={value!r}: a positive integer is needed.")


def _check_finite(tree: Any, what: str) -> None:
    """Raise where a training has diverged: a network that is no number takes every image for class 0."""
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)):
        raise ValueError(
            f"{what} has diverged: its parameters are not finite. Lower the rate, or raise the temperature, of "
            "Pretraining(...)."
        )


def _keys(seeds: Iterable[int], tag: int) -> Any:
    """A key for each seed."""
    return jnp.stack([jax.random.fold_in(jax.random.key(s), tag) for s in seeds])


def _first(tree: Any, n: int) -> Any:
    return jax.tree.map(lambda a: a[:n], tree)


def _block(tree: Any, k: int, n: int) -> Any:
    """The k-th of blocks of n."""
    return jax.tree.map(lambda a: a[k * n : (k + 1) * n], tree)


def _tile(tree: Any, k: int) -> Any:
    """The leading axis, k times."""
    return jax.tree.map(lambda a: jnp.concatenate([jnp.asarray(a)] * k), tree)


def _in_blocks(compiled: Any, size: int, *arrays: Any) -> Any:
    """A function of stacked arrays, called on `size` entries at a time: one program, however many there are."""
    count = len(arrays[0])
    full = [jnp.resize(a, (-(-count // size) * size, *a.shape[1:])) for a in arrays]
    parts = [compiled(*(_block(a, k, size) for a in full)) for k in range(len(full[0]) // size)]
    return _first(jax.tree.map(lambda *part: jnp.concatenate(part), *parts), count)


# What is compiled stands here, by what it depends on: a second study of the same shapes compiles nothing anew.


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _tuned(
    name: str, g: Perturbation, learner: Pretraining, target: int, schedule: Schedule, digits: Split, keys: Any,
    clean: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """The perturbation's parameters that a route finds for each seed, and the surrogate at its end."""
    rounds, inner, every = schedule

    def one(digits: Any, key: Any, trained: Any) -> tuple[Any, Any]:
        of_x, of_y, of_draws, of_run = jax.random.split(key, 4)
        solver = route(name, learner.rule(inner * every), learner.init, inner=inner, every=every, key=of_draws)
        y0 = trained if name == "frozen" else learner.init(of_y)
        state, _ = run(problem_of(g, learner, digits, target), solver, g.init(of_x), y0, rounds, of_run)
        return state.x, state.y

    return jax.vmap(one)(digits, keys, _first(clean, len(keys)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train(learner: Pretraining, steps: int, images: Any, keys: Any) -> Any:
    """Pretrained parameters, an encoder per leading entry."""
    return jax.vmap(functools.partial(learner.train, steps=steps))(images, keys)


@functools.partial(jax.jit, static_argnums=0)
def _perturbed(g: Perturbation, psis: Any, images: Any) -> Any:
    """Each entry's images under its perturbation."""
    return jax.vmap(g)(psis, images)


@functools.partial(jax.jit, static_argnums=0)
def _flagged(g: Perturbation, psis: Any, pools: Any, flags: Any) -> Any:
    """The pools, with their flagged images perturbed."""
    return jnp.where(flags[..., None, None], jax.vmap(g)(psis, pools), pools)


@functools.partial(jax.jit, static_argnums=0)
def _features(encode: Any, encoder: Any, images: Any) -> Any:
    """Features of length 1."""
    return normalised(encode(encoder, images))


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
def _detect(name: str, encode: Any, suspects: Suspect, keys: Any) -> Found:
    """What a defence that is no bilevel problem says of each encoder."""
    return jax.vmap(functools.partial(DEFENCES[name].run, encode))(suspects, keys)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _judge(encode: Any, target: int, encoders: Any, digits: Any, triggered: Any, probes: Any = None) -> Any:
    """`_judged` of each encoder."""
    if probes is None:
        probes = _fit(encode, encoders, digits.trusted, digits.trusted_labels)
    images = {name: getattr(digits, name) for name in ("trusted", "trusted_labels", "test", "test_labels")}
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of the package in here."""
    logger = logging.getLogger("bilevel")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _answer(name: str, encode: Any, suspects: Suspect, repair_steps: int) -> tuple[Found, float]:
    """What a defence says of each encoder, and its seconds per encoder without the compilation."""
    count = len(suspects.pool)
    if DEFENCES[name].bilevel:
        app, solver, read = DEFENCES[name].run(encode, suspects)
        solved = functools.partial(solve, app.problem, app.x0, app.y0, solver, progress=False)
        with _quiet():  # what it would say of a single step nobody asked for
            read(solved(steps=1).x)  # compiles
        began = time.perf_counter()
        answer = jax.block_until_ready(read(solved(steps=repair_steps).x))
    else:
        keys = jax.random.split(jax.random.key(0), count)
        compiled = _detect.lower(name, encode, suspects, keys).compile()
        began = time.perf_counter()
        answer = jax.block_until_ready(compiled(suspects, keys))
    return answer, (time.perf_counter() - began) / count


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
    claims = [
        Claim(
            f"an optimised perturbation ({attacked}) succeeds more often than a fixed one of the same bound",
            attacks[attacked].success,
            attacks["fixed"].success,
        )
    ]
    for name in attacks:
        if name not in ("fixed", "frozen") and "frozen" in attacks:
            claim = f"{name} succeeds more often than the frozen surrogate"
            claims.append(Claim(claim, attacks[name].success, attacks["frozen"].success))
    claim = f"{attacked} succeeds more often on encoders pretrained with it than on clean ones"
    claims.append(Claim(claim, attacks[attacked].success, attacks[attacked].control))
    if {"label-free unlearning", "fine-tuning"} <= defences.keys():
        free, tuned = (defences[name].after for name in ("label-free unlearning", "fine-tuning"))
        assert free is not None and tuned is not None
        claim = "label-free unlearning leaves less success than fine-tuning with labels"
        claims.append(Claim(claim, tuned[1], free[1]))
    return tuple(claims)
