"""x and y over a mesh: the numbers of one device, nothing gathered, and runs that go on over other devices."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import mesh_run
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from processes import ended, printed, started

from bilevel import Problem, distributed

LAYER = 32 * 32  # the numbers of one layer's matrix
# A sum of 24,576 terms, 23 in all, and a difference of it of .002, of which rounding is some 5e-10.
BOUNDS = {"HOZOG": 1e-8}
# CG's vectors and those of the least squares behind it: 0.327 in float64 on 1 x 4, 0.320 in float32.
PEAKS = {"Robust": 1.31 / 4}
DIFFERENCES = ("finite difference", "SAMA", "PZOBO", "HOZOG", "F2SA")  # they divide by a small number


def measured(*arguments):
    return json.loads(printed("sharded_run.py", *arguments, devices=4)[-1])


def checked(found):
    for name, (distance, kept, gathered, peak, *_) in found.items():
        assert distance < BOUNDS.get(name, 1e-10 if name in DIFFERENCES else 1e-12), name
        assert kept, name
        assert gathered <= LAYER, name
        assert peak < PEAKS.get(name, 1.3 / 4), name


def same(found, expected, devices):
    assert found["devices"] == devices and found["parts"] == [True]
    for name in expected:
        if name not in ("devices", "parts"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-10, atol=1e-13, err_msg=name)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """What one process of four devices found and printed, for the four tests below."""
    out = tmp_path_factory.mktemp("four") / "out.npz"
    over = ["--over", "1:4", "4:1,1:3,4:4"]
    lines = printed("mesh_run.py", out, *over, "--agents", "--mixed", "--estimators", "Robust", "forward", devices=4)
    return out, lines


def test_variables_over_a_mesh_stay_there(four):
    """Linear systems and random directions, samples along an axis of their own; all others below."""
    checked(json.loads(four[1][-1]))


def test_a_run_goes_on_over_other_devices(four):
    """Saved on four devices, gone on with on one, and on four again: the numbers of one device all along."""
    out, lines = four
    assert lines[:2] == ["1:4", "4:1 1:3 4:4"]
    whole, pieces = (np.load(out.with_suffix(f".{i}.npz")) for i in range(2))
    same(pieces, whole, [4])


@pytest.mark.slow
def test_a_run_goes_on_over_fewer_devices_and_fewer_again(tmp_path):
    lines = printed("mesh_run.py", tmp_path / "out.npz", "--over", "1:4", "4:1,2:2,1:3,4:4", devices=4)
    assert lines == ["1:4", "4:1 2:2 1:3 4:4"]
    whole, pieces = (np.load(tmp_path / f"out.{i}.npz") for i in range(2))
    same(pieces, whole, [4])


def test_agents_have_copies_over_the_other_axis(four):
    """Agents along one axis of the mesh and each one's y along the other; clients' server likewise."""
    found = np.load(four[0])
    for name, spec in (("ring", "('agents', 'model')"), ("simfbo", "('model',)")):
        np.testing.assert_allclose(found[f"{name} many"], found[f"{name} alone"], rtol=1e-12, atol=1e-14)
        assert spec in str(found[f"{name} spec"])
    assert "y0 lies over the mesh's axis 'agents', and so do the agents" in str(found["refused 0"])
    assert "{'agents': 2, 'model': 2} and y0 over another one, {'model': 4}" in str(found["refused 1"])


def test_what_lies_on_no_device_goes_where_the_others_lie(four):
    """y alone on a mesh, in one compiled loop; and two places are named, before anything is compiled."""
    found = np.load(four[0])
    assert found["devices"].tolist() == [4] and found["loops"] == 1
    assert found["whole"] and found["kept"]  # x ends whole on every device; what had a place is there
    np.testing.assert_allclose(found["y alone"], found["all"], rtol=1e-10, atol=1e-13)
    for name in ("solve", "run", "estimate", "metagradient"):
        assert str(found[name]).startswith(
            "y0['in'] was put on the devices 0, 1, 2, 3 and x0['in'] on 0, 1: a programme runs over one set of devices"
        )
    assert "y0['in'] was put on the devices 0, 1, 2, 3 and upper_data[0] on 1:" in str(found["data"])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1x4", "2x2"])
def test_variables_of_every_estimator_stay_there(mesh):
    found = measured("--float64", "--mesh", mesh)
    assert len(found) > 20
    checked(found)


@pytest.mark.slow
def test_float32_differs_by_its_own_rounding():
    """Four devices add in another order than one: both are as far from the gradient in float64."""
    for name, (distance, _, _, _, one, four) in measured("--rounding", "sqrt", "CG", "forward").items():
        assert distance < 3e-5, name
        assert four < 3 * one, name
        assert distance < 3 * (one + four), name


def test_two_processes_of_two_devices_are_one_device(tmp_path, x64):
    """The same call, from a checkpoint of this process, which then goes on from theirs."""
    here = jax.devices()[:1]
    mesh_run.outcome(here, 1, tmp_path / "runs")
    ended(started("mesh_run.py", 2, 2, [tmp_path / "out.npz", "--steps", 2, "--checkpoint", tmp_path / "runs"]))
    found = np.load(tmp_path / "out.npz")
    assert found["processes"] == 2
    same(found, mesh_run.outcome(here, 2), [4])
    same(mesh_run.outcome(here, 3, tmp_path / "runs"), mesh_run.outcome(here, 3), [1])


@pytest.mark.slow
def test_a_whole_training_over_two_processes(tmp_path, x64):
    arguments = [tmp_path / "out.npz", "--metagradient", "--checkpoint", tmp_path / "runs"]
    ended(started("mesh_run.py", 2, 2, arguments))
    same(np.load(tmp_path / "out.npz"), mesh_run.outcome(jax.devices()[:1], 0, metagradient=True), [4])


@pytest.mark.slow
def test_a_whole_training_goes_on_over_other_devices(tmp_path, x64):
    """Its disk was full on some of four devices, forward or backward; what was written is gone on from on others."""
    printed("mesh_run.py", tmp_path / "out.npz", "--moved", devices=4)
    found, whole = np.load(tmp_path / "out.npz"), mesh_run.outcome(jax.devices()[:1], 0, metagradient=True)
    for part, before, after in mesh_run.MOVES:
        named = {name: found[f"{part} {before} {after} {name}"] for name in whole}
        same(named, whole, [after])
        assert found[f"{part} {before} {after} first"] == 2


MESH = jax.sharding.AbstractMesh((2, 4), ("data", "model"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: distributed.place({"in": np.ones((6, 30))}, MESH, P(None, "model")),
            r"'model' of 4 devices does not divide axis 1 of \['in'\], of shape \(6, 30\): put another axis over it, "
            r"pad that one to 32, or take 3 devices there",
        ),
        (
            lambda: distributed.place(np.ones((6, 4)), MESH, P(("data", "model"))),
            "'data' and 'model' of 8 devices does not divide axis 0 of the array",
        ),
        (lambda: distributed.place(np.ones(4), MESH, P("rows")), "no axis 'rows', it has 'data', 'model'"),
        (lambda: distributed.place({"a": np.ones(4)}, MESH, {"b": P()}), "not a tree like the arrays'"),
        (lambda: distributed.place(np.ones(4), MESH, lambda path, leaf: "model"), "the spec of the array is 'model'"),
        (lambda: distributed.spread(np.ones(4), MESH, "rows"), "no axis 'rows'"),
        (
            lambda: distributed.mesh([1, 2, 3, 4], shape={"data": 3, "model": -1}),
            r"3 x -1 is not the number of devices, which is 4: give sizes whose product that is",
        ),
        (
            lambda: distributed.mesh(shape={"data": 2.0}),
            r"'data': 2\.0\}\): the sizes of the axes are whole numbers by",
        ),
        (lambda: distributed.mesh(shape={"data": "2"}), "the sizes of the axes are whole numbers by name"),
        (
            lambda: distributed.mesh(shape=(2, 2)),
            r"mesh\(shape=\(2, 2\)\): the sizes of the axes are whole numbers by name",
        ),
        (lambda: distributed.mesh(4), r"mesh\(4\): devices are a list of some"),
        (lambda: distributed.mesh([]), r"mesh\(\[\]\): devices are a list of some"),
        (lambda: distributed.place(np.ones((4, 4)), MESH, P("model", "model")), "has the mesh's 'model' twice"),
        (lambda: distributed.place(np.ones((4, 4)), MESH, P(("data", "data"))), "has the mesh's 'data' twice"),
        (lambda: distributed.place(np.ones(4), MESH, P(P.UNCONSTRAINED)), "leaves axis 0 open: name a mesh axis there"),
        (lambda: distributed.place({"w": "abc"}, MESH), r"\['w'\] is 'abc', no array"),
        (lambda: distributed.place(np.ones(4), None), "NoneType was given as the mesh: make one with"),
        (lambda: distributed.place(np.ones(3), MESH, P("data")), "pad that one to 4, or take 1 device there"),
    ],
)
def test_errors_by_name(make, words):
    with pytest.raises(distributed.DistributedError, match=words):
        make()


def test_where_arrays_are_put():
    tree = {"w": np.ones((6, 512, 1024)), "v": np.ones((512, 1024, 6)), "b": np.ones(7), "small": np.ones((4, 8))}
    assert distributed.spread(tree, MESH) == {
        "w": P(None, None, ("data", "model")),
        "v": P(None, ("data", "model")),
        "b": P(),
        "small": P(),
    }
    assert distributed.spread(tree["w"], MESH, "model") == P(None, None, "model")
    one = distributed.mesh(jax.devices()[:1], shape={"data": 1, "model": -1})
    problem = Problem(jnp.sum, jnp.sum, np.ones((4, 2)), (np.ones((4, 2)), np.arange(4)))
    placed = distributed.place(problem, one, P("data", "model"))
    assert placed.lower_data[1].sharding.spec == P("data")
    assert placed.upper_data.sharding.spec == P("data", "model")
    assert placed.upper is problem.upper
    both = distributed.place(
        {"a": {"b": np.ones(2), "c": np.ones((2, 2))}, "d": 1.0}, one, {"a": P("model"), "d": None}
    )
    assert both["a"]["c"].sharding.spec == P("model") and both["d"].sharding.spec == P()
