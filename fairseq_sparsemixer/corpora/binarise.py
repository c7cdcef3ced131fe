"""Joint SentencePiece vocabulary, pieces, and fairseq's binary data from ``raw/``.

The folder of a corpus holds ``raw/{train,valid,test}.LANG`` (text), ``spm/`` (model, dictionary,
the same text in pieces) and ``bin/`` (what fairseq trains on).
"""

import os
import re
import shutil
import struct
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

from fairseq_sparsemixer.corpora.cleaning import character_map
from fairseq_sparsemixer.corpora.steps import StepResult
from fairseq_sparsemixer.corpora.subprocesses import ProgramError, last_line, run_python
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import (
    atomic_path,
    read_lines,
    replace_durably,
    scratch_folder,
    write_lines,
)

SPLITS = ("train", "valid", "test")
# The name under which fairseq's `from_pretrained` looks for a SentencePiece model.
FAIRSEQ_MODEL_NAME = "sentencepiece.bpe.model"

Languages = Tuple[str, str]

_LINES_AT_ONCE = 10_000
_LINES_PER_WORKER = 200_000
# Run in a scratch folder, so that the model (which stores the names of its input files) holds
# neither a path nor anything else that differs between two machines.
_TRAINER = "import sys, sentencepiece; sentencepiece.SentencePieceTrainer.train(sys.argv[1])"


def raw_path(folder: Path, split: str, language: str) -> Path:
    """``raw/train.en`` and so on."""
    return folder / "raw" / f"{split}.{language}"


def piece_path(folder: Path, split: str, language: str) -> Path:
    """``spm/train.en`` and so on."""
    return folder / "spm" / f"{split}.{language}"


def build_pieces(folder: Path, languages: Languages, vocab_size: int) -> StepResult:
    """Train the joint model on the training text alone, and write all text in its pieces.

    Returns:
        Paths of the outputs, and counts: for each split and language ``sentences``, ``pieces``
        and ``unknown`` (pieces that become ``<unk>``; none in the training text).
    """
    import sentencepiece

    model_path = folder / "spm" / "spm.model"
    _train_model([raw_path(folder, "train", name) for name in languages], vocab_size, model_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    vocabulary = _vocabulary(model)
    outputs = [model_path]
    counts: Dict[str, Dict[str, Dict[str, int]]] = {split: {} for split in SPLITS}
    train_counts: Counter = Counter()
    for split in SPLITS:
        for language in languages:
            lines = read_lines(raw_path(folder, split, language))
            frequency: Counter = Counter()
            path = piece_path(folder, split, language)
            write_lines(path, _encode(model, lines, f"{split}.{language}", frequency))
            outputs.append(path)
            counts[split][language] = {
                "sentences": len(lines),
                "pieces": sum(frequency.values()),
                "unknown": sum(n for piece, n in frequency.items() if piece not in vocabulary),
            }
            if split == "train":
                train_counts.update(frequency)
    dictionary = folder / "spm" / "dict.txt"
    # By frequency, as fairseq does; ties in the order of the model. Pieces that the training text
    # never ends up with stay: other text may need them.
    ordered = sorted(vocabulary, key=lambda piece: -train_counts[piece])
    write_lines(dictionary, (f"{piece} {train_counts[piece]}" for piece in ordered))
    outputs.append(dictionary)
    result = {
        "vocabulary": len(vocabulary) + len(_special_pieces(model)),
        "splits": counts,
        "versions": {"sentencepiece": sentencepiece.__version__},
    }
    return outputs, result


def _special_pieces(model: Any) -> List[int]:
    return [i for i in range(len(model)) if model.is_control(i) or model.is_unknown(i)]


def _vocabulary(model: Any) -> Dict[str, int]:
    """Pieces of the model, in order, without the special symbols: fairseq has its own."""
    special = set(_special_pieces(model))
    return {model.id_to_piece(i): i for i in range(len(model)) if i not in special}


def _encode(model: Any, lines: List[str], name: str, frequency: Counter) -> Iterator[str]:
    """Yield lines in pieces; add up how often each piece occurs."""
    from tqdm import tqdm

    with tqdm(total=len(lines), desc=name, unit="line", leave=False, disable=None) as progress:
        for start in range(0, len(lines), _LINES_AT_ONCE):
            batch = lines[start : start + _LINES_AT_ONCE]
            for pieces in model.encode(batch, out_type=str):
                frequency.update(pieces)
                yield " ".join(pieces)
            progress.update(len(batch))


def _train_model(texts: List[Path], vocab_size: int, model_path: Path) -> None:
    """Train a BPE model with all characters of the text, which decodes to the text itself.

    The only normalisation is that of white space and invisible characters, see
    :func:`~fairseq_sparsemixer.corpora.cleaning.character_map`; it is stored in the model and so
    also applies to text given to fairseq later.
    """
    with scratch_folder(model_path.parent / ".partial") as scratch:
        with (scratch / "text").open("wb") as file:
            for text in texts:
                with text.open("rb") as source:
                    shutil.copyfileobj(source, file)
        write_lines(scratch / "rules.tsv", _normalisation_rules())
        options = {
            "input": "text",
            "model_prefix": "spm",
            "model_type": "bpe",
            "vocab_size": vocab_size,
            "character_coverage": 1.0,
            "normalization_rule_tsv": "rules.tsv",
            # Longer lines would be left out, and characters that only they have with them.
            "max_sentence_length": (scratch / "text").stat().st_size,
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


def build_binary(folder: Path, languages: Languages) -> StepResult:
    """Run ``fairseq-preprocess`` with one dictionary for both languages.

    Raises:
        RuntimeError: fairseq failed, or did not keep every sentence.
    """
    source, target = languages
    binary = folder / "bin"
    binary.mkdir(exist_ok=True)
    sentences = {split: _count_lines(piece_path(folder, split, source)) for split in SPLITS}
    workers = min(os.cpu_count() or 1, 1 + sentences["train"] // _LINES_PER_WORKER)
    command = ["-m", "fairseq_cli.preprocess", "--source-lang", source, "--target-lang", target]
    for split in SPLITS:
        command += [f"--{split}pref", str(folder / "spm" / split)]
    command += ["--srcdict", str(folder / "spm" / "dict.txt"), "--joined-dictionary"]
    command += ["--workers", str(workers)]
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
    model_copy = binary / FAIRSEQ_MODEL_NAME
    with atomic_path(model_copy) as partial:
        shutil.copyfile(folder / "spm" / "spm.model", partial)
    return [*outputs, model_copy], {}


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _sentences_in(index: Path) -> int:
    """The number of sentences of a fairseq ``mmap`` index: after magic (9), version, type code."""
    with index.open("rb") as file:
        return struct.unpack_from("<9sQBQ", file.read(26))[3]
