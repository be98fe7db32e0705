"""What keeping freed memory gains: a jitted step called from Python, as glibc is and as `import bilevel` has it.

    python benchmarks/memory.py [--rounds 20]

Each side is a process of its own on one core, the sides in turn: a step of momentum SGD of the nano detector, the
gradient of a two-layer bidirectional LSTM (the setting of `benchmarks/sequence.py`), and that of a denoiser of many
small products (`benchmarks/forward_mode.py`), which has little to gain and should lose nothing. Printed are CPU times,
the size of the compiled step's temporaries, and the pages that the system had to give per call.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from typing import Any

import _harness
import numpy as np

SIDES = {"glibc's own": "0", "kept": "1"}


def detector_step() -> Any:
    """A step of the nano detector and its arguments."""
    import jax
    import optax
    from detection import ours, scene_batch

    _, y, loss = ours()
    rule = optax.sgd(1e-3, 0.937)

    def step(y: Any, memory: Any, batch: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(y, batch)
        updates, memory = rule.update(gradient, memory, y)
        return optax.apply_updates(y, updates), memory, value

    return step, (y, rule.init(y), jax.tree.map(jax.numpy.asarray, scene_batch(16)))


def lstm_gradient() -> Any:
    """The gradient of an LSTM's sum of squares and its arguments: batch 32, length 40, width 150."""
    import jax
    import jax.numpy as jnp

    from bilevel.applications.sequence import LSTM

    net = LSTM(300, 150, layers=2)
    x = jax.random.normal(jax.random.key(1), (32, 40, 300))
    return jax.grad(lambda p, x: jnp.square(net(p, x, None)).sum(), argnums=(0, 1)), (net.init(jax.random.key(0)), x)


def denoiser_gradient() -> Any:
    """The gradient of a small denoiser's training loss and its arguments: width 16, windows of 16 x 4, batch 32."""
    from bilevel.applications.time_series import Denoiser, population, sines_windows

    parts = [sines_windows(200, 16, 4, seed) for seed in (0, 1)]
    app = population(*parts, denoiser=Denoiser(16, 4, 16, 1, 1), bins=4, batch=32, held_out=64)
    return lambda problem, x, y: problem.draw_lower(0).gradient(x, y), (app.problem, app.x0, app.y0)


CASES = {
    "nano detector, a step": detector_step,
    "LSTM, a gradient": lstm_gradient,
    "denoiser, a gradient": denoiser_gradient,
}


def side(name: str, rounds: int) -> None:
    """One side of one case, in this process: prints CPU seconds of each call, and what the program needs."""
    import jax

    import bilevel  # noqa: F401

    f, arguments = CASES[name]()
    program = jax.jit(f).lower(*arguments).compile()
    kept: Any = None

    def call() -> None:
        nonlocal kept
        kept = jax.block_until_ready(program(*arguments))  # the last results live on, as in a loop

    call()
    times, before = _harness.Times(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        with times.measured():
            call()
    pages = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / rounds
    print(json.dumps([times.cpu, program.memory_analysis().temp_size_in_bytes / 2**20, pages]))


def main() -> None:
    """Both sides of both cases."""
    parser = _harness.arguments(__doc__, rounds=20)
    parser.add_argument("--side", choices=CASES, help="one case in this process (what the others are made of)")
    options = _harness.start(parser)
    if options.side:
        side(options.side, options.rounds)
        return
    rows = []
    for case in CASES:
        found: dict[str, list[Any]] = {name: [] for name in SIDES}
        for name, kept in 3 * list(SIDES.items()):
            command = [sys.executable, __file__, "--side", case, "--rounds", str(options.rounds)]
            environment = {**os.environ, "BILEVEL_KEEP_MEMORY": kept}
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
        medians = {name: [float(np.median(cpu)) for cpu, _, _ in of] for name, of in found.items()}
        ratios = [b / a for a, b in zip(medians["glibc's own"], medians["kept"], strict=True)]
        for name, of in found.items():
            over = f"{np.median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f})" if name == "kept" else ""
            rows.append(
                (case, name, f"{np.median(medians[name]) * 1e3:.1f}", over, f"{of[0][1]:.0f}", f"{of[-1][2]:.0f}")
            )
    _harness.table(("", "memory", "CPU ms", "over glibc's own", "temporaries, MiB", "pages a call"), *rows)


if __name__ == "__main__":
    main()
