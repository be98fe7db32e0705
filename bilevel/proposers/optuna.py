"""Optuna's samplers behind ask and tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bilevel._arguments import explained_class
from bilevel.proposers.trials import Trial

__all__ = ["OptunaProposer"]

_REMEMBERING = frozenset({
    "QMCSampler", "GridSampler", "BruteForceSampler", "CmaEsSampler", "NSGAIISampler", "NSGAIIISampler",
})  # fmt: skip


@explained_class
class OptunaProposer:
    """Optuna chooses: each proposal is a dictionary of names and values (needs `pip install 'bilevel[optuna]'`).

        OptunaProposer({"depth": (1, 4), "width": [8, 16, 32], "rate": (1e-4, 1e-1)}, log=("rate",))

    The study lives in memory and is built anew from the history, and the sampler takes its seed from the round's
    key: what is proposed follows from history and key, so a run resumes exactly.

    Args:
      space: by name a pair of integers or of floats (both ends included), or a list of choices.
      log: the names that are sampled on a logarithmic scale.
      sampler: `seed -> optuna sampler`; None: TPE. Its draws have to follow from seed and trials: samplers that keep a
        memory of their own (QMC, grid, brute force, CMA-ES, NSGA) would begin anew at each round, and are refused.
    """

    def __init__(
        self,
        space: Mapping[str, Any],
        log: Sequence[str] = (),
        sampler: Callable[[int], Any] | None = None,
    ) -> None:
        self.space, self.log, self.sampler = dict(space), tuple(log), sampler
        if not self.space:
            raise ValueError("OptunaProposer(space={}): at least one name with its values is needed.")
        for name, values in self.space.items():
            pair = isinstance(values, tuple) and len(values) == 2 and values[0] < values[1]
            if not pair and not (isinstance(values, list) and values):
                raise ValueError(
                    f"OptunaProposer(space=...): {name!r} has {values!r}; a pair (low, high) or a list of choices is "
                    "needed."
                )
        if unknown := set(self.log) - set(self.space):
            raise ValueError(f"OptunaProposer(log=...): {sorted(unknown)} are not in the space.")
        for name in self.log:
            if isinstance(self.space[name], list) or not self.space[name][0] > 0:
                raise ValueError(
                    f"OptunaProposer(log=...): {name!r} has {self.space[name]!r}; a logarithmic scale is for a pair of "
                    "positive numbers."
                )

    def settings(self) -> dict[str, Any]:
        """What makes it propose as it does."""
        return {"space": self.space, "log": self.log, "sampler": self.sampler}

    def _distributions(self, optuna: Any) -> dict[str, Any]:
        kinds = optuna.distributions
        found = {}
        for name, values in self.space.items():
            if isinstance(values, list):
                found[name] = kinds.CategoricalDistribution(values)
            else:
                whole = all(isinstance(v, int) for v in values)
                kind = kinds.IntDistribution if whole else kinds.FloatDistribution
                found[name] = kind(values[0], values[1], log=name in self.log)
        return found

    def ask(self, history: Sequence[Trial], count: int, key: jax.Array) -> list[dict[str, Any]]:
        """`count` proposals of the sampler, given the history."""
        try:
            import optuna
        except ImportError as error:
            raise ImportError(
                "OptunaProposer needs Optuna, which is not installed: pip install 'bilevel[optuna]'."
            ) from error

        distributions = self._distributions(optuna)
        seed = int(np.asarray(jax.random.key_data(key)).ravel()[-1])
        sampler = optuna.samplers.TPESampler(seed=seed) if self.sampler is None else self.sampler(seed)
        if type(sampler).__name__ in _REMEMBERING:
            raise ValueError(
                f"OptunaProposer(sampler=...): {type(sampler).__name__} remembers more than the trials, and would "
                "begin anew at each round: take TPESampler, GPSampler or RandomSampler."
            )
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            study = optuna.create_study(direction="minimize", sampler=sampler)
            for trial in history:
                if isinstance(trial.proposal, dict) and set(trial.proposal) == set(distributions):
                    failed = not math.isfinite(trial.loss)
                    study.add_trial(
                        optuna.trial.create_trial(
                            params=trial.proposal,
                            distributions=distributions,
                            value=None if failed else trial.loss,
                            state=optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE,
                        )
                    )
            return [dict(study.ask(distributions).params) for _ in range(count)]
        finally:
            optuna.logging.set_verbosity(level)

    def tell(self, results: Sequence[Trial]) -> None:
        """Nothing to remember: `ask` builds the study from the history."""
