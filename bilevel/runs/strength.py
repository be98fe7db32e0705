"""How strongly to regularise: adapt the strength during a run, or try several and keep the best."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic

import jax
import jax.numpy as jnp

from bilevel._arguments import explained
from bilevel.checkpoint import Checkpoints, fingerprint
from bilevel.keys import StepKey, as_step_key
from bilevel.optimizers import check_count
from bilevel.precision import working
from bilevel.problem import Problem, as_variable
from bilevel.recorder import Event
from bilevel.result import Result
from bilevel.runs.early_stopping import Decision, EarlyStopping, Monitor
from bilevel.solution import Solution
from bilevel.solve import solve
from bilevel.typing import PyTree, Solver, X, Y

logger = logging.getLogger("bilevel")


class _OfSolution:
    """x and y of what holds a `solution`."""

    solution: Any

    @property
    def x(self) -> PyTree:
        """The solution's upper variable."""
        return self.solution.x

    @property
    def y(self) -> PyTree:
        """The solution's lower variable."""
        return self.solution.y


@dataclasses.dataclass(frozen=True)
class Adaptive(_OfSolution, Generic[X, Y]):
    """What `adaptive` did.

    Attributes:
      solution: the last run's `Solution`; its history is that of the path taken, without what was rolled back.
      strengths: the strengths, in the order used.
      decisions: why each but the last was left.
      rolled_back_to: the step that each of those went back to.
    """

    solution: Solution[X, Y]
    strengths: tuple[float, ...]
    decisions: tuple[Decision, ...]
    rolled_back_to: tuple[int, ...]

    def __repr__(self) -> str:
        path = f"strength {self.strengths[0]:g}"
        for strength, decision, step in zip(self.strengths[1:], self.decisions, self.rolled_back_to, strict=True):
            path += f"; at epoch {decision.decided_at:g} back to step {step} with {strength:g}"
        return f"Adaptive({path})\n{self.solution!r}"


@explained
def adaptive(
    problem: Problem[X, Y],
    x0: X,
    y0: Y,
    solver: Callable[[float], Solver],
    strength: float,
    *,
    eigenvalue: Any,
    largest: float,
    steps: int,
    every: int,
    rule: EarlyStopping | None = None,
    steps_per_epoch: float = 1,
    factor: float = 10.0,
    metrics: dict[str, Any] | None = None,
    key: int | jax.Array | StepKey = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: Callable[[Event[X, Y]], Any] | None = None,
    **options: Any,
) -> Adaptive[X, Y]:
    """Search with a regularisation that grows, and take back what was done with too little of it (DARTS-ADA).

    The run is watched by an `EarlyStopping` rule. Where it fires, everything (x, y, the optimisers' memories, the
    history of eigenvalues) is set back to the evaluation that the rule names, the strength is multiplied by `factor`,
    at most to `largest`, and the run goes on to the same number of steps. Steps keep their numbers: schedules and
    batches go on as if nothing had happened. With `largest` the run is no longer watched.

        adaptive(problem, x0, y0, lambda wd: solvers.DARTS(weight_decay=wd), 3e-4, largest=3e-2,
                 eigenvalue=(curvature.dominant_eigenvalue(validation_loss), batch),
                 rule=EarlyStopping.code(), steps_per_epoch=100, steps=5000, every=200)

    Args:
      problem, x0, y0: as in `solve`.
      solver: `strength -> solver`; the solvers differ in numbers only, so that their states are alike. If the number is
        a leaf (`DARTS(weight_decay=...)`), all of it is one compiled program.
      strength: the first one.
      eigenvalue: the metric to watch, a function of (x, y) or a pair (function, data), as in `solve`.
      largest: the last strength (the authors' script: 0.03, from 3e-4, with factor 10).
      steps: outer steps in total.
      every: outer steps between two evaluations; each leaves a checkpoint.
      rule: None: `EarlyStopping.code()`. It does not fire at the end of the run.
      steps_per_epoch: outer steps in what the rule calls an epoch.
      factor: what the strength is multiplied by.
      metrics: further metrics for `solve`.
      key: as in `solve`.
      checkpoint: a directory; an interrupted call then goes on from there. None: a temporary one.
      callback: as in `solve`, every `every` steps; returning something true ends it all.
      options: more arguments of `solve`, such as `progress`.

    Returns:
      An `Adaptive`. A run that diverges or is interrupted is returned as it ended.

    Reference: Zela et al., "Understanding and Robustifying Differentiable Architecture Search", ICLR 2020, section 5
    (there the regularisation is the lower level's weight decay).
    """
    if not callable(solver) or hasattr(solver, "step"):
        raise TypeError(
            "adaptive takes a function strength -> solver, such as lambda wd: solvers.DARTS(weight_decay=wd)."
        )
    if not factor > 1:
        raise ValueError(f"adaptive(factor={factor!r}): the strength grows by a factor above 1.")
    if not 0 < strength <= largest:
        raise ValueError(f"adaptive(strength={strength!r}, largest={largest!r}): needed is 0 < strength <= largest.")
    check_count("adaptive", steps=steps, every=every)
    if not steps_per_epoch > 0:
        raise ValueError(f"adaptive(steps_per_epoch={steps_per_epoch!r}): a positive number is needed.")
    for name in ("metrics_every", "callback_every", "checkpoint_every", "checkpoint_keep", "solver"):
        if name in options:
            raise TypeError(f"adaptive sets solve's {name} itself: give every=... alone.")
    monitor = Monitor(
        EarlyStopping.code() if rule is None else rule,
        steps_per_epoch=steps_per_epoch,
        total=steps / steps_per_epoch + 1,  # the rule then abstains at the end alone: there is nothing left to save
    )
    options |= {"steps": steps, "key": key, "metrics": {monitor.metric: eigenvalue, **(metrics or {})}}
    options |= {"metrics_every": every, "callback_every": every, "checkpoint_every": every}
    options |= {"checkpoint_keep": -(-steps // every) + 1}
    where = tempfile.TemporaryDirectory() if checkpoint is None else contextlib.nullcontext(checkpoint)
    with where as directory:
        points = _Points(problem, x0, y0, solver, key, Path(directory), options["checkpoint_keep"])
        return _follow(points, monitor, strength, largest, factor, callback, options)


@dataclasses.dataclass(frozen=True)
class _Points:
    """Where the runs of one path leave their checkpoints: the run with strength number i in `strength_<i>`."""

    problem: Problem
    x0: PyTree
    y0: PyTree
    solver: Callable[[float], Solver]
    key: Any
    directory: Path
    keep: int

    def path(self, number: int) -> Path:
        """The directory of a run."""
        return self.directory / f"strength_{number}"

    def of(self, number: int, strength: float) -> Checkpoints:
        """The checkpoints of a run."""
        x, y = as_variable("x0", self.x0), as_variable("y0", self.y0)
        found = working(jax.tree.map(jnp.asarray, self.problem.captured(x, y)), x, y)
        start = found.problem.projected(found.x, found.y)
        what = fingerprint(found.problem, self.solver(strength), *start, as_step_key(self.key))
        return Checkpoints(self.path(number), what, self.keep)

    def branch(self, strengths: list[float], following: float, step: int, state: Any) -> None:
        """Have the run that comes after those of `strengths` begin where they were after this step."""
        if step == 0:
            return  # that is the start
        target = self.of(len(strengths), following)
        if target.restore(state, step) is not None:
            return
        # A point before the last roll-back lies with the run that came before it.
        runs = reversed(list(enumerate(strengths)))
        found = (self.of(number, strength).restore(state, step) for number, strength in runs)
        target.save(*next(point for point in found if point is not None))


def _follow(
    points: _Points,
    monitor: Monitor,
    strength: float,
    largest: float,
    factor: float,
    callback: Callable[[Event], Any] | None,
    options: dict[str, Any],
) -> Adaptive:
    def watch(event: Event) -> bool:
        asked = callback is not None and bool(callback(event))
        return asked or (strength < largest and monitor.decide(event.history) is not None)

    strengths, steps = [strength], []
    decisions: list[Decision] = []
    while True:
        start = points.problem, points.x0, points.y0, points.solver(strength)
        solution = solve(*start, callback=watch, checkpoint=points.path(len(decisions)), **options)
        if strength >= largest or solution.result not in (Result.STOPPED, Result.MAX_STEPS):
            break
        decision = monitor.decide(solution.history)
        if decision is None:
            break
        back = monitor.step_of(decision, solution.history)
        following = min(strength * factor, largest)
        points.branch(strengths, following, back, solution.state)
        change = decision.decided_at, back, strength, following
        logger.info("the rule fired at epoch %g: back to step %d, strength %g -> %g", *change)
        strength = following
        strengths.append(strength)
        decisions.append(decision)
        steps.append(back)
    return Adaptive(solution, tuple(strengths), tuple(decisions), tuple(steps))


@dataclasses.dataclass(frozen=True)
class Best(_OfSolution):
    """What `keep_best` kept.

    Attributes:
      strength: the strength with the lowest score.
      solution: its run.
      score: its score.
      strengths, scores, solutions: of all; the score is inf where a run or its score was not finite.
    """

    strength: Any
    solution: Any
    score: float
    strengths: tuple[Any, ...]
    scores: tuple[float, ...]
    solutions: tuple[Any, ...]

    def __repr__(self) -> str:
        listed = ", ".join(f"{s}: {score:.6g}" for s, score in zip(self.strengths, self.scores, strict=True))
        return f"Best(strength {self.strength}, score {self.score:.6g}; all: {listed})"


@explained
def keep_best(run: Callable[[Any], Any], strengths: Iterable[Any], evaluate: Callable[[PyTree, PyTree], Any]) -> Best:
    """The R-DARTS protocol: search with several strengths, and keep what is best after a short retraining.

        keep_best(lambda wd: solve(problem, x0, y0, solvers.DARTS(weight_decay=wd), steps=5000),
                  (3e-4, 9e-4, 27e-4, 81e-4), evaluate=validation_error_after_retraining)

    The search's own validation loss is no guide here: with little regularisation it is lowest where the
    architecture is worst.

    Args:
      run: `strength -> Solution` (anything with `x` and `y`, such as an `Adaptive`). A strength is whatever it takes: a
        weight decay, a rate of drop-path or cutout.
      strengths: what to try, at least one. The paper's: weight decays 3e-4 times 1, 3, 9, 27, 81; drop-path 0, 0.2,
        0.4, 0.6.
      evaluate: `(x, y) -> scalar`, lower is better, such as the validation error of the derived model after a short
        training. A run that has diverged is not evaluated.

    Reference: Zela et al., "Understanding and Robustifying Differentiable Architecture Search", ICLR 2020.
    """
    strengths = tuple(strengths)
    if not strengths:
        raise ValueError("keep_best needs at least one strength; the sequence is empty.")
    solutions, scores = [], []
    for strength in strengths:
        solution = run(strength)
        lost = getattr(getattr(solution, "solution", solution), "result", None) is Result.DIVERGED
        score = math.inf if lost else float(evaluate(solution.x, solution.y))
        solutions.append(solution)
        scores.append(score if math.isfinite(score) else math.inf)
    best = min(range(len(scores)), key=scores.__getitem__)
    if scores[best] == math.inf:
        raise ValueError(f"keep_best: none of the {len(strengths)} strengths has a finite score.")
    return Best(strengths[best], solutions[best], scores[best], strengths, tuple(scores), tuple(solutions))
