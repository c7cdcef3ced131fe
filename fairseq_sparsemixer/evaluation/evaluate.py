"""Translate a test set and score it: sacreBLEU's BLEU and chrF on detokenised text."""

import time
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Tuple

from fairseq_sparsemixer.corpora.folder import unchanged
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation import scoring, several
from fairseq_sparsemixer.evaluation.options import ModelChoice, ScoreChoice, Search
from fairseq_sparsemixer.evaluation.scored_text import (
    TestSet,
    Text,
    copy_score,
    describe_test_set,
    find_test_set,
    given_test_set,
    read_text,
)
from fairseq_sparsemixer.evaluation.summary import format_evaluation
from fairseq_sparsemixer.evaluation.system import (
    generation_settings,
    output_paths,
    score_system,
)
from fairseq_sparsemixer.evaluation.translator import Translator, load_translator
from fairseq_sparsemixer.files import check_writable, read_lines, write_json
from fairseq_sparsemixer.locks import in_turn
from fairseq_sparsemixer.runs.record import versions


def evaluate(
    model: ModelChoice,
    search: Search,
    further: ScoreChoice,
    *,
    subset: str,
    files: Optional[Tuple[Path, Path]],
    baseline: Optional[str],
    output: Optional[Path],
) -> None:
    """Translate, score, write and print.

    Args:
        model: what to score.
        search: how it translates.
        further: how BLEU tokenises, and which scores stand beside sacreBLEU's.
        subset: of the prepared corpus, where there are no ``files``.
        files: source and reference.
        baseline: run folder or checkpoint file to compare with.
        output: JSON file; None for ``evaluation/SUBSET.CHECKPOINT.json`` in the run folder.

    Raises:
        UserError: there is no such model or text, they do not fit, or a package is missing.
    """
    started = time.perf_counter()
    if further.comet is not None:
        scoring.check_comet()
    translator = load_translator(model, search.precision)
    choices = (model, search, further)
    if len(translator.pairs) > 1:
        if files is not None or baseline is not None:
            raise UserError(
                "--source, --reference and --baseline are for one pair of languages, and the model "
                f"was trained on {several.names(translator.pairs)}: choose one with --target-lang"
            )
        output = output or _default_output(translator, subset)
        stem = output.with_suffix("")
        check_writable(output)
        systems = {}
        for languages in translator.pairs:
            one = translator.of_pair(languages)
            test_set = find_test_set(one, model.data, subset)
            systems[several.names([languages])] = _read(one, test_set, further)
        with in_turn(stem, beside=True):
            evaluations = {
                pair: _evaluate(system, *choices, None, stem.with_name(f"{stem.name}.{pair}"))
                for pair, system in systems.items()
            }
            evaluation = several.join(evaluations, subset, stem)
            evaluation["seconds"]["total"] = time.perf_counter() - started
            write_json(output, evaluation)
        print(several.format_pairs(evaluation))
    else:
        if files is None:
            test_set = find_test_set(translator, model.data, subset)
        else:
            test_set = given_test_set(*files)
        output = output or _default_output(translator, test_set.name)
        stem = output.with_suffix("")
        check_writable(output)
        system = _read(translator, test_set, further)
        with in_turn(stem, beside=True):
            evaluation = _evaluate(system, *choices, baseline, stem)
            evaluation["seconds"]["total"] = time.perf_counter() - started
            write_json(output, evaluation)
        print(format_evaluation(evaluation))
    print(f"written: {evaluation['hypotheses']} and {output}")


class _System(NamedTuple):
    """A translator, what it is scored on, and what is known of that."""

    translator: Translator
    test_set: TestSet
    text: Text
    about: Dict[str, Any]


def _read(translator: Translator, test_set: TestSet, further: ScoreChoice) -> _System:
    languages = (translator.source_lang, translator.target_lang)
    with unchanged(test_set.corpus):
        text = read_text(test_set, languages, further.tokenise)
        about = {
            "data": describe_test_set(test_set, translator, text.official),
            "copy": copy_score(test_set, translator.target_lang, text),
        }
    return _System(translator, test_set, text, about)


def _evaluate(
    system: _System,
    model: ModelChoice,
    search: Search,
    further: ScoreChoice,
    baseline: Optional[str],
    stem: Path,
) -> Dict[str, Any]:
    """Translate and score one pair of languages: what stands in the JSON file."""
    translator, test_set, text, about = system
    for each in [stem, _baseline_stem(stem)] if baseline is not None else [stem]:
        _check_outputs(each, test_set, translator.target_lang)
    other = None
    if baseline is not None:
        choice = model._replace(run=baseline)
        if not Path(baseline).is_dir():  # checkpoint files are taken as they are
            choice = choice._replace(average=None)
        other = _load_baseline(choice, search, (translator.source_lang, translator.target_lang))
    evaluation = score_system(translator, text, search, further, stem, model.run)
    evaluation.update(about)
    if other is not None:
        scored = score_system(other, text, search, further, _baseline_stem(stem), str(baseline))
        evaluation.update(_compare(evaluation, scored, text))
    evaluation["generation"] = generation_settings(translator, search)
    packages = ("fairseq_sparsemixer", "fairseq", "torch", "sacrebleu")
    evaluation["versions"] = versions((*packages, *translator.subwords.packages))
    return evaluation


def _default_output(translator: Translator, name: str) -> Path:
    """``evaluation/NAME.CHECKPOINT.json`` in the run folder."""
    paths = [checkpoint.path for checkpoint in translator.checkpoints]
    checkpoints = "+".join(path.stem for path in paths)
    return paths[0].parent / "evaluation" / f"{name}.{checkpoints}.json"


def _check_outputs(stem: Path, test_set: TestSet, language: str) -> None:
    """Raise UserError where an output would overwrite its own text, or cannot be written."""
    for path in output_paths(stem, language):
        check_writable(path)
        if path.resolve() in (test_set.source.resolve(), test_set.reference.resolve()):
            raise UserError(f"translations would overwrite {path}; choose another --output")


def _baseline_stem(stem: Path) -> Path:
    """That of the files of the model that is compared with."""
    return stem.with_name(f"{stem.name}.baseline")


def _load_baseline(model: ModelChoice, search: Search, languages: Tuple[str, str]) -> Translator:
    """The model that is compared with, in these languages."""
    translator = load_translator(model, search.precision)
    pairs = translator.pairs or [(translator.source_lang, translator.target_lang)]
    if languages not in pairs:
        raise UserError(
            f"--baseline {model.run} translates {several.names(pairs)}, and RUN_DIR "
            f"{several.names([languages])}: give two of one pair"
        )
    return translator.of_pair(languages) if len(pairs) > 1 else translator


def _compare(evaluation: Dict[str, Any], baseline: Dict[str, Any], text: Text) -> Dict[str, Any]:
    """What ``--baseline`` adds: the other model's evaluation, and the test of the difference."""
    ours, theirs = (read_lines(Path(each["hypotheses"])) for each in (evaluation, baseline))
    comparison = scoring.compare(
        ours, theirs, text.references, text.tokeniser, official=text.official
    )
    return {"baseline": baseline, "comparison": comparison}
