"""Which sources of text, or which samples, a language model should be trained on, learnt from some clean text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bilevel import Problem, data
from bilevel.applications.application import Application
from bilevel.applications.language.transformer import Parameters, Transformer
from bilevel.applications.layers import lora

Per = Literal["source", "sample"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Sources(Application[Array, Parameters]):
    """The problem that `sources` makes; all weights start alike.

    Attributes:
        model: the network.
        base: the frozen parameters under the adapter; None where y is all parameters.
        names: of the sources.
        weights: `x ->` the shares of the sources, (sources,), which sum to 1; or per sample a weight in (0, 1), (n,).
        shares: `x ->` what each source's samples get of the whole weight, (sources,): `weights`, or the sums.
        fixed: `shares -> x` with these shares of the sources, which may be 0.
        mixed: `shares -> data.Sampler`: batches of sequences whose sources are drawn by the shares, for a training
            afresh. Their mean loss is that of f, with less variance where shares are far from equal: each counts alike.
        loss: `(y, tokens) -> (n,)`, the mean of -log p(token | those before) of each sequence.
        full: `y ->` all parameters, the adapter merged.
    """

    model: Transformer
    base: Parameters | None
    names: tuple[str, ...]
    weights: Callable[[Array], Array]
    shares: Callable[[Array], Array]
    fixed: Callable[[Any], Array]
    mixed: Callable[[Any], data.Sampler]
    loss: Callable[[Parameters, Array], Array]
    full: Callable[[Parameters], Parameters]
    name: str = "sources of text"
    description: str = "A weight for each source (or sample) of text; a language model trained under these weights."
    source: str = 'Pan et al., "ScaleBiO: Scalable Bilevel Optimization for LLM Data Reweighting", ACL 2025'


def sources(
    model: Transformer,
    train: Mapping[str, Any],
    target: Any,
    *,
    params: Parameters | None = None,
    rank: int | None = None,
    adapted: str | Sequence[str] = ("query", "value"),
    per: Per = "source",
    batch: int = 32,
    target_batch: int | None = None,
    decay: float = 0.0,
    test: Any = None,
    seed: int = 0,
) -> Sources:
    """Learn how much each source of text should count, from clean text of the kind that is wanted:

        min over x   F(x, y) = mean over target sequences of loss(y; sequence)
        s.t.         y in argmin of f(x, y) = sum_k p_k(x) mean over source k of loss(y; sequence) + decay/2 |y|^2

    with p = softmax(x), so that the weights are a share each. Batches are drawn from all sequences alike, and a
    sequence of source k counts p_k n / n_k: its mean is f. With `per="sample"` a sequence has a weight of its own,

        f(x, y) = mean_i sigmoid(x_i) loss(y; sequence_i) + decay/2 |y|^2.

    Args:
        model: the network.
        train: by source its sequences, whole numbers (n_k, time + 1); `tokens.sequences` makes them.
        target: clean sequences (m, time + 1) for the upper loss.
        params: where the network starts: y0 is a copy; by default drawn.
        rank: of an adapter (`layers.lora`): y is the adapter and `params` (then needed) are frozen, one copy for both
            levels and for all copies of y that a method has. None: y is all parameters.
        adapted: the weights under the adapter, see `lora.init`.
        per: "source" or "sample".
        batch, target_batch: sequences per batch of the lower and of the upper level (by default `batch`).
        decay: of y.
        test: sequences for the metric "test loss"; by default there is none.
        seed: of the parameters that are drawn, and of the adapter.

    Raises:
        ValueError: sources, sequences, parameters that do not fit; by name.
    """
    if per not in ("source", "sample"):
        raise ValueError(f"sources(per={per!r}): a weight per 'source' or per 'sample'.")
    if not decay >= 0:
        raise ValueError(f"sources(decay={decay}): at least 0 is needed.")
    names = tuple(train)
    if len(names) < 1 + (per == "source"):
        raise ValueError(f"{len(names)} source(s) of text: a share per source needs two at least, by name.")
    parts = [_checked(f"source {name!r}", train[name], model) for name in names]
    wanted = _checked("target", target, model)
    length = parts[0].shape[1]
    for name, part in (*zip(names, parts, strict=True), ("target", wanted)):
        if part.shape[1] != length:
            raise ValueError(
                f"The sequences of {name!r} have {part.shape[1]} tokens and those of {names[0]!r} {length}: cut all to "
                "one length (`sequences`)."
            )
    counts = np.array([len(part) for part in parts])
    total, count = int(counts.sum()), len(parts)
    rows, owner = np.concatenate(parts), np.repeat(np.arange(count, dtype=np.int32), counts)

    if params is None:
        if rank is not None:
            raise ValueError(f"sources(rank={rank}) adapts a trained network: give its parameters as params=.")
        params = jax.jit(model.init)(jax.random.key(seed))
    model.check(params)
    # Arrays of the device: numpy's would be copied to it for each level.
    params = jax.tree.map(jnp.asarray, params)
    base = None if rank is None else lora.freeze(params)
    y0 = params if rank is None else lora.init(jax.random.key(seed), params, adapted, rank)

    def loss(y: Parameters, tokens: Array) -> Array:
        return model.loss(y, tokens) if base is None else model.loss(base, tokens, y)

    def weights(x: Array) -> Array:
        return jax.nn.softmax(x) if per == "source" else jax.nn.sigmoid(x)

    def upper(x: Array, y: Parameters, tokens: Array) -> Array:
        return loss(y, tokens).mean()

    by_source = total / counts

    def lower(x: Array, y: Parameters, drawn: Any) -> Array:
        tokens, of, place = drawn
        w = (weights(x) * jnp.asarray(by_source, x.dtype))[of] if per == "source" else jax.nn.sigmoid(x[place])
        found = (w * loss(y, tokens)).mean()
        return found + 0.5 * decay * optax.tree.norm(y, squared=True) if decay else found

    def shares(x: Array) -> Array:
        if per == "source":
            return weights(x)
        sums = jnp.zeros(count, x.dtype).at[owner].add(weights(x))
        return sums / sums.sum()

    def of_shares(given: Any) -> np.ndarray:
        given = np.asarray(given, np.float32)
        if given.shape != (count,) or not (given >= 0).all() or not given.sum() > 0:
            raise ValueError(f"Shares {given} were given: {count} are needed, none negative and not all zero.")
        return given / given.sum()

    def mixed(given: Any) -> data.Sampler:
        return data.Sampler(_draw(batch), (rows, np.cumsum(counts) - counts, counts, of_shares(given)))

    def fixed(given: Any) -> Array:
        given = of_shares(given)
        with np.errstate(divide="ignore"):
            if per == "source":
                return jnp.asarray(np.log(given))
            each = given / counts
            each = 0.5 * each / each.max()  # the weights in (0, 1) that stand in these proportions
            return jnp.asarray((np.log(each) - np.log1p(-each))[owner])

    def drawn(arrays: Any, size: int, among: int) -> Any:
        return arrays if size >= among else data.Minibatches(arrays, size)

    problem = Problem(
        upper=upper,
        lower=lower,
        upper_data=drawn(wanted, batch if target_batch is None else target_batch, len(wanted)),
        lower_data=drawn((rows, owner, np.arange(total, dtype=np.int32)), batch, total),
    )
    metrics: dict[str, Any] = {f"weight {name}": (lambda x, y, k=k: shares(x)[k]) for k, name in enumerate(names)}
    if test is not None:
        metrics["test loss"] = (lambda x, y, tokens: loss(y, tokens).mean(), _checked("test", test, model))
    return Sources(
        problem,
        jnp.zeros(count if per == "source" else total),
        y0,
        metrics,
        model=model,
        base=base,
        names=names,
        weights=weights,
        shares=shares,
        fixed=fixed,
        mixed=mixed,
        loss=loss,
        full=lambda y: y if base is None else lora.merge(base, y),
    )


@functools.cache
def _draw(size: int) -> Callable[[Array, Any], Array]:
    """A `data.Sampler`'s function: a source by its share, a sequence of it, `size` times."""

    def draw(key: Array, arrays: Any) -> Array:
        rows, firsts, counts, shares = (jnp.asarray(each) for each in arrays)
        of_source, of_row = jax.random.split(key)
        source = jax.random.choice(of_source, len(shares), (size,), p=shares)
        return rows[firsts[source] + jax.random.randint(of_row, (size,), 0, counts[source])]

    return draw


def _checked(name: str, tokens: Any, model: Transformer) -> np.ndarray:
    """Sequences as an array, or an error that names what is wrong with them."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"The sequences of {name} are {tokens.dtype}{list(tokens.shape)}; whole numbers (n, time + 1) are needed, "
            "as `sequences` makes them."
        )
    if tokens.shape[1] > model.length + 1:
        raise ValueError(
            f"The sequences of {name} have {tokens.shape[1]} tokens, more than the network's length {model.length} and "
            "the last one's target."
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= model.vocabulary:
        raise ValueError(
            f"The sequences of {name} have tokens from {low} to {high}, and the network knows 0 to "
            f"{model.vocabulary - 1}: give Transformer the tokenizer's size."
        )
    return tokens.astype(np.int32)
