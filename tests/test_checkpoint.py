"""Checkpoints: what is written comes back bit for bit, after kill -9 too, and what is not ours is refused by name.

Run as a script (`python test_checkpoint.py <directory> <options in JSON>`), the file is the process that gets killed.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel import Problem, Result, checkpoint, hypergradients, solve, solvers
from bilevel.checkpoint import CheckpointError, Checkpoints, fingerprint
from bilevel.data import Clients, Minibatches, Sampler, Stream, as_step_key
from bilevel.history import History
from bilevel.linear import Identity
from bilevel.lower import GradientDescent

STEPS = 60
RNG = np.random.default_rng(0)
ROWS, TARGETS = RNG.normal(size=(24, 3)).astype(np.float32), RNG.normal(size=24).astype(np.float32)


def upper(x, y, batch):
    rows, targets = batch
    return jnp.mean((rows @ y["w"] - targets) ** 2)


def lower(x, y, batch):
    rows, targets = batch
    return jnp.mean((rows @ y["w"] - targets) ** 2) + jnp.sum(jnp.exp(x) * y["w"] ** 2)


def weight(x, y):
    return jnp.sum(y["w"] ** 2)


def the_problem(**changes):
    return Problem(
        **{
            "upper": upper,
            "lower": lower,
            "upper_data": (ROWS[:8], TARGETS[:8]),
            "lower_data": Minibatches((ROWS[8:], TARGETS[8:]), size=4),
            **changes,
        }
    )


# Adam's moments, momentum, minibatches and a warm start: all that a resumed run could lose.
THE_SOLVER = solvers.HypergradientDescent(
    hypergradients.Implicit(Identity(0.5)), GradientDescent(optax.sgd(0.05, momentum=0.9), 3), optax.adam(0.05)
)


def the_run(directory=None, problem=None, solver=THE_SOLVER, **options):
    options = {
        "steps": STEPS,
        "metrics": {"weight": weight},
        "metrics_every": 10,
        "checkpoint_every": 30,
        "key": 3,
        **options,
    }
    problem = the_problem() if problem is None else problem
    return solve(problem, jnp.zeros(3), {"w": jnp.zeros(3)}, solver, checkpoint=directory, progress=False, **options)


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_same_history(found, expected):
    assert list(found) == list(expected)
    for name in expected:
        assert_same_bits((found[name], found.steps[name]), (expected[name], expected.steps[name]))


def assert_same_run(found, expected):
    assert found.steps == expected.steps
    assert_same_bits(found.state, expected.state)
    assert_same_bits((found.x, found.y), (expected.x, expected.y))
    assert_same_history(found.history, expected.history)


@pytest.fixture(scope="module")
def uninterrupted():
    return the_run()


# ---------------------------------------------------------------- real processes


def start_child(directory, **options):
    """A process that runs `the_run`, slowly, and says "step k" as it goes."""
    command = [sys.executable, "-W", "error", __file__, str(directory), json.dumps(options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(child, step):
    for line in child.stdout:
        if line.startswith("step ") and int(line.split()[1]) >= step:
            return
    pytest.fail(f"the child ended before step {step}: {child.stderr.read()}")


def kill(child):
    child.send_signal(signal.SIGKILL)
    _, errors = child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert errors == ""  # no warning, no logging of orbax's on the console


def steps_on_disk(directory):
    return sorted(
        int(p.name.removeprefix("step_"))
        for p in Path(directory).iterdir()
        if p.name.startswith("step_") and "." not in p.name
    )


def test_killed_again_and_again_a_run_ends_as_if_it_had_not_been(tmp_path, uninterrupted):
    """Killed between saves, at a random moment, and while a checkpoint is written; other chunk sizes each time.

    While it lives, a second run is refused its directory.
    """
    child = start_child(tmp_path, checkpoint_every=4, chunk=3)
    wait_for_step(child, 9)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}.*in use by another run \(process {child.pid} on .*its own"):
        the_run(tmp_path)
    assert child.poll() is None
    kill(child)
    assert (tmp_path / ".bilevel_lock").exists()  # what is left of it holds nobody up
    first = steps_on_disk(tmp_path)
    assert first and first[-1] % 4 == 0 and first[-1] >= 8

    child = start_child(tmp_path, checkpoint_every=1, chunk=1)
    wait_for_step(child, first[-1] + 3)
    time.sleep(np.random.default_rng(os.getpid()).uniform(0, 0.15))  # truly random: it must hold at any moment
    kill(child)
    second = steps_on_disk(tmp_path)
    assert first[-1] < second[-1] < STEPS

    child = start_child(tmp_path, checkpoint_every=1)
    wait_for_step(child, second[-1] + 2)
    until = time.monotonic() + 20
    while not any(p.name.startswith(".bilevel_writing_") for p in tmp_path.iterdir()):
        assert time.monotonic() < until and child.poll() is None
    kill(child)
    assert any(p.name.startswith(".bilevel_writing_") for p in tmp_path.iterdir())  # it was killed within a save

    solution = the_run(tmp_path)
    assert_same_run(solution, uninterrupted)
    assert steps_on_disk(tmp_path)[-1] == STEPS
    assert len(steps_on_disk(tmp_path)) <= 3
    assert not (tmp_path / ".bilevel_lock").exists()
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith("step_") or "." in p.name]  # leftovers are gone


def test_what_is_deleted_keeps_its_mark_until_the_last(tmp_path, monkeypatch):
    """So that a run killed within leaves a folder that the next one knows as its own, and deletes."""
    whole, seen = shutil.rmtree, []

    def watched(path, **options):
        if path.parent == tmp_path:
            seen.append({inside.name for inside in path.iterdir()} <= {"made_by_bilevel"})
        else:
            seen.append((path.parent / "made_by_bilevel").exists())
        whole(path, **options)

    monkeypatch.setattr("bilevel.checkpoint.shutil.rmtree", watched)
    the_run(tmp_path, steps=12, checkpoint_every=1, checkpoint_keep=1)
    assert len(seen) > 3 and all(seen)


def test_ctrl_c_returns_what_there_is_saves_it_and_resumes_exactly(tmp_path, uninterrupted):
    child = start_child(tmp_path, checkpoint_every=50)
    wait_for_step(child, 7)
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate()
    assert child.returncode == 0 and errors == ""
    result, steps = output.splitlines()[-1].split()
    assert result == "INTERRUPTED"
    assert steps_on_disk(tmp_path)[-1] == int(steps) < 50
    assert_same_run(the_run(tmp_path), uninterrupted)


def test_an_array_over_several_devices_is_saved_whole_and_restored_as_the_template_lies(tmp_path):
    code = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from bilevel.checkpoint import Checkpoints
from bilevel.history import History
mesh = jax.make_mesh((4,), ("i",))
whole = np.arange(8, dtype=np.float32)
here = jax.device_put(whole, NamedSharding(mesh, P("i")))
key = jax.device_put(jax.random.split(jax.random.key(1), 4), NamedSharding(mesh, P("i")))
saver = Checkpoints(sys.argv[1], {"solver": "s"})
saver.save(1, {"a": here, "key": key}, History())
_, state, _ = saver.restore({"a": here * 0, "key": key})
assert state["a"].sharding == here.sharding and state["key"].sharding == key.sharding
assert (np.asarray(state["a"]) == whole).all()
_, state, _ = saver.restore({"a": jax.device_put(whole, NamedSharding(mesh, P())), "key": key})
assert state["a"].sharding.is_fully_replicated and len(state["a"].sharding.device_set) == 4
"""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    template = {"a": jnp.zeros(8), "key": jax.random.split(jax.random.key(0), 4)}
    _, state, _ = Checkpoints(tmp_path, {"solver": "s"}).restore(template)  # one device here
    assert_same_bits(state, {"a": jnp.arange(8.0), "key": jax.random.split(jax.random.key(1), 4)})


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks_of_any_size_give_the_same_bits(uninterrupted, chunk):
    assert_same_run(the_run(chunk=chunk), uninterrupted)


def test_more_steps_later_equal_one_long_run(tmp_path, uninterrupted):
    the_run(tmp_path, steps=20)
    the_run(tmp_path, steps=40, chunk=3)
    assert_same_run(the_run(tmp_path), uninterrupted)


def test_a_finished_run_is_returned_and_fewer_steps_are_refused(tmp_path, uninterrupted):
    the_run(tmp_path)
    assert_same_run(the_run(tmp_path), uninterrupted)
    with pytest.raises(ValueError, match=f"steps=30.*already at step {STEPS}"):
        the_run(tmp_path, steps=30)


def test_a_stream_goes_on_where_it_stood(tmp_path):
    items = [(ROWS[i : i + 4], TARGETS[i : i + 4]) for i in range(0, 20, 4)]
    whole = the_run(problem=the_problem(lower_data=Stream(items, draws=3)), steps=12)
    the_run(tmp_path, problem=the_problem(lower_data=Stream(items, draws=3)), steps=7, metrics_every=12)
    resumed = the_run(tmp_path, problem=the_problem(lower_data=Stream(items, draws=3)), steps=12)
    assert_same_bits(resumed.state, whole.state)


def test_a_solver_of_the_users_own(tmp_path):
    class Descent:
        def __init__(self, rate):
            self.rate = rate

        def init(self, problem, x, y, key):
            return NestedLike(x, y, None, ())

        def step(self, problem, state, key):
            loss = problem.draw_lower(key)
            new = jax.tree.map(lambda y, g: y - self.rate * g, state.y, loss.gradient(state.x, state.y))
            return NestedLike(state.x, new, None, ()), {"lower_loss": loss(state.x, state.y)}

    whole = the_run(solver=Descent(0.1))
    the_run(tmp_path, solver=Descent(0.1), steps=20)
    assert_same_run(the_run(tmp_path, solver=Descent(0.1)), whole)
    with pytest.raises(CheckpointError, match=r"solver\.rate was 0\.1, is now 0\.2"):
        the_run(tmp_path, solver=Descent(0.2))


class NestedLike(NamedTuple):
    x: object
    y: object
    nothing: object
    empty: object


# ---------------------------------------------------------------- what a checkpoint holds


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    x: object
    y: object
    more: object


def make_state():
    rng = np.random.default_rng(5)
    nan = np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)
    return State(
        x=None,
        y={"a/b": jnp.asarray(rng.normal(size=(2, 3)), jnp.bfloat16), "": (jnp.asarray(nan), jnp.arange(3) > 1)},
        more=(
            jax.random.key(7),
            jax.random.split(jax.random.key(8, impl="rbg"), 2),
            NestedLike(rng.normal(size=3), np.float64(np.pi), None, ()),  # float64 on the host, whatever JAX has on
            jnp.zeros((0, 3)),
            np.complex64(1 + 2j),
            jnp.int8(3),
            [],
        ),
    )


def make_history():
    history = History()
    for k in range(3):
        history.extend("test accuracy / [1]", np.arange(2 * k, 2 * k + 2), np.float32([0.1, k]))
        history.extend("vector", np.array([k]), np.full((1, 4), k + 1 / 3))
    history.extend("a", np.arange(0), np.zeros(0, np.float16))
    return history


def blank(leaf):
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0, impl=jax.random.key_impl(leaf)), leaf.shape)
    return jnp.zeros_like(leaf) if isinstance(leaf, jax.Array) else np.zeros_like(leaf)[()]


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
    state, history = make_state(), make_history()
    saver = Checkpoints(tmp_path / "a" / "b", {"solver": "s"})
    saver.save(12, state, history)
    template = jax.tree.map(blank, state)
    step, found, found_history = Checkpoints(str(tmp_path / "a" / "b"), {"solver": "s"}).restore(template)
    assert step == 12
    assert_same_bits(found, state)
    assert [type(leaf) for leaf in jax.tree.leaves(found)] == [type(leaf) for leaf in jax.tree.leaves(state)]
    assert_same_history(found_history, history)
    found_history.extend("vector", np.array([3]), np.zeros((1, 4)))
    assert found_history["vector"].shape == (4, 4)


def test_float64_arrays_of_jax_come_back_bit_for_bit(tmp_path, x64):
    state = {"x": jnp.asarray([1 / 3, np.pi]), "n": 3, "rate": 0.1}
    Checkpoints(tmp_path, {"solver": "s"}).save(1, state, History())
    _, found, _ = Checkpoints(tmp_path, {"solver": "s"}).restore({"x": jnp.zeros(2), "n": 0, "rate": 0.0})
    assert found["x"].dtype == jnp.float64
    assert_same_bits(found["x"], state["x"])
    assert (found["n"], found["rate"]) == (3, 0.1) and type(found["n"]) is int


def test_a_state_without_any_array(tmp_path):
    Checkpoints(tmp_path, {"solver": "s"}).save(1, {"x": None, "y": ()}, History())
    assert Checkpoints(tmp_path, {"solver": "s"}).restore({"x": None, "y": ()})[1] == {"x": None, "y": ()}


def test_the_newest_are_kept_and_a_step_can_be_written_again(tmp_path):
    saver = Checkpoints(tmp_path, {"solver": "s"}, keep=2)
    assert saver.restore({"x": jnp.zeros(1)}) is None
    for step in (1, 20, 3, 100, 100):
        saver.save(step, {"x": jnp.full(1, float(step))}, History())
    assert steps_on_disk(tmp_path) == [20, 100]
    assert float(saver.restore({"x": jnp.zeros(1)})[1]["x"][0]) == 100


def test_ctrl_c_waits_for_the_end_of_a_save(tmp_path, monkeypatch, capfd):
    saver = Checkpoints(tmp_path, {"solver": "s"})
    save = saver._save

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        save(*arguments)

    monkeypatch.setattr(saver, "_save", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        saver.save(1, {"x": jnp.ones(2)}, History())
    assert signal.getsignal(signal.SIGINT) is before
    assert saver.restore({"x": jnp.zeros(2)})[0] == 1
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- torn


def files_of(directory, step):
    return sorted(p for p in (directory / f"step_{step}").rglob("*") if p.is_file())


@pytest.fixture
def three(tmp_path):
    saver = Checkpoints(tmp_path, {"solver": "s"})
    for step in (10, 20, 30):
        saver.save(step, {"x": jnp.full(5, float(step))}, make_history())
    return tmp_path


@pytest.mark.parametrize("damage", ["truncated", "deleted", "flipped", "emptied"])
def test_a_torn_checkpoint_is_named_and_an_older_good_one_is_used(three, caplog, capfd, damage):
    """Every file of the newest, one after the other."""
    template = {"x": jnp.zeros(5)}
    for file in files_of(three, 30):
        content = file.read_bytes()
        if damage == "deleted":
            file.unlink()
        elif damage == "truncated":
            file.write_bytes(content[: len(content) // 2])
        elif damage == "emptied":
            file.write_bytes(b"")
        else:
            middle = len(content) // 2
            file.write_bytes(
                content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :] if content else b"?"
            )
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="bilevel"):
            step, state, history = Checkpoints(three, {"solver": "s"}).restore(template)
        file.write_bytes(content)
        assert step == 20 and np.asarray(state["x"]).tolist() == [step] * 5
        assert_same_history(history, make_history())
        warned = [r.getMessage() for r in caplog.records if r.name == "bilevel"]
        assert len(warned) == 1 and re.search(
            "step_30 is torn and was skipped: .*(missing|No such file|written with)", warned[0]
        )
    assert capfd.readouterr() == ("", "")
    assert Checkpoints(three, {"solver": "s"}).restore(template)[0] == 30


def test_all_torn_is_an_error_that_names_the_directory(three):
    for step in (10, 20, 30):
        for file in files_of(three, step):
            file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"(?s){three}.*torn.*10, 20, 30.*Delete the directory"):
        Checkpoints(three, {"solver": "s"}).restore({"x": jnp.zeros(5)})


def test_a_run_goes_on_from_the_older_one_and_replaces_the_torn(tmp_path, uninterrupted):
    the_run(tmp_path, steps=30, checkpoint_every=10)
    for file in files_of(tmp_path, 30):
        file.unlink()
    assert_same_run(the_run(tmp_path, checkpoint_every=10), uninterrupted)
    assert steps_on_disk(tmp_path) == [40, 50, 60]


def test_torn_ones_do_not_push_good_ones_out(three):
    for file in files_of(three, 30):
        file.unlink()
    saver = Checkpoints(three, {"solver": "s"}, keep=1)
    assert saver.restore({"x": jnp.zeros(5)})[0] == 20
    saver.save(25, {"x": jnp.full(5, 25.0)}, History())
    assert Checkpoints(three, {"solver": "s"}).restore({"x": jnp.zeros(5)})[0] == 25


# ---------------------------------------------------------------- foreign


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made")
    the_run(directory, steps=5)
    return directory


def other(x, y, batch):
    return lower(x, y, batch)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"solver": dataclasses.replace(THE_SOLVER, hypergradient=hypergradients.Implicit())},
            "solver.hypergradient.linear_solver was Identity, is now",
        ),
        (
            {"solver": dataclasses.replace(THE_SOLVER, upper_optimizer=optax.adam(0.01))},
            r"solver\.upper_optimizer was .*step_size=-0\.05.* is now .*step_size=-0\.01",
        ),
        ({"key": 4}, r"key was .*3\], step 0.* is now .*4\], step 0"),
        ({"problem": the_problem(lower=other)}, "lower was lower, is now other"),
        ({"problem": the_problem(project_upper=jnp.abs)}, "project_upper was None, is now abs"),
        (
            {"problem": the_problem(upper_data=(ROWS[:8] + 1, TARGETS[:8]))},
            r"upper_data\[0\] has changed: the checksum",
        ),
        (
            {"problem": the_problem(upper_data=(ROWS[:7], TARGETS[:7]))},
            r"upper_data\[0\] was float32\[8, 3\], is now float32\[7, 3\]",
        ),
        (
            {"problem": the_problem(lower_data=Minibatches((ROWS[8:], TARGETS[8:]), size=8))},
            r"Minibatches\(size=4.*Minibatches\(size=8",
        ),
        (
            {"problem": the_problem(lower_data=Minibatches((ROWS[8:], TARGETS[8:] * 2), size=4))},
            r"lower_data\[1\] has changed: the checksum",
        ),
    ],
)
def test_another_run_is_refused_by_what_differs(made, changes, words):
    with pytest.raises(
        CheckpointError, match=f"{made}/step_5.*of another run.*{words}.*Give another directory, or delete this one"
    ):
        the_run(made, **changes)


def test_another_solver_is_refused_by_name(made):
    @dataclasses.dataclass
    class Mine:
        def init(self, problem, x, y, key):
            return NestedLike(x, y, None, ())

        def step(self, problem, state, key):
            return state, {}

    with pytest.raises(CheckpointError, match=r"made with the solver HypergradientDescent, this run uses .*Mine"):
        the_run(made, solver=Mine())


def test_another_start_is_ignored_aloud(made, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="bilevel"):
        solution = solve(
            the_problem(), jnp.ones(3), {"w": jnp.zeros(3)}, THE_SOLVER, steps=5, key=3, checkpoint=made, progress=False
        )
    assert "x0 is another than that of the run's start; it is ignored" in caplog.text
    assert_same_bits(solution.x, the_run(steps=5).x)


def test_another_dtype_of_the_start_is_named_as_what_changed(tmp_path):
    """And not the functions, which take x in its dtype by a wrapper."""

    def go(x, steps):
        problem = Problem(lambda x, y: (y - 1) ** 2, lambda x, y: (y - x) ** 2, project_upper=lambda x: x)
        options = dict(steps=steps, checkpoint=tmp_path / "run", progress=False)
        return solve(problem, x, jnp.zeros(()), solvers.SOBA(0.1, 0.1), **options)

    go(jnp.float32(0), 3)
    said = r"of another run: the dtype of x0 was float32, is now bfloat16\. Give another directory"
    with pytest.raises(CheckpointError, match=said):
        go(jnp.bfloat16(0), 6)
    assert go(jnp.float32(0), 6).steps == 6


def test_a_state_of_another_form_is_refused(three):
    with pytest.raises(
        CheckpointError, match=r"state\['x'\] was \w+\[5\], is now float32\[6\]; state\['z'\] was absent"
    ):
        Checkpoints(three, {"solver": "s"}).restore({"x": jnp.zeros(6), "z": jnp.zeros(())})


# ---------------------------------------------------------------- fingerprint


def fingerprint_of(problem=None, solver=THE_SOLVER, key=0):
    problem = the_problem() if problem is None else problem
    return fingerprint(problem, solver, jnp.zeros(3), {"w": jnp.zeros(3)}, as_step_key(key))


def test_the_fingerprint_is_equal_when_made_again_and_goes_through_json():
    first = fingerprint_of()
    again = fingerprint_of(
        solver=solvers.HypergradientDescent(
            hypergradients.Implicit(Identity(0.5)), GradientDescent(optax.sgd(0.05, momentum=0.9), 3), optax.adam(0.05)
        )
    )
    assert first == again == json.loads(json.dumps(first))
    assert not [text for text in first.values() if " at 0x" in text]


def make_loss(data):
    return lambda x, y: jnp.sum(data * y["w"])


@pytest.mark.parametrize(
    "pair",
    [
        [{"lower_data": Clients([ROWS[:3], ROWS[3:8]])}, {"lower_data": Clients([ROWS[:4], ROWS[4:8]])}],
        [{"lower_data": Sampler(jax.random.fold_in, ROWS)}, {"lower_data": Sampler(jax.random.permutation, ROWS)}],
        [{"lower_data": Stream([ROWS])}, {"lower_data": Stream([ROWS], draws=2)}],
        [{"lower_data": Stream([ROWS])}, {"lower_data": Stream([ROWS[:3]])}],
        [{"lower": make_loss(ROWS[0])}, {"lower": make_loss(ROWS[1])}],  # data that a loss closes over
        [{"lower": jax.jit(lower)}, {"lower": other}],
        [{"lower_data": ROWS}, {"lower_data": ROWS.astype(np.float16)}],
        [{"lower_data": {"a": ROWS}}, {"lower_data": {"b": ROWS}}],
        [
            {"lower_data": jax.random.split(jax.random.key(0), 3)},
            {"lower_data": jax.random.split(jax.random.key(1), 3)},
        ],
    ],
)
def test_different_problems_have_different_fingerprints(pair):
    a, b = (fingerprint_of(the_problem(**changes)) for changes in pair)
    assert a != b
    assert a == fingerprint_of(the_problem(**pair[0]))


def test_a_streams_other_first_item_is_only_warned_of(tmp_path, caplog):
    then, now = (fingerprint_of(the_problem(lower_data=Stream([item]))) for item in (ROWS, ROWS + 1))
    Checkpoints(tmp_path, then).save(1, {"x": jnp.zeros(1)}, History())
    with caplog.at_level(logging.WARNING, logger="bilevel"):
        assert Checkpoints(tmp_path, now).restore({"x": jnp.ones(1)})[0] == 1
    assert "the first item of lower_data's stream is another" in caplog.text


def test_a_stream_that_can_be_read_once_is_not_read():
    iterator = iter([ROWS])
    fingerprint_of(the_problem(lower_data=Stream(iterator)))
    assert next(iterator) is ROWS


# ---------------------------------------------------------------- the directory


def test_a_file_in_place_of_a_directory(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointError, match=f"{file}' is a file.*Give a directory"):
        Checkpoints(file, {})
    with pytest.raises(CheckpointError, match=r"cannot be written .*Give a directory that you may write to"):
        Checkpoints(file / "below", {})


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody, root included, may write")
def test_a_read_only_directory():
    with pytest.raises(
        CheckpointError, match=r"/proc/self/task' cannot be written .*Give a directory that you may write to"
    ):
        Checkpoints("/proc/self/task", {})
    with pytest.raises(CheckpointError, match="/proc/none/such' cannot be written"):
        Checkpoints("/proc/none/such", {})


def test_a_path_that_is_none():
    with pytest.raises(CheckpointError, match="checkpoint=3: give the path of a directory"):
        Checkpoints(3, {})


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step_by_step").mkdir()
    saver = Checkpoints(tmp_path, {"solver": "s"}, keep=1)
    assert saver.restore({"x": jnp.zeros(1)}) is None
    for step in (1, 2):
        saver.save(step, {"x": jnp.zeros(1)}, History())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "step_2", "step_by_step"]


@pytest.mark.parametrize("name", [".bilevel_writing_mine", ".bilevel_trash_mine", "step_1", "writing_mine", "trash_1"])
def test_folders_of_others_by_any_name_are_left_alone(tmp_path, name):
    mine = tmp_path / name / "deep"
    mine.mkdir(parents=True)
    (mine / "thesis.tex").write_text("mine")
    saver = Checkpoints(tmp_path, {"solver": "s"}, keep=1)
    with saver.held():
        for step in (1, 2, 3):
            saver.save(step, {"x": jnp.zeros(1)}, History())
    kept = [p for p in tmp_path.rglob("thesis.tex") if p.read_text() == "mine"]
    assert len(kept) == 1
    assert saver.restore({"x": jnp.ones(1)})[0] == 3


@pytest.mark.parametrize("mark", [None, "", ".bilevel_wri"])
def test_folders_of_a_run_killed_before_they_had_its_mark_are_gone(tmp_path, mark):
    left = tmp_path / ".bilevel_writing_abcdefgh"
    left.mkdir()
    if mark is not None:
        (left / checkpoint._MARK).write_text(mark)
    Checkpoints(tmp_path, {"solver": "s"}).save(1, {"x": jnp.zeros(1)}, History())
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".bilevel_writing")] == []


def test_a_folder_with_a_mark_of_somebody_elses_is_left_alone(tmp_path):
    left = tmp_path / ".bilevel_writing_abcdefgh"
    left.mkdir()
    (left / checkpoint._MARK).write_text(".bilevel_writing_other")
    (left / "thesis.tex").write_text("mine")
    Checkpoints(tmp_path, {"solver": "s"}).save(1, {"x": jnp.zeros(1)}, History())
    assert (left / "thesis.tex").read_text() == "mine"


def test_checkpoints_of_another_run_are_not_thinned_out(tmp_path):
    Checkpoints(tmp_path, {"solver": "theirs"}).save(1, {"x": jnp.zeros(1)}, History())
    saver = Checkpoints(tmp_path, {"solver": "s"}, keep=1)
    for step in (2, 3):
        saver.save(step, {"x": jnp.zeros(1)}, History())
    assert steps_on_disk(tmp_path) == [1, 3]
    saver.save(1, {"x": jnp.zeros(1)}, History())  # in the way: set aside, not deleted
    assert [p.name for p in tmp_path.glob("was_step_1_*/*")] == ["step_1"]


# ---------------------------------------------------------------- two runs, one directory


def test_a_second_run_in_one_process_is_refused_and_an_error_lets_go(tmp_path):
    saver = Checkpoints(tmp_path, {"solver": "s"})
    with pytest.raises(ZeroDivisionError), saver.held():
        with pytest.raises(CheckpointError, match="in use by another run"), Checkpoints(tmp_path, {}).held():
            pass
        raise ZeroDivisionError
    with Checkpoints(tmp_path, {"solver": "s"}).held():
        pass


def test_a_child_that_outlives_a_killed_run_does_not_hold_its_lock(tmp_path):
    code = f"""
import os, sys, time
from bilevel.checkpoint import Checkpoints
with Checkpoints({str(tmp_path)!r}, {{"solver": "s"}}).held():
    child = os.fork()  # a loader's worker
    if child == 0:
        sys.stdout.close(); sys.stderr.close()
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    try:
        parent.kill()
        parent.wait()
        with Checkpoints(tmp_path, {"solver": "s"}).held():
            assert json.loads((tmp_path / ".bilevel_lock").read_text())["pid"] == os.getpid()
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdout.close()


# ---------------------------------------------------------------- a full disk


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["orbax", "description", "folder"])
def test_a_full_disk_is_said_and_the_run_returns_its_result(tmp_path, uninterrupted, monkeypatch, caplog, where):
    the_run(tmp_path, steps=30)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "bilevel"):
        if where == "orbax":
            patch.setattr("orbax.checkpoint.Checkpointer.save", full)
        elif where == "description":
            patch.setattr(Path, "write_text", full)
        else:
            patch.setattr("tempfile.mkdtemp", full)
        solution = the_run(tmp_path, checkpoint_every=10)
    assert_same_run(solution, uninterrupted)
    said = "CheckpointError: The checkpoint of step 60 could not be written .*No space left on device.*Make room there"
    assert re.search(said, solution.reason)
    assert len([r for r in caplog.records if "The run goes on without it" in r.getMessage()]) >= 3
    assert steps_on_disk(tmp_path) == [30]
    resumed = the_run(tmp_path)  # room again: from the last good one
    assert_same_run(resumed, uninterrupted)
    assert "CheckpointError" not in resumed.reason


def test_room_that_comes_back_is_used(tmp_path, monkeypatch):
    saved, calls = Checkpoints._write, []

    def sometimes(self, step, *rest):
        calls.append(step)
        return full() if step < 40 else saved(self, step, *rest)

    monkeypatch.setattr(Checkpoints, "_write", sometimes)
    solution = the_run(tmp_path, checkpoint_every=20)
    assert calls == [20, 40, 60] and steps_on_disk(tmp_path) == [40, 60]
    assert "CheckpointError" not in solution.reason


# ---------------------------------------------------------------- the process that is killed


def child(directory, options):
    def slow(event):
        print("step", event.step, flush=True)
        time.sleep(0.02)

    solution = the_run(directory, callback=slow, callback_every=1, **options)
    print(Result(solution.result).name, solution.steps, flush=True)


if __name__ == "__main__":
    child(sys.argv[1], json.loads(sys.argv[2]))
