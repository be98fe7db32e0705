"""Train the base model that `examples/concept_erasure.py` erases from: coloured digits from four words.

Flow matching on scikit-learn's digits in three colours, with prompts in words or numerals, a tenth of them empty.
Writes a safetensors file in bfloat16 with the network, the words' vectors and the judge; prints its checksum, scores.

    python examples/concept_erasure_base.py --out digits.safetensors
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel.applications.erasure import digits
from bilevel.applications.erasure.text_to_image import matching
from bilevel.applications.layers.weights import write_safetensors


def train_judge(ink, labels, seed=0, steps=600):
    """A network of 64 hidden numbers over the ink, on digits with noise so that it is no stickler."""
    first, second, loop = jax.random.split(jax.random.key(seed), 3)
    weights = {
        "1.weight": jax.random.normal(first, (64, 64)) / 8, "1.bias": jnp.zeros(64),
        "2.weight": jax.random.normal(second, (10, 64)) / 8, "2.bias": jnp.zeros(10),
    }  # fmt: skip
    tokens = digits.to_tokens(digits.coloured(ink, np.zeros(len(ink), int)))
    rule = optax.adamw(3e-3, weight_decay=1e-2)

    def loss(weights, key):
        rows, noise = jax.random.split(key)
        chosen = jax.random.randint(rows, (256,), 0, len(tokens))
        noisy = tokens[chosen] + 0.15 * jax.random.normal(noise, (256, 16, 12))
        logits = digits.Judge(weights).logits(noisy)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)[chosen]).mean()

    def step(carry, key):
        weights, memory = carry
        updates, memory = rule.update(jax.grad(loss)(weights, key), memory, weights)
        return (optax.apply_updates(weights, updates), memory), None

    return jax.jit(lambda c: jax.lax.scan(step, c, jax.random.split(loop, steps))[0][0])((weights, rule.init(weights)))


def train(ink, labels, steps=6000, batch=64, seed=0, rate=2e-3, report=500, ema=0.998):
    """Network and words, averaged over the last steps."""
    tokens = digits.to_tokens(digits.coloured(np.repeat(ink, 3, 0), np.tile(np.arange(3), len(ink))))
    colours, numbers = jnp.tile(jnp.arange(3), len(ink)), jnp.repeat(jnp.asarray(labels), 3)
    of_net, of_words, loop = jax.random.split(jax.random.key(seed), 3)
    table = 0.5 * jax.random.normal(of_words, (len(digits.WORDS), 32))
    params = {"net": digits.NETWORK.init(of_net), "words": table}
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, min(200, steps // 5), steps, 0.01 * rate)
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-3))

    def loss(params, key):
        rows, form, empty, level, noise = jax.random.split(key, 5)
        chosen = jax.random.randint(rows, (batch,), 0, len(tokens))
        word = jnp.where(jax.random.bernoulli(form, 0.5, (batch,)), 6, 16) + numbers[chosen]
        ids = jnp.stack([jnp.full(batch, 1), jnp.full(batch, 2), 3 + colours[chosen], word], 1)
        ids = jnp.where(jax.random.bernoulli(empty, 0.1, (batch, 1)), 0, ids)
        t = jax.nn.sigmoid(jax.random.normal(level, (batch,)))
        noise = jax.random.normal(noise, (batch, 16, 12))
        return matching(digits.MODEL, params["net"], tokens[chosen], noise, t, params["words"][ids])

    def step(carry, key):
        params, memory, average = carry
        value, gradient = jax.value_and_grad(loss)(params, key)
        updates, memory = rule.update(gradient, memory, params)
        params = optax.apply_updates(params, updates)
        return (params, memory, optax.incremental_update(params, average, 1 - ema)), value

    chunk = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys), donate_argnums=0)
    carry, start = (params, rule.init(params), jax.tree.map(jnp.copy, params)), time.process_time()
    for first in range(0, steps, report):
        keys = jax.random.split(jax.random.fold_in(loop, first), min(report, steps - first))
        carry, values = chunk(carry, keys)
        print(
            f"step {first + len(keys)}: loss {values.mean():.4f}, CPU {time.process_time() - start:.0f} s", flush=True
        )
    return carry[2]


def scores(given, per_word=30, key=0):
    """Accuracies of drawn words and numerals, of their colours, and the Frechet distance to held-out digits."""
    wanted = np.repeat(np.arange(10), per_word)
    found = {}
    for name, numeral in (("words", False), ("numerals", True)):
        tokens, colours = jax.jit(lambda k, n=numeral: digits.draw(given, given.params, wanted, n, k))(
            jax.random.key(key)
        )
        found[name] = float((given.judge.digit(tokens) == wanted).mean())
        found[f"colours of {name}"] = float((given.judge.colour(tokens) == colours).mean())
    ink, labels = digits.real()[1]
    real = digits.to_tokens(digits.coloured(ink, np.arange(len(ink)) % 3))
    found["judge on real digits"] = float((given.judge.digit(real) == labels).mean())
    found["Frechet distance"] = digits.frechet(given.judge.features(tokens), given.judge.features(real))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("digits.safetensors"))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    (ink, labels), _ = digits.real()
    judge = train_judge(ink, labels)
    trained = train(ink, labels, args.steps, args.batch)
    named = {f"transformer.{n}": a for n, a in digits.NETWORK.unstack(trained["net"]).items()}
    named |= {"words": trained["words"]} | {f"judge.{n}": a for n, a in judge.items()}
    write_safetensors(args.out, {n: np.asarray(a).astype(jnp.bfloat16) for n, a in named.items()})
    print(f"{args.out}: {args.out.stat().st_size:,} bytes, SHA-256 {hashlib.sha256(args.out.read_bytes()).hexdigest()}")
    for name, value in scores(digits.base(args.out)).items():
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
