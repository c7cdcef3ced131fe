"""What an evaluation of a model of several pairs of languages holds, made from those of each."""

from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Sequence, Tuple

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import read_lines, sha256_of, write_lines
from fairseq_sparsemixer.tables import format_table

METRICS = ("bleu", "chrf")


def names(pairs: Iterable[Tuple[str, str]]) -> str:
    """``en-de, en-fr``."""
    return ", ".join("-".join(pair) for pair in pairs)


def check_one(pairs: Sequence[Tuple[str, str]]) -> None:
    """Raise UserError where a model's pairs of languages leave more than one to choose from."""
    if len(pairs) > 1:
        raise UserError(f"the model was trained on {names(pairs)}: choose one with --target-lang")


def mean_signature(signatures: Mapping[str, str]) -> str:
    """Of the mean of several pairs' scores, by pair."""
    return f"mean of {', '.join(signatures)}: {', '.join(dict.fromkeys(signatures.values()))}"


def average(scores: Mapping[str, Mapping[str, Any]]) -> Dict[str, Any]:
    """The mean of each pair's scores: every pair counts the same, however many lines it has.

    Args:
        scores: by pair what :func:`.scoring.score` returns.

    Returns:
        ``bleu`` and ``chrf``, with ``score``, ``signature``, which says that it is a mean, and of
        BLEU ``tokeniser``.
    """
    found: Dict[str, Any] = {}
    for metric in METRICS:
        own = [each[metric] for each in scores.values()]
        signatures = {pair: each[metric]["signature"] for pair, each in scores.items()}
        found[metric] = {
            "score": sum(each["score"] for each in own) / len(own),
            "signature": mean_signature(signatures),
        }
    tokenisers = dict.fromkeys(each["bleu"]["tokeniser"] for each in scores.values())
    found["bleu"]["tokeniser"] = ", ".join(tokenisers)
    return found


def join(evaluations: Mapping[str, Dict[str, Any]], subset: str, stem: Path) -> Dict[str, Any]:
    """One evaluation of all pairs, for tables and reports: the lines of all, as domains.

    Writes sources, references, translations and the pair of each line beside ``stem``.

    Args:
        evaluations: by pair that of the model on it.
        subset: of the corpus.
        stem: of the files.
    """
    every = list(evaluations.values())
    texts = {
        "source": [each["data"]["source"] for each in every],
        "reference": [each["data"]["reference"] for each in every],
        "hypotheses": [each["hypotheses"] for each in every],
    }
    paths = {side: stem.with_name(f"{stem.name}.{side}") for side in texts}
    labels: List[str] = []
    for side, files in texts.items():
        lines = [read_lines(Path(file)) for file in files]
        write_lines(paths[side], [line for part in lines for line in part])
        labels = [pair for pair, part in zip(evaluations, lines) for _ in part]
    write_lines(stem.with_name(f"{stem.name}.domain"), labels)
    copies = {
        pair: each["copy"]["scores"]
        for pair, each in evaluations.items()
        if each["copy"] is not None and len(each["copy"]["scores"]) == len(METRICS)
    }
    counts: Counter = Counter()
    for each in every:
        counts.update(each["counts"])
    return {
        **{key: every[0][key] for key in ("checkpoints", "model", "generation", "versions")},
        "scores": average({pair: each["scores"] for pair, each in evaluations.items()}),
        "pairs": {
            pair: {key: each[key] for key in ("scores", "copy", "counts", "hypotheses", "data")}
            for pair, each in evaluations.items()
        },
        "copy": {"source": None, "scores": average(copies)} if len(copies) == len(every) else None,
        "counts": dict(counts),
        "hypotheses": str(paths["hypotheses"]),
        "data": {
            "name": subset,
            "sacrebleu": None,
            "source_lang": None,
            "target_lang": None,
            **{side: str(paths[side]) for side in ("source", "reference")},
            **{f"{side}_sha256": sha256_of(paths[side]) for side in ("source", "reference")},
        },
        "seconds": {
            key: sum(each["seconds"][key] for each in every) for key in every[0]["seconds"]
        },
    }


def format_pairs(evaluation: Dict[str, Any]) -> str:
    """The table that ``evaluate`` prints: a row for each pair, and their mean."""
    rows = [["", "BLEU", "chrF2", "nearest copy"]]
    pairs = {**evaluation["pairs"], "mean": evaluation}
    for pair, each in pairs.items():
        copy = each["copy"]
        rows.append(
            [
                pair,
                *(f"{each['scores'][metric]['score']:.2f}" for metric in METRICS),
                "-" if copy is None else f"{copy['scores']['bleu']['score']:.2f}",
            ]
        )
    signatures = [
        f"{name} {evaluation['scores'][metric]['signature']}"
        for name, metric in zip(("BLEU ", "chrF2"), METRICS)
    ]
    return "\n".join([format_table(rows), *signatures])
