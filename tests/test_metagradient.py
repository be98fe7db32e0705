"""The derivative of a whole training on the host: that of `Unrolled`, also after a kill, on a full disk, and torn."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel import Problem, ProblemError, data, lower, runs
from bilevel._recompute import even
from bilevel.checkpoint import CheckpointError, Checkpoints
from bilevel.hypergradients import Unrolled, value_and_hypergradient

RNG = np.random.default_rng(0)
ROWS = (RNG.normal(size=(24, 3)).astype(np.float32), RNG.normal(size=24).astype(np.float32), np.arange(24))
X, Y = {"w": jnp.zeros(24), "start": jnp.asarray(0.5)}, {"a": jnp.ones(3), "b": jnp.asarray(0.5)}


def error(y, batch):
    return jnp.tanh(batch[0] @ y["a"]) * y["b"] - batch[1]


PROBLEM = Problem(
    lambda x, y, batch: jnp.mean(error(y, batch) ** 2) + x["start"] ** 2,
    lambda x, y, batch: jnp.mean(jax.nn.sigmoid(x["w"])[batch[2]] * error(y, batch) ** 2),
    ROWS,
    data.Minibatches(ROWS, 5),
)
RULE = optax.adam(optax.cosine_decay_schedule(0.05, 60), eps_root=1e-8)
TRAINING = lower.GradientDescent(RULE, 60, start=lambda x, y: {"a": y["a"] * x["start"], "b": y["b"]})


def run(solver=TRAINING, x=X, segment=1, **options):
    return runs.metagradient(PROBLEM, x, Y, solver, key=jax.random.key(3), segment=segment, **options)


@functools.cache
def uninterrupted(segment):
    return run(segment=segment)


@functools.cache
def unrolled():
    return jax.jit(value_and_hypergradient(PROBLEM, Unrolled(), TRAINING))(X, Y, key=jax.random.key(3))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def same(one, other):
    """Bit for bit."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("where", ["host", "files"])
@pytest.mark.parametrize("segment", [None, 60])
def test_it_is_the_derivative_of_unrolled(tmp_path, segment, where):
    """60 steps are ten segments of 6; or one, the whole run."""
    whole = unrolled()
    found = run(segment=segment, checkpoint=tmp_path / "run" if where == "files" else None)
    assert np.abs(flat(whole.gradient)).max() > 1e-3
    np.testing.assert_allclose(flat(found.gradient), flat(whole.gradient), rtol=2e-5, atol=1e-8)
    np.testing.assert_allclose(flat(found.lower), flat(whole.lower), rtol=1e-5)
    np.testing.assert_allclose(found.value, whole.value, rtol=1e-6)
    if where == "files":
        same(run(segment=segment, checkpoint=tmp_path / "run"), found)


def test_to_the_last_digits(x64):
    wide = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
    arrays = (*wide(ROWS[:2]), ROWS[2])
    problem = dataclasses.replace(PROBLEM, upper_data=arrays, lower_data=data.Minibatches(arrays, 5))
    whole = jax.jit(value_and_hypergradient(problem, Unrolled(), TRAINING))(wide(X), wide(Y))
    found = runs.metagradient(problem, wide(X), wide(Y), TRAINING, segment=7)
    np.testing.assert_allclose(flat(found.gradient), flat(whole.gradient), rtol=1e-12, atol=1e-15)


def test_to_the_last_bit():
    """In float32, with a rest of 4: the same steps, added up in the same order."""
    found, whole = uninterrupted(8), unrolled()
    same((found.gradient, found.value, found.lower), (whole.gradient, whole.value, whole.lower))


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize("segment", [18, 290])
def test_to_the_last_bit_of_hundreds_of_steps(segment):
    """With a rest of 12; and longer than what is kept whole."""
    training = dataclasses.replace(TRAINING, steps=300)
    evaluate = value_and_hypergradient(PROBLEM, Unrolled(checkpoint="sqrt"), training)
    whole = jax.jit(evaluate)(X, Y, key=jax.random.key(3))
    found = run(training, segment=segment)
    same((found.gradient, found.value, found.lower), (whole.gradient, whole.value, whole.lower))


@pytest.mark.parametrize("when", [pytest.param("states/step_6", marks=pytest.mark.slow), "backward/step_6"])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, when):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_metagradient as t; "
    code += "t.run(segment=3, checkpoint=sys.argv[2])"
    child = subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "run")])
    until = time.monotonic() + 120
    while time.monotonic() < until and not (tmp_path / "run" / when).exists():
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    there = {part: len(list((tmp_path / "run" / part).glob("step_*"))) for part in ("states", "backward")}
    assert not (tmp_path / "run" / "backward" / "step_20").exists()  # in the middle
    assert there["backward"] == 0 if when.startswith("states") else there["states"] < 20
    same(run(segment=3, checkpoint=tmp_path / "run"), uninterrupted(3))


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("part", ["states", "backward"])
def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path, monkeypatch, part):
    save = Checkpoints._write

    def until_full(self, step, *rest):
        return full() if self.path.name == part and step == 3 else save(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_write", until_full)
        with pytest.raises(CheckpointError, match=rf"step 3 could not .*{part}.*No space left.*Make room"):
            run(segment=8, checkpoint=tmp_path)
    again = []
    monkeypatch.setattr(Checkpoints, "_write", lambda self, step, *rest: again.append(step) or save(self, step, *rest))
    same(run(segment=8, checkpoint=tmp_path), uninterrupted(8))
    assert again[0] == 3  # what had been written was gone on from


def test_a_torn_state_is_computed_again(tmp_path, monkeypatch, caplog):
    save = Checkpoints._write

    def stop(self, step, *rest):
        return full() if self.path.name == "backward" and step == 3 else save(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_write", stop)
        with pytest.raises(CheckpointError):
            run(segment=8, checkpoint=tmp_path)
    (tmp_path / "states" / "step_4" / "run.json").write_text("half")
    same(run(segment=8, checkpoint=tmp_path), uninterrupted(8))
    assert "step_4 is torn and was skipped" in caplog.text


def test_another_point_or_length_is_another_run(tmp_path):
    run(segment=8, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match=r"of another run: x0\['start'\] has changed"):
        run(segment=8, checkpoint=tmp_path, x={**X, "start": jnp.asarray(0.6)})
    with pytest.raises(CheckpointError, match="segment was 8, is now 30"):
        run(segment=30, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match=r"solver\.steps was 60, is now 40"):
        run(dataclasses.replace(TRAINING, steps=40), segment=8, checkpoint=tmp_path)


def test_what_is_no_training_is_said():
    with pytest.raises(ValueError, match=r"segment=61\): the training has 60 steps, .* give a number up to 60"):
        run(segment=61)
    with pytest.raises(ValueError, match="a segment is a positive integer"):
        run(segment=0)
    with pytest.raises(ValueError, match=r"needs a lower solver made of steps: .* not Function"):
        run(lambda level, x, y: y)
    with pytest.raises(ValueError, match="known number of steps: set the lower solver's tol=None"):
        run(lower.GradientDescent(0.1, 60, tol=1e-3))
    with pytest.raises(ProblemError, match="cannot itself stand under jit, vmap or grad"):
        jax.jit(lambda x: run(x=x).gradient)(X)
    with pytest.raises(ProblemError, match="a Stream gives each item once"):
        streamed = dataclasses.replace(PROBLEM, lower_data=data.Stream([ROWS]))
        runs.metagradient(streamed, X, Y, TRAINING)
    with pytest.raises(TypeError, match="takes a Problem first, not a function"):
        runs.metagradient(error, X, Y, TRAINING)


@pytest.mark.parametrize(("steps", "length"), [(1, 1), (2, 1), (60, 6), (1500, 30), (10_000, 100), (101, 11), (34, 6)])
def test_segments_are_as_long_as_each_other_where_a_number_near_the_root_divides_the_steps(steps, length):
    assert even(steps, steps**0.5) == length
