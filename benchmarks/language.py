"""Language models: the memory that differentiating a training of GPT-2's size needs, tokens per second of a small one.

`--part memory`: the compiled memory analysis of the shape, by shapes alone: 124,439,808 parameters, batches of 64
sequences of 1,024 tokens, 16 Adam steps differentiated from the end to the beginning in the weights of two sources,
beside one plain step. What XLA reserves depends on the backend, which is printed; on a CPU nothing is run. On a GPU
with room for it, `--run` runs both and prints tokens per second.

`--part speed`: a small transformer on a CPU: plain Adam steps, steps of the four routes to the weights of its sources.
Tokens of lower batches per second; a route's steps take upper batches too.

    python benchmarks/language.py
    python benchmarks/language.py --part memory --run        # on a GPU
"""

from __future__ import annotations

import dataclasses
import math
import time

import _harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import Problem
from bilevel.applications import language
from bilevel.applications.language import GPT2, Transformer
from bilevel.hypergradients import value_and_hypergradient
from bilevel.keys import as_step_key


def size(tree):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def step_of(rule, loss):
    def step(y, memory, rows):
        gradient = jax.grad(lambda y: loss(y, rows).mean())(y)
        updates, memory = rule.update(gradient, memory, y)
        return optax.apply_updates(y, updates), memory

    return step


def report(name, compiled, seconds):
    found, gb = compiled.memory_analysis(), 1e-9
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    print(
        f"{name:<28} arguments and results {kept * gb:6.2f} GB, temporaries {found.temp_size_in_bytes * gb:7.2f} GB, "
        f"in all {(kept + found.temp_size_in_bytes) * gb:7.2f} GB; compiled in {seconds:.0f} s",
        flush=True,
    )


def memory(args):
    """The whole run's derivative at GPT-2's shape, beside a plain step."""
    wide = {"width": args.width, "blocks": args.blocks, "heads": max(1, args.width // 64)} if args.width else {}
    model = dataclasses.replace(GPT2, compute=args.compute, chunk=args.chunk, length=args.length, **wide)
    rows = jax.ShapeDtypeStruct((args.sequences, args.length + 1), jnp.int32)
    route = language.whole_run(args.steps, 1e-4, checkpoint=args.checkpoint)
    y = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    x = jax.ShapeDtypeStruct((2,), jnp.float32)
    print(
        f"compiled memory analysis on {jax.default_backend()}: {model.count():,} parameters ({size(y) * 1e-9:.2f} GB), "
        f"{args.sequences} sequences of {args.length} tokens, {args.steps} steps, checkpoint={args.checkpoint!r}, "
        f"products in {args.compute or 'float32'}"
    )
    owner = jnp.arange(args.sequences) % 2

    def lower_loss(x, y, batch):
        return (2 * jax.nn.softmax(x)[owner] * model.loss(y, batch)).mean()

    def upper_loss(x, y, batch):
        return model.loss(y, batch).mean()

    def whole(x, y, rows):
        problem = Problem(upper_loss, lower_loss, rows, rows)
        found = value_and_hypergradient(problem, route.hypergradient, route.lower_solver)(x, y)
        return found.value, found.gradient

    rule = optax.adam(1e-4)
    plain = jax.jit(step_of(rule, model.loss), donate_argnums=(0, 1))
    first, timed = _harness.compiled(plain, y, jax.eval_shape(rule.init, y), rows)
    report("one plain step of Adam", first, timed.wall[0])
    second, timed = _harness.compiled(jax.jit(whole), x, y, rows)
    report(f"derivative of {args.steps} steps", second, timed.wall[0])
    if args.run:
        tokens = args.sequences * args.length
        rows = jnp.asarray(np.random.default_rng(0).integers(0, model.vocabulary, rows.shape), jnp.int32)
        y = jax.jit(model.init)(jax.random.key(0))
        _, times = _harness.measured(lambda: second(jnp.zeros(2), y, rows))
        _, times = _harness.measured(lambda: second(jnp.zeros(2), y, rows))
        moved, state = first(y, rule.init(y), rows)  # y is given away here
        began = time.perf_counter()
        for _ in range(args.steps):
            moved, state = first(moved, state, rows)
        jax.block_until_ready(moved)
        plain_s = time.perf_counter() - began
        for name, seconds in (("plain training", plain_s), ("its derivative", times.wall[0])):
            print(f"{name:<28} {args.steps * tokens / seconds:12,.0f} tokens/s")


def speed(args):
    """Steps of the routes beside plain ones, on a small network."""
    model, random = Transformer(256, 64, 2, 4, 64), np.random.default_rng(0)
    rows = random.integers(0, 256, (512, 65)).astype(np.int32)
    app = language.sources(model, {"a": rows[:256], "b": rows[256:]}, rows[:128], batch=32)
    rule, key = optax.adam(1e-3), as_step_key(0)
    plain, steps = step_of(rule, model.loss), args.lower
    routes = {
        "penalty": (language.penalty(), 1),
        "one step": (language.one_step(), 1),
        f"whole run of {steps}": (language.whole_run(steps), steps),
        f"implicit, {steps} steps": (language.implicit(steps), steps),
    }
    calls, each = {}, {}
    repeat = lambda step: jax.jit(
        lambda state: jax.lax.scan(lambda s, _: (step(s), None), state, None, length=args.repeat)[0]
    )
    start = (app.y0, rule.init(app.y0))
    programme = repeat(lambda s: plain(*s, jnp.asarray(rows[:32])))
    calls["plain training"] = lambda f=programme, s=start: f(s)
    each["plain training"] = args.repeat * 32 * 64
    for name, (route, lower_steps) in routes.items():
        state = route.init(app.problem, app.x0, app.y0, key)
        programme = repeat(lambda s, route=route: route.step(app.problem, s, key)[0])
        calls[name] = lambda f=programme, s=state: f(s)
        each[name] = args.repeat * 32 * 64 * lower_steps
    times = _harness.interleaved(calls, args.rounds)
    unit = each["plain training"] / times["plain training"].median()
    table = [("", "tokens/s", "of plain training")]
    for name in calls:
        rate = each[name] / times[name].median()
        table.append((name, f"{rate:,.0f}", f"{rate / unit:.3f}"))
    print(f"{model.count():,} parameters, batches of 32 sequences of 64 tokens, CPU time on one core")
    _harness.table(*table)


def main():
    parser = _harness.arguments(__doc__, rounds=5)
    parser.add_argument("--part", choices=("memory", "speed"), action="append", help="default: both")
    parser.add_argument("--run", action="store_true", help="run the GPT-2 shape too: for a GPU")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=16, help="differentiated")
    parser.add_argument("--checkpoint", default="sqrt", help="states that are kept, see hypergradients.Unrolled")
    parser.add_argument("--compute", choices=("bfloat16",), help="dtype of the products")
    parser.add_argument("--chunk", type=int, default=16, help="positions whose logits exist at once")
    parser.add_argument("--width", type=int, default=0, help="another width than GPT-2's, with --blocks")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--lower", type=int, default=10, help="lower steps of the routes that take several")
    parser.add_argument("--repeat", type=int, default=3, help="steps of each side in a round")
    small = {"sequences": 2, "length": 32, "steps": 4, "width": 64, "blocks": 2, "repeat": 1, "lower": 2}
    args = _harness.start(parser, "optax", **small)
    for part in args.part or ("memory", "speed"):
        {"memory": memory, "speed": speed}[part](args)


if __name__ == "__main__":
    main()
