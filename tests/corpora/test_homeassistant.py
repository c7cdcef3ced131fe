"""Corpora: cleaning, splitting without leakage, resumable steps, fairseq's binary data."""

import collections
import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path

import pytest
from support import commands
from support.phrases import ADVERBS, OBJECTS, SUBJECTS, VERBS

from fairseq_sparsemixer import files
from fairseq_sparsemixer.corpora import (
    binarise,
    cleaning,
    resumable,
    split_step,
    splitting,
    spm,
    subprocesses,
)
from fairseq_sparsemixer.corpora.cleaning import Limits, SentencePair
from fairseq_sparsemixer.corpora.homeassistant import extraction as homeassistant
from fairseq_sparsemixer.corpora.homeassistant import preparation, wheels
from fairseq_sparsemixer.corpora.own_text import prepare_raw_text
from fairseq_sparsemixer.errors import UserError

SPLITS = ("train", "valid", "test")
FAKE_SPLIT = splitting.SplitSettings(
    held_out_share=0.3, salt="1", min_held_out_tokens=5, max_cosine=0.70
)
VOCAB_SIZE = 300


# --- a small wheel of our own sentences ----------------------------------------------------------


def component_messages():
    """For each of 40 components its English and German messages; the last has near duplicates."""
    generator = random.Random(7)
    for number in range(40):
        english, german = {}, {}
        for key in range(11):
            parts = [generator.choice(part) for part in (SUBJECTS, VERBS, OBJECTS, ADVERBS)]
            english[f"k{key}"] = " ".join(part[0] for part in parts) + "."
            german[f"k{key}"] = " ".join(part[1] for part in parts) + "."
        english["last"] = f"Program number {number} stopped: {SUBJECTS[number % 4][0]} is broken."
        german["last"] = f"Programm Nummer {number} hielt an: {SUBJECTS[number % 4][1]} ist kaputt."
        yield f"component{number:02}", {"config": english}, {"config": german}


def write_wheel(path, messages, reverse=False):
    """A wheel that pip accepts, for a Python newer than ours; same content, either order."""
    entries = {
        "homeassistant-2026.2.3.dist-info/METADATA": (
            "Metadata-Version: 2.1\nName: homeassistant\nVersion: 2026.2.3\n"
            "Requires-Python: >=3.13.2\n"
        ),
        "homeassistant-2026.2.3.dist-info/WHEEL": (
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
        "homeassistant-2026.2.3.dist-info/RECORD": "",
    }
    for component, english, german in messages:
        folder = f"homeassistant/components/{component}/translations"
        entries[f"{folder}/en.json"] = json.dumps(english, ensure_ascii=False)
        if german is not None:
            entries[f"{folder}/de.json"] = json.dumps(german, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(entries, reverse=reverse):
            archive.writestr(zipfile.ZipInfo(name), entries[name])
    return path


def wheel_for(path):
    return dataclasses.replace(homeassistant.WHEEL, sha256=files.sha256_of(path))


SECOND_RUN = """
import dataclasses, sys
from pathlib import Path
from fairseq_sparsemixer import files
from fairseq_sparsemixer.corpora import splitting
from fairseq_sparsemixer.corpora.homeassistant import extraction as homeassistant
from fairseq_sparsemixer.corpora.homeassistant import preparation
wheel, output, vocab_size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
homeassistant.WHEEL = dataclasses.replace(homeassistant.WHEEL, sha256=files.sha256_of(wheel))
homeassistant.SPLIT = splitting.SplitSettings(0.3, "1", 5, 0.70)
preparation.prepare_homeassistant(output, vocab_size=vocab_size, wheel=wheel)
"""


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """The fake wheel in place of the real one: ``(path of the wheel)``, for the whole module."""
    path = write_wheel(
        tmp_path_factory.mktemp("wheel") / homeassistant.WHEEL.file, component_messages()
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(homeassistant, "WHEEL", wheel_for(path))
        patch.setattr(homeassistant, "SPLIT", FAKE_SPLIT)
        yield path


@pytest.fixture(scope="module")
def built(fake, tmp_path_factory):
    """Two complete corpora: made here; made elsewhere from another zip with another hash seed."""
    second_wheel = tmp_path_factory.mktemp("reversed") / fake.name
    write_wheel(second_wheel, component_messages(), reverse=True)
    second = tmp_path_factory.mktemp("second") / "a much longer name of the corpus"
    command = [sys.executable, "-c", SECOND_RUN, str(second_wheel), str(second), str(VOCAB_SIZE)]
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "12345",
        "PYTHONPATH": str(Path(cleaning.__file__).parents[2]),
    }
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        first = tmp_path_factory.mktemp("first")
        record = preparation.prepare_homeassistant(first, vocab_size=VOCAB_SIZE, wheel=fake)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return first, second, record


@pytest.fixture
def corpus(built, tmp_path):
    """A copy of the finished corpus, to be tampered with."""
    return Path(shutil.copytree(built[0], tmp_path / "corpus"))


@pytest.fixture
def no_binary(monkeypatch):
    """Leave out fairseq-preprocess, which takes seconds to start; counts its calls."""
    calls = []

    def build_binary(folder, languages, workers):
        calls.append(folder)
        files.write_lines(folder / "bin" / "stub", ["binary"])
        return [folder / "bin" / "stub"], {}

    monkeypatch.setattr(binarise, "build_binary", build_binary)
    return calls


def contents(folder, *, without=()):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() not in without
    }


def lines_of(folder, split, language, kind="raw"):
    text = (folder / kind / f"{split}.{language}").read_bytes().decode("utf-8")
    assert text.endswith("\n")
    return text[:-1].split("\n")


def partial_files(folder):
    return [path for path in folder.rglob("*") if "partial" in path.name]


# --- cleaning ------------------------------------------------------------------------------------


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


# --- extraction ----------------------------------------------------------------------------------


def extract_messages(tmp_path, english, german):
    messages = [("lamp", english, german)]
    return homeassistant.extract(write_wheel(tmp_path / "w.whl", messages))


def test_extract_joins_messages_of_the_same_key(tmp_path):
    english = {
        "a": {"b": "Turn on", "only": "English"},
        "list": ["x"],
        "c": "Text",
        "d": {"e": "f"},
    }
    german = {"a": {"b": "Einschalten"}, "list": ["y"], "c": {"other": "shape"}, "d": "g"}
    extraction = extract_messages(tmp_path, english, german)
    assert extraction.pairs == [SentencePair("Turn on", "Einschalten", "lamp")]
    assert (extraction.messages, extraction.dropped_messages) == (1, {})


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
    extraction = extract_messages(tmp_path, {"k": english, "ok": "Yes"}, {"k": german, "ok": "Ja"})
    assert extraction.dropped_messages[reason] >= 1
    assert set(extraction.dropped_messages) == {reason}
    assert extraction.pairs == [SentencePair("Yes", "Ja", "lamp")]


def test_extract_keeps_equal_placeholders_in_any_order(tmp_path):
    extraction = extract_messages(tmp_path, {"k": "{a} of {b}"}, {"k": "von {b} {a}"})
    assert extraction.pairs == [SentencePair("{a} of {b}", "von {b} {a}", "lamp")]


def test_strip_markup():
    text = "See the [guide (v2)](https://example.org/a(b)c) for **all** `keys`<br/>__now__"
    assert homeassistant.strip_markup(text) == "See the guide (v2) for all keys now"


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
    pairs = homeassistant.extract(path).pairs
    assert pairs == [SentencePair("Red", "Rot", "apple"), SentencePair("Black", "Schwarz", "zebra")]
    write_wheel(path, messages, reverse=True)
    assert homeassistant.extract(path).pairs == pairs


# --- splitting -----------------------------------------------------------------------------------


def naive_cosines(train, queries):
    """TF-IDF of 4-grams in padded words, written out: smoothed idf, 1 + log tf, unit length."""

    def grams(text):
        found = collections.Counter()
        for word in re.sub(r"\d+", "0", text.lower()).split():
            padded = f" {word} "
            found.update(padded[i : i + 4] for i in range(max(1, len(padded) - 3)))
        return found

    documents = [grams(text) for text in train]
    frequency = collections.Counter(gram for document in documents for gram in document)

    def vector(counts):
        weights = {
            gram: (1 + math.log(n)) * (1 + math.log((1 + len(train)) / (1 + frequency[gram])))
            for gram, n in counts.items()
            if gram in frequency
        }
        norm = math.sqrt(sum(weight**2 for weight in weights.values())) or 1.0
        return {gram: weight / norm for gram, weight in weights.items()}

    vectors = [vector(document) for document in documents]
    return [
        [sum(weight * other.get(gram, 0.0) for gram, weight in query.items()) for other in vectors]
        for query in (vector(grams(text)) for text in queries)
    ]


def test_nearest_neighbours_agrees_with_the_formula(built):
    train = lines_of(built[0], "train", "en")[:60]
    queries = lines_of(built[0], "test", "en")[:20] + ["zzzz qqqq"]
    expected = naive_cosines(train, queries)
    indices, cosines = splitting.nearest_neighbours(train, queries)
    for row, index, cosine in zip(expected[:-1], indices, cosines):
        assert cosine == pytest.approx(max(row), abs=1e-5)
        assert row[index] == pytest.approx(max(row), abs=1e-5)
    assert (indices[-1], cosines[-1]) == (-1, 0.0)


def test_nearest_neighbours_over_many_blocks_with_ties():
    train = ["the red lamp 7", "the blue door", "the red lamp 12"]
    queries = ["the blue door", "the red lamp 99"] * 300
    indices, cosines = splitting.nearest_neighbours(train, queries)
    # Numbers count as equal, and the first of equals is taken.
    assert indices.tolist() == [1, 0] * 300
    assert cosines == pytest.approx([1.0] * 600, abs=1e-6)


def test_stable_fraction_is_pinned():
    digest = hashlib.sha256(b"41/zha").hexdigest()
    assert splitting.stable_fraction("41/zha") == int(digest[:16], 16) / 16**16
    values = [splitting.stable_fraction(str(i)) for i in range(2000)]
    assert 0.27 < sum(value < 0.3 for value in values) / 2000 < 0.33


def make_pairs():
    for component, english, german in component_messages():
        for key, source in english["config"].items():
            yield SentencePair(source, german["config"][key], component)


def test_hold_out_shares_no_document_and_no_sentence():
    pairs = [*make_pairs()]
    held = {p.document for p in splitting.hold_out(pairs, FAKE_SPLIT).test}
    # A short sentence, the same source in other letters, and the same target in valid and test.
    document = sorted(held)[0]
    split = splitting.hold_out(pairs, FAKE_SPLIT)
    extra = [
        SentencePair("Too short a one", "Eine zu kurze", document),
        SentencePair(split.test[0].source.upper(), "Etwas ganz anderes", document),
        SentencePair("Quite another English sentence here.", split.valid[0].target, document),
    ]
    split = splitting.hold_out(pairs + extra, FAKE_SPLIT)
    parts = {name: getattr(split, name) for name in SPLITS}
    documents = {name: {pair.document for pair in part} for name, part in parts.items()}
    assert all(documents.values())
    for one, other in itertools.combinations(SPLITS, 2):
        assert not documents[one] & documents[other]
    for side in (0, 1):
        texts = [{pair[side].lower() for pair in parts[name]} for name in ("valid", "test")]
        assert not texts[0] & texts[1]
    sources = [pair.source.lower() for pair in split.valid + split.test]
    assert len(set(sources)) == len(sources)
    assert all(len(cleaning.tokens(source)) >= 5 for source in sources)
    sizes = [len(split.valid), len(split.test)]
    assert abs(sizes[0] - sizes[1]) <= 12  # one document
    dropped = split.counts["held_out_dropped"]
    assert dropped["too_short"] == 1
    assert dropped["duplicate_source"] >= 1
    assert dropped["target_also_in_valid"] == 1
    everything = len(split.train) + sum(sizes) + sum(dropped.values())
    assert everything == len(pairs) + len(extra)


def test_hold_out_refuses_to_leave_a_part_empty():
    pairs = [pair for pair in make_pairs() if pair.document < "component03"]
    with pytest.raises(ValueError, match="documents held out"):
        splitting.hold_out(pairs, dataclasses.replace(FAKE_SPLIT, held_out_share=0.0))


def test_remove_near_duplicates_leaves_none_and_no_more_than_it_must():
    test = [SentencePair("The garden sensor 12 is out of reach", "Der Sensor fehlt gerade", "t")]
    valid = [SentencePair("Choose another colour for the lamp", "Wähle eine andere Farbe", "v")]
    near = SentencePair("The garden sensor 3 is out of reach!", "Gartensensor 3 ist weg", "a")
    same_target = SentencePair("A completely different wording", "Der Sensor fehlt gerade", "b")
    far = SentencePair("Washing machines need water", "Waschmaschinen brauchen Wasser", "c")
    split = splitting.Split([near, same_target, far], valid, test, {"documents": 5})
    filtered = splitting.remove_near_duplicates(split, 0.70)
    assert filtered.train == [far]
    assert filtered.counts == {
        "documents": 5,
        "train_before_filter": 3,
        "train_dropped": {"held_out_target": 1, "near_duplicate": 1},
    }


def test_copy_score_is_sacrebleu_of_the_nearest_translation():
    import sacrebleu

    train = ["the red lamp is on", "the blue door is shut", "one more sentence here"]
    targets = ["die rote Lampe ist an", "die blaue Tür ist zu", "noch ein Satz hier"]
    score = splitting.copy_score(train, targets, train[:2], targets[:2])
    assert score.bleu == 100.0
    sources, references = ["a red lamp is off", "xyzzyx"], ["eine rote Lampe ist an", "nichts"]
    score = splitting.copy_score(train, targets, sources, references)
    assert score.hypotheses == [targets[0], ""]
    expected = sacrebleu.corpus_bleu([targets[0], ""], [references]).score
    assert score.bleu == pytest.approx(expected, abs=0.005)
    assert "tok:13a" in score.signature
    assert f"version:{sacrebleu.__version__}" in score.signature


# --- files ---------------------------------------------------------------------------------------


def test_read_lines_splits_on_newlines_alone(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("\ufeffa\u2028b\r\nc\x85d\re\n\nlast".encode())
    assert files.read_lines(path) == ["a\u2028b", "c\x85d\re", "", "last"]
    files.write_lines(path, ["a\u2028b", ""])
    assert path.read_bytes() == "a\u2028b\n\n".encode()
    assert files.read_lines(path) == ["a\u2028b", ""]


def test_write_lines_keeps_the_old_file_when_interrupted(tmp_path):
    path = tmp_path / "text"
    files.write_lines(path, ["old"])

    def interrupted():
        yield "new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_lines(path, interrupted())
    assert contents(tmp_path) == {"text": b"old\n"}


def test_full_disk_is_a_user_error(tmp_path):
    message = f"no space left on the disk of {tmp_path} .about 150 MB"
    with pytest.raises(UserError, match=message), files.report_full_disk(tmp_path, 150):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError), files.report_full_disk(tmp_path, 150):
        raise PermissionError(errno.EACCES, "not the disk")


def test_full_disk_in_a_subprocess(tmp_path):
    program = "import os, sys; sys.exit('pip: ERROR: ' + os.strerror(28))"
    with pytest.raises(OSError) as caught:
        subprocesses.run_python(["-c", program])
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(subprocesses.ProgramError, match="some other fault"):
        subprocesses.run_python(["-c", "import sys; sys.exit('some other fault')"])


# --- steps ---------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path):
    """Run two dependent steps; returns the names of those that were really built."""

    def run(letter="a", fail=False):
        done = []
        first, second = tmp_path / "first", tmp_path / f"second-{letter}"

        def build_first():
            done.append("first")
            files.write_lines(first, ["stable"])
            return [first], {"made": "first"}

        def build_second():
            done.append("second")
            files.write_lines(second, [*files.read_lines(first), letter])
            if fail:
                raise KeyboardInterrupt
            return [second], {"letter": letter}

        runner = resumable.Steps(tmp_path, seal=tmp_path / "seal")
        assert runner.run("first", {}, [], build_first) == {"made": "first"}
        assert runner.run("second", {"letter": letter}, [first], build_second) == {"letter": letter}
        return done

    return run


def test_steps_are_skipped_when_done(job):
    assert job() == ["first", "second"]
    assert job() == []


def test_changed_settings_redo_the_step_and_remove_its_old_outputs(job, tmp_path):
    job("a")
    assert job("b") == ["second"]
    assert not (tmp_path / "second-a").exists()
    assert (tmp_path / "second-b").read_text() == "stable\nb\n"


def test_an_interrupted_step_is_not_taken_for_finished(job):
    with pytest.raises(KeyboardInterrupt):
        job(fail=True)
    assert job() == ["second"]
    with pytest.raises(KeyboardInterrupt):
        job("b", fail=True)
    # The first output is still there, but its record went before the step was redone.
    assert job("a") == ["second"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b"X" + path.read_bytes()[1:]),
        lambda path: path.unlink(),
    ],
    ids=["truncated", "same size", "missing"],
)
def test_damaged_outputs_are_made_again(job, tmp_path, capsys, damage):
    job()
    damage(tmp_path / "second-a")
    capsys.readouterr()
    assert job() == ["second"]
    assert "second-a is missing or has changed" in capsys.readouterr().err
    assert (tmp_path / "second-a").read_text() == "stable\na\n"


def test_the_seal_is_broken_as_soon_as_a_step_is_redone(job, tmp_path):
    job("a")
    seal = tmp_path / "seal"
    seal.write_text("all fits together")
    job("a")
    assert seal.exists()
    with pytest.raises(KeyboardInterrupt):
        job("b", fail=True)
    assert not seal.exists()


def test_a_damaged_record_counts_as_none(job, tmp_path):
    job()
    record = tmp_path / ".steps" / "first.json"
    record.write_text(record.read_text()[:20])
    # Made again with the same bytes, so that what depends on it stays.
    assert job() == ["first"]


# --- the download --------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Pip without an index; what lies in the returned folder can be downloaded."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return shelf


def test_download_and_cache(fake, offline, tmp_path, monkeypatch):
    shutil.copy(fake, offline)
    folder = tmp_path / "download"
    path = wheels.obtain_wheel(homeassistant.WHEEL, folder)
    assert path == folder / fake.name
    assert path.read_bytes() == fake.read_bytes()
    assert list(folder.iterdir()) == [path]
    monkeypatch.setattr(wheels, "run_python", lambda *a, **k: pytest.fail("network used"))
    assert wheels.obtain_wheel(homeassistant.WHEEL, folder) == path
    assert wheels.obtain_wheel(homeassistant.WHEEL, tmp_path / "other", fake) == fake


def test_damaged_cache_is_downloaded_again(fake, offline, tmp_path, capsys):
    shutil.copy(fake, offline)
    path = tmp_path / "download" / fake.name
    path.parent.mkdir()
    path.write_bytes(fake.read_bytes()[:1000])
    assert wheels.obtain_wheel(homeassistant.WHEEL, path.parent) == path
    assert path.read_bytes() == fake.read_bytes()
    assert f"{path} is damaged" in capsys.readouterr().err


def test_no_network_says_what_to_do(fake, offline, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(UserError) as caught:
        preparation.prepare_homeassistant(output)
    message = str(caught.value)
    assert "homeassistant==2026.2.3" in message
    assert str(output / "download" / "homeassistant-2026.2.3-py3-none-any.whl") in message
    assert "--wheel" in message
    assert "\n" not in message
    assert contents(output) == {}


def test_wrong_file_from_the_index(fake, offline, tmp_path):
    other = [("lamp", {"k": "On"}, {"k": "An"})]
    write_wheel(offline / fake.name, other)
    with pytest.raises(UserError, match=homeassistant.WHEEL.sha256):
        wheels.obtain_wheel(homeassistant.WHEEL, tmp_path / "download")
    assert contents(tmp_path / "download") == {}


def test_given_wheel_must_be_whole_even_when_all_is_done(fake, corpus, tmp_path):
    damaged = tmp_path / fake.name
    damaged.write_bytes(fake.read_bytes()[:-1])
    for given, problem in [(damaged, "damaged"), (tmp_path / "no.whl", "no such file")]:
        with pytest.raises(UserError, match=problem) as caught:
            preparation.prepare_homeassistant(corpus, vocab_size=VOCAB_SIZE, wheel=given)
        assert f"--wheel {given}" in str(caught.value)


# --- a whole corpus ------------------------------------------------------------------------------


def test_layout(built):
    binary = {f"{split}.en-de.{lang}.{kind}" for split in SPLITS for lang in ("en", "de")
              for kind in ("bin", "idx")}  # fmt: skip
    expected = {f"bin/{name}" for name in binary}
    expected |= {"bin/dict.en.txt", "bin/dict.de.txt", "bin/sentencepiece.bpe.model"}
    expected |= {f"{kind}/{s}.{lang}" for kind in ("raw", "spm") for s in SPLITS
                 for lang in ("en", "de")}  # fmt: skip
    expected |= {"raw/all.tsv", "spm/spm.model", "spm/dict.txt", "copy/test.de", "record.json"}
    expected |= {f".steps/{n}.json" for n in ("extract", "split", "sentencepiece", "binarise")}
    assert set(contents(built[0])) == expected


def test_two_builds_are_equal_byte_for_byte(built):
    first, second, _ = built
    # Another folder, another order of the zip, another hash seed; only the checksum of the zip
    # itself differs.
    own = ("record.json", ".steps/extract.json")
    assert contents(first, without=own) == contents(second, without=own)


def test_no_leakage(built):
    folder = built[0]
    rows = [line.split("\t") for line in files.read_lines(folder / "raw" / "all.tsv")]
    documents = {(source, target): document for source, target, document in rows}
    text = {s: [lines_of(folder, s, lang) for lang in ("en", "de")] for s in SPLITS}
    of_split = {s: {documents[pair] for pair in zip(*text[s])} for s in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert of_split[one] and not of_split[one] & of_split[other]
        assert not set(text[one][0]) & set(text[other][0])
        assert not set(text[one][1]) & set(text[other][1])
    _, cosines = splitting.nearest_neighbours(text["train"][0], text["valid"][0] + text["test"][0])
    assert 0.3 < cosines.max() < 0.70


def test_record(built):
    folder, _, record = built
    assert record == json.loads((folder / "record.json").read_text(encoding="utf-8"))
    assert record["source"] == {
        "name": "homeassistant",
        "version": "2026.2.3",
        "file": "homeassistant-2026.2.3-py3-none-any.whl",
        "sha256": homeassistant.WHEEL.sha256,
        "licence": "Apache-2.0",
    }
    extraction, split = record["extraction"], record["split"]
    dropped = sum(extraction["segments_dropped"].values())
    assert extraction["segments"] == extraction["pairs"] + dropped == 480
    assert split["train_dropped"]["near_duplicate"] > 0
    train = split["train_before_filter"] - sum(split["train_dropped"].values())
    for name, size in [("train", train), ("valid", None), ("test", None)]:
        for language in ("en", "de"):
            counts = record["splits"][name][language]
            lines = lines_of(folder, name, language, "spm")
            assert counts["sentences"] == len(lines) == (size or len(lines))
            assert counts["pieces"] == sum(len(line.split(" ")) for line in lines)
    assert record["settings"]["vocab_size"] == record["vocabulary"] == VOCAB_SIZE
    assert set(record["versions"]) == {
        "fairseq-sparsemixer",
        "sacrebleu",
        "scikit-learn",
        "sentencepiece",
    }


def test_copy_scores_in_the_record(built):
    import sacrebleu

    folder, _, record = built
    hypotheses = lines_of(folder, "test", "de", "copy")
    bleu = sacrebleu.corpus_bleu(hypotheses, [lines_of(folder, "test", "de")]).score
    score = record["copy_score"]["test"]
    assert score["bleu"] == pytest.approx(bleu, abs=0.005)
    # The filter exists because near duplicates are worth copying.
    for split in ("valid", "test"):
        scores = record["copy_score"][split]
        assert scores["bleu"] < scores["bleu_before_filter"]
    assert set(hypotheses) <= set(lines_of(folder, "train", "de"))


def test_fairseq_reads_back_the_text_exactly(built):
    from fairseq.data import Dictionary, data_utils

    folder, _, record = built
    binary = folder / "bin"
    assert (binary / "dict.en.txt").read_bytes() == (binary / "dict.de.txt").read_bytes()
    dictionary = Dictionary.load(str(binary / "dict.en.txt"))
    assert len(dictionary) == VOCAB_SIZE
    assert not any(symbol.startswith("madeupword") for symbol in dictionary.symbols)
    for split, language in itertools.product(SPLITS, ("en", "de")):
        dataset = data_utils.load_indexed_dataset(
            str(binary / f"{split}.en-de.{language}"), dictionary
        )
        texts = lines_of(folder, split, language)
        assert len(dataset) == len(texts)
        unknown = sum(int((sentence == dictionary.unk()).sum()) for sentence in dataset)
        assert unknown == record["splits"][split][language]["unknown"]
        # Characters that only held-out text has; the filter removed them from the training text.
        assert (unknown == 0) == (split == "train")
        for sentence, text in zip(dataset, texts):
            assert sentence[-1] == dictionary.eos()
            read = dictionary.string(sentence, "sentencepiece")
            assert read == text or "<unk>" in read


def test_model_beside_the_data_encodes_like_the_data(built):
    from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE, SentencepieceConfig

    folder = built[0]
    encoder = SentencepieceBPE(
        SentencepieceConfig(sentencepiece_model=str(folder / "bin" / "sentencepiece.bpe.model"))
    )
    for language in ("en", "de"):
        pieces = lines_of(folder, "test", language, "spm")
        assert [encoder.encode(text) for text in lines_of(folder, "test", language)] == pieces
    # Text from elsewhere: no white space but the one between pieces, nothing invisible.
    assert encoder.encode("The\u00a0front\u2028door\x07\u00ad ") == encoder.encode("The front door")
    # Nor a path of this machine.
    model = (folder / "spm" / "spm.model").read_bytes()
    assert str(folder).encode() not in model and b".partial" not in model


def test_dictionary_is_sorted_by_training_frequency(built):
    folder = built[0]
    counted = collections.Counter(
        piece
        for language in ("en", "de")
        for line in lines_of(folder, "train", language, "spm")
        for piece in line.split(" ")
    )
    entries = [line.rsplit(" ", 1) for line in files.read_lines(folder / "spm" / "dict.txt")]
    counts = [int(count) for _, count in entries]
    assert counts == sorted(counts, reverse=True)
    assert {piece: int(count) for piece, count in entries if int(count)} == counted
    assert not {"<s>", "</s>", "<unk>", "<pad>"} & {piece for piece, _ in entries}


def test_finished_corpus_needs_nothing(fake, corpus, monkeypatch, capsys):
    def unexpected(*args, **kwargs):
        pytest.fail("a finished step ran again")

    monkeypatch.setattr(homeassistant, "extract", unexpected)
    monkeypatch.setattr(splitting, "hold_out", unexpected)
    monkeypatch.setattr(spm, "build_pieces", unexpected)
    monkeypatch.setattr(binarise, "build_binary", unexpected)
    monkeypatch.setattr(wheels, "run_python", unexpected)
    before = contents(corpus)
    preparation.prepare_homeassistant(corpus, vocab_size=VOCAB_SIZE)
    assert contents(corpus) == before
    assert capsys.readouterr().err.count("already done") == 4


def test_another_vocab_size_redoes_what_depends_on_it(fake, corpus, monkeypatch, no_binary):
    monkeypatch.setattr(splitting, "hold_out", lambda *a: pytest.fail("split again"))
    record = preparation.prepare_homeassistant(corpus, vocab_size=200, wheel=fake)
    assert record["vocabulary"] == 200
    assert len(files.read_lines(corpus / "spm" / "dict.txt")) == 196
    assert len(no_binary) == 1
    assert not (corpus / "bin" / "train.en-de.en.bin").exists()


def test_resume_after_a_kill_in_the_middle(built, fake, tmp_path, monkeypatch, no_binary):
    output = tmp_path / "out"
    written = []

    def killed(path, lines):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        files.write_lines(path, lines)

    with monkeypatch.context() as patch:
        patch.setattr(split_step, "write_lines", killed)
        with pytest.raises(KeyboardInterrupt):
            preparation.prepare_homeassistant(output, vocab_size=VOCAB_SIZE, wheel=fake)
    assert [path.name for path in written] == ["train.en", "train.de", "valid.en"]
    # What a kill without a chance to tidy up leaves behind.
    (output / "raw" / ".test.de.partial").write_text("half a")
    (output / "spm" / ".partial").mkdir(parents=True)
    (output / "spm" / ".partial" / "text").write_text("half")
    preparation.prepare_homeassistant(output, vocab_size=VOCAB_SIZE, wheel=fake)
    assert partial_files(output) == []
    for folder in ("raw", "spm", "copy"):
        assert contents(output / folder) == contents(built[0] / folder)


def test_truncated_output_is_noticed_and_redone(built, fake, corpus, no_binary, capsys):
    path = corpus / "raw" / "train.de"
    path.write_bytes(path.read_bytes()[:-100])
    preparation.prepare_homeassistant(corpus, vocab_size=VOCAB_SIZE, wheel=fake)
    assert "raw/train.de is missing or has changed" in capsys.readouterr().err
    for folder in ("raw", "spm", "copy"):
        assert contents(corpus / folder) == contents(built[0] / folder)
    # The text came out the same: what was made from it is still good.
    assert no_binary == []


@pytest.mark.parametrize("calls", [0, 1, 5])
def test_full_disk_leaves_nothing_half_written(fake, tmp_path, monkeypatch, no_binary, calls):
    output = tmp_path / "out"
    left = [calls]
    really = os.fsync

    def fsync(descriptor):
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        really(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match="no space left") as caught:
            preparation.prepare_homeassistant(output, vocab_size=VOCAB_SIZE, wheel=fake)
    assert str(output) in str(caught.value)
    assert "150 MB" in str(caught.value)
    assert partial_files(output) == []
    assert len(contents(output)) == calls
    preparation.prepare_homeassistant(output, vocab_size=VOCAB_SIZE, wheel=fake)


@pytest.mark.parametrize(
    ("vocab_size", "message"), [(8000, r"use at most \d+"), (20, r"use at least \d+")]
)
def test_unsuitable_vocab_size(fake, corpus, no_binary, vocab_size, message):
    with pytest.raises(UserError, match=f"--vocab-size {vocab_size} .*{message}") as caught:
        preparation.prepare_homeassistant(corpus, vocab_size=vocab_size, wheel=fake)
    assert "\n" not in str(caught.value)
    assert partial_files(corpus) == []


def test_output_that_is_a_file(fake, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        preparation.prepare_homeassistant(tmp_path / "out", wheel=fake)


# --- the user's own text and the command line ----------------------------------------------------


def command(*arguments):
    commands.command("prepare", *arguments)


@pytest.fixture
def own_text(built, tmp_path):
    """The built corpus' text under other language names, with characters that tear lines."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for split, (old, new) in itertools.product(SPLITS, [("en", "xx"), ("de", "yy")]):
        lines = lines_of(built[0], split, old)
        lines[1] = lines[1].replace(" ", "\u2028", 1).replace(" ", "\u00a0", 1)
        lines[2] = ""
        (folder / f"{split}.{new}").write_bytes("\r\n".join(lines).encode() + b"\r\n")
    return folder


def test_own_text_to_binary(own_text, tmp_path, capsys):
    from fairseq.data import Dictionary, data_utils

    output = tmp_path / "out"
    languages = ["--source-lang", "xx", "--target-lang", "yy"]
    command("--raw-dir", own_text, "--output", output, "--vocab-size", VOCAB_SIZE, *languages)
    table = capsys.readouterr().out
    assert "pieces xx" in table and "copy BLEU" in table
    dictionary = Dictionary.load(str(output / "bin" / "dict.xx.txt"))
    for split, language in itertools.product(SPLITS, ("xx", "yy")):
        texts = lines_of(output, split, language)
        assert texts == files.read_lines(own_text / f"{split}.{language}")
        dataset = data_utils.load_indexed_dataset(
            str(output / "bin" / f"{split}.xx-yy.{language}"), dictionary
        )
        read = [dictionary.string(sentence, "sentencepiece") for sentence in dataset]
        assert read[2] == ""
        wrong = [
            index
            for index, (mine, text) in enumerate(zip(read, texts))
            if mine != cleaning.normalise(text) and "<unk>" not in mine
        ]
        assert wrong == []
        assert split != "train" or not any("<unk>" in line for line in read)
    record = json.loads((output / "record.json").read_text())
    assert record["languages"] == ["xx", "yy"]
    assert "bleu_before_filter" not in record["copy_score"]["test"]
    assert len(lines_of(output, "test", "yy", "copy")) == len(lines_of(output, "test", "yy"))


def test_own_text_again_after_a_change(own_text, tmp_path, no_binary, capsys):
    arguments = ["--raw-dir", own_text, "--output", tmp_path / "out", "--vocab-size", VOCAB_SIZE]
    arguments += ["--source-lang", "xx", "--target-lang", "yy"]
    command(*arguments)
    command(*arguments)
    assert capsys.readouterr().err.count("already done") == 4
    path = own_text / "test.yy"
    path.write_bytes(b"Ein neuer Satz." + path.read_bytes())
    command(*arguments)
    assert lines_of(tmp_path / "out", "test", "yy")[0].startswith("Ein neuer Satz.")
    assert "already done" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "valid.yy").unlink(), "there is no file valid.yy"),
        (lambda f: (f / "test.xx").write_text("one line\n"), r"test.xx has 1 lines and .*test.yy"),
        (lambda f: (f / "train.xx").write_text(" \n\n"), r"train.xx holds no text"),
        (lambda f: (f / "valid.xx").write_text(""), r"valid.xx holds no text"),
        (lambda f: (f / "test.yy").write_bytes(b"a\nschl\xe4cht\n"), "test.yy, line 2: not UTF-8"),
    ],
)  # fmt: skip
def test_own_text_problems(own_text, tmp_path, damage, message):
    damage(own_text)
    with pytest.raises(UserError, match=message):
        prepare_raw_text(
            tmp_path / "out", own_text, source_lang="xx", target_lang="yy", vocab_size=VOCAB_SIZE
        )


def test_own_text_may_not_lie_where_the_copy_goes(own_text, tmp_path):
    raw = tmp_path / "out" / "raw"
    shutil.copytree(own_text, raw)
    before = contents(raw)
    with pytest.raises(UserError, match="move it"):
        prepare_raw_text(tmp_path / "out", raw, source_lang="xx", target_lang="yy")
    assert contents(raw) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to prepare"),
        (["homeassistant", "--raw-dir", "x"], "leave out the corpus"),
        (["--wheel", "x", "--raw-dir", "x"], "leave out the corpus and --wheel"),
        (["homeassistant", "--source-lang", "fr"], "only go with --raw-dir"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        command(*arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_builds_the_named_corpus(fake, tmp_path, no_binary, capsys):
    arguments = ["--wheel", fake, "--vocab-size", VOCAB_SIZE]
    command("homeassistant", "--output", tmp_path / "out", *arguments)
    rows = [line.split() for line in capsys.readouterr().out.split("\n")]
    counts = json.loads((tmp_path / "out" / "record.json").read_text())["splits"]
    assert [row[:2] for row in rows[1:4]] == [
        [split, f"{counts[split]['en']['sentences']:,}"] for split in SPLITS
    ]


@pytest.mark.slow
def test_real_corpus(tmp_path):
    """The published counts of the real wheel, within 2 %."""
    try:
        record = preparation.prepare_homeassistant(tmp_path)
    except UserError as error:
        pytest.skip(f"the wheel cannot be had: {error}")
    assert record["extraction"]["pairs"] == pytest.approx(15_405, rel=0.02)
    assert record["split"]["documents"] == 873
    assert record["split"]["held_out"] == pytest.approx(823, rel=0.02)
    assert record["splits"]["train"]["en"]["sentences"] == pytest.approx(14_046, rel=0.02)
    for language in ("en", "de"):
        assert record["splits"]["train"][language]["unknown"] == 0
