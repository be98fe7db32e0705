"""`search`: what it finds, what it survives, and that a run that was killed goes on as if it had not been."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import CheckpointError, LowerProblem, Result, lower, search
from bilevel.proposers import Grammar, GrammarProposer, ReplayProposer, assemble_terms, execute
from bilevel.proposers.trials import Trial, best_of

GRAMMAR = Grammar(("a",))
POINTS = jnp.linspace(0.5, 2.0, 30)


def residuals(y, program, shared):
    points, wanted = shared
    values = jax.vmap(lambda term: execute(term, (points,)))(program)
    return jnp.tensordot(y, values, 1) - wanted


SHARED = (POINTS, 2 * jnp.log(POINTS) - 0.5 * POINTS**2)


def problem_of(law):
    return LowerProblem(np.zeros(2), residuals=residuals, data=assemble_terms(law, ("a",), 2, 10), shared=SHARED)


def run(**options):
    parts = {"problem_of": problem_of, "proposer": GrammarProposer(GRAMMAR, terms=2)}
    return search(**{**parts, "evaluations": 192, "batch": 64, "key": 3, "progress": False, **options})


def test_the_law_is_found_with_its_coefficients():
    found = run(target=1e-8)
    assert found.best.loss < 1e-8
    assert found.result is Result.STOPPED
    assert found.best.proposal.text(found.best.y, 3) in ("-0.5*sq(a) + 2*log(a)", "2*log(a) - 0.5*sq(a)")
    front = found.front()
    assert [t.loss for t in front] == sorted((t.loss for t in front), reverse=True)
    frame = found.to_frame()
    assert len(frame) == len(found.trials)
    assert frame.loss.min() == found.best.loss


def test_a_class_with_two_methods_and_a_scalar_loss_with_bounds():
    class Powers:
        told = ()

        def ask(self, history, count, key):
            return [1.0, 2.0, "x"] if not history else []

        def tell(self, results):
            self.told = results

    def loss(y, data):
        return jnp.sum((y - data) ** 2) + 1.0

    def of(power):
        return LowerProblem(np.zeros(2), loss=loss, upper=1.5, data=np.full(2, math.sqrt(power)))

    proposer = Powers()
    found = search(of, proposer, progress=False)
    assert [t.loss for t in found.trials] == [pytest.approx(1, abs=1e-5), pytest.approx(1, abs=1e-5), math.inf]
    np.testing.assert_allclose(proposer.told[1].y, math.sqrt(2), atol=1e-3)
    assert proposer.told[2].error == "TypeError: must be real number, not str"
    assert found.reason == "The proposer has no more proposals."


def test_failures_keep_a_short_error_and_never_end_the_run():
    def of(proposal):
        if proposal == 0:
            raise OSError("/secret/path/to/file: " + "x" * 1000 + "\ntraceback")
        if proposal == 1:
            return LowerProblem(1.0, residuals=lambda y: y * jnp.nan)
        if proposal == 2:
            return LowerProblem(1.0, residuals=lambda y: y + "a")
        if proposal == 3:
            return LowerProblem(5.0, residuals=lambda y: y, upper=1.0)
        if proposal == 4:
            return 7
        return LowerProblem(1.0, residuals=lambda y: y - 3.0)

    found = search(of, ReplayProposer((0, 1, 2, 3, 4, 5)), progress=False)
    assert [t.failed for t in found.trials] == [True] * 5 + [False]
    assert found.best.number == 5
    errors = [t.error for t in found.trials]
    assert all(len(e) <= 160 for e in errors)
    assert "secret" not in errors[0]
    assert errors[1] == "the loss is not finite"
    assert errors[3].endswith("the start is not finite or outside its bounds")
    assert "a int, and not a LowerProblem" in errors[4]


def test_budgets_and_arguments():
    assert len(run(evaluations=70).trials) == 70
    assert run(seconds=1e-9).reason.startswith("The budget of 1e-09 s")
    assert "had no smaller loss" in run(patience=1, evaluations=10_000, target=None).reason
    with pytest.raises(TypeError, match="has no method tell"):
        search(problem_of, dataclasses.make_dataclass("Half", [], namespace={"ask": lambda *a: []})())
    with pytest.raises(ValueError, match=r"search\(batch=0\)"):
        run(batch=0)
    with pytest.raises(ValueError, match="one of residuals"):
        LowerProblem(1.0)


def same(a, b):
    assert [(t.number, t.round, str(t.proposal), t.loss, t.error) for t in a] == [
        (t.number, t.round, str(t.proposal), t.loss, t.error) for t in b
    ]
    for s, t in zip(a, b, strict=True):
        np.testing.assert_array_equal(s.y, t.y)


def test_a_run_that_was_stopped_resumes_exactly(tmp_path):
    whole = run()
    run(evaluations=64, checkpoint=tmp_path)
    with open(tmp_path / "trials.jsonl", "ab") as file:
        file.write(b'{"n": 64, "round": 1, "loss"')  # killed while it wrote
    same(run(checkpoint=tmp_path).trials, whole.trials)
    with pytest.raises(CheckpointError, match="belongs to another run: its key is"):
        run(checkpoint=tmp_path, key=4)
    other = GrammarProposer(GRAMMAR, terms=2, exploit=0.25)
    for match, options in (
        ("its problem_of is problem_of and this run's ", {"problem_of": lambda law: problem_of(law)}),
        ("its solver's steps is 30 and this run's 31", {"solver": lower.LevenbergMarquardt(steps=31)}),
        ("its proposer's exploit is 0.5 and this run's 0.25", {"proposer": other}),
    ):
        with pytest.raises(CheckpointError, match=match):
            run(checkpoint=tmp_path, **options)


def test_a_resumed_run_has_the_objective_that_it_had(tmp_path):
    def go(data, evaluations):
        seen = []

        def objective(proposal):
            seen.append(proposal)  # grows, and makes no other objective
            return LowerProblem(0.0, residuals=lambda y: y - data * proposal)

        proposer = ReplayProposer([1.0, 2.0, 3.0, 4.0])
        return search(objective, proposer, evaluations=evaluations, batch=2, checkpoint=tmp_path)

    go(np.arange(3.0), 2)
    assert len(go(np.arange(3.0), 4).trials) == 4
    with pytest.raises(CheckpointError, match=r"its problem_of's data is float64\[3\]"):
        go(np.ones(3), 4)
    with pytest.raises(CheckpointError, match="its proposer's answers"):
        search(lambda p: None, ReplayProposer([2.0, 1.0]), batch=2, checkpoint=tmp_path)


def test_a_proposer_of_ones_own_that_is_wrong_is_named():
    class Own:
        def __init__(self, answer):
            self.answer = answer

        def ask(self, history, count, key):
            return self.answer

        def tell(self, results):
            if isinstance(self.answer, list) and self.answer:
                self.answer[0]["a"] += 1.0  # its own, and not the trial's

    objective = lambda p: LowerProblem(0.0, residuals=lambda y: y - p["a"])
    for answer, kind in ((None, "NoneType"), ({"a": 1.0}, "dict"), ("ab", "str")):
        with pytest.raises(TypeError, match=rf"Own\.ask returned something of type {kind}; a list"):
            search(objective, Own(answer), evaluations=2)
    found = search(objective, Own([{"a": 1.0}]), evaluations=2, batch=1)
    assert [t.proposal["a"] for t in found.trials] == [1.0, 2.0]
    two = dataclasses.make_dataclass("Two", [], namespace={"ask": lambda self, history, count: [], "tell": print})
    with pytest.raises(TypeError, match=r"Two.ask is called as ask\(history, count, key\), and cannot be: too many"):
        search(objective, two())
    for answer, why in ((1.0, "of type float, and not"), ((np.ones(2), 0), r"shape \(2,\), and is no number")):
        trial = search(objective, Own([{"a": 1.0}]), evaluations=1, solver=lambda p, key, a=answer: a).trials[0]
        assert trial.failed and re.search(why, trial.error)


def test_a_run_that_was_killed_resumes_exactly(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_search as t; "
    code += "t.run(checkpoint=sys.argv[2], evaluations=100_000)"
    child = subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)])
    log, until = tmp_path / "trials.jsonl", time.monotonic() + 60
    while time.monotonic() < until and (not log.exists() or b'"end"' not in log.read_bytes()):
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    ended = log.read_bytes().count(b'"end"')
    assert ended >= 1
    count = 64 * (ended + 1)
    same(run(checkpoint=tmp_path, evaluations=count).trials, run(evaluations=count).trials)


def test_levenberg_marquardt_in_the_users_units(x64):
    x = np.linspace(0, 1, 20)
    wanted = 2e5 * np.exp(-3 * x)
    solver = lower.LevenbergMarquardt(
        transform={"a": "log", "k": "logit"}, lower={"a": 0.0, "k": 0.0}, upper={"a": jnp.inf, "k": 10.0}
    )
    fit = solver.fit(lambda y: y["a"] * jnp.exp(-y["k"] * x) - wanted, {"a": 1e4, "k": 1.0})
    np.testing.assert_allclose([fit.y["a"], fit.y["k"]], [2e5, 3.0], rtol=1e-8)
    assert fit.converged
    assert (np.diff(fit.curve) <= 0).all()


def test_levenberg_marquardt_at_a_bound_and_as_a_lower_solver(x64):
    rosenbrock = lambda y: jnp.array([10 * (y[1] - y[0] ** 2), 1 - y[0]])
    bounded = jax.jit(lambda y: lower.LevenbergMarquardt(steps=100).fit(rosenbrock, y, upper=0.5))
    fit = bounded(np.array([-1.2, 0.3]))
    np.testing.assert_allclose(fit.y, [0.5, 0.25], atol=1e-8)
    level = None  # the residuals take no batch
    solver = lower.LevenbergMarquardt(residuals=lambda x, y: y - x)
    state = jax.jit(lambda x, y: solver(level, x, solver.init(y)))(np.ones(3), np.zeros(3))
    np.testing.assert_allclose(state.y, 1.0, atol=1e-10)
    with pytest.raises(ValueError, match="outside its bounds"):
        solver.fit(rosenbrock, jnp.array([2.0, 0.0]), upper=1.0)
    with pytest.raises(ValueError, match="needs the residuals"):
        lower.LevenbergMarquardt()(level, jnp.ones(3), solver.init(jnp.zeros(3)))


def test_what_a_residual_captures_is_what_it_is_when_the_problem_is_made():
    """Arrays and settings of a module that change between two searches, or between two trials of one."""
    held = {"target": np.array([1.0, 2.0, 3.0]), "scale": 1.0}
    residuals = lambda y: held["scale"] * y - held["target"]

    def best(problem_of, **given):
        return search(problem_of, ReplayProposer((1, 2)), batch=2, **given)

    same = lambda proposal: LowerProblem(np.zeros(3), residuals=residuals)
    np.testing.assert_allclose(best(same).best.y, [1, 2, 3], atol=1e-5)
    held["target"] = np.array([10.0, 20.0, 30.0])
    np.testing.assert_allclose(best(same).best.y, [10, 20, 30], rtol=1e-5)
    held["target"][0] = 40.0  # in place
    np.testing.assert_allclose(best(same).best.y, [40, 20, 30], rtol=1e-5)

    def set_first(proposal):
        held["scale"] = float(proposal)
        return same(proposal)

    ys = [trial.y for trial in best(set_first).trials]
    np.testing.assert_allclose(ys, [[40, 20, 30], [20, 10, 15]], rtol=1e-5)


def test_proposals_that_print_alike_are_two():
    masks = [np.zeros(2000, int) for _ in range(3)]
    for i, mask in enumerate(masks):
        mask[900 + i] = 1
    close = [np.array([1.0 + 1e-12 * i]) for i in range(3)]
    for proposals in (masks, close):
        assert len({str(p) for p in proposals}) == 1
        trials = [Trial(i, 0, p, float(i), None, "", ()) for i, p in enumerate([*proposals, proposals[0]])]
        assert [trial.number for trial in best_of(trials, 9)] == [0, 1, 2]
    assert len(best_of([Trial(i, 0, object, float(i), None, "", ()) for i in range(2)], 9)) == 1  # of no checkpoint


class Restless:
    """A proposer that goes on with what it has handed out."""

    def __init__(self, start):
        self.x = start

    def ask(self, history, count, key):
        self.x += 1
        return [self.x]

    def tell(self, trials):
        self.x *= 1


@pytest.mark.parametrize("kept", ["array", "row", "tuple"])
def test_what_a_proposer_goes_on_changing_is_copied(kept):
    start = np.zeros((1, 2)) if kept == "row" else np.zeros(2)
    proposer, buffer = Restless(start), np.zeros(1)

    def ask(history, count, key):
        proposer.x += 1
        return list(proposer.x) if kept == "row" else [(proposer.x,) if kept == "tuple" else proposer.x]

    def solver(p, key):
        x = p[0] if kept == "tuple" else p
        buffer[:] = x[0]
        return float(np.sum((x - 2) ** 2)), buffer

    proposer.ask = ask
    found = search(lambda p: p, proposer, evaluations=4, batch=1, solver=solver, progress=False)
    assert [float(np.ravel(t.proposal)[0]) for t in found.trials] == [1, 2, 3, 4]
    assert [t.loss for t in found.trials] == [2, 0, 2, 8] and [float(t.y[0]) for t in found.trials] == [1, 2, 3, 4]


def test_one_buffer_for_all_problems_is_copied():
    """Integer data are not narrowed, and a view of the buffer was solved for its last contents three times."""
    buffer = np.zeros(1, np.int64)

    def problem_of(p):
        buffer[:] = p
        return LowerProblem(0.0, residuals=lambda y, data: y - data[0], data=buffer)

    found = search(problem_of, ReplayProposer((1, 2, 3)), evaluations=3, progress=False)
    np.testing.assert_allclose([t.y for t in found.trials], [1, 2, 3], atol=1e-5)


def test_the_solvers_own_bounds_count_where_a_problem_has_none():
    problems = {
        "residuals": LowerProblem(1.0, residuals=lambda y: y + 2.0),
        "loss": LowerProblem(1.0, loss=lambda y: (y + 2.0) ** 2),
        "own": LowerProblem(1.0, residuals=lambda y: y + 2.0, lower=-1.0),
    }
    at = lambda solver, names=tuple(problems): search(
        problems.__getitem__, ReplayProposer(names), evaluations=3, solver=solver, progress=False
    ).trials  # fmt: skip
    np.testing.assert_allclose([t.y for t in at(lower.LevenbergMarquardt(lower=0.0))], [0, 0, -1], atol=1e-4)
    (refused,) = at(lower.LevenbergMarquardt(transform="log"), ("loss",))
    assert "with a transform is for residuals, and this problem has a loss" in refused.error


def test_what_is_proposed_and_what_is_solved_by_are_drawn_apart():
    asked, solved = [], []

    class Drawing:
        def ask(self, history, count, key):
            asked.extend(float(jax.random.normal(jax.random.fold_in(key, i))) for i in range(count))
            return asked[-count:]

        def tell(self, trials):
            pass

    def solver(p, key):
        solved.append(float(jax.random.normal(key)))
        return p**2, None

    found = search(
        lambda p: p, Drawing(), evaluations=6, batch=2, solver=solver, final_problem_of=lambda p: p, finalists=3,
        progress=False,
    )  # fmt: skip
    assert len({*asked, *solved}) == 6 + 6 + 3
    assert {t.number for t in found.finalists} <= set(range(6))
    for t in found.finalists:
        assert found.trials[t.number].proposal == t.proposal and found.trials[t.number].round == t.round


@pytest.mark.parametrize("options", [dict(patience=0), dict(target=math.nan), dict(seconds=math.nan)])
def test_budgets_are_numbers(options):
    with pytest.raises((TypeError, ValueError), match=r"search\((patience|target|seconds)="):
        search(lambda p: p, ReplayProposer((1.0,)), evaluations=1, solver=lambda p, key: (p, None), **options)
    ran = search(lambda p: p, ReplayProposer((1.0,)), evaluations=np.int64(1), solver=lambda p, key: (p, None))
    assert len(ran.trials) == 1
