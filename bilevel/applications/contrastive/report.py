"""What a study says: shares with intervals, attacks, defences, claims, and the table of them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from bilevel.applications.contrastive.evaluate import wilson


@dataclasses.dataclass(frozen=True)
class Share:
    """A share of test images, counted over all seeds, with Wilson's interval.

    Attributes:
        by_seed: the share of each seed.
        successes, trials: in all.
    """

    by_seed: tuple[float, ...]
    successes: int
    trials: int

    @property
    def value(self) -> float:
        """The share."""
        return self.successes / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, at 95 %."""
        return wilson(self.successes, self.trials)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} ({low:.3f}, {high:.3f})"


@dataclasses.dataclass(frozen=True)
class Attack:
    """What a perturbation does to encoders that were pretrained on a pool with some of it.

    Attributes:
        accuracy, neighbours: of the probe and of nearest neighbours on clean test images.
        success: the share of test images of other classes that the probe gives the target's label when perturbed.
        kept: the probe's accuracy on perturbed test images.
        surrogate: the success on the surrogate that the perturbation was tuned with; None for the fixed one.
        control: the success on clean encoders, which have never met the perturbation.
        together: by seed, the mean cosine between features of perturbed test images.
    """

    accuracy: Share
    neighbours: Share
    success: Share
    kept: Share
    surrogate: Share | None
    control: Share
    together: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Defence:
    """What a defence says of the perturbed encoders and of clean ones, and what it leaves of accuracy and attack.

    Attributes:
        kind: "encoder", "pool", "input", "preprocessing" or "repair".
        threshold: of the statistic; `below`: flagged below it.
        statistic, clean_statistic: of each perturbed and of each clean encoder.
        flagged: the share of the perturbed encoders that is flagged.
        false_positives: the share of the clean encoders that is flagged.
        sample_false_positives: the share of clean samples above the detector's cut, on clean encoders; else None.
        auroc, tpr: by seed, of detectors of samples: of perturbed against clean ones, and the true-positive rate at a
            false-positive rate of 5 %; else None.
        before, after: (accuracy, success) of repairs and preprocessing; else None.
        seconds: of the run per encoder, compilation aside where `solve` is not used.
    """

    kind: str
    threshold: float
    below: bool
    statistic: tuple[float, ...]
    clean_statistic: tuple[float, ...]
    flagged: float
    false_positives: float
    sample_false_positives: float | None
    auroc: tuple[float, ...] | None
    tpr: tuple[float, ...] | None
    before: tuple[Share, Share] | None
    after: tuple[Share, Share] | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class Claim:
    """An ordering that is claimed, and whether it holds here.

    Attributes:
        claim: in words.
        larger, smaller: the shares of which the one is claimed to be larger.
    """

    claim: str
    larger: Share
    smaller: Share

    @property
    def difference(self) -> tuple[float, ...]:
        """By seed, of what is claimed to be larger less what is claimed to be smaller."""
        return tuple(a - b for a, b in zip(self.larger.by_seed, self.smaller.by_seed, strict=True))

    @property
    def holds(self) -> bool:
        """On each seed."""
        return min(self.difference) > 0

    @property
    def apart(self) -> bool:
        """The intervals over all seeds do not overlap, in the claimed order."""
        return self.larger.interval[0] > self.smaller.interval[1]

    def __str__(self) -> str:
        differences = ", ".join(f"{d:+.3f}" for d in self.difference)
        if self.holds:
            said = "holds" if self.apart else "holds on each seed, intervals overlap"
        else:
            said = f"FAILS on {sum(d <= 0 for d in self.difference)} of {len(self.difference)} seeds"
        return f"{said}: {self.claim}: {self.larger} against {self.smaller}; by seed {differences}"


@dataclasses.dataclass(frozen=True, repr=False)
class Study:
    """Attacks and defences, always both. It stays in memory: it cannot be pickled, and holds no generator.

    Attributes:
        attacks: by name ("fixed", and the routes), what they do.
        defences: by name, against the attack named `attacked`.
        attacked: the route whose encoders the defences are given.
        claims: orderings that papers claim, as they came out.
        seeds, settings: of the study.
        pictures: of the first seed, for a figure: test "images" and their "perturbed" versions, "features" of both,
            "labels", and which perturbed ones are "taken" for the target's.
        seconds: in all.
    """

    attacks: dict[str, Attack]
    defences: dict[str, Defence]
    attacked: str
    claims: tuple[Claim, ...]
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    pictures: dict[str, np.ndarray]
    seconds: float

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "A Study stays in memory: it is an evaluation of defences, and its perturbed images are not written to "
            "disk. Write down its table, print(study)."
        )

    def __repr__(self) -> str:
        return "\n".join([*self._attacks(), *self._detectors(), *self._repairs(), *self._claims()])

    def _attacks(self) -> list[str]:
        head = ("perturbation", "accuracy", "10 neighbours", "attack success", "on the surrogate", "on clean encoders",
                "still right", "alike")  # fmt: skip
        rows = [
            (
                name, a.accuracy, a.neighbours, a.success, a.surrogate or "-", a.control, a.kept,
                f"{np.mean(a.together):.2f}",
            )
            for name, a in self.attacks.items()
        ]  # fmt: skip
        return ["Attacks, over all seeds, with Wilson intervals", *_table(head, rows)]

    def _detectors(self) -> list[str]:
        """All defences' statistics, and of those that score samples how well these are told apart."""
        head = ("defence", "kind", "statistic", "on clean encoders", "flags", "flagged", "FPR", "FPR, samples", "AUROC",
                "TPR at 5% FPR", "seconds")  # fmt: skip
        rows = [
            (
                name, d.kind, _spread(d.statistic), _spread(d.clean_statistic), f"{'<>'[not d.below]} {d.threshold:g}",
                f"{d.flagged:.2f}", f"{d.false_positives:.2f}", _spread(d.sample_false_positives), _spread(d.auroc),
                _spread(d.tpr), f"{d.seconds:.2f}",
            )
            for name, d in self.defences.items()
        ]  # fmt: skip
        what = f"Defences against the attack {self.attacked!r}: what they see, the mean (least..largest) over encoders"
        return [what, *_table(head, rows)]

    def _repairs(self) -> list[str]:
        """Those that change the encoder or its images: what they leave."""
        head = ("defence", "accuracy before", "after", "attack success before", "after", "seconds")
        rows = [
            (name, d.before[0], d.after[0], d.before[1], d.after[1], f"{d.seconds:.2f}")
            for name, d in self.defences.items()
            if d.before is not None and d.after is not None
        ]
        return ["What repairs and preprocessing leave, with Wilson intervals", *_table(head, rows)] if rows else []

    def _claims(self) -> list[str]:
        return ["Claims", *(f"  {claim}" for claim in self.claims)]


def _spread(values: Any) -> str:
    """A number, or the mean of several with their ends."""
    if values is None:
        return "-"
    values = np.atleast_1d(values)
    ends = f" ({values.min():.3g}..{values.max():.3g})" if len(values) > 1 else ""
    return f"{values.mean():.3g}{ends}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of columns that are as wide as their widest entry."""
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  " + "  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
