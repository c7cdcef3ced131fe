"""The user's own text as a corpus."""

import re
from pathlib import Path
from typing import Any, Dict, List

from fairseq_sparsemixer.corpora import splitting
from fairseq_sparsemixer.corpora.cleaning import SentencePair
from fairseq_sparsemixer.corpora.folder import (
    SPLITS,
    Languages,
    copy_path,
    count_lines,
    paths_of,
    raw_path,
    steps_in,
)
from fairseq_sparsemixer.corpora.parallel_text import unequal_lengths
from fairseq_sparsemixer.corpora.resumable import StepResult
from fairseq_sparsemixer.corpora.split_step import (
    count_domains,
    describe_scores,
    split_versions,
    write_domains,
)
from fairseq_sparsemixer.corpora.text_to_binary import DEFAULT_VOCAB_SIZE, finish
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import read_lines, sha256_of, write_lines
from fairseq_sparsemixer.text.bleu import find_tokeniser
from fairseq_sparsemixer.version import __version__

_LANGUAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_@+-]{0,49}")


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
    the copy score but are not removed. Files ``{train,valid,test}.domain``, where they are there,
    say of which domain each line is. Returns what is in ``record.json``.

    Raises:
        UserError: both languages are one; a file is missing, empty, not UTF-8, or not as long as
            its translation; no disk space; an unsuitable ``vocab_size``.
    """
    languages = (source_lang, target_lang)
    _check_languages(languages, raw_dir)
    tokeniser = find_tokeniser(target_lang)
    names = check_raw_dir(raw_dir, output, languages)
    domain_names = _domain_names(raw_dir)
    names += domain_names
    megabytes = 1 + 4 * sum((raw_dir / name).stat().st_size for name in names) // 10**6

    def copy_text() -> StepResult:
        for split in SPLITS:
            texts = _read_parallel(raw_dir, split, languages)
            for language, lines in zip(languages, texts):
                write_lines(raw_path(output, split, language), lines)
        if not domain_names:
            return raw_paths, {}
        domains = {split: _read_domains(raw_dir, split, source_lang) for split in SPLITS}
        return [*raw_paths, *write_domains(output, domains)], {"domains": count_domains(domains)}

    def score() -> StepResult:
        train, *parts = (_pairs(output, split, languages) for split in SPLITS)
        copies = splitting.copies(train, parts)
        scores = {
            name: splitting.score_copies(copied, part, tokeniser)
            for name, copied, part in zip(SPLITS[1:], copies, parts)
        }
        copied_path = copy_path(output, languages)
        write_lines(copied_path, scores["test"].hypotheses)
        return [copied_path], {"copy_score": describe_scores(scores), "versions": split_versions()}

    with steps_in(output, megabytes, "own text") as steps:
        raw_paths = paths_of(raw_path, output, languages)
        checksums = {name: sha256_of(raw_dir / name) for name in names}
        settings = {"version": __version__, "sha256": checksums}
        copied = steps.run("copy-text", settings, [], copy_text)
        settings = {"version": __version__, "tokeniser": tokeniser, "languages": list(languages)}
        scored = steps.run("copy-score", settings, raw_paths, score)
        record = {
            "corpus": "own text",
            "source": {"folder": str(raw_dir), "sha256": checksums},
            "settings": {"vocab_size": vocab_size},
            **copied,
        }
        return finish(steps, languages, vocab_size, record, scored)


def check_raw_dir(raw_dir: Path, output: Path, languages: Languages) -> List[str]:
    """The names of the files that the user's text consists of; all are there."""
    if raw_dir.resolve() == (output / "raw").resolve():
        raise UserError(f"--raw-dir {raw_dir} is where --output {output} keeps its copy: move it")
    names = [f"{split}.{language}" for split in SPLITS for language in languages]
    for name in names:
        if not (raw_dir / name).is_file():
            raise UserError(f"--raw-dir {raw_dir}: there is no file {name}")
    return names


def _check_languages(languages: Languages, raw_dir: Path) -> None:
    """Refuse what would not do as a part of the names of files, and one language for both sides."""
    for side, language in zip(("source", "target"), languages):
        if not _LANGUAGE.fullmatch(language) or language == "domain":
            raise UserError(
                f"--{side}-lang {language}: a language has letters A to Z, digits and any of _-@+, "
                "50 at most, such as pt-br, and is not called domain; rename the files of --raw-dir"
            )
    source_lang, target_lang = languages
    if source_lang == target_lang:
        raise UserError(
            f"--source-lang and --target-lang are both {source_lang}, which would make a corpus of "
            f"copies; name the endings of the two sides in {raw_dir}"
        )


def _read_parallel(raw_dir: Path, split: str, languages: Languages) -> List[List[str]]:
    source, target = (raw_dir / f"{split}.{language}" for language in languages)
    texts = [read_lines(source), read_lines(target)]
    for path, lines in zip((source, target), texts):
        if not any(line.strip() for line in lines):
            raise UserError(f"{path} holds no text")
    if len(texts[0]) != len(texts[1]):
        raise unequal_lengths((source, target))
    return texts


def _pairs(folder: Path, split: str, languages: Languages) -> List[SentencePair]:
    """Of ``raw/``; they are of no document."""
    source, target = (read_lines(raw_path(folder, split, language)) for language in languages)
    return [SentencePair(*pair, "") for pair in zip(source, target)]


def _domain_names(raw_dir: Path) -> List[str]:
    """The names of the files that say of which domain the user's text is: three or none."""
    names = [f"{split}.domain" for split in SPLITS]
    missing = [name for name in names if not (raw_dir / name).is_file()]
    if 0 < len(missing) < len(names):
        raise UserError(
            f"--raw-dir {raw_dir}: there is no file {missing[0]}; give the domains of all three "
            "splits or of none"
        )
    return [] if missing else names


def _read_domains(raw_dir: Path, split: str, source_lang: str) -> List[str]:
    domains, text = raw_dir / f"{split}.domain", raw_dir / f"{split}.{source_lang}"
    labels = read_lines(domains)
    if len(labels) != (lines := count_lines(text)):
        raise UserError(
            f"{domains} has {len(labels)} lines and {text} has {lines}: line N of one must name "
            "the domain of line N of the other"
        )
    blank = next((number for number, label in enumerate(labels, 1) if not label.strip()), None)
    if blank is not None:
        raise UserError(f"{domains}, line {blank}: the line names no domain")
    return [label.strip() for label in labels]
