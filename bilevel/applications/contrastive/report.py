"""What a study says: shares with intervals, attacks, defences, claims, and the table of them all."""

from __future__ import annotations

import dataclasses
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
        difference: by seed, of what is claimed to be larger less what is claimed to be smaller.
        holds: on each seed.
        apart: the intervals over all seeds do not overlap, in the claimed order.
    """

    claim: str
    difference: tuple[float, ...]
    apart: bool

    @property
    def holds(self) -> bool:
        """On each seed."""
        return min(self.difference) > 0

    def __str__(self) -> str:
        differences = ", ".join(f"{d:+.3f}" for d in self.difference)
        said = (
            "holds" if self.holds and self.apart else "holds on each seed, intervals overlap" if self.holds else "FAILS"
        )
        return f"{said}: {self.claim} ({differences})"


@dataclasses.dataclass(frozen=True, repr=False)
class Study:
    """Attacks and defences, always both. It stays in memory: it cannot be pickled, and holds no generator.

    Attributes:
        attacks: by name ("fixed", and the routes), what they do.
        defences: by name, against the attack named `attacked`.
        attacked: the route whose encoders the defences are given.
        claims: orderings that papers claim, as they came out.
        seeds, settings: of the study.
        pictures: of the first seed, for a figure: test images and their perturbed versions, features of both, labels.
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
        lines = [
            "Attacks, over all seeds, with Wilson intervals",
            f"  {'perturbation':14} {'accuracy':20} {'10 neighbours':20} {'attack success':20} {'on the surrogate':20} "
            f"{'on clean encoders':20} alike",
        ]
        for name, a in self.attacks.items():
            surrogate = "-" if a.surrogate is None else str(a.surrogate)
            lines.append(
                f"  {name:14} {a.accuracy!s:20} {a.neighbours!s:20} {a.success!s:20} {surrogate:20} {a.control!s:20} "
                f"{np.mean(a.together):.2f}"
            )
        lines += [
            f"Defences, against the attack {self.attacked!r}",
            f"  {'defence':25} {'statistic':21} {'on clean encoders':21} {'flags':>9} {'flagged':>7} {'FPR':>5} "
            f"{'FPR, samples':>12} {'AUROC':>6} {'TPR@5%':>6}  {'accuracy':14} {'attack success':14} {'seconds':>7}",
        ]
        for name, d in self.defences.items():
            spread = lambda values: f"{np.mean(values):.3g} ({min(values):.3g}..{max(values):.3g})"  # noqa: E731
            number = lambda v, width: f"{'-' if v is None else f'{np.mean(v):.2f}':>{width}}"  # noqa: E731
            change = lambda k, d=d: (  # noqa: E731
                "-" if d.before is None else f"{d.before[k].value:.3f}->{d.after[k].value:.3f}"
            )
            lines.append(
                f"  {name:25} {spread(d.statistic):21} {spread(d.clean_statistic):21} "
                f"{('< ' if d.below else '> ') + f'{d.threshold:g}':>9} {d.flagged:7.2f} {d.false_positives:5.2f} "
                f"{number(d.sample_false_positives, 12)} {number(d.auroc, 6)} {number(d.tpr, 6)}  {change(0):14} "
                f"{change(1):14} {d.seconds:7.2f}"
            )
        lines += ["Claims", *(f"  {claim}" for claim in self.claims)]
        return "\n".join(lines)
