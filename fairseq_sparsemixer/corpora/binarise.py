"""Joint SentencePiece vocabulary, pieces, and fairseq's binary data from text.

The folder of a corpus holds ``raw/{train,valid,test}.LANG`` (text), ``spm/`` (model, dictionary,
the same text in pieces) and ``bin/`` (what fairseq trains on). :mod:`.bpe` makes ``bpe/`` in place
of ``spm/``.
"""

import itertools
import os
import re
import shutil
import struct
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Container, Dict, Iterator, List, NamedTuple, Optional, Tuple

from fairseq_sparsemixer.corpora.cleaning import character_map
from fairseq_sparsemixer.corpora.resumable import StepResult
from fairseq_sparsemixer.corpora.subprocesses import ProgramError, last_line, run_python
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import (
    atomic_path,
    iterate_lines,
    replace_durably,
    scratch_folder,
    write_lines,
)

SPLITS = ("train", "valid", "test")
# The name under which fairseq's `from_pretrained` looks for a SentencePiece model.
FAIRSEQ_MODEL_NAME = "sentencepiece.bpe.model"

Languages = Tuple[str, str]

_LINES_AT_ONCE = 10_000
# Fewer lines are done before another process has started.
_LINES_PER_WORKER = 100_000
# fairseq-preprocess cuts a file into as many parts as it has workers, and does one of them alone
# when all others are done. Small parts keep that short.
_PARTS_PER_WORKER = 4
# Run in a scratch folder, so that the model (which stores the names of its input files) holds
# neither a path nor anything else that differs between two machines.
_TRAINER = "import sys, sentencepiece; sentencepiece.SentencePieceTrainer.train(sys.argv[1])"


def raw_path(folder: Path, split: str, language: str) -> Path:
    """``raw/train.en`` and so on."""
    return folder / "raw" / f"{split}.{language}"


def piece_path(folder: Path, split: str, language: str, pieces: str = "spm") -> Path:
    """``spm/train.en`` and so on."""
    return folder / pieces / f"{split}.{language}"


def useful_workers(lines: int, workers: Optional[int] = None) -> int:
    """How many processes pay for that many lines: at most ``workers`` (default: the cores)."""
    return min(workers or os.cpu_count() or 1, 1 + lines // _LINES_PER_WORKER)


class Pieces(NamedTuple):
    """The text of one split and language in pieces: number of lines, and how often each piece."""

    sentences: int
    frequency: Counter

    def describe(self, vocabulary: Container[str]) -> Dict[str, int]:
        """``sentences``, ``pieces``, and ``unknown``: pieces that become ``<unk>``."""
        unknown = sum(n for piece, n in self.frequency.items() if piece not in vocabulary)
        return {
            "sentences": self.sentences,
            "pieces": sum(self.frequency.values()),
            "unknown": unknown,
        }


TextPath = Callable[[Path, str, str], Path]
"""Where the text of a split and language lies in a corpus' folder, such as :func:`raw_path`."""


def paths_of(text_path: TextPath, folder: Path, languages: Languages) -> List[Path]:
    """The files of every split in both languages."""
    return [text_path(folder, split, language) for split in SPLITS for language in languages]


def build_pieces(
    folder: Path,
    languages: Languages,
    vocab_size: int,
    text_path: TextPath = raw_path,
    character_coverage: float = 1.0,
    workers: Optional[int] = None,
) -> StepResult:
    """Train the joint model on the training text alone, and write all text in its pieces.

    Args:
        folder: of the corpus.
        languages: source and target.
        vocab_size: of both languages together, special symbols included.
        text_path: where the text lies.
        character_coverage: share of the training text's characters that get a piece of their own;
            the rarest become ``<unk>``.
        workers: threads that write pieces (default: the cores).

    Returns:
        Paths of the outputs, and counts: for each split and language ``sentences``, ``pieces``
        and ``unknown`` (pieces that become ``<unk>``; none in the training text under full
        coverage).
    """
    import sentencepiece

    model_path = folder / "spm" / "spm.model"
    texts = [text_path(folder, "train", language) for language in languages]
    _train_model(texts, vocab_size, character_coverage, model_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    vocabulary = _vocabulary(model)
    threads = workers or os.cpu_count() or 1
    outputs, splits = write_pieces(
        folder, languages, "spm", text_path, lambda path: _encode(model, path, threads)
    )
    train_counts = sum((pieces.frequency for pieces in splits["train"].values()), Counter())
    dictionary = folder / "spm" / "dict.txt"
    # By frequency, as fairseq does; ties in the order of the model. Pieces that the training text
    # never ends up with stay: other text may need them.
    ordered = sorted(vocabulary, key=lambda piece: -train_counts[piece])
    write_lines(dictionary, (f"{piece} {train_counts[piece]}" for piece in ordered))
    result = {
        "vocabulary": len(vocabulary) + len(_special_pieces(model)),
        "splits": describe_splits(splits, vocabulary),
        "versions": {"sentencepiece": sentencepiece.__version__},
    }
    return [model_path, *outputs, dictionary], result


def write_pieces(
    folder: Path,
    languages: Languages,
    pieces: str,
    text_path: TextPath,
    encode: Callable[[Path], Iterator[str]],
) -> Tuple[List[Path], Dict[str, Dict[str, Pieces]]]:
    """Write the text of every split to the subfolder ``pieces``, a line for each line.

    Args:
        folder, languages, text_path: as for :func:`build_pieces`.
        pieces: name of the subfolder.
        encode: yields the lines of a file as pieces separated by spaces.

    Returns:
        Paths of the outputs, and by split and language what they hold.
    """
    outputs = []
    splits: Dict[str, Dict[str, Pieces]] = {split: {} for split in SPLITS}
    for split in SPLITS:
        for language in languages:
            frequency: Counter = Counter()
            path = piece_path(folder, split, language, pieces)
            text = text_path(folder, split, language)
            write_lines(path, _counted(encode(text), frequency))
            outputs.append(path)
            splits[split][language] = Pieces(count_lines(path), frequency)
    return outputs, splits


def describe_splits(
    splits: Dict[str, Dict[str, Pieces]], vocabulary: Container[str]
) -> Dict[str, Dict[str, Dict[str, int]]]:
    """:meth:`Pieces.describe` by split and language."""
    return {
        split: {language: pieces.describe(vocabulary) for language, pieces in sides.items()}
        for split, sides in splits.items()
    }


def _counted(lines: Iterator[str], frequency: Counter) -> Iterator[str]:
    """The same lines; adds up how often each piece occurs."""
    for line in lines:
        # Not split(): a piece may be a character that Python takes for white space.
        frequency.update(line.split(" ") if line else [])
        yield line


def _special_pieces(model: Any) -> List[int]:
    return [i for i in range(len(model)) if model.is_control(i) or model.is_unknown(i)]


def _vocabulary(model: Any) -> Dict[str, int]:
    """Pieces of the model, in order, without the special symbols: fairseq has its own."""
    special = set(_special_pieces(model))
    return {model.id_to_piece(i): i for i in range(len(model)) if i not in special}


def _encode(model: Any, path: Path, threads: int) -> Iterator[str]:
    """Yield the lines of a file in pieces."""
    from tqdm import tqdm

    lines = iterate_lines(path)
    with tqdm(
        total=count_lines(path), desc=path.name, unit=" lines", leave=False, disable=None
    ) as progress:
        while batch := list(itertools.islice(lines, _LINES_AT_ONCE)):
            for pieces in model.encode(batch, out_type=str, num_threads=threads):
                yield " ".join(pieces)
            progress.update(len(batch))


def _train_model(
    texts: List[Path], vocab_size: int, character_coverage: float, model_path: Path
) -> None:
    """Train a BPE model, which under full coverage decodes to the text itself.

    The only normalisation is that of white space and invisible characters, see
    :func:`~fairseq_sparsemixer.corpora.cleaning.character_map`; it is stored in the model and so
    also applies to text given to fairseq later.
    """
    with scratch_folder(model_path.parent / ".partial") as scratch:
        longest = _join(texts, scratch / "text")
        write_lines(scratch / "rules.tsv", _normalisation_rules())
        options = {
            "input": "text",
            "model_prefix": "spm",
            "model_type": "bpe",
            "vocab_size": vocab_size,
            "character_coverage": character_coverage,
            "normalization_rule_tsv": "rules.tsv",
            # Longer lines would be left out, and characters that only they have with them.
            "max_sentence_length": max(longest, 10),  # 10 is the least it takes
            # fairseq has a symbol of this name: no piece may be called the same.
            "pad_id": 3,
            "minloglevel": 2,
        }
        arguments = " ".join(f"--{name}={value}" for name, value in options.items())
        try:
            run_python(["-c", _TRAINER, arguments], cwd=scratch)
        except ProgramError as error:
            raise UserError(_training_problem(str(error), vocab_size)) from error
        replace_durably(scratch / "spm.model", model_path)


def _join(texts: List[Path], joined: Path) -> int:
    """Write the lines of all ``texts`` to one file; the bytes of the longest."""
    longest = 0
    with joined.open("wb") as file:
        for text in texts:
            with text.open("rb") as source:
                for line in source:
                    file.write(line)
                    longest = max(longest, len(line))
    return longest


def _normalisation_rules() -> Iterator[str]:
    for code, replacement in character_map().items():
        # NUL cannot be in a rule, and a space is itself.
        if chr(code) not in "\0 ":
            yield f"{code:04X}\t{' '.join(f'{ord(c):04X}' for c in replacement)}"


def _training_problem(message: str, vocab_size: int) -> str:
    too_high = re.search(r"Vocabulary size too high .* value <= (\d+)", message)
    if too_high:
        return (
            f"--vocab-size {vocab_size} is more than this training text has pieces for: "
            f"use at most {too_high.group(1)}"
        )
    too_low = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if too_low:
        return (
            f"--vocab-size {vocab_size} is less than the characters of this training text: "
            f"use at least {too_low.group(1)}, better several times that"
        )
    return f"SentencePiece could not train a model of --vocab-size {vocab_size}: " + last_line(
        message
    )


def build_binary(
    folder: Path,
    languages: Languages,
    pieces: str = "spm",
    subwords: Tuple[str, str] = ("spm.model", FAIRSEQ_MODEL_NAME),
    workers: Optional[int] = None,
) -> StepResult:
    """Run ``fairseq-preprocess`` with one dictionary for both languages.

    Args:
        folder: of the corpus.
        languages: source and target.
        pieces: subfolder of the text in pieces; its ``dict.txt`` is the dictionary if there is
            one, else fairseq makes one from the training text.
        subwords: file in ``pieces`` that says how to cut text, and its name in ``bin/``.
        workers: processes at most (default: the cores).

    Raises:
        RuntimeError: fairseq failed, or did not keep every sentence.
    """
    source, target = languages
    binary = folder / "bin"
    binary.mkdir(exist_ok=True)
    sentences = {split: count_lines(piece_path(folder, split, source, pieces)) for split in SPLITS}
    command = ["-m", "fairseq_cli.preprocess", "--source-lang", source, "--target-lang", target]
    for split in SPLITS:
        command += [f"--{split}pref", str(folder / pieces / split)]
    dictionary = folder / pieces / "dict.txt"
    if dictionary.is_file():
        command += ["--srcdict", str(dictionary)]
    processes = useful_workers(sentences["train"], workers)
    parts = 1 if processes == 1 else _PARTS_PER_WORKER * processes
    command += ["--joined-dictionary", "--workers", str(parts)]
    with scratch_folder(folder / ".bin.partial") as scratch:
        try:
            run_python([*command, "--destdir", str(scratch)])
        except ProgramError as error:
            raise RuntimeError(f"fairseq-preprocess failed:\n{error}") from error
        # Times and paths of this run; all that matters of it is in record.json.
        (scratch / "preprocess.log").unlink()
        for split in SPLITS:
            for language in languages:
                index = scratch / f"{split}.{source}-{target}.{language}.idx"
                if _sentences_in(index) != sentences[split]:
                    raise RuntimeError(f"{index.name}: fairseq lost or added sentences")
        outputs = []
        for path in sorted(scratch.iterdir()):
            replace_durably(path, binary / path.name)
            outputs.append(binary / path.name)
    name, name_in_binary = subwords
    copy = binary / name_in_binary
    with atomic_path(copy) as partial:
        shutil.copyfile(folder / pieces / name, partial)
    return [*outputs, copy], {}


def count_lines(path: Path) -> int:
    """How many lines a file has."""
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _sentences_in(index: Path) -> int:
    """The number of sentences of a fairseq ``mmap`` index: after magic (9), version, type code."""
    with index.open("rb") as file:
        return struct.unpack_from("<9sQBQ", file.read(26))[3]
