"""BiDAF, bidirectional attention flow for reading, as its authors released it.

Seo, Kembhavi, Farhadi and Hajishirzi, "Bidirectional Attention Flow for Machine Comprehension", ICLR 2017, after
`allenai/bi-att-flow`. For contexts of T words and questions of J, d wide per direction:

    X, Q    = highway(highway([max over windows of conv(characters); word vectors]))
    H, U    = BiLSTM(X), BiLSTM(Q)                                                   one encoder for both
    S_tj    = w . [h_t; u_j; h_t * u_j] + b
    U~_t    = sum_j softmax_j(S)_tj u_j,    h~ = sum_t softmax_t(max_j S)_t h_t
    G       = [H; U~; H * U~; H * h~],       M1 = BiLSTM(BiLSTM(G))
    p1      = softmax(w1 . [M1; G] + b1),    p2 = softmax(w2 . [M2; G] + b2)

S is three products, H w_h + (U w_u)^T + (H * w_hu) U^T; the (T, J, 6 d) tensor of the equation is never made.

The paper prints M2 = BiLSTM(M1). The released code reads [G; M1; a1; M1 * a1] there, with a1 = sum_t p1_t M1_t, and
only that has the size the authors quote: 2,570,703 parameters and 8 per character, against 1,610,703. `end=` chooses.
The pointers' vectors w1, w2 have the released order, states first (the paper prints [G; M]).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bilevel.applications.layers import check_numbers
from bilevel.applications.sequence.recurrent import LSTM, VOCABULARY, Cell, PyTree, check_lengths, drop, valid

_MASKED = -1e30  # added to the logits of padding, as released: where all is padding the softmax is uniform


class Reading(NamedTuple):
    """What the network computes on its way, in the symbols of the module's equations; the logits are masked."""

    X: Array
    Q: Array
    H: Array
    U: Array
    G: Array
    M1: Array
    M2: Array
    logits1: Array
    logits2: Array

    @property
    def p1(self) -> Array:
        """Probabilities of the answer's first word, (batch, T)."""
        return jax.nn.softmax(self.logits1)

    @property
    def p2(self) -> Array:
        """Probabilities of its last word, (batch, T)."""
        return jax.nn.softmax(self.logits2)


class Passage(NamedTuple):
    """A batch of texts: words (batch, time), characters (batch, time, letters), lengths (batch,)."""

    words: Array
    characters: Array
    lengths: Array


@dataclasses.dataclass(frozen=True)
class BiDAF:
    """The reader of the module's equations.

        model = BiDAF(characters=1000)
        params = model.init(key)
        reading = model(params, context, question, table=word_vectors)
        spans = best_span(reading.p1, reading.p2)

    Padded context words attend uniformly, as released (AllenNLP's version has zeros there; real words agree).

    Attributes:
        characters: rows of the characters' embedding.
        word_features: width of the word vectors, which are given and not trained.
        character_features, filters, width: of the characters and their convolution, VALID, then ReLU and max.
        hidden: d.
        highways: g * relu(x W + b) + (1 - g) * x, so many.
        end: where the second pointer reads, "released" or "printed".
        cell: "tensorflow" as released; "pytorch" has AllenNLP's number of biases.
        dropout: on the characters' vectors, on what the modelling LSTMs read, and before the answer's linear layers,
            where a key is given. The context encoder has none, as released.
    """

    characters: int
    word_features: int = 100
    character_features: int = 8
    filters: int = 100
    width: int = 5
    hidden: int = 100
    highways: int = 2
    end: Literal["released", "printed"] = "released"
    cell: Cell = "tensorflow"
    dropout: float = 0.2

    def __post_init__(self) -> None:
        if self.end not in ("released", "printed"):
            raise ValueError(f"end={self.end!r} was given; there are 'released' and 'printed'.")

    def _lstms(self) -> dict[str, LSTM]:
        d = self.hidden
        make = lambda features: LSTM(features, d, cell=self.cell)  # noqa: E731
        return {
            "context": make(self.word_features + self.filters),
            "modelling1": make(8 * d),
            "modelling2": make(2 * d),
            "end": make(14 * d if self.end == "released" else 2 * d),
        }

    def init(self, key: Array) -> PyTree:
        """Parameters as nested dictionaries; matrices by Glorot's rule, biases zero."""
        keys = iter(jax.random.split(key, 16 + 2 * self.highways))
        glorot, small = jax.nn.initializers.glorot_uniform(), jax.nn.initializers.normal(0.1)
        n, d = self.word_features + self.filters, self.hidden

        def dense(shape: tuple[int, ...]) -> dict[str, Array]:
            return {"kernel": glorot(next(keys), shape), "bias": jnp.zeros(shape[-1])}

        def vector(size: int) -> dict[str, Array]:
            return {"kernel": small(next(keys), (size,)), "bias": jnp.zeros(())}

        return {
            "characters": small(next(keys), (self.characters, self.character_features)),
            "convolution": dense((self.width, self.character_features, self.filters)),
            "highway": {f"layer{k}": {"transform": dense((n, n)), "gate": dense((n, n))} for k in range(self.highways)},
            **{name: lstm.init(next(keys)) for name, lstm in self._lstms().items()},
            "similarity": vector(6 * d),
            "first": vector(10 * d),
            "last": vector(10 * d),
        }

    def words(self, params: PyTree, text: Passage, table: Array, key: Array | None = None) -> Array:
        """The words' vectors after the highways, (batch, time, filters + word features)."""
        letters = text.characters.shape[-1]
        if letters < self.width:
            raise ValueError(
                f"Words of {letters} characters were given to a convolution of width {self.width}; pad words to more."
            )
        if table.ndim != 2 or table.shape[1] != self.word_features:
            raise ValueError(
                f"Word vectors of shape {table.shape} were given; give (words, {self.word_features}), one row per "
                "entry of the dictionary."
            )
        check_numbers("The words", text.words, len(table), "rows of word vectors", VOCABULARY)
        check_numbers("The letters", text.characters, self.characters, "in the model's alphabet", VOCABULARY)
        x = params["characters"][text.characters]
        if key is not None and self.dropout:
            x = drop(x, self.dropout, key)
        count = letters - self.width + 1
        windows = jnp.concatenate([x[..., k : k + count, :] for k in range(self.width)], -1)
        kernel = params["convolution"]["kernel"].reshape(self.width * self.character_features, self.filters)
        spelled = jax.nn.relu(windows @ kernel + params["convolution"]["bias"]).max(-2)
        x = jnp.concatenate([spelled, table[text.words].astype(spelled.dtype)], -1)
        for layer in range(self.highways):
            p = params["highway"][f"layer{layer}"]
            gate = jax.nn.sigmoid(x @ p["gate"]["kernel"] + p["gate"]["bias"])
            x = gate * jax.nn.relu(x @ p["transform"]["kernel"] + p["transform"]["bias"]) + (1 - gate) * x
        return x

    def flow(self, params: PyTree, H: Array, U: Array, context: Array, question: Array) -> Array:
        """G, (batch, T, 8 d), of states H (batch, T, 2 d) and U (batch, J, 2 d) with lengths of both."""
        real_t, real_j = valid(context, H.shape[1]), valid(question, U.shape[1])
        H, U = jnp.where(real_t[..., None], H, 0), jnp.where(real_j[..., None], U, 0)
        of_h, of_u, of_both = jnp.split(params["similarity"]["kernel"], 3)
        S = (H @ of_h)[:, :, None] + (U @ of_u)[:, None, :] + (H * of_both) @ U.swapaxes(1, 2)
        real = real_t[:, :, None] & real_j[:, None, :]
        S = jnp.where(real, S + params["similarity"]["bias"], _MASKED)
        attended = jax.nn.softmax(S, -1) @ U
        summary = jax.nn.softmax(S.max(-1), -1)[:, None, :] @ H
        return jnp.concatenate([H, attended, H * attended, H * summary], -1)

    def __call__(
        self, params: PyTree, context: Passage, question: Passage, *, table: Array, key: Array | None = None
    ) -> Reading:
        """Read contexts for the answers to questions.

        Args:
            params: as `init` makes them.
            context, question: batches of texts.
            table: word vectors, (words, word_features).
            key: for dropout; none is done without it.

        Raises:
            ValueError: shapes or lengths that do not fit, by name.
        """
        for what, text in (("contexts", context), ("questions", question)):
            if text.words.ndim != 2 or text.characters.shape[:2] != text.words.shape:
                raise ValueError(
                    f"Words of shape {text.words.shape} and characters of shape {text.characters.shape} were given for "
                    f"{what}; give (batch, time) and (batch, time, letters)."
                )
            check_lengths(text.lengths, text.words.shape[0], text.words.shape[1], what)
        keys = [None] * 7 if key is None else list(jax.random.split(key, 7))
        lstms = self._lstms()

        def wet(x: Array, k: int) -> Array:
            given = keys[k]
            return x if given is None or not self.dropout else drop(x, self.dropout, given)

        def read(name: str, x: Array) -> Array:
            return lstms[name](params[name], x, context.lengths)

        X = self.words(params, context, table, keys[0])
        Q = self.words(params, question, table, keys[1])
        H = read("context", X)
        U = lstms["context"](params["context"], Q, question.lengths)
        G = self.flow(params, H, U, context.lengths, question.lengths)
        M1 = read("modelling2", wet(read("modelling1", wet(G, 2)), 3))
        real = valid(context.lengths, G.shape[1])

        def point(name: str, states: Array, k: int) -> Array:
            p = params[name]
            score = wet(jnp.concatenate([states, G], -1), k) @ p["kernel"] + p["bias"]
            return jnp.where(real, score, _MASKED)

        logits1 = point("first", M1, 4)
        if self.end == "released":
            a1 = jax.nn.softmax(logits1)[:, None, :] @ M1
            into = jnp.concatenate([G, M1, jnp.broadcast_to(a1, M1.shape), M1 * a1], -1)
        else:
            into = M1
        M2 = read("end", wet(into, 5))
        return Reading(X, Q, H, U, G, M1, M2, logits1, point("last", M2, 6))


def span_loss(reading: Reading, first: Array, last: Array) -> Array:
    """-log p1(first) - log p2(last) of each sample, (batch,)."""
    pick = lambda logits, at: jnp.take_along_axis(jax.nn.log_softmax(logits), at[:, None], 1)[:, 0]  # noqa: E731
    return -pick(reading.logits1, first) - pick(reading.logits2, last)


def best_span(p1: Array, p2: Array, longest: int | None = None) -> Array:
    """The span k <= l with the largest p1_k p2_l, (..., 2); of equal ones the first.

    Args:
        p1, p2: probabilities of the first and of the last word, (..., T).
        longest: words in a span at most; by default any number, found by one scan.
    """
    time = p1.shape[-1]
    if longest is not None and longest < 1:
        raise ValueError(f"longest={longest} was given; a span has at least one word.")
    if longest is None:
        highest = jax.lax.cummax(p1, axis=p1.ndim - 1)
        last = (highest * p2).argmax(-1)
        first = jnp.where(jnp.arange(time) <= last[..., None], p1, -1).argmax(-1)
        return jnp.stack([first, last], -1)
    offsets = jnp.arange(time)[None, :] - jnp.arange(time)[:, None]
    allowed = (offsets >= 0) & (offsets < longest)
    products = jnp.where(allowed, p1[..., :, None] * p2[..., None, :], -1)
    # Columns first: of equal products the span that ends first, as the scan has it.
    best = products.swapaxes(-1, -2).reshape(*p1.shape[:-1], -1).argmax(-1)
    return jnp.stack([best % time, best // time], -1)


def ensemble_span(members: Sequence[tuple[Array, Array]], longest: int | None = None) -> Array:
    """One sample's span by several readers: the largest sum of confidences p1_k p2_l over those that chose it.

    Args:
        members: pairs (p1, p2) of one sample, (T,).
        longest: see `best_span`.
    """
    total: dict[tuple[int, int], float] = {}
    for p1, p2 in members:
        first, last = (int(at) for at in best_span(p1, p2, longest))
        total[first, last] = total.get((first, last), 0.0) + float(p1[first] * p2[last])
    return jnp.asarray(max(total, key=lambda span: total[span]))


def adadelta(rate: float = 0.5) -> optax.GradientTransformation:
    """The authors' step rule with TensorFlow's constants, rho .95 and epsilon 1e-8 (optax's are .9 and 1e-6)."""
    rule: Callable[..., optax.GradientTransformation] = optax.adadelta
    return rule(rate, rho=0.95, eps=1e-8)
