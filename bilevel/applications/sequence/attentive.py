"""Attentive BiLSTMs for short texts, over words or characters, and what is made of several of them.

The models of NTUA-SLP (Baziotis et al., "NTUA-SLP at SemEval-2018 Task 3: Tracking Ironic Tweets using Ensembles of
Word and Character Level Attentive RNNs", 2018), after their released code:

    h_t = BiLSTM(embedding)_t,    e_t = tanh(w . h_t + b),    a = softmax(e) over real steps,    r = sum_t a_t h_t

and a linear layer on r. The score itself goes through tanh, so within a text no weight is more than e^2 = 7.39 times
another: this attention cannot become sharp. Their scores are test-selected (the released scripts stop early on the
gold test set, and score it with the last incomplete batch dropped), and are no target here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.applications.layers import check_numbers
from bilevel.applications.sequence.recurrent import LSTM, VOCABULARY, PyTree, check_lengths, drop, fetch, valid

CHARACTERS = 102  # string.printable, one for the unknown, one for padding


def masked_softmax(scores: Array, real: Array) -> Array:
    """Softmax over the last axis where `real`; zero elsewhere, and everywhere where nothing is real."""
    shown = jnp.where(real, scores, -jnp.inf)
    highest = jax.lax.stop_gradient(jnp.max(shown, -1, keepdims=True, initial=-jnp.inf))
    powers = jnp.where(real, jnp.exp(jnp.where(real, scores, 0) - jnp.where(jnp.isfinite(highest), highest, 0)), 0)
    total = powers.sum(-1, keepdims=True)
    return powers / jnp.where(total > 0, total, 1)


def linear_init(key: Array, features: int, out: int) -> dict[str, Array]:
    """A linear layer as PyTorch draws it."""
    bound = 1 / math.sqrt(features)
    one, two = jax.random.split(key)
    return {
        "kernel": jax.random.uniform(one, (features, out), minval=-bound, maxval=bound),
        "bias": jax.random.uniform(two, (out,), minval=-bound, maxval=bound),
    }


def linear(params: Mapping[str, Array], x: Array) -> Array:
    """x W + b."""
    return x @ params["kernel"] + params["bias"]


@dataclasses.dataclass(frozen=True)
class Attention:
    """Self-attention of NTUA-SLP: one tanh score per step, softmax over real steps, weighted sum.

    Attributes:
        features: d, width of the states.
        layers: of the scoring network; all but the last are Linear(d, d), tanh, dropout.
        context: score each state beside the mean of all real ones; the sum is over the states alone.
        dropout: in the scoring network, where a key is given.
    """

    features: int
    layers: int = 1
    context: bool = False
    dropout: float = 0.0

    def init(self, key: Array) -> PyTree:
        """Parameters, `{"layer0": {"kernel", "bias"}, ...}`."""
        width = self.features * (2 if self.context else 1)
        return {
            f"layer{k}": linear_init(jax.random.fold_in(key, k), width, 1 if k == self.layers - 1 else width)
            for k in range(self.layers)
        }

    def __call__(
        self, params: PyTree, states: Array, lengths: Array, *, key: Array | None = None
    ) -> tuple[Array, Array]:
        """States (batch, time, d) and lengths (batch,) -> representation (batch, d), attention (batch, time)."""
        batch, time, _ = states.shape
        check_lengths(lengths, batch, time)
        real = valid(lengths, time)
        states = jnp.where(real[..., None], states, 0)
        scored = states
        if self.context:
            mean = states.sum(1) / jnp.maximum(jnp.asarray(lengths), 1)[:, None].astype(states.dtype)
            scored = jnp.concatenate([states, jnp.broadcast_to(mean[:, None], states.shape)], -1)
        for k in range(self.layers):
            scored = jnp.tanh(linear(params[f"layer{k}"], scored))
            if key is not None and self.dropout:
                scored = drop(scored, self.dropout, jax.random.fold_in(key, k))
        attention = masked_softmax(scored[..., 0], real)
        return (attention[:, None, :] @ states)[:, 0], attention


@dataclasses.dataclass(frozen=True)
class AttentiveBiLSTM:
    """Embedding, noise, dropout, BiLSTM, attention, linear; a classifier of token sequences.

        model = word_model(classes=2)
        params = model.init(key)
        logits = model(params, ids, lengths, table=vectors)

    Attributes:
        rows: size of the vocabulary, the padding's row included (row 0).
        embedding: width of a token's vector.
        hidden, layers: of the BiLSTM.
        classes: 2 is one logit (the second class's), as in the paper's task A; more are that many.
        trained: the embedding is among the parameters; otherwise it comes in as `table` and stays as it is.
        noise: deviation of the normal noise on embeddings, where a key is given.
        embedding_dropout, dropout: on embeddings, and between layers, where a key is given.
        attention_layers, context, attention_dropout: see `Attention`.
    """

    rows: int
    embedding: int = 300
    hidden: int = 150
    layers: int = 2
    classes: int = 2
    trained: bool = False
    noise: float = 0.05
    embedding_dropout: float = 0.1
    dropout: float = 0.2
    attention_layers: int = 1
    context: bool = False
    attention_dropout: float = 0.0

    @property
    def encoder(self) -> LSTM:
        """The BiLSTM."""
        return LSTM(self.embedding, self.hidden, self.layers, dropout=self.dropout)

    @property
    def attention(self) -> Attention:
        """The attention over its states."""
        return Attention(self.encoder.out, self.attention_layers, self.context, self.attention_dropout)

    def init(self, key: Array, table: Array | None = None) -> PyTree:
        """Parameters; a trained embedding starts at `table` where one is given, else normal, its padding row zero."""
        of_embedding, of_encoder, of_attention, of_linear = jax.random.split(key, 4)
        params = {
            "encoder": self.encoder.init(of_encoder),
            "attention": self.attention.init(of_attention),
            "linear": linear_init(of_linear, self.encoder.out, 1 if self.classes == 2 else self.classes),
        }
        if self.trained:
            if table is None:
                table = jax.random.normal(of_embedding, (self.rows, self.embedding)).at[0].set(0)
            self._check_table(table)
            params["embedding"] = jnp.asarray(table)
        return params

    def _check_table(self, table: Any) -> None:
        if jnp.shape(table) != (self.rows, self.embedding):
            raise ValueError(
                f"An embedding of shape {jnp.shape(table)} was given to a model of {self.rows} tokens and width "
                f"{self.embedding}: the dictionary does not match it. Give ({self.rows}, {self.embedding}), one row "
                "per entry of the vocabulary."
            )

    def __call__(
        self,
        params: PyTree,
        ids: Array,
        lengths: Array,
        *,
        table: Array | None = None,
        key: Array | None = None,
        return_attention: bool = False,
    ) -> Any:
        """Logits of token sequences.

        Args:
            params: as `init` makes them.
            ids: tokens, whole numbers (batch, time) below `rows`; what stands at padding is not read.
            lengths: (batch,).
            table: vectors of the tokens (rows, embedding), where the embedding is not trained.
            key: for noise and dropout; none without it.
            return_attention: also the weights of the steps, (batch, time).

        Returns:
            Logits (batch, 1) for two classes, (batch, classes) for more; with the attention where asked for.

        Raises:
            ValueError: shapes, lengths, tokens or a table that do not fit, by name.
        """
        if ids.ndim != 2:
            raise ValueError(f"Tokens of shape {ids.shape} were given; give (batch, time).")
        check_numbers("The tokens", ids, self.rows, "in the model's dictionary", VOCABULARY)
        if self.trained:
            table = params["embedding"]
        elif table is None:
            raise ValueError("This model's embedding is not trained: give the tokens' vectors as table=.")
        else:
            self._check_table(table)
        assert table is not None
        keys = [None] * 4 if key is None else list(jax.random.split(key, 4))
        x = jnp.asarray(table)[ids]
        if keys[0] is not None and self.noise:
            x = x + self.noise * jax.random.normal(keys[0], x.shape, x.dtype)
        if keys[1] is not None and self.embedding_dropout:
            x = drop(x, self.embedding_dropout, keys[1])
        states = self.encoder(params["encoder"], x, lengths, key=keys[2])
        representation, attention = self.attention(params["attention"], states, lengths, key=keys[3])
        logits = linear(params["linear"], representation)
        return (logits, attention) if return_attention else logits

    def from_pytorch(self, arrays: Mapping[str, Any]) -> tuple[PyTree, Array]:
        """Parameters, and the embedding's table, from the released code's state dictionary.

        Names are those of `cbaziotis/ntua-slp-semeval2018`, with "." or "__" between their parts. A trained embedding
        is among the parameters too.
        """
        arrays = {name.replace("__", "."): value for name, value in arrays.items()}
        like = jax.eval_shape(self.init, jax.random.key(0))
        inside = "feature_extractor."
        table = fetch(arrays, f"{inside}embedding.embedding.weight", (self.embedding, self.rows)).T

        def layer(name: str, ours: Any) -> dict[str, Array]:
            return {
                "kernel": fetch(arrays, f"{name}.weight", ours["kernel"].shape),
                "bias": fetch(arrays, f"{name}.bias", ours["bias"].shape),
            }

        params = {
            "encoder": self.encoder.from_pytorch(arrays, f"{inside}encoder.rnn."),
            # Each scoring layer is three entries of theirs: linear, activation, dropout.
            "attention": {
                f"layer{k}": layer(f"{inside}attention.attention.{3 * k}", like["attention"][f"layer{k}"])
                for k in range(self.attention_layers)
            },
            "linear": layer("linear", like["linear"]),
        }
        return ({**params, "embedding": table} if self.trained else params), table


def word_model(rows: int, classes: int = 2, **changes: Any) -> AttentiveBiLSTM:
    """The word model: frozen vectors of width 300; 1,085,402 trained parameters for two classes, 1,086,305 for four."""
    return AttentiveBiLSTM(**{"rows": rows, "classes": classes, **changes})


def character_model(classes: int = 2, **changes: Any) -> AttentiveBiLSTM:
    """The character model: 102 trained vectors of width 25; 757,952 parameters for two classes, 758,855 for four."""
    config = {"rows": CHARACTERS, "embedding": 25, "trained": True, "noise": 0.0, "embedding_dropout": 0.0}
    return AttentiveBiLSTM(**{**config, "classes": classes, **changes})


def cross_entropy(logits: Array, labels: Array, class_weights: Array | None = None) -> Array:
    """Loss of each sample, (batch,): binary from one logit, else of the softmax; times its class's weight."""
    check_numbers("The labels", labels, max(2, logits.shape[-1]), "classes")
    labels = jnp.asarray(labels)
    if logits.shape[-1] == 1:
        sign = 1 - 2 * labels.astype(logits.dtype)
        loss = jax.nn.softplus(sign * logits[..., 0])
    else:
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
    return loss if class_weights is None else loss * jnp.asarray(class_weights)[labels]


def balanced_weights(labels: Any, classes: int) -> np.ndarray:
    """N / (C n_c) for each class: the weights that the four-way task is trained with.

    Raises:
        ValueError: a class without a sample.
    """
    check_numbers("The labels", labels, classes, "classes")
    counts = np.bincount(np.asarray(labels), minlength=classes)
    if len(counts) > classes or not counts.all():
        raise ValueError(f"Labels with counts {counts.tolist()} were given for {classes} classes; each needs a sample.")
    return (counts.sum() / (classes * counts)).astype(np.float32)


def posteriors(logits: Array) -> Array:
    """Probabilities of the classes, (..., classes), from one logit or several."""
    if logits.shape[-1] == 1:
        return jnp.concatenate([jax.nn.sigmoid(-logits), jax.nn.sigmoid(logits)], -1)
    return jax.nn.softmax(logits)


def ensemble(members: Sequence[Array], rule: Literal["mean", "vote"] = "mean") -> Array:
    """Several models' answer.

    Args:
        members: posteriors of each, (samples, classes).
        rule: "mean", the unweighted mean of posteriors; "vote", the share of members that choose each class.

    Returns:
        (samples, classes); the answer is its argmax, of equal votes the first class.
    """
    shapes = {jnp.shape(member) for member in members}
    if len(shapes) != 1:
        raise ValueError(f"Posteriors of shapes {sorted(shapes)} were given; give several of one shape.")
    if rule not in ("mean", "vote"):
        raise ValueError(f"rule={rule!r} was given; there are 'mean' and 'vote'.")
    stacked = jnp.stack([jnp.asarray(member) for member in members])
    if rule == "vote":
        stacked = jax.nn.one_hot(stacked.argmax(-1), stacked.shape[-1])
    return stacked.mean(0)
