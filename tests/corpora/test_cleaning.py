"""Cleaning: normalised, split into sentences, kept or dropped for a counted reason."""

import dataclasses
import functools
import sys
import unicodedata

import pytest

from fairseq_sparsemixer.corpora import cleaning
from fairseq_sparsemixer.corpora.cleaning import Limits, SentencePair


def test_normalise_composes_accents_and_plains_white_space():
    assert cleaning.normalise(" U\u0308ber\u00a010\u202f%\u2028 soft\u00adware\ufeff\x07 ") == (
        "Über 10 % software"
    )


def test_character_map_covers_all_white_space_and_control_characters():
    expected = {
        code
        for code in range(sys.maxunicode + 1)
        if chr(code).isspace() or unicodedata.category(chr(code)) == "Cc"
    } | {0x00AD, 0x200B, 0xFEFF}
    mapping = cleaning.character_map()
    assert set(mapping) == expected
    assert {mapping[code] for code in expected if chr(code).isspace()} == {" "}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't re-use it!", ["Don't", "re-use", "it", "!"]),
        ("Wie geht’s {name}?", ["Wie", "geht’s", "{", "name", "}", "?"]),
        ("", []),
    ],
)
def test_tokens(text, expected):
    assert cleaning.tokens(text) == expected


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("Turn on the light", "Schalte das Licht ein", None),
        ("", "Schalte das Licht ein", "empty"),
        ("Turn on the light", "", "empty"),
        ("Home Assistant Cloud", "home assistant cloud", "identical"),
        ("Turn on", "Schalte das ein", "too_short"),
        ("Turn it on", "Schalte es", "too_short"),
        ("a b " * 41, "ein Wort " * 40, "too_long"),
        ("a b " * 40, "ein Wort " * 40, None),
        ("one two three", "eins zwei drei vier fünf sechs sieben acht", "length_ratio"),
        ("one two", "eins zwei drei vier fünf", "too_short"),
        ("IP 127.0.0.1:8123", "Adresse 127.0.0.1:8123", "few_letters"),
        ("Temperature !?", "Eine Temperatur !?", "few_words"),
        ("Files for the parrot", "Dateien fÃ¼r den Papagei", "unreadable"),
        ("Files for \ufffd", "Dateien für \ufffd", "unreadable"),
        ("Ã and Ä are letters", "Ã und Ä sind Buchstaben", None),
    ],
)
def test_drop_reason(source, target, reason):
    assert cleaning.drop_reason(source.strip(), target.strip(), Limits()) == reason


def test_limits_are_inclusive():
    limits = Limits(min_tokens=2, max_tokens=5, max_length_ratio=2.5)
    assert cleaning.drop_reason("one two", "eins zwei drei vier fünf", limits) is None
    limits = dataclasses.replace(limits, max_length_ratio=2.4)
    assert cleaning.drop_reason("one two", "eins zwei drei vier fünf", limits) == "length_ratio"


def test_clean_counts_every_pair_once():
    pairs = [
        SentencePair("The  door is open", "Die Tür ist offen", "a"),
        SentencePair("The door is\u00a0open", "Die Tür ist offen", "b"),  # the same once normalised
        SentencePair("The door is open", "Die Türe ist offen", "b"),  # another translation
        SentencePair("Open", "Offen", "c"),
        SentencePair("Closed", "Zu", "c"),
    ]
    kept, dropped = cleaning.clean(pairs, Limits())
    assert kept == [
        SentencePair("The door is open", "Die Tür ist offen", "a"),
        SentencePair("The door is open", "Die Türe ist offen", "b"),
    ]
    assert dropped == {"duplicate": 1, "too_short": 2}
    assert len(kept) + sum(dropped.values()) == len(pairs)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Press it. Then wait! Ready?", ["Press it.", "Then wait!", "Ready?"]),
        ("Use e.g. Linux, z. B. Debian.", ["Use e.g. Linux, z. B. Debian."]),
        ("Version 2. Mai ist ok. Ja.", ["Version 2. Mai ist ok.", "Ja."]),
        ("He said “Stop.” Then he left.", ["He said “Stop.”", "Then he left."]),
        ("no capital. after it", ["no capital. after it"]),
        ("", []),
    ],
)
def test_sentences(text, expected):
    assert cleaning.sentences(text) == expected


def test_split_pair_is_symmetric():
    assert cleaning.split_pair("Open it. Close it.", "Öffne es. Schließe es.") == [
        ("Open it.", "Öffne es."),
        ("Close it.", "Schließe es."),
    ]
    together = ("Open it. Close it.", "Öffne und schließe es.")
    assert cleaning.split_pair(*together) == [together]
    lopsided = ("No. " + "Long words " * 9, "Lange Wörter " * 9 + ". Nein.")
    assert len(cleaning.split_pair(*lopsided)) == 1


def test_dashes_of_options_and_numbers_are_no_marks_of_a_list():
    assert cleaning.paragraphs("-c, --config\n -1 or -\n*args*") == [
        "-c, --config",
        "-1 or -",
        "*args*",
    ]


def test_split_pair_takes_paragraphs_and_list_items():
    source = "Choose:\n\n- the lamp\n- the door"
    assert cleaning.split_pair(source, "Wähle:\n* die Lampe\n* die Tür") == [
        ("Choose:", "Wähle:"),
        ("the lamp", "die Lampe"),
        ("the door", "die Tür"),
    ]
    assert len(cleaning.split_pair(source, "Wähle: die Lampe\ndie Tür")) == 1


def test_moses_drop_reason_is_clean_corpus_n():
    """The rules of clean-corpus-n.perl, read from its source."""
    dropped = functools.partial(cleaning.moses_drop_reason, max_tokens=80, max_length_ratio=9)
    assert dropped("a", "") == "empty"
    assert dropped("a " * 80, "b " * 80) is None
    assert dropped("a " * 81, "b " * 80) == "too_long"
    assert dropped("a " * 9, "b") is None
    assert dropped("a " * 10, "b") == "length_ratio"
    assert dropped("a" * 1000, "b") is None
    assert dropped("a" * 1001, "b") == "long_word"
