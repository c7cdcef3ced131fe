"""LibreOffice's help, whose pages in HTML have the same name and element ids in every language."""

import re
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Dict, Iterator, List, Optional, Tuple

from fairseq_sparsemixer.corpora.cleaning import SentencePair, normalise, split_pair

_PATH = re.compile(r"usr/share/libreoffice/help/(en-US|de)/text/(.+)\.html")
_LANGUAGES = {"en-US": "en", "de": "de"}
_CONTENT = re.compile(r'<div id="DisplayArea".*?(?=<div id="SearchFrame"|<footer|\Z)', re.S)
_BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "h6"}
_SPACE_BEFORE_MARK = re.compile(r" ([,.])(?= |$)")  # left by the elements around a word
_FOLDERS = 3  # of a page's path that make a document: swriter/guide


def page_of(path: str) -> Tuple[str, str]:
    """``(language, page)`` of a path in a package, such as ``("de", "swriter/main0000")``.

    Both are empty where the path is not that of a page.
    """
    match = _PATH.fullmatch(path)
    return (_LANGUAGES[match.group(1)], match.group(2)) if match else ("", "")


def pairs(english: Dict[str, str], german: Dict[str, str]) -> Iterator[SentencePair]:
    """Yield the aligned sentences of the pages (name and HTML) that both languages have."""
    for page in sorted(english.keys() & german.keys()):
        document = "/".join(["help", *page.split("/")[:-1][:_FOLDERS]])
        translations = blocks(german[page])
        for key, source in blocks(english[page]).items():
            if key in translations:
                for segment in split_pair(source, translations[key]):
                    yield SentencePair(*segment, document, "help")


Key = Tuple[str, int]
"""The id of an element, and its number among those of the same id."""


def blocks(html: str) -> Dict[Key, str]:
    """The text of the paragraphs and headings of a page that have an id, in order.

    Of text that depends on the system or the application, the default is taken.
    """
    content = _CONTENT.search(html)
    reader = _HtmlReader()
    reader.feed(content.group() if content else "")
    reader.close()
    return reader.blocks


@dataclass
class _Element:
    """An open paragraph, heading or span.

    Attributes:
        tag: its name.
        id: of a paragraph or heading that is to be collected.
        switch: whether it is a span whose children are alternatives.
        branch: for an alternative the system or application, "" for the default; else None.
        mac: whether it is a span around whole paragraphs for the Mac, which are left out.
        text: of a paragraph, heading or alternative.
        branches: of a switch.
    """

    tag: str
    id: Optional[str] = None
    switch: bool = False
    branch: Optional[str] = None
    mac: bool = False
    text: List[str] = field(default_factory=list)
    branches: Dict[str, str] = field(default_factory=dict)

    @property
    def holds_text(self) -> bool:
        return self.tag in _BLOCKS or self.branch is not None

    def chosen(self) -> str:
        """The text of the default, or else of the first alternative that is not the Mac's."""
        if "" in self.branches:
            return self.branches[""]
        return next((text for name, text in self.branches.items() if name != "MAC"), "")


class _HtmlReader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: Dict[Key, str] = {}
        self._seen: Counter = Counter()
        self._open: List[_Element] = []

    def handle_starttag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
        attributes = dict(attrs)
        name = attributes.get("class") or ""
        if tag in _BLOCKS:
            left_out = any(element.mac for element in self._open)
            self._open.append(_Element(tag, id=None if left_out else attributes.get("id")))
        elif tag == "span":
            inside_switch = bool(self._open) and self._open[-1].switch
            branch = name if inside_switch else None
            mac = name == "MAC" and not inside_switch
            self._open.append(_Element(tag, switch=name == "switchinline", branch=branch, mac=mac))
        elif tag == "br":
            self._add(" ")

    def handle_endtag(self, tag: str) -> None:
        if any(element.tag == tag for element in self._open):
            while self._close(self._open.pop()) != tag:
                pass

    def handle_data(self, data: str) -> None:
        self._add(data)

    def _add(self, text: str) -> None:
        for element in reversed(self._open):
            if element.holds_text:
                element.text.append(text)
                return

    def _close(self, element: _Element) -> str:
        text = "".join(element.text)
        if element.switch:
            self._add(element.chosen())
        elif element.branch is not None:
            self._open[-1].branches.setdefault(element.branch, text)
        elif element.id is not None:
            self._seen[element.id] += 1
            text = _SPACE_BEFORE_MARK.sub(r"\1", normalise(text))
            self.blocks[element.id, self._seen[element.id]] = text
        return element.tag
