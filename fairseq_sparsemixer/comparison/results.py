"""The test set as plain data: scores, significance, domains; and the settings of the arms."""

import json
import statistics
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from tqdm import tqdm

from fairseq_sparsemixer.comparison.conditions import (
    check_comparable,
    find_text,
    joint_p_value,
    read_texts,
    tokeniser_of,
)
from fairseq_sparsemixer.comparison.means import deviation_or_none
from fairseq_sparsemixer.comparison.table import build_table
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation import scoring
from fairseq_sparsemixer.files import read_lines
from fairseq_sparsemixer.runs.folder import Run
from fairseq_sparsemixer.runs.grouping import Arm

SIGNIFICANT = 0.05
LEAST_LINES = 50
"""A domain with fewer is not tested: resamples of a few lines are no sample of a domain."""


class TestText(NamedTuple):
    """The test set.

    Attributes:
        source_path: of it.
        sources, references: a line each.
        domains: a label for each line, or None.
    """

    source_path: Path
    sources: List[str]
    references: List[str]
    domains: Optional[List[str]]


def languages(runs: Sequence[Run]) -> Dict[str, Optional[str]]:
    """``source`` and ``target`` of scored runs, where they tell."""
    data = [run.evaluation["data"] for run in runs]
    return {
        side: next((each[f"{side}_lang"] for each in data if each.get(f"{side}_lang")), None)
        for side in ("source", "target")
    }


class DomainScore(NamedTuple):
    """BLEU of one arm on one domain.

    Attributes:
        by_seed: of each counted run.
        difference: of its mean to the baseline's mean; None for the baseline.
        p_value: :func:`.conditions.joint_p_value` of the pairs of runs; None for the baseline, and
            for a domain of less than :data:`LEAST_LINES` lines.
    """

    by_seed: Dict[int, float]
    difference: Optional[float]
    p_value: Optional[float]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.mean(self.by_seed.values())

    @property
    def deviation(self) -> Optional[float]:
        """The sample standard deviation over seeds; None for one seed."""
        return deviation_or_none(list(self.by_seed.values()))


class Results(NamedTuple):
    """Scores of all arms.

    Attributes:
        table: what :func:`.table.build_table` returns.
        domains: the number of sentences of each domain; empty where the test set has none.
        by_domain: for each arm its scores by domain.
        problem: why there is no significance and no domain; empty if there is.
    """

    table: Dict[str, Any]
    domains: Dict[str, int]
    by_domain: Dict[str, Dict[str, DomainScore]]
    problem: str


def read_test_text(runs: Sequence[Run]) -> TestText:
    """The text that all ``runs`` were scored on.

    Raises:
        UserError: it is not where it was, or its domains do not fit.
    """
    source, reference = (find_text(runs, side) for side in ("source", "reference"))
    references, domains = read_lines(reference), None
    labels = reference.with_suffix(".domain")
    if labels.is_file():
        domains = read_lines(labels)
        if len(domains) != len(references):
            raise UserError(
                f"{labels} has {len(domains)} lines and {reference} has {len(references)}; make "
                "the corpus anew, or remove the former"
            )
    return TestText(source, read_lines(source), references, domains)


def default_baseline(arms: Sequence[Arm]) -> Optional[str]:
    """The first arm of router ``switch`` that counts, else the dense one, else any; or None."""
    counted = [arm for arm in arms if arm.counted]
    for wanted in ("switch", None):
        for arm in counted:
            if arm.runs[0].settings.get("model.router") == wanted:
                return arm.name
    return counted[0].name if counted else None


def read_results(
    arms: Sequence[Arm], baseline: str, text: Optional[TestText], problem: str
) -> Results:
    """Scores and comparisons with the baseline.

    Args:
        arms: all.
        baseline: name of an arm.
        text: of the test set; without it there are neither significance nor domains.
        problem: why there is no ``text``.

    Raises:
        UserError: no such baseline, or scores that cannot be compared.
    """
    runs = [run for arm in arms for run in arm.counted]
    hypotheses: Dict[Path, List[str]] = {}
    if text is not None:
        try:
            hypotheses = read_texts(runs)
        except UserError as error:
            problem = str(error)
    if not hypotheses:
        return Results(_table_without_text(arms, baseline), {}, {}, problem)
    table = build_table(list(arms), baseline)
    assert text is not None
    if text.domains is None:
        return Results(table, {}, {}, "")
    lines: Dict[str, List[int]] = {}
    for line, domain in enumerate(text.domains):
        lines.setdefault(domain, []).append(line)
    by_domain = _by_domain(arms, baseline, table["comparisons"], hypotheses, text.references, lines)
    return Results(table, {domain: len(own) for domain, own in lines.items()}, by_domain, "")


def _table_without_text(arms: Sequence[Arm], baseline: str) -> Dict[str, Any]:
    """Like that of all arms, but for comparisons: each arm alone is its own baseline."""
    check_comparable([run for arm in arms for run in arm.counted])
    # All, where none has the name: build_table says so.
    base = [arm for arm in arms if arm.name == baseline] or list(arms)
    table = build_table(base, baseline)
    rows = [
        row
        for arm in arms
        if arm.counted
        for row in build_table([arm], arm.name)["rows"]
        if row["note"] is None
    ]
    return {**table, "rows": rows}


def _by_domain(
    arms: Sequence[Arm],
    baseline: str,
    comparisons: Dict[str, List[Dict[str, Any]]],
    hypotheses: Dict[Path, List[str]],
    references: List[str],
    lines: Dict[str, List[int]],
) -> Dict[str, Dict[str, DomainScore]]:
    """BLEU of each arm by domain, tested on the pairs of runs of the whole test set."""
    folders = {(arm.name, run.seed): run.folder for arm in arms for run in arm.counted}
    scores: Dict[str, Dict[str, DomainScore]] = {}
    base = next(arm for arm in arms if arm.name == baseline)
    counted = [base, *(arm for arm in arms if arm.counted and arm is not base)]
    with tqdm(total=len(counted) * len(lines), desc="domains", unit="score", disable=None) as bar:
        for arm in counted:
            for domain, own in lines.items():
                reference = [references[n] for n in own]
                tokeniser = tokeniser_of(base.counted[0], domain)

                def chosen(name: str, seed: int, own: List[int] = own) -> List[str]:
                    return [hypotheses[folders[name, seed]][n] for n in own]

                by_seed = {
                    run.seed: scoring.score(chosen(arm.name, run.seed), reference, tokeniser)[
                        "bleu"
                    ]["score"]
                    for run in arm.counted
                }
                score = DomainScore(by_seed, None, None)
                if arm is not base:
                    difference = score.mean - scores[baseline][domain].mean
                    p_value = None
                    if len(own) >= LEAST_LINES:
                        tests = [
                            scoring.compare(
                                chosen(arm.name, pair["seed"]),
                                chosen(baseline, pair["baseline_seed"]),
                                reference,
                                tokeniser,
                            )["bleu"]
                            for pair in comparisons[arm.name]
                        ]
                        p_value = joint_p_value(tests, difference)
                    score = DomainScore(by_seed, difference, p_value)
                scores.setdefault(arm.name, {})[domain] = score
                bar.update()
    return {arm.name: scores[arm.name] for arm in arms if arm.name in scores}


def nearest_copy(runs: Sequence[Run]) -> Optional[Dict[str, Optional[float]]]:
    """BLEU and chrF of copying the nearest training sentence, if a run's evaluation has them."""
    for run in runs:
        copied = run.evaluation.get("copy")
        if copied:
            scores = copied["scores"]
            return {key: (scores.get(key) or {}).get("score") for key in ("bleu", "chrf")}
    return None


def notes(table: Dict[str, Any], arms: Sequence[Arm]) -> List[str]:
    """What a reader of the results must know, without what the page says elsewhere."""
    of_runs = {run.note for arm in arms for run in arm.runs if run.note}
    return [
        note
        for note in table["notes"]
        # Of the baseline's scored loss; the report's speed-up is of its best.
        if not note.endswith(("never reaches the target", "is below the target"))
        and not any(note.endswith(f": {each}") for each in of_runs)
    ]


def compare_settings(
    arms: Sequence[Arm],
) -> Tuple[Dict[str, str], Dict[str, Dict[str, List[str]]]]:
    """The settings that all arms share, and for each other one the arms of each value.

    What dense arms have not is shared if all others share it.
    """
    common: Dict[str, str] = {}
    differing: Dict[str, Dict[str, List[str]]] = {}
    with_experts = [arm for arm in arms if "model.router" in arm.runs[0].settings]
    for key in sorted({key for arm in arms for key in arm.runs[0].settings}):
        holders = [arm for arm in arms if key in arm.runs[0].settings]
        values = {arm.name: _text(arm.runs[0].settings.get(key)) for arm in arms}
        if len({values[arm.name] for arm in holders}) == 1 and holders in (arms, with_experts):
            common[key] = values[holders[0].name]
        else:
            for name, value in values.items():
                differing.setdefault(key, {}).setdefault(value, []).append(name)
    return common, differing


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value)


def origins(runs: Sequence[Run]) -> Dict[str, List[str]]:
    """Versions, git revision, device and seeds that runs record, each with all its values."""
    found: Dict[str, Dict[str, None]] = {}

    def note(key: str, value: Any) -> None:
        if value not in (None, [], {}):
            found.setdefault(key, {})[str(value)] = None

    for run in sorted(runs, key=lambda run: run.seed):
        note("seeds", run.seed)
    for run in runs:
        record, evaluation = run.record, run.evaluation
        git = record.get("git")
        if git:
            note("git revision", git["revision"] + (" (changed)" if git["dirty"] else ""))
        for gpu in record.get("gpus") or []:
            note("GPU of training", gpu)
        note("device of scoring", evaluation.get("generation", {}).get("device"))
        versions = {**evaluation.get("versions", {}), **(record.get("versions") or {})}
        for package, version in versions.items():
            note(package, version)
    return {key: list(values) for key, values in found.items()}
