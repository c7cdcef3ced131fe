"""Training as plain data: what curves and heat maps show of it."""

import math
import statistics
from functools import partial
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence

import numpy as np

from fairseq_sparsemixer.comparison.histories import (
    Histories,
    times_are_of_points,
    validations,
)
from fairseq_sparsemixer.comparison.means import mean_or_none
from fairseq_sparsemixer.runs.folder import Run
from fairseq_sparsemixer.runs.grouping import Arm

MOST_POINTS = 200
"""A curve of training has no more: longer ones are averaged over stretches."""


class Line(NamedTuple):
    """A curve of one run, or the mean of several.

    Attributes:
        seed: None for a mean.
        counts: whether the run is finished and scored.
        updates, values: as many each, finite.
        seconds: of training, where known.
    """

    seed: Optional[int]
    counts: bool
    updates: List[float]
    seconds: List[Optional[float]]
    values: List[float]


Curves = Dict[str, List[Line]]
"""The lines of each arm that has any, by its name."""


class Loads(NamedTuple):
    """What each expert got in one run, over its training.

    Attributes:
        seed: of the run.
        updates: at each of P points.
        layers: for each layer P lists of N shares.
        by_domain: at the last point, for each layer the N shares of each domain (or pair of
            languages); empty where the validation set has but one.
    """

    seed: int
    updates: List[int]
    layers: Dict[str, List[List[float]]]
    by_domain: Dict[str, Dict[str, List[float]]]


def validation_curves(arms: Iterable[Arm], histories: Histories) -> Curves:
    """Validation nll, bits a token."""
    found = validations(histories)
    return _curves(
        arms,
        lambda run: [(v.updates, v.seconds, v.nll_loss) for v in found.get(run.folder, [])],
    )


def training_curves(arms: Iterable[Arm], histories: Histories) -> Curves:
    """Training nll, bits a token, at most :data:`MOST_POINTS` values a run."""
    seconds = _clocks(histories)
    of_points = times_are_of_points(histories)

    def points_of(run: Run) -> List[Any]:
        lines = run.log.training if run.log else []
        return _thinned(
            [
                (p.updates, seconds(run, p.updates) if of_points else p.seconds, p.nll_loss)
                for p in lines
            ]
        )

    return _curves(arms, points_of)


def point_curves(arms: Iterable[Arm], histories: Histories, key: str) -> Curves:
    """Curves of a figure that points have themselves, such as ``bleu``."""
    seconds = _clocks(histories)
    return _curves(
        arms,
        lambda run: [
            (p["updates"], seconds(run, p["updates"]), p.get(key)) for p in _points(histories, run)
        ],
    )


def _clocks(histories: Histories) -> Callable[[Run, float], Optional[float]]:
    """When a run had made so many updates, in the time of :func:`validations`, linear between."""
    known = {}
    for folder, found in validations(histories).items():
        timed = [(v.updates, v.seconds) for v in found if v.seconds is not None]
        if timed:
            known[folder] = np.array([(0, 0), *timed]).T

    def seconds(run: Run, updates: float) -> Optional[float]:
        if run.folder not in known or updates > known[run.folder][0, -1]:
            return None
        return float(np.interp(updates, *known[run.folder]))

    return seconds


def layer_curves(arms: Sequence[Arm], histories: Histories, key: str) -> Dict[str, Curves]:
    """By layer the curves of a figure that layers have, such as ``entropy``, if any has a value."""
    layers = dict.fromkeys(
        layer
        for history in histories.values()
        for point in history.points
        for layer in point["layers"]
    )

    def points_of(run: Run, layer: str) -> List[Any]:
        return [
            (p["updates"], p["seconds"], p["layers"].get(layer, {}).get(key))
            for p in _points(histories, run)
        ]

    curves = {layer: _curves(arms, partial(points_of, layer=layer)) for layer in layers}
    return {layer: found for layer, found in curves.items() if found}


def _points(histories: Histories, run: Run) -> List[Dict[str, Any]]:
    return histories[run.folder].points if run.folder in histories else []


def _curves(arms: Iterable[Arm], points_of: Callable[[Run], List[Any]]) -> Curves:
    """``points_of`` gives (updates, seconds, value), where None or not finite is no value."""
    curves: Curves = {}
    for arm in arms:
        for run in arm.runs:
            kept = [p for p in points_of(run) if p[2] is not None and math.isfinite(p[2])]
            if kept:
                updates, seconds, values = map(list, zip(*kept))
                line = Line(run.seed, not run.note, updates, seconds, values)
                curves.setdefault(arm.name, []).append(line)
    return curves


def _thinned(points: List[Any]) -> List[Any]:
    """Means over stretches of as many points, dated at the end of each."""
    size = -(-len(points) // MOST_POINTS) or 1
    thinned = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        values = [value for _, _, value in stretch if value is not None]
        mean = statistics.mean(values) if values else None
        thinned.append((*stretch[-1][:2], mean))
    return thinned


def mean_line(lines: Sequence[Line]) -> Line:
    """The mean over the runs that count (over all, if none does) where all of them have a value."""
    chosen = [line for line in lines if line.counts] or list(lines)
    tables = [dict(zip(line.updates, zip(line.seconds, line.values))) for line in chosen]
    shared = [u for u in chosen[0].updates if all(u in table for table in tables)]
    seconds = [mean_or_none([table[u][0] for table in tables]) for u in shared]
    values = [statistics.mean(table[u][1] for table in tables) for u in shared]
    return Line(None, chosen[0].counts, shared, seconds, values)


def timed(curves: Curves) -> Curves:
    """The curves without what has no time, and without lines of which nothing is left."""
    found: Curves = {}
    for arm, lines in curves.items():
        for line in lines:
            points = zip(line.updates, line.seconds, line.values)
            kept = [point for point in points if point[1] is not None]
            if kept:
                columns = map(list, zip(*kept))
                found.setdefault(arm, []).append(Line(line.seed, line.counts, *columns))
    return found


def without_time(curves: Curves) -> str:
    """Which arms and seeds :func:`timed` leaves out, in a sentence; empty if none."""
    kept = {arm: {line.seed for line in lines} for arm, lines in timed(curves).items()}
    missing = []
    for arm, lines in curves.items():
        seeds = [str(line.seed) for line in lines if line.seed not in kept.get(arm, ())]
        if seeds:
            missing.append(arm + (f" (seed {', '.join(seeds)})" if arm in kept else ""))
    return f"Left out over time, which is not known: {', '.join(missing)}." if missing else ""


def find_loads(arms: Iterable[Arm], histories: Histories) -> Dict[str, Loads]:
    """The load of each arm's first counted run whose points have it, by the arm's name.

    One run, because experts of one number in two runs have nothing in common.
    """
    found = {}
    for arm in arms:
        for run in arm.counted:
            points = [
                p
                for p in _points(histories, run)
                if p["layers"] and all("load" in layer for layer in p["layers"].values())
            ]
            if points:
                layers = {
                    name: [p["layers"][name]["load"] for p in points]
                    for name in points[-1]["layers"]
                }
                last = points[-1]["layers"]
                by_domain = {name: last[name].get("load_by_domain", {}) for name in last}
                if not all(len(shares) > 1 for shares in by_domain.values()):
                    by_domain = {}
                updates = [p["updates"] for p in points]
                found[arm.name] = Loads(run.seed, updates, layers, by_domain)
                break
    return found
