"""What is printed of a corpus that is made."""

from typing import Any, Dict, List

from fairseq_sparsemixer.corpora.folder import Languages, sides_of
from fairseq_sparsemixer.tables import format_table


def summary(record: Dict[str, Any]) -> str:
    """A short table of a record: sizes, unknown pieces and copy scores of the splits."""
    if "tasks" in record:
        return _of_tasks(record["tasks"])
    pairs = record.get("pairs")
    source, target = ("source", "target") if pairs else record["languages"]
    rows = [["", "sentences", f"pieces {source}", f"pieces {target}", "<unk>", "copy BLEU"]]
    scores = record.get("copy_score", {})
    for pair in pairs or [""]:
        languages = sides_of(pair) if pair else (source, target)
        rows += _rows(record["splits"], languages, scores, f".{pair}" if pair else "")
    lines = [format_table(rows)]
    if "copy_score" in record:
        lines.append(
            "copy BLEU: what copying the most similar training sentence's translation scores "
            f"({next(iter(scores.values()))['signature']})"
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


def _rows(
    splits: Dict[str, Any], languages: Languages, scores: Dict[str, Any], of_pair: str
) -> List[List[str]]:
    """Of a pair of languages, for each split."""
    rows = []
    for split, counts in splits.items():
        sides = [counts[language] for language in languages]
        score = scores.get(f"{split}{of_pair}")
        rows.append(
            [
                f"{split:>5}{of_pair}",
                f"{sides[0]['sentences']:,}",
                *(f"{side['pieces']:,}" for side in sides),
                f"{sum(side['unknown'] for side in sides):,}",
                f"{score['bleu']:.1f}" if score else "-",
            ]
        )
    return rows
