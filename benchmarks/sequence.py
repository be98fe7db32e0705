"""An LSTM's forward pass and gradient against PyTorch's, on one core: equal results first, then the ratio of CPU times.

    python benchmarks/sequence.py [--rounds 15] [--batch 32] [--length 40] [--width 150]

Two layers, both directions, inputs twice the width, the same weights. The gradient is that of the sum of squares by
the weights and the inputs. `masked` is given lengths too, as texts of a batch have; PyTorch's side has none.
`steps` are those of gradient descent, all in one programme here and in a loop there, as a lower level is trained. Both
sides have the memory that `import bilevel` keeps between calls (`memory.py`).
Rounds alternate between the sides. A ratio below 1 means that ours takes less.
"""

from __future__ import annotations

import _harness
import numpy as np


def main(given=None):
    parser = _harness.arguments(__doc__, rounds=15)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=40)
    parser.add_argument("--width", type=int, default=150, help="of a direction's state")
    parser.add_argument("--steps", type=int, default=10, help="of gradient descent")
    options = _harness.start(parser, "torch", given=given, batch=4, length=10, width=16, steps=3)

    import jax
    import jax.numpy as jnp
    import torch

    from bilevel.applications.sequence import LSTM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    features = 2 * options.width
    theirs = torch.nn.LSTM(features, options.width, 2, bidirectional=True, batch_first=True)
    ours = LSTM(features, options.width, layers=2)
    params = ours.from_pytorch({name: weight.detach().numpy() for name, weight in theirs.named_parameters()})
    x = np.random.default_rng(0).standard_normal((options.batch, options.length, features)).astype(np.float32)
    tensor, wanted = torch.from_numpy(x), torch.from_numpy(x).requires_grad_()
    names, weights = zip(*theirs.named_parameters(), strict=True)
    x = jnp.asarray(x)
    full = jnp.full(options.batch, options.length)

    def torch_forward():
        with torch.no_grad():
            return theirs(tensor)[0].numpy()

    def torch_gradient():
        return torch.autograd.grad(theirs(wanted)[0].square().sum(), [wanted, *weights])

    def torch_steps():
        moving = [weight.detach().clone().requires_grad_() for weight in weights]
        call = dict(zip(names, moving, strict=True))
        for _ in range(options.steps):
            loss = torch.func.functional_call(theirs, call, (tensor,))[0].square().sum()
            with torch.no_grad():
                for weight, slope in zip(moving, torch.autograd.grad(loss, moving), strict=True):
                    weight -= 1e-6 * slope
        return moving

    def loss(p, x, n):
        return jnp.square(ours(p, x, n)).sum()

    @jax.jit
    def steps(p, x):
        def step(p, _):
            return jax.tree.map(lambda a, g: a - 1e-6 * g, p, jax.grad(loss)(p, x, None)), None

        return jax.lax.scan(step, p, length=options.steps)[0]

    forward = jax.jit(ours)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    (by_params, by_x), (theirs_x, *theirs_weights) = gradient(params, x, None), torch_gradient()
    by_name = ours.from_pytorch({name: g.numpy() for name, g in zip(names, theirs_weights, strict=True)})
    output = _harness.difference(forward(params, x), torch_forward())
    slopes = [_harness.difference(by_x, theirs_x.numpy())]
    slopes += map(_harness.difference, jax.tree.leaves(by_params), jax.tree.leaves(by_name))
    print(f"batch {options.batch}, length {options.length}, width {options.width}, two layers, both directions")
    print(f"relative difference of outputs {output:.1e}, largest of a gradient {max(slopes):.1e}")
    ended = ours.from_pytorch({name: w.detach().numpy() for name, w in zip(names, torch_steps(), strict=True)})
    slopes += map(_harness.difference, jax.tree.leaves(steps(params, x)), jax.tree.leaves(ended))
    if not max(output, *slopes) < 1e-4:
        raise SystemExit("The two sides do not compute the same.")
    calls = {
        "torch forward": torch_forward,
        "forward": lambda: forward(params, x),
        "forward, masked": lambda: forward(params, x, full),
        "torch gradient": torch_gradient,
        "gradient": lambda: gradient(params, x, None),
        "gradient, masked": lambda: gradient(params, x, full),
        "torch steps": torch_steps,
        "steps": lambda: steps(params, x),
    }
    times = _harness.interleaved(calls, options.rounds, warm=2)
    rows = [("", "CPU ms", "ratio to torch (least, most)")]
    for name, taken in times.items():
        peer = times[f"torch {name.removeprefix('torch ').split(',')[0]}"]
        rows.append((name, f"{taken.median(unit=1e3):.1f}", "" if "torch" in name else _harness.ratio(taken, peer)))
    _harness.table(*rows)
    return times


if __name__ == "__main__":
    main()
