"""How soon runs are as good as the baseline, in updates, time and CPU time."""

import math
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from fairseq_sparsemixer.comparison.conditions import first_reached
from fairseq_sparsemixer.comparison.histories import (
    History,
    as_validation,
    mean_or_none,
    validations,
)
from fairseq_sparsemixer.runs.folder import Run
from fairseq_sparsemixer.runs.grouping import Arm
from fairseq_sparsemixer.runs.logs import Validation


class SpeedUp(NamedTuple):
    """How soon a run was as good as a run of the baseline.

    Attributes:
        seed, baseline_seed: of the two.
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


def speed_ups(arm: Arm, baseline: Arm, histories: Dict[Path, History]) -> List[SpeedUp]:
    """When each counted run reached the best validation nll of the baseline's run of equal seed.

    The baseline's first run stands in where it has not the seed. Linear between two validations.
    """
    found = validations(histories)
    others = {run.seed: run for run in baseline.counted}
    return [
        _speed_up(run, others.get(run.seed, baseline.counted[0]), found, histories)
        for run in arm.counted
    ]


def _speed_up(
    run: Run, other: Run, found: Dict[Path, List[Validation]], histories: Dict[Path, History]
) -> SpeedUp:
    losses, own_losses = (
        [v.nll_loss for v in found[each.folder] if math.isfinite(v.nll_loss)]
        for each in (other, run)
    )
    if not losses or not own_losses:
        return SpeedUp(run.seed, other.seed, None)
    target = min(losses)
    own, base = (first_reached(found[each.folder], target) for each in (run, other))
    assert base is not None  # its own best
    if own is None:
        return SpeedUp(run.seed, other.seed, target)
    cpu_own, cpu_base = (
        _seconds_to(_cpu_validations(histories[each.folder]), target) for each in (run, other)
    )
    return SpeedUp(
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


def summarise(found: Sequence[SpeedUp]) -> Dict[str, Any]:
    """Means over seeds, None where a seed has none.

    Returns:
        The means under the names of :class:`SpeedUp`; ``known``, whether there was a target for
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
