"""Build a translation corpus: text, SentencePiece pieces and fairseq's binary data.

Without --raw-dir a corpus of English-German user-interface messages is downloaded (51 MB),
cleaned, and split so that test sentences have no near duplicate in the training text. With
--raw-dir your own text is used: DIR/train.en, DIR/train.de and the same for valid and test, one
sentence a line. The output folder holds

  raw/{train,valid,test}.{en,de}   text, one sentence a line
  spm/                             spm.model, dict.txt, and the same text in pieces
  bin/                             the data for fairseq-train
  copy/test.de                     the test set "translated" by the nearest training sentences
  record.json                      source, counts, scores, versions, settings

Every step is skipped when it is already done: after an interruption run the same command again.
"""

import argparse
import contextlib
import dataclasses
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

from fairseq_sparsemixer import __version__
from fairseq_sparsemixer.corpora import binarise, homeassistant, splitting
from fairseq_sparsemixer.corpora.binarise import SPLITS, Languages, raw_path
from fairseq_sparsemixer.corpora.cleaning import Pair, clean
from fairseq_sparsemixer.corpora.steps import StepResult, Steps
from fairseq_sparsemixer.corpora.wheels import check_given, obtain_wheel
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import (
    read_lines,
    report_full_disk,
    sha256_of,
    write_json,
    write_lines,
)

HELP = "build a corpus: download or take text, split, SentencePiece, fairseq-preprocess"
DEFAULT_VOCAB_SIZE = 4000
# Written last, so that a folder that has it is complete.
RECORD = "record.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``prepare``."""
    parser.add_argument(
        "corpus", nargs="?", choices=["homeassistant"], help="the corpus to download"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder of the corpus"
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=DEFAULT_VOCAB_SIZE,
        metavar="N",
        help="size of the joint vocabulary (default: %(default)s)",
    )
    parser.add_argument(
        "--wheel", type=Path, metavar="FILE", help="use this copy of the download; no network"
    )
    parser.add_argument(
        "--raw-dir", type=Path, metavar="DIR", help="use your own text instead of a download"
    )
    parser.add_argument(
        "--source-lang", default="en", metavar="LANG", help="suffix of the sources in --raw-dir"
    )
    parser.add_argument(
        "--target-lang", default="de", metavar="LANG", help="suffix of the targets in --raw-dir"
    )


def run(args: argparse.Namespace) -> None:
    """Build the corpus that the flags ask for, and print a summary."""
    if args.raw_dir is None:
        if args.corpus is None:
            raise UserError(
                "say what to prepare: the name of a corpus (homeassistant) or --raw-dir"
            )
        if (args.source_lang, args.target_lang) != homeassistant.LANGUAGES:
            raise UserError("--source-lang and --target-lang only go with --raw-dir")
        record = prepare_homeassistant(args.output, vocab_size=args.vocab_size, wheel=args.wheel)
    else:
        if args.corpus is not None or args.wheel is not None:
            raise UserError("--raw-dir replaces the download: leave out the corpus and --wheel")
        record = prepare_raw_text(
            args.output,
            args.raw_dir,
            source_lang=args.source_lang,
            target_lang=args.target_lang,
            vocab_size=args.vocab_size,
        )
    print(summary(record))


def prepare_homeassistant(
    output: Path, *, vocab_size: int = DEFAULT_VOCAB_SIZE, wheel: Optional[Path] = None
) -> Dict[str, Any]:
    """Build the ``homeassistant`` corpus in ``output``; finished steps are skipped.

    Args:
        output: folder of the corpus; made if need be.
        vocab_size: size of the joint vocabulary, special symbols included.
        wheel: a copy of the download, used in place; by default pip fetches it.

    Returns:
        What is in ``record.json``.

    Raises:
        UserError: no network, a damaged file, no disk space, an unsuitable ``vocab_size``.
    """
    source = homeassistant.WHEEL
    languages = homeassistant.LANGUAGES
    if wheel is not None:
        check_given(source, wheel)

    def extract() -> StepResult:
        path = obtain_wheel(source, output / "download", wheel)
        extraction = homeassistant.extract(path)
        pairs, dropped = clean(extraction.pairs, homeassistant.LIMITS)
        write_lines(pairs_path, ("\t".join(pair) for pair in pairs))
        return [pairs_path], {
            "messages": extraction.messages,
            "messages_dropped": extraction.dropped_messages,
            "segments": len(extraction.pairs),
            "segments_dropped": dropped,
            "pairs": len(pairs),
        }

    with _steps_in(output, megabytes=150) as steps:
        pairs_path = output / "raw" / "all.tsv"
        settings = {
            "version": __version__,
            "sha256": source.sha256,
            "limits": dataclasses.asdict(homeassistant.LIMITS),
        }
        extraction = steps.run("extract", settings, [], extract)
        split = _split_step(steps, pairs_path, languages, homeassistant.SPLIT)
        record = {
            "corpus": "homeassistant",
            "source": {
                key: getattr(source, key)
                for key in ("name", "version", "file", "sha256", "licence")
            },
            "settings": {
                "vocab_size": vocab_size,
                "limits": dataclasses.asdict(homeassistant.LIMITS),
                "split": dataclasses.asdict(homeassistant.SPLIT),
            },
            "extraction": extraction,
            "split": split["counts"],
        }
        return _finish(steps, languages, vocab_size, record, split)


def prepare_raw_text(
    output: Path,
    raw_dir: Path,
    *,
    source_lang: str = "en",
    target_lang: str = "de",
    vocab_size: int = DEFAULT_VOCAB_SIZE,
) -> Dict[str, Any]:
    """Build a corpus in ``output`` from ``raw_dir/{train,valid,test}.{source_lang,target_lang}``.

    The text is used as it is: nothing is cleaned, and near duplicates between the splits show in
    the copy score but are not removed. Returns what is in ``record.json``.

    Raises:
        UserError: a file is missing, empty, not UTF-8, or not as long as its translation; no disk
            space; an unsuitable ``vocab_size``.
    """
    languages = (source_lang, target_lang)
    if raw_dir.resolve() == (output / "raw").resolve():
        raise UserError(f"--raw-dir {raw_dir} is where --output {output} keeps its copy: move it")
    names = [f"{split}.{language}" for split in SPLITS for language in languages]
    for name in names:
        if not (raw_dir / name).is_file():
            raise UserError(f"--raw-dir {raw_dir}: there is no file {name}")
    megabytes = 1 + 4 * sum((raw_dir / name).stat().st_size for name in names) // 10**6

    def copy_text() -> StepResult:
        for split in SPLITS:
            texts = _read_parallel(raw_dir, split, languages)
            for language, lines in zip(languages, texts):
                write_lines(raw_path(output, split, language), lines)
        return raw_paths, {}

    def score() -> StepResult:
        text = {
            split: [read_lines(raw_path(output, split, name)) for name in languages]
            for split in SPLITS
        }
        scores = {split: splitting.copy_score(*text["train"], *text[split]) for split in SPLITS[1:]}
        copy_path = _copy_path(output, languages)
        write_lines(copy_path, scores["test"].hypotheses)
        return [copy_path], {"copy_score": _describe(scores), "versions": _split_versions()}

    with _steps_in(output, megabytes) as steps:
        raw_paths = [raw_path(output, split, name) for split in SPLITS for name in languages]
        checksums = {name: sha256_of(raw_dir / name) for name in names}
        settings = {"version": __version__, "sha256": checksums}
        steps.run("copy-text", settings, [], copy_text)
        scored = steps.run("copy-score", {"version": __version__}, raw_paths, score)
        record = {
            "corpus": "own text",
            "source": {"folder": str(raw_dir), "sha256": checksums},
            "settings": {"vocab_size": vocab_size},
        }
        return _finish(steps, languages, vocab_size, record, scored)


@contextlib.contextmanager
def _steps_in(output: Path, megabytes: int) -> Iterator[Steps]:
    with report_full_disk(output, megabytes):
        try:
            output.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise UserError(f"--output {output} is not a folder") from error
        except PermissionError as error:
            raise UserError(f"--output {output}: {error.strerror}") from error
        yield Steps(output, seal=output / RECORD)


def _split_step(
    steps: Steps, pairs_path: Path, languages: Languages, settings: splitting.SplitSettings
) -> Dict[str, Any]:
    """Split the pairs of a TSV file (source, target, document) into ``raw/``."""
    folder = steps.folder

    def build() -> StepResult:
        pairs = [Pair(*line.split("\t")) for line in read_lines(pairs_path)]
        unfiltered = splitting.hold_out(pairs, settings)
        split = splitting.remove_near_duplicates(unfiltered, settings.max_cosine)
        outputs = _write_split(folder, split, languages)
        scores = {name: _score(split.train, getattr(split, name)) for name in SPLITS[1:]}
        described = _describe(scores)
        for name in SPLITS[1:]:
            before = _score(unfiltered.train, getattr(split, name))
            described[name]["bleu_before_filter"] = before.bleu
        copy_path = _copy_path(folder, languages)
        write_lines(copy_path, scores["test"].hypotheses)
        return [*outputs, copy_path], {
            "counts": split.counts,
            "copy_score": described,
            "versions": _split_versions(),
        }

    made_with = {"version": __version__, **dataclasses.asdict(settings)}
    return steps.run("split", made_with, [pairs_path], build)


def _write_split(folder: Path, split: splitting.Split, languages: Languages) -> List[Path]:
    outputs = []
    for name in SPLITS:
        pairs: Sequence[Pair] = getattr(split, name)
        for side, language in enumerate(languages):
            path = raw_path(folder, name, language)
            write_lines(path, (pair[side] for pair in pairs))
            outputs.append(path)
    return outputs


def _score(train: Sequence[Pair], held_out: Sequence[Pair]) -> splitting.CopyScore:
    return splitting.copy_score(
        [pair.source for pair in train],
        [pair.target for pair in train],
        [pair.source for pair in held_out],
        [pair.target for pair in held_out],
    )


def _describe(scores: Dict[str, splitting.CopyScore]) -> Dict[str, Dict[str, Any]]:
    return {
        name: {"bleu": score.bleu, "signature": score.signature} for name, score in scores.items()
    }


def _copy_path(folder: Path, languages: Languages) -> Path:
    return folder / "copy" / f"test.{languages[1]}"


def _split_versions() -> Dict[str, str]:
    import sacrebleu
    import sklearn

    return {"sacrebleu": sacrebleu.__version__, "scikit-learn": sklearn.__version__}


def _read_parallel(raw_dir: Path, split: str, languages: Languages) -> List[List[str]]:
    paths = [raw_dir / f"{split}.{language}" for language in languages]
    texts = [read_lines(path) for path in paths]
    for path, lines in zip(paths, texts):
        if not any(line.strip() for line in lines):
            raise UserError(f"{path} holds no text")
    if len(texts[0]) != len(texts[1]):
        raise UserError(
            f"{paths[0]} has {len(texts[0])} lines and {paths[1]} has {len(texts[1])}: "
            "line N of one must translate line N of the other"
        )
    return texts


def _finish(
    steps: Steps,
    languages: Languages,
    vocab_size: int,
    record: Dict[str, Any],
    scored: Dict[str, Any],
) -> Dict[str, Any]:
    """From ``raw/`` to ``bin/`` and ``record.json``."""
    folder = steps.folder
    made_with = {"version": __version__, "languages": list(languages)}
    texts = [raw_path(folder, split, name) for split in SPLITS for name in languages]
    pieces = steps.run(
        "sentencepiece",
        {**made_with, "vocab_size": vocab_size},
        texts,
        lambda: binarise.build_pieces(folder, languages, vocab_size),
    )
    encoded = [binarise.piece_path(folder, split, name) for split in SPLITS for name in languages]
    encoded += [folder / "spm" / "spm.model", folder / "spm" / "dict.txt"]
    steps.run("binarise", made_with, encoded, lambda: binarise.build_binary(folder, languages))
    record = {
        **record,
        "languages": list(languages),
        "splits": pieces["splits"],
        "vocabulary": pieces["vocabulary"],
        "copy_score": scored["copy_score"],
        "versions": {
            "fairseq-sparsemixer": __version__,
            **scored["versions"],
            **pieces["versions"],
        },
    }
    write_json(folder / RECORD, record)
    return record


def summary(record: Dict[str, Any]) -> str:
    """A short table of a record: sizes, unknown pieces and copy scores of the splits."""
    source, target = record["languages"]
    rows = [["", "sentences", f"pieces {source}", f"pieces {target}", "<unk>", "copy BLEU"]]
    for split, counts in record["splits"].items():
        sides = [counts[source], counts[target]]
        score = record["copy_score"].get(split)
        rows.append(
            [
                split,
                f"{sides[0]['sentences']:,}",
                *(f"{side['pieces']:,}" for side in sides),
                f"{sum(side['unknown'] for side in sides):,}",
                f"{score['bleu']:.1f}" if score else "-",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    lines.append(
        "copy BLEU: what copying the most similar training sentence's translation scores "
        f"({record['copy_score']['test']['signature']})"
    )
    return "\n".join(lines)
