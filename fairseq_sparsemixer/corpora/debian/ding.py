"""The sentences of Ding, a German-English dictionary.

A line is an entry, ``German :: English``. Its cells, between ``|``, correspond one to one, and hold
alternatives between ``;``. Most cells are words and phrases; those that end like a sentence on both
sides are sentences.
"""

import re
from typing import Iterable, Iterator, List, Optional

from fairseq_sparsemixer.corpora.cleaning import SentencePair, normalise

PATH = "usr/share/trans/de-en"
"""Of the dictionary in its package."""

_ANNOTATION = re.compile(r"\[[^\]]*\]|\{[^}]*\}|<[^>]*>|\([^)]*\)")
_SPACE_BEFORE_MARK = re.compile(r"\s+([,.!?;:])")
_NUMBERS = re.compile(r"\d/\d")  # such as "2009/10" and "24/7"
_ALTERNATIVE_WORDS = re.compile(rf"(?<!\S)(?!\S*{_NUMBERS.pattern})([^\s/]+)(?:/[^\s/]+)+")
_END_MARKS = ".,;:!?"
# Beside another kind of word they show that the slash separates phrases: "on the ice/in the snow".
_WORDS = """
    a an the this that these those my your his her its our their i you he she it we they me him us
    them to at in on of for with from by into over under up out off as if and or not no all any some
    en very quite so too more
    der die das den dem des ein eine einen einem einer eines kein keine keinen keinem keiner mein
    meine meinen meinem meiner dein deine deinen deinem deiner sein seine seinen seinem seiner ihr
    ihre ihren ihrem ihrer ich du er sie es wir man mich mir dich dir ihn ihm uns euch ihnen sich zu
    zum zur im ins am ans auf aus bei beim mit nach von vom vor für über unter um durch gegen ohne
    wie als dass ob und oder nicht nichts nur noch mehr sehr ganz ist sind war hat haben etwas
"""
_FUNCTION_WORDS = frozenset(_WORDS.split())
_SENTENCE_END = re.compile(r"[.!?][\"'”“’»«]?$")
_OPENING_QUOTE = ("'", '"', "“", "‘")


def pairs(lines: Iterable[str]) -> Iterator[SentencePair]:
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
                yield SentencePair(source, target, document, "ding")


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
    """Take the first of ``word/word``; None where the slash seems to separate phrases."""
    if any(map(_are_phrases, _ALTERNATIVE_WORDS.finditer(text))):
        return None
    chosen = _ALTERNATIVE_WORDS.sub(_first_word, text)
    return None if "/" in _NUMBERS.sub("", chosen) else chosen


def _first_word(match: "re.Match[str]") -> str:
    # The mark after the last word is that of the sentence.
    return match[1] + (match[0][-1] if match[0][-1] in _END_MARKS else "")


def _are_phrases(match: "re.Match[str]") -> bool:
    """Whether the words around a slash differ in kind: a function word, in capitals, or neither."""
    if match[1][-1] in _END_MARKS:
        return True
    kinds = {
        (word.lower() in _FUNCTION_WORDS, word[:1].isupper())
        for word in (re.sub(r"^\W+|\W+$", "", each) for each in match[0].split("/"))
    }
    return len(kinds) > 1
