"""The corpus ``debian``: its extractors, its packages and indices, apt, the whole preparation."""

import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import random
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
from support import commands
from support.phrases import ADVERBS, OBJECTS, SUBJECTS, VERBS

from fairseq_sparsemixer import files
from fairseq_sparsemixer.corpora import binarise, split_step, splitting
from fairseq_sparsemixer.corpora.cleaning import SentencePair, clean
from fairseq_sparsemixer.corpora.debian import (
    apt,
    deb_archives,
    descriptions,
    ding,
    extraction,
    help_pages,
    manual_pages,
    preparation,
)
from fairseq_sparsemixer.corpora.folder import read_pairs
from fairseq_sparsemixer.corpora.own_text import prepare_raw_text
from fairseq_sparsemixer.corpora.summary import summary
from fairseq_sparsemixer.errors import UserError

SPLITS = ("train", "valid", "test")
DOMAINS = ("descriptions", "ding", "help", "manpages")
VOCAB_SIZE = 250


def texts(pairs):
    return [pair[:2] for pair in pairs]


# --- package descriptions ------------------------------------------------------------------------

ENGLISH_INDEX = """\
Package: libparrot-dev
Description-md5: 1111
Description-en: parrot library (development files)
 A library that talks. It is written in C and
 answers in any language.
 .
 It can:
  * talk while it is being fed with nuts
    and seeds
  * whistle
 - or do nothing at all.

Package: cage
Description-md5: 2222
Description-en: cage for parrots
 Locks the door.
 .
 A second paragraph.

Package: nobody
Description-md5: 3333
Description-en: not translated
 Nothing.
"""
GERMAN_INDEX = """\
Package: libparrot-dev
Description-md5: 1111
Description-de: Papageienbibliothek (Entwicklungsdateien)
 Eine Bibliothek, die spricht. Sie ist in C geschrieben
 und antwortet in jeder Sprache.
 .
 Sie kann:
  * reden, während sie mit Nüssen und
    Samen gefüttert wird
  * pfeifen
 - oder gar nichts tun.

Package: cage
Description-md5: 2222
Description-de: Käfig für Papageien
 Ein einziger Absatz.

Package: other
Description-md5: 4444
Description-de: nur auf Deutsch
"""


def test_descriptions_are_paired_by_their_checksum_paragraph_by_paragraph():
    found = list(descriptions.pairs(ENGLISH_INDEX.split("\n"), GERMAN_INDEX.split("\n")))
    assert texts(found) == [
        ("parrot library (development files)", "Papageienbibliothek (Entwicklungsdateien)"),
        ("A library that talks.", "Eine Bibliothek, die spricht."),
        (
            "It is written in C and answers in any language.",
            "Sie ist in C geschrieben und antwortet in jeder Sprache.",
        ),
        ("It can:", "Sie kann:"),
        (
            "talk while it is being fed with nuts and seeds",
            "reden, während sie mit Nüssen und Samen gefüttert wird",
        ),
        # Unindented, a dash is no bullet.
        ("whistle - or do nothing at all.", "pfeifen - oder gar nichts tun."),
        # As many paragraphs on one side only: nothing but the titles.
        ("cage for parrots", "Käfig für Papageien"),
    ]
    assert [pair.document for pair in found] == 6 * ["descriptions/parrot"] + ["descriptions/cage"]
    assert {pair.domain for pair in found} == {"descriptions"}


@pytest.mark.parametrize(
    ("package", "stem"),
    [
        ("firefox-esr-l10n-de", "firefox"),
        ("libfoo-dev", "foo"),
        ("python3-foo", "foo"),
        ("gir1.2-foo-1.0", "foo"),
        ("libreoffice-calc", "libreoffice"),
        ("lib", "lib"),
        ("0ad", "0ad"),
    ],
)
def test_stem(package, stem):
    assert descriptions.stem(package) == stem


def test_the_first_of_two_packages_with_one_description_counts():
    stanzas = "Package: {}\nDescription-md5: 1\nDescription-de: {}\n"
    index = stanzas.format("one", "eins") + "\n" + stanzas.format("two", "zwei")
    read = descriptions.read_index(index.split("\n"), "de")
    assert read == {"1": descriptions.Description("one", ["eins"])}


# --- the dictionary ------------------------------------------------------------------------------

DICTIONARY = """\
# Ein Kommentar. :: A comment.
no entry at all
Papagei {m} [zool.] | Der Papagei spricht. | Papageien :: parrot | The parrot talks. | parrots
füttern; ernähren {vt} | Sie füttert/nährt ihn. :: to feed | She feeds him/it.
Gruß {m} | Guten Tag (allerseits); Hallo! :: greeting | Good day; Hello (you)!
eins | Zwei kamen. | Einer ging. :: one | One went.
lachen | Er lacht / sie weint. Er lacht. :: to laugh | He laughs.
(nichts) | (Nichts.) :: nothing | (Nothing.)
Käfig {m} | er ist leer. :: cage | the cage is empty.
Nuss {f} | Nüsse schmecken <schmecken> gut . :: nut | 'Nuts' taste [coll.] good.
"""


def test_ding_takes_sentences_only():
    found = list(ding.pairs(DICTIONARY.split("\n")))
    assert found == [
        SentencePair("The parrot talks.", "Der Papagei spricht.", "ding/papagei", "ding"),
        # The first of alternative words, and the full stop that went with the last.
        SentencePair("She feeds him.", "Sie füttert ihn.", "ding/füttern", "ding"),
        SentencePair("'Nuts' taste good.", "Nüsse schmecken gut.", "ding/nuss", "ding"),
    ]


def test_ding_splits_alternatives_outside_brackets_only():
    assert ding.alternatives("a (b; c); d [e; {f;} g] ; h") == ["a (b; c)", " d [e; {f;} g] ", " h"]
    assert ding.alternatives("a); b") == ["a)", " b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no slash", "no slash"),
        ("Take him/her along.", "Take him along."),
        ("Take him/her/it!", "Take him!"),
        ("What a pity/shame, then he came/went.", "What a pity, then he came."),
        ("What a pity/shame, then.", "What a pity, then."),
        ("Open 24/7 in 2009/10.", "Open 24/7 in 2009/10."),
        # A slash between phrases.
        ("Sand on the ice/in the loading zone!", None),
        ("Der Schmerz/die Freude war groß.", None),
        ("In der Hand/halten.", None),
        ("Oh blast!/Blast it!", None),
        ("one way / another way", None),
        ("this/that / these", None),
        ("km/h/", None),
    ],
)
def test_one_of_each(text, expected):
    assert ding.one_of_each(text) == expected


# --- LibreOffice's help --------------------------------------------------------------------------


def help_page(*blocks):
    body = "\n".join(blocks)
    return (
        '<html><body><p id="before">Outside.</p><div id="DisplayArea">'
        f'{body}</div><div id="SearchFrame"></div><p id="after">Outside.</p></body></html>'
    )


SWITCH = (
    '<p id="s">Press <span id="w" class="switchinline">'
    '<span hidden="true" id="M" class="MAC"><span class="key">Command</span></span>'
    '<span hidden="true" id="d"><span class="key">Ctrl</span></span></span><span>+C</span>.</p>'
)


def test_help_blocks():
    page = help_page(
        '<h1 id="hd_1"><a name="x"></a>A &amp; B</h1>',
        '<p>no id</p><ul><li><p id="par_1">One<br>two  <em>three</em> , four</p></li></ul>',
        '<p id="par_1">the second of this id</p>',
        "<script>var x = 1;</script>",
        SWITCH,
    )
    assert help_pages.blocks(page) == {
        ("hd_1", 1): "A & B",
        ("par_1", 1): "One two three, four",
        ("par_1", 2): "the second of this id",
        ("s", 1): "Press Ctrl+C.",
    }
    assert help_pages.blocks("<html><p id='x'>no content</p></html>") == {}


def test_help_leaves_out_paragraphs_for_the_mac():
    page = help_page(
        '<span class="switch"><span hidden="true" class="MAC"><div><h2 id="a">Mac</h2></div>'
        '<p id="b">Open the dmg file.</p></span><span hidden="true"><p id="c">Run it.</p></span>',
        '</span><p id="d">Done.</p>',
    )
    assert help_pages.blocks(page) == {("c", 1): "Run it.", ("d", 1): "Done."}


@pytest.mark.parametrize(
    ("branches", "chosen"),
    [
        ([("MAC", "Mac"), ("", "default")], "default"),
        ([("", "default"), ("WIN", "Windows")], "default"),
        ([("MAC", "Mac"), ("WIN", "Windows"), ("UNIX", "Unix")], "Windows"),
        ([("WRITER", "text"), ("", "")], ""),
        ([("MAC", "Mac")], ""),
    ],
)
def test_help_takes_the_default_of_what_depends_on_the_system(branches, chosen):
    spans = "".join(
        f'<span hidden="true"{f""" class="{name}" """ if name else ""}>{text}</span>'
        for name, text in branches
    )
    page = help_page(f'<p id="a">[<span class="switchinline">{spans}</span>]</p>')
    assert help_pages.blocks(page) == {("a", 1): f"[{chosen}]"}


def test_help_pairs_elements_of_the_same_id():
    english = {
        "swriter/guide/page": help_page(
            '<p id="a">First one. Second one.</p>', '<p id="b">Not there.</p>', SWITCH
        ),
        "scalc/other": help_page('<p id="a">No German.</p>'),
        "a/b/c/d/page": help_page('<p id="a">Deep.</p>'),
    }
    german = {
        "swriter/guide/page": help_page(
            SWITCH.replace("Press", "Drücken Sie"), '<p id="a">Der erste. Der zweite.</p>'
        ),
        "a/b/c/d/page": help_page('<p id="a">Tief.</p>'),
    }
    assert list(help_pages.pairs(english, german)) == [
        SentencePair("Deep.", "Tief.", "help/a/b/c", "help"),
        SentencePair("First one.", "Der erste.", "help/swriter/guide", "help"),
        SentencePair("Second one.", "Der zweite.", "help/swriter/guide", "help"),
        SentencePair("Press Ctrl+C.", "Drücken Sie Ctrl+C.", "help/swriter/guide", "help"),
    ]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("usr/share/libreoffice/help/en-US/text/swriter/main.html", ("en", "swriter/main")),
        ("usr/share/libreoffice/help/de/text/swriter/01/x.html", ("de", "swriter/01/x")),
        ("usr/share/libreoffice/help/de/text/x.js", ("", "")),
        ("usr/share/libreoffice/help/fr/text/x.html", ("", "")),
    ],
)
def test_help_page_of(path, expected):
    assert help_pages.page_of(path) == expected


# --- manual pages --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (r"plain text", "plain text"),
        (r"\fB\-\-all\fP, \f(CWx\fR \f[I]y\f[]", "--all, x y"),
        (r"a\ b\~c\&d\:e\/f\|g\^h\,i", "a b cdefghi"),
        (r"\(co 2020 \(aqx\(aq \[lq]y\[rq] \[u00E4]\(:o", "© 2020 'x' “y” äö"),
        (r"80\[char176]C, 2\(S1\(S2, \(xx \*[own] \*(qq", "80°C, 2¹², � � �"),
        (r"\e \\ \*(Aqx\*(Aq \*[lq]y\*[rq] \*R \*(C+", "\\ \\ 'x' “y” ® C++"),
        (r"\s-1small\s0 \s+2big\s[0] \m[blue]colour\m[]\h'-04'\v'1'", "small big colour"),
        (r"text \" comment", "text "),
        ("ends with \\", "ends with "),
        (r"\%hy\%phen \n(.g\nx", "hyphen "),
    ],
)
def test_plain_text(line, expected):
    assert manual_pages.plain_text(line) == expected


def test_arguments():
    assert manual_pages.arguments('one "two words" "say ""yes""" "" x"y') == [
        "one", "two words", 'say "yes"', "", 'x"y'
    ]  # fmt: skip


MANUAL = r""".\" a comment
.de XX
.B not text
..
.TH PARROT 1 "" "" ""
.SH NAME
parrot \- a bird that
talks
.SH "SEE ALSO"
.PP
The
.BR cage (1)
page.
.TP
.B \-\-loud
Talks loudly,
very\c
 loudly.
.TP
\fB\-\-quiet\fR
.RS
Whispers.
.RE
.nf
not this
  example
.fi
.IP \(bu 2
An item with "quotes".

Report bugs to
.UR https://parrot.example
the parrot
.UE .
.UR https://cage.example
.UE ;
.MR nest 3 ,
'br
.unknown macro
.URL https://nest.example "" :
.MTO parrot@cage.example "The parrot" ;
.SY parrot
.TS
a	table
.TE
Last words.
"""


def test_manual_blocks():
    assert manual_pages.blocks(MANUAL) == [
        ("SH", "NAME"),
        ("P", "parrot - a bird that talks"),
        ("SH", "SEE ALSO"),
        ("PP", "The cage(1) page."),
        ("tag", "--loud"),
        ("body", "Talks loudly, veryloudly."),
        ("tag", "--quiet"),
        ("P", "Whispers."),
        ("IP", 'An item with "quotes".'),
        ("P", "Report bugs to the parrot. https://cage.example; nest(3),"),
        ("P", "https://nest.example: The parrot; �"),
        ("P", "Last words."),
    ]


def test_manual_pages_keep_dashes_and_lose_sentences_that_cannot_be_read():
    page = "\n".join([".PP", "-c, --config=%s", ".PP", r"\fBsed\fR %s \*(sd. %s"])
    english = {"parrot.1": page % ("FILE", "works so", "It is quick.")}
    german = {"parrot.1": page % ("DATEI", "geht so", "Es ist schnell.")}
    found, dropped = clean(manual_pages.pairs(english, german), extraction.LIMITS)
    assert [pair[:2] for pair in found] == [
        ("-c, --config=FILE", "-c, --config=DATEI"),
        ("It is quick.", "Es ist schnell."),
    ]
    assert dropped == {"unreadable": 1}


def test_manual_pages_in_mdoc_are_left_out():
    assert manual_pages.blocks(".Dd today\n.Sh NAME\ntext\n") == []


def manual(*blocks):
    return "".join(f".{kind}\n{text}\n" for kind, text in blocks)


def test_manual_pages_are_aligned_by_what_is_the_same_in_both():
    english = manual(
        ("PP", "The option \\-a is used often."),
        ("PP", "This paragraph is new in the package."),
        ("PP", "So is this one, and both have no translation."),
        ("PP", "The number 17 is prime."),
        ("PP", "A sentence between two others."),
        ("IP", "An item of a list."),
        ("PP", "See parrot(1) for more."),
        ("PP", "Words with --long options."),
        ("PP", "Ends here."),
    )
    german = manual(
        ("PP", "Die Option \\-a wird oft benutzt."),
        ("PP", "Dieser Absatz steht nicht mehr im Paket."),
        ("PP", "Die Zahl 17 ist eine Primzahl."),
        ("PP", "Ein Satz zwischen zwei anderen."),
        ("IP", "Ein Punkt einer Liste."),
        ("PP", "Siehe parrot(1) für mehr."),
        ("PP", "Wörter ganz anderer Art mit --quite --other und --more."),
        ("PP", "Hört hier auf."),
    )
    aligned = manual_pages.align(manual_pages.blocks(english), manual_pages.blocks(german))
    assert aligned == [
        ("The option -a is used often.", "Die Option -a wird oft benutzt."),
        ("The number 17 is prime.", "Die Zahl 17 ist eine Primzahl."),
        ("A sentence between two others.", "Ein Satz zwischen zwei anderen."),
        ("An item of a list.", "Ein Punkt einer Liste."),
        ("See parrot(1) for more.", "Siehe parrot(1) für mehr."),
        # Not the paragraph whose marks differ.
        ("Ends here.", "Hört hier auf."),
    ]


def test_manual_pages_of_unlike_length_do_not_correspond():
    long = "A very long paragraph which goes on and on and says so much more than the other does."
    blocks = [manual_pages.blocks(manual(("PP", text))) for text in (long, "Kurz.")]
    assert manual_pages.align(*blocks) == []


def test_manual_pairs():
    english = {"parrot.1": manual(("PP", "It talks. It walks.")), "only.1": manual(("PP", "X."))}
    german = {"parrot.1": manual(("PP", "Er spricht. Er geht.")), "nur.1": manual(("PP", "Y."))}
    assert list(manual_pages.pairs(english, german)) == [
        SentencePair("It talks.", "Er spricht.", "manpages/parrot", "manpages"),
        SentencePair("It walks.", "Er geht.", "manpages/parrot", "manpages"),
    ]


@pytest.mark.parametrize(
    ("page", "family"),
    [
        ("systemd-analyze.1", "systemd"),
        ("systemd.timer.5", "systemd"),
        ("user@.service.5", "user"),
        ("sd_bus.3", "sd"),
        ("[.1", "["),
        (".k5login.5", ".k5login.5"),
    ],
)
def test_manual_family(page, family):
    assert manual_pages.family(page) == family


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("usr/share/man/man1/cp.1.gz", ("en", "cp.1")),
        ("usr/share/man/de/man3/printf.3.gz", ("de", "printf.3")),
        ("usr/share/man/fr/man1/cp.1.gz", ("", "")),
        ("usr/share/doc/cp.1.gz", ("", "")),
    ],
)
def test_manual_page_of(path, expected):
    assert manual_pages.page_of(path) == expected


def test_manual_pages_are_utf8_or_latin1():
    for encoding in ("utf-8", "latin-1"):
        assert manual_pages.read_page(gzip.compress("Käfig".encode(encoding)), "x") == "Käfig"
    with pytest.raises(UserError, match=r"man/x\.1\.gz is damaged"):
        manual_pages.read_page(gzip.compress(b"x" * 99)[:-5], "man/x.1.gz")


# --- packages ------------------------------------------------------------------------------------


def ar(members):
    data = b"!<arch>\n"
    for name, content in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
        data += header.encode() + content + b"\n" * (len(content) % 2)
    return data


def tar(content, mode="w"):
    """A tar archive of files (bytes), folders (None) and links (text)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, value in content.items():
            member = tarfile.TarInfo(f"./{name}")
            if value is None:
                member.type = tarfile.DIRTYPE
            elif isinstance(value, str):
                member.type, member.linkname = tarfile.SYMTYPE, value
            else:
                member.size = len(value)
            archive.addfile(member, io.BytesIO(value) if isinstance(value, bytes) else None)
    return buffer.getvalue()


def write_deb(path, content, compression="xz", data=None):
    name = f"data.tar.{compression}" if compression else "data.tar"
    mode = f"w:{compression}" if compression else "w"
    archive = tar(content, mode) if data is None else data
    # An odd number of bytes before it, as a control archive may have.
    path.write_bytes(ar({"debian-binary": b"2.0\n", "control.tar.gz": b"odd", name: archive}))
    return path


CONTENT = {
    "usr": None,
    "usr/a": b"text of a",
    "usr/b": b"text of b",
    "usr/link": "a",
    "usr/c": b"text of c",
}


@pytest.mark.parametrize("compression", ["xz", "gz", "bz2", ""])
def test_files_of_a_package(tmp_path, compression):
    path = write_deb(tmp_path / "x.deb", CONTENT, compression)
    found = deb_archives.read_files(path, lambda name: name not in ("usr/b",))
    assert list(found) == [("usr/a", b"text of a"), ("usr/c", b"text of c")]


def test_names_of_members_may_end_in_a_slash(tmp_path):
    path = tmp_path / "x.deb"
    path.write_bytes(ar({"debian-binary/": b"2.0\n", "data.tar/": tar({"usr/a": b"x"})}))
    assert list(deb_archives.read_files(path, lambda name: True)) == [("usr/a", b"x")]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"?" + data[1:],
        lambda data: data[:200],
        lambda data: data[: data.index(b"data.tar")],
        lambda data: data[:-60] + bytes(60),
        lambda data: data.replace(b"`\n", b"`\n", 1)[:56] + b"size      " + data[66:],
    ],
)
def test_damaged_packages(tmp_path, damage):
    path = write_deb(tmp_path / "x.deb", CONTENT)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"x\.deb is damaged or not a Debian package"):
        list(deb_archives.read_files(path, lambda name: True))


def test_truncated_package(tmp_path):
    # What is cut off is but the zeros that end a tar archive.
    path = write_deb(tmp_path / "x.deb", CONTENT, "")
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(UserError, match=r"damaged.*it ends too early"):
        list(deb_archives.read_files(path, lambda name: True))


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """An empty folder that alone is searched for programs."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def write_program(path, code):
    path.write_text(f"#!{sys.executable} -IS\n{code}")
    path.chmod(0o755)


def test_zstandard_takes_dpkg(tmp_path, programs):
    path = write_deb(tmp_path / "x.deb", {}, "zst", data=tar(CONTENT))
    with pytest.raises(UserError, match=r"data.tar.zst, which takes dpkg-deb to read: build"):
        list(deb_archives.read_files(path, lambda name: True))
    # In place of dpkg-deb what gives back the data as it is, with much more than a pipe holds.
    code = "import sys; assert sys.argv[1] == '--fsys-tarfile'; sys.stdout.buffer.write("
    code += "open(sys.argv[2], 'rb').read().split(b'`\\n', 3)[3] + bytes(10**6))"
    write_program(programs / "dpkg-deb", code)
    found = deb_archives.read_files(path, lambda name: name == "usr/b")
    assert list(found) == [("usr/b", b"text of b")]
    write_program(programs / "dpkg-deb", f"{code}; sys.exit('the disk is on fire')")
    with pytest.raises(UserError, match="the disk is on fire"):
        list(deb_archives.read_files(path, lambda name: True))


# --- downloads -----------------------------------------------------------------------------------


def sha256(data):
    return hashlib.sha256(data).hexdigest()


class Phrases:
    """Sentences in two languages, each another one, and now and then nearly the same."""

    def __init__(self, seed):
        self._random = random.Random(seed)

    def sentence(self):
        parts = [self._random.choice(part) for part in (SUBJECTS, VERBS, OBJECTS, ADVERBS)]
        return tuple(" ".join(part[side] for part in parts) + "." for side in (0, 1))

    def sentences(self, count):
        return [" ".join(side) for side in zip(*(self.sentence() for _ in range(count)))]


def index_texts():
    """The indices of 60 packages in both languages; the words of a package's name are in both."""
    phrases = Phrases(1)
    indices = {"en": "", "de": ""}
    for number in range(60):
        for text, (language, paragraph) in zip(
            (f"title number {number} of all", f"Titel Nummer {number} von allen"),
            zip(indices, phrases.sentences(3)),
        ):
            indices[language] += (
                f"Package: word{number}-dev\nDescription-md5: {number:032}\n"
                f"Description-{language}: {text}\n {paragraph}\n\n"
            )
    return indices


def package_contents():
    """What the fixture's packages hold, by name."""
    phrases = Phrases(2)
    entries = []
    for number in range(80):
        english, german = zip(*(phrases.sentence() for _ in range(2)))
        entries.append(
            f"wort{number} | {' | '.join(german)} :: word{number} | {' | '.join(english)}"
        )
    help_texts = {"en-US": {}, "de": {}}
    for number in range(40):
        sides = [phrases.sentence() for _ in range(4)]
        for side, (language, pages) in enumerate(help_texts.items()):
            blocks = [f'<p id="p{i}">{pair[side]}</p>' for i, pair in enumerate(sides)]
            pages[f"usr/share/libreoffice/help/{language}/text/part{number}/page.html"] = help_page(
                *blocks
            ).encode()
    manuals = {"": {}, "de/": {}}
    for number in range(40):
        sides = [phrases.sentence() for _ in range(4)]
        for side, (folder, pages) in enumerate(manuals.items()):
            page = manual(*(("PP", pair[side]) for pair in sides))
            pages[f"usr/share/man/{folder}man1/tool{number}.1.gz"] = gzip.compress(page.encode())
    # A page that another package has as well: the first one's counts.
    other = {"usr/share/man/man1/tool0.1.gz": gzip.compress(manual(("PP", "Not this.")).encode())}
    return {
        "trans-de-en": {ding.PATH: "\n".join(entries).encode()},
        "libreoffice-help-en-us": help_texts["en-US"],
        "libreoffice-help-de": help_texts["de"],
        "manpages-de": manuals["de/"],
        "manpages": manuals[""],
        "coreutils": other,
    }


def write_downloads(folder, without=(), indices=None):
    """A folder of downloads as ``prepare debian`` leaves it; most optional packages are absent."""
    folder.mkdir()
    entries = {"indices": [], "packages": [], "not_found": []}
    for language, text in (indices or index_texts()).items():
        name = f"stable_main_Translation-{language}.gz"
        (folder / name).write_bytes(gzip.compress(text.encode(), mtime=0))
        index = apt.Index(
            name, language, "stable", "main", "stable", "woody", "today", len(text.encode()),
            sha256(text.encode()),
        )  # fmt: skip
        entries["indices"].append(dataclasses.asdict(index))
    for name, content in package_contents().items():
        path = write_deb(folder / f"{name}_1.0_all.deb", {} if name in without else content)
        data = path.read_bytes()
        package = apt.Package(path.name, name, "1.0", "all", len(data), sha256(data))
        entries["packages"].append(dataclasses.asdict(package))
    names = {entry["name"] for entry in entries["packages"]}
    entries["not_found"] = [name for name in extraction.OPTIONAL if name not in names]
    files.write_json(folder / "downloads.json", entries)
    return folder


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Downloads, not to be written to."""
    return write_downloads(tmp_path_factory.mktemp("shelf") / "downloads")


@pytest.fixture
def downloads(shelf, tmp_path):
    """Downloads to be tampered with."""
    return Path(shutil.copytree(shelf, tmp_path / "downloads"))


def obtain(folder):
    return apt.obtain(folder, extraction.REQUIRED, extraction.OPTIONAL)


def test_complete_downloads_need_no_apt(shelf, programs):
    found = obtain(shelf)
    assert found == apt.read_record(shelf)
    assert [package.name for package in found.packages][:2] == list(extraction.REQUIRED[:2])
    assert list(apt.index_lines(shelf, found.indices[1]))[1] == f"Description-md5: {0:032}"


def damaged(path, data):
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "manpages_1.0_all.deb").unlink(),
        lambda f: damaged(f / "manpages_1.0_all.deb", b"!<arch>\n"),
        lambda f: damaged(f / "stable_main_Translation-de.gz", b"no gzip"),
        lambda f: damaged(f / "stable_main_Translation-de.gz", gzip.compress(b"other text")),
        lambda f: (f / "downloads.json").unlink(),
        lambda f: f.rename(f.with_name("elsewhere")),
        lambda f: damaged(
            f / "downloads.json", (f / "downloads.json").read_bytes().replace(b'"acct",', b"")
        ),
    ],
)
def test_without_apt_one_sentence_says_what_to_do(downloads, programs, damage):
    damage(downloads)
    with pytest.raises(UserError) as caught:
        obtain(downloads)
    message = str(caught.value)
    assert message.startswith("this machine has no apt")
    assert "--downloads DIR" in message and "--raw-dir DIR" in message
    assert "\n" not in message and ". " not in message


@pytest.mark.parametrize(
    "content",
    [
        "no JSON",
        "{}",
        '{"indices": [{}], "packages": [], "not_found": []}',
        '{"indices": [], "not_found": [], "packages": [{"file": "../x", "name": "x", '
        '"version": "1", "architecture": "all", "bytes": 1, "sha256": ""}]}',
    ],
)
def test_damaged_record_of_downloads(downloads, content):
    (downloads / "downloads.json").write_text(content)
    with pytest.raises(UserError, match=r"downloads.json is not a record .* --downloads"):
        obtain(downloads)


# apt-get and apt-cache of an archive in the folder ARCHIVE: lists.json (what indextargets says),
# packages.txt (what `show` says), and the packages. Every call is noted in `calls`.
FAKE_APT = """
import json, os, shutil, sys
archive = ARCHIVE
arguments = sys.argv[1:]
options, words = {}, []
while arguments:
    word = arguments.pop(0)
    if word == "-o":
        name, _, value = arguments.pop(0).partition("=")
        options[name] = value
    elif word == "-c":
        options["settings"] = open(arguments.pop(0)).read()
    else:
        words.append(word)
words = [word for word in words if word != "-qq"]
with open(archive + "/calls", "a") as calls:
    calls.write(json.dumps([words, options, os.getcwd()]) + "\\n")
lists = options["Dir::State::lists"]
if words[0] == "update":
    if os.path.exists(archive + "/full"):
        print("E: Write error - write (28: No space left on device)", file=sys.stderr)
        sys.exit(100)
    if os.path.exists(archive + "/offline"):
        print("W: Failed to fetch the lists", file=sys.stderr)
        sys.exit(0)
    for name in os.listdir(archive + "/lists"):
        shutil.copy(archive + "/lists/" + name, lists)
elif words[0] == "indextargets":
    for entry in json.load(open(archive + "/targets.json")):
        entry["FILENAME"] = lists + "/" + entry["FILENAME"]
        form = words[2]
        for name, value in entry.items():
            form = form.replace("$(" + name + ")", value)
        print(form)
elif words[0] == "show":
    stanzas = open(archive + "/packages.txt").read().split("\\n\\n")
    print("\\n\\n".join(s for s in stanzas if s.split("\\n")[0].split(": ")[1] in words))
elif words[0] == "download":
    name, version = words[1].split("=")
    source = archive + "/" + name + ".deb"
    if not os.path.exists(source):
        sys.exit("E: Failed to fetch " + name)
    shutil.copy(source, name + "_" + version.replace(":", "%3a") + "_any.deb")
"""


@pytest.fixture
def archive(tmp_path, shelf, programs):
    """A machine with apt, and an archive that has what the downloads hold."""
    folder = tmp_path / "archive"
    (folder / "lists").mkdir(parents=True)
    targets = []
    for language in ("de", "en", "fr"):
        name = f"mirror.example_dists_stable_main_i18n_Translation-{language}"
        if language != "fr":
            text = gzip.decompress((shelf / f"stable_main_Translation-{language}.gz").read_bytes())
            (folder / "lists" / name).write_bytes(text)
        targets.append(target("stable", language, name))
    # A part of the archive that has no German.
    name = "mirror.example_dists_updates_main_i18n_Translation-en"
    (folder / "lists" / name).write_text("Package: x\n")
    targets.append(target("updates", "en", name))
    release = "Origin: Somebody\nDate: Sat, 11 Jul 2026 10:16:37 UTC\nDate: no\n"
    (folder / "lists" / "mirror.example_dists_stable_InRelease").write_text(release)
    (folder / "targets.json").write_text(json.dumps(targets))
    stanzas = []
    for path in sorted(shelf.glob("*.deb")):
        name = path.name.split("_")[0]
        data = path.read_bytes()
        (folder / f"{name}.deb").write_bytes(data)
        stanzas.append(
            f"Package: {name}\nVersion: 4:1.0\nArchitecture: all\nSize: {len(data)}\n"
            f"SHA256: {sha256(data)}\nDescription: d\n more\n"
        )
    # What the machine has, but no source.
    stanzas.append("Package: sed\nVersion: 9\nArchitecture: all\nStatus: install ok installed\n")
    (folder / "packages.txt").write_text("\n".join(stanzas))
    for program in ("apt-get", "apt-cache"):
        write_program(programs / program, FAKE_APT.replace("ARCHIVE", repr(str(folder))))
    return folder


def target(release, language, file):
    return {
        "RELEASE": release,
        "COMPONENT": "main",
        "LANGUAGE": language,
        "SUITE": f"old{release}",
        "CODENAME": "woody",
        "METAKEY": f"main/i18n/Translation-{language}",
        "FILENAME": file,
    }


def calls_of(archive):
    return [json.loads(line) for line in (archive / "calls").read_text().split("\n") if line]


def downloaded(archive):
    return [words[1].split("=")[0] for words, _, _ in calls_of(archive) if words[0] == "download"]


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_apt_fetches_what_is_missing_and_says_what_it_is(archive, shelf, tmp_path):
    folder = tmp_path / "a folder" / "download"
    found = obtain(folder)
    names = ["trans-de-en", "libreoffice-help-en-us", "libreoffice-help-de", "manpages-de",
             "manpages", "coreutils"]  # fmt: skip
    assert [package.name for package in found.packages] == downloaded(archive) == names
    index = "stable_main_Translation-{}.gz"
    debs = [f"{name}_4%3a1.0_all.deb" for name in names]
    assert listing(folder) == sorted(
        ["downloads.json", index.format("de"), index.format("en")] + debs
    )
    for name, file in zip(names, debs):
        assert (folder / file).read_bytes() == (archive / f"{name}.deb").read_bytes()
    assert [entry.language for entry in found.indices] == ["en", "de"]
    for entry in found.indices:
        text = gzip.decompress((folder / entry.file).read_bytes())
        assert text.decode() == index_texts()[entry.language]
        assert (entry.bytes, entry.sha256) == (len(text), sha256(text))
        assert (entry.suite, entry.codename) == ("oldstable", "woody")
        assert entry.date == "Sat, 11 Jul 2026 10:16:37 UTC"
    assert "sed" in found.not_found and "coreutils" not in found.not_found
    # No archive's address anywhere.
    assert "mirror.example" not in (folder / "downloads.json").read_text()
    assert obtain(folder) == found == apt.read_record(folder)
    assert downloaded(archive) == names


def test_apt_works_in_folders_of_its_own_with_the_machines_sources(archive, tmp_path):
    folder = tmp_path / "download"
    obtain(folder)
    for words, options, place in calls_of(archive):
        settings = options.pop("settings")
        assert options.pop("APT::Sandbox::User") == "root"
        assert {"Dir::State::lists", "Dir::State::status", "Dir::Cache::archives"} <= set(options)
        assert all(name.startswith(("Dir::State", "Dir::Cache")) for name in options)
        assert all(value.startswith(f"{folder}/.apt.partial") for value in options.values())
        assert 'Acquire::Languages { "en"; "de"; };' in settings
        for name in ("Acquire::Languages", "APT::Update::Post-Invoke-Success"):
            assert f"#clear {name};" in settings
        assert words[0] != "download" or place.startswith(f"{folder}/.apt.partial/")


def test_apt_goes_on_where_it_was_stopped(archive, tmp_path):
    folder = tmp_path / "download"
    (archive / "libreoffice-help-de.deb").rename(archive / "away")
    with pytest.raises(UserError) as caught:
        obtain(folder)
    message = str(caught.value)
    assert message.startswith("apt could not download libreoffice-help-de 4:1.0 (E: Failed to")
    assert "--downloads DIR" in message and "\n" not in message
    first = ["trans-de-en", "libreoffice-help-en-us"]
    kept = listing(folder)
    assert [name for name in kept if name.endswith(".deb")] == sorted(
        f"{name}_4%3a1.0_all.deb" for name in first
    )
    assert not any("partial" in name or name == "downloads.json" for name in kept)
    (archive / "away").rename(archive / "libreoffice-help-de.deb")
    # What a kill without a chance to tidy up leaves behind.
    (folder / ".apt.partial" / "lists").mkdir(parents=True)
    (folder / f"{first[0]}_4%3a1.0_all.deb").write_bytes(b"cut off")
    found = obtain(folder)
    again = ["trans-de-en", "libreoffice-help-de", "manpages-de", "manpages", "coreutils"]
    assert downloaded(archive) == [*first, "libreoffice-help-de", *again]
    assert apt.read_record(folder) == found
    assert not (folder / ".apt.partial").exists()


def test_a_package_that_comes_damaged_is_not_kept(archive, tmp_path):
    (archive / "trans-de-en.deb").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"trans-de-en 4:1\.0 came damaged"):
        obtain(tmp_path / "download")
    assert not any(name.endswith(".deb") for name in listing(tmp_path / "download"))


def test_required_packages_and_indices(archive, tmp_path):
    stanzas = (archive / "packages.txt").read_text()
    (archive / "packages.txt").write_text(stanzas.replace("Package: manpages-de", "Package: other"))
    with pytest.raises(UserError, match="have no package manpages-de: run the command on"):
        obtain(tmp_path / "download")
    (archive / "offline").touch()
    with pytest.raises(UserError, match=r"no package descriptions .*\(W: Failed to fetch the list"):
        obtain(tmp_path / "download")
    assert "downloads.json" not in listing(tmp_path / "download")


def test_a_full_disk_is_not_taken_for_a_missing_network(archive, tmp_path):
    (archive / "full").touch()
    with pytest.raises(UserError, match=r"no space left on the disk of .*, or .* --downloads"):
        preparation.prepare_debian(tmp_path / "out", vocab_size=VOCAB_SIZE)


def test_folders_below_a_file(archive, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--downloads .*Not a directory"):
        preparation.prepare_debian(tmp_path / "out", downloads=tmp_path / "file" / "x")
    with pytest.raises(UserError, match=r"--output .* is not a folder"):
        preparation.prepare_debian(tmp_path / "file" / "x", downloads=tmp_path)


# --- the whole corpus ----------------------------------------------------------------------------

FAKE_SPLIT = dataclasses.replace(
    extraction.SPLIT, salt="3", domain_shares=dict.fromkeys(DOMAINS, 0.25), max_held_out=12
)


@pytest.fixture(autouse=True)
def small_split(monkeypatch):
    monkeypatch.setattr(extraction, "SPLIT", FAKE_SPLIT)


def build_binary(folder, *_, **__):
    """In place of fairseq-preprocess, which takes seconds to start."""
    files.write_lines(folder / "bin" / "stub", ["binary"])
    return [folder / "bin" / "stub"], {}


@pytest.fixture(autouse=True)
def no_binary(monkeypatch):
    monkeypatch.setattr(binarise, "build_binary", build_binary)


def command(*arguments):
    commands.command("prepare", *arguments)


@pytest.fixture(scope="module")
def built(shelf, tmp_path_factory):
    """A finished corpus, made without apt."""
    output = tmp_path_factory.mktemp("built") / "corpus"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, "SPLIT", FAKE_SPLIT)
        patch.setattr(binarise, "build_binary", build_binary)
        patch.setattr(apt.shutil, "which", lambda name: None)
        command("debian", "--output", output, "--downloads", shelf, "--vocab-size", VOCAB_SIZE)
    return output


@pytest.fixture
def corpus(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "corpus"))


def read_record(folder):
    return json.loads((folder / "record.json").read_text())


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def lines_of(folder, split, suffix):
    return files.read_lines(folder / "raw" / f"{split}.{suffix}")


def held_out_pairs(folder):
    rows = (line.split("\t") for line in files.read_lines(folder / "raw" / "all.tsv"))
    return {(row[0], row[1]): row[2:] for row in rows}


def test_every_line_has_its_domain(built):
    source_of = held_out_pairs(built)
    documents = {}
    for split in SPLITS:
        rows = list(zip(*(lines_of(built, split, suffix) for suffix in ("en", "de", "domain"))))
        assert (
            len(rows) == len(lines_of(built, split, "en")) == len(lines_of(built, split, "domain"))
        )
        for english, german, domain in rows:
            document, true_domain = source_of[english, german]
            assert domain == true_domain == document.split("/")[0]
            documents.setdefault(split, set()).add(document)
        counts = read_record(built)["domains"][split]
        assert counts == {name: [row[2] for row in rows].count(name) for name in DOMAINS}
        assert split == "train" or all(0 < count <= 12 for count in counts.values())
    for one, other in itertools.combinations(SPLITS, 2):
        assert not documents[one] & documents[other]


def test_extraction_reads_all_sources(built):
    extraction = read_record(built)["extraction"]
    assert extraction["segments"] == {
        "descriptions": 60 * 4, "ding": 80 * 2, "help": 40 * 4, "manpages": 40 * 4
    }  # fmt: skip
    everything = sum(extraction["pairs"].values()) + sum(extraction["segments_dropped"].values())
    assert everything == sum(extraction["segments"].values())
    assert sum(extraction["pairs"].values()) == len(files.read_lines(built / "raw" / "all.tsv"))
    text = (built / "raw" / "all.tsv").read_text()
    assert "Not this." not in text and "\ttitle" not in text
    assert "title number 7 of all\tTitel Nummer 7 von allen\tdescriptions/word7\tdesc" in text


def test_record_names_downloads_but_no_address(built, shelf):
    record = read_record(built)
    assert record["corpus"] == "debian"
    assert record["source"] == json.loads((shelf / "downloads.json").read_text())
    assert "://" not in json.dumps(record) and str(shelf) not in json.dumps(record)
    assert record["settings"]["split"]["domain_shares"] == FAKE_SPLIT.domain_shares
    assert record["vocabulary"] == VOCAB_SIZE


def test_record_says_how_many_documents_are_held_out(built):
    documents = {
        pair.source: (pair.domain, pair.document) for pair in read_pairs(built / "raw" / "all.tsv")
    }
    for split in ("valid", "test"):
        held_out = [documents[line] for line in lines_of(built, split, "en")]
        described = read_record(built)["held_out_documents"][split]
        assert list(described) == sorted(DOMAINS)
        for domain, entry in described.items():
            names = [document for other, document in held_out if other == domain]
            sizes = {name: names.count(name) for name in names}
            assert entry["documents"] == len(sizes)
            assert entry["pairs"] == max(sizes.values()) == sizes[entry["largest"]]


def test_leaks_in_the_record(built):
    import sacrebleu

    leaks = read_record(built)["leaks"]
    assert list(leaks) == ["random", "documents", "documents_and_filter"]
    sides = {
        split: [lines_of(built, split, language) for language in ("en", "de")] for split in SPLITS
    }
    held_out = [valid + test for valid, test in zip(sides["valid"], sides["test"])]
    assert {leak["sentences"] for leak in leaks.values()} == {len(held_out[0])}
    indices, cosines = splitting.nearest_neighbours(sides["train"][0], held_out[0])
    copied = [sides["train"][1][index] for index in indices]
    assert leaks["documents_and_filter"] == {
        "sentences": len(copied),
        "bleu": pytest.approx(sacrebleu.corpus_bleu(copied, [held_out[1]]).score, abs=0.006),
        "near": 0.0,
    }
    assert cosines.max() < 0.70
    # Sentences from a few phrases have near duplicates in every document.
    assert leaks["documents"]["near"] > 0.1 and leaks["random"]["near"] > 0.1
    assert leaks["documents"]["bleu"] > leaks["documents_and_filter"]["bleu"]
    by_domain = read_record(built)["copy_bleu_by_domain"]
    domains = lines_of(built, "test", "domain")
    for name in DOMAINS:
        hypotheses, references = zip(
            *(
                pair
                for pair, domain in zip(
                    zip(files.read_lines(built / "copy" / "test.de"), sides["test"][1]), domains
                )
                if domain == name
            )
        )
        score = sacrebleu.corpus_bleu(list(hypotheses), [list(references)]).score
        assert by_domain[name] == pytest.approx(score, abs=0.006)


def test_summary_tells_the_leaks(built):
    text = summary(read_record(built))
    near = 100 * read_record(built)["leaks"]["random"]["near"]
    assert "split (random): copy BLEU " in text
    assert f"{near:.1f} % of the held-out text has a near duplicate in training" in text


def test_finished_corpus_needs_nothing(corpus, programs, shelf, capsys):
    before = contents(corpus)
    for downloads in (shelf, corpus / "nowhere"):
        preparation.prepare_debian(corpus, vocab_size=VOCAB_SIZE, downloads=downloads)
        assert capsys.readouterr().err.count("already done") == 4
    assert contents(corpus) == before


def test_downloads_lie_in_the_output_by_default(built, downloads, tmp_path, programs):
    output = tmp_path / "out"
    output.mkdir()
    downloads.rename(output / "download")
    preparation.prepare_debian(output, vocab_size=VOCAB_SIZE)
    for folder in ("raw", "spm", "copy"):
        assert contents(output / folder) == contents(built / folder)


def test_other_downloads_are_for_another_folder(corpus, tmp_path):
    other = write_downloads(tmp_path / "other", indices={"en": "", "de": ""})
    with pytest.raises(UserError, match=r"from other downloads than those in .*other: name"):
        preparation.prepare_debian(corpus, vocab_size=VOCAB_SIZE, downloads=other)


@pytest.mark.parametrize("written", [0, 4, 7])
def test_resume_after_an_interruption(built, shelf, tmp_path, monkeypatch, written):
    output = tmp_path / "out"
    calls = []

    def interrupted(path, lines):
        if len(calls) == written:
            raise KeyboardInterrupt
        calls.append(path)
        files.write_lines(path, lines)

    with monkeypatch.context() as patch:
        patch.setattr(split_step, "write_lines", interrupted)
        with pytest.raises(KeyboardInterrupt):
            preparation.prepare_debian(output, vocab_size=VOCAB_SIZE, downloads=shelf)
    assert len(calls) == written
    assert not (output / "record.json").exists()
    preparation.prepare_debian(output, vocab_size=VOCAB_SIZE, downloads=shelf)
    assert not [path for path in output.rglob("*") if "partial" in path.name]
    for folder in ("raw", "spm", "copy"):
        assert contents(output / folder) == contents(built / folder)


@pytest.mark.parametrize("package", ["trans-de-en", "manpages-de", "libreoffice-help-de"])
def test_a_source_without_text(tmp_path, package):
    folder = write_downloads(tmp_path / "downloads", without=[package])
    with pytest.raises(UserError, match=r"no text for (ding|manpages|help): build the corpus"):
        preparation.prepare_debian(tmp_path / "out", downloads=folder)
    assert not (tmp_path / "out" / "raw").exists()


def test_text_that_is_not_utf8(tmp_path, monkeypatch):
    content = {**package_contents(), "trans-de-en": {ding.PATH: b"K\xe4fig :: cage\n"}}
    monkeypatch.setattr(sys.modules[__name__], "package_contents", lambda: content)
    folder = write_downloads(tmp_path / "downloads")
    with pytest.raises(UserError, match=r"share/trans/de-en is not UTF-8: build"):
        extraction.extract(folder, apt.read_record(folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["debian", "--wheel", "x"], "--wheel: such flags go with the corpus homeassistant only"),
        (["debian", "--raw-dir", "x"], "leave out the corpus"),
        (["debian", "--downloads", __file__], "--downloads .* is not a folder"),
        (["debian", "--mirror", "x"], "go with the corpus wmt14 only"),
        (["homeassistant", "--downloads", "x"], "corpora debian and wmt14 only"),
        (["--raw-dir", "x", "--downloads", "x"], "corpora debian and wmt14 only"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        command(*arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- domains of the user's own text --------------------------------------------------------------


@pytest.fixture
def own_text(built, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(built / "raw", folder)
    (folder / "all.tsv").unlink()
    return folder


def blank_first_line(path):
    files.write_lines(path, [" ", *files.read_lines(path)[1:]])


def build_own(own_text, tmp_path):
    prepare_raw_text(tmp_path / "out", own_text, vocab_size=VOCAB_SIZE)
    return tmp_path / "out"


def test_domains_of_own_text_are_copied(built, own_text, tmp_path, capsys):
    output = build_own(own_text, tmp_path)
    assert contents(output / "raw") == contents(own_text)
    assert read_record(output)["domains"] == read_record(built)["domains"]
    build_own(own_text, tmp_path)
    assert capsys.readouterr().err.count("already done") == 4
    # Without them, those of before go.
    for split in SPLITS:
        (own_text / f"{split}.domain").unlink()
    build_own(own_text, tmp_path)
    assert contents(output / "raw") == contents(own_text)
    assert "domains" not in read_record(output)


def test_no_domains_of_another_corpus_stay_in_the_folder(built, own_text, tmp_path):
    shutil.copytree(built, tmp_path / "out")
    for path in own_text.iterdir():
        if path.suffix == ".domain":
            path.unlink()
        else:
            files.write_lines(path, files.read_lines(path)[:-2])
    output = build_own(own_text, tmp_path)
    assert not list((output / "raw").glob("*.domain"))
    assert "domains" not in read_record(output)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: blank_first_line(f / "test.domain"), "test.domain, line 1: .* names no domain"),
        (lambda f: (f / "valid.domain").unlink(), "no file valid.domain; give the domains of all"),
        (lambda f: (f / "test.domain").write_text("a\n"), r"test.domain has 1 lines and .*test.en"),
    ],
)
def test_domains_must_fit_the_text(own_text, tmp_path, damage, message):
    damage(own_text)
    with pytest.raises(UserError, match=message):
        build_own(own_text, tmp_path)


# --- splitting by domain -------------------------------------------------------------------------


def make_pairs(domain, documents, sentences=10):
    phrases = Phrases(domain)
    return [
        SentencePair(
            f"{text[0][:-1]} {number} {i}.",
            f"{text[1][:-1]} {number} {i}.",
            f"{domain}/{number}",
            domain,
        )
        for number in range(documents)
        for i, text in enumerate(phrases.sentence() for _ in range(sentences))
    ]


def count(pairs, domain):
    return sum(pair.domain == domain for pair in pairs)


def test_each_domain_has_its_share_and_its_maximum():
    pairs = make_pairs("one", 200) + make_pairs("three", 200)
    settings = splitting.SplitSettings(
        held_out_share=0.5, salt="x", min_held_out_tokens=1, max_cosine=0.7,
        domain_shares={"one": 0.05}, max_held_out=100,
    )  # fmt: skip
    split = splitting.hold_out(pairs, settings)
    held = {
        domain: len({p.document for p in pairs if p.domain == domain})
        - len({p.document for p in split.train if p.domain == domain})
        for domain in ("one", "three")
    }
    assert 3 <= held["one"] <= 20 and 80 <= held["three"] <= 120
    for part in (split.valid, split.test):
        assert count(part, "three") == 100
    smaller = [count(part, "one") for part in (split.valid, split.test)]
    assert sum(smaller) == 10 * held["one"] and abs(smaller[0] - smaller[1]) <= 10
    assert split.counts["held_out_dropped"]["over_the_maximum"] == 10 * held["three"] - 200
    # Which are kept does not depend on the order of the pairs.
    again = splitting.hold_out(pairs[::-1], settings)
    assert set(again.valid) == set(split.valid) and set(again.test) == set(split.test)


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("Six short words are enough here.", "Sechs Wörter sind hier genug.", None),
        ('He said "this is it."', "Er sagte: „Das ist es.“", None),
        ("Too short.", "Zu kurz.", "too_short"),
        (f"{'many ' * 30}words.", "Viele Wörter.", "too_long"),
        ("The title of a page without an end", "Der Titel einer Seite.", "no_sentence"),
        ("The title of a page with an end.", "Der Titel einer Seite", "no_sentence"),
        ("See the page parrot(1) for more of it.", "Siehe dort.", "code_or_reference"),
        ("Set the name of it to {name} now.", "Setze es.", "code_or_reference"),
    ],
)
def test_what_may_be_held_out(source, target, reason):
    settings = splitting.SplitSettings(
        0.1, "x", 6, 0.7, max_held_out_tokens=20, whole_sentences=True
    )
    assert splitting.unsuitable(SentencePair(source, target, "d"), settings) == reason


def test_random_split_holds_out_as_many_of_each_domain_of_any_document():
    pairs = make_pairs("one", 50) + make_pairs("three", 50)
    settings = splitting.SplitSettings(0.2, "x", 1, 0.7, max_held_out=30)
    like = splitting.hold_out(pairs, settings)
    split = splitting.random_split(pairs, like, settings)
    for domain in ("one", "three"):
        assert count(split.test, domain) == count([*like.valid, *like.test], domain)
    assert not set(split.test) & set(split.train)
    assert len(split.test) + len(split.train) == len(pairs)
    documents = {pair.document for pair in split.test}
    assert len(documents & {pair.document for pair in split.train}) > len(documents) / 2


def test_settings_are_described_without_what_is_left_out():
    plain = splitting.SplitSettings(0.0, "41", 5, 0.70)
    assert plain.describe() == {
        "held_out_share": 0.0, "salt": "41", "min_held_out_tokens": 5, "max_cosine": 0.70
    }  # fmt: skip
    described = FAKE_SPLIT.describe()
    assert splitting.SplitSettings(**described) == FAKE_SPLIT


@pytest.mark.slow
def test_real_corpus(tmp_path, monkeypatch):
    """The measured counts of the real packages of Debian 12, within 2 %."""
    monkeypatch.undo()
    try:
        downloads = obtain(tmp_path / "download")
    except UserError as error:
        pytest.skip(f"the packages cannot be had: {error}")
    if downloads.indices[0].codename != "bookworm":
        pytest.skip("measured on another release")
    record = preparation.prepare_debian(tmp_path)
    assert record["extraction"]["pairs"] == {
        "descriptions": pytest.approx(43_310, rel=0.02),
        "ding": pytest.approx(19_132, rel=0.02),
        "help": pytest.approx(37_628, rel=0.02),
        "manpages": pytest.approx(41_792, rel=0.02),
    }
    for split in ("valid", "test"):
        assert 1_400 <= record["splits"][split]["en"]["sentences"] <= 1_600
    assert record["leaks"]["documents_and_filter"]["near"] == 0.0
