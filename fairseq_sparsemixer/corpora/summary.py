"""What is printed of a corpus that is made."""

from typing import Any, Dict

from fairseq_sparsemixer.tables import format_table


def summary(record: Dict[str, Any]) -> str:
    """A short table of a record: sizes, unknown pieces and copy scores of the splits."""
    if "tasks" in record:
        return _of_tasks(record["tasks"])
    source, target = record["languages"]
    rows = [["", "sentences", f"pieces {source}", f"pieces {target}", "<unk>", "copy BLEU"]]
    for split, counts in record["splits"].items():
        sides = [counts[source], counts[target]]
        score = record.get("copy_score", {}).get(split)
        rows.append(
            [
                f"{split:>5}",
                f"{sides[0]['sentences']:,}",
                *(f"{side['pieces']:,}" for side in sides),
                f"{sum(side['unknown'] for side in sides):,}",
                f"{score['bleu']:.1f}" if score else "-",
            ]
        )
    lines = [format_table(rows)]
    if "copy_score" in record:
        lines.append(
            "copy BLEU: what copying the most similar training sentence's translation scores "
            f"({record['copy_score']['test']['signature']})"
        )
    if "leaks" in record:
        for name, leak in record["leaks"].items():
            lines.append(
                f"split ({name.replace('_', ' ')}): copy BLEU {leak['bleu']:.1f}, "
                f"{100 * leak['near']:.1f} % of the held-out text has a near duplicate in training"
            )
    if "raw" in record:
        for name, counts in (("raw text", record["raw"]), ("cleaning", record["cleaning"])):
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in counts["dropped"].items())
            lines.append(f"{name}: dropped {reasons or 'nothing'}")
        lines.append(
            f"{record['raw']['held_out_sources']:,} sources of the raw training text are also in "
            "the validation or test text; none was dropped for that"
        )
    return "\n".join(lines)


def _of_tasks(tasks: Dict[str, Any]) -> str:
    rows = [["", "train", "valid", "valid1", "<unk>"]]
    for name, task in tasks.items():
        counts = [task["sentences"].get(split) for split in rows[0][1:4]]
        sizes = ["-" if count is None else f"{count:,}" for count in counts]
        rows.append([name, *sizes, f"{task['unknown']:,}"])
    return format_table(rows)
