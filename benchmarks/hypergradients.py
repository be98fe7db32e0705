"""Hypergradient descent against hand-written JAX, jaxopt, optimistix and PyTorch toolkits: CPU time *and* error.

    python benchmarks/hypergradients.py                    # both problems, all peers that can be imported
    python benchmarks/hypergradients.py --rounds 9 --only ridge

Two problems (synthetic data of the named shapes):
  ridge     400 x 100, one penalty exp(x_j) per feature (100 upper variables), float32; the hypergradient has a closed
            form.
  cleaning  1,000 x 784, 10 classes, softmax regression (7,840 lower variables) with one weight per sample (1,000
            upper variables).

Every method runs the same outer loop: `INNER` gradient steps from the last y, `CG` steps of conjugate gradients from
zero, one gradient step on x. The iterates are compared first; then the loops are timed in turn (A B C ... A B C ...)
in this one process, by process CPU time per outer step, compilation excluded and printed apart. Ratios are ours over
theirs, the median over rounds with the smallest and largest. Optional peers: torch (hand-written), torchopt and
higher are timed where they can be imported, hypertorch from a checkout that `--hypertorch` names.
"""

from __future__ import annotations

import functools
import warnings

import _harness
import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from bilevel import Problem, linear, lower, solvers
from bilevel.hypergradients import Implicit, value_and_hypergradient

INNER, CG, OUTER = 20, 20, 25


class Bench:
    """One problem: losses in JAX and torch, data, start, step sizes."""


def ridge():
    rng = np.random.default_rng(0)
    n, d = 400, 100
    w = rng.normal(size=d)
    make = lambda: (lambda a: (a.astype(np.float32), (a @ w + rng.normal(size=n)).astype(np.float32)))(
        rng.normal(size=(n, d)) / np.sqrt(d)
    )
    b = Bench()
    b.name, b.train, b.val = "ridge", make(), make()
    b.lower = lambda x, y, batch: 0.5 * jnp.mean((batch[0] @ y - batch[1]) ** 2) + 0.5 * jnp.sum(jnp.exp(x) * y**2) / d
    b.upper = lambda x, y, batch: 0.5 * jnp.mean((batch[0] @ y - batch[1]) ** 2)
    b.x0, b.y0, b.lr, b.outer = np.full(d, -1.0, np.float32), np.zeros(d, np.float32), 20.0, 1.0

    def exact(x):
        a, t = (v.astype(np.float64) for v in b.train)
        v, s = (u.astype(np.float64) for u in b.val)
        h = a.T @ a / n + np.diag(np.exp(x.astype(np.float64))) / d
        y = np.linalg.solve(h, a.T @ t / n)
        return -np.exp(x.astype(np.float64)) / d * y * np.linalg.solve(h, v.T @ (v @ y - s) / n)

    b.exact = exact
    return b


def cleaning():
    rng = np.random.default_rng(0)
    n, d, c = 1000, 784, 10
    centres = rng.normal(size=(c, d)) / 8

    def make():
        labels = rng.integers(0, c, n)
        return (centres[labels] + rng.normal(size=(n, d)) / 8).astype(np.float32), labels.astype(np.int32)

    b = Bench()
    b.name, b.train, b.val = "cleaning", make(), make()
    b.train[1][: n // 2] = (b.train[1][: n // 2] + rng.integers(1, c, n // 2)) % c
    nll = lambda y, batch: -jnp.take_along_axis(jax.nn.log_softmax(batch[0] @ y), batch[1][:, None], 1)[:, 0]
    b.lower = lambda x, y, batch: jnp.mean(jax.nn.sigmoid(x) * nll(y, batch)) + 0.025 * jnp.sum(y**2)
    b.upper = lambda x, y, batch: jnp.mean(nll(y, batch))
    b.x0, b.y0, b.lr, b.outer = np.zeros(n, np.float32), np.zeros((d, c), np.float32), 0.5, 100.0
    b.exact = None
    return b


# JAX methods: each returns a jitted function (x, y, train, val) -> (x, y, hypergradient of the last step) over OUTER
# steps.


def scan_outer(b, one_step):
    @jax.jit
    def loop(x, y, train, val):
        def body(carry, _):
            x, y = carry
            y, g = one_step(x, y, train, val)
            return (x - b.outer * g, y), g

        (x, y), g = jax.lax.scan(body, (x, y), None, length=OUTER)
        return x, y, g[-1]

    return loop


def by_hand(b):
    def step(x, y, train, val):
        f = lambda x, y: b.lower(x, y, train)
        y = jax.lax.fori_loop(0, INNER, lambda _, y: y - b.lr * jax.grad(f, 1)(x, y), y)
        fx, fy = jax.grad(b.upper, (0, 1))(x, y, val)
        _, products = jax.linearize(lambda y: jax.grad(f, (0, 1))(x, y), y)

        def cg(_, carry):
            v, r, p, rr = carry
            q = products(p)[1]
            a = rr / jnp.vdot(p, q)
            v, r = v + a * p, r - a * q
            new = jnp.vdot(r, r)
            return v, r, r + new / rr * p, new

        v = jax.lax.fori_loop(0, CG, cg, (jnp.zeros_like(fy), fy, fy, jnp.vdot(fy, fy)))[0]
        return y, fx - products(v)[0]

    return scan_outer(b, step)


def ours(b):
    solver = solvers.HypergradientDescent(
        Implicit(linear.CG(tol=None, max_steps=CG, warm_start=False)), lower.GradientDescent(b.lr, INNER), b.outer
    )

    @jax.jit
    def loop(x, y, train, val):
        problem = Problem(upper=b.upper, lower=b.lower, upper_data=val, lower_data=train)
        state, _ = bilevel.run(problem, solver, x, y, OUTER)
        return state.x, state.y, jnp.zeros_like(x)

    return loop


def with_jaxopt(b, default=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jaxopt
    solve = None if default else functools.partial(jaxopt.linear_solve.solve_cg, maxiter=CG, tol=0.0)

    def step(x, y, train, val):
        inner = jaxopt.GradientDescent(
            lambda y, x: b.lower(x, y, train),
            stepsize=b.lr,
            maxiter=INNER,
            tol=0.0,
            acceleration=False,
            implicit_diff_solve=solve,
        )

        def objective(x):
            found = inner.run(y, x).params
            return b.upper(x, found, val), found

        g, y = jax.grad(objective, has_aux=True)(x)
        return y, g

    return scan_outer(b, step)


def with_optimistix(b):
    import lineax as lx
    import optimistix as optx

    class Fixed(optx.GradientDescent):
        def terminate(self, fn, y, args, options, state, tags):
            return jnp.asarray(False), optx.RESULTS.successful

    class Truncated(lx.CG):
        """lineax raises at its step limit, and a truncated solve is what is asked for."""

        def compute(self, state, vector, options):
            solution, _, stats = super().compute(state, vector, options)
            return solution, lx.RESULTS.successful, stats

    linear_solver = Truncated(rtol=1e-30, atol=1e-30, max_steps=CG)

    def step(x, y, train, val):
        def objective(x):
            found = optx.minimise(
                lambda y, x: b.lower(x, y, train), Fixed(b.lr, 0.0, 0.0), y, x, max_steps=INNER, throw=False,
                adjoint=optx.ImplicitAdjoint(linear_solver), tags=frozenset({lx.positive_semidefinite_tag}),
            ).value  # fmt: skip
            return b.upper(x, found, val), found

        g, y = jax.grad(objective, has_aux=True)(x)
        return y, g

    return scan_outer(b, step)


# PyTorch methods: each returns a function () -> (x, y, last hypergradient) that runs OUTER steps.


def torch_losses(b):
    import torch

    train, val = (tuple(torch.tensor(v) for v in part) for part in (b.train, b.val))
    if b.name == "ridge":
        d = len(b.x0)
        f = lambda x, y: 0.5 * ((train[0] @ y - train[1]) ** 2).mean() + 0.5 * (x.exp() * y**2).sum() / d
        g = lambda x, y: 0.5 * ((val[0] @ y - val[1]) ** 2).mean()
    else:
        nll = lambda y, part: torch.nn.functional.cross_entropy(part[0] @ y, part[1].long(), reduction="none")
        f = lambda x, y: (x.sigmoid() * nll(y, train)).mean() + 0.025 * (y**2).sum()
        g = lambda x, y: nll(y, val).mean()
    return f, g


def torch_loop(b, one_step):
    import torch

    def run():
        x, y = torch.tensor(b.x0, requires_grad=True), torch.tensor(b.y0, requires_grad=True)
        for _ in range(OUTER):
            y, g = one_step(x, y)
            x = (x - b.outer * g).detach().requires_grad_()
        return x.detach().numpy(), y.detach().numpy(), g.numpy()

    return run


def torch_by_hand(b):
    import torch

    f, upper = torch_losses(b)

    def step(x, y):
        for _ in range(INNER):
            y = (y - b.lr * torch.autograd.grad(f(x.detach(), y), y)[0]).detach().requires_grad_()
        fx, fy = torch.autograd.grad(upper(x, y), (x, y), allow_unused=True)
        gy = torch.autograd.grad(f(x, y), y, create_graph=True)[0]
        v, r, p, rr = torch.zeros_like(fy), fy, fy, (fy * fy).sum()
        for _ in range(CG):
            q = torch.autograd.grad(gy, y, p, retain_graph=True)[0]
            a = rr / (p * q).sum()
            v, r = v + a * p, r - a * q
            new = (r * r).sum()
            p, rr = r + new / rr * p, new
        cross = torch.autograd.grad(gy, x, v)[0]
        return y, (0 if fx is None else fx) - cross

    return torch_loop(b, step)


def with_torchopt(b):
    import torch
    import torchopt

    f, upper = torch_losses(b)
    # TorchOpt's own CG; `ridge` and `rtol` off so that it takes CG steps as the others do.
    solve = torchopt.linear_solve.solve_cg(maxiter=CG, rtol=0.0, atol=0.0)

    def stationarity(y, x):
        return torch.func.grad(lambda y: f(x, y))(y)

    @torchopt.diff.implicit.custom_root(stationarity, argnums=1, solve=solve)
    def inner(y, x):
        y = y.detach().requires_grad_()
        for _ in range(INNER):
            with torch.enable_grad():
                y = (y - b.lr * torch.autograd.grad(f(x.detach(), y), y)[0]).detach().requires_grad_()
        return y

    def step(x, y):
        found = inner(y.detach(), x)
        g = torch.autograd.grad(upper(x, found), x)[0]
        return found.detach().requires_grad_(), g

    return torch_loop(b, step)


def with_higher(b):
    import higher
    import torch

    f, upper = torch_losses(b)

    class Model(torch.nn.Module):
        def __init__(self, y):
            super().__init__()
            self.y = torch.nn.Parameter(y.detach().clone())

    def step(x, y):
        """Unrolled through the INNER steps: another hypergradient (higher has no implicit one)."""
        model = Model(y)
        with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=b.lr)) as (net, opt):
            for _ in range(INNER):
                opt.step(f(x, net.y))
            g = torch.autograd.grad(upper(x, net.y), x)[0]
            return net.y.detach().requires_grad_(), g

    return torch_loop(b, step)


def with_hypertorch(b, path):
    import sys

    sys.path.insert(0, path)
    import torch
    from hypergrad import CG as hypertorch_cg

    f, upper = torch_losses(b)

    def descent(params, hparams):
        """One gradient step, as the fixed-point map that hypertorch differentiates."""
        (y,), (x,) = params, hparams
        return [y - b.lr * torch.autograd.grad(f(x, y), y, create_graph=True)[0]]

    def step(x, y):
        for _ in range(INNER):
            y = (y - b.lr * torch.autograd.grad(f(x.detach(), y), y)[0]).detach().requires_grad_()
        (g,) = hypertorch_cg([y], [x], CG, descent, lambda p, h: upper(h[0], p[0]), tol=0.0, set_grad=False)
        return y, g.detach()

    return torch_loop(b, step)


def hypergradient_error(b, x, y):
    """Ours at (x, y) with the benchmark's lower and linear steps, against the closed form."""
    problem = Problem(upper=b.upper, lower=b.lower, upper_data=b.val, lower_data=b.train)
    estimate = value_and_hypergradient(
        problem, Implicit(linear.CG(tol=None, max_steps=CG)), lower.GradientDescent(b.lr, INNER)
    )(x, y)
    return _harness.difference(estimate.gradient, b.exact(np.asarray(x)))


def bench(b, rounds, hypertorch):
    sizes = f"{b.x0.size} upper and {b.y0.size} lower variables"
    print(f"\n{b.name}: {sizes}, {INNER} gradient steps and {CG} CG steps, {OUTER} outer steps a run")
    args = tuple(jax.tree.map(jnp.asarray, v) for v in (b.x0, b.y0, b.train, b.val))
    makers = {
        "bilevel": ours,
        "JAX by hand": by_hand,
        "jaxopt (solve_cg)": with_jaxopt,
        "jaxopt (default)": functools.partial(with_jaxopt, default=True),
        "optimistix": with_optimistix,
    }
    torch_makers = {"torch by hand": torch_by_hand, "TorchOpt": with_torchopt, "higher (unrolled)": with_higher}
    if hypertorch:
        torch_makers["hypertorch"] = functools.partial(with_hypertorch, path=hypertorch)
    runs, compile_seconds, results = {}, {}, {}
    for name, maker in {**makers, **torch_makers}.items():
        try:
            if name in makers:
                compiled, spent = _harness.compiled(maker(b), *args)
                compile_seconds[name] = spent.median()
                runs[name] = functools.partial(compiled, *args)
            else:
                runs[name] = maker(b)
            results[name] = runs[name]()
        except Exception as error:
            print(f"  {name}: not timed ({type(error).__name__}: {str(error).splitlines()[0][:90]})")
            runs.pop(name, None)
    reference = results["JAX by hand"]
    for name, (x, y, g) in results.items():
        note = "" if np.isfinite(np.asarray(x)).all() else "  NOT FINITE"
        error = ""
        if b.exact and np.any(np.asarray(g)):
            off = _harness.difference(g, b.exact(x_before(b, x, g)))
            error = f", last hypergradient against the closed form {off:.1e}"
        dx, dy = (_harness.difference(u, v) for u, v in zip((x, y), reference, strict=False))
        print(f"  {name:<20} x differs from the hand-written loop's by {dx:.1e}, y by {dy:.1e}{error}{note}")
    times = _harness.interleaved(runs, rounds, warm=0)
    rows = [("", "CPU ms / outer step", "bilevel / it: median (min, max)", "compile CPU s")]
    for name, spent in times.items():
        compiled = f"{compile_seconds[name]:.2f}" if name in compile_seconds else ""
        each = f"{spent.median(unit=1e3) / OUTER:.3f}"
        rows.append((f"  {name}", each, _harness.ratio(times["bilevel"], spent), compiled))
    _harness.table(*rows)


def x_before(b, x, g):
    return np.asarray(x) + b.outer * np.asarray(g)


def main():
    parser = _harness.arguments(__doc__, rounds=7)
    parser.add_argument("--only", choices=("ridge", "cleaning"), default=None)
    parser.add_argument("--hypertorch", default=None, help="a checkout of hypertorch, which no registry has")
    args = _harness.start(parser, "jaxopt", "optimistix", "torch", "torchopt", "higher", only="ridge")
    for make in (ridge, cleaning):
        if args.only in (None, make.__name__):
            bench(make(), args.rounds, args.hypertorch)


if __name__ == "__main__":
    main()
