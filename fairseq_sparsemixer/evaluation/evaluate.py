"""Translate a test set and score it: sacreBLEU's BLEU and chrF on detokenised text.

  fairseq-sparsemixer evaluate RUN_DIR --data data/homeassistant
  fairseq-sparsemixer evaluate RUN_DIR --source news.en --reference news.de
  fairseq-sparsemixer evaluate RUN_DIR --data data/homeassistant --baseline OTHER_RUN

Writes the translations, and beside them a JSON file with the scores and all it takes to get
them again. The scores are those that sacrebleu's own command prints for the written file.
With a prepared corpus, the score of copying the nearest training sentence stands beside the
model's: what memory alone reaches on this data. With --baseline, a paired bootstrap test says
whether the two runs differ.
"""

import argparse
import importlib.metadata
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.options import (
    add_translation_arguments,
    build_translator,
    precision_of,
    quiet_libraries,
)
from fairseq_sparsemixer.files import check_writable, read_lines, sha256_of, write_json, write_lines

if TYPE_CHECKING:
    from fairseq_sparsemixer.evaluation.translator import Translation, Translator

HELP = "translate a test set with a trained model and score it"


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``fairseq-sparsemixer evaluate``."""
    add_translation_arguments(parser)
    parser.add_argument(
        "--subset",
        default="test",
        metavar="NAME",
        help="raw/NAME.* of the corpus (default: %(default)s)",
    )
    parser.add_argument("--source", type=Path, metavar="FILE", help="raw text to translate instead")
    parser.add_argument(
        "--reference", type=Path, metavar="FILE", help="its translation, line by line"
    )
    parser.add_argument(
        "--baseline",
        metavar="OTHER_RUN",
        help="run folder or checkpoint file to compare with, by paired bootstrap",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.json",
        help="where scores go, with translations beside them (default: below RUN_DIR/evaluation)",
    )


def run(args: argparse.Namespace) -> None:
    """Translate, score, write and print."""
    quiet_libraries()
    started = time.perf_counter()
    if args.output is not None:
        if args.output.suffix != ".json":
            raise UserError(f"--output {args.output} holds scores; give it a name ending in .json")
        check_writable(args.output)
    if (args.source is None) != (args.reference is None):
        raise UserError("--source and --reference go together; give both or neither")
    translator = build_translator(args)
    test_set = find_test_set(args, translator)
    sources = read_lines(test_set.source)
    references = read_lines(test_set.reference)
    if len(sources) != len(references):
        raise UserError(
            f"{test_set.source} has {len(sources)} lines and {test_set.reference} has "
            f"{len(references)}; give files that match with --source and --reference"
        )
    output = args.output or default_output(translator, test_set)
    _check_hypotheses(hypotheses_path(output.with_suffix(""), translator), test_set)
    copied = copy_score(test_set, translator.target_lang, references)
    report = _evaluate(translator, sources, references, output.with_suffix(""), args)
    report["data"] = _describe_data(test_set, translator)
    report["copy"] = copied
    if args.baseline is not None:
        report.update(_evaluate_baseline(report, sources, references, output, args))
    report["generation"] = generation_settings(translator, args)
    report["versions"] = versions()
    report["seconds"]["total"] = time.perf_counter() - started
    write_json(output, report)
    print(format_report(report))
    print(f"written: {report['hypotheses']} and {output}")


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
                f"there is no {path}; name a prepared corpus with --data (and --subset), or text "
                "files with --source and --reference"
            )
    return TestSet(args.subset, source, reference, corpus)


def default_output(translator: "Translator", test_set: TestSet) -> Path:
    """``evaluation/SUBSET.CHECKPOINT.json`` in the run folder."""
    paths = [checkpoint.path for checkpoint in translator.checkpoints]
    names = "+".join(path.stem for path in paths)
    return paths[0].parent / "evaluation" / f"{test_set.name}.{names}.json"


def hypotheses_path(stem: Path, translator: "Translator") -> Path:
    """The text file of translations: ``stem`` with the target language as its ending."""
    return stem.with_name(f"{stem.name}.{translator.target_lang}")


def _check_hypotheses(path: Path, test_set: TestSet) -> None:
    """Raise UserError where the translations would overwrite the text that they come from."""
    if path.resolve() in (test_set.source.resolve(), test_set.reference.resolve()):
        raise UserError(f"translations would overwrite {path}; choose another --output")


def _evaluate(
    translator: "Translator",
    sources: List[str],
    references: List[str],
    stem: Path,
    args: argparse.Namespace,
) -> Dict[str, Any]:
    """Translate and score with one system; the translations go to ``stem`` + language."""
    from fairseq_sparsemixer.evaluation import scoring

    started = time.perf_counter()
    translations = translator.translate(
        sources, beam=args.beam, lenpen=args.lenpen, max_tokens=args.max_tokens, progress=True
    )
    seconds = time.perf_counter() - started
    hypotheses = [translation.text for translation in translations]
    path = hypotheses_path(stem, translator)
    write_lines(path, hypotheses)
    return {
        "scores": scoring.score(hypotheses, references),
        "counts": count_lines(sources, translations),
        "hypotheses": str(path),
        "checkpoints": describe_checkpoints(translator),
        "model": translator.model_settings,
        "seconds": {"translation": seconds},
    }


def _evaluate_baseline(
    report: Dict[str, Any],
    sources: List[str],
    references: List[str],
    output: Path,
    args: argparse.Namespace,
) -> Dict[str, Any]:
    """What ``--baseline`` adds to ``report``: the other run's, and the test of their difference."""
    from fairseq_sparsemixer.evaluation import scoring

    args = argparse.Namespace(**{**vars(args), "run_dir": args.baseline})
    translator = build_translator(args)
    stem = output.with_suffix("")
    stem = stem.with_name(f"{stem.name}.baseline")
    baseline = _evaluate(translator, sources, references, stem, args)
    ours, theirs = (read_lines(Path(system["hypotheses"])) for system in (report, baseline))
    return {"baseline": baseline, "comparison": scoring.compare(ours, theirs, references)}


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


def copy_score(test_set: TestSet, language: str, references: List[str]) -> Optional[Dict[str, Any]]:
    """The scores of copying the nearest training sentence, or None if they are not known.

    Computed from the copied lines where they lie in the corpus, so that model and copy are
    scored alike; else as they stand in its record.
    """
    from fairseq_sparsemixer.evaluation import scoring

    if test_set.corpus is None:
        return None
    copied = test_set.corpus / "copy" / f"{test_set.name}.{language}"
    if copied.is_file():
        scores = scoring.score(read_lines(copied), references)
        return {"source": str(copied), "scores": scores}
    record = test_set.corpus / "record.json"
    if record.is_file():
        recorded = json.loads(record.read_text(encoding="utf-8")).get("copy_score", {})
        if test_set.name in recorded:
            bleu, signature = (recorded[test_set.name][key] for key in ("bleu", "signature"))
            scores = {"bleu": {"score": bleu, "signature": signature}}
            return {"source": str(record), "scores": scores}
    return None


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


def _describe_data(test_set: TestSet, translator: "Translator") -> Dict[str, Any]:
    """What was translated, by name and content hash."""
    return {
        "name": test_set.name,
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
        "sentencepiece_model_sha256": sha256_of(translator.sentencepiece_model),
    }


def versions() -> Dict[str, str]:
    """The version of everything that takes part."""
    import fairseq
    import torch

    from fairseq_sparsemixer import __version__

    return {
        "fairseq_sparsemixer": __version__,
        "fairseq": fairseq.__version__,
        "torch": torch.__version__,
        "sacrebleu": importlib.metadata.version("sacrebleu"),
        "sentencepiece": importlib.metadata.version("sentencepiece"),
    }


def format_report(report: Dict[str, Any]) -> str:
    """The table that ``evaluate`` prints: a row for each system, then the signatures."""
    from fairseq_sparsemixer.evaluation.scoring import format_table

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
        ]
    )


def _format_score(score: Optional[Dict[str, Any]]) -> str:
    """A score with two decimals, or a dash where there is none."""
    return "-" if score is None else f"{score['score']:.2f}"
