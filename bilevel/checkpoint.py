"""Checkpoints: a run that was killed goes on bit for bit as if it had not been.

A checkpoint is an orbax directory `step_<n>` inside the run's directory: `arrays` holds the leaves of the solver's state and the
history, `meta` (JSON) the step, the run's fingerprint, and the name, shape, dtype and checksum of each leaf. Orbax writes
beside it and renames, so that a process killed at any moment leaves the older checkpoints as they were.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import logging
import os
import re
import shutil
import tempfile
import types
import zlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel.data import SOURCES, Minibatches, Sampler, StepKey, Stream
from bilevel.problem import Problem
from bilevel.solution import History

PyTree = Any

__all__ = ["CheckpointError", "Checkpoints", "fingerprint"]

logger = logging.getLogger("bilevel")


class CheckpointError(ValueError):
    """A checkpoint directory cannot be used; the message says which, why, and what to do."""


# ---------------------------------------------------------------- what a run is


def fingerprint(problem: Problem, solver: Any, x: PyTree, y: PyTree, base: StepKey) -> dict[str, str]:
    """What makes a run this run: equal for the start and its resumption, different for another problem, solver, data or key.

    Args:
      problem: its functions go in by qualified name and by what they close over (not by their code), its data by kind,
        shapes, dtypes and a checksum of the contents (a `Stream`'s of its first item).
      solver: goes in by type and hyperparameters.
      x, y: the start, by structure, shapes, dtypes and checksum.
      base: the run's key.

    Returns:
      A dictionary that JSON can hold. The number of steps, the tolerance and the metrics are not in it. What stands under
      `_ADVISORY` is only warned of when it differs.
    """
    found = {"package": _package_version(), "solver": _type_name(solver)}
    found |= _describe_fields("solver", solver)
    found["key"] = (
        f"{jax.random.key_impl(base.base)} {jax.random.key_data(base.base).tolist()}, "
        f"step {int(base.step)}, stream {int(base.stream)}"
    )
    for name, tree in (("x0", x), ("y0", y)):
        found[name] = str(jax.tree.structure(tree))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            where = name + jax.tree_util.keystr(path)
            found[f"{where} array"] = _shape(leaf)
            found[f"start {where}"] = _checksum(leaf)
    for field in dataclasses.fields(problem):
        value = getattr(problem, field.name)
        if field.name in ("upper_data", "lower_data"):
            found |= _describe_data(field.name, value)
        else:
            found[field.name] = _describe(value)
    return found


# Keys of a fingerprint that do not make a run foreign: (prefix, the warning where they differ; None for silence).
_ADVISORY = (
    ("package", None),
    ("start ", "{name} is another than that of the run's start; it is ignored, the run goes on from the checkpoint"),
    (
        "first item of ",
        "the first item of {name}'s stream is another than at the run's start; the run goes on, but not exactly as if "
        "it had not been interrupted (a stream that shuffles? make it give the same items every time)",
    ),
)


def _package_version() -> str:
    try:
        return version("bilevel")
    except PackageNotFoundError:  # a source tree that was not installed
        return "unknown"


def _type_name(value: Any) -> str:
    cls = value if isinstance(value, type) else type(value)
    return f"{cls.__module__}.{cls.__qualname__}"


def _describe_fields(name: str, value: Any) -> dict[str, str]:
    """The hyperparameters, one entry each, so that a difference can be named."""
    found = {}
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}
    else:
        fields = dict(getattr(value, "__dict__", {}))
    for field, inner in fields.items():
        if getattr(type(inner), "__bilevel_hyperparameters__", False):
            found[f"{name}.{field}"] = _type_name(inner)
            found |= _describe_fields(f"{name}.{field}", inner)
        else:
            found[f"{name}.{field}"] = _describe(inner)
    return found


def _describe(value: Any, above: tuple[int, ...] = ()) -> str:
    """A text that is equal in two processes where the value means the same: never an address, never a hash."""
    if id(value) in above or len(above) > 12:
        return "..."
    inner = functools.partial(_describe, above=(*above, id(value)))
    if isinstance(value, enum.Enum):
        return str(value)
    if value is None or value is Ellipsis or isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        if np.size(value) == 1 and not _is_key(value):
            return f"{_shape(value)} {np.asarray(value).reshape(()).item()!r}"
        return f"{_shape(value)} {_checksum(value)}"
    if isinstance(value, optax.GradientTransformation):
        return inner(value.update)  # `init` closes over the same numbers
    if isinstance(value, functools.partial):
        bound = [inner(a) for a in value.args] + [f"{k}={inner(v)}" for k, v in value.keywords.items()]
        return f"partial({', '.join([inner(value.func), *bound])})"
    if isinstance(value, types.MethodType):
        return f"{inner(value.__self__)}.{value.__name__}"
    if isinstance(value, types.FunctionType):
        kept = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        parts = [inner(v) for v in kept]
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                parts.append(f"{name}={inner(cell.cell_contents)}")
            except ValueError:  # not yet filled
                continue
        return f"{value.__module__}.{value.__qualname__}" + (f"[{', '.join(parts)}]" if parts else "")
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = [f"{k}={inner(v)}" for k, v in zip(value._fields, value, strict=True)]
        return f"{type(value).__qualname__}({', '.join(parts)})"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(inner(v) for v in value)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {inner(v)}' for k, v in value.items())}}}"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(inner(v) for v in value))}}}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}
        return f"{_type_name(value)}({', '.join(f'{k}={inner(v)}' for k, v in fields.items())})"
    wrapped = getattr(value, "__wrapped__", None)  # jax.jit and its like
    if wrapped is not None:
        return inner(wrapped)
    if hasattr(value, "__qualname__"):
        return f"{getattr(value, '__module__', '')}.{value.__qualname__}"
    return _type_name(value)


def _describe_data(name: str, data: Any) -> dict[str, str]:
    if isinstance(data, Stream):
        found = {name: f"Stream(draws={data.draws})"}
        source = data.iterable
        if callable(source) or not hasattr(source, "__next__"):  # reading from an iterator would use it up
            for path, leaf in jax.tree_util.tree_leaves_with_path(next(data.items())):
                where = name + jax.tree_util.keystr(path)
                found[where] = f"items {_shape(leaf)}"
                found[f"first item of {where}"] = _checksum(leaf)
        return found
    kind = "arrays" if data is not None else "None"
    arrays = data
    if isinstance(data, SOURCES):
        arrays = data.arrays if hasattr(data, "arrays") else jax.tree.leaves(data)
        kind = type(data).__name__
        if isinstance(data, Minibatches):
            kind += f"(size={data.size}, replace={data.replace}, blocks={data.blocks})"
        elif isinstance(data, Sampler):
            kind += f"({_describe(data.fn)})"
        elif hasattr(data, "counts"):
            kind += f"({len(data.counts)} clients, size={data.size}, counts {_checksum(data.counts)})"
    found = {name: kind}
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        where = name + jax.tree_util.keystr(path)
        found[f"{where} array"] = _shape(leaf)
        found[f"{where} contents"] = _checksum(leaf)
    return found


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _global(leaf: Any) -> np.ndarray:
    """The whole array on the host, whatever devices it lies on.

    With several processes this is where the pieces of the others come in (`multihost_utils.process_allgather`), one
    process then writes; what is written is the global array, so that any other number of processes can read it.
    """
    # Neither `asarray` nor `array(..., copy=False)` may cast: float64 and bfloat16 stay what they are.
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _shape(leaf: Any) -> str:
    return f"{leaf.dtype if hasattr(leaf, 'dtype') else np.asarray(leaf).dtype}{list(np.shape(leaf))}"


def _checksum(leaf: Any) -> str:
    array = np.ascontiguousarray(_global(leaf))
    return f"crc32:{zlib.crc32(array.view(np.uint8) if array.size else b''):08x}"


def _differences(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """What makes the other run a foreign one, as clauses; warnings of lesser things go to the log."""
    if then.get("solver") != now["solver"]:
        old, new = str(then.get("solver")), now["solver"]
        if old.rpartition(".")[2] != new.rpartition(".")[2]:
            old, new = old.rpartition(".")[2], new.rpartition(".")[2]
        return [f"it was made with {old}, this run uses {new}"]
    found = []
    for name in dict.fromkeys((*now, *then)):
        old, new = then.get(name), now.get(name)
        if old == new:
            continue
        advice = next(((prefix, text) for prefix, text in _ADVISORY if name.startswith(prefix)), None)
        if advice is not None:
            prefix, text = advice
            if text is not None and old is not None and new is not None:
                logger.warning("%s", text.format(name=name.removeprefix(prefix)))
        elif name.endswith(" contents"):
            # Where the array is another one altogether, its shape says so already.
            if old is not None and new is not None and f"{name[:-9]} array" in now and then.get(f"{name[:-9]} array") == now[f"{name[:-9]} array"]:
                found.append(f"{name[:-9]} has changed: its contents have another checksum ({old}, now {new})")
        else:
            found.append(f"{name.removesuffix(' array')} was {_short(old)}, is now {_short(new)}")
    return found


def _short(text: str | None) -> str:
    if text is None:
        return "absent"
    return text if len(text) <= 300 else f"{text[:290]}... ({zlib.crc32(text.encode()):08x})"


# ---------------------------------------------------------------- the directory

_STEP = re.compile(r"step_(\d+)")
_LEFTOVER = re.compile(r"step_\d+\..*tmp.*|trash_.*")


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: where they are; made where it is missing.
      fingerprint: what the run is, of `fingerprint`.
      keep: how many of the newest are kept.

    Raises:
      CheckpointError: the directory cannot be made or written.
    """

    def __init__(self, directory: Any, fingerprint: dict[str, str], keep: int = 3) -> None:
        if not isinstance(directory, (str, os.PathLike)):
            raise CheckpointError(f"checkpoint={directory!r}: give the path of a directory.")
        self.path = Path(directory).expanduser().absolute()
        self.fingerprint, self.keep = fingerprint, keep
        self._torn: set[int] = set()
        cure = "Give a directory that you may write to."
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"checkpoint={str(self.path)!r} is a file, and checkpoints are a directory. {cure}")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
            self._sweep()
        except OSError as error:
            raise CheckpointError(f"checkpoint={str(self.path)!r} cannot be written ({error.strerror or error}). {cure}") from error

    def restore(self, template: Any) -> tuple[int, Any, History] | None:
        """The newest good checkpoint.

        Args:
          template: a state of the run's solver; gives the structure, and the devices that each array is put on.

        Returns:
          `(step, state, history)`, or None where the directory holds no checkpoint.

        Raises:
          CheckpointError: the newest readable one is another run's, or all are torn.
        """
        found = self._found()
        for step in reversed(found):
            path = self.path / f"step_{step}"
            try:
                meta = self._meta(path)
                foreign = _differences(meta["fingerprint"], self.fingerprint)
                if foreign:
                    break
                arrays = self._arrays(path, meta)
            except Exception as error:  # whatever a half-written or half-copied directory can raise
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                logger.warning("the checkpoint %s is torn and was skipped (%s)", path, reason[:300])
                self._torn.add(step)
                continue
            return step, self._state(path, meta, arrays, template), self._history(meta, arrays)
        else:
            if not found:
                return None
            raise CheckpointError(
                f"All checkpoints in {str(self.path)!r} are torn (steps {', '.join(map(str, found))}; the log says how). "
                "Delete the directory to start afresh, or give another one."
            )
        listed = "; ".join(foreign[:6]) + (f"; and {len(foreign) - 6} more" if len(foreign) > 6 else "")
        raise CheckpointError(f"The checkpoint {str(path)!r} is of another run: {listed}. Give another directory, or delete this one.")

    def save(self, step: int, state: Any, history: History) -> None:
        """Write a checkpoint (returns when it is on the disk), then drop all but the newest `keep`."""
        import orbax.checkpoint as ocp

        leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]
        named = [("state", name, _global(leaf)) for name, leaf in leaves]
        steps = history.steps
        for name in history:
            named += [("history", name, history[name]), ("steps", name, steps[name])]
        described = [
            {"part": part, "name": name, "shape": list(a.shape), "dtype": str(a.dtype), "checksum": _checksum(a)} for part, name, a in named
        ]
        # Orbax takes no array without elements: their shape, in the description, is all there is to keep.
        arrays = {str(i): a for i, (_, _, a) in enumerate(named) if a.size}
        meta = {"format": 1, "step": int(step), "fingerprint": self.fingerprint, "leaves": described}

        self._sweep()  # of a save that was interrupted
        path = self.path / f"step_{step}"
        self._discard(path)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
            items = {"meta": ocp.args.JsonSave(meta)} | ({"arrays": ocp.args.PyTreeSave(arrays)} if arrays else {})
            writer.save(path, ocp.args.Composite(**items))
        self._torn.discard(step)
        for old in [s for s in self._found() if s not in self._torn][: -self.keep]:
            self._discard(self.path / f"step_{old}")

    def close(self) -> None:
        """Nothing is left to wait for: `save` returns when the checkpoint is on the disk."""

    def _found(self) -> list[int]:
        names = (_STEP.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def _sweep(self) -> None:
        for entry in self.path.iterdir():
            if _LEFTOVER.fullmatch(entry.name):
                shutil.rmtree(entry, ignore_errors=True)

    def _discard(self, path: Path) -> None:
        """Delete, renaming first: a process killed within leaves no half of a checkpoint under a checkpoint's name."""
        if path.exists():
            trash = Path(tempfile.mkdtemp(prefix="trash_", dir=self.path))
            path.rename(trash / path.name)
            shutil.rmtree(trash, ignore_errors=True)

    def _meta(self, path: Path) -> dict[str, Any]:
        import orbax.checkpoint as ocp

        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            meta = reader.restore(path, ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if not isinstance(meta, dict) or not {"fingerprint", "leaves", "step"} <= meta.keys():
            raise ValueError("its description is missing")
        return meta

    def _arrays(self, path: Path, meta: dict[str, Any]) -> list[np.ndarray]:
        import orbax.checkpoint as ocp

        stored = [str(i) for i, leaf in enumerate(meta["leaves"]) if 0 not in leaf["shape"]]
        read: dict[str, Any] = {}
        if stored:
            how = ocp.args.PyTreeRestore(restore_args={i: ocp.RestoreArgs(restore_type=np.ndarray) for i in stored})
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
                read = reader.restore(path, ocp.args.Composite(arrays=how))["arrays"]
        arrays = []
        for i, leaf in enumerate(meta["leaves"]):
            array = read[str(i)] if str(i) in read else np.zeros(leaf["shape"], jnp.dtype(leaf["dtype"]))
            if str(array.dtype) != leaf["dtype"] or _checksum(array) != leaf["checksum"]:
                raise ValueError(f"{leaf['part']}{leaf['name']} does not have the checksum it was written with")
            arrays.append(array.reshape(leaf["shape"]))
        return arrays

    def _state(self, path: Path, meta: dict[str, Any], arrays: list[np.ndarray], template: Any) -> Any:
        stored = {leaf["name"]: array for leaf, array in zip(meta["leaves"], arrays, strict=True) if leaf["part"] == "state"}
        paths, structure = jax.tree_util.tree_flatten_with_path(template)
        wanted = {jax.tree_util.keystr(where): leaf for where, leaf in paths}
        then = {name: _shape(array) for name, array in stored.items()}
        now = {name: _shape(_global(leaf)) for name, leaf in wanted.items()}
        if then != now:
            differing = [n for n in dict.fromkeys((*now, *then)) if then.get(n) != now.get(n)]
            listed = "; ".join(f"state{n} was {then.get(n, 'absent')}, is now {now.get(n, 'absent')}" for n in differing[:6])
            raise CheckpointError(
                f"The checkpoint {str(path)!r} holds a state of another form: {listed}. It was written by bilevel "
                f"{meta['fingerprint'].get('package')}, this is {self.fingerprint.get('package')}. Give another directory, or delete this one."
            )
        return jax.tree_util.tree_unflatten(structure, [_placed(stored[name], leaf) for name, leaf in wanted.items()])

    def _history(self, meta: dict[str, Any], arrays: list[np.ndarray]) -> History:
        parts: dict[str, dict[str, np.ndarray]] = {"history": {}, "steps": {}, "state": {}}
        for leaf, array in zip(meta["leaves"], arrays, strict=True):
            parts[leaf["part"]][leaf["name"]] = array
        return History(parts["history"], parts["steps"])


def _placed(array: np.ndarray, like: Any) -> Any:
    """The array as the template's leaf is: its type, and on its devices."""
    if isinstance(like, jax.Array):
        value = jax.random.wrap_key_data(array, impl=jax.random.key_impl(like)) if _is_key(like) else jnp.asarray(array)
        return jax.device_put(value, like.sharding) if like.committed else value
    if isinstance(like, np.ndarray):
        return array
    if isinstance(like, np.generic):
        return array[()]
    return type(like)(array.item())
