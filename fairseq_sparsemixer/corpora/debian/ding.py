"""The sentences of Ding, a German-English dictionary.

A line is an entry, ``German :: English``. Its cells, between ``|``, correspond one to one, and hold
alternatives between ``;``. Most cells are words and phrases; those that end like a sentence on both
sides are sentences.
"""

import re
from typing import Iterable, Iterator, List, Optional

from fairseq_sparsemixer.corpora.cleaning import Pair, normalise

PATH = "usr/share/trans/de-en"
"""Of the dictionary in its package."""

_ANNOTATION = re.compile(r"\[[^\]]*\]|\{[^}]*\}|<[^>]*>|\([^)]*\)")
_SPACE_BEFORE_MARK = re.compile(r"\s+([,.!?;:])")
_ALTERNATIVE_WORDS = re.compile(r"([^\s/]+)/[^\s/]+(?:/[^\s/]+)*")
_SENTENCE_END = re.compile(r"[.!?][\"'”“’»«]?$")
_OPENING_QUOTE = ("'", '"', "“", "‘")


def pairs(lines: Iterable[str]) -> Iterator[Pair]:
    """Yield the sentences of the dictionary, from the first alternative of each cell.

    Their document is the entry's headword: its first German alternative.
    """
    for line in lines:
        if line.startswith("#") or "::" not in line:
            continue
        german, english = (side.split("|") for side in line.split("::", 1))
        if len(german) != len(english):
            continue
        document = f"ding/{headword(german[0])}"
        for german_cell, english_cell in zip(german, english):
            source, target = _first(english_cell), _first(german_cell)
            if source and target and _is_sentence(source) and _SENTENCE_END.search(target):
                yield Pair(source, target, document, "ding")


def headword(cell: str) -> str:
    """The first alternative of a cell, without annotations, in lower case."""
    return strip_annotations(alternatives(cell)[0]).lower()


def _first(cell: str) -> Optional[str]:
    """The first alternative of a cell that can be written as one text."""
    texts = (one_of_each(strip_annotations(text)) for text in alternatives(cell))
    return next((text for text in texts if text), None)


def _is_sentence(english: str) -> bool:
    begins = english[0].isupper() or english.startswith(_OPENING_QUOTE)
    return begins and _SENTENCE_END.search(english) is not None


def strip_annotations(text: str) -> str:
    """Remove ``[subject]``, ``{gender}``, ``(remark)`` and ``<reference>``."""
    return normalise(_SPACE_BEFORE_MARK.sub(r"\1", _ANNOTATION.sub(" ", text)))


def alternatives(cell: str) -> List[str]:
    """Split a cell at the semicolons that are outside all brackets."""
    found = [""]
    depth = 0
    for character in cell:
        if character in "([{<":
            depth += 1
        elif character in ")]}>":
            depth = max(0, depth - 1)
        if character == ";" and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return found


def one_of_each(text: str) -> Optional[str]:
    """Take the first of ``word/word``; None where it is unclear what the slash separates."""
    chosen = _ALTERNATIVE_WORDS.sub(r"\1", text)
    if "/" in chosen:
        return None
    # The mark at the end may have gone with the last word.
    ends_lost = text[-1:] in tuple(".!?") and chosen[-1:] not in tuple(".!?")
    return chosen + text[-1] if ends_lost else chosen
