"""One system: its translations of a test set, and their scores."""

import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation import scoring
from fairseq_sparsemixer.evaluation.options import ScoreChoice, Search
from fairseq_sparsemixer.evaluation.scored_text import Text
from fairseq_sparsemixer.evaluation.tokens import (
    COMPOUND_SPLIT,
    TOKENISED,
    TokenScore,
    compounds_split,
    score_tokens,
    token_paths,
)
from fairseq_sparsemixer.evaluation.translator import (
    MAX_LEN_B,
    CheckpointInfo,
    Translation,
    Translator,
)
from fairseq_sparsemixer.files import sha256_of, write_lines
from fairseq_sparsemixer.models.search import MAX_LEN_A
from fairseq_sparsemixer.text.subwords import MosesBPE


def score_system(
    translator: Translator,
    text: Text,
    search: Search,
    further: ScoreChoice,
    stem: Path,
    run: str,
) -> Dict[str, Any]:
    """Translate and score.

    Args:
        translator: the system.
        text: what to translate.
        search: how.
        further: which scores to add to sacreBLEU's.
        stem: of the files of translations and tokens, see :func:`output_paths`.
        run: the system's name in errors.

    Returns:
        ``scores``, ``counts``, ``hypotheses`` (the file), ``checkpoints``, ``model`` and
        ``seconds``, as they stand in the JSON file of ``evaluate``.

    Raises:
        UserError: a package is missing, or compounds would be split twice.
    """
    kind = _token_score(translator, further, run)
    language = translator.target_lang
    if kind is COMPOUND_SPLIT:
        # Before the search: the package that it needs may be missing.
        reference = compounds_split(text.references, language)
    started = time.perf_counter()
    translations = translator.translate(
        text.sources, search.beam, search.lenpen, search.max_tokens, progress=True
    )
    seconds = time.perf_counter() - started
    hypotheses = [translation.text for translation in translations]
    path = _hypotheses_path(stem, language)
    write_lines(path, hypotheses)
    scores = scoring.score(hypotheses, text.references, text.tokeniser, text.official)
    if isinstance(translator.subwords, MosesBPE):
        tokens = [translation.tokens or "" for translation in translations]
        reference = [translator.subwords.tokenise(line, language) for line in text.references]
    elif kind is COMPOUND_SPLIT:
        tokens = compounds_split(hypotheses, language)
    if kind is not None:
        scores[kind.key] = score_tokens(kind, tokens, reference, stem, language)
    if further.comet is not None:
        comet = scoring.comet_score(text.sources, hypotheses, text.references, further.comet)
        scores["comet"] = comet
    return {
        "scores": scores,
        "counts": _count_lines(text.sources, translations),
        "hypotheses": str(path),
        "checkpoints": describe_checkpoints(translator.checkpoints),
        "model": translator.model_settings,
        "seconds": {"translation": seconds},
    }


def _token_score(translator: Translator, further: ScoreChoice, run: str) -> Optional[TokenScore]:
    """Which BLEU over tokens the system has, if any."""
    if not isinstance(translator.subwords, MosesBPE):
        return COMPOUND_SPLIT if further.compound_split else None
    if further.compound_split:
        raise UserError(
            f"--compound-split is not for {run}: its BLEU over tokens is "
            "that of its own Moses tokens; leave it out"
        )
    label = TOKENISED.label.format(tokens=translator.subwords.tokens)
    return TOKENISED._replace(label=label)


def _hypotheses_path(stem: Path, language: str) -> Path:
    """The text file of translations: ``stem`` with the target language as its ending."""
    return stem.with_name(f"{stem.name}.{language}")


def output_paths(stem: Path, language: str) -> List[Path]:
    """The files of text that :func:`score_system` may write."""
    paths = [_hypotheses_path(stem, language)]
    for kind in (TOKENISED, COMPOUND_SPLIT):
        paths += token_paths(stem, language, kind)
    return paths


def _count_lines(sources: List[str], translations: List[Translation]) -> Dict[str, int]:
    """How many lines went in and came out, and how many of them were out of the ordinary."""
    return {
        "source_lines": len(sources),
        "hypothesis_lines": len(translations),
        "empty_sources": scoring.empty_lines(sources),
        "empty_hypotheses": scoring.empty_lines([translation.text for translation in translations]),
        "cut_sources": sum(translation.source_cut for translation in translations),
        "hypotheses_at_length_limit": sum(
            translation.at_length_limit for translation in translations
        ),
    }


def describe_checkpoints(checkpoints: Sequence[CheckpointInfo]) -> List[Dict[str, Any]]:
    """Name, content hash, updates and (for an average) inputs of each checkpoint."""
    return [
        {
            "name": checkpoint.path.name,
            "path": str(checkpoint.path),
            "sha256": sha256_of(checkpoint.path),
            "updates": checkpoint.updates,
            "averaged_from": checkpoint.averaged_from,
        }
        for checkpoint in checkpoints
    ]


def generation_settings(translator: Translator, search: Search) -> Dict[str, Any]:
    """Everything that the search depends on."""
    subwords = translator.subwords
    key = {"sentencepiece": "sentencepiece_model_sha256", "moses": "bpecodes_sha256"}
    return {
        "beam": search.beam,
        "lenpen": search.lenpen,
        "max_len_a": MAX_LEN_A,
        "max_len_b": MAX_LEN_B,
        "max_source_positions": translator.max_source_positions,
        "max_tokens": search.max_tokens,
        "precision": search.precision,
        "device": translator.device.type,
        "dictionaries": str(translator.dictionary_folder),
        "pipeline": subwords.pipeline,
        key[subwords.pipeline]: sha256_of(subwords.path),
    }
