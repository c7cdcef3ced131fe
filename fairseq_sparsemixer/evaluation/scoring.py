"""Corpus scores of detokenised text: sacreBLEU's BLEU and chrF, each with its signature.

Pure functions over lists of lines; the results are plain dicts, ready for JSON.
"""

from typing import Any, Dict, List, Sequence

from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from fairseq_sparsemixer.errors import UserError


def score(hypotheses: Sequence[str], references: Sequence[str]) -> Dict[str, Any]:
    """BLEU and chrF2 of one system against one reference for each line.

    Returns:
        ``{"bleu": {...}, "chrf": {...}}``, each with ``score`` (0 to 100, not rounded) and
        ``signature``; BLEU also with its n-gram ``precisions`` (percent), ``brevity_penalty``
        and the lengths in tokens.

    Raises:
        UserError: the numbers of lines differ, or there is no line.
    """
    _check_lines(hypotheses, references)
    bleu, chrf = BLEU(), CHRF()
    bleu_score = bleu.corpus_score(list(hypotheses), [list(references)])
    chrf_score = chrf.corpus_score(list(hypotheses), [list(references)])
    return {
        "bleu": {
            "score": bleu_score.score,
            "signature": str(bleu.get_signature()),
            "precisions": list(bleu_score.precisions),
            "brevity_penalty": bleu_score.bp,
            "hypothesis_tokens": bleu_score.sys_len,
            "reference_tokens": bleu_score.ref_len,
        },
        "chrf": {"score": chrf_score.score, "signature": str(chrf.get_signature())},
    }


def compare(
    hypotheses: Sequence[str],
    baseline: Sequence[str],
    references: Sequence[str],
    samples: int = 1000,
) -> Dict[str, Any]:
    """Is a system's score different from a baseline's? Paired bootstrap over ``samples`` resamples.

    Returns:
        ``{"bleu": {...}, "chrf": {...}}``, each with ``difference`` (system - baseline),
        ``p_value`` (two-sided), the bootstrap ``mean`` and half width ``ci95`` of both systems,
        and ``signature``, which holds the seed (of ``SACREBLEU_SEED``, 12345 when unset).

    Raises:
        UserError: the numbers of lines differ, or there is no line.
    """
    _check_lines(hypotheses, references)
    _check_lines(baseline, references)
    test = PairedTest(
        [("baseline", list(baseline)), ("system", list(hypotheses))],
        {"bleu": BLEU(references=[list(references)]), "chrf": CHRF(references=[list(references)])},
        references=None,
        test_type="bs",
        n_samples=samples,
    )
    signatures, results = test()
    # PairedTest names its results after the scores ("chrF2"), in the order of the metrics.
    names = [name for name in results if name != "System"]
    comparisons = {}
    for key, name in zip(("bleu", "chrf"), names):
        baseline_result, system_result = results[name]
        comparisons[key] = _comparison(baseline_result, system_result, str(signatures[name]))
    return comparisons


def _comparison(baseline: Any, system: Any, signature: str) -> Dict[str, Any]:
    """One metric's :class:`sacrebleu.significance.Result` of each system, as a dict."""
    difference = float(system.score - baseline.score)
    return {
        "difference": difference,
        # sacrebleu counts resamples strictly above the observed difference, and so finds two
        # identical systems different (p = 0.001). No difference is never significant.
        "p_value": float(system.p_value) if difference else 1.0,
        "system": {"mean": float(system.mean), "ci95": float(system.ci)},
        "baseline": {"mean": float(baseline.mean), "ci95": float(baseline.ci)},
        "signature": signature,
    }


def _check_lines(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    """Raise UserError unless there is one hypothesis for each of at least one reference."""
    if len(hypotheses) != len(references):
        raise UserError(
            f"{len(hypotheses)} hypotheses cannot be scored against {len(references)} reference "
            "lines; give files with the same number of lines"
        )
    if not references:
        raise UserError("there are no lines to score; give a reference that is not empty")


def empty_lines(lines: Sequence[str]) -> int:
    """How many of ``lines`` hold nothing but white space."""
    return sum(not line.strip() for line in lines)


def format_table(rows: List[List[str]]) -> str:
    """Rows of cells as text: the first column left-aligned, the others right-aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )
