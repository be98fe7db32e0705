"""Runs that are watched: early stopping, roll-back with a stronger regularisation, the best of several strengths."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel import Event, History, Problem, Result, curvature, data, runs, solve, solvers
from bilevel.checkpoint import CheckpointError
from bilevel.data import as_step_key
from bilevel.lower import MomentumSGD
from bilevel.runs import EarlyStopping
from bilevel.solvers.darts import DARTS

# Dominant eigenvalues of the authors' search logs, recomputed from the Hessians in experiments/search_logs of the
# repository automl/RobustDARTS (one after epochs 0, 2, ..., 48, 49 of 50; space/data, drop-path, weight decay), to four
# digits, with the (epoch gone back to, epoch of the decision) of their rule.
LOGS = json.loads((Path(__file__).parent / "fixtures" / "robustdarts_eigenvalues.json").read_text())
PUBLISHED = {name: (log["decision"] and tuple(log["decision"]), log["eigenvalues"]) for name, log in LOGS.items()}
EPOCHS = [*range(0, 50, 2), 49]


@pytest.mark.parametrize("run", PUBLISHED)
def test_the_codes_rule_decides_as_published(run):
    expected, eigenvalues = PUBLISHED[run]
    rule = EarlyStopping.code()
    for decision in (rule.decide(eigenvalues, total=50), rule.decide(eigenvalues, EPOCHS, 50)):
        assert (decision and (decision.epoch, decision.decided_at)) == expected
    fed = [rule.decide(eigenvalues[:n], total=50) for n in range(27)]  # one at a time, as in a run
    if expected is None:
        assert fed == [None] * 27
    else:
        first = EPOCHS.index(expected[1]) + 1
        assert fed[:first] == [None] * first and fed[first:] == [decision] * (27 - first)
        assert EPOCHS[decision.index] == expected[0]


def test_the_rule_abstains_in_the_last_epoch():
    eigenvalues = PUBLISHED["s1/cifar10/0.0_0.0243 seed 2"][1]
    assert EarlyStopping.code().decide(eigenvalues, EPOCHS, 50) is None
    assert EarlyStopping.code().decide(eigenvalues, EPOCHS).decided_at == 49


def test_the_local_averages_are_centred_windows():
    values = np.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0])
    expected = [values[max(0, c - 2) : c + 3].mean() for c in range(5)]
    found = EarlyStopping(window=5).averages(values)
    assert np.isnan(found[:2]).all()
    np.testing.assert_allclose(found[2:], expected)
    np.testing.assert_allclose(EarlyStopping(window=4).averages(values)[1:], [2, 8 / 3, 2.25, 2.75, 4.75, 4.25])


def test_presets_differ_in_when_they_compare():
    steady = 1.06 ** np.arange(60)
    # The paper: 1.06^5 > 1/0.75, from the second full window on; the code: 1.06^4 < 1.3.
    assert EarlyStopping.paper().decide(1.05 ** np.arange(60)) is None
    decision = EarlyStopping.paper().decide(steady)
    # Window averages cut at the start grow more slowly: c = 5 is the first centre with a predecessor, c - 5 = 0.
    growth = steady[3:8].mean() / steady[:3].mean()
    if growth > 4 / 3:
        assert (decision.epoch, decision.decided_at) == (0, 7)
    assert EarlyStopping.code().decide(steady) is None
    decision = EarlyStopping.code().decide(1.08 ** np.arange(60))
    assert (decision.epoch, decision.decided_at) == (10, 22)
    np.testing.assert_allclose(decision.growth, 1.08**4)
    assert EarlyStopping.code(start=14).decide(1.08 ** np.arange(60)).epoch == 14


def test_floor_and_patience():
    rule = dict(window=1, lag=1, ratio=1.5, start=0)
    tiny = [1e-3, 2e-3, 4e-3]
    assert EarlyStopping(**rule).decide(tiny).index == 0
    assert EarlyStopping(**rule, floor=0.01).decide(tiny) is None
    spike = [1.0, 2.0, 1.0, 2.0, 4.0, 8.0]
    decision = EarlyStopping(**rule, patience=3).decide(spike)
    assert (decision.epoch, decision.decided_at) == (2, 5)
    assert EarlyStopping(**rule).decide([-1.0, -2.0, -4.0]) is None  # a fall further below zero is no growth
    assert EarlyStopping(**rule).decide([]) is None


def test_errors_of_the_rule():
    with pytest.raises(ValueError, match="ratio is new over old, above 1"):
        EarlyStopping(ratio=0.75)
    with pytest.raises(ValueError, match="positive number of evaluations"):
        EarlyStopping(window=0)
    with pytest.raises(ValueError, match="3 eigenvalues and 2 epochs"):
        EarlyStopping().decide([1, 2, 3], [0, 1])
    with pytest.raises(ValueError, match="a list of numbers"):
        EarlyStopping().decide(np.ones((2, 2)))


# ---------------------------------------------------------------- inside solve


def lower(x, y, batch):
    return 0.5 * jnp.sum((y - 3.0) ** 2) + 0.0 * jnp.sum(x) + 0.1 * y * jnp.mean(batch)


def upper(x, y):
    return 0.5 * (1 + y**6 / 8) * jnp.sum((x - 1) ** 2)  # the Hessian in x is 1 + y^6 / 8 times the identity


PROBLEM = Problem(upper, lower, lower_data=data.Minibatches(np.random.default_rng(0).normal(size=16), 2))
EIGENVALUE = curvature.dominant_eigenvalue(upper)
X, Y = jnp.zeros(2), jnp.asarray(1.0)
RULE = EarlyStopping(window=3, lag=2, ratio=1.2, start=4)


ADAM = optax.adam(0.1)  # one rule for all, and so one compiled program


def darts(weight_decay, learning_rate=0.01):
    return DARTS(1, MomentumSGD(learning_rate, momentum=0.5, weight_decay=weight_decay), ADAM)


def test_monitor_stops_a_run_and_has_its_stop_point():
    monitor = runs.Monitor(RULE, steps_per_epoch=2)
    seen = {}
    solution = solve(
        PROBLEM,
        X,
        Y,
        darts(0.0),
        steps=60,
        metrics={"eigenvalue": EIGENVALUE},
        metrics_every=2,
        callback=lambda event: seen.update({event.step: event.state}) or monitor(event),
    )
    assert solution.result is Result.STOPPED and solution.steps == 2 * monitor.decision.decided_at < 60
    assert monitor.decision == RULE.decide(solution.history["eigenvalue"])  # an evaluation per epoch
    stopped = monitor.stopped
    assert (stopped.step, stopped.epoch) == (8, 4) and monitor.decision.epoch == 4
    for found, expected in zip(jax.tree.leaves(stopped.state), jax.tree.leaves(seen[8]), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(stopped.x, seen[8].x)
    unwatched = runs.Monitor(RULE)
    with pytest.raises(ValueError, match="looks at the metric 'eigenvalue'"):
        solve(PROBLEM, X, Y, darts(0.0), steps=2, callback=unwatched)
    assert unwatched.stopped is None


def test_monitor_without_its_snapshots_says_so():
    monitor = runs.Monitor(dataclasses.replace(RULE, start=0), steps_per_epoch=2)
    eigenvalues = {"eigenvalue": 1.5 ** np.arange(6)}
    history = History(eigenvalues, {"eigenvalue": 2 * np.arange(6)})
    assert monitor(Event(10, X, Y, None, history))  # the first that this process sees, as after an interruption
    assert monitor.decision.epoch == 0
    with pytest.raises(ValueError, match="goes back to step 0, which this process has not seen"):
        monitor.stopped  # noqa: B018


def test_adaptive_rolls_back_to_exactly_the_saved_state(tmp_path, x64):
    states = []

    def watch(event):
        states.append((event.step, event.state))

    call = dict(
        eigenvalue=EIGENVALUE, largest=2.0, steps=30, every=2, rule=RULE, steps_per_epoch=2, callback=watch, key=3
    )
    x, y = np.zeros(2), np.asarray(1.0)
    found = runs.adaptive(PROBLEM, x, y, darts, 0.03, checkpoint=tmp_path, **call)
    assert found.strengths == (0.03, 0.3, 2.0)  # times ten, capped
    assert found.solution.steps == 30 and found.solution.result is Result.COMPLETED
    np.testing.assert_array_equal(found.solution.history.steps["eigenvalue"], np.arange(0, 31, 2))
    np.testing.assert_array_equal(found.solution.history.steps["upper_loss"], np.arange(30))

    # Where a run begins the callback's step falls back: before it is the run that was left.
    cuts = [i for i in range(1, len(states)) if states[i][0] <= states[i - 1][0]]
    assert len(cuts) == 2
    parts = [dict(part) for part in (states[: cuts[0]], states[cuts[0] : cuts[1]], states[cuts[1] :])]
    step_once = jax.jit(lambda solver, state, key: solver.step(PROBLEM, state, key)[0])
    path = {}
    for number, (visited, strength) in enumerate(zip(parts, found.strengths, strict=True)):
        if number:
            back, decision = found.rolled_back_to[number - 1], found.decisions[number - 1]
            assert back == 2 * decision.epoch and max(parts[number - 1]) == 2 * decision.decided_at
            path = {step: state for step, state in path.items() if step <= back}
            state = path[back]
            for k in (back, back + 1):
                state = step_once(darts(strength), state, as_step_key(3, k))
            for ours, theirs in zip(jax.tree.leaves(visited[back + 2]), jax.tree.leaves(state), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-13)
        path |= visited
    for step, state in path.items():
        recorded = found.solution.history["eigenvalue"][step // 2]
        np.testing.assert_allclose(recorded, 1 + state.y**6 / 8, rtol=1e-12)
    assert "back to step" in repr(found)

    # The directory knows the run: called again, nothing is left to do, and the answer is the same.
    again = runs.adaptive(PROBLEM, x, y, darts, 0.03, checkpoint=tmp_path, **call)
    assert (again.strengths, again.rolled_back_to) == (found.strengths, found.rolled_back_to)
    np.testing.assert_array_equal(again.y, found.y)
    with pytest.raises(CheckpointError, match="another run"):
        runs.adaptive(PROBLEM, x, y, darts, 0.05, checkpoint=tmp_path, **call)


@pytest.mark.slow
def test_adaptive_goes_back_beyond_an_earlier_roll_back():
    # A strength that makes the eigenvalue grow faster: the second decision names an evaluation of the first run.
    found = runs.adaptive(
        PROBLEM,
        X,
        Y,
        lambda rate: darts(3e-4, rate),
        0.006,
        eigenvalue=EIGENVALUE,
        largest=0.054,
        factor=3.0,
        steps=30,
        every=2,
        rule=dataclasses.replace(RULE, ratio=1.15, start=1),
        steps_per_epoch=2,
    )
    assert found.rolled_back_to[0] > found.rolled_back_to[1] > 0
    np.testing.assert_array_equal(found.solution.history.steps["eigenvalue"], np.arange(0, 31, 2))
    y, back = found.solution.history["eigenvalue"], found.rolled_back_to[1] // 2
    rates = np.diff(((y - 1) * 8) ** (1 / 6))  # of y itself: the rate of the path is the first one's up to there
    assert rates[back] > 4 * rates[back - 1]


def test_adaptive_without_growth_and_its_errors():
    call = dict(eigenvalue=EIGENVALUE, largest=20.0, steps=20, every=2, rule=RULE)
    calm = runs.adaptive(PROBLEM, X, Y, darts, 2.0, **call)
    assert calm.strengths == (2.0,) and calm.decisions == () and calm.solution.steps == 20
    with pytest.raises(TypeError, match="a function strength -> solver"):
        runs.adaptive(PROBLEM, X, Y, darts(0.1), 0.1, **call)
    with pytest.raises(ValueError, match="0 < strength <= largest"):
        runs.adaptive(PROBLEM, X, Y, darts, 30.0, **call)
    with pytest.raises(ValueError, match="a factor above 1"):
        runs.adaptive(PROBLEM, X, Y, darts, 0.1, factor=1.0, **call)
    with pytest.raises(TypeError, match="sets solve's metrics_every itself"):
        runs.adaptive(PROBLEM, X, Y, darts, 0.1, metrics_every=3, **call)


def test_keep_best_is_by_the_users_score():
    tried = []

    def run(strength):
        tried.append(strength)
        return solve(PROBLEM, X, Y, darts(strength), steps=20)

    best = runs.keep_best(run, (0.0, 1.0, 5.0), lambda x, y: abs(y - 1.0))
    scores = [abs(float(s.y) - 1.0) for s in best.solutions]
    assert tried == [0.0, 1.0, 5.0] and best.scores == tuple(scores)
    assert best.strength == (0.0, 1.0, 5.0)[int(np.argmin(scores))] and best.score == min(scores)
    np.testing.assert_array_equal(best.y, best.solution.y)
    # NaN is the worst.
    assert runs.keep_best(run, (0.0, 1.0), lambda x, y: np.nan if y > best.solutions[1].y else 1.0).strength == 1.0
    with pytest.raises(ValueError, match="at least one strength"):
        runs.keep_best(run, (), lambda x, y: 0.0)
    with pytest.raises(ValueError, match="none of the 1 strengths"):
        runs.keep_best(run, (0.0,), lambda x, y: np.nan)


def test_the_rule_abstains_at_the_last_evaluation_whatever_the_quotient_rounds_to():
    """10 / 3 is not (10 / 3 + 1) - 1 in floating point."""
    rule = EarlyStopping(window=1, lag=1, ratio=1.5)
    for steps, each in ((10, 3), (12, 7), (18, 11)):
        assert not steps / each >= (steps / each + 1) - 1
        epochs = np.array([0, steps - 2, steps]) / each
        assert rule.decide([1.0, 1.0, 5.0], epochs, total=steps / each + 1) is None
        assert rule.decide([1.0, 5.0, 5.0], epochs, total=steps / each + 1) is not None


def test_an_eigenvalue_that_did_not_come_out_hides_no_growth():
    rule = EarlyStopping(window=3, lag=2)
    assert rule.decide([1, 1, 1, np.nan, 1, 3, 9, 27]) is not None
    assert rule.decide([np.nan] * 30) is None
    with pytest.raises(ValueError, match="both are numbers"):
        EarlyStopping(floor=np.nan)


@pytest.mark.parametrize("given", [dict(every=0), dict(steps_per_epoch=0), dict(steps=0)])
def test_adaptive_counts_from_one(given):
    options = dict(largest=1.0, eigenvalue=lambda x, y: 1.0, steps=5, every=1) | given
    with pytest.raises(ValueError, match=f"adaptive\\({next(iter(given))}="):
        runs.adaptive(None, jnp.ones(1), jnp.ones(1), lambda wd: solvers.SOBA(0.1, 0.1), 0.1, **options)
