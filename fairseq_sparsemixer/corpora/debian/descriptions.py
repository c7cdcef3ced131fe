"""Package descriptions, from the archive's indices ``Translation-en``, ``Translation-de``, ...

A stanza holds the description of one package in one language; all languages carry the MD5 of the
English text. The first line is the title; the others, indented by a space, are paragraphs between
lines with a dot. Lines indented further are lists and verbatim text.
"""

import re
from typing import Dict, Iterable, Iterator, List, NamedTuple

from fairseq_sparsemixer.corpora.cleaning import SentencePair, split_pair

_BULLET = re.compile(r"^[-*+•o]\s+")
_PREFIX = re.compile(
    r"lib(?!reoffice)|(?:python3?|gir1\.2|task|fonts|kde|gnome|ruby|golang|node|r-cran)-"
)


class Description(NamedTuple):
    """A package's description: its title and its paragraphs."""

    package: str
    paragraphs: List[str]


def pairs(
    english: Iterable[str],
    translated: Iterable[str],
    language: str = "de",
    domain: str = "descriptions",
) -> Iterator[SentencePair]:
    """Yield the aligned sentences of the descriptions that the indices (lines) both have.

    Titles correspond. Paragraphs do where there are as many on both sides.

    Args:
        english: lines of the English index.
        translated: those of the index in ``language``.
        domain: of the pairs.
    """
    translations = read_index(translated, language)
    for md5, description in read_index(english, "en").items():
        translation = translations.get(md5)
        if translation is None:
            continue
        document = f"descriptions/{stem(description.package)}"
        sides = [description.paragraphs, translation.paragraphs]
        if len(sides[0]) != len(sides[1]):
            sides = [side[:1] for side in sides]
        for source, target in zip(*sides):
            for segment in split_pair(source, target):
                yield SentencePair(*segment, document, domain)


def stem(package: str) -> str:
    """What related packages share: ``firefox`` of ``firefox-esr``, ``foo`` of ``libfoo-dev``."""
    prefix = _PREFIX.match(package)
    return package[prefix.end() if prefix else 0 :].split("-")[0] or package


def read_index(lines: Iterable[str], language: str) -> Dict[str, Description]:
    """The descriptions of an index by the MD5 of their English text."""
    found: Dict[str, Description] = {}
    stanza: List[str] = []
    for line in lines:
        if line:
            stanza.append(line)
        else:
            _add_stanza(found, stanza, language)
            stanza = []
    _add_stanza(found, stanza, language)
    return found


def _add_stanza(found: Dict[str, Description], stanza: List[str], language: str) -> None:
    fields: Dict[str, str] = {}
    body: List[str] = []
    name = ""
    for line in stanza:
        if not line.startswith(" "):
            name, _, value = line.partition(":")
            fields[name] = value.strip()
        elif name == f"Description-{language}":
            body.append(line[1:])
    title = fields.get(f"Description-{language}")
    md5 = fields.get("Description-md5")
    if title and md5:
        description = Description(fields.get("Package", ""), [title, *paragraphs(body)])
        found.setdefault(md5, description)


def paragraphs(body: Iterable[str]) -> List[str]:
    """The paragraphs and list items of a description's further lines."""
    found: List[str] = []
    begins = True
    for line in body:
        text = line.strip()
        if text == ".":
            begins = True
            continue
        # Unindented, a dash is as often a line break within a sentence.
        if begins or (line.startswith(" ") and _BULLET.match(text)):
            found.append(text)
        else:
            found[-1] += f" {text}"
        begins = False
    return [_BULLET.sub("", paragraph, count=1) for paragraph in found]
