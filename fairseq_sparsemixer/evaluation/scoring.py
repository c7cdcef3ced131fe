"""Corpus scores: sacreBLEU's BLEU and chrF on detokenised text, each with its signature.

BLEU over tokens and COMET stand beside them where they are asked for. Functions over lists of
lines; the results are plain dicts, ready for JSON.
"""

import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch
from sacrebleu.metrics import CHRF
from sacrebleu.significance import PairedTest

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.text.bleu import make_bleu

# What a token is that stands for a hyphen: of `tokenizer.perl -a`, and of split_compounds.
SPLIT_HYPHENS = ("@-@", "##AT##-##AT##")


def score(
    hypotheses: Sequence[str],
    references: Sequence[str],
    tokeniser: str,
    official: Optional[Mapping[str, str]] = None,
) -> Dict[str, Any]:
    """BLEU and chrF2 of one system against one reference for each line.

    Args:
        hypotheses: detokenised lines.
        references: a line for each.
        tokeniser: of BLEU, see :func:`.text.bleu.find_tokeniser`; chrF has none.
        official: ``test_set`` (sacrebleu's name of it) and ``langpair``, for the signatures, where
            the reference is that of a published test set.

    Returns:
        ``{"bleu": {...}, "chrf": {...}}``, each with ``score`` (0 to 100, not rounded) and
        ``signature``; BLEU also with its ``tokeniser``, its n-gram ``precisions`` (percent),
        ``brevity_penalty`` and the lengths in tokens.

    Raises:
        UserError: the numbers of lines differ, or there is no line.
    """
    _check_lines(hypotheses, references)
    bleu, chrf = (_name_test_set(metric, official) for metric in (make_bleu(tokeniser), CHRF()))
    bleu_score = bleu.corpus_score(list(hypotheses), [list(references)])
    chrf_score = chrf.corpus_score(list(hypotheses), [list(references)])
    return {
        "bleu": {
            "score": bleu_score.score,
            "signature": str(bleu.get_signature()),
            "tokeniser": tokeniser,
            "precisions": list(bleu_score.precisions),
            "brevity_penalty": bleu_score.bp,
            "hypothesis_tokens": bleu_score.sys_len,
            "reference_tokens": bleu_score.ref_len,
        },
        "chrf": {"score": chrf_score.score, "signature": str(chrf.get_signature())},
    }


def _name_test_set(metric: Any, official: Optional[Mapping[str, str]]) -> Any:
    """The metric; its signature names the test set, which sacrebleu reads from its attributes."""
    vars(metric).update(official or {})
    return metric


def tokenised_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Dict[str, Any]:
    """BLEU over the tokens of lines that are already tokenised, split at white space alone.

    Comparable only where both sides went through the same tokeniser as the other figure's.
    ``fairseq-generate`` prints the same, but where its dictionary lacks pieces of the reference.

    Returns:
        ``score`` (0 to 100, not rounded) and ``signature`` (``tok:none``), which are those of
        ``sacrebleu --tokenize none --force``.

    Raises:
        UserError: the numbers of lines differ, or there is no line.
    """
    _check_lines(hypotheses, references)
    # Lines that end in " ." are what it is for: no warning.
    bleu = make_bleu("none", force=True)
    result = bleu.corpus_score(list(hypotheses), [list(references)])
    return {"score": result.score, "signature": str(bleu.get_signature())}


def split_compounds(lines: Sequence[str]) -> List[str]:
    r"""Hyphenated compounds in three tokens: ``word-word`` becomes ``word ##AT##-##AT## word``.

    Source: ``s{(\S)-(\S)}{$1 ##AT##-##AT## $2}g`` in tensor2tensor's ``get_ende_bleu.sh``, which
    the scores of Vaswani et al. (2017) went through. Like Perl's, matches do not overlap: in
    ``a-b-c`` only the first hyphen is split.

    Args:
        lines: tokens of Moses **without** ``-a``.

    Raises:
        UserError: a line holds a hyphen that was split before.
    """
    for number, line in enumerate(lines, 1):
        for token in SPLIT_HYPHENS:
            if token in line.split():
                raise UserError(
                    f"line {number} holds the token {token}: its compounds are split already, and "
                    "splitting them once more would raise BLEU; leave out --compound-split"
                )
    # As bytes, which are what Perl reads: they decide which matches overlap.
    pattern, replacement = rb"(\S)-(\S)", rb"\1 ##AT##-##AT## \2"
    return [re.sub(pattern, replacement, line.encode()).decode() for line in lines]


def check_comet() -> None:
    """Raise UserError unless COMET is installed."""
    try:
        import comet  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--comet needs the package unbabel-comet: run `pip install unbabel-comet`, or leave "
            "--comet out"
        ) from error


def comet_score(
    sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str], model: str
) -> Dict[str, Any]:
    """COMET of detokenised text, by a network that reads the source as well.

    Args:
        sources, hypotheses, references: as many lines each.
        model: name to download, or file of a checkpoint.

    Returns:
        ``score``, the mean over the lines (about 0 to 1 for most models, higher is better), and
        ``model``.
    """
    import comet

    path = model if Path(model).is_file() else comet.download_model(model)
    data = [
        {"src": source, "mt": hypothesis, "ref": reference}
        for source, hypothesis, reference in zip(sources, hypotheses, references)
    ]
    gpus = min(torch.cuda.device_count(), 1)
    result = comet.load_from_checkpoint(path).predict(data, batch_size=8, gpus=gpus)
    return {"score": float(result.system_score), "model": model}


def compare(
    hypotheses: Sequence[str],
    baseline: Sequence[str],
    references: Sequence[str],
    tokeniser: str,
    samples: int = 1000,
    official: Optional[Mapping[str, str]] = None,
) -> Dict[str, Any]:
    """Is a system's score different from a baseline's? Paired bootstrap over ``samples`` resamples.

    ``tokeniser`` and ``official`` are those of :func:`score`.

    Returns:
        ``{"bleu": {...}, "chrf": {...}}``, each with ``difference`` (system - baseline),
        ``p_value`` (sacreBLEU's, which is that of the side where the difference lies: of two
        equally good systems, one pair in ten has p < 0.05), the bootstrap ``mean`` and half width
        ``ci95`` of both systems, and ``signature``, which holds the seed (of ``SACREBLEU_SEED``,
        12345 when unset).

    Raises:
        UserError: the numbers of lines differ, or there is no line.
    """
    _check_lines(hypotheses, references)
    _check_lines(baseline, references)
    cached = [list(references)]
    test = PairedTest(
        [("baseline", list(baseline)), ("system", list(hypotheses))],
        {
            "bleu": _name_test_set(make_bleu(tokeniser, references=cached), official),
            "chrf": _name_test_set(CHRF(references=cached), official),
        },
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
