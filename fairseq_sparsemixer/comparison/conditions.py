"""Scores of several runs against each other: whether they may be compared, and how they differ."""

from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation import scoring
from fairseq_sparsemixer.evaluation.tokens import COMPOUND_SPLIT, TOKENISED
from fairseq_sparsemixer.files import read_lines, sha256_of
from fairseq_sparsemixer.runs.folder import Run
from fairseq_sparsemixer.runs.grouping import Arm
from fairseq_sparsemixer.runs.metrics import MAIN, Metric
from fairseq_sparsemixer.text.bleu import DEFAULT_TOKENISER

TOLERANCE = 0.005
"""By how much a difference in BLEU may be off the recorded one."""


FURTHER = (
    *(Metric(kind.key, kind.title, 2) for kind in (TOKENISED, COMPOUND_SPLIT)),
    Metric("comet", "COMET", 4),
)
"""Scores of translations that are not always there."""
METRICS = (*MAIN, *FURTHER)


def main_metric(runs: Sequence[Run]) -> Optional[Metric]:
    """What scored runs are ranked by: the first of :data:`~.metrics.MAIN` that all have."""
    return next((each for each in MAIN if all(run.scores.get(each.key) for run in runs)), None)


def check_comparable(runs: Sequence[Run]) -> None:
    """Refuse scores of different text, search or metrics.

    Raises:
        UserError: naming two runs and what differs.
    """
    known: Dict[str, Tuple[Run, Any]] = {}
    for run in runs:
        for aspect, value in _conditions(run).items():
            other, others = known.setdefault(aspect, (run, value))
            if value != others:
                raise UserError(
                    f"{other.folder} and {run.folder} cannot be compared: their evaluations "
                    f"differ in {aspect} ({others} and {value}); evaluate both alike and choose "
                    "these evaluations with --scores, or leave one out of RUN"
                )


def _conditions(run: Run) -> Dict[str, Any]:
    """What a run was scored under. A metric that it does not have makes no condition."""
    data, generation = run.evaluation["data"], run.evaluation["generation"]
    averaged = [
        checkpoint.get("averaged_from") or [] for checkpoint in run.evaluation["checkpoints"]
    ]
    return {
        "source text": data["source_sha256"],
        "reference": data["reference_sha256"],
        "the number of checkpoints averaged": [max(len(names), 1) for names in averaged],
        # Where it ran and how lines were batched decides only how fast it was.
        **{
            key: value
            for key, value in generation.items()
            if key not in ("device", "dictionaries", "max_tokens")
        },
        **{
            f"the signature of {metric.title}": signature_of(run.scores[metric.key])
            for metric in METRICS
            if run.scores.get(metric.key)
        },
    }


def signature_of(score: Dict[str, Any]) -> str:
    """What a score is of: its label, signature and model, as far as it has them."""
    return ", ".join(str(score[key]) for key in ("label", "signature", "model") if score.get(key))


def read_texts(runs: Iterable[Run]) -> Dict[Path, List[str]]:
    """The translations of each run, by its folder.

    Raises:
        UserError: they are not there.
    """
    return {run.folder: read_lines(_hypotheses_path(run)) for run in runs}


def _hypotheses_path(run: Run) -> Path:
    assert run.scores_path is not None
    written = Path(run.evaluation["hypotheses"])
    # `evaluate` writes them beside the scores; a path relative to where it ran may by now be
    # another run's.
    for path in (run.scores_path.parent / written.name, written):
        if path.is_file():
            return path
    raise UserError(
        f"there is no {written}, which {run.scores_path} was scored for; copy it beside that "
        "file, or run `fairseq-sparsemixer evaluate` again"
    )


def find_text(runs: Sequence[Run], side: str) -> Path:
    """The file of the test set's ``side`` (source, reference) that all runs were scored on.

    A relative path is looked for where this process runs, and below each parent of the run's
    folder: a folder of runs and their data may have been moved.

    Raises:
        UserError: it is not where it was.
    """
    data = runs[0].evaluation["data"]
    for run in runs:
        written = Path(run.evaluation["data"][side])
        for path in (written, *(parent / written for parent in run.folder.resolve().parents)):
            if path.is_file() and sha256_of(path) == data[f"{side}_sha256"]:
                return path
    raise UserError(
        f"{data[side]}, which {runs[0].scores_path} was scored with, is not there or was changed; "
        "start this command in the folder where `fairseq-sparsemixer evaluate` ran"
    )


def compare_arms(
    arm: Arm, baseline: Arm, texts: Dict[Path, List[str]], references: List[str]
) -> List[Dict[str, Any]]:
    """Paired bootstrap tests of an arm's runs against the baseline's of equal seed.

    Where no seed is in both, the first run of each is taken.

    Returns:
        For each pair its ``seed``, ``baseline_seed`` and what :func:`scoring.compare` returns.

    Raises:
        UserError: translations have not the BLEU that is recorded for them.
    """
    others = {run.seed: run for run in baseline.counted}
    pairs = [(run, others[run.seed]) for run in arm.counted if run.seed in others]
    comparisons = []
    for run, other in pairs or [(arm.counted[0], baseline.counted[0])]:
        comparison = _compare(run, texts[run.folder], texts[other.folder], references)
        recorded = run.scores["bleu"]["score"] - other.scores["bleu"]["score"]
        if abs(comparison["bleu"]["difference"] - recorded) > TOLERANCE:
            raise UserError(
                f"{_hypotheses_path(run)} or {_hypotheses_path(other)} was changed: it has not the "
                "BLEU recorded for it; run `fairseq-sparsemixer evaluate` again for both runs"
            )
        comparisons.append({"seed": run.seed, "baseline_seed": other.seed, **comparison})
    return comparisons


def _compare(
    run: Run, hypotheses: List[str], others: List[str], references: List[str]
) -> Dict[str, Any]:
    """What :func:`scoring.compare` returns; of a model of several pairs of languages the mean of
    their differences, and one p-value for all (:func:`joint_p_value`)."""
    tests: List[Dict[str, Any]] = []
    start = 0
    for pair in run.evaluation.get("pairs", {}).values():
        lines = slice(start, start + pair["counts"]["hypothesis_lines"])
        start = lines.stop
        texts = (hypotheses[lines], others[lines], references[lines])
        tests.append(scoring.compare(*texts, pair["scores"]["bleu"]["tokeniser"]))
    if not tests:
        official = _official(run)
        return scoring.compare(hypotheses, others, references, tokeniser_of(run), official=official)
    found = {}
    for metric in tests[0]:
        own = [test[metric] for test in tests]
        mean = sum(test["difference"] for test in own) / len(own)
        found[metric] = {
            "difference": mean,
            "p_value": joint_p_value(own, mean),
            "signature": f"the largest p-value of the pairs of languages, {own[0]['signature']}",
        }
    return found


def joint_p_value(tests: Sequence[Dict[str, Any]], mean: float) -> float:
    """One p-value for the pairs of runs of two arms, or of their pairs of languages: the largest.

    Args:
        tests: ``difference`` and ``p_value`` of each pair.
        mean: the difference of the arms' means.

    Returns:
        1 unless all pairs differ in the direction of ``mean``: seeds (or languages) that contradict
        each other show no difference of the arms.
    """
    agree = all(test["difference"] * mean > 0 for test in tests)
    return max(test["p_value"] for test in tests) if agree else 1.0


def tokeniser_of(run: Run, domain: str = "") -> str:
    """What BLEU was computed with; all runs that are comparable have the same.

    Args:
        domain: of the lines, where it may be a pair of languages with a tokeniser of its own.
    """
    of_pair = run.evaluation.get("pairs", {}).get(domain)
    scores = run.scores if of_pair is None else of_pair["scores"]
    # Evaluations of earlier versions tell no tokeniser, and had but this.
    return scores["bleu"].get("tokeniser", DEFAULT_TOKENISER)


def _official(run: Run) -> Optional[Dict[str, str]]:
    """What the signatures call the test set, if it is a published one."""
    data = run.evaluation["data"]
    if not data.get("sacrebleu"):
        return None
    langpair = f"{data['source_lang']}-{data['target_lang']}"
    return {"test_set": data["sacrebleu"], "langpair": langpair}
