"""Package descriptions in two languages."""

import pytest

from fairseq_sparsemixer.corpora.debian import descriptions

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
    assert [pair[:2] for pair in found] == [
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
