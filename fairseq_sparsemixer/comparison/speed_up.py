"""How soon runs are as good as the baseline, by two targets, which give different figures.

Updates to the baseline's scored loss (:func:`reach_scored_loss`, in ``fairseq-sparsemixer table``):
the validation nll of the checkpoint that the baseline was scored with (that it ended with, mostly),
as a mean over its seeds, is the target of every run; the speed-up of an arm is a ratio of means
over seeds.

Updates to the baseline's best loss (:func:`reach_best_loss`, in ``fairseq-sparsemixer report``):
the best validation nll of the baseline's run of equal seed is the target of a run; the speed-up of
an arm is a mean over seeds of ratios.
"""

import math
import statistics
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from fairseq_sparsemixer.comparison.histories import (
    Histories,
    History,
    as_validation,
    validations,
)
from fairseq_sparsemixer.comparison.means import mean_or_none
from fairseq_sparsemixer.runs.folder import Run
from fairseq_sparsemixer.runs.grouping import Arm
from fairseq_sparsemixer.runs.logs import Validation


class Reached(NamedTuple):
    """When a loss was first reached.

    Attributes:
        updates: that it took.
        seconds: of training, if the log tells them.
        or_sooner: whether it was passed before the first loss that is known: both are the most
            that it can have taken.
    """

    updates: float
    seconds: Optional[float]
    or_sooner: bool = False


def first_reached(validations: Sequence[Validation], target: float) -> Optional[Reached]:
    """When the validation nll was first at or below ``target``.

    Linear between the first validation at or below it and the one before; the first validation
    of all has none before it, and bounds the time only, unless its loss is the target itself.

    Returns:
        None if it was never reached.
    """
    before: Optional[Validation] = None
    for after in validations:
        if after.nll_loss <= target:
            if before is None or not math.isfinite(before.nll_loss):
                return Reached(after.updates, after.seconds, after.nll_loss < target)
            share = (before.nll_loss - target) / (before.nll_loss - after.nll_loss)
            seconds = None
            if before.seconds is not None and after.seconds is not None:
                seconds = before.seconds + share * (after.seconds - before.seconds)
            return Reached(before.updates + share * (after.updates - before.updates), seconds)
        before = after
    return None


class ToScoredLoss(NamedTuple):
    """Updates to the baseline's scored loss.

    Attributes:
        target: the validation nll that the baseline was scored at, bits a token, mean over its
            seeds.
        reached: when each counted run first reached it, by the run's folder; None for never. For
            the baseline's runs each one's own nll is the target.
    """

    target: float
    reached: Dict[Path, Optional[Reached]]

    def updates(self, arm: Arm) -> Optional[float]:
        """Mean over the seeds of an arm; None where one never got there."""
        return mean_or_none([place and place.updates for place in self._places(arm)])

    def minutes(self, arm: Arm) -> Optional[float]:
        """Likewise, of training; None also where a time is not known."""
        seconds = [place and place.seconds for place in self._places(arm)]
        return mean_or_none([None if each is None else each / 60 for each in seconds])

    def speed_up(self, arm: Arm, baseline: Arm) -> Optional[float]:
        """The baseline's updates over those of the arm."""
        base, own = self.updates(baseline), self.updates(arm)
        return None if base is None or own is None else base / own

    def _places(self, arm: Arm) -> List[Optional[Reached]]:
        return [self.reached[run.folder] for run in arm.counted]


def reach_scored_loss(arms: Sequence[Arm], baseline: Arm) -> ToScoredLoss:
    """When all counted runs were as good as the baseline where it was scored, by their logs."""
    target = statistics.mean(run.scored.nll_loss for run in baseline.counted)
    return ToScoredLoss(
        target,
        {
            run.folder: first_reached(
                run.validations, run.scored.nll_loss if arm is baseline else target
            )
            for arm in arms
            for run in arm.counted
        },
    )


class ToBestLoss(NamedTuple):
    """Updates to the baseline's best loss, of one run.

    Attributes:
        seed, baseline_seed: of the run, and of the baseline's that it is compared with.
        target: the best validation nll of the baseline's run, bits a token; None where one of
            the two has no loss that is known, and so nothing else.
        updates, seconds, cpu_seconds: when it was first reached; None for never, or where the time
            is unknown. CPU time where both trained without a GPU.
        by_updates, by_time, by_cpu_time: the baseline's over the run's own; None likewise.
        or_sooner: whether the run's first known loss is below the target, so that its updates and
            times are the most, the speed-ups the least that they can be.
    """

    seed: int
    baseline_seed: int
    target: Optional[float]
    updates: Optional[float] = None
    seconds: Optional[float] = None
    cpu_seconds: Optional[float] = None
    by_updates: Optional[float] = None
    by_time: Optional[float] = None
    by_cpu_time: Optional[float] = None
    or_sooner: bool = False


def reach_best_loss(arm: Arm, baseline: Arm, histories: Histories) -> List[ToBestLoss]:
    """When each counted run was as good as the baseline's run of equal seed at its best.

    The baseline's first run stands in where it has not the seed.
    """
    found = validations(histories)
    others = {run.seed: run for run in baseline.counted}
    return [
        _reach_best_loss(run, others.get(run.seed, baseline.counted[0]), found, histories)
        for run in arm.counted
    ]


def _reach_best_loss(
    run: Run, other: Run, found: Dict[Path, List[Validation]], histories: Histories
) -> ToBestLoss:
    losses, own_losses = (
        [v.nll_loss for v in found[each.folder] if math.isfinite(v.nll_loss)]
        for each in (other, run)
    )
    if not losses or not own_losses:
        return ToBestLoss(run.seed, other.seed, None)
    target = min(losses)
    own, base = (first_reached(found[each.folder], target) for each in (run, other))
    assert base is not None  # its own best
    if own is None:
        return ToBestLoss(run.seed, other.seed, target)
    cpu_own, cpu_base = (
        _seconds_to(_cpu_validations(histories[each.folder]), target) for each in (run, other)
    )
    return ToBestLoss(
        run.seed,
        other.seed,
        target,
        own.updates,
        own.seconds,
        cpu_own,
        base.updates / own.updates,
        _ratio(base.seconds, own.seconds),
        _ratio(cpu_base, cpu_own),
        own.or_sooner,
    )


def _seconds_to(found: Sequence[Validation], target: float) -> Optional[float]:
    reached = first_reached(found, target)
    return reached and reached.seconds


def _ratio(one: Optional[float], other: Optional[float]) -> Optional[float]:
    return one / other if one is not None and other else None


def _cpu_validations(history: History) -> List[Validation]:
    """The run's losses and its CPU time, where no GPU did the work."""
    on_cpu = history.run.record.get("gpus") == []
    return [
        as_validation(point, point.get("cpu_seconds") if on_cpu else None)
        for point in history.points
    ]


_MEANS = ("updates", "seconds", "cpu_seconds", "by_updates", "by_time", "by_cpu_time")


def summarise(found: Sequence[ToBestLoss]) -> Dict[str, Any]:
    """Means over seeds, None where a seed has none.

    Returns:
        The means under the names of :class:`ToBestLoss`; ``known``, whether there was a target for
        each seed; ``never``, how many never got there; ``or_sooner``, whether a mean is a bound;
        ``seeds``, the single ones.
    """
    return {
        "known": all(each.target is not None for each in found),
        "never": sum(each.target is not None and each.updates is None for each in found),
        "or_sooner": any(each.or_sooner for each in found),
        **{name: mean_or_none([getattr(each, name) for each in found]) for name in _MEANS},
        "seeds": found,
    }
