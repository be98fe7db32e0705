"""A transformer over sentences over tokens and spectrograms, and what its answer rests on.

The idea is that of Deng, Luz and de la Fuente Garcia, "Hierarchical attention interpretation: an interpretable
speech-level transformer for bi-modal depression detection" (arXiv 2309.13476): classify a whole interview from its
sentences instead of copying its label to each, and interpret it at both levels by gradient-weighted attention. Its
full text was not at hand (nor are the recordings); an index of arXiv of September 2026 notes a withdrawal comment on
it (seen second-hand, not confirmed), and its first version's abstract prints an F1 of .947 where precision and recall
give the .897 of later ones.
What follows is therefore a specification of our own, and no reproduction:

- text: embedding, learned positions, a leading CLS, two layers; speech: a log-Mel image cut into patches of 16 x 16,
  learned positions, CLS, two layers; a sentence's vector is a linear map of the two CLS side by side;
- an interview: learned positions, CLS, two layers over the sentences' vectors, and one logit from its CLS;
- every layer is x + attention(LN x), then x + W2 gelu(W1 LN x), with LN free of parameters (epsilon 1e-5), no biases,
  and the tanh form of gelu.

Relevance is rule 5 and 6 of Chefer, Gur and Wolf, "Generic attention-model explainability" (ICCV 2021), for a logit y:

    Abar = mean over heads of relu(A * dy/dA),      R <- I,  then  R <- R + Abar R  layer by layer

and its CLS row is read. dy/dA comes from zeros added to every softmax ("probes"): one `jax.grad` by all of them.
At the sentences' level y is the same logit, differentiated through the interview's layers. The relevance of a token
within the interview is the product of its sentence's and its own: a choice of ours, the abstract says
"hierarchical" alone. Scaling y scales Abar, so R is to be read by ranks, or of one y.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.applications.layers import check_numbers
from bilevel.applications.sequence.attentive import masked_softmax
from bilevel.applications.sequence.recurrent import VOCABULARY, PyTree, concrete, valid


def normalise(x: Array) -> Array:
    """Layer normalisation without parameters."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)


def block(params: PyTree, x: Array, real: Array, heads: int, probe: Array | None = None) -> tuple[Array, Array]:
    """One layer.

    Args:
        params: `Wq`, `Wk`, `Wv`, `Wo` (d, d), `W1` (d, m), `W2` (m, d).
        x: (..., n, d).
        real: which places may be attended to, (..., n).
        heads: that share the d channels, in order.
        probe: added to the attention, (..., heads, n, n).

    Returns:
        The same shape as x, and the attention (..., heads, n, n).
    """
    *batch, n, d = x.shape

    def split(a: Array) -> Array:
        return a.reshape(*batch, n, heads, d // heads).swapaxes(-2, -3)

    z = normalise(x)
    scores = split(z @ params["Wq"]) @ split(z @ params["Wk"]).swapaxes(-1, -2) / math.sqrt(d // heads)
    attention = masked_softmax(scores, jnp.broadcast_to(real[..., None, None, :], scores.shape))
    used = attention if probe is None else attention + probe
    x = x + (used @ split(z @ params["Wv"])).swapaxes(-2, -3).reshape(x.shape) @ params["Wo"]
    return x + jax.nn.gelu(normalise(x) @ params["W1"], approximate=True) @ params["W2"], attention


def encode(
    layers: PyTree, cls: Array, x: Array, real: Array, heads: int, probes: PyTree = None
) -> tuple[Array, list[Array]]:
    """The CLS of a stack of layers over [cls; x].

    Args:
        layers: `{"layer0": ..., "layer1": ...}`.
        cls: (d,).
        x: (..., n, d); what stands where not `real` is not read.
        real: (..., n).
        heads: see `block`.
        probes: one per layer, (..., heads, n + 1, n + 1).

    Returns:
        (..., d), and each layer's attention.
    """
    x = jnp.where(real[..., None], x, 0)
    x = jnp.concatenate([jnp.broadcast_to(cls, (*x.shape[:-2], 1, x.shape[-1])), x], -2)
    real = jnp.concatenate([jnp.ones_like(real[..., :1]), real], -1)
    attentions = []
    for k in range(len(layers)):
        x, attention = block(layers[f"layer{k}"], x, real, heads, None if probes is None else probes[k])
        attentions.append(attention)
    return x[..., 0, :], attentions


def rollout(attentions: Any, gradients: Any) -> Array:
    """R of the module's equations, from each layer's attention and gradient, (..., heads, n, n) -> (..., n, n)."""
    first = attentions[0]
    relevance = jnp.broadcast_to(jnp.eye(first.shape[-1], dtype=first.dtype), (*first.shape[:-3], *first.shape[-2:]))
    for attention, gradient in zip(attentions, gradients, strict=True):
        relevance = relevance + jax.nn.relu(attention * gradient).mean(-3) @ relevance
    return relevance


class Interview(NamedTuple):
    """A batch of interviews; either half may be None.

    Attributes:
        sentences: how many each has, (batch,).
        tokens: (batch, sentences, time), whole numbers.
        lengths: of the sentences, (batch, sentences); not read where there is no sentence.
        spectrograms: log-Mel images, (batch, sentences, bands, frames), sides multiples of the patch.
        frames: real frames of each, (batch, sentences); None where all are.
    """

    sentences: Array
    tokens: Array | None = None
    lengths: Array | None = None
    spectrograms: Array | None = None
    frames: Array | None = None


class Relevance(NamedTuple):
    """What a logit rests on; zero at padding.

    Attributes:
        logit: y, (batch,).
        sentences: (batch, sentences), the CLS row of R at the interviews' level.
        tokens: (batch, sentences, time), that of each sentence's R, by the same y; None without text.
        patches: (batch, sentences, rows, columns), likewise of its spectrogram; None without sound.
        R_interview, R_text, R_sound: the matrices, CLS first.
    """

    logit: Array
    sentences: Array
    tokens: Array | None
    patches: Array | None
    R_interview: Array
    R_text: Array | None
    R_sound: Array | None

    @property
    def tokens_in_interview(self) -> Array | None:
        """Sentence's relevance times token's."""
        return None if self.tokens is None else self.sentences[..., None] * self.tokens

    @property
    def patches_in_interview(self) -> Array | None:
        """Sentence's relevance times patch's."""
        return None if self.patches is None else self.sentences[..., None, None] * self.patches


@dataclasses.dataclass(frozen=True)
class HierarchicalTransformer:
    """The model of the module's specification.

        model = HierarchicalTransformer(rows=len(vocabulary))
        params = model.init(key)
        logits = model(params, interviews)
        found = model.relevance(params, interviews)

    Attributes:
        rows: tokens in the vocabulary; 0 for sound alone.
        bands: of the log-Mel images; 0 for text alone.
        features: d.
        heads, layers: of every encoder.
        widen: the layers' inner width over d.
        longest: tokens in a sentence, at most.
        frames: of a spectrogram, at most.
        sentences: of an interview, at most.
        patch: side of the spectrogram's patches.
        positions: of sentences; without them their order does not matter.
        modality_dropout: how often one half of the sentences' vectors, text or sound, is hidden where a key is given.
    """

    rows: int = 0
    bands: int = 0
    features: int = 64
    heads: int = 4
    layers: int = 2
    widen: int = 2
    longest: int = 64
    frames: int = 256
    sentences: int = 64
    patch: int = 16
    positions: bool = True
    modality_dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.rows and not self.bands:
            raise ValueError("rows=0 and bands=0 were given: nothing to read. Give rows, bands, or both.")
        if self.features % self.heads:
            raise ValueError(f"features={self.features} do not divide among {self.heads} heads; give a multiple.")
        if self.bands % self.patch or (self.bands and self.frames % self.patch):
            raise ValueError(
                f"Spectrograms of {self.bands} x {self.frames} do not divide into patches of side {self.patch}; "
                "give multiples."
            )

    def init(self, key: Array) -> PyTree:
        """Parameters: embeddings normal of deviation .02 times sqrt(d), matrices of deviation 1/sqrt(fan in)."""
        keys = iter(jax.random.split(key, 16 + 18 * self.layers))
        d, m = self.features, self.widen * self.features

        def matrix(n: int, out: int) -> Array:
            return jax.random.normal(next(keys), (n, out)) / math.sqrt(n)

        def places(n: int) -> Array:
            return 0.02 * math.sqrt(d) * jax.random.normal(next(keys), (n, d))

        def stack() -> dict[str, Any]:
            shapes = {"Wq": (d, d), "Wk": (d, d), "Wv": (d, d), "Wo": (d, d), "W1": (d, m), "W2": (m, d)}
            return {f"layer{k}": {name: matrix(*shape) for name, shape in shapes.items()} for k in range(self.layers)}

        params: dict[str, Any] = {}
        if self.rows:
            params["text"] = {
                "embedding": places(self.rows),
                "positions": places(self.longest),
                "cls": places(1)[0],
                "layers": stack(),
            }
        if self.bands:
            count = (self.bands // self.patch) * (self.frames // self.patch)
            params["sound"] = {
                "embedding": matrix(self.patch**2, d),
                "positions": places(count),
                "cls": places(1)[0],
                "layers": stack(),
            }
        halves = len(params)
        params["join"] = matrix(halves * d, d)
        params["interview"] = {"cls": places(1)[0], "layers": stack()}
        if self.positions:
            params["interview"]["positions"] = places(self.sentences)
        params["head"] = {"kernel": matrix(d, 1)[:, 0], "bias": jnp.zeros(())}
        return params

    def _check(self, interviews: Interview) -> None:
        for what, size, given in (
            ("tokens", self.rows, interviews.tokens),
            ("spectrograms", self.bands, interviews.spectrograms),
        ):
            if bool(size) != (given is not None):
                raise ValueError(
                    f"{what} were {'not ' if given is None else ''}given to a model made with"
                    f"{'' if size else 'out'} them; give what the model reads, and nothing else."
                )
        if interviews.tokens is not None:
            check_numbers("The tokens", interviews.tokens, self.rows, "in the model's dictionary", VOCABULARY)
            if interviews.lengths is None or interviews.lengths.shape != interviews.tokens.shape[:2]:
                raise ValueError(
                    f"Tokens of shape {interviews.tokens.shape} were given; give lengths of shape "
                    f"{interviews.tokens.shape[:2]} beside them."
                )
            if interviews.tokens.shape[2] > self.longest:
                raise ValueError(f"Sentences of {interviews.tokens.shape[2]} tokens were given, over {self.longest}.")
        spectrograms = interviews.spectrograms
        if spectrograms is not None:
            bands, frames = spectrograms.shape[-2:]
            if bands != self.bands or frames % self.patch or frames > self.frames:
                raise ValueError(
                    f"Spectrograms of {bands} bands and {frames} frames were given; give {self.bands} bands and a "
                    f"multiple of {self.patch} frames, at most {self.frames}."
                )
        shape = next(a for a in (interviews.tokens, spectrograms) if a is not None).shape
        if interviews.sentences.shape != shape[:1] or shape[1] > self.sentences:
            raise ValueError(
                f"{interviews.sentences.shape} numbers of sentences were given for {shape[0]} interviews of "
                f"{shape[1]} places; give {shape[0]} numbers, and at most {self.sentences} places."
            )
        counts = concrete(interviews.sentences)
        if counts is None:
            return
        if counts.size and (counts.min() < 1 or counts.max() > shape[1]):
            raise ValueError(
                f"Interviews of {counts.min()} to {counts.max()} sentences were given, in {shape[1]} places; an "
                "interview has at least one sentence."
            )
        lengths = None if interviews.lengths is None else concrete(interviews.lengths)
        if lengths is not None:
            empty = (lengths < 1) & (np.arange(shape[1]) < counts[:, None])
            if empty.any():
                where = [tuple(int(i) for i in place) for place in np.argwhere(empty)]
                raise ValueError(f"Sentences {where} (interview, sentence) have length 0: leave them out.")

    def _patches(self, spectrograms: Array, frames: Array | None) -> tuple[Array, Array]:
        """Patches row by row (batch, sentences, rows * columns, patch^2), and which have a real frame."""
        b, s, bands, time = spectrograms.shape
        rows, columns = bands // self.patch, time // self.patch
        cut = spectrograms.reshape(b, s, rows, self.patch, columns, self.patch).swapaxes(3, 4)
        if frames is None:
            frames = jnp.full((b, s), time)
        real = jnp.arange(columns) * self.patch < frames[..., None]
        if time:
            inside = valid(frames, time).reshape(b, s, 1, columns, 1, self.patch)
            cut = jnp.where(inside, cut, 0)
        real = jnp.broadcast_to(real[:, :, None, :], (b, s, rows, columns)).reshape(b, s, -1)
        return cut.reshape(b, s, rows * columns, self.patch**2), real

    def _run(self, params: PyTree, interviews: Interview, probes: Any, key: Array | None = None) -> tuple[Array, Any]:
        """The logits, and the attention of every layer by encoder."""
        attentions, halves = {}, []
        if interviews.tokens is not None:
            p, tokens = params["text"], interviews.tokens
            x = p["embedding"][tokens] + p["positions"][: tokens.shape[2]]
            real = valid(jnp.asarray(interviews.lengths), tokens.shape[2])
            half, attentions["text"] = encode(p["layers"], p["cls"], x, real, self.heads, probes and probes["text"])
            halves.append(half)
        if interviews.spectrograms is not None:
            p = params["sound"]
            cut, real = self._patches(interviews.spectrograms, interviews.frames)
            columns = interviews.spectrograms.shape[-1] // self.patch
            # Positions are of the largest picture's grid, of which a shorter one has the first columns.
            grid = p["positions"].reshape(self.bands // self.patch, -1, self.features)[:, :columns]
            x = cut @ p["embedding"] + grid.reshape(-1, self.features)
            half, attentions["sound"] = encode(p["layers"], p["cls"], x, real, self.heads, probes and probes["sound"])
            halves.append(half)
        if len(halves) == 2 and key is not None and self.modality_dropout:
            of_which, of_whether = jax.random.split(key)
            shape = halves[0].shape[:2]
            hide = jax.random.bernoulli(of_whether, self.modality_dropout, shape)
            text = jax.random.bernoulli(of_which, 0.5, shape)
            halves = [
                jnp.where((hide & which)[..., None], 0, half) for which, half in zip((text, ~text), halves, strict=True)
            ]
        x = jnp.concatenate(halves, -1) @ params["join"]
        p = params["interview"]
        if self.positions:
            x = x + p["positions"][: x.shape[1]]
        real = valid(interviews.sentences, x.shape[1])
        out, attentions["interview"] = encode(
            p["layers"], p["cls"], x, real, self.heads, probes and probes["interview"]
        )
        return out @ params["head"]["kernel"] + params["head"]["bias"], attentions

    def __call__(self, params: PyTree, interviews: Interview, *, key: Array | None = None) -> Array:
        """Logits of interviews, (batch,); `key` is for modality dropout.

        Raises:
            ValueError: shapes, numbers of sentences or lengths that do not fit, by name.
        """
        self._check(interviews)
        return self._run(params, interviews, None, key)[0]

    def relevance(self, params: PyTree, interviews: Interview) -> Relevance:
        """What each interview's logit rests on: sentences, tokens, patches. See the module's equations."""
        self._check(interviews)
        shapes = jax.eval_shape(lambda: self._run(params, interviews, None)[1])
        probes = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

        def total(probes: Any) -> Any:
            logits, attentions = self._run(params, interviews, probes)
            return logits.sum(), (logits, attentions)  # an interview's probes move its own logit alone

        gradients, (logit, attentions) = jax.grad(total, has_aux=True)(probes)
        found = {name: rollout(attentions[name], gradients[name]) for name in attentions}
        sentences = found["interview"][:, 0, 1:]
        there = valid(interviews.sentences, sentences.shape[1])
        tokens = patches = None
        if "text" in found:
            tokens = jnp.where(there[..., None], found["text"][..., 0, 1:], 0)
        if interviews.spectrograms is not None:
            rows, columns = (side // self.patch for side in interviews.spectrograms.shape[-2:])
            patches = jnp.where(there[..., None], found["sound"][..., 0, 1:], 0)
            patches = patches.reshape(*patches.shape[:2], rows, columns)
        return Relevance(logit, sentences, tokens, patches, found["interview"], found.get("text"), found.get("sound"))
