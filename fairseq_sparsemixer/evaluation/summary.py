"""What an evaluation found, as text."""

from typing import Any, Dict, Iterator, Optional

from fairseq_sparsemixer.evaluation.tokens import COMPOUND_SPLIT, TOKENISED
from fairseq_sparsemixer.tables import format_table


def format_evaluation(evaluation: Dict[str, Any]) -> str:
    """The table that ``evaluate`` prints of its JSON: a row for each system, then signatures."""
    systems = [("model", evaluation["scores"])]
    if "baseline" in evaluation:
        systems.append(("baseline", evaluation["baseline"]["scores"]))
    if evaluation["copy"] is not None:
        systems.append(("nearest copy", evaluation["copy"]["scores"]))
    rows = [["", "BLEU", "chrF2"]]
    for name, scores in systems:
        rows.append([name, *(_format_score(scores.get(metric)) for metric in ("bleu", "chrf"))])
    if "comparison" in evaluation:
        p_values = (evaluation["comparison"][metric]["p_value"] for metric in ("bleu", "chrf"))
        rows.append(["p (difference)", *(f"{p_value:.4f}" for p_value in p_values)])
    counts, data = evaluation["counts"], evaluation["data"]
    names = ", ".join(
        f"{checkpoint['name']} ({checkpoint['updates']} updates)"
        for checkpoint in evaluation["checkpoints"]
    )
    return "\n".join(
        [
            f"{data['name']} {data['source_lang']}-{data['target_lang']}: "
            f"{counts['hypothesis_lines']} lines, {counts['empty_hypotheses']} empty, "
            f"{counts['hypotheses_at_length_limit']} at the length limit; {names}",
            format_table(rows),
            f"BLEU  {evaluation['scores']['bleu']['signature']}",
            f"chrF2 {evaluation['scores']['chrf']['signature']}",
            *_further_scores(evaluation),
        ]
    )


def _further_scores(evaluation: Dict[str, Any]) -> Iterator[str]:
    """A line for each score beside sacreBLEU's, with what it is of."""
    systems = {"model": evaluation["scores"]}
    if "baseline" in evaluation:
        systems["baseline"] = evaluation["baseline"]["scores"]
    for kind in (TOKENISED, COMPOUND_SPLIT):
        found = {name: scores[kind.key] for name, scores in systems.items() if kind.key in scores}
        if found:
            values = ", ".join(f"{name} {score['score']:.2f}" for name, score in found.items())
            about = next(iter(found.values()))
            yield f"{kind.title}: {values} ({about['label']}; {about['signature']})"
    if "comet" in evaluation["scores"]:
        values = ", ".join(f"{name} {x['comet']['score']:.4f}" for name, x in systems.items())
        yield f"COMET: {values} ({evaluation['scores']['comet']['model']})"


def _format_score(score: Optional[Dict[str, Any]]) -> str:
    """A score with two decimals, or a dash where there is none."""
    return "-" if score is None else f"{score['score']:.2f}"
