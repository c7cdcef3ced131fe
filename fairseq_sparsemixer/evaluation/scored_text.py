"""The text that is scored, and what is known of it."""

import re
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from fairseq_sparsemixer.corpora.folder import CORPUS_RECORD, raw_path
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation import scoring
from fairseq_sparsemixer.evaluation.translator import Translator
from fairseq_sparsemixer.files import read_json, read_lines, sha256_of
from fairseq_sparsemixer.text.bleu import find_tokeniser

_RECORD = {
    "test?": ({"sacrebleu": (str, None)}, None),
    "copy_score?": {str: {"bleu": float, "signature": str}},
}
"""What is read of a corpus' record, with what it must be."""


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
    """What is scored, and how: ``tokeniser`` and ``official`` are those of :func:`.scoring.score`.

    There is a reference for each source.
    """

    sources: List[str]
    references: List[str]
    tokeniser: str
    official: Optional[Dict[str, str]]


def given_test_set(source: Path, reference: Path) -> TestSet:
    """The text of two files.

    Raises:
        UserError: there is no such file.
    """
    for path in (source, reference):
        if not path.is_file():
            raise UserError(f"there is no {path}; check --source and --reference")
    return TestSet(source.stem, source, reference, corpus=None)


def find_test_set(translator: Translator, corpus: Optional[Path], subset: str) -> TestSet:
    """A subset of a prepared corpus; without one, of that which the model was trained on.

    Raises:
        UserError: there is no such text.
    """
    # Binarised data lies in the folder bin/ of a prepared corpus.
    corpus = corpus or translator.trained_on.parent
    source, reference = (raw_path(corpus, subset, ending) for ending in translator.endings)
    for path in (source, reference):
        if not path.is_file():
            raise UserError(
                f"there is no test set {path}; make it with `fairseq-sparsemixer prepare`, or name "
                "a prepared corpus with --data (and --subset), or text files with --source and "
                "--reference"
            )
    return TestSet(source.stem, source, reference, corpus)


def read_text(
    test_set: TestSet, languages: Tuple[str, str], tokeniser: Optional[str] = None
) -> Text:
    """The lines of a test set.

    Args:
        test_set: what to read.
        languages: of source and target.
        tokeniser: sacreBLEU's; None for that of the target language.

    Raises:
        UserError: its files have different numbers of lines, or the tokeniser cannot be used.
    """
    sources = read_lines(test_set.source)
    references = read_lines(test_set.reference)
    if len(sources) != len(references):
        raise UserError(
            f"{test_set.source} has {len(sources)} lines and {test_set.reference} has "
            f"{len(references)}; give files that match with --source and --reference"
        )
    name = _official_name(test_set)
    official = {"test_set": name, "langpair": "-".join(languages)} if name else None
    return Text(sources, references, find_tokeniser(languages[1], tokeniser), official)


def _official_name(test_set: TestSet) -> Optional[str]:
    """What sacrebleu calls the test set of a corpus, where the corpus's record vouches for it."""
    if test_set.corpus is None or test_set.name != "test":
        return None
    # Null where the archive was not the published one.
    test = _read_record(test_set.corpus).get("test")
    return test["sacrebleu"] if test else None


def copy_score(test_set: TestSet, language: str, text: Text) -> Optional[Dict[str, Any]]:
    """The scores of copying the nearest training sentence, or None if they are not known.

    Computed from the copied lines where they lie in the corpus, so that model and copy are
    scored alike; else as they stand in its record, if it has them of the same tokeniser.
    """
    if test_set.corpus is None:
        return None
    copied = test_set.corpus / "copy" / f"{test_set.name}.{language}"
    if copied.is_file():
        scores = scoring.score(read_lines(copied), text.references, text.tokeniser, text.official)
        return {"source": str(copied), "scores": scores}
    recorded = _read_record(test_set.corpus).get("copy_score", {})
    if test_set.name in recorded:
        bleu, signature = (recorded[test_set.name][key] for key in ("bleu", "signature"))
        # Of ja-mecab and the like the signature also holds the version.
        if not re.search(rf"(^|\|)tok:{re.escape(text.tokeniser)}(-|\||$)", signature):
            return None
        scores = {"bleu": {"score": bleu, "signature": signature}}
        return {"source": str(test_set.corpus / CORPUS_RECORD), "scores": scores}
    return None


def _read_record(corpus: Path) -> Dict[str, Any]:
    """What ``prepare`` says of a corpus; empty where it says nothing."""
    path = corpus / CORPUS_RECORD
    cure = "make the corpus anew, or give the files with --source and --reference"
    return read_json(path, _RECORD, cure) if path.is_file() else {}


def describe_test_set(
    test_set: TestSet, translator: Translator, official: Optional[Dict[str, str]]
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
