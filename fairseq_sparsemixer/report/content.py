"""What a page says, gathered from the runs: the variables of its template, section by section."""

import datetime
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from fairseq_sparsemixer.comparison import results as test_set
from fairseq_sparsemixer.comparison.conditions import main_metric
from fairseq_sparsemixer.comparison.histories import (
    Histories,
    read_histories,
    times_are_of_points,
)
from fairseq_sparsemixer.comparison.speed_up import reach_best_loss, summarise
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.report import gather, page
from fairseq_sparsemixer.report.canvas import styles
from fairseq_sparsemixer.report.drawing import draw
from fairseq_sparsemixer.report.painter import Painter
from fairseq_sparsemixer.report.routing import routing_of_run
from fairseq_sparsemixer.runs.folder import Run
from fairseq_sparsemixer.runs.grouping import Arm
from fairseq_sparsemixer.runs.metrics import MAIN, Metric
from fairseq_sparsemixer.version import __version__


def gather_content(arms: List[Arm], baseline: Optional[str], folder: Path) -> Dict[str, Any]:
    """The variables of the page's template, without those that name its files.

    Args:
        arms: all.
        baseline: name of an arm, or None for the default.
        folder: where the figures go.

    Raises:
        UserError: no such baseline, or runs that cannot be compared.
    """
    counted = [run for arm in arms for run in arm.counted]
    baseline = baseline or test_set.default_baseline(arms)
    text, problem = _find_test_text(counted)
    results = test_set.read_results(arms, baseline, text, problem) if baseline else None
    histories = read_histories(arms)
    main = main_metric(counted)
    speed_ups = _speed_ups(arms, baseline, histories)
    routing, routing_problems = _find_routing(arms, text, problem)
    score = _score_of_points(histories)
    curves = {
        "validation": gather.validation_curves(arms, histories),
        "training": gather.training_curves(arms, histories),
        "score": gather.point_curves(arms, histories, score.key),
    }
    loads = gather.find_loads(arms, histories)
    painter = Painter(folder, styles([arm.name for arm in arms], baseline))
    return {
        "arms": arms,
        "baseline": baseline,
        "glance": page.at_a_glance(
            len(arms),
            sum(len(arm.runs) for arm in arms),
            len(counted),
            results.table if results else None,
            main,
            speed_ups,
            test_set.SIGNIFICANT,
        ),
        "speed_ups": speed_ups,
        "times_of_points": times_are_of_points(histories),
        "without_time": {name: gather.without_time(found) for name, found in curves.items()},
        "uncounted": [arm.name for arm in arms if not arm.counted],
        **_of_test_set(arms, counted, results),
        "score": score.title,
        "metrics": [m for m in MAIN if any(run.scores.get(m.key) for run in counted)],
        "compared": main is not None and main.key == "bleu",
        "loads": loads,
        "loads_of_test_set": [
            arm for arm, each in routing.items() if each["layers"] and arm not in loads
        ],
        "warned": [
            (arm, run, warned)
            for arm in arms
            for run in arm.runs
            if run.log
            for warned in run.log.warnings
        ],
        **_of_experts(routing),
        "routing_problems": routing_problems,
        **_of_settings(arms),
        "figures": draw(painter, arms, histories, curves, score, results, loads, routing),
    }


def _score_of_points(histories: Histories) -> Metric:
    """What is drawn of points besides losses: BLEU, or what another task has in its place."""
    measured = {key for each in histories.values() for point in each.points for key in point}
    return next((metric for metric in MAIN if metric.key in measured), MAIN[0])


def _find_test_text(counted: Sequence[Run]) -> Tuple[Optional[test_set.TestText], str]:
    """The text that runs were scored on; or why it is not there."""
    if not counted:
        return None, "no run is finished and scored"
    if not all(run.scores.get("bleu") for run in counted):
        return None, "these models do not translate"
    try:
        return test_set.read_test_text(counted), ""
    except UserError as error:
        return None, str(error)


def _speed_ups(
    arms: Sequence[Arm], baseline: Optional[str], histories: Histories
) -> Dict[str, Dict[str, Any]]:
    """Updates to the baseline's best loss, of each arm that counts; empty without a baseline."""
    base = next((arm for arm in arms if arm.name == baseline), None)
    if base is None:
        return {}
    return {
        arm.name: summarise(reach_best_loss(arm, base, histories)) for arm in arms if arm.counted
    }


def _find_routing(
    arms: Sequence[Arm], text: Optional[test_set.TestText], problem: str
) -> Tuple[Dict[str, Dict[str, Any]], Dict[str, str]]:
    """For each arm what its first counted run chooses; and for the others why it is not known."""
    found, problems = {}, {}
    for arm in arms:
        if not arm.counted:
            problems[arm.name] = "none of its runs is finished and scored"
            continue
        if not arm.counted[0].scores.get("bleu"):
            problems[arm.name] = problem
            continue
        try:
            found[arm.name] = {
                "seed": arm.counted[0].seed,
                **routing_of_run(arm.counted[0], text, problem),
            }
        except UserError as error:
            problems[arm.name] = str(error)
    return found, problems


def _of_test_set(
    arms: Sequence[Arm], counted: Sequence[Run], results: Optional[test_set.Results]
) -> Dict[str, Any]:
    return {
        "results": results,
        "significant": test_set.SIGNIFICANT,
        "least_lines": test_set.LEAST_LINES,
        "languages": test_set.languages(counted),
        "notes": test_set.notes(results.table, arms) if results else [],
        "copy": test_set.nearest_copy(counted),
    }


def _of_experts(routing: Dict[str, Dict[str, Any]]) -> Dict[str, Any]:
    layers = [layer for each in routing.values() for layer in each["layers"].values()]
    return {
        "routing": routing,
        "samples": page.collect_samples(routing),
        "most_experts": max((layer["num_experts"] for layer in layers), default=0),
        "unrouted": any(layer["unrouted"] for layer in layers),
    }


def _of_settings(arms: Sequence[Arm]) -> Dict[str, Any]:
    common, differing = test_set.compare_settings(arms)
    return {
        "common": common,
        "differing": differing,
        "origins": test_set.origins([run for arm in arms for run in arm.runs]),
        "left_out": [(arm, run) for arm in arms for run in arm.runs if run.note],
        "version": __version__,
        "date": datetime.date.today().isoformat(),
    }
