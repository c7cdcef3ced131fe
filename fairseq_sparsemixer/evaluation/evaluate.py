"""Translate a test set and score it: sacreBLEU's BLEU and chrF on detokenised text."""

import argparse
import importlib.metadata
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, NamedTuple, Optional

from fairseq_sparsemixer.commands.flags import precision_of
from fairseq_sparsemixer.corpora.folder import CORPUS_RECORD
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.average import average_in_run
from fairseq_sparsemixer.evaluation.options import (
    build_translator,
)
from fairseq_sparsemixer.evaluation.tokens import (
    COMPOUND_SPLIT,
    TOKENISED,
    compounds_split,
    score_tokens,
    token_paths,
)
from fairseq_sparsemixer.files import check_writable, read_lines, sha256_of, write_json, write_lines

if TYPE_CHECKING:
    from fairseq_sparsemixer.evaluation.translator import Translation, Translator


class TestSet(NamedTuple):
    """Raw text to score on.

    Attributes:
        name: of the subset or the source file; names the default output.
        source, reference: text files with as many lines.
        corpus: the prepared corpus they belong to, if any.
    """

    name: str
    source: Path
    reference: Path
    corpus: Optional[Path]


class Text(NamedTuple):
    """What is scored: sources, a reference for each, and ``official`` of :func:`.scoring.score`."""

    sources: List[str]
    references: List[str]
    official: Optional[Dict[str, str]]


def run(args: argparse.Namespace) -> None:
    """Translate, score, write and print."""
    from fairseq_sparsemixer.evaluation.scoring import check_comet

    started = time.perf_counter()
    if args.output is not None:
        if args.output.suffix != ".json":
            raise UserError(f"--output {args.output} holds scores; give it a name ending in .json")
        check_writable(args.output)
    if (args.source is None) != (args.reference is None):
        raise UserError("--source and --reference go together; give both or neither")
    if args.comet is not None:
        check_comet()
    translator = _build_translator(args)
    test_set = find_test_set(args, translator)
    sources = read_lines(test_set.source)
    references = read_lines(test_set.reference)
    if len(sources) != len(references):
        raise UserError(
            f"{test_set.source} has {len(sources)} lines and {test_set.reference} has "
            f"{len(references)}; give files that match with --source and --reference"
        )
    output = args.output or default_output(translator, test_set)
    _check_outputs(output.with_suffix(""), test_set, translator.target_lang)
    text = Text(sources, references, official_name(test_set, translator))
    copied = copy_score(test_set, translator.target_lang, references, text.official)
    report = _evaluate(translator, text, output.with_suffix(""), args)
    report["data"] = _describe_data(test_set, translator, text.official)
    report["copy"] = copied
    if args.baseline is not None:
        report.update(_evaluate_baseline(report, text, output, args))
    report["generation"] = generation_settings(translator, args)
    report["versions"] = versions(translator)
    report["seconds"]["total"] = time.perf_counter() - started
    write_json(output, report)
    print(format_report(report))
    print(f"written: {report['hypotheses']} and {output}")


def _build_translator(args: argparse.Namespace) -> "Translator":
    """The translator that the flags name, of an average where --last or --best ask for one."""
    for choice in ("last", "best"):
        count = getattr(args, choice)
        if count is not None:
            checkpoint = average_in_run(Path(args.run_dir), choice, count).name
            args = argparse.Namespace(**{**vars(args), "checkpoint": checkpoint})
    return build_translator(args)


def find_test_set(args: argparse.Namespace, translator: "Translator") -> TestSet:
    """The text that ``--source`` and ``--reference``, or ``--data`` and ``--subset``, name.

    Without any of them, the corpus that the model was trained on.

    Raises:
        UserError: there is no such text.
    """
    if args.source is not None:
        for path in (args.source, args.reference):
            if not path.is_file():
                raise UserError(f"there is no {path}; check --source and --reference")
        return TestSet(args.source.stem, args.source, args.reference, corpus=None)
    # Binarised data lies in the folder bin/ of a prepared corpus.
    corpus = args.data or translator.trained_on.parent
    source, reference = (
        corpus / "raw" / f"{args.subset}.{language}"
        for language in (translator.source_lang, translator.target_lang)
    )
    for path in (source, reference):
        if not path.is_file():
            raise UserError(
                f"there is no test set {path}; make it with `fairseq-sparsemixer prepare`, or name "
                "a prepared corpus with --data (and --subset), or text files with --source and "
                "--reference"
            )
    return TestSet(args.subset, source, reference, corpus)


def default_output(translator: "Translator", test_set: TestSet) -> Path:
    """``evaluation/SUBSET.CHECKPOINT.json`` in the run folder."""
    paths = [checkpoint.path for checkpoint in translator.checkpoints]
    names = "+".join(path.stem for path in paths)
    return paths[0].parent / "evaluation" / f"{test_set.name}.{names}.json"


def official_name(test_set: TestSet, translator: "Translator") -> Optional[Dict[str, str]]:
    """What sacrebleu calls the test set of a corpus, where the corpus's record vouches for it.

    Returns:
        ``test_set`` and ``langpair``, as sacrebleu's signatures name them, or None.
    """
    if test_set.corpus is None or test_set.name != "test":
        return None
    # Null where the archive was not the published one.
    test = _read_record(test_set.corpus).get("test")
    if not test:
        return None
    langpair = f"{translator.source_lang}-{translator.target_lang}"
    return {"test_set": test["sacrebleu"], "langpair": langpair}


def hypotheses_path(stem: Path, language: str) -> Path:
    """The text file of translations: ``stem`` with the target language as its ending."""
    return stem.with_name(f"{stem.name}.{language}")


def _check_outputs(stem: Path, test_set: TestSet, language: str) -> None:
    """Raise UserError where an output would overwrite the text that it comes from."""
    outputs = [hypotheses_path(stem, language)]
    for kind in (TOKENISED, COMPOUND_SPLIT):
        outputs += token_paths(stem, language, kind)
    for path in outputs:
        if path.resolve() in (test_set.source.resolve(), test_set.reference.resolve()):
            raise UserError(f"translations would overwrite {path}; choose another --output")


def _evaluate(
    translator: "Translator", text: Text, stem: Path, args: argparse.Namespace
) -> Dict[str, Any]:
    """Translate and score with one system; the translations go to ``stem`` + language."""
    from fairseq_sparsemixer.evaluation import scoring

    tokenised = translator.subwords.pipeline == "moses"
    if tokenised and args.compound_split:
        raise UserError(
            f"--compound-split is not for {args.run_dir}: its Moses tokens (-a) have their "
            "compounds split already, and splitting them once more would raise BLEU; leave it out"
        )
    language = translator.target_lang
    if args.compound_split:
        # Before the search: the package that it needs may be missing.
        reference = compounds_split(text.references, language)
    started = time.perf_counter()
    translations = translator.translate(
        text.sources, beam=args.beam, lenpen=args.lenpen, max_tokens=args.max_tokens, progress=True
    )
    seconds = time.perf_counter() - started
    hypotheses = [translation.text for translation in translations]
    path = hypotheses_path(stem, language)
    write_lines(path, hypotheses)
    scores = scoring.score(hypotheses, text.references, text.official)
    if tokenised:
        tokens = [translation.tokens or "" for translation in translations]
        reference = [translator.subwords.tokenise(line, language) for line in text.references]
        scores[TOKENISED.key] = score_tokens(TOKENISED, tokens, reference, stem, language)
    if args.compound_split:
        tokens = compounds_split(hypotheses, language)
        scores[COMPOUND_SPLIT.key] = score_tokens(COMPOUND_SPLIT, tokens, reference, stem, language)
    if args.comet is not None:
        scores["comet"] = scoring.comet_score(text.sources, hypotheses, text.references, args.comet)
    return {
        "scores": scores,
        "counts": count_lines(text.sources, translations),
        "hypotheses": str(path),
        "checkpoints": describe_checkpoints(translator),
        "model": translator.model_settings,
        "seconds": {"translation": seconds},
    }


def _evaluate_baseline(
    report: Dict[str, Any], text: Text, output: Path, args: argparse.Namespace
) -> Dict[str, Any]:
    """What ``--baseline`` adds to ``report``: the other run's, and the test of their difference."""
    from fairseq_sparsemixer.evaluation import scoring

    args = argparse.Namespace(**{**vars(args), "run_dir": args.baseline})
    if not Path(args.baseline).is_dir():
        # Checkpoint files are taken as they are.
        args.last = args.best = None
    translator = _build_translator(args)
    stem = output.with_suffix("")
    stem = stem.with_name(f"{stem.name}.baseline")
    baseline = _evaluate(translator, text, stem, args)
    ours, theirs = (read_lines(Path(system["hypotheses"])) for system in (report, baseline))
    comparison = scoring.compare(ours, theirs, text.references, official=text.official)
    return {"baseline": baseline, "comparison": comparison}


def count_lines(sources: List[str], translations: List["Translation"]) -> Dict[str, int]:
    """How many lines went in and came out, and how many of them were out of the ordinary."""
    from fairseq_sparsemixer.evaluation.scoring import empty_lines

    return {
        "source_lines": len(sources),
        "hypothesis_lines": len(translations),
        "empty_sources": empty_lines(sources),
        "empty_hypotheses": empty_lines([translation.text for translation in translations]),
        "cut_sources": sum(translation.source_cut for translation in translations),
        "hypotheses_at_length_limit": sum(
            translation.at_length_limit for translation in translations
        ),
    }


def copy_score(
    test_set: TestSet,
    language: str,
    references: List[str],
    official: Optional[Dict[str, str]] = None,
) -> Optional[Dict[str, Any]]:
    """The scores of copying the nearest training sentence, or None if they are not known.

    Computed from the copied lines where they lie in the corpus, so that model and copy are
    scored alike; else as they stand in its record. ``official`` is that of :func:`.scoring.score`.
    """
    from fairseq_sparsemixer.evaluation import scoring

    if test_set.corpus is None:
        return None
    copied = test_set.corpus / "copy" / f"{test_set.name}.{language}"
    if copied.is_file():
        scores = scoring.score(read_lines(copied), references, official)
        return {"source": str(copied), "scores": scores}
    recorded = _read_record(test_set.corpus).get("copy_score", {})
    if test_set.name in recorded:
        bleu, signature = (recorded[test_set.name][key] for key in ("bleu", "signature"))
        scores = {"bleu": {"score": bleu, "signature": signature}}
        return {"source": str(test_set.corpus / CORPUS_RECORD), "scores": scores}
    return None


def _read_record(corpus: Path) -> Dict[str, Any]:
    """What ``prepare`` says of a corpus; empty where it says nothing."""
    path = corpus / CORPUS_RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def describe_checkpoints(translator: "Translator") -> List[Dict[str, Any]]:
    """Name, content hash, updates and (for an average) inputs of each checkpoint."""
    return [
        {
            "name": checkpoint.path.name,
            "path": str(checkpoint.path),
            "sha256": sha256_of(checkpoint.path),
            "updates": checkpoint.updates,
            "averaged_from": checkpoint.averaged_from,
        }
        for checkpoint in translator.checkpoints
    ]


def _describe_data(
    test_set: TestSet, translator: "Translator", official: Optional[Dict[str, str]]
) -> Dict[str, Any]:
    """What was translated, by name and content hash."""
    return {
        "name": test_set.name,
        "sacrebleu": official["test_set"] if official else None,
        "source_lang": translator.source_lang,
        "target_lang": translator.target_lang,
        "source": str(test_set.source),
        "source_sha256": sha256_of(test_set.source),
        "reference": str(test_set.reference),
        "reference_sha256": sha256_of(test_set.reference),
    }


def generation_settings(translator: "Translator", args: argparse.Namespace) -> Dict[str, Any]:
    """Everything that the search depends on."""
    from fairseq_sparsemixer.evaluation.translator import MAX_LEN_A, MAX_LEN_B

    subwords = translator.subwords
    key = {"sentencepiece": "sentencepiece_model_sha256", "moses": "bpecodes_sha256"}
    return {
        "beam": args.beam,
        "lenpen": args.lenpen,
        "max_len_a": MAX_LEN_A,
        "max_len_b": MAX_LEN_B,
        "max_source_positions": translator.max_source_positions,
        "max_tokens": args.max_tokens,
        "precision": precision_of(args),
        "device": translator.device.type,
        "dictionaries": str(translator.dictionary_folder),
        "pipeline": subwords.pipeline,
        key[subwords.pipeline]: sha256_of(subwords.path),
    }


def versions(translator: "Translator") -> Dict[str, str]:
    """The version of everything that takes part."""
    import fairseq
    import torch

    from fairseq_sparsemixer.version import __version__

    return {
        "fairseq_sparsemixer": __version__,
        "fairseq": fairseq.__version__,
        "torch": torch.__version__,
        **{
            package: importlib.metadata.version(package)
            for package in ("sacrebleu", *translator.subwords.packages)
        },
    }


def format_report(report: Dict[str, Any]) -> str:
    """The table that ``evaluate`` prints: a row for each system, then the signatures."""
    from fairseq_sparsemixer.tables import format_table

    systems = [("model", report["scores"])]
    if "baseline" in report:
        systems.append(("baseline", report["baseline"]["scores"]))
    if report["copy"] is not None:
        systems.append(("nearest copy", report["copy"]["scores"]))
    rows = [["", "BLEU", "chrF2"]]
    for name, scores in systems:
        rows.append([name, *(_format_score(scores.get(metric)) for metric in ("bleu", "chrf"))])
    if "comparison" in report:
        p_values = (report["comparison"][metric]["p_value"] for metric in ("bleu", "chrf"))
        rows.append(["p (difference)", *(f"{p_value:.4f}" for p_value in p_values)])
    counts, data = report["counts"], report["data"]
    names = ", ".join(
        f"{checkpoint['name']} ({checkpoint['updates']} updates)"
        for checkpoint in report["checkpoints"]
    )
    return "\n".join(
        [
            f"{data['name']} {data['source_lang']}-{data['target_lang']}: "
            f"{counts['hypothesis_lines']} lines, {counts['empty_hypotheses']} empty, "
            f"{counts['hypotheses_at_length_limit']} at the length limit; {names}",
            format_table(rows),
            f"BLEU  {report['scores']['bleu']['signature']}",
            f"chrF2 {report['scores']['chrf']['signature']}",
            *_further_scores(report),
        ]
    )


def _further_scores(report: Dict[str, Any]) -> Iterator[str]:
    """A line for each score beside sacreBLEU's, with what it is of."""
    systems = {"model": report["scores"]}
    if "baseline" in report:
        systems["baseline"] = report["baseline"]["scores"]
    for kind in (TOKENISED, COMPOUND_SPLIT):
        found = {name: scores[kind.key] for name, scores in systems.items() if kind.key in scores}
        if found:
            values = ", ".join(f"{name} {score['score']:.2f}" for name, score in found.items())
            signature = next(iter(found.values()))["signature"]
            yield f"{kind.title}: {values} ({kind.label}; {signature})"
    if "comet" in report["scores"]:
        values = ", ".join(f"{name} {x['comet']['score']:.4f}" for name, x in systems.items())
        yield f"COMET: {values} ({report['scores']['comet']['model']})"


def _format_score(score: Optional[Dict[str, Any]]) -> str:
    """A score with two decimals, or a dash where there is none."""
    return "-" if score is None else f"{score['score']:.2f}"
