"""Print the scores of a model that scripts/glue.sh has fine-tuned (glue_scores.py RUN).

Each is of the development set, at the checkpoint that is best there, in percent, and the task's
own: what the criterion has logged, with fairseq's formulas (scikit-learn and SciPy).
"""

import sys
from pathlib import Path

from fairseq_sparsemixer.runs.logs import line_stats
from fairseq_sparsemixer.tables import format_table

MEASURES = {
    "CoLA": ("mcc", [("valid", "mcc", "Matthews correlation")]),
    "SST-2": ("accuracy", [("valid", "accuracy", "accuracy")]),
    "MRPC": ("acc_and_f1", [("valid", "f1", "F1"), ("valid", "accuracy", "accuracy")]),
    "STS-B": (
        "pearson_and_spearman",
        [("valid", "pearson", "Pearson correlation"), ("valid", "spearman", "Spearman's")],
    ),
    "QQP": ("acc_and_f1", [("valid", "f1", "F1"), ("valid", "accuracy", "accuracy")]),
    "MNLI": (
        "accuracy",
        [
            ("valid", "accuracy", "accuracy, matched"),
            ("valid1", "accuracy", "accuracy, mismatched"),
        ],
    ),
    "QNLI": ("accuracy", [("valid", "accuracy", "accuracy")]),
    "RTE": ("accuracy", [("valid", "accuracy", "accuracy")]),
}
"""By task: the measure of the best checkpoint, and of each score the part, key and name."""


def validations(log):
    """{updates: {part: {key: value}}} of a log of hydra."""
    found = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        for part in ("valid", "valid1"):
            stats = line_stats(line, part, f"{part}_num_updates")
            if stats is not None:
                updates = int(stats[f"{part}_num_updates"])
                found.setdefault(updates, {})[part] = stats
    return found


def scores(folder):
    """[(name, percent)] of one task, at its best checkpoint; none where it was not trained."""
    best_by, measures = MEASURES[folder.name]
    log = folder / "hydra_train.log"
    found = validations(log) if log.is_file() else {}
    if not found:
        return []
    best = max(found.values(), key=lambda parts: parts["valid"][f"valid_{best_by}"])
    return [(name, best[part][f"{part}_{key}"]) for part, key, name in measures]


def main(run):
    """Print a line for each score, and the average where there are all tasks."""
    by_task = {task: found for task in MEASURES if (found := scores(Path(run) / task))}
    rows = [
        [task, name, f"{percent:.1f}"] for task, found in by_task.items() for name, percent in found
    ]
    if len(by_task) == len(MEASURES):
        means = [sum(percent for _, percent in found) / len(found) for found in by_task.values()]
        rows.append(["average", "of the tasks", f"{sum(means) / len(means):.1f}"])
    print(format_table(rows) if rows else f"{run} holds no fine-tuned task")


if __name__ == "__main__":
    main(*sys.argv[1:])
