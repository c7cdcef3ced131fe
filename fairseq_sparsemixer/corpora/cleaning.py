"""Sentence pairs: normalise, split into sentences, keep or drop for a counted reason."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import Dict, Iterable, List, NamedTuple, Optional, Tuple


class SentencePair(NamedTuple):
    """A sentence, its translation, the document that both come from, and that document's domain.

    The domain is a label for the kind of text; it is empty in a corpus of one kind.
    """

    source: str
    target: str
    document: str
    domain: str = ""


@dataclass(frozen=True)
class Limits:
    """What a pair must satisfy; tokens are those of :func:`tokens`."""

    min_tokens: int = 3
    max_tokens: int = 80
    max_length_ratio: float = 2.5
    min_letter_share: float = 0.5  # letters among the characters that are not spaces
    min_words: int = 2  # tokens that begin with a letter


# No later code point is white space or a control character.
_END_OF_SPACES_AND_CONTROLS = 0x3001


def character_map() -> Dict[int, str]:
    """Code points that may not reach a token file, and what stands for them (" " or nothing).

    fairseq splits lines into tokens at every kind of white space, so a no-break space inside a
    piece would tear it in two unknown ones. Control and invisible characters carry no text.
    """
    mapping = {}
    for code in range(_END_OF_SPACES_AND_CONTROLS):
        character = chr(code)
        if character.isspace():
            mapping[code] = " "
        elif unicodedata.category(character) == "Cc":
            mapping[code] = ""
    # Soft hyphen, zero-width space, byte order mark.
    mapping.update({0x00AD: "", 0x200B: "", 0xFEFF: ""})
    return mapping


_CHARACTER_MAP = character_map()
UNREADABLE = "\N{REPLACEMENT CHARACTER}"
"""Stands in a text for what could not be read."""
# UTF-8 that was read as Latin-1: "fÃ¼r".
_NOT_DECODED = re.compile(f"{UNREADABLE}|Ã[\\x80-\\xbf]")
_SPACES = re.compile(r" +")
_MAX_MOSES_WORD = 1000  # characters
_TOKEN = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
_LETTER = re.compile(r"[^\W\d_]")


def normalise(text: str) -> str:
    """NFC, plain single spaces, no control or invisible characters, nothing at the ends."""
    text = unicodedata.normalize("NFC", text.translate(_CHARACTER_MAP))
    return _SPACES.sub(" ", text).strip()


def tokens(text: str) -> List[str]:
    """Words (with inner hyphens and apostrophes) and single punctuation marks."""
    return _TOKEN.findall(text)


def drop_reason(source: str, target: str, limits: Limits) -> Optional[str]:
    """Why a normalised pair is of no use for training, or None where it is to be kept."""
    if not source or not target:
        return "empty"
    if _NOT_DECODED.search(source) or _NOT_DECODED.search(target):
        return "unreadable"
    if source.lower() == target.lower():
        return "identical"
    lengths = [len(tokens(source)), len(tokens(target))]
    if min(lengths) < limits.min_tokens:
        return "too_short"
    if max(lengths) > limits.max_tokens:
        return "too_long"
    if max(lengths) > limits.max_length_ratio * min(lengths):
        return "length_ratio"
    if min(_letter_share(source), _letter_share(target)) < limits.min_letter_share:
        return "few_letters"
    if min(_word_count(source), _word_count(target)) < limits.min_words:
        return "few_words"
    return None


def _letter_share(text: str) -> float:
    return len(_LETTER.findall(text)) / len(text.replace(" ", ""))


def _word_count(text: str) -> int:
    return sum(1 for token in tokens(text) if _LETTER.match(token))


def clean(
    pairs: Iterable[SentencePair], limits: Limits
) -> Tuple[List[SentencePair], Dict[str, int]]:
    """Normalise pairs and keep the useful ones, each text pair once (its first document).

    Returns:
        The pairs kept, in order, and how many were dropped for each reason.
    """
    kept = []
    dropped: Counter = Counter()
    seen = set()
    for pair in pairs:
        source, target = normalise(pair.source), normalise(pair.target)
        reason = drop_reason(source, target, limits)
        if reason is None and (source, target) in seen:
            reason = "duplicate"
        if reason is not None:
            dropped[reason] += 1
            continue
        seen.add((source, target))
        kept.append(pair._replace(source=source, target=target))
    return kept, dict(sorted(dropped.items()))


# English and German abbreviations, whose full stop ends no sentence. A single letter stands for
# most of them ("z. B.", "e.g.", initials).
_ABBREVIATION = re.compile(
    r"\b(?:[A-Za-zÄäÖöÜü]|\d+|bzw|usw|etc|ca|Nr|vgl|ggf|evtl|inkl|Abk|Abb|Jh|resp|engl|Std|Min|Max"
    r"|bspw|sog|allg|Kap|Dr|Mr|Mrs|St|vs|cf|No|Fig|approx|incl|Inc|Ltd|Co)\.$"
)
_BOUNDARY = re.compile(r"[.!?][\"'”“»)\]]*\s+(?=[\"'„“«(\[]?[A-ZÄÖÜ0-9])")
_PARAGRAPH_BREAK = re.compile(r"\n+")
_LIST_MARK = re.compile(r"^\s*[-*]\s")  # not the dash of "-1" or "--option"


def sentences(text: str) -> List[str]:
    """Split a paragraph at full stops, exclamation and question marks before a capital."""
    found = []
    start = 0
    for boundary in _BOUNDARY.finditer(text):
        sentence = text[start : boundary.end()].strip()
        if _ABBREVIATION.search(sentence):
            continue
        found.append(sentence)
        start = boundary.end()
    rest = text[start:].strip()
    return [*found, rest] if rest else found


def paragraphs(text: str) -> List[str]:
    """The lines of a message that hold anything, without the marks of a list."""
    lines = (line for line in _PARAGRAPH_BREAK.split(text) if line.strip())
    return [_LIST_MARK.sub("", line).strip() for line in lines]


def split_pair(source: str, target: str) -> List[Tuple[str, str]]:
    """Split both sides into paragraphs and these into sentences, wherever the counts agree."""
    sources, targets = paragraphs(source), paragraphs(target)
    if len(sources) != len(targets):
        return _split_sentences(source, target)
    return [segment for pair in zip(sources, targets) for segment in _split_sentences(*pair)]


def _split_sentences(source: str, target: str) -> List[Tuple[str, str]]:
    sources, targets = sentences(source), sentences(target)
    if len(sources) == len(targets) and all(map(similar_length, sources, targets)):
        return list(zip(sources, targets))
    return [(source, target)]


def similar_length(source: str, target: str) -> bool:
    """Whether two texts are about as long as each other, as translations are."""
    # The 8 keeps short sentences ("Ja." for "Yes, please.") from failing the ratio.
    return 0.4 <= (len(source) + 8) / (len(target) + 8) <= 2.2


def moses_drop_reason(
    source: str, target: str, max_tokens: int, max_length_ratio: float
) -> Optional[str]:
    """Why ``clean-corpus-n.perl -ratio R ... 1 N`` drops a pair of tokenised lines, or None."""
    words = [source.split(), target.split()]
    lengths = [len(side) for side in words]
    if not all(lengths):
        return "empty"
    if max(lengths) > max_tokens:
        return "too_long"
    if max(lengths) > max_length_ratio * min(lengths):
        return "length_ratio"
    if any(len(word) > _MAX_MOSES_WORD for side in words for word in side):
        return "long_word"
    return None
