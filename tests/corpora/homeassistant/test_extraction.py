"""Messages from a wheel."""

import zipfile

import pytest
from support.messages import write_wheel

from fairseq_sparsemixer.corpora.cleaning import SentencePair
from fairseq_sparsemixer.corpora.homeassistant import extraction


def extract_messages(tmp_path, english, german):
    messages = [("lamp", english, german)]
    return extraction.extract(write_wheel(tmp_path / "w.whl", messages))


def test_extract_joins_messages_of_the_same_key(tmp_path):
    english = {
        "a": {"b": "Turn on", "only": "English"},
        "list": ["x"],
        "c": "Text",
        "d": {"e": "f"},
    }
    german = {"a": {"b": "Einschalten"}, "list": ["y"], "c": {"other": "shape"}, "d": "g"}
    extracted = extract_messages(tmp_path, english, german)
    assert extracted.pairs == [SentencePair("Turn on", "Einschalten", "lamp")]
    assert (extracted.messages, extracted.dropped_messages) == (1, {})


@pytest.mark.parametrize(
    ("english", "german", "reason"),
    [
        ("[%key:common::on%]", "An", "reference"),
        ("On", "[%key:common::on%]", "reference"),
        ("{n, plural, one {# day} other {# days}}", "{n} Tage", "plural_or_select"),
        ("{n} days", "{n, select, a {x} other {y}}", "plural_or_select"),
        ("Found {name}", "Gefunden: {Name}", "placeholders_differ"),
        ("Found {name}", "Gefunden", "placeholders_differ"),
        (
            "Found {name} now. It is new.",
            "Gefunden, und zwar jetzt. Neu: {name}.",
            "placeholders_in_another_sentence",
        ),
    ],
)
def test_extract_counts_what_it_drops(tmp_path, english, german, reason):
    extracted = extract_messages(tmp_path, {"k": english, "ok": "Yes"}, {"k": german, "ok": "Ja"})
    assert extracted.dropped_messages[reason] >= 1
    assert set(extracted.dropped_messages) == {reason}
    assert extracted.pairs == [SentencePair("Yes", "Ja", "lamp")]


def test_extract_keeps_equal_placeholders_in_any_order(tmp_path):
    extracted = extract_messages(tmp_path, {"k": "{a} of {b}"}, {"k": "von {b} {a}"})
    assert extracted.pairs == [SentencePair("{a} of {b}", "von {b} {a}", "lamp")]


def test_strip_markup():
    text = "See the [guide (v2)](https://example.org/a(b)c) for **all** `keys`<br/>__now__"
    assert extraction.strip_markup(text) == "See the guide (v2) for all keys now"


def test_extract_reads_only_components_with_both_languages(tmp_path):
    path = tmp_path / "w.whl"
    messages = [
        ("zebra", {"k": "Black"}, {"k": "Schwarz"}),
        ("apple", {"k": "Red"}, {"k": "Rot"}),
        ("english_only", {"k": "Blue"}, None),
    ]
    write_wheel(path, messages)
    with zipfile.ZipFile(path, "a") as archive:
        for language in ("en", "de"):
            archive.writestr(f"homeassistant/translations/{language}.json", '{"k": "elsewhere"}')
    pairs = extraction.extract(path).pairs
    assert pairs == [SentencePair("Red", "Rot", "apple"), SentencePair("Black", "Schwarz", "zebra")]
    write_wheel(path, messages, reverse=True)
    assert extraction.extract(path).pairs == pairs
