"""One page that shows what trained models do: curves, scores, experts, translations."""

import argparse
import datetime
import re
import shutil
from pathlib import Path
from typing import Any, Dict, List, Optional

from fairseq_sparsemixer.comparison.histories import read_histories, times_are_of_points
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import check_writable, scratch_folder, write_lines
from fairseq_sparsemixer.runs.grouping import Arm, read_arms
from fairseq_sparsemixer.version import __version__

FIGURES = re.compile(
    r"((validation|training|bleu)-(updates|minutes)|domains|load-at-end|load-over-time-\d+"
    r"|entropy|drift|min-share|max-share|specialisation-(words|domains))\.(svg|png)"
)
"""Names of all files that :func:`_draw` may write."""


def run(args: argparse.Namespace) -> None:
    """Gather, draw, write."""
    _check_packages()
    if args.output.suffix != ".html":
        raise UserError(f"--output {args.output} is a page; give it a name ending in .html")
    check_writable(args.output)
    folder = args.output.with_name(f"{args.output.stem}_figures")
    _check_figures(folder)
    arms = read_arms(args.runs, args.scores)
    from fairseq_sparsemixer.report import page

    with scratch_folder(folder.with_name(f".{folder.name}.partial")) as partial:
        partial.joinpath(folder.name).mkdir()
        content = gather_content(arms, args.baseline, partial / folder.name)
        text = page.render({**content, "title": args.output.stem, "figures_folder": folder.name})
        if folder.exists():
            shutil.rmtree(folder)
        partial.joinpath(folder.name).replace(folder)
    write_lines(args.output, [text])
    print(f"written: {args.output} and {folder}")


def _check_packages() -> None:
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"a report needs {error.name}: run `pip install 'fairseq-sparsemixer[report]'`"
        ) from error


def _check_figures(folder: Path) -> None:
    """Refuse to replace anything but a folder of a report's figures."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(
            f"{folder} would be replaced and is no folder; move it away, or choose another --output"
        )
    others = [] if not folder.exists() else sorted(path.name for path in folder.iterdir())
    others = [name for name in others if not FIGURES.fullmatch(name)]
    if others:
        raise UserError(
            f"{folder} would be replaced and holds other files than a report's figures "
            f"({others[0]}); move it away, or choose another --output"
        )


def gather_content(arms: List[Arm], baseline: Optional[str], folder: Path) -> Dict[str, Any]:
    """The variables of the page's template.

    Args:
        arms: all.
        baseline: name of an arm, or None for the default.
        folder: where the figures go.

    Raises:
        UserError: no such baseline, or runs that cannot be compared.
    """
    from fairseq_sparsemixer.comparison import results as scores
    from fairseq_sparsemixer.comparison import speed_up
    from fairseq_sparsemixer.report import canvas, figures, gather, page

    runs = [run for arm in arms for run in arm.runs]
    counted = [run for arm in arms for run in arm.counted]
    baseline = baseline or scores.default_baseline(arms)
    text, problem = None, "no run is finished and scored"
    if counted:
        try:
            text = scores.read_test_text(counted)
        except UserError as error:
            problem = str(error)
    results = scores.read_results(arms, baseline, text, problem) if baseline else None
    histories = read_histories(arms)
    by_name = {arm.name: arm for arm in arms}
    speed_ups = {}
    if baseline:
        speed_ups = {
            arm.name: speed_up.summarise(speed_up.speed_ups(arm, by_name[baseline], histories))
            for arm in arms
            if arm.counted
        }
    common, differing = scores.compare_settings(arms)
    routing, problems = _routing(arms, text, problem)
    layers = [layer for each in routing.values() for layer in each["layers"].values()]
    painter = figures.Painter(folder, canvas.styles(list(by_name), baseline))
    curves = {
        "validation": gather.validation_curves(arms, histories),
        "training": gather.training_curves(arms, histories),
        "bleu": gather.point_curves(arms, histories, "bleu"),
    }
    loads = gather.find_loads(arms, histories)
    return {
        "arms": arms,
        "baseline": baseline,
        "glance": page.at_a_glance(
            len(arms),
            len(runs),
            len(counted),
            results.table if results else None,
            speed_ups,
            scores.SIGNIFICANT,
        ),
        "significant": scores.SIGNIFICANT,
        "least_lines": scores.LEAST_LINES,
        "languages": scores.languages(counted),
        "results": results,
        "notes": scores.notes(results.table, arms) if results else [],
        "copy": scores.nearest_copy(counted),
        "speed_ups": speed_ups,
        "times_of_points": times_are_of_points(histories),
        "without_time": {name: gather.without_time(found) for name, found in curves.items()},
        "routing": routing,
        "routing_problems": problems,
        "samples": page.collect_samples(routing),
        "most_experts": max((layer["num_experts"] for layer in layers), default=0),
        "unrouted": any(layer["unrouted"] for layer in layers),
        "loads": loads,
        "loads_of_test_set": [
            arm for arm, each in routing.items() if each["layers"] and arm not in loads
        ],
        "common": common,
        "differing": differing,
        "origins": scores.origins(runs),
        "uncounted": [arm.name for arm in arms if not arm.counted],
        "left_out": [(arm, run) for arm in arms for run in arm.runs if run.note],
        "version": __version__,
        "date": datetime.date.today().isoformat(),
        "figures": _draw(painter, arms, curves, histories, results, loads, routing),
    }


def _routing(arms: List[Arm], text: Any, problem: str) -> Any:
    """For each arm what its first counted run chooses; and for the others why it is not known."""
    from fairseq_sparsemixer.report.routing import routing_of_run

    found, problems = {}, {}
    for arm in arms:
        if not arm.counted:
            problems[arm.name] = "none of its runs is finished and scored"
            continue
        try:
            found[arm.name] = {
                "seed": arm.counted[0].seed,
                **routing_of_run(arm.counted[0], text, problem),
            }
        except UserError as error:
            problems[arm.name] = str(error)
    return found, problems


def _draw(
    painter: Any,
    arms: List[Arm],
    curves: Dict[str, Any],
    histories: Any,
    results: Any,
    loads: Any,
    routing: Any,
) -> Dict[str, List[Any]]:
    """The figures of each part of the page; an empty list where there is nothing to draw."""
    from fairseq_sparsemixer.report import figures, gather

    labels = {
        "validation": "validation nll, bits a token",
        "training": "training nll, bits a token",
        "bleu": "BLEU on validation sentences",
    }
    drawn: Dict[str, List[Any]] = {}
    for name, label in labels.items():
        both = [
            painter.curves(f"{name}-{over}", curves[name], label, over, zoom=name != "bleu")
            for over in ("updates", "minutes")
        ]
        drawn[name] = [figure for figure in both if figure is not None]
    drawn["domains"] = []
    if results and results.by_domain:
        drawn["domains"] = [painter.domains("domains", results.by_domain, results.domains)]
    ends = {
        arm: {layer: shares[-1] for layer, shares in each.layers.items()}
        for arm, each in loads.items()
    }
    for arm, each in routing.items():
        if arm not in ends and each["layers"]:
            ends[arm] = {
                layer: [expert["share"] for expert in values["experts"]]
                for layer, values in each["layers"].items()
            }
    drawn["load"] = [painter.loads_at_end("load-at-end", ends)] if ends else []
    top = figures.top_of_loads(list(loads.values()))
    drawn["load_over_time"] = [
        painter.loads_over_time(f"load-over-time-{number}", arm, each, top)
        for number, (arm, each) in enumerate(loads.items(), 1)
    ]
    for key, label in (
        ("entropy", "entropy of the router, nats"),
        ("drift", "drift: share of changed choices"),
        ("min_share", "smallest share of an expert"),
        ("max_share", "largest share of an expert"),
    ):
        by_layer = gather.layer_curves(arms, histories, key)
        drawn[key] = [painter.layers(key.replace("_", "-"), by_layer, label)] if by_layer else []
    with_layers = {arm: each["layers"] for arm, each in routing.items() if each["layers"]}
    drawn["specialisation"] = []
    for key, label in (
        ("words", "share of the experts' entropy\nthat words explain"),
        ("domains", "share of the domains' entropy\nthat experts explain"),
    ):
        if any(values[key] for layers in with_layers.values() for values in layers.values()):
            name = f"specialisation-{key}"
            drawn["specialisation"].append(painter.specialisation(name, with_layers, key, label))
    return drawn
