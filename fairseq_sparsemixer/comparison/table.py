"""Finished runs side by side: scores, significance, updates to the baseline's loss."""

import csv
import statistics
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from tqdm import tqdm

from fairseq_sparsemixer.comparison.conditions import (
    FURTHER,
    METRICS,
    check_comparable,
    compare_arms,
    find_text,
    joint_p_value,
    main_metric,
    read_texts,
    signature_of,
)
from fairseq_sparsemixer.comparison.means import deviation_or_none, mean_or_none
from fairseq_sparsemixer.comparison.speed_up import Reached, ToScoredLoss, reach_scored_loss
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import (
    atomic_path,
    check_writable,
    read_lines,
    write_json,
    write_lines,
)
from fairseq_sparsemixer.locks import in_turn
from fairseq_sparsemixer.runs.folder import Run
from fairseq_sparsemixer.runs.grouping import Arm, further_differences, read_tasks
from fairseq_sparsemixer.runs.metrics import MAIN, Metric
from fairseq_sparsemixer.runs.points import number
from fairseq_sparsemixer.tables import escape, markdown

PAPER = "fill in from the paper"
_NLL = {
    "masked_lm": "of masked_lm per masked token",
    "sentence_prediction": "of sentence_prediction per sentence",
}
NO_FIGURE = "-"
SUFFIXES = (".md", ".csv", ".json")


def make_table(paths: Sequence[Path], scores: Optional[str], baseline: str, stem: Path) -> None:
    """Read the runs, compare, write STEM.md, STEM.csv and STEM.json, and print.

    Args:
        paths: folders of runs, or of such folders.
        scores: which evaluation to take where a run has several.
        baseline: name of an arm.
        stem: of the three files.

    Raises:
        UserError: runs or files that are not there or damaged, or that cannot be compared.
    """
    outputs = [stem.with_name(stem.name + suffix) for suffix in SUFFIXES]
    for path in outputs:
        check_writable(path)
    tables = {task: build_table(arms, baseline) for task, arms in read_tasks(paths, scores).items()}
    text = table_text(tables)
    text_path, csv_path, json_path = outputs
    with in_turn(stem, beside=True):
        write_lines(text_path, [text])
        _write_rows(_rows(tables), csv_path)
        write_json(json_path, {"tasks": tables} if len(tables) > 1 else next(iter(tables.values())))
    print(text)
    print("written:", ", ".join(map(str, outputs)))


def _rows(tables: Dict[str, Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Those of all tasks, with the task where there are several."""
    several = len(tables) > 1
    return [
        {**({"task": task} if several else {}), **row}
        for task, table in tables.items()
        for row in table["rows"]
    ]


def _write_rows(rows: List[Dict[str, Any]], path: Path) -> None:
    options: Any = {"encoding": "utf-8", "newline": "", "errors": "backslashreplace"}
    with atomic_path(path) as partial, partial.open("w", **options) as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def build_table(arms: List[Arm], baseline_name: str) -> Dict[str, Any]:
    """All that the table shows, and every run's own figures.

    Returns:
        ``rows`` (those of the table, not rounded), ``runs``, ``comparisons`` by row,
        ``baseline``, ``target_nll``, ``signatures``, ``notes`` and ``paper``.

    Raises:
        UserError: no such baseline, or runs that cannot be compared.
    """
    baseline = _find_baseline(arms, baseline_name)
    counted = [run for arm in arms for run in arm.counted]
    check_comparable(counted)
    others = [arm for arm in arms if arm.counted and arm is not baseline]
    comparisons: Dict[str, List[Dict[str, Any]]] = {}
    metric = main_metric(counted)
    if others and metric is not None and metric.key == "bleu":
        texts, references = read_texts(counted), read_lines(find_text(counted, "reference"))
        comparisons = {
            arm.name: compare_arms(arm, baseline, texts, references)
            for arm in tqdm(others, desc="bootstrap", unit="row", disable=None)
        }
    scored_loss = reach_scored_loss(arms, baseline)
    rows = []
    for arm in arms:
        if arm.counted:
            rows.append(_arm_row(arm, baseline, comparisons.get(arm.name, []), scored_loss))
        rows += [{**_empty_row(arm, [run]), "note": run.note} for run in arm.runs if run.note]
    return {
        "baseline": baseline.name,
        "target_nll": scored_loss.target,
        "rows": rows,
        "signatures": _signatures(counted, comparisons),
        "notes": _notes(arms, baseline, comparisons, scored_loss.reached),
        "paper": PAPER,
        "comparisons": comparisons,
        "runs": [
            _describe(arm, run, scored_loss.reached.get(run.folder))
            for arm in arms
            for run in arm.runs
        ],
    }


def _find_baseline(arms: List[Arm], name: str) -> Arm:
    for arm in arms:
        if arm.name == name:
            if not arm.counted:
                notes = "; ".join(f"{run.folder}: {run.note}" for run in arm.runs)
                raise UserError(
                    f"--baseline {name} has no run that is finished and scored ({notes}); choose "
                    "another, or finish and score it first"
                )
            return arm
    names = ", ".join(arm.name for arm in arms)
    raise UserError(f"--baseline: there is no {name}; choose one of {names}")


def _empty_row(arm: Arm, runs: List[Run]) -> Dict[str, Any]:
    """The columns in order, without what is measured."""
    settings = runs[0].settings
    metrics = [name for m in METRICS for name in (m.key, f"{m.key}_deviation")]
    measured = (
        *("updates", "valid_nll", "valid_nll_deviation", *metrics),
        *("bleu_difference", "p_value", "updates_to_target", "minutes_to_target"),
        *("speed_up", "words_per_second", "paper", "note"),
    )
    return {
        "model": arm.name,
        "router": settings.get("model.router"),
        "experts": settings.get("model.num_experts"),
        **{f"parameters_{key}": value for key, value in runs[0].parameters.items()},
        "seeds": " ".join(str(run.seed) for run in runs),
        **dict.fromkeys(measured),
    }


def _arm_row(
    arm: Arm,
    baseline: Arm,
    comparisons: List[Dict[str, Any]],
    scored_loss: ToScoredLoss,
) -> Dict[str, Any]:
    runs = arm.counted
    row = _empty_row(arm, runs)
    row["updates"] = mean_or_none([run.scored.updates for run in runs])
    losses = [run.scored.nll_loss for run in runs]
    row.update(valid_nll=mean_or_none(losses), valid_nll_deviation=deviation_or_none(losses))
    for metric in METRICS:
        scores = [(run.scores.get(metric.key) or {}).get("score") for run in runs]
        row[metric.key], row[f"{metric.key}_deviation"] = (
            mean_or_none(scores),
            deviation_or_none(scores),
        )
    if comparisons:
        base = statistics.mean(run.scores["bleu"]["score"] for run in baseline.counted)
        row["bleu_difference"] = row["bleu"] - base
        row["p_value"] = joint_p_value(
            [each["bleu"] for each in comparisons], row["bleu_difference"]
        )
    row["updates_to_target"] = scored_loss.updates(arm)
    row["minutes_to_target"] = scored_loss.minutes(arm)
    row["speed_up"] = scored_loss.speed_up(arm, baseline)
    row["words_per_second"] = mean_or_none([run.log.words_per_second for run in runs if run.log])
    return row


def _signatures(runs: List[Run], comparisons: Dict[str, List[Dict[str, Any]]]) -> Dict[str, str]:
    signatures = {
        metric.title: signature_of(run.scores[metric.key])
        for metric in METRICS
        for run in runs
        if signature_of(run.scores.get(metric.key) or {})
    }
    for compared in comparisons.values():
        signatures["p (BLEU)"] = compared[0]["bleu"]["signature"]
    return signatures


def _notes(
    arms: List[Arm],
    baseline: Arm,
    comparisons: Dict[str, List[Dict[str, Any]]],
    reached: Dict[Path, Optional[Reached]],
) -> List[str]:
    """What a reader of the table must know of single rows."""
    notes: List[str] = []
    of_seeds: Dict[str, List[str]] = {}
    for arm in arms:
        compared = comparisons.get(arm.name, [])
        seeds = [pair["seed"] for pair in compared]
        if compared and seeds[0] != compared[0]["baseline_seed"]:
            notes.append(
                f"{arm.name}: no seed in common with {baseline.name}; p compares seed {seeds[0]} "
                f"with its seed {compared[0]['baseline_seed']}"
            )
        elif compared and len(seeds) < max(len(arm.counted), len(baseline.counted)):
            of_seeds.setdefault(", ".join(map(str, seeds)), []).append(arm.name)
        never = [str(run.seed) for run in arm.counted if reached[run.folder] is None]
        if never and len(never) < len(arm.counted):
            notes.append(f"{arm.name}: seed {', '.join(never)} never reaches the target")
        places = [(run.seed, reached[run.folder]) for run in arm.counted]
        sooner = [str(seed) for seed, place in places if place and place.or_sooner]
        if sooner and arm is not baseline:
            notes.append(
                f"{arm.name}: updates and minutes are the most, the speed-up the least that it can "
                f"be: the first validation of seed {', '.join(sooner)} is below the target"
            )
        notes += [
            f"{arm.name}, seed {run.seed} ({run.folder}): {run.note}"
            for run in arm.runs
            if run.note
        ]
    for seed, names in of_seeds.items():
        notes.append(f"p is of seed {seed} alone, which the baseline has too: {'; '.join(names)}")
    counted = [run for arm in arms for run in arm.counted]
    differing = further_differences(counted)
    if differing:
        notes.append(
            f"rows also differ in {'; '.join(differing)}: this, and not the router, may be why "
            "scores and speed differ"
        )
    scored: Dict[str, List[int]] = {}
    for run in counted:
        for checkpoint in run.evaluation["checkpoints"]:
            scored.setdefault(checkpoint["name"], []).append(checkpoint["updates"])
    named = [f"{name} at {_span(updates)} updates" for name, updates in scored.items()]
    notes.append(f"scored: {', '.join(named)}")
    return notes


def _span(numbers: List[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _describe(arm: Arm, run: Run, reached: Optional[Reached]) -> Dict[str, Any]:
    """One run's own figures, for the JSON file: those of its scored checkpoint, as in its row."""
    scored = run.scored if run.validations else None
    return {
        "model": arm.name,
        "folder": str(run.folder),
        "seed": run.seed,
        "note": run.note or None,
        "updates": scored and scored.updates,
        "max_update": run.max_update,
        "valid_loss": scored and number(scored.loss),
        "valid_nll": scored and number(scored.nll_loss),
        "training_seconds": scored and scored.seconds,
        "updates_to_target": reached and reached.updates,
        "seconds_to_target": reached and reached.seconds,
        "words_per_second": run.log and run.log.words_per_second,
        "parameters": run.parameters,
        "scores_file": run.scores_path and str(run.scores_path),
        "scores": run.scores,
        "checkpoints": run.evaluation.get("checkpoints", []),
        "versions": run.record.get("versions"),
        "git": run.record.get("git"),
        "settings": run.settings,
        "validations": [
            {
                "updates": each.updates,
                "loss": number(each.loss),
                "nll_loss": number(each.nll_loss),
                "seconds": each.seconds,
            }
            for each in run.validations
        ],
    }


def table_text(tables: Dict[str, Dict[str, Any]]) -> str:
    """The table as Markdown, and below it what its columns are and what to know of its rows.

    Args:
        tables: by task.
    """
    columns = _columns(tables)
    cells = [[title for title, _ in columns]]
    cells += [[escape(cell(row)) for _, cell in columns] for row in _rows(tables)]
    of_tasks = {task: f"{task}: " if len(tables) > 1 else "" for task in tables}
    legend = [
        f"{of_tasks[task]}baseline: {table['baseline']}; target: validation nll "
        f"{table['target_nll']:.3f}, the baseline's where it was scored (mean over its seeds)"
        for task, table in tables.items()
    ]
    others = _NLL.keys() & tables.keys()
    further = f" ({', '.join(_NLL[task] for task in sorted(others))})" if others else ""
    legend.append(
        "±: sample standard deviation over seeds; p: with several seeds the largest, 1 unless all "
        f"differ in the same direction as the means; nll: bits per token{further}; minutes and "
        "words/s depend on the machine"
    )
    for task, table in tables.items():
        about = [*map(": ".join, table["signatures"].items()), *table["notes"]]
        legend += [f"{of_tasks[task]}{line}" for line in about]
    legend.append(f"paper: {PAPER}")
    return "\n".join([markdown(cells), "", *(f"- {escape(line)}" for line in legend)])


def _columns(
    tables: Dict[str, Dict[str, Any]],
) -> List[Tuple[str, Callable[[Dict[str, Any]], str]]]:
    """Title and text of each column of the Markdown table."""
    scored = {
        key
        for table in tables.values()
        for run in table["runs"]
        for key, score in run["scores"].items()
        if score
    }
    main, further = ([m for m in kind if m.key in scored] for kind in (MAIN, FURTHER))
    compared: List[Tuple[str, Callable[[Dict[str, Any]], str]]] = []
    if "bleu" in scored:
        compared = [
            ("BLEU - baseline", lambda row: _cell(row["bleu_difference"], 2, "+")),
            ("p (BLEU)", lambda row: _cell(row["p_value"], 4)),
        ]
    return [
        *([("task", lambda row: row["task"])] if len(tables) > 1 else []),
        ("model", lambda row: row["model"]),
        ("experts", lambda row: _cell(row["experts"], 0)),
        (
            "parameters (total / active)",
            lambda row: " / ".join(
                _millions(row[f"parameters_{key}"]) for key in ("total", "active")
            ),
        ),
        ("seeds", lambda row: row["seeds"].replace(" ", ", ")),
        ("updates", lambda row: _cell(row["updates"], 0)),
        ("valid nll", lambda row: _with_deviation(row, "valid_nll", 3)),
        *map(_metric_column, main),
        *compared,
        ("updates to target", lambda row: _cell(row["updates_to_target"], 0)),
        ("minutes to target", lambda row: _cell(row["minutes_to_target"], 1)),
        ("speed-up", lambda row: _cell(row["speed_up"], 2)),
        ("words/s", lambda row: _cell(row["words_per_second"], 0)),
        *map(_metric_column, further),
        ("paper", lambda row: ""),
    ]


def _metric_column(metric: Metric) -> Tuple[str, Callable[[Dict[str, Any]], str]]:
    return metric.title, lambda row: _with_deviation(row, metric.key, metric.decimals)


def _cell(value: Optional[float], decimals: int, sign: str = "") -> str:
    return NO_FIGURE if value is None else f"{value:{sign}.{decimals}f}"


def _with_deviation(row: Dict[str, Any], key: str, decimals: int) -> str:
    deviation = row[f"{key}_deviation"]
    tail = "" if deviation is None else f" ± {deviation:.{decimals}f}"
    return _cell(row[key], decimals) + tail


def _millions(count: Optional[int]) -> str:
    return NO_FIGURE if count is None else f"{count / 1e6:.1f} M"
