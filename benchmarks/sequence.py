"""An LSTM's forward pass and gradient against PyTorch's, on one core: equal results first, then the ratio of CPU times.

    python benchmarks/sequence.py [--rounds 15] [--batch 32] [--length 40] [--width 150]

Two layers, both directions, inputs twice the width, the same weights. The gradient is that of the sum of squares by
the weights and the inputs. `masked` is given lengths too, as texts of a batch have; PyTorch's side has none.
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
    options = _harness.start(parser, "torch", given=given, batch=4, length=10, width=16)

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

    forward = jax.jit(ours)
    gradient = jax.jit(jax.grad(lambda p, x, n: jnp.square(ours(p, x, n)).sum(), argnums=(0, 1)))
    (by_params, by_x), (theirs_x, *theirs_weights) = gradient(params, x, None), torch_gradient()
    by_name = ours.from_pytorch({name: g.numpy() for name, g in zip(names, theirs_weights, strict=True)})
    output = _harness.difference(forward(params, x), torch_forward())
    slopes = [_harness.difference(by_x, theirs_x.numpy())]
    slopes += map(_harness.difference, jax.tree.leaves(by_params), jax.tree.leaves(by_name))
    print(f"batch {options.batch}, length {options.length}, width {options.width}, two layers, both directions")
    print(f"relative difference of outputs {output:.1e}, largest of a gradient {max(slopes):.1e}")
    if not max(output, *slopes) < 1e-4:
        raise SystemExit("The two sides do not compute the same.")
    calls = {
        "torch forward": torch_forward,
        "forward": lambda: forward(params, x),
        "forward, masked": lambda: forward(params, x, full),
        "torch gradient": torch_gradient,
        "gradient": lambda: gradient(params, x, None),
        "gradient, masked": lambda: gradient(params, x, full),
    }
    times = _harness.interleaved(calls, options.rounds, warm=2)
    rows = [("", "CPU ms", "ratio to torch (least, most)")]
    for name, taken in times.items():
        peer = times["torch gradient" if "gradient" in name else "torch forward"]
        rows.append((name, f"{taken.median(unit=1e3):.1f}", "" if "torch" in name else _harness.ratio(taken, peer)))
    _harness.table(*rows)
    return times


if __name__ == "__main__":
    main()
