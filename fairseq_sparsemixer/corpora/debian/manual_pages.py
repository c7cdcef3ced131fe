"""Manual pages in both languages, aligned by the sequence of their blocks.

The German pages are translated paragraph by paragraph from the English ones, so that both hold the
same macros in the same order. Where a package ships another version of a page than the one that was
translated, what has changed in between is left out.
"""

import difflib
import gzip
import re
import zlib
from typing import Dict, FrozenSet, Iterator, List, NamedTuple, Tuple

from fairseq_sparsemixer.corpora.cleaning import (
    UNREADABLE,
    SentencePair,
    normalise,
    similar_length,
    split_pair,
)
from fairseq_sparsemixer.errors import UserError

_PATH = re.compile(r"usr/share/man/(de/)?man\d[a-z]*/([^/]+)\.gz")
# What a translation leaves as it is: options, names with underscores, pages, paths, numbers.
_MARK = re.compile(
    r"(?<![\w-])--?[A-Za-z][\w-]*|\w+_\w+|\w[\w.+-]*\(\d\w*\)|(?<!\w)/[\w./-]*\w|\d+|https?://\S+\w"
)
_LEAST_SHARED_MARKS = 0.5


def page_of(path: str) -> Tuple[str, str]:
    """``(language, page)`` of a path in a package, such as ``("de", "cp.1")``.

    Both are empty where the path is not that of a page.
    """
    match = _PATH.fullmatch(path)
    if match is None:
        return "", ""
    return ("de" if match.group(1) else "en"), match.group(2)


def read_page(content: bytes, path: str) -> str:
    """The source of a page, which pages that are not UTF-8 have in Latin-1.

    Raises:
        UserError: it is not compressed as its ``path`` in the package says.
    """
    try:
        text = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error})") from error
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("latin-1")


def pairs(english: Dict[str, str], german: Dict[str, str]) -> Iterator[SentencePair]:
    """Yield the aligned sentences of the pages (name and source) that both languages have."""
    for page in sorted(english.keys() & german.keys()):
        for source, target in align(blocks(english[page]), blocks(german[page])):
            for segment in split_pair(source, target):
                yield SentencePair(*segment, f"manpages/{family(page)}", "manpages")


def family(page: str) -> str:
    """What pages of one subject share: ``systemd`` of ``systemd-analyze.1``."""
    return re.split(r"[-_.@]", re.sub(r"\.\d\w*$", "", page))[0] or page


class Block(NamedTuple):
    """A paragraph, heading or tag; the kind is a macro's name or ``tag``."""

    kind: str
    text: str

    @property
    def marks(self) -> FrozenSet[str]:
        """What of its text is the same in both languages."""
        return frozenset(_MARK.findall(self.text))


def align(english: List[Block], german: List[Block]) -> List[Tuple[str, str]]:
    """The texts of blocks that correspond.

    First blocks are matched that have the same marks (options, numbers, names of pages), in the
    same order; then the blocks between two of these, wherever they are of the same kinds.
    """
    aligned = []
    before = (-1, -1)
    for after in [*_anchors(english, german), (len(english), len(german))]:
        between = [
            page[start + 1 : end] for page, start, end in zip((english, german), before, after)
        ]
        if [block.kind for block in between[0]] == [block.kind for block in between[1]]:
            aligned += list(zip(*between))
        if after[0] < len(english):
            aligned.append((english[after[0]], german[after[1]]))
        before = after
    return [(source.text, target.text) for source, target in aligned if _agree(source, target)]


def _anchors(english: List[Block], german: List[Block]) -> List[Tuple[int, int]]:
    """Positions of blocks with the same kind and the same marks, rising on both sides."""
    marked = [
        [(index, (block.kind, block.marks)) for index, block in enumerate(page) if block.marks]
        for page in (english, german)
    ]
    keys = [[key for _, key in side] for side in marked]
    matcher = difflib.SequenceMatcher(a=keys[0], b=keys[1], autojunk=False)
    return [
        (marked[0][first + i][0], marked[1][second + i][0])
        for first, second, length in matcher.get_matching_blocks()
        for i in range(length)
    ]


def _agree(source: Block, target: Block) -> bool:
    shared = len(source.marks & target.marks)
    most = max(len(source.marks), len(target.marks))
    return shared >= _LEAST_SHARED_MARKS * most and similar_length(source.text, target.text)


# --- roff ----------------------------------------------------------------------------------------

_MACRO = re.compile(r"[.'][ \t]*([A-Za-z]+)[ \t]*(.*)")
_MDOC = re.compile(r"^\.(?:Dd|Sh)\b", re.M)
_HEADINGS = {"SH", "SS"}
_TAGGED = {"TP", "TQ"}
_FONTS = {"B", "I", "R", "SM", "SB"}
_TWO_FONTS = {"BR", "RB", "BI", "IB", "IR", "RI"}
_VERBATIM = {"nf": "fi", "EX": "EE", "TS": "TE", "Vb": "Ve", "de": ".", "ig": "."}
_LINKS = {"UR": "UE", "MT": "ME"}
_WHOLE_LINKS = {"URL", "MTO"}  # address, text, what follows
_NOT_READ = {"OP", "SY", "q", "Quoted"}  # print their arguments in ways of their own
_BREAKS = {"PP", "P", "LP", "IP", "HP", "RS", "RE", "sp", "Sp", "br", "TH", "in", "fi", "EE", "TE"}
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|(\S+)')

_CHARACTERS = {
    "-": "-", "aq": "'", "dq": '"', "co": "©", "rg": "®", "tm": "™", "bu": "•", "em": "—",
    "en": "–", "lq": "“", "rq": "”", "oq": "‘", "cq": "’", "Fo": "«", "Fc": "»", "fo": "‹",
    "fc": "›", "Bq": "„", "bq": "‚", "ha": "^", "ti": "~", "rs": "\\", "mu": "×", "->": "→",
    "<-": "←", "ga": "`", "aa": "´", "la": "⟨", "ra": "⟩", "ss": "ß", ":a": "ä", ":o": "ö",
    ":u": "ü", ":A": "Ä", ":O": "Ö", ":U": "Ü", "'e": "é", "`e": "è", "'a": "á", "lB": "[",
    "rB": "]", "lC": "{", "rC": "}", "ba": "|", "or": "|", "sl": "/", "at": "@", "sh": "#",
    "Do": "$", "Eu": "€", "de": "°", "<=": "≤", ">=": "≥", "!=": "≠", "+-": "±", "pl": "+",
    "mi": "−", "eq": "=", "**": "*", "hy": "-", "sc": "§", "mc": "µ", "if": "∞", "12": "½",
    "S1": "¹", "S2": "²", "S3": "³",
}  # fmt: skip
_CHARACTER_NUMBER = re.compile(r"char(\d{2,3})")
_STRINGS = {"Aq": "'", "lq": "“", "rq": "”", "``": "“", "''": "”", "R": "®", "Tm": "™", "C+": "C++",
            "C'": "", "C`": ""}  # fmt: skip
_ESCAPE = re.compile(
    r"""\\(?:
    ["\#].*                                             # comment
    | [fFmMgkn](?:\[[^\]]*\]|\([^\s]{2}|[+-]?.)         # font, colour, register
    | s(?:\[[^\]]*\]|'[^']*'|[-+]?\(?\d{1,2})           # size
    | [hvwlLDXZbo]'[^']*'                               # motion, drawing
    | \*(?:\[(?P<string>[^\]]*)\]|\((?P<string2>..)|(?P<string1>.))
    | \[u(?P<code>[0-9A-Fa-f]{4,5})\]
    | \[(?P<name>[^\]]*)\] | \((?P<name2>..)
    | (?P<character>.) | $)""",
    re.X | re.M,
)
_PLAIN = {"-": "-", "e": "\\", "E": "\\", "\\": "\\", "'": "´", "`": "`", ".": ".",
          " ": " ", "~": " ", "0": " ", "t": " "}  # fmt: skip


def plain_text(line: str) -> str:
    """A line of roff without its escapes; unknown characters and strings are UNREADABLE."""

    def replace(match: "re.Match[str]") -> str:
        groups = match.groupdict()
        if groups["code"]:
            return chr(int(groups["code"], 16))
        string = groups["string"] or groups["string2"] or groups["string1"]
        if string:
            return _STRINGS.get(string, UNREADABLE)
        name = groups["name"] or groups["name2"]
        if name:
            number = _CHARACTER_NUMBER.fullmatch(name)
            return chr(int(number.group(1))) if number else _CHARACTERS.get(name, UNREADABLE)
        return _PLAIN.get(groups["character"] or "", "")

    return _ESCAPE.sub(replace, line)


def arguments(text: str) -> List[str]:
    """The arguments of a macro; those in quotes may hold spaces."""
    return [
        match.group(2) if match.group(2) else match.group(1).replace('""', '"')
        for match in _ARGUMENT.finditer(text)
    ]


def blocks(page: str) -> List[Block]:
    """The blocks of a page in the ``man`` macros; none of a page in ``mdoc``.

    Verbatim text (examples, tables) is left out.
    """
    return [] if _MDOC.search(page) else _PageReader().read(page)


class _PageReader:
    """Gathers the lines of a page into blocks."""

    def __init__(self) -> None:
        self._blocks: List[Block] = []
        self._kind = "P"  # of the block that the next line belongs to
        self._words: List[str] = []
        self._one_line = False  # the next line of text is a block of its own: a tag or a heading
        self._verbatim_until = ""
        self._address = ""  # of a link whose text has not come yet
        self._joined = False  # the next words go on where the last ended

    def read(self, page: str) -> List[Block]:
        for line in page.replace("\\\n", "").split("\n"):
            if self._verbatim_until:
                if line[1:].strip() == self._verbatim_until and line[0] in ".'":
                    self._verbatim_until = ""
            elif line.startswith((".", "'")):
                match = _MACRO.match(line)
                if match:
                    self._macro(match.group(1), match.group(2))
            elif line.strip():
                self._add(line)
            else:
                self._begin("P")
        self._flush()
        return self._blocks

    def _macro(self, name: str, rest: str) -> None:
        if name in _VERBATIM:
            self._flush()
            self._verbatim_until = _VERBATIM[name]
            self._begin("P")
        elif name in _HEADINGS:
            self._begin(name)
            self._one_line = True
            if rest:
                self._add(" ".join(arguments(rest)))
        elif name in _TAGGED:
            self._begin("tag")
            self._one_line = True
        elif name in _BREAKS:
            self._begin(name if name in ("PP", "HP", "IP") else "P")
        elif name in _FONTS:
            self._add(" ".join(arguments(rest)))
        elif name in _TWO_FONTS:
            self._add("".join(arguments(rest)))
        elif name == "MR":
            page, section, *after = [*arguments(rest), "", ""][:3]
            self._add(f"{page}({section}){''.join(after)}")
        elif name in _LINKS:
            self._address = "".join(arguments(rest)[:1])
        elif name in _LINKS.values():
            self._end_link(rest)
        elif name in _WHOLE_LINKS:
            address, title, follows, *_ = [*arguments(rest), "", "", ""]
            self._add(f"{title or address}{follows}")
        elif name in _NOT_READ:
            self._add(UNREADABLE)

    def _end_link(self, after: str) -> None:
        if self._address:
            self._add(self._address)
        if after and self._words:
            self._words[-1] += plain_text("".join(arguments(after)))

    def _add(self, line: str) -> None:
        self._address = ""
        text = plain_text(line)
        if self._joined and self._words:
            self._words[-1] += text.lstrip()
        else:
            self._words.append(text)
        self._joined = line.endswith("\\c")
        if self._one_line:
            after = "body" if self._kind == "tag" else "P"
            self._begin(after)

    def _begin(self, kind: str) -> None:
        self._flush()
        self._kind = kind
        self._one_line = False

    def _flush(self) -> None:
        text = normalise(" ".join(self._words))
        self._words = []
        self._joined = False
        if text:
            self._blocks.append(Block(self._kind, text))
