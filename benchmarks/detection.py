"""The nano detector against the same one in PyTorch: CPU time of a training step; compile time, also the example's.

    python benchmarks/detection.py [--rounds 20] [--only step|compile|example]

- step: both sides start with the same weights (under the original names, by `load_original`) and take steps of SGD with
  momentum on 16 scenes of digits, 64 x 64. Losses and gradients are compared first; then the sides take turns on one
  core. PyTorch runs with its usual order of axes and with `channels_last`, and the faster counts.
- compile: the gradient of the nano detector's loss, on all cores.
- example: everything that `examples/detection_cleaning.py` compiles, on all cores, with one step each of its trainings.

Each part is a process of its own, so that none finds what another compiled.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _harness

PARTS = ("compile", "example", "step")
BARS = {"compile": 40, "example": 100, "step": 0.7}
CLASSES, BINS, SIZE = 3, 8, 64
LR, MOMENTUM = 1e-3, 0.937


def scene_batch(images: int) -> dict[str, Any]:
    """Scenes of digits with their boxes."""
    from bilevel.applications import detection

    batch = detection.scenes(detection.digit_items((0, 1, 4)), images, seed=0, size=SIZE)
    return {name: batch[name] for name in ("image", "boxes", "classes", "mask")}


def ours() -> tuple[Any, Any, Any]:
    """The detector, its parameters, and its loss as a function of parameters and batch."""
    from flax import nnx

    from bilevel.applications import detection
    from bilevel.integrations.flax import from_nnx

    model = detection.bgf_nano(CLASSES, image=SIZE, rngs=nnx.Rngs(0))
    y, apply = from_nnx(model)
    return model, y, lambda y, batch: detection.loss(apply(y, batch["image"], train=True), batch).total


def compile_part(args: Any) -> None:
    import jax

    _, y, loss = ours()
    batch = scene_batch(args.batch)
    _, times = _harness.compiled(jax.jit(jax.value_and_grad(loss)), y, batch)
    _say("compile", "the nano detector's gradient: traced and compiled", times)


def example_part(args: Any) -> None:
    import jax

    spent: dict[str, float] = {}

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            spent[event] = spent.get(event, 0.0) + seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    path = Path(__file__).parents[1] / "examples" / "detection_cleaning.py"
    options = ["--seeds", "1", "--steps", "1", "--learning", "1", "--items", "digits"]
    with tempfile.TemporaryDirectory() as folder:
        main = runpy.run_path(str(path))["main"]
        _, times = _harness.measured(lambda: main([*options, "--out", f"{folder}/picture.png"]))
    for event, seconds in sorted(spent.items()):
        print(f"  {event.rsplit('/', 1)[-1]} {seconds:.1f} s by the clock")
    _say("example", "the example with one step of each training", times)


def _say(part: str, what: str, times: _harness.Times) -> None:
    print(f"{what} in {times.median():.1f} s of CPU, {times.median('wall'):.1f} s by the clock (bar {BARS[part]} s)")


def step_part(args: Any) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import torch
    from _detection_torch import Nano, detection_loss
    from flax import nnx

    from bilevel.applications import detection

    torch.manual_seed(0)
    torch.set_num_threads(1)
    theirs = Nano(CLASSES, BINS)
    model, _, loss = ours()
    detection.load_original(model, {name: a.detach().numpy() for name, a in theirs.state_dict().items()})
    y = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    from bilevel.integrations.flax import from_nnx

    y, _ = from_nnx(model)
    batch = scene_batch(args.batch)
    given = {name: torch.from_numpy(np.asarray(a)) for name, a in batch.items()}
    given["image"] = given["image"].permute(0, 3, 1, 2).contiguous()

    # Equal functions first.
    value, gradient = jax.jit(jax.value_and_grad(loss))(y, batch)
    expected = detection_loss(theirs, given)
    expected.backward()
    grads = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    copy = nnx.clone(model)
    detection.load_original(copy, grads)  # gradients in our layout
    there, _ = from_nnx(copy)
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    print(
        f"loss {float(value):.6f} and {expected.item():.6f}, relative difference "
        f"{_harness.difference(value, expected.item()):.1e}; gradients differ by "
        f"{_harness.difference(flat(gradient), flat(there)):.1e}"
    )

    rule = optax.sgd(LR, MOMENTUM)

    @jax.jit
    def step(y: Any, memory: Any, batch: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(y, batch)
        updates, memory = rule.update(gradient, memory, y)
        return optax.apply_updates(y, updates), memory, value

    batch = jax.tree.map(jnp.asarray, batch)
    at = {"ours": (y, rule.init(y), value)}

    def our_steps() -> Any:
        for _ in range(args.steps):
            at["ours"] = step(*at["ours"][:2], batch)
        return at["ours"]

    def torch_side(layout: torch.memory_format) -> Any:
        net = Nano(CLASSES, BINS)
        net.load_state_dict(theirs.state_dict())
        net = net.to(memory_format=layout)
        data = {**given, "image": given["image"].contiguous(memory_format=layout)}
        optimizer = torch.optim.SGD(net.parameters(), LR, MOMENTUM)

        def steps() -> None:
            for _ in range(args.steps):
                optimizer.zero_grad()
                found = detection_loss(net, data)
                found.backward()
                optimizer.step()
            last[layout] = found.item()

        return steps

    last: dict[Any, float] = {}
    layouts = {"PyTorch": torch.contiguous_format, "PyTorch, channels last": torch.channels_last}
    calls = {"bilevel": our_steps, **{name: torch_side(layout) for name, layout in layouts.items()}}
    times = _harness.interleaved(calls, args.rounds)
    faster = min(layouts, key=lambda name: times[name].median())
    rows = [
        (name, f"{t.median(unit=1e3) / args.steps:.1f}", _harness.ratio(times["bilevel"], t))
        for name, t in times.items()
    ]
    _harness.table(("", "CPU ms per step", "ours over it (least, most)"), *rows)
    ends = ", ".join(f"{value:.3f}" for value in (float(at["ours"][2]), *last.values()))
    print(f"losses at the last step of each: {ends}; ours over {faster}, the faster: bar {BARS['step']}")


def main() -> None:
    """Each part in a process of its own, or the one asked for in this one."""
    parser = _harness.arguments(__doc__, rounds=20)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--batch", type=int, default=16, help="images of a step")
    parser.add_argument("--steps", type=int, default=5, help="in a round")
    parts = {"compile": compile_part, "example": example_part, "step": step_part}
    only = parser.parse_known_args()[0].only
    if only:
        parts[only](_harness.start(parser, "optax", "flax", "torch", pin=only == "step", steps=1))
        return
    parser.parse_args()
    for part in PARTS:
        began = time.perf_counter()
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", part], check=True)
        print(f"-- {part}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
