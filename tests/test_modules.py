"""Modules of Flax (nnx, linen) and Equinox: masks that change, statistics of the data, mistakes named."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from bilevel import Problem, data, lower, solve, solvers
from bilevel.integrations.flax import calibrated, from_linen, from_nnx
from bilevel.problem import ProblemError

X = 3 + 2 * jax.random.normal(jax.random.key(1), (60, 3))


class Net(nnx.Module):
    def __init__(self, rngs, *, rate=0.5, momentum=0.99):
        self.layer = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=momentum, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.heads = nnx.List([nnx.Linear(4, 2, rngs=rngs)])

    def __call__(self, x):
        return self.heads[0](self.drop(self.norm(self.layer(x))))


class LinenNet(linen.Module):
    momentum: float = 0.99

    @linen.compact
    def __call__(self, x, train):
        x = linen.BatchNorm(use_running_average=not train, momentum=self.momentum)(linen.Dense(4)(x))
        return linen.Dense(2)(linen.Dropout(0.5, deterministic=not train)(x))


def an_nnx(momentum=0.99):
    params, apply = from_nnx(Net(nnx.Rngs(0), momentum=momentum))
    hidden = X @ params["layer"]["kernel"] + params["layer"]["bias"]
    find = lambda state: (state["norm"]["mean"], state["norm"]["var"])
    return params, apply, apply.train(), {}, apply.eval(), {}, hidden, find


def a_linen(momentum=0.99):
    module = LinenNet(momentum)
    params, apply = from_linen(module, module.init(jax.random.key(0), X, train=False))
    find = lambda state: (
        state["batch_stats"]["BatchNorm_0"]["mean"],
        state["batch_stats"]["BatchNorm_0"]["var"],
    )
    return params, apply, apply, {"train": True}, apply, {"train": False}, X @ params["Dense_0"]["kernel"], find


def an_equinox(momentum=0.99, mode="batch"):
    eqx = pytest.importorskip("equinox")
    from bilevel.integrations.equinox import from_equinox

    class EqxNet(eqx.Module):
        layer: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        drop: eqx.nn.Dropout
        head: eqx.nn.Linear

        def __init__(self, key):
            self.layer, self.head = eqx.nn.Linear(3, 4, key=key), eqx.nn.Linear(4, 2, key=key)
            self.norm, self.drop = eqx.nn.BatchNorm(4, "batch", momentum=momentum, mode=mode), eqx.nn.Dropout(0.5)

        def __call__(self, x, state, key=None):
            x, state = self.norm(self.layer(x), state)
            return self.head(self.drop(x, key=key)), state

    params, apply = from_equinox(*eqx.nn.make_with_state(EqxNet)(jax.random.key(0)))
    hidden = X @ params["layer"]["weight"].T + params["layer"]["bias"]
    find = lambda state: tuple(apply.statistics(state)[0, name] for name in ("mean", "var"))
    return params, apply, apply.train(), {}, apply.eval(), {}, hidden, find


def an_equinox_of_means(momentum=0.99):
    return an_equinox(momentum, "ema")


EVERY = pytest.mark.parametrize("make", [an_nnx, a_linen, an_equinox, an_equinox_of_means])


@EVERY
def test_dropout_needs_a_key_and_each_key_has_a_mask_of_its_own(make):
    params, _, train, on, _, _, _, _ = make()
    with pytest.raises(ValueError, match=r"draws random numbers .*, and apply was given no key.*data\.Keyed"):
        train(params, X, **on)
    with pytest.raises(ValueError, match="given no key"):
        jax.jit(lambda p: train(p, X, **on))(params)
    first, again, other = (train(params, X, key=key, **on) for key in (0, jax.random.key(0), 1))
    np.testing.assert_array_equal(first, again)
    assert (jnp.abs(first - other).max(1) > 1e-3).mean() > 0.5
    in_jit = jax.jit(lambda p, key: train(p, X, key=key, **on))(params, data.as_step_key(0))
    np.testing.assert_allclose(in_jit, first, rtol=1e-4, atol=1e-5)


@EVERY
def test_samples_of_a_batch_have_masks_of_their_own(make):
    params, _, train, on, _, _, _, _ = make()
    same = jnp.broadcast_to(X[:1], X.shape) + jnp.where(jnp.arange(60)[:, None] < 30, 0.0, 1.0)
    out = train(params, same, key=0, **on)
    assert len({tuple(row) for row in np.asarray(out[:30]).round(4).tolist()}) > 5


@EVERY
def test_statistics_nobody_computed_are_not_read(make):
    params, _, _, _, use, off, _, _ = make()
    with pytest.raises(ValueError, match=r"running statistics .*nobody has computed them.*calibrated\("):
        use(params, X, **off)
    use.holding(use.state)(params, X, **off)  # said on purpose


@EVERY
@pytest.mark.parametrize("momentum", [0.99, 0.999, 0.5])
def test_calibrated_statistics_are_the_data_s(make, momentum):
    params, apply, _, on, _, _, hidden, find = make(momentum)
    mean, var = find(calibrated(apply, params, X, key=0, **on).state)
    np.testing.assert_allclose(mean, hidden.mean(0), rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(var, hidden.var(0), rtol=5e-5)
    # Evaluated on the same data without dropout, the network is the one in training mode without dropout.
    fixed = calibrated(apply, params, X, key=0, **on)
    if not on:
        np.testing.assert_allclose(fixed(params, X), apply.by_batch()(params, X), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [an_nnx, a_linen, an_equinox])
def test_a_momentum_of_one_takes_nothing_from_a_batch(make):
    params, apply, _, on, *_ = make(1.0)
    with pytest.raises(ValueError, match=r"stays at zero whatever the batch is: with a momentum of 1 .* below 1"):
        calibrated(apply, params, X, key=0, **on)


@EVERY
def test_chunks_pool_to_the_whole(make):
    params, apply, _, on, _, _, hidden, find = make()
    mean, var = find(calibrated(apply, params, X, chunks=7, key=0, **on).state)
    np.testing.assert_allclose(mean, hidden.mean(0), rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(var, hidden.var(0), rtol=5e-5)
    with pytest.raises(ValueError, match=r"chunks=61.*60 samples"):
        calibrated(apply, params, X, chunks=61, **on)


def test_calibrated_is_differentiated_statistics_included_or_refused(x64):
    """In float64 against central differences; nnx stops the derivative of its statistics, which would be silent."""
    params, apply, _, on, _, off, _, _ = a_linen()
    params, state, inputs = jax.tree.map(lambda a: a.astype(float), (params, apply.state, X))
    apply = apply.holding(state)

    @jax.jit
    def loss(p):
        return jnp.sum(jnp.sin(calibrated(apply, p, inputs[:40], key=0, **on)(p, inputs[40:], **off)))

    gradient = jax.jit(jax.grad(loss))(params)["Dense_0"]["kernel"]
    h = 1e-6
    step = lambda t: {**params, "Dense_0": {**params["Dense_0"], "kernel": params["Dense_0"]["kernel"].at[1, 2].add(t)}}
    np.testing.assert_allclose(gradient[1, 2], (loss(step(h)) - loss(step(-h))) / (2 * h), rtol=1e-5)

    params, apply = from_nnx(Net(nnx.Rngs(0)))
    of = lambda p, q: jnp.sum(calibrated(apply, q, X)(p, X))
    with pytest.raises(ValueError, match=r"cuts the derivative of its statistics.*apply.by_batch\(\)"):
        jax.grad(lambda p: of(p, p))(params)
    jax.jit(jax.grad(lambda p: of(p, jax.lax.stop_gradient(p))))(params)
    by_batch, by_all = jax.jit(lambda p: (apply.by_batch()(p, X), calibrated(apply, p, X)(p, X)))(params)
    np.testing.assert_allclose(by_batch, by_all, rtol=1e-3, atol=1e-4)


def test_errors_of_calibrated():
    params, apply, _, _, _, off, _, _ = a_linen()
    with pytest.raises(ValueError, match=r"left batch_stats.BatchNorm_0.mean as it was.*train=True"):
        calibrated(apply, params, X, **off)
    bare, linear = from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="no running statistics"):
        calibrated(linear, bare, X)
    with pytest.raises(TypeError, match=r"takes what module.init\(key, inputs\) returned"):
        from_linen(LinenNet(), {"kernel": 1})


def test_a_state_can_be_carried_in_a_loop_of_one_s_own():
    params, apply = from_nnx(Net(nnx.Rngs(0), momentum=0.5))
    train, state = apply.train(), apply.state
    for key in range(40):
        _, state = train.with_state(params, state, X, key=key)
    hidden = X @ params["layer"]["kernel"] + params["layer"]["bias"]
    np.testing.assert_allclose(state["norm"]["var"], hidden.var(0), rtol=1e-4)
    held = apply.eval().holding(state)
    np.testing.assert_allclose(held(params, X), calibrated(apply, params, X)(params, X), rtol=1e-2, atol=1e-3)


class Counter(nnx.Module):
    def __init__(self):
        self.scale, self.calls = nnx.Param(jnp.ones(3)), nnx.Variable(jnp.zeros(()))

    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1
        return x * self.scale[...] * self.calls[...]


def test_a_memory_is_carried_or_refused():
    params, apply = from_nnx(Counter())
    with pytest.raises(ValueError, match=r"changes calls in every call.*apply.with_state"):
        apply(params, X)
    _, state = apply.with_state(params, apply.state, X)
    out, state = apply.with_state(params, state, X)
    np.testing.assert_allclose(out, 2 * X)


def test_dropout_in_a_solve_draws_a_mask_at_every_step():
    """The lower level is a mean of masked inputs: with one mask for ever y would settle where that mask has it."""

    class Dropped(nnx.Module):
        def __init__(self, rngs):
            self.w, self.drop = nnx.Param(jnp.zeros(8)), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(x) * self.w[...]

    y0, apply = from_nnx(Dropped(nnx.Rngs(0)))
    train = apply.train()

    def lower_loss(x, y, batch):
        inputs, key = batch
        return jnp.sum((train(y, inputs, key=key).mean(0) - 1) ** 2)

    problem = Problem(lambda x, y: (x - y["w"].mean()) ** 2, lower_loss, lower_data=data.Keyed(jnp.ones((1, 8))))
    seen = []
    inner = lower.GradientDescent(0.1, steps=1)
    solver = solvers.AID(inner, 0.01)
    solve(problem, jnp.zeros(()), y0, solver, steps=12, callback=lambda e: seen.append(np.asarray(e.y["w"])),
          callback_every=1, progress=False)  # fmt: skip
    moved = np.array([a != b for a, b in zip(seen, seen[1:], strict=False)])
    assert moved.any(0).all()  # every weight is met by some mask
    assert not moved.all(0).any() or len({tuple(row) for row in moved}) > 3


@pytest.mark.parametrize("where", ["x0", "y0"])
def test_a_module_for_a_variable_is_named_with_its_cure(where):
    problem = Problem(lambda x, y: 0.0 * jnp.sum(x), lambda x, y: 0.0)
    short = where[0]
    given = {
        "from_nnx": Net(nnx.Rngs(0)),
        "from_linen": LinenNet(),
    }
    for cure, module in given.items():
        for tree in (module, {"deep": [module]}):
            start = {"x0": jnp.ones(()), "y0": jnp.ones(())} | {where: tree}
            with pytest.raises(ProblemError, match=rf"{where}.* is a module .*{cure}.*apply\({short}, "):
                solve(problem, **start)


def test_kinds_of_variables_that_no_gradient_may_move_are_named():
    problem = Problem(lambda x, y: 0.0 * jnp.sum(x), lambda x, y: 0.0)
    with pytest.raises(ProblemError, match=r"is a BatchStat, which no gradient may move.*from_nnx"):
        solve(problem, jnp.ones(()), nnx.state(nnx.BatchNorm(2, rngs=nnx.Rngs(0))))
    module = LinenNet()
    with pytest.raises(ProblemError, match=r"running statistics .*from_linen"):
        solve(problem, jnp.ones(()), module.init(jax.random.key(0), X, train=False))


def test_equinox_modules_as_variables():
    eqx = pytest.importorskip("equinox")
    squares = lambda y: sum(jnp.sum((a - 1) ** 2) for a in jax.tree.leaves(y))
    problem = Problem(lambda x, y: (x - squares(y)) ** 2, lambda x, y: squares(y))
    whole = eqx.nn.MLP(2, 1, 2, 1, key=jax.random.key(0))
    with pytest.raises(ProblemError, match=r"y0 is a module \(MLP\).*from_equinox"):
        solve(problem, jnp.ones(()), whole)
    only_arrays = eqx.nn.Linear(2, 2, key=jax.random.key(0))
    found = solve(problem, jnp.ones(()), only_arrays, steps=50, progress=False)
    assert isinstance(found.y, eqx.nn.Linear) and float(squares(found.y)) < 1e-4
