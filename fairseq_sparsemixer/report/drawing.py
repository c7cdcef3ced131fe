"""Which figures a page has; how they are drawn is in ``painter``."""

import re
from typing import Any, Dict, List, Optional, Sequence

from fairseq_sparsemixer.comparison.histories import Histories
from fairseq_sparsemixer.comparison.results import Results
from fairseq_sparsemixer.report.canvas import Figure
from fairseq_sparsemixer.report.gather import Curves, Loads, layer_curves
from fairseq_sparsemixer.report.painter import Painter, top_of_loads
from fairseq_sparsemixer.runs.grouping import Arm
from fairseq_sparsemixer.runs.metrics import MAIN, Metric

LAYERS = {
    "entropy": "entropy of the router, nats",
    "drift": "drift: share of changed choices",
    "min_share": "smallest share of an expert",
    "max_share": "largest share of an expert",
}
"""What is drawn of each layer with experts, over updates: the key of a point, and its label."""


def _file(key: str) -> str:
    return key.replace("_", "-")


_SCORES = "|".join(_file(metric.key) for metric in MAIN)
FILES = re.compile(
    rf"((validation|training|{_SCORES})-(updates|minutes)|domains"
    r"|load-at-end|load-(over-time|by-domain)-\d+"
    rf"|{'|'.join(map(_file, LAYERS))}|specialisation-(words|domains))\.(svg|png)"
)
"""Names of all files that :func:`draw` may write."""


def draw(
    painter: Painter,
    arms: Sequence[Arm],
    histories: Histories,
    curves: Dict[str, Curves],
    score: Metric,
    results: Optional[Results],
    loads: Dict[str, Loads],
    routing: Dict[str, Dict[str, Any]],
) -> Dict[str, List[Figure]]:
    """The figures of each part of the page; an empty list where there is nothing to draw.

    Args:
        painter: with the folder that they are written to.
        arms, histories: of all runs.
        curves: "validation", "training" and "score".
        score: of which the last are.
        results: of the test set, if known.
        loads: what :func:`.gather.find_loads` finds.
        routing: what :func:`.routing.routing_of_run` returns, by the arm's name.
    """
    return {
        **_draw_curves(painter, curves, score),
        "domains": _draw_domains(painter, results),
        **_draw_loads(painter, loads, routing),
        **_draw_layers(painter, arms, histories),
        "specialisation": _draw_specialisation(painter, routing),
    }


def _draw_curves(
    painter: Painter, curves: Dict[str, Curves], score: Metric
) -> Dict[str, List[Figure]]:
    """Over updates and, where it is known, over time."""
    labels = {
        "validation": "validation nll, bits",
        "training": "training nll, bits",
        "score": f"{score.title} on the validation set",
    }
    drawn = {}
    for name, label in labels.items():
        file = _file(score.key) if name == "score" else name
        both = [
            painter.curves(f"{file}-{over}", curves[name], label, over, zoom=name != "score")
            for over in ("updates", "minutes")
        ]
        drawn[name] = [figure for figure in both if figure is not None]
    return drawn


def _draw_domains(painter: Painter, results: Optional[Results]) -> List[Figure]:
    if not results or not results.by_domain:
        return []
    return [painter.domains("domains", results.by_domain, results.domains)]


def _draw_loads(
    painter: Painter, loads: Dict[str, Loads], routing: Dict[str, Dict[str, Any]]
) -> Dict[str, List[Figure]]:
    """The load at the end, of the test set where training did not measure it; and over time."""
    ends = {
        arm: {layer: shares[-1] for layer, shares in each.layers.items()}
        for arm, each in loads.items()
    }
    for arm, found in routing.items():
        if arm not in ends and found["layers"]:
            ends[arm] = {
                layer: [expert["share"] for expert in values["experts"]]
                for layer, values in found["layers"].items()
            }
    top = top_of_loads(list(loads.values()))
    divided = {arm: each for arm, each in loads.items() if each.by_domain}
    return {
        "load": [painter.loads_at_end("load-at-end", ends)] if ends else [],
        "load_by_domain": [
            painter.loads_by_domain(f"load-by-domain-{number}", arm, each)
            for number, (arm, each) in enumerate(divided.items(), 1)
        ],
        "load_over_time": [
            painter.loads_over_time(f"load-over-time-{number}", arm, each, top)
            for number, (arm, each) in enumerate(loads.items(), 1)
        ],
    }


def _draw_layers(
    painter: Painter, arms: Sequence[Arm], histories: Histories
) -> Dict[str, List[Figure]]:
    drawn = {}
    for key, label in LAYERS.items():
        by_layer = layer_curves(arms, histories, key)
        drawn[key] = [painter.layers(_file(key), by_layer, label)] if by_layer else []
    return drawn


def _draw_specialisation(painter: Painter, routing: Dict[str, Dict[str, Any]]) -> List[Figure]:
    labels = {
        "words": "share of the experts' entropy\nthat words explain",
        "domains": "share of the domains' entropy\nthat experts explain",
    }
    with_layers = {arm: each["layers"] for arm, each in routing.items() if each["layers"]}
    return [
        painter.specialisation(f"specialisation-{key}", with_layers, key, label)
        for key, label in labels.items()
        if any(values[key] for layers in with_layers.values() for values in layers.values())
    ]
