"""What stands in nobody's way: going on, keeping the best, storing, names."""

from __future__ import annotations

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel import Problem, ProblemError, Solution, data, hypergradients, lower, prox, solve, solvers

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4)).astype(np.float32)
T = (X @ np.arange(4) + RNG.normal(size=60)).astype(np.float32)


def upper(x, y, batch):
    features, targets = batch
    return jnp.mean((features @ y - targets) ** 2)


def below(x, y, batch):
    return upper(x, y, batch) + jnp.exp(x) * jnp.sum(y**2)


def error(x, y):
    return upper(x, y, (X, T))


def accuracy(x, y):
    return jnp.mean(jnp.abs(X @ y - T) < 1)


PROBLEM = Problem(upper, below, data.Minibatches((X[30:], T[30:]), 10), data.Minibatches((X[:30], T[:30]), 10))
SOLVER = solvers.AID(lower.GradientDescent(0.05, 3), optax.adam(0.05))
START = jnp.array(0.0), jnp.zeros(4)
METRICS = {"error": error, "accuracy": accuracy}


@pytest.fixture(scope="module")
def whole():
    return solve(PROBLEM, *START, SOLVER, steps=60, metrics=METRICS, metrics_every=5, keep_best="accuracy")


def test_two_runs_are_one_and_the_best_of_both_is_kept(whole):
    options = dict(metrics=METRICS, metrics_every=5, keep_best="accuracy")
    half = solve(PROBLEM, *START, SOLVER, steps=30, **options)
    rest = solve(PROBLEM, steps=60, state=half, **options)
    np.testing.assert_array_equal(rest.y, whole.y)
    np.testing.assert_array_equal(rest.history["upper_loss"], whole.history["upper_loss"])
    assert (rest.best.step, rest.best.value) == (whole.best.step, whole.best.value)
    assert len(half.history["upper_loss"]) == 30  # its own history is left alone


def test_a_state_is_gone_on_from_and_a_foreign_one_refused(whole):
    more = solve(PROBLEM, solver=SOLVER, steps=1, key=1, state=whole.state)
    by_hand = jax.jit(SOLVER.step)(PROBLEM, whole.state, data.as_step_key(1))[0]
    np.testing.assert_allclose(more.y, by_hand.y, rtol=1e-5)
    for options, text in [
        (dict(solver=solvers.SOBA(), state=whole.state), r"NestedState that does not fit SOBA .*state\.v is absent"),
        (dict(state=whole.state), "needs the solver that the state belongs to"),
        (dict(state=whole, steps=50), "already at step 60"),
        (dict(state=3.0, solver=SOLVER), "takes a Solution or its state, not a float"),
        (dict(solver=SOLVER), r"needs a start: solve\(problem, x0, y0\)"),
    ]:
        with pytest.raises((ProblemError, TypeError, ValueError), match=text):
            solve(PROBLEM, **options)


def test_the_best_is_where_the_metric_says(whole):
    at = int(np.argmax(whole.history["accuracy"]))
    assert whole.best.value == whole.history["accuracy"].max()
    assert whole.best.step == whole.history.steps["accuracy"][at]
    assert float(accuracy(whole.best.x, whole.best.y)) == pytest.approx(whole.best.value)
    assert f"Best: accuracy = {whole.best.value:.6g} at step {whole.best.step}" in repr(whole)


@pytest.mark.parametrize("way", [min, "min"])
def test_patience_counts_evaluations_without_a_better_one(way):
    options = dict(metrics={"e": error}, metrics_every=2, keep_best=("e", way), patience=3)
    solution = solve(PROBLEM, *START, SOLVER, steps=500, **options)
    values = solution.history["e"]
    assert solution.result.name == "STOPPED" and "was not better than" in solution.reason
    assert len(values) - 1 - int(np.argmin(values)) == 3
    running = np.minimum.accumulate(values)
    waits = [i - int(np.argmin(values[: i + 1])) for i in range(len(values) - 1)]
    assert max(waits) < 3 and solution.best.value == running[-1]


def test_the_best_survives_a_checkpoint(tmp_path, whole):
    options = dict(metrics=METRICS, metrics_every=5, keep_best="accuracy", checkpoint=tmp_path)
    solve(PROBLEM, *START, SOLVER, steps=30, **options)
    rest = solve(PROBLEM, *START, SOLVER, steps=60, **options)
    assert (rest.best.step, rest.best.value) == (whole.best.step, whole.best.value)
    np.testing.assert_array_equal(rest.best.y, whole.best.y)


def test_another_best_is_looked_for_from_where_a_checkpoint_stands(tmp_path, whole):
    """What it is the best by, and whether one is looked for at all, may change on resume."""
    options = dict(metrics=METRICS, metrics_every=5, checkpoint=tmp_path)
    solve(PROBLEM, *START, SOLVER, steps=20, keep_best="accuracy", **options)
    other = solve(PROBLEM, *START, SOLVER, steps=40, keep_best="error", **options).best
    later = whole.history["error"][(steps := whole.history.steps["error"]) > 20][: (steps <= 40).sum() - 5]
    assert (other.metric, other.value) == ("error", later.min()) and 20 < other.step <= 40
    assert solve(PROBLEM, *START, SOLVER, steps=50, **options).best is None
    again = solve(PROBLEM, *START, SOLVER, steps=60, keep_best=("accuracy", min), **options).best
    assert again.value == whole.history["accuracy"][steps > 50].min()


@pytest.mark.parametrize("name", ["negative log likelihood", "brier score", "neg_mean_squared_error", "1 - accuracy"])
def test_a_turned_name_does_not_say_which_is_better(name):
    with pytest.raises(ValueError, match="say which is better, more of it or less"):
        solve(PROBLEM, *START, SOLVER, metrics={name: error}, keep_best=name)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(keep_best="q"), r"say which is better, more of it or less: keep_best=\('q', max\)"),
        (dict(keep_best="other"), r"name one of the metrics that are given to solve \('q'\)"),
        (dict(keep_best=("q", "up")), "the direction is min or max"),
        (dict(patience=3), "say of what, with keep_best="),
        (dict(keep_best=("q", max), patience=0), "patience"),
    ],
)
def test_what_cannot_be_kept_is_said(options, text):
    with pytest.raises(ValueError, match=text):
        solve(PROBLEM, *START, SOLVER, metrics={"q": error}, **options)


def test_a_metric_that_is_no_number_has_no_best():
    with pytest.raises(ValueError, match=r"'error'\): the metric has the shape \[4\]"):
        solve(PROBLEM, *START, SOLVER, metrics={"error": lambda x, y: y}, keep_best="error")


def test_a_start_that_is_not_a_number_is_never_the_best():
    metrics = {"loss": lambda x, y: jnp.where(jnp.sum(y) == 0, jnp.nan, jnp.sum(y))}
    solution = solve(PROBLEM, *START, SOLVER, steps=4, metrics=metrics, metrics_every=2, keep_best="loss")
    assert solution.best.step > 0 and np.isfinite(solution.best.value)


# ---------------------------------------------------------------- storing


def test_a_solution_is_saved_and_gone_on_from(tmp_path, whole):
    whole.save(tmp_path / "runs" / "one.pkl")
    found = Solution.load(tmp_path / "runs" / "one.pkl")
    assert repr(found).splitlines()[0] == repr(whole).splitlines()[0] and found.best.step == whole.best.step
    direct, stored = (solve(PROBLEM, steps=70, state=solution) for solution in (whole, found))
    np.testing.assert_array_equal(direct.y, stored.y)
    (tmp_path / "cut.pkl").write_bytes((tmp_path / "runs" / "one.pkl").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cut\.pkl' is no whole file of Solution.save"):
        Solution.load(tmp_path / "cut.pkl")


RULES = {
    "adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(0.1, 10))),
    "masked": optax.masked(optax.sgd(0.1), {"a": True}),
    "lbfgs": optax.lbfgs(),
    "multi": optax.multi_transform({"a": optax.sgd(0.1)}, {"a": "a"}),
}


@pytest.mark.parametrize("name", list(RULES))
def test_rules_are_the_same_after_a_pickle(name):
    solver = solvers.AID(upper_optimizer=RULES[name])
    found = pickle.loads(pickle.dumps(solver))
    x, g = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([0.5, -0.5])}
    extra = dict(value=jnp.array(1.0), grad=g, value_fn=lambda x: jnp.sum(x["a"] ** 2)) if name == "lbfgs" else {}
    ours, theirs = solver.upper_optimizer, found.upper_optimizer
    jax.tree.map(
        np.testing.assert_array_equal,
        *(jax.jit(lambda g, x, rule=rule: rule.update(g, rule.init(x), x, **extra))(g, x) for rule in (ours, theirs)),
    )


def test_problems_are_stored_with_data_and_operators():
    problem = Problem(upper, below, data.Minibatches((X, T), 10), (X, T), prox_lower=prox.lasso(jnp.exp))
    found = pickle.loads(pickle.dumps(problem))
    np.testing.assert_array_equal(found.prox_lower(0.0, jnp.arange(3.0), 1.0), [0, 0, 1])
    key = data.as_step_key(3)
    np.testing.assert_array_equal(found.draw_upper(key)(*START), problem.draw_upper(key)(*START))


def test_what_has_no_name_is_refused_by_the_name_of_what_holds_it():
    for value, text in [
        (
            Problem(lambda x, y: 0.0, upper),
            r"Problem\(upper=...\) cannot be pickled: it holds a lambda.*def at the top",
        ),
        (data.Sampler(lambda key, arrays: arrays), r"Sampler\(fn=...\) cannot be pickled: it holds a lambda"),
        (solvers.MAML(start=lambda x, y: x), r"GradientDescent\(start=...\) cannot be pickled: it holds a lambda"),
    ]:
        with pytest.raises(pickle.PicklingError, match=text):
            pickle.dumps(value)
        copy.deepcopy(value)  # copies need no name


# ---------------------------------------------------------------- names


def test_a_solver_is_called_as_it_was_made(whole):
    assert repr(SOLVER).startswith("AID(") and repr(whole).startswith("COMPLETED: AID ")
    assert whole.plot().get_suptitle() == "AID"
    assert repr(jax.tree.map(lambda leaf: leaf, solvers.SOBA())).startswith("SOBA(")
    assert repr(pickle.loads(pickle.dumps(solvers.DARTS()))).startswith("DARTS(")
    with pytest.raises(TypeError, match=r"^ITD\(upper_optimizer='x'\): give a step size"):
        solvers.ITD(upper_optimizer="x")
    bound = Problem(upper, below, (X, T), (X, T), constraint=lambda x, y: y)
    with pytest.raises(ProblemError, match=r"^AID cannot honour the coupled inequality"):
        solve(bound, *START, solvers.AID())


# ---------------------------------------------------------------- meta-learning


TASKS = RNG.normal(size=(6, 3))


def test_maml_of_quadratic_tasks_is_the_closed_form(x64):
    """loss_i = |y - c_i|^2 / 2, one step: y_i = (1 - a) x + a c_i; F = mean |y_i - d_i|^2 / 2, so
    dF/dx = (1 - a) mean(y_i - d_i)."""
    c, d, a = TASKS, TASKS[::-1] + 1.0, 0.3
    problem = Problem(
        lambda x, y: 0.5 * jnp.mean(jnp.sum((y - d) ** 2, axis=1)), lambda x, y: 0.5 * jnp.sum((y - c) ** 2)
    )
    x0 = jnp.arange(3.0)
    solver = solvers.MAML(lower_steps=1, lower_optimizer=a, upper_optimizer=1.0)
    solution = solve(problem, x0, jnp.zeros((6, 3)), solver, steps=1)
    y = (1 - a) * x0 + a * c
    np.testing.assert_allclose(solution.x, x0 - (1 - a) * jnp.mean(y - d, axis=0), rtol=1e-12)
    many = solve(problem, x0, jnp.zeros((6, 3)), solver, steps=200)
    np.testing.assert_allclose(many.x, (d - a * c).mean(0) / (1 - a), rtol=1e-9)


def test_anil_adapts_the_head_and_differentiates_the_body(x64):
    inputs = RNG.normal(size=(6, 5, 3))
    targets = RNG.normal(size=(6, 5))

    def losses(x, heads):
        return jax.vmap(lambda h, i, t: jnp.mean((jnp.tanh(i @ x["body"]) @ h - t) ** 2))(heads, inputs, targets)

    @jax.jit
    def meta(x):
        heads = jnp.broadcast_to(x["head"], (6, 4))
        for _ in range(3):
            heads = heads - 0.1 * jax.grad(lambda h: losses(x, h).sum())(heads)
        return losses(x, heads).mean()

    problem = Problem(lambda x, y: losses(x, y).mean(), lambda x, y: losses(x, y).sum())
    x0 = {"body": jnp.asarray(RNG.normal(size=(3, 4))), "head": jnp.asarray(RNG.normal(size=4))}
    solver = solvers.MAML(3, 0.1, 1.0, start=lambda x, y: x["head"])
    found = solve(problem, x0, jnp.zeros((6, 4)), solver, steps=1).x
    for name, leaf in x0.items():
        slope = np.zeros(leaf.shape)
        for at in np.ndindex(leaf.shape):
            move = [{**x0, name: leaf.at[at].add(s * 1e-5)} for s in (1, -1)]
            slope[at] = (meta(move[0]) - meta(move[1])) / 2e-5
        np.testing.assert_allclose(x0[name] - found[name], slope, rtol=1e-6, atol=1e-9)
    with pytest.raises(ProblemError, match=r'name it: solvers.MAML\(start=lambda x, y: x\["head"\]\)'):
        solve(problem, x0, jnp.zeros((6, 4)), solvers.MAML(), steps=1)


def test_itd_starts_where_it_is_told(x64):
    problem = Problem(lambda x, y: 0.5 * jnp.sum(y**2), lambda x, y: 0.5 * jnp.sum((y - 1) ** 2))
    solver = solvers.ITD(2, 0.5, 1.0, start=lambda x, y: 2 * x)
    x0 = jnp.array([1.0])
    found = solve(problem, x0, jnp.zeros(1), solver, steps=1).x  # y = x / 2 + 3 / 4, dy/dx = 1 / 2
    np.testing.assert_allclose(found, x0 - 0.5 * (0.5 * x0 + 0.75), rtol=1e-12)


# ---------------------------------------------------------------- a loop of one's own


def test_an_own_loop_keeps_the_optimisers_memory(x64):
    """Ten calls of one Adam step each are ten steps of one Adam; with the bare y they are ten first steps."""
    problem = Problem(lambda x, y: jnp.sum(y**2), lambda x, y: 0.5 * jnp.sum((y - x) ** 2) + jnp.sum(y**4))
    rule, x = optax.adam(0.05), jnp.array([1.0, 2.0])
    step = jax.jit(hypergradients.value_and_hypergradient(problem, lower_solver=lower.GradientDescent(rule, 1)))
    state, carry, y, moments = jnp.zeros(2), None, jnp.zeros(2), rule.init(jnp.zeros(2))

    @jax.jit
    def adam(y, moments):
        updates, moments = rule.update(jax.grad(problem.lower, argnums=1)(x, y), moments)
        return optax.apply_updates(y, updates), moments

    for _ in range(10):
        estimate = step(x, state, carry)
        state, carry = estimate.lower, estimate.carry
        y, moments = adam(y, moments)
    np.testing.assert_allclose(estimate.lower.y, y, rtol=1e-12)
    forgetful = jnp.zeros(2)
    for _ in range(10):
        forgetful = step(x, forgetful).lower.y
    assert float(jnp.abs(forgetful - y).max()) > 1e-3
    other = hypergradients.value_and_hypergradient(problem, lower_solver=lower.GradientDescent(optax.sgd(0.1), 1))
    with pytest.raises(ValueError, match=r"memory is not that of GradientDescent.*estimate.lower.y to begin"):
        other(x, estimate.lower)


def test_the_identity_leaves_y_to_the_training_script(x64):
    problem = Problem(lambda x, y: 0.5 * jnp.sum((y - 3) ** 2), lambda x, y: 0.5 * jnp.sum((y - x) ** 2))
    at = jax.jit(hypergradients.value_and_hypergradient(problem, lower_solver=lower.Identity()))
    estimate = at(jnp.array([1.0]), jnp.array([1.5]))
    np.testing.assert_array_equal(estimate.lower.y, [1.5])
    np.testing.assert_allclose(estimate.gradient, [-1.5])  # dy*/dx = 1
    unrolled = hypergradients.value_and_hypergradient(problem, hypergradients.Unrolled(), lower.Identity())
    with pytest.raises(ValueError, match=r"lower.Identity takes none.*Take an implicit estimator"):
        unrolled(jnp.array([1.0]), jnp.array([1.5]))


# ---------------------------------------------------------------- data as users have them


def test_tables_are_taken_everywhere():
    pandas = pytest.importorskip("pandas")
    table, column = pandas.DataFrame(X, columns=list("abcd")), pandas.Series(T, name="t")
    mixed = table.assign(n=pandas.array([1] * 60, dtype="Int64"))
    bare = solve(Problem(upper, below, (X, T), (X, T)), *START, SOLVER, steps=2)
    given = solve(Problem(upper, below, (table, column), (table, column)), *START, SOLVER, steps=2)
    np.testing.assert_array_equal(bare.y, given.y)
    drawn = data.Minibatches((table, column), 7).draw(data.as_step_key(0))
    assert [type(leaf) for leaf in jax.tree.leaves(drawn)] and drawn[0].shape == (7, 4)
    assert Problem(upper, below, (mixed, column), (X, T)).upper_data[0].dtype == np.float64
    named = table.assign(city="Bonn", day=pandas.Timestamp("2020-01-01"))
    with pytest.raises(ProblemError, match=r"upper_data\[0\] has columns that are no numbers: 'city', 'day'.*get_dum"):
        Problem(upper, below, (named, column), (X, T))


def test_sparse_matrices_and_iterators_are_named():
    import scipy.sparse

    sparse = scipy.sparse.csr_matrix(X)
    for given, text in [
        ((sparse, T), r"lower_data\[0\] is a sparse matrix \(csr_matrix\).*toarray"),
        (((X, T) for _ in range(3)), r"lower_data is a generator.*data\.Stream\(loader\)"),
    ]:
        with pytest.raises(ProblemError, match=text):
            Problem(upper, below, (X, T), given)


def test_tensors_and_loaders_of_torch():
    torch = pytest.importorskip("torch")
    from torch.utils.data import DataLoader, TensorDataset

    tensors = torch.tensor(X, requires_grad=True), torch.tensor(T)
    problem = Problem(upper, below, tensors, tensors)
    np.testing.assert_array_equal(problem.upper_data[0], X)
    loader = DataLoader(TensorDataset(tensors[0].detach(), tensors[1]), batch_size=20)
    with pytest.raises(ProblemError, match=r"lower_data is a DataLoader.*data\.Stream\(loader\)"):
        Problem(upper, below, (X, T), loader)
    items = [[X[i : i + 20], T[i : i + 20]] for i in (0, 20, 40)]
    theirs, ours = (
        solve(Problem(upper, below, (X, T), data.Stream(stream)), *START, solvers.SOBA(0.01, 0.01), steps=4).y
        for stream in (loader, items)
    )
    np.testing.assert_array_equal(theirs, ours)
