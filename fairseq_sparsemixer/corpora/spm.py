"""Text cut by SentencePiece: a joint BPE model of both languages, in ``spm/``.

:mod:`.bpe` makes ``bpe/`` in its place.
"""

import itertools
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from tqdm import tqdm

from fairseq_sparsemixer.corpora.cleaning import character_map
from fairseq_sparsemixer.corpora.folder import Languages, TextPath, count_lines, raw_path
from fairseq_sparsemixer.corpora.pieces import describe_splits, write_pieces
from fairseq_sparsemixer.corpora.resumable import StepResult
from fairseq_sparsemixer.corpora.subprocesses import ProgramError, last_line, run_python
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import iterate_lines, replace_durably, scratch_folder, write_lines

_LINES_AT_ONCE = 10_000
_RESERVED = "\u2585"
_NOT_TRAINED_ON = ("<unk>", "<s>", "</s>", "<pad>", _RESERVED)
"""What SentencePiece's trainer cuts out of a line, and last what makes it leave out the line."""
# Run in a scratch folder, so that the model (which stores the names of its input files) holds
# neither a path nor anything else that differs between two machines. Python writes it, since
# SentencePiece does not notice where its own file is cut off by a full disk.
_TRAINER = """
import json, sys, sentencepiece
with open("spm.model", "wb") as file:
    sentencepiece.SentencePieceTrainer.train(model_writer=file, **json.loads(sys.argv[1]))
"""


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
        folder, languages, "spm", text_path, lambda path: encode(model, path, threads)
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


def _special_pieces(model: Any) -> List[int]:
    return [i for i in range(len(model)) if model.is_control(i) or model.is_unknown(i)]


def _vocabulary(model: Any) -> Dict[str, int]:
    """Pieces of the model, in order, without the special symbols: fairseq has its own."""
    special = set(_special_pieces(model))
    return {model.id_to_piece(i): i for i in range(len(model)) if i not in special}


def encode(model: Any, path: Path, threads: int) -> Iterator[str]:
    """Yield the lines of a file in pieces."""
    lines = iterate_lines(path)
    with tqdm(
        total=count_lines(path), desc=path.name, unit=" lines", leave=False, disable=None
    ) as progress:
        while batch := list(itertools.islice(lines, _LINES_AT_ONCE)):
            plain = [line.replace("\0", "") for line in batch]
            for pieces in model.encode(plain, out_type=str, num_threads=threads):
                yield " ".join(pieces)
            progress.update(len(batch))


def _train_model(
    texts: List[Path], vocab_size: int, character_coverage: float, model_path: Path
) -> None:
    """Train a BPE model, which under full coverage decodes to the text itself.

    The only normalisation is that of white space and invisible characters, see
    :func:`~fairseq_sparsemixer.corpora.cleaning.character_map`; it is stored in the model and so
    also applies to text given to fairseq later. NUL, which the model cannot hold a rule for, is
    taken out here and by :class:`.text.subwords.SentencePiece`. U+2581, which stands for a space in
    pieces, is one.
    """
    with scratch_folder(model_path.parent / ".partial") as scratch:
        longest = _join(texts, scratch / "text")
        write_lines(scratch / "rules.tsv", _normalisation_rules())
        options = {
            "input": "text",
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
        if character_coverage == 1:
            options.update(_cover_all(scratch / "text"))
        try:
            run_python(["-c", _TRAINER, json.dumps(options)], cwd=scratch)
        except ProgramError as error:
            raise UserError(_training_problem(str(error), vocab_size)) from error
        replace_durably(scratch / "spm.model", model_path)


def _join(texts: List[Path], joined: Path) -> int:
    """Write the lines of all ``texts``, without NUL, to one file; the bytes of the longest."""
    longest = 0
    with joined.open("wb") as file:
        for text in texts:
            with text.open("rb") as source:
                for line in source:
                    line = line.replace(b"\0", b"")
                    file.write(line)
                    longest = max(longest, len(line))
    return longest


def _cover_all(text: Path) -> Dict[str, Any]:
    """Options by which all characters of a text get a piece, whatever the trainer leaves out."""
    lines = (line for line in iterate_lines(text) if any(each in line for each in _NOT_TRAINED_ON))
    mapping = {**character_map(), ord("\u2581"): " "}
    found = {character for line in lines for character in line.translate(mapping)} - {" "}
    options: Dict[str, Any] = {}
    if _RESERVED in found:
        # Not taken as a character, but as a piece.
        options["user_defined_symbols"] = [_RESERVED]
    if found - {_RESERVED}:
        options["required_chars"] = "".join(sorted(found - {_RESERVED}))
    return options


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
