"""The steps that all corpora end with: from text to pieces, ``bin/`` and ``record.json``."""

import functools
import importlib.metadata
from typing import Any, Dict, Optional, Sequence

from fairseq_sparsemixer.corpora import binarise, bpe, spm
from fairseq_sparsemixer.corpora.folder import (
    CORPUS_RECORD,
    Languages,
    TextPath,
    paths_of,
    piece_path,
    raw_path,
)
from fairseq_sparsemixer.corpora.resumable import StepResult, Steps
from fairseq_sparsemixer.files import write_json
from fairseq_sparsemixer.text import BPE_CODES, MOSES_TOKENS
from fairseq_sparsemixer.version import __version__

DEFAULT_VOCAB_SIZE = 4000
"""Pieces of all languages together, where a corpus has no number of its own."""


def sentencepiece_steps(
    steps: Steps,
    pairs: Sequence[Languages],
    vocab_size: int,
    text_path: TextPath = raw_path,
    character_coverage: float = 1.0,
    workers: Optional[int] = None,
) -> Dict[str, Any]:
    """From text to ``spm/`` and ``bin/``; the other arguments are those of ``spm.build_pieces``.

    Args:
        pairs: source and target of each.
    """
    folder = steps.folder
    languages = [language for pair in pairs for language in pair]

    def build_binary() -> StepResult:
        parts = [binarise.build_binary(folder, pair, workers=workers) for pair in pairs]
        return [path for outputs, _ in parts for path in outputs], {}

    cut = steps.run(
        "sentencepiece",
        {**_made_with(languages), "vocab_size": vocab_size},
        paths_of(text_path, folder, languages),
        lambda: spm.build_pieces(
            folder, languages, vocab_size, text_path, character_coverage, workers
        ),
    )
    model_and_dictionary = [folder / "spm" / "spm.model", folder / "spm" / "dict.txt"]
    steps.run(
        "binarise",
        _made_with(languages),
        [*paths_of(piece_path, folder, languages), *model_and_dictionary],
        build_binary,
    )
    return cut


def moses_steps(
    steps: Steps, languages: Languages, merges: int, workers: Optional[int]
) -> Dict[str, Any]:
    """From ``tokens/`` to ``bpe/`` and ``bin/``; a ``tokens/moses.json`` goes along."""
    folder = steps.folder
    bpe_path = functools.partial(piece_path, pieces="bpe")
    cut = steps.run(
        "bpe",
        {**_made_with(languages), "merges": merges},
        paths_of(bpe.token_path, folder, languages),
        lambda: bpe.build_pieces(folder, languages, merges, workers),
    )
    names = {"bpe/codes": BPE_CODES, f"tokens/{MOSES_TOKENS}": MOSES_TOKENS}
    subwords = {name: names[name] for name in names if (folder / name).is_file()}
    steps.run(
        "binarise",
        _made_with(languages),
        [*paths_of(bpe_path, folder, languages), *(folder / name for name in subwords)],
        lambda: binarise.build_binary(folder, languages, "bpe", subwords, workers),
    )
    cut["versions"]["sacremoses"] = importlib.metadata.version("sacremoses")
    return cut


def _made_with(languages: Sequence[str]) -> Dict[str, Any]:
    return {"version": __version__, "languages": list(languages)}


def write_record(
    steps: Steps, languages: Sequence[str], record: Dict[str, Any], cut: Dict[str, Any]
) -> Dict[str, Any]:
    """Write ``record.json``: ``record`` and what the steps said of the pieces; returns it."""
    record = {
        **record,
        "languages": list(languages),
        "splits": cut["splits"],
        "vocabulary": cut["vocabulary"],
        "versions": {"fairseq-sparsemixer": __version__, **cut["versions"]},
    }
    write_json(steps.folder / CORPUS_RECORD, record)
    return record


def finish(
    steps: Steps,
    languages: Sequence[str],
    vocab_size: int,
    record: Dict[str, Any],
    scored: Dict[str, Any],
    pairs: Optional[Sequence[Languages]] = None,
) -> Dict[str, Any]:
    """From ``raw/`` to ``bin/`` and ``record.json``.

    Args:
        languages: source and target, or all of ``pairs``.
        record: what it says, but for what the steps find out.
        scored: what the step found out that split the text.
        pairs: where there are several.
    """
    source, target = languages[:2]
    cut = sentencepiece_steps(steps, pairs or [(source, target)], vocab_size)
    cut["versions"] = {**scored["versions"], **cut["versions"]}
    return write_record(steps, languages, {**record, "copy_score": scored["copy_score"]}, cut)
