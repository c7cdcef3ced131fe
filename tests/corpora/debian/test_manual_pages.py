"""Manual pages, read as blocks and aligned."""

import gzip

import pytest
from support.debian import manual

from fairseq_sparsemixer.corpora.cleaning import SentencePair, clean
from fairseq_sparsemixer.corpora.debian import extraction, manual_pages
from fairseq_sparsemixer.errors import UserError


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
