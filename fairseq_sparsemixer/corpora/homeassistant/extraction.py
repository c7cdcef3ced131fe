"""English-German user-interface messages of Home Assistant, from its released wheel.

Every component of the wheel has one JSON file of messages for each language; messages with the
same key correspond. A component is a document: its messages repeat each other's words.
"""

import json
import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

from fairseq_sparsemixer.corpora.cleaning import Limits, SentencePair, split_pair
from fairseq_sparsemixer.corpora.homeassistant.wheels import Wheel
from fairseq_sparsemixer.corpora.splitting import SplitSettings

WHEEL = Wheel(
    name="homeassistant",
    version="2026.2.3",
    file="homeassistant-2026.2.3-py3-none-any.whl",
    sha256="8167820cac4b8defe895fd2c36ac23402a445d1fe6028e8cde24caabb935282c",
    licence="Apache-2.0",
    python_version="3.14",
    megabytes=51,
)
LANGUAGES = ("en", "de")
LIMITS = Limits()
# The salt is the first whole number whose draw holds out close to 6 % of the components and of
# the pairs; components differ much in size.
SPLIT = SplitSettings(held_out_share=0.06, salt="41", min_held_out_tokens=5, max_cosine=0.70)

_ENGLISH_FILE = re.compile(r"homeassistant/components/([^/]+)/translations/en\.json")
_REFERENCE = "[%key"
_PLURAL_OR_SELECT = re.compile(r"\{[^{}]*, *(?:plural|select)")
_PLACEHOLDER = re.compile(r"\{[^}]*\}")
_LINK = re.compile(r"\[([^\]]*)\]\((?:[^()]|\([^)]*\))*\)")
_TAG = re.compile(r"<[^>]+>")
_EMPHASIS = re.compile(r"\*\*|__|`")
_LINE_MARKS = re.compile(r"^[ \t*-]+|[ \t*-]+$", re.M)  # of lists, and more emphasis


class Extraction(NamedTuple):
    """The aligned segments (not yet cleaned) and how they came about."""

    pairs: List[SentencePair]
    messages: int
    dropped_messages: Dict[str, int]


def extract(wheel: Path) -> Extraction:
    """Read every message that has both languages; split messages into sentences where possible.

    The result does not depend on the order of the files in the zip.
    """
    pairs = []
    messages = 0
    dropped: Counter = Counter()
    for component, source, target in _messages(wheel):
        messages += 1
        reason = _unusable(source, target)
        if reason is not None:
            dropped[reason] += 1
            continue
        for segment in split_pair(strip_markup(source), strip_markup(target)):
            if placeholders(segment[0]) == placeholders(segment[1]):
                pairs.append(SentencePair(*segment, component))
            else:
                dropped["placeholders_in_another_sentence"] += 1
    return Extraction(pairs, messages, dict(sorted(dropped.items())))


def _unusable(source: str, target: str) -> Optional[str]:
    if _REFERENCE in source or _REFERENCE in target:
        return "reference"
    if _PLURAL_OR_SELECT.search(source) or _PLURAL_OR_SELECT.search(target):
        return "plural_or_select"
    if placeholders(source) != placeholders(target):
        return "placeholders_differ"
    return None


def placeholders(text: str) -> List[str]:
    """The ``{names}`` in a message, sorted."""
    return sorted(_PLACEHOLDER.findall(text))


def strip_markup(text: str) -> str:
    """Remove tags, emphasis, marks of lists and the addresses of Markdown links; keep the words."""
    return _LINE_MARKS.sub("", _EMPHASIS.sub("", _TAG.sub(" ", _LINK.sub(r"\1", text))))


def _messages(wheel: Path) -> Iterator[Tuple[str, str, str]]:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for name in sorted(names):
            match = _ENGLISH_FILE.fullmatch(name)
            german_name = f"{name[: -len('en.json')]}de.json"
            if match is None or german_name not in names:
                continue
            english = json.loads(archive.read(name))
            german = json.loads(archive.read(german_name))
            for source, target in _same_key(english, german):
                yield match.group(1), source, target


def _same_key(source: Any, target: Any) -> Iterator[Tuple[str, str]]:
    if isinstance(source, dict) and isinstance(target, dict):
        for key in source:
            if key in target:
                yield from _same_key(source[key], target[key])
    elif isinstance(source, str) and isinstance(target, str):
        yield source, target
