"""The training of runs over time: points and losses, from one kind of file."""

import math
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional

from fairseq_sparsemixer.runs.folder import Run
from fairseq_sparsemixer.runs.grouping import Arm
from fairseq_sparsemixer.runs.logs import Validation, by_layer
from fairseq_sparsemixer.runs.points import FILE, read_points


class History(NamedTuple):
    """One run over its training.

    Attributes:
        run: whose.
        points: of its ``points.jsonl`` (:mod:`fairseq_sparsemixer.runs.points`) by ascending
            updates; without one, the same as far as the log tells, where a layer has
            ``min_share`` and ``max_share`` in place of ``load`` and ``drift``.
        has_file: whether there is a ``points.jsonl``.
    """

    run: Run
    points: List[Dict[str, Any]]
    has_file: bool


Histories = Dict[Path, History]
"""Those of many runs, by the run's folder."""


def read_histories(arms: Iterable[Arm]) -> Histories:
    """The training of each run that was validated, by its folder.

    Raises:
        UserError: a file is damaged.
    """
    histories = {}
    for run in (run for arm in arms for run in arm.runs):
        measured = read_points(run.folder / FILE)
        points = measured or [_point_of_log(each) for each in run.validations]
        if points:
            histories[run.folder] = History(run, points, bool(measured))
    return histories


def _point_of_log(validation: Validation) -> Dict[str, Any]:
    entropy = by_layer(validation.stats, "router_entropy")
    smallest = by_layer(validation.stats, "min_expert_share")
    largest = by_layer(validation.stats, "max_expert_share")
    return {
        "updates": validation.updates,
        "seconds": validation.seconds,
        "loss": validation.loss,
        "nll_loss": validation.nll_loss,
        "layers": {
            layer: {
                "entropy": entropy[layer],
                "min_share": smallest.get(layer),
                "max_share": largest.get(layer),
            }
            for layer in entropy
        },
    }


def times_are_of_points(histories: Histories) -> bool:
    """Whether losses and times are taken from ``points.jsonl``.

    Its seconds leave out validation, those of the log do not: only one kind can be compared, so it
    is the log where any run has no such file.
    """
    return all(history.has_file for history in histories.values())


def validations(histories: Histories) -> Dict[Path, List[Validation]]:
    """Each run's losses and times, all from the same kind of file."""
    if not times_are_of_points(histories):
        return {folder: history.run.validations for folder, history in histories.items()}
    return {
        folder: [as_validation(point, point["seconds"]) for point in history.points]
        for folder, history in histories.items()
    }


def as_validation(point: Dict[str, Any], seconds: Optional[float]) -> Validation:
    """A point as a validation of the log; ``seconds`` are those to go by."""
    loss, nll_loss = (_number(point[key]) for key in ("loss", "nll_loss"))
    return Validation(point["updates"], loss, nll_loss, seconds, {})


def _number(value: Optional[float]) -> float:
    return math.nan if value is None else value
