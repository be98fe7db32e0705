"""Keys of a run's random draws: one step's key, its named streams, and permutations without a table."""

from __future__ import annotations

import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel._module import state

__all__ = ["Draw", "StepKey", "as_step_key", "permute"]


class Draw(enum.IntEnum):
    """What a draw is for. Draws of one step with different names are independent; this is the one table of them."""

    LOWER = 0  #: The lower level's batch.
    UPPER = 1  #: The upper level's batch.
    PRODUCTS = 2  #: The lower level's batches for Hessian-vector products.
    CROSS = 3  #: The lower level's batch for a cross product.
    LENGTH = 4  #: The number of factors of a randomised product.
    RESTART = 5  #: Whether a recursion is restarted.
    DIRECTIONS = 6  #: Random directions of zeroth-order estimates.
    KEYED = 7  #: The key that travels with a batch of `data.Keyed`.
    ROUND = 8  #: A federated round.
    LOCAL = 9  #: Its clients' own draws.
    CLIENTS = 10  #: Who takes part in it.
    ORDER = 11  #: Whom a chain is passed on to.
    FIRST = 12  #: Rounds of a federated hypergradient: where chains begin,
    FACTOR = 13  #: a factor,
    LAST = 14  #: where chains end,
    WALK = 15  #: and the walk in x.


@state
class StepKey:
    """The key of one step. Its index travels with it, so that an epoch without replacement needs no sampler state.

    Attributes:
      base: the run's PRNG key, the same at every step.
      step: uint32, the index of the draw; a number of numpy's on the host, where it then compiles nothing.
      stream: uint32, likewise; tells independent uses within one step apart.
    """

    base: jax.Array
    step: Any
    stream: Any

    @property
    def random(self) -> jax.Array:
        """A PRNG key for `jax.random`, fresh at every step and in every stream."""
        return jax.random.fold_in(jax.random.fold_in(self.base, self.stream), self.step)

    def fold_in(self, tag: Any) -> StepKey:
        """The same step in another stream (`Draw` names them, or a number does, which may be traced): draws that are
        independent of this one's."""
        mixed: Any
        if isinstance(tag, jax.Array):
            mixed = mix(jnp.asarray(self.stream, jnp.uint32) * jnp.uint32(0x01000193) + tag.astype(jnp.uint32) + 1)
        elif isinstance(self.stream, np.generic):  # on the host, where nothing is compiled for it
            mixed = np.uint32(_mix(int(self.stream) * 0x01000193 + int(tag) + 1))
        else:
            mixed = mix(self.stream * jnp.uint32(0x01000193) + jnp.uint32(int(tag) + 1))
        return StepKey(self.base, self.step, mixed)

    def inner(self, i: Any, total: int) -> StepKey:
        """The key of inner step `i` of `total`: draw number `step * total + i` of the same stream."""
        return StepKey(self.base, self.step * jnp.uint32(total) + jnp.asarray(i, jnp.uint32), self.stream)


def as_step_key(key: Any, step: Any = 0) -> StepKey:
    """A `StepKey` from an integer seed, a PRNG key or a `StepKey` (returned as it is).

    Raises:
      TypeError: it is none of these.
    """
    if isinstance(key, StepKey):
        return key
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        key = _seeded(int(key))
    kind, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = kind is not None and jnp.issubdtype(kind, jax.dtypes.prng_key)
    raw = kind == jnp.uint32 and shape in ((2,), (4,))
    if not (typed and shape == ()) and not raw:
        what = f"{kind}{list(shape)}" if kind is not None and shape is not None else repr(key)
        raise TypeError(f"key={what}: one key is needed, a seed such as 0 or jax.random.key(0).")
    if not typed:
        key = jax.random.wrap_key_data(key)
    traced = isinstance(step, jax.Array)
    return StepKey(key, step.astype(jnp.uint32) if traced else np.uint32(step), np.uint32(0))


def _seeded(seed: int) -> jax.Array:
    """`jax.random.key(seed)`, for which JAX compiles two programmes; here the words of its default are written down."""
    if jax.config.jax_default_prng_impl == "threefry2x32" and 0 <= seed < 2**31:  # type: ignore[attr-defined]
        return jax.random.wrap_key_data(np.array([0, seed], np.uint32))  # type: ignore[arg-type]
    return jax.random.key(seed)


def mix(h: jax.Array) -> jax.Array:
    """A bijective hash of 32 bits (multiplications and shifts only, so that it fuses with what follows)."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    return h ^ (h >> 16)


def _mix(h: int) -> int:
    """`mix` of a Python number."""
    h &= 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)


_ROUNDS, _AT_ONCE = 9, 3


def permute(i: Any, n: Any, seed: jax.Array) -> jax.Array:
    """The image of `i` under a keyed permutation of 0, ..., n-1, computed without the other n-1 images.

    A random rotation, then eight rounds of swap-or-not: each pairs i with k - i mod n for a random k, and swaps the two
    or not by a hashed coin of the pair: a bijection for any n, without a table. A single image is uniform thanks to the
    rotation, and two images are independent but for about 2^-8: enough for the order of batches.

    `i` holds integers in 0..n-1; n, below 2^31, may be traced; the seed is a uint32 scalar.

    Reference: Hoang, Morris, Rogaway, "An Enciphering Scheme Based on a Card Shuffle", CRYPTO 2012.
    """
    n = jnp.asarray(n, jnp.uint32)
    # As a loop and not written out: XLA:CPU compiles a loop this small to one kernel, the rounds in a row to dozens.
    rounds = lambda r, i: _rounds(r, i, n, seed)  # noqa: E731
    return jax.lax.fori_loop(0, _ROUNDS // _AT_ONCE, rounds, jnp.asarray(i, jnp.uint32)).astype(jnp.int32)


def _rounds(r: Any, i: jax.Array, n: jax.Array, seed: jax.Array) -> jax.Array:
    for u in range(_AT_ONCE):
        i = _swap_or_not(r * _AT_ONCE + u, i, n, seed)
    return i


def _swap_or_not(r: Any, i: jax.Array, n: jax.Array, seed: jax.Array) -> jax.Array:
    """Round r of the permutation; round 0 is the rotation."""
    key = mix(seed + jnp.uint32(0x9E3779B9) * jnp.asarray(r, jnp.uint32))
    k = key % n
    other = jnp.where(i <= k, k - i, k + n - i)
    coin = (jnp.maximum(i, other) ^ key) * jnp.uint32(0x7FEB352D)
    coin = ((coin ^ (coin >> 15)) * jnp.uint32(0x846CA68B)) >> 31
    return jnp.where((coin == 1) | (r == 0), other, i)


def in_epoch(step: jax.Array, n: int, stream: jax.Array) -> jax.Array:
    """permute(step mod n, n, seed of the epoch step // n): the scalar that a block sampler draws at every step.

    The divisions are done in the loop, so that XLA:CPU has one kernel to launch; and the seed is made anew in it, so
    that the loop carries the image alone: each variable more is a copy to launch.
    """
    count = jnp.uint32(n)

    def rounds(r: Any, i: jax.Array) -> jax.Array:
        return _rounds(r, jnp.where(r == 0, i % count, i), count, epoch_seed(stream, step // count))

    return jax.lax.fori_loop(0, _ROUNDS // _AT_ONCE, rounds, step).astype(jnp.int32)


def stream_seed(key: StepKey) -> jax.Array:
    """A seed of 32 bits for this key's stream, the same at every step."""
    words, h = jax.random.key_data(key.base).reshape(-1), key.stream
    for w in range(words.shape[0]):
        h = mix(h ^ words[w])
    return h


def epoch_seed(h: jax.Array, epoch: Any) -> jax.Array:
    """The seed of an epoch's permutation, `h` being that of the stream."""
    return mix(h + jnp.asarray(epoch, jnp.uint32) * jnp.uint32(0x9E3779B9))
