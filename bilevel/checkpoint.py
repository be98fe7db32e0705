"""Checkpoints: a run that was killed goes on bit for bit as if it had not been.

A checkpoint is a directory `step_<n>` inside the run's directory. Its `arrays` is an orbax checkpoint with the leaves
of the solver's state and the history; its `run.json` has the run's fingerprint, the name, shape and dtype of each leaf,
and the size and checksum of each of orbax's files. It is written under another name and renamed when it is whole, so
that a process killed at any moment leaves the older checkpoints as they were. One run at a time has the directory
(`Checkpoints.held`), and it deletes what carries its mark: its own checkpoints, and what a killed save left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.captures import checksum, described, is_key, shape_text, whole
from bilevel.data import as_source
from bilevel.history import History
from bilevel.keys import StepKey
from bilevel.precision import WRAPPED, given_dtypes
from bilevel.problem import Problem
from bilevel.typing import PyTree, Solver

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["CheckpointError", "Checkpoints", "excerpts", "fingerprint", "placed"]

logger = logging.getLogger("bilevel")


class CheckpointError(ValueError):
    """A checkpoint directory cannot be used; the message says which, why, and what to do."""


# ---------------------------------------------------------------- what a run is


def fingerprint(problem: Problem, solver: Solver, x: PyTree, y: PyTree, base: StepKey) -> dict[str, str]:
    """What makes a run this run: equal at its start and resumption, different for another problem, solver, data or key.

    Args:
      problem: its functions go in by qualified name and by what they close over (not by their code), its data by kind,
        shapes, dtypes and a checksum of the contents (a `Stream`'s of its first item).
      solver: goes in by type and hyperparameters.
      x, y: the start, by structure, shapes, dtypes and checksum.
      base: the run's key.

    Returns:
      A dictionary that JSON can hold. The number of steps, the tolerance and the metrics are not in it. What
      `_ADVISORY` lists is only warned of when it differs.
    """
    found = {"package": _package_version(), "solver": _name(type(solver))}
    found |= _describe_fields("solver", solver)
    found["key"] = (
        f"{jax.random.key_impl(base.base)} {jax.random.key_data(base.base).tolist()}, "
        f"step {int(base.step)}, stream {int(base.stream)}"
    )
    for name, tree in (("x0", x), ("y0", y)):
        found[name] = str(jax.tree.structure(tree))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            where = name + jax.tree_util.keystr(path)
            found[f"{where} array"] = shape_text(leaf)
            found[f"start {where}"] = checksum(leaf)
    given = given_dtypes(problem, x, y)
    found |= {"dtype of x0": given[0], "dtype of y0": given[1]}
    for field in dataclasses.fields(problem):
        value = getattr(problem, field.name)
        if field.name in ("upper_data", "lower_data"):
            found |= _describe_data(field.name, value)
        else:
            found[field.name] = described(value)
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


def _name(cls: type) -> str:
    return cls.__qualname__.replace(".<locals>", "")


def _describe_fields(name: str, value: Any) -> dict[str, str]:
    """The hyperparameters, one entry each, so that a difference can be named."""
    found = {}
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}
    else:
        fields = dict(getattr(value, "__dict__", {}))
    for field, inner in fields.items():
        if getattr(type(inner), "__bilevel_hyperparameters__", False):
            found[f"{name}.{field}"] = _name(type(inner))
            found |= _describe_fields(f"{name}.{field}", inner)
        else:
            found[f"{name}.{field}"] = described(inner)
    return found


def _describe_data(name: str, data: Any) -> dict[str, str]:
    kind, settings, arrays, sampled = as_source(data).describe()
    options = ", ".join(f"{key}={described(value)}" for key, value in settings.items())
    found = {name: f"{kind}({options})" if options else kind}
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        where = name + jax.tree_util.keystr(path)
        found[f"{where} array"] = shape_text(leaf)
        found[f"first item of {where}" if sampled else f"{where} contents"] = checksum(leaf)
    return found


def _orbax() -> Any:
    """Orbax, imported where a run has checkpoints: it takes a second, and most runs have none."""
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError(
            "Checkpoints are written by orbax, which is not installed: pip install orbax-checkpoint."
        ) from error
    return orbax.checkpoint


def _alone() -> dict[str, Any]:
    """Options with which orbax writes or reads in this process without waiting for the others."""
    if jax.process_count() == 1:
        return {}
    me = jax.process_index()
    return {"multiprocessing_options": _orbax().options.MultiprocessingOptions(primary_host=me, active_processes={me})}


def _file_checksum(path: Path) -> str:
    content = path.read_bytes()
    return f"{len(content)} bytes, crc32:{zlib.crc32(content):08x}"


def _differences(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """What makes the other run a foreign one, as clauses; warnings of lesser things go to the log."""
    if then.get("solver") != now["solver"]:
        return [f"it was made with the solver {then.get('solver')}, this run uses {now['solver']}"]
    found = []
    # What takes x and y in their dtypes is wrapped where these are not the run's: the dtype has changed, and not it.
    dtypes = [name for name in now if name.startswith("dtype of ") and then.get(name, now[name]) != now[name]]
    for name in dict.fromkeys((*now, *then)):
        old, new = then.get(name), now.get(name)
        if name.startswith("dtype of ") and name not in dtypes:  # or it was not written down then
            continue
        if dtypes and name not in dtypes and any(str(text).startswith(WRAPPED) for text in (old, new)):
            continue
        if old == new or _number(old) == _number(new):
            continue
        advice = next(((prefix, text) for prefix, text in _ADVISORY if name.startswith(prefix)), None)
        if advice is not None:
            prefix, text = advice
            if text is not None and old is not None and new is not None:
                logger.warning("%s", text.format(name=name.removeprefix(prefix)))
        elif name.endswith(" contents"):
            array = name.removesuffix(" contents")
            if then.get(f"{array} array") == now.get(f"{array} array"):  # else its shape says so already
                found.append(f"{array} has changed: the checksum of its contents was {old}, is now {new}")
        else:
            old, new = ("absent" if text is None else text for text in (old, new))
            old, new = excerpts(old, new)
            name = f"the {name}" if name in dtypes else name
            found.append(f"{name.removesuffix(' array')} was {old}, is now {new}")
    return found


def _number(text: str | None) -> str | None:
    """The text with whole numbers as such: a schedule of optax makes 60.0 of its 60 when it is first called."""
    return text if text is None else re.sub(r"(?<![\w.])(-?\d+)\.0(?!\d)", r"\1", text)


def excerpts(old: str, new: str) -> tuple[str, str]:
    """Two texts, or of long ones (an optax chain) what stands where they differ."""
    same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), 0)
    start = max(0, same - 30)

    def cut(text: str) -> str:
        if len(text) <= 100:
            return text
        return ("..." if start else "") + text[start : start + 100] + ("..." if start + 100 < len(text) else "")

    return cut(old), cut(new)


# ---------------------------------------------------------------- the directory


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: orbax writes in threads, which an interrupt of this one would not end."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    caught: list[Any] = []
    signal.signal(signal.SIGINT, lambda *arguments: caught.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if caught:
            handler(*caught[0])


def _remove(folder: Path) -> None:
    """Delete a folder of ours, its mark last: what a process killed within leaves is still known as ours."""
    with contextlib.suppress(OSError):
        for inside in folder.iterdir():
            if inside.name != _MARK:
                shutil.rmtree(inside, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


_STEP = re.compile(r"step_(\d+)")
_LEFTOVER = re.compile(r"\.bilevel_(writing|trash)_.*")
_MARK = "made_by_bilevel"  # a file in such a folder, which holds the folder's name: without it, it is somebody else's
_LOCK = ".bilevel_lock"
_DESCRIPTION = "run.json"


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Have the directory for one run. The lock is the operating system's and goes with the process, however it ends.

    Raises:
      CheckpointError: another run has it; the message says which process.
    """
    path, held = directory / _LOCK, None
    while held is None and fcntl is not None:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read()
            file.close()
            if _is_gone(owner):  # a child that outlived it holds the file open: that one is no run
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
                continue
            raise CheckpointError(
                f"checkpoint={str(directory)!r} is in use by another run ({_owner(owner)}): two would delete each "
                "other's checkpoints. Give each run a directory of its own, or wait until that one has ended."
            ) from None
        except OSError as error:  # a file system without locks
            logger.warning("the checkpoint directory %s cannot be locked (%s)", directory, error.strerror or error)
            file.close()
            break
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:  # not one that was removed in between
                held = file
        if held is None:
            file.close()
    if held is not None:
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name in it
            held.truncate(0)
            held.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.ctime()}))
            held.flush()
    try:
        yield
    finally:
        if held is not None:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            with contextlib.suppress(OSError):  # what could not be written above
                held.close()


def _said(owner: str) -> dict[str, Any]:
    """What a lock file says of its owner."""
    with contextlib.suppress(ValueError):
        found = json.loads(owner)
        if isinstance(found, dict):
            return found
    return {}


def _owner(owner: str) -> str:
    found = _said(owner)
    return f"process {found.get('pid', '?')} on {found.get('host', '?')}, since {found.get('since', '?')}"


def _is_gone(owner: str) -> bool:
    """Whether the lock's owner is a process of this machine that does not live any more."""
    found = _said(owner)
    if found.get("host") != socket.gethostname() or type(found.get("pid")) is not int:
        return False
    try:
        os.kill(found["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


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
        if not os.fspath(directory):
            raise CheckpointError("checkpoint='' names no directory: give the path of one, or None for no checkpoints.")
        self.path = Path(directory).expanduser().absolute()
        self.fingerprint, self.keep = fingerprint, keep
        self._torn: set[int] = set()
        self._beside: dict[str, np.ndarray] = {}  # of what was restored last
        _orbax()
        cure = "Give a directory that you may write to."
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"checkpoint={str(self.path)!r} is a file, and checkpoints are a directory. {cure}")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise CheckpointError(
                f"checkpoint={str(self.path)!r} cannot be written ({error.strerror or error}). {cure}"
            ) from error

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """For the time of the run: no other one has the directory, and what killed saves have left is cleared away.

        Raises:
          CheckpointError: another run has it.
        """
        with _lock(self.path) if jax.process_index() == 0 else contextlib.nullcontext():
            if jax.process_index() == 0:
                self._sweep()
            yield

    def restore(
        self, template: Any, step: int | None = None, up_to: int | None = None
    ) -> tuple[int, Any, History] | None:
        """The newest good checkpoint, or that of a step.

        Args:
          template: a state of the run's solver; gives the structure, and the devices that each array is put on.
          step: which one; None: the newest good one.
          up_to: no later one than this.

        Returns:
          `(step, state, history)`, or None where the directory holds no (such) checkpoint.

        Raises:
          CheckpointError: the newest readable one is another run's, or all are torn.
        """
        found = [s for s in self._found() if step in (None, s) and (up_to is None or s <= up_to)]
        for step in reversed(found):
            path = self.path / f"step_{step}"
            try:
                meta = self._description(path)
                foreign = _differences(meta["fingerprint"], self.fingerprint)
                if foreign:
                    break
                arrays = self._arrays(path, meta["leaves"])
            except Exception as error:  # whatever a half-written or half-copied directory can raise
                logger.warning("the checkpoint %s is torn and was skipped: %s", path, str(error)[:300])
                self._torn.add(step)
                continue
            parts = zip(meta["leaves"], arrays, strict=True)
            self._beside = {leaf["name"]: array for leaf, array in parts if leaf["part"] == "beside"}
            return step, self._state(path, meta, arrays, template), self._history(meta, arrays)
        else:
            if not found:
                return None
            raise CheckpointError(
                f"All checkpoints in {str(self.path)!r} are torn (steps {', '.join(map(str, found))}; the log says "
                "how). Delete the directory to start afresh, or give another one."
            )
        listed = "; ".join(foreign[:6]) + (f"; and {len(foreign) - 6} more" if len(foreign) > 6 else "")
        raise CheckpointError(
            f"The checkpoint {str(path)!r} is of another run: {listed}. Give another directory, or delete this one."
        )

    def drop(self, step: int) -> None:
        """Delete the checkpoint of a step, where there is one of this run."""
        path = self.path / f"step_{step}"
        if jax.process_index() == 0 and self._is_ours(path):
            self._discard(path)

    def beside_of(self, template: Any) -> Any:
        """What was saved beside the state that was restored last; None where it was of another form than this."""
        paths, structure = jax.tree_util.tree_flatten_with_path(template)
        names = [jax.tree_util.keystr(path) for path, _ in paths]
        if sorted(names) != sorted(self._beside):
            return None
        leaves = [(self._beside[name], leaf) for name, (_, leaf) in zip(names, paths, strict=True)]
        if any(shape_text(array) != shape_text(whole(leaf)) for array, leaf in leaves):
            return None
        return jax.tree_util.tree_unflatten(structure, [placed(array, leaf) for array, leaf in leaves])

    def save(self, step: int, state: Any, history: History, beside: Any = ()) -> None:
        """Write a checkpoint, then drop all but the newest `keep`; a Ctrl-C is let through when that is done.

        `beside` is what a run keeps that may go on without it: `beside_of` finds it again, where it is of that form.

        Raises:
          CheckpointError: it could not be written (a full disk, say). The older ones are as they were.
        """
        with _uninterrupted():
            self._save(step, state, history, beside)

    def _save(self, step: int, state: Any, history: History, beside: Any) -> None:
        named = [
            (part, jax.tree_util.keystr(path), whole(leaf))
            for part, tree in (("state", state), ("beside", beside))
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        ]
        steps = history.steps
        for name in history:
            named += [("history", name, history[name]), ("steps", name, steps[name])]
        # Orbax takes no array without elements: their shape, in the description, is all there is to keep.
        arrays = {str(i): a for i, (_, _, a) in enumerate(named) if a.size}
        failure: Exception | None = None
        if jax.process_index() == 0:
            try:
                self._write(step, named, arrays)
            except Exception as error:  # a full disk is an OSError here, and orbax's own errors there
                failure = error
                with contextlib.suppress(OSError):
                    self._sweep()
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"bilevel checkpoint {step}")
        if failure is not None:
            why = getattr(failure, "strerror", None) or " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
            raise CheckpointError(
                f"The checkpoint of step {step} could not be written to {str(self.path)!r} ({why}). Make room there, "
                "or give another directory."
            ) from failure

    def _write(self, step: int, named: list[tuple[str, str, np.ndarray]], arrays: dict[str, np.ndarray]) -> None:
        ocp = _orbax()
        self._sweep()  # of a save that was interrupted
        writing = self._folder("writing") / f"step_{step}"
        writing.mkdir()
        if arrays:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**_alone()), **_alone()) as writer:
                writer.save(writing / "arrays", args=ocp.args.PyTreeSave(arrays))
        description = {
            "step": int(step),
            "fingerprint": self.fingerprint,
            "leaves": [
                {"part": part, "name": name, "shape": list(a.shape), "dtype": str(a.dtype)} for part, name, a in named
            ],
            "files": {
                str(f.relative_to(writing)): _file_checksum(f) for f in sorted(writing.rglob("*")) if f.is_file()
            },
        }
        text = json.dumps(description, indent=1)
        (writing / _DESCRIPTION).write_text(f"{zlib.crc32(text.encode()):08x}\n{text}\n")
        path = self.path / f"step_{step}"
        if self._is_ours(path) or not _holds_anything(path):
            self._discard(path)
        else:
            aside = Path(tempfile.mkdtemp(prefix=f"was_step_{step}_", dir=self.path))
            path.rename(aside / path.name)
            logger.warning("%s was no checkpoint of this run and stood in its way: it is in %s now", path, aside)
        writing.rename(path)
        _remove(writing.parent)
        self._torn.discard(step)
        if len(found := self._found()) <= self.keep:
            return
        ours = [s for s in found if s not in self._torn and self._is_ours(self.path / f"step_{s}")]
        for old in ours[: -self.keep]:
            self._discard(self.path / f"step_{old}")

    def _folder(self, purpose: str) -> Path:
        """A new folder with our mark."""
        folder = Path(tempfile.mkdtemp(prefix=f".bilevel_{purpose}_", dir=self.path))
        (folder / _MARK).write_text(folder.name)
        return folder

    def _is_ours(self, path: Path) -> bool:
        """Whether this is a checkpoint of this run."""
        try:
            then = self._said(path)["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        advisory = tuple(prefix for prefix, _ in _ADVISORY)
        kept = lambda found: {k: _number(v) for k, v in found.items() if not k.startswith(advisory)}  # noqa: E731
        return isinstance(then, dict) and kept(then) == kept(self.fingerprint)

    def _found(self) -> list[int]:
        names = (_STEP.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def _sweep(self) -> None:
        for entry in self.path.iterdir():
            if _LEFTOVER.fullmatch(entry.name) and not entry.is_symlink():
                with contextlib.suppress(OSError, UnicodeDecodeError):
                    # Killed as early as it can be, a run leaves a folder without its mark, or with a part of it: those
                    # hold nothing else.
                    bare = all(inside.name == _MARK for inside in entry.iterdir())
                    mark = (entry / _MARK).read_text() if (entry / _MARK).exists() else ""
                    if mark == entry.name or (bare and entry.name.startswith(mark)):
                        _remove(entry)

    def _discard(self, path: Path) -> None:
        """Delete, renaming first: a process killed within leaves no half of a checkpoint under a checkpoint's name."""
        if path.exists():
            trash = self._folder("trash")
            path.rename(trash / path.name)
            _remove(trash)

    def _said(self, path: Path) -> dict[str, Any]:
        """What `run.json` says; an error where it is not as it was written."""
        checksum, _, text = (path / _DESCRIPTION).read_text(errors="replace").rstrip("\n").partition("\n")
        if checksum != f"{zlib.crc32(text.encode()):08x}":
            raise ValueError(f"{_DESCRIPTION} does not have the checksum it was written with")
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError(f"{_DESCRIPTION} is no description")
        return found

    def _description(self, path: Path) -> dict[str, Any]:
        """The same, and an error where a file that it lists is not as it was written."""
        description = self._said(path)
        for name, written in description["files"].items():
            if not (path / name).is_file():
                raise ValueError(f"{name} is missing")
            found = _file_checksum(path / name)
            if found != written:
                raise ValueError(f"{name} has {found}, it was written with {written}")
        return description

    def _arrays(self, path: Path, leaves: list[dict[str, Any]]) -> list[np.ndarray]:
        ocp = _orbax()
        stored = [str(i) for i, leaf in enumerate(leaves) if 0 not in leaf["shape"]]
        read: dict[str, Any] = {}
        if stored:
            how = ocp.args.PyTreeRestore(restore_args={i: ocp.RestoreArgs(restore_type=np.ndarray) for i in stored})
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**_alone()), **_alone()) as reader:
                read = reader.restore(path / "arrays", args=how)
        return [
            read[str(i)] if str(i) in read else np.zeros(leaf["shape"], jnp.dtype(leaf["dtype"]))
            for i, leaf in enumerate(leaves)
        ]

    def _state(self, path: Path, meta: dict[str, Any], arrays: list[np.ndarray], template: Any) -> Any:
        stored = {
            leaf["name"]: array for leaf, array in zip(meta["leaves"], arrays, strict=True) if leaf["part"] == "state"
        }
        paths, structure = jax.tree_util.tree_flatten_with_path(template)
        wanted = {jax.tree_util.keystr(where): leaf for where, leaf in paths}
        then = {name: shape_text(array) for name, array in stored.items()}
        now = {name: shape_text(whole(leaf)) for name, leaf in wanted.items()}
        if then != now:
            differing = [n for n in dict.fromkeys((*now, *then)) if then.get(n) != now.get(n)]
            listed = "; ".join(
                f"state{n} was {then.get(n, 'absent')}, is now {now.get(n, 'absent')}" for n in differing[:6]
            )
            raise CheckpointError(
                f"The checkpoint {str(path)!r} holds a state of another form: {listed}. It was written by "
                f"bilevel {meta['fingerprint'].get('package')}, this is {self.fingerprint.get('package')}. "
                "Give another directory, or delete this one."
            )
        return jax.tree_util.tree_unflatten(structure, [placed(stored[name], leaf) for name, leaf in wanted.items()])

    def _history(self, meta: dict[str, Any], arrays: list[np.ndarray]) -> History:
        parts: dict[str, dict[str, np.ndarray]] = {"history": {}, "steps": {}, "state": {}, "beside": {}}
        for leaf, array in zip(meta["leaves"], arrays, strict=True):
            parts[leaf["part"]][leaf["name"]] = array
        return History(parts["history"], parts["steps"])


def _holds_anything(path: Path) -> bool:
    """Whether there is a byte in any file of a folder."""
    return path.exists() and (not path.is_dir() or any(f.is_file() and f.stat().st_size for f in path.rglob("*")))


def placed(array: np.ndarray, like: Any) -> Any:
    """The array as the template's leaf is: its type, and on its devices."""
    if isinstance(like, jax.Array):
        value = (
            jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
            if is_key(like)
            else jnp.asarray(array)
        )
        if not like.is_fully_addressable:  # pieces on other processes, each of which has read the whole
            return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])
        return jax.device_put(value, like.sharding) if like.committed else value
    if isinstance(like, np.ndarray):
        return array
    if isinstance(like, np.generic):
        return array[()]
    return type(like)(array.item())
