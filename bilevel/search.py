"""The fourth front door: a proposer without gradients above a continuous problem that gradients solve."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import logging
import math
import numbers
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel._arguments import explained, explained_class
from bilevel.captures import Captured, Functions, described, described_apart, taken
from bilevel.checkpoint import CheckpointError, excerpts
from bilevel.history import History
from bilevel.keys import as_step_key
from bilevel.lower import LevenbergMarquardt
from bilevel.lower.accurate import minimise
from bilevel.progress import reporter
from bilevel.proposers.expressions import Refused
from bilevel.proposers.trials import Proposer, Trial, best_of, decoded, encoded, short_error
from bilevel.result import Result
from bilevel.typing import PyTree

__all__ = ["Discovery", "LowerProblem", "search"]

logger = logging.getLogger("bilevel")


@explained_class
@dataclasses.dataclass(frozen=True, eq=False)
class LowerProblem:
    """The continuous problem below a proposal: what `problem_of(proposal)` returns.

        LowerProblem(start, residuals=r)             least squares: the lower loss is the sum of squares of r(y)
        LowerProblem(start, loss=f)                  any smooth scalar f(y)

    Functions take y, then `data` where there is any, then `shared` where there is any. Proposals whose functions are
    the
    same objects, and whose start and data have the same shapes, are solved together, in one compiled and vmapped
    program: so put what differs between proposals into `data` (a register program, a graph's matrix) and what all of
    them see into `shared` (a trajectory), and close over neither.

    Attributes:
      start: y where the solver begins, a tree of numbers in the user's units.
      residuals, loss: one of the two.
      lower, upper: bounds of y, trees like it or numbers; None: none.
      transform: `"log"`, `"logit"` or None, as `lower.LevenbergMarquardt` has it; with `residuals` only.
      data, shared: what differs between proposals, and what does not.
      prepare: `(data[, shared]) -> data`, what does not depend on y, computed once before the solve.
      score: the upper loss where it is another one than the lower loss: the same arguments, a scalar.
    """

    start: PyTree
    residuals: Callable[..., PyTree] | None = None
    loss: Callable[..., Any] | None = None
    lower: PyTree = None
    upper: PyTree = None
    transform: PyTree = None
    data: PyTree = None
    shared: PyTree = None
    prepare: Callable[..., PyTree] | None = None
    score: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if (self.residuals is None) == (self.loss is None):
            raise ValueError("LowerProblem needs one of residuals (a sum of squares) and loss (a scalar), not both.")
        if self.loss is not None and self.transform is not None:
            raise ValueError(
                "LowerProblem(loss=..., transform=...): transforms are for residuals; bounds work for both."
            )


@dataclasses.dataclass(frozen=True)
class Discovery:
    """What a search found.

    Attributes:
      trials: all of them, in the order of the run.
      finalists: the best ones, solved again by `final_problem_of` and sorted by that loss; empty without it.
      result: `STOPPED` where the target was reached or patience ended, `MAX_STEPS` where a budget was spent,
        `INTERRUPTED`. A search has no certificate, and is never `CONVERGED`.
      reason: why it ended, in a sentence.
      seconds: of all runs that led here, resumed ones included.
      tokens: that the proposer says it has spent.
    """

    trials: tuple[Trial, ...]
    finalists: tuple[Trial, ...]
    result: Result
    reason: str
    seconds: float
    tokens: int = 0

    @property
    def best(self) -> Trial:
        """The finalist, or trial, of least loss."""
        found = best_of(self.finalists or self.trials, 1)
        if not found:
            errors = {t.error for t in self.finalists or self.trials}
            which = f"All {len(self.finalists)} finalists" if self.finalists else f"All {len(self.trials)} trials"
            raise ValueError(f"{which} failed. " + (f"One of the errors: {min(errors)}" if errors else self.reason))
        return found[0]

    def ranked(self, count: int = 10) -> list[Trial]:
        """The best trials (finalists where there are any), one of each proposal."""
        return best_of(self.finalists or self.trials, count)

    def front(self) -> list[Trial]:
        """The Pareto front of loss and complexity: each is the best among trials that are as simple or simpler."""
        front: list[Trial] = []
        for trial in sorted((t for t in self.trials if not t.failed), key=lambda t: (t.complexity, t.loss)):
            if not front or trial.loss < front[-1].loss:
                front.append(trial)
        return front

    @property
    def history(self) -> History:
        """`loss` and the least so far, `best_loss`, by evaluation."""
        loss = np.array([t.loss for t in self.trials], float)
        steps = np.arange(len(loss))
        values = {"loss": loss, "best_loss": np.minimum.accumulate(loss) if len(loss) else loss}
        return History(values, dict.fromkeys(values, steps))

    def to_frame(self) -> Any:
        """A pandas data frame, one row a trial (needs pandas)."""
        import pandas as pd

        rows = [
            {
                "round": t.round,
                "proposal": str(t.proposal),
                "loss": t.loss,
                "complexity": t.complexity,
                "y": None if t.y is None else [float(v) for leaf in jax.tree.leaves(t.y) for v in np.ravel(leaf)],
                "error": t.error,
            }
            for t in self.trials
        ]
        columns = ["round", "proposal", "loss", "complexity", "y", "error"]
        return pd.DataFrame(rows, columns=columns).rename_axis("trial")

    def plot(self, path: Any = None) -> Any:
        """Draw the losses and the least so far over evaluations; returns the matplotlib figure."""
        from bilevel.plot import plot_history

        return plot_history(self.history, names=["best_loss", "loss"], path=path, title="search")

    def __repr__(self) -> str:
        failed = sum(t.failed for t in self.trials)
        lines = [f"{len(self.trials)} trials in {self.seconds:.1f} s, {failed} failed. {self.reason}"]
        lines += [f"  {trial!r}" for trial in self.ranked(3)]
        if failed and failed == len(self.trials):
            error, count = Counter(trial.error for trial in self.trials).most_common(1)[0]
            lines.append(f"  None was solved; of {count}: {error or 'the loss was not finite'}")
        return "\n".join(lines)


@explained
def search(
    problem_of: Callable[[Any], Any],
    proposer: Proposer,
    *,
    evaluations: int = 1000,
    batch: int = 64,
    seconds: float | None = None,
    tokens: int | None = None,
    target: float | None = None,
    patience: int | None = None,
    solver: Any = None,
    final_problem_of: Callable[[Trial], Any] | None = None,
    finalists: int = 5,
    key: int | jax.Array = 0,
    checkpoint: Any = None,
    callback: Callable[[list[Trial]], Any] | None = None,
    progress: bool | None = None,
) -> Discovery:
    """Let a proposer choose, and solve a continuous problem below each choice.

        found = search(problem_of, GrammarProposer(Grammar(("I1", "J"))), evaluations=1024, batch=256)

    Each round asks for `batch` proposals, states their lower problems, solves those of one shape in one compiled
    program, and tells the results. A trial that fails (its problem cannot be stated, its loss is not finite) keeps a
    short
    error and an infinite loss; it never ends the run.

    Args:
      problem_of: `proposal -> LowerProblem`; with a `solver` of your own, whatever that takes.
      proposer: `ask(history, count, key)` and `tell(results)`; see `bilevel.proposers`.
      evaluations: the budget of trials.
      batch: proposals per round.
      seconds, tokens: further budgets, looked at after each round (a round is not cut); None: none.
      target: ends once a loss is at most this.
      patience: ends after as many trials without a smaller loss.
      solver: a `lower.LevenbergMarquardt` with other settings, or any function `(problem, key) -> (loss, y)` that is
        called once per proposal on the host, for lower levels of another kind (a whole `solve`, a cross-validation).
      final_problem_of: `trial -> LowerProblem`, a dearer and truer problem for the `finalists` best trials at the
        end; it may
        start at `trial.y`.
      key: the run's; round r's is `fold_in(key, r)`.
      checkpoint: a folder; each round is written there as it ends, and a run that was killed goes on from the last
        whole round, exactly where its proposer follows from history and key.
      callback: called with each round's trials; ends the run where it returns True.
      progress: a bar; None: on a terminal.

    Returns:
      A `Discovery`.

    Raises:
      TypeError, ValueError: an argument, by name, before the first compile.
      CheckpointError: the folder belongs to another run, or a proposal cannot be written.
    """
    _check_arguments(problem_of, proposer, evaluations, batch, finalists, solver, seconds, tokens, target, patience)
    base = as_step_key(key).random
    solver = LevenbergMarquardt() if solver is None else solver
    log = None
    if checkpoint is not None:
        log = _Log(Path(checkpoint), _describe(problem_of, proposer, solver, base, batch))
    trials, before = ([], 0.0) if log is None else log.read()
    for number in sorted({t.round for t in trials}):
        proposer.tell([t for t in trials if t.round == number])
    solve_all = _Solves(solver)
    began, round_ = time.perf_counter(), (trials[-1].round + 1 if trials else 0)
    spent = lambda: before + time.perf_counter() - began  # noqa: E731
    result, reason = Result.MAX_STEPS, ""
    last: tuple[Trial, ...] = ()
    try:
        with reporter(evaluations, len(trials), progress) as bar:
            while not (ended := _ended(trials, proposer, spent(), evaluations, seconds, tokens, target, patience)):
                key_now = jax.random.fold_in(base, round_)
                count = min(batch, evaluations - len(trials))
                proposals = _asked(proposer, tuple(trials), count, key_now)
                if not proposals:
                    ended = (Result.STOPPED, "The proposer has no more proposals.")
                    break
                new = solve_all(problem_of, proposals, len(trials), round_, key_now)
                if log is not None:
                    log.write(new, spent())
                trials += new
                proposer.tell(new)
                round_ += 1
                best = best_of(trials, 1)
                bar.update(len(trials), History({"best_loss": np.array([best[0].loss if best else math.inf])}))
                if callback is not None and callback(new):
                    ended = (Result.STOPPED, "The callback ended it.")
                    break
            result, reason = ended
        if final_problem_of is not None:
            chosen = best_of(trials, finalists)
            found = solve_all(final_problem_of, chosen, 0, round_, jax.random.fold_in(base, _FINAL))
            found = [dataclasses.replace(t, number=c.number, round=c.round) for t, c in zip(found, chosen, strict=True)]
            last = tuple(sorted(found, key=lambda t: t.loss))
    except KeyboardInterrupt:
        result, reason = Result.INTERRUPTED, "It was interrupted from the keyboard."
    spent_tokens = int(getattr(proposer, "tokens", 0) or 0)
    return Discovery(tuple(trials), last, result, reason, spent(), spent_tokens)


# A proposer has a round's key as it is; what is solved by, and finalists, are drawn apart from it.
_SOLVE, _FINAL = 2**31 + 1, 2**31 + 2


def _check_arguments(
    problem_of: Any, proposer: Any, evaluations: int, batch: int, finalists: int, solver: Any,
    seconds: Any, tokens: Any, target: Any, patience: Any,
) -> None:  # fmt: skip
    if not callable(problem_of):
        raise TypeError(f"search(problem_of=...): a function of a proposal is needed, not {type(problem_of).__name__}.")
    if isinstance(proposer, type):
        raise TypeError(
            f"search(proposer={proposer.__name__}): this is the class; make one of it, {proposer.__name__}(...)."
        )
    if missing := [name for name in ("ask", "tell") if not callable(getattr(proposer, name, None))]:
        raise TypeError(
            f"search(proposer=...): {type(proposer).__name__} has no method {' and no '.join(missing)}. A proposer has "
            "ask(history, count, key) and tell(results)."
        )
    for name, given in (("ask", ("history", "count", "key")), ("tell", ("results",))):
        with contextlib.suppress(ValueError):  # what has no signature, as some that C code made
            try:
                inspect.signature(getattr(proposer, name)).bind(*given)
            except TypeError as error:
                raise TypeError(
                    f"search(proposer=...): {type(proposer).__name__}.{name} is called as {name}({', '.join(given)}), "
                    f"and cannot be: {error}."
                ) from None
    counts = [("evaluations", evaluations), ("batch", batch), ("finalists", finalists)]
    for name, value in counts + [("patience", patience)] * (patience is not None):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"search({name}={value!r}): a positive integer is needed.")
    for name, value in (("seconds", seconds), ("tokens", tokens), ("target", target)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Real) or value != value):
            raise TypeError(f"search({name}={value!r}): a number or None is needed.")
    if not (solver is None or callable(solver)):
        raise TypeError("search(solver=...): a lower.LevenbergMarquardt or a function (problem, key) -> (loss, y).")


def _asked(proposer: Proposer, history: tuple[Trial, ...], count: int, key: jax.Array) -> list[Any]:
    """The proposer's answer as a list, apart from what it may change in it afterwards."""
    answer = proposer.ask(history, count, key)
    if answer is None or isinstance(answer, (str, bytes, Mapping)) or not isinstance(answer, Iterable):
        raise TypeError(
            f"search(proposer=...): {type(proposer).__name__}.ask returned something of type {type(answer).__name__}; "
            "a list of proposals is needed, and an empty one ends the run."
        )
    held = (dict, list, tuple, np.ndarray)
    return [copy.deepcopy(p) if isinstance(p, held) else p for p in itertools.islice(answer, count)]


def _ended(
    trials: list[Trial],
    proposer: Proposer,
    spent: float,
    evaluations: int,
    seconds: float | None,
    tokens: int | None,
    target: float | None,
    patience: int | None,
) -> tuple[Result, str] | None:
    """Whether the run is over, and why."""
    best = best_of(trials, 1)
    if best and target is not None and best[0].loss <= target:
        return Result.STOPPED, f"A loss of {best[0].loss:.3g} is within the target {target:.3g}."
    since = len(trials) - 1 - best[0].number if best else len(trials)
    if patience is not None and since >= patience:
        return Result.STOPPED, f"The last {since} trials had no smaller loss."
    if len(trials) >= evaluations:
        return Result.MAX_STEPS, f"The budget of {evaluations} evaluations is spent."
    if seconds is not None and spent >= seconds:
        return Result.MAX_STEPS, f"The budget of {seconds:g} s is spent."
    if tokens is not None and (used := int(getattr(proposer, "tokens", 0) or 0)) >= tokens:
        return Result.MAX_STEPS, f"The budget of {tokens} tokens is spent ({used})."
    return None


# ---------------------------------------------------------------- the lower solves


class _Solves:
    """The lower problems of a round, those of one shape in one compiled program."""

    def __init__(self, solver: Any) -> None:
        self.solver = solver
        self.together = isinstance(solver, LevenbergMarquardt)

    def __call__(
        self, problem_of: Callable[..., Any], proposals: Sequence[Any], first: int, round_: int, key: jax.Array
    ) -> list[Trial]:
        found: list[tuple[float, PyTree, str, Any]] = [(math.inf, None, "", ())] * len(proposals)
        groups: dict[Any, list[tuple[int, LowerProblem]]] = {}
        for i, proposal in enumerate(proposals):
            if isinstance(proposal, Refused):
                found[i] = (math.inf, None, short_error(proposal.reason), ())
                continue
            try:
                problem = problem_of(proposal)
                if not self.together:
                    found[i] = (
                        *_answer(self.solver(problem, jax.random.fold_in(jax.random.fold_in(key, _SOLVE), i))),
                        "",
                        (),
                    )
                elif not isinstance(problem, LowerProblem):
                    raise TypeError(f"problem_of returned a {type(problem).__name__}, and not a LowerProblem")
                else:
                    problem = _arrays(problem, self.solver)
                    groups.setdefault(_shape(problem), []).append((i, problem))
            except Exception as error:  # whatever a proposal leads to is that trial's failure
                logger.debug("Trial %d failed.", first + i, exc_info=True)
                found[i] = (math.inf, None, short_error(error), ())
        for members in groups.values():
            try:
                solved = self._group([problem for _, problem in members])
            except Exception as error:
                logger.debug("A group of %d trials failed.", len(members), exc_info=True)
                solved = [(math.inf, None, short_error(error), ())] * len(members)
            for (i, _), outcome in zip(members, solved, strict=True):
                found[i] = outcome
        trials = []
        for i, (proposal, (loss, y, why, curve)) in enumerate(zip(proposals, found, strict=True)):
            if not math.isfinite(loss):
                loss, y, why = math.inf, None, why or "the loss is not finite"
            proposal = proposal.proposal if isinstance(proposal, Trial) else proposal
            trials.append(Trial(first + i, round_, proposal, loss, y, why, tuple(map(float, curve))))
        return trials

    def _group(self, problems: list[LowerProblem]) -> list[tuple[float, PyTree, str, Any]]:
        count, one = len(problems), problems[0]
        # Sizes are rounded up to powers of two, so that a run meets few of them, and each is compiled once.
        padded = problems + [one] * (2 ** math.ceil(math.log2(count)) - count)
        stack = lambda name: jax.tree.map(lambda *a: np.stack(a), *(getattr(p, name) for p in padded))  # noqa: E731
        solver = self.solver
        if one.transform is not None:
            solver = dataclasses.replace(solver, transform=one.transform)
        parts = tuple(stack(name) for name in ("start", "lower", "upper", "data"))
        bounded = any(np.isfinite(b).any() for p in padded for b in jax.tree.leaves((p.lower, p.upper)))
        functions = Functions({name: getattr(one, name) for name in _FUNCTIONS})
        loss, y, curve = jax.tree.map(np.asarray, _solve_many(functions, bounded, solver, one.shared, *parts))
        return [(float(loss[i]), jax.tree.map(lambda a, i=i: a[i], y), "", curve[i]) for i in range(count)]


def _answer(answer: Any) -> tuple[float, PyTree]:
    """What a solver of the user's returned."""
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        raise TypeError(f"the solver returned something of type {type(answer).__name__}, and not (loss, y)")
    if np.ndim(answer[0]) > 0 and np.size(answer[0]) != 1:
        raise TypeError(f"the solver's loss has the shape {np.shape(answer[0])}, and is no number")
    y = jax.tree.map(lambda a: np.array(a) if isinstance(a, np.ndarray) else a, answer[1])  # which it may go on using
    return float(np.reshape(answer[0], ())), y


_FUNCTIONS = ("residuals", "loss", "score", "prepare")


def _arrays(problem: LowerProblem, solver: LevenbergMarquardt) -> LowerProblem:
    """The problem with arrays of its own for leaves, its bounds (or the solver's) spread over its start, its start
    checked, and its functions with what they capture as it is now."""
    if problem.loss is not None and solver.transform is not None:
        raise ValueError(
            "a LevenbergMarquardt with a transform is for residuals, and this problem has a loss: give it bounds"
        )
    start = jax.tree.map(lambda a: np.array(a, jnp.result_type(float, a)), problem.start)
    spread = {}
    for name, default in (("lower", -np.inf), ("upper", np.inf)):
        bound = next((b for b in (getattr(problem, name), getattr(solver, name)) if b is not None), default)
        if jax.tree.structure(bound) != jax.tree.structure(start):  # type: ignore[operator]
            if jax.tree.structure(bound) != jax.tree.structure(0):  # type: ignore[operator]
                raise ValueError(f"{name}= has another structure than the start: one number, or one for each part of y")
            bound = jax.tree.map(lambda a, b=bound: b, start)
        spread[name] = jax.tree.map(lambda a, b: np.broadcast_to(np.array(b, a.dtype), a.shape), start, bound)
    for y, low, high in zip(*map(jax.tree.leaves, (start, spread["lower"], spread["upper"])), strict=True):
        if not (np.isfinite(y).all() and (low <= y).all() and (y <= high).all()):
            raise ValueError("the start is not finite or outside its bounds")
    dtype = jnp.result_type(float)
    narrowed = lambda a: a.astype(dtype) if a.dtype.kind == "f" else a  # noqa: E731
    data = jax.tree.map(lambda a: narrowed(np.array(a)), problem.data)
    apart = {name: taken(getattr(problem, name)) for name in _FUNCTIONS}
    return dataclasses.replace(problem, start=start, data=data, **spread, **apart)


def _held(fn: Any) -> Any:
    """What a function is and captures, to be compared."""
    if not isinstance(fn, Captured):
        return fn
    digests = (hashlib.blake2b(np.asarray(leaf).tobytes()).digest() for leaf in jax.tree.leaves(fn))
    return fn.kind, tuple(digests)


def _shape(problem: LowerProblem) -> Any:
    """What problems that are solved together have in common."""
    shapes = lambda tree: (jax.tree.structure(tree), tuple((a.shape, str(a.dtype)) for a in jax.tree.leaves(tree)))  # noqa: E731
    shared = tuple(map(id, jax.tree.leaves(problem.shared))), jax.tree.structure(problem.shared)
    functions = tuple(_held(getattr(problem, name)) for name in _FUNCTIONS)
    return functions, str(problem.transform), shared, shapes(problem.start), shapes(problem.data)


@functools.partial(jax.jit, static_argnames="bounded")
def _solve_many(
    functions: Functions, bounded: bool, solver: Any, shared: PyTree, start: PyTree, low: PyTree, high: PyTree,
    data: PyTree,
) -> Any:  # fmt: skip
    residuals, loss, score, prepare = (functions.by_name[name] for name in _FUNCTIONS)

    def one(start: PyTree, low: PyTree, high: PyTree, data: PyTree) -> Any:
        if prepare is not None:
            data = prepare(*_given(data, shared))
        given = _given(data, shared)
        if not jax.tree.leaves(start):
            value, y, curve = _total(residuals, loss, start, given), start, jnp.zeros(0)
        elif residuals is not None:
            fit = solver.fit(lambda y: residuals(y, *given), start, low, high)
            value, y, curve = fit.loss, fit.y, fit.curve
        else:
            clip = (lambda y: jax.tree.map(jnp.clip, y, low, high)) if bounded else None
            y = minimise(lambda y: loss(y, *given), start, project=clip, steps=10 * solver.steps, tol=1e-6)
            value, curve = loss(y, *given), jnp.zeros(0)
        if score is not None:
            value = jnp.where(jnp.isfinite(value), score(y, *given), jnp.inf)
        return value, y, curve

    return jax.vmap(one)(start, low, high, data)


def _given(*parts: PyTree) -> tuple[PyTree, ...]:
    return tuple(part for part in parts if part is not None)


def _total(residuals: Any, loss: Any, y: PyTree, given: tuple[PyTree, ...]) -> Any:
    if loss is not None:
        return loss(y, *given)
    return sum(jnp.sum(jnp.square(r)) for r in jax.tree.leaves(residuals(y, *given)))


# ---------------------------------------------------------------- the log of a run


def _describe(problem_of: Any, proposer: Any, solver: Any, base: jax.Array, batch: int) -> dict[str, Any]:
    """What makes a run this run. Of a proposer's attributes those go in that are settings, and not where it stands."""
    found: dict[str, Any] = {"format": 2, "proposer": type(proposer).__qualname__}
    settings = getattr(proposer, "settings", None)
    if callable(settings):
        found |= {f"proposer's {name}": described(value) for name, value in settings().items()}
    elif (made := getattr(proposer, "__dataclass_params__", None)) is not None and made.frozen:
        found |= {f"proposer's {f.name}": described(getattr(proposer, f.name)) for f in dataclasses.fields(proposer)}
    for name, function in (("problem_of", problem_of), ("solver", solver)):
        found[name], held = described_apart(function)
        found |= {f"{name}'s {path}": text for path, text in held.items()}
    return found | {"key": np.asarray(jax.random.key_data(base)).tolist(), "batch": batch}


class _Log:
    """Trials as lines of JSON: a round is its trials and a line that ends it; what is after the last such line is
    void."""

    def __init__(self, folder: Path, run: dict[str, Any]) -> None:
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"search(checkpoint={str(folder)!r}): this is a file, and a folder is needed.")
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.run = folder / "trials.jsonl", run

    def read(self) -> tuple[list[Trial], float]:
        """The trials of all whole rounds, and the seconds that they took; the file is cut after them."""
        if not self.path.exists():
            self._append([{"run": self.run}])
            return [], 0.0
        trials: list[Trial] = []
        pending: list[Trial] = []
        seconds, at, whole = 0.0, 0, 0  # bytes read, and bytes up to the end of the last whole round
        with open(self.path, "rb") as file:
            for number, line in enumerate(file):
                at += len(line)
                try:
                    row = json.loads(line)
                    if number == 0:
                        self._same(row.get("run"))
                    elif "end" not in row:
                        pending.append(_trial(row))
                        continue
                    else:
                        trials, pending, seconds = trials + pending, [], float(row["end"])
                    whole = at
                except CheckpointError:
                    raise
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    if not line.endswith(b"\n"):
                        break  # a line that was being written when the process was killed
                    raise CheckpointError(
                        f"{self.path}, line {number + 1}, is damaged ({short_error(error)}). Move the folder away to "
                        "start anew, or cut the file before that line to go on from there."
                    ) from None
        with open(self.path, "r+b") as file:
            file.truncate(whole)
        if not whole:
            self._append([{"run": self.run}])
        return trials, seconds

    def _same(self, then: Any) -> None:
        if not isinstance(then, dict):
            raise CheckpointError(f"{self.path} is no log of a search. Give search another folder.")
        # What one of the two alone holds is no difference: lists and tables that a function keeps grow as it is called.
        always = [name for name in self.run if "'s " not in name or name.startswith("proposer")]
        names = [*always, *(name for name in self.run if name not in always and name in then)]
        if differ := [name for name in names if then.get(name) != self.run[name]]:
            name = differ[0]
            old, new = excerpts(str(then.get(name)), str(self.run[name]))
            raise CheckpointError(
                f"{self.path} belongs to another run: its {name} is {old} and this run's {new}. Give search another "
                f"folder, or the same {name}."
            )

    def write(self, trials: list[Trial], seconds: float) -> None:
        """Append a whole round, and see it onto the disk."""
        rows = []
        for t in trials:
            try:
                parts = {"proposal": encoded(t.proposal), "y": encoded(t.y)}
            except TypeError as error:
                raise CheckpointError(
                    f"search(checkpoint=...): {error}. Proposals and y are expressions, numbers, texts, arrays, and "
                    "lists, tuples and dictionaries of these."
                ) from None
            curve = [encoded(v) for v in t.curve]
            rows.append(
                {"n": t.number, "round": t.round, "loss": encoded(t.loss), "error": t.error, "curve": curve, **parts}
            )
        self._append([*rows, {"end": seconds}])

    def _append(self, rows: list[dict[str, Any]]) -> None:
        with open(self.path, "ab") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())


def _trial(row: dict[str, Any]) -> Trial:
    curve = tuple(decoded(row["curve"]))
    return Trial(
        row["n"], row["round"], decoded(row["proposal"]), decoded(row["loss"]), decoded(row["y"]), row["error"], curve
    )
