"""Text in the manner of the Moses scripts, against the output of those scripts themselves.

Every object of ``data/moses_hard_lines.json`` is a line that is hard to get right and what the
Perl scripts (mosesdecoder 34452895, perl 5.36) make of it: ``normalised``, the tokens of the two
recipes ``training`` and ``test``, and ``detokenised`` from the training tokens.
"""

import functools
import json
import multiprocessing
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.text import moses

HARD_LINES = json.loads(
    (Path(__file__).parents[1] / "data/moses_hard_lines.json").read_text(encoding="utf-8")
)
STAGES = {
    "normalised": lambda row: moses.normalise_punctuation(row["line"], row["language"]),
    "training": lambda row: moses.training_tokens(row["line"], row["language"]),
    "test": lambda row: moses.test_tokens(row["line"], row["language"]),
    "detokenised": lambda row: moses.detokenise(row["training"], row["language"]),
}

WHITE_SPACE = "the scripts copy a line of white space, which holds no token"
STRAY_SPACES = "Perl puts spaces around a final full stop and apostrophe and leaves them there"
MARKER = "the scripts take the text DOTMULTI for their own marker of dots; so does sacremoses"
TANGUT = "sacremoses joins words in scripts that are newer than the scripts' list of CJK blocks"
# By language and line.
KNOWN_DIFFERENCES = {
    ("en", " "): WHITE_SPACE,
    ("en", "   "): WHITE_SPACE,
    ("en", "\t"): WHITE_SPACE,
    ("en", "\r"): WHITE_SPACE,
    ("en", "\x01"): WHITE_SPACE,
    ("en", "\xa0"): WHITE_SPACE,
    ("en", "\u200b"): WHITE_SPACE,
    ("en", "\u3000\u2003"): WHITE_SPACE,
    ("de", " "): WHITE_SPACE,
    ("de", "\x7f\x80\x9f"): WHITE_SPACE,
    ("de", "\xa0\xa0"): WHITE_SPACE,
    ("de", "\u2028"): WHITE_SPACE,
    ("en", ".'"): STRAY_SPACES,
    ("en", "a.'"): STRAY_SPACES,
    ("en", "a .'"): STRAY_SPACES,
    ("en", "A quote after a full stop.'"): STRAY_SPACES,
    ("en", "She called it 'the end.'"): STRAY_SPACES,
    ("en", "'Tis \"the\" 'season' .'"): STRAY_SPACES,
    ("en", "‘Single quotes,’ he said, ‘are “nested” here.’"): STRAY_SPACES,
    ("en", "A literal DOTMULTI.) before a bracket and DOTMULTI.1"): MARKER,
    ("en", "old Tangut \U00017000\U00017001 \U00017002, Han \U00020000 \U00020001"): TANGUT,
}


def key(row):
    return row["language"], row["line"]


# --- the scripts' own output --------------------------------------------------------------------


@pytest.mark.parametrize("row", HARD_LINES, ids=lambda row: f"{row['language']}:{row['line'][:30]}")
def test_agrees_with_the_scripts_but_for_known_differences(row):
    expected = {stage: row[stage] for stage in STAGES}
    found = {stage: make(row) for stage, make in STAGES.items()}
    if key(row) in KNOWN_DIFFERENCES:
        assert found != expected, "agrees now: not to be listed any more"
    else:
        assert found == expected


def test_how_many_lines_agree_at_each_stage():
    agree = {
        stage: sum(make(row) == row[stage] for row in HARD_LINES) for stage, make in STAGES.items()
    }
    assert len(HARD_LINES) == 429
    assert sum(row["language"] == "de" for row in HARD_LINES) == 200
    assert set(KNOWN_DIFFERENCES) <= {key(row) for row in HARD_LINES}
    assert agree == {"normalised": 429, "training": 411, "test": 412, "detokenised": 415}


@pytest.mark.parametrize("stage", ["training", "test"])
def test_the_tokens_themselves_differ_in_one_line_alone(stage):
    differing = {key(row) for row in HARD_LINES if STAGES[stage](row).split() != row[stage].split()}
    assert {KNOWN_DIFFERENCES[line] for line in differing} == {MARKER}
    assert len(differing) == 1


# --- what the recipes are about, in a few plain lines ------------------------------------------


def test_training_text_is_normalised_and_test_text_is_not():
    line = "„Ja“ – O’Neill"
    assert moses.training_tokens(line, "de") == "&quot; Ja &quot; - O &apos; Neill"
    assert moses.test_tokens(line, "de") == "„ Ja “ – O &apos; Neill"


def test_each_language_has_its_own_rules():
    assert moses.tokenise("It's O'Neill's", "en") == "It &apos;s O &apos;Neill &apos;s"
    assert moses.tokenise("It's O'Neill's", "de") == "It &apos; s O &apos; Neill &apos; s"
    assert moses.normalise_punctuation('"yes".', "en") == '"yes."'
    assert moses.normalise_punctuation('"ja."', "de") == '"ja".'
    assert moses.normalise_punctuation("10\xa0000", "en") == "10.000"
    assert moses.normalise_punctuation("10\xa0000", "de") == "10,000"
    assert moses.tokenise("am 3. Mai, bzw. No. 5", "de") == "am 3. Mai , bzw. No. 5"
    assert moses.tokenise("on 3. May, bzw. No. 5", "en") == "on 3 . May , bzw . No. 5"


def test_hyphens_split_words_and_html_is_escaped():
    assert moses.tokenise("well-known - A&B <b>", "en") == (
        "well @-@ known - A &amp; B &lt; b &gt;"
    )


def test_invisible_characters_become_spaces():
    line = "soft\u00adhyphen, zero\u200bwidth, \ufeffmark, bell\x07, private\ue000"
    assert moses.remove_non_printing(line) == "soft hyphen, zero width,  mark, bell , private "


# --- properties -----------------------------------------------------------------------------------


def random_lines(count):
    """Strings of everything that some rule looks at; the same at every run."""
    generator = random.Random(3)
    alphabet = [*"aB5ßя中ア가é²\u0301 \t\xa0\u2009\u200b\x01''\"\"..,,--()[]<>&|%$€„“’»«…"]
    alphabet += ["z.B.", "Dr.", "No.", "'s ", ' "', '."', ".' ", " ,", "&amp;", "..."]
    for _ in range(count):
        yield "".join(generator.choices(alphabet, k=generator.randint(1, 14)))


def lines_of(language):
    return [row["line"] for row in HARD_LINES if row["language"] == language]


@pytest.mark.parametrize("language", ["en", "de"])
def test_no_character_is_lost_between_tokens_and_text(language):
    for line in [*lines_of(language), *random_lines(1000)]:
        if "DOTMULTI" in line or "@-@" in line:
            continue  # the scripts' own marks, which they do not protect
        text = moses.detokenise(moses.tokenise(line, language), language)
        assert text.replace(" ", "") == re.sub(r"[\s\x00-\x1f]", "", line), line


@pytest.mark.parametrize("language", ["en", "de"])
def test_tokens_hold_single_spaces_and_nothing_invisible(language):
    for line in [*lines_of(language), *random_lines(1000)]:
        for tokens in (moses.training_tokens(line, language), moses.test_tokens(line, language)):
            assert tokens == " ".join(tokens.split())
            assert not re.search(r"[<>'\"|\[\]\x00-\x1f]", tokens)
        tokens = moses.training_tokens(line, language)
        assert moses.remove_non_printing(tokens) == tokens


@pytest.mark.parametrize(
    ("language", "line"),
    [
        ("en", "He said that Dr. Smith's well-known car (the red one) cost $5,000.50 in 1999!"),
        ("en", '"I don\'t know," she said; the boys\' answer was: "R & D, 50% of it."'),
        ("de", "Am 3. Mai kam z.B. die E-Mail-Adresse (von Dr. Müller) um 5.000,50 m bzw. 3%?"),
        ("de", 'Er sagte: "Das weiß ich nicht", und sie: "Straße & Haus".'),
    ],
)
def test_ordinary_text_survives_tokens_and_back(language, line):
    for make in (moses.tokenise, moses.training_tokens, moses.test_tokens):
        tokens = make(line, language)
        assert moses.detokenise(tokens, language) == line
        assert make(moses.detokenise(tokens, language), language) == tokens


def test_a_line_of_nothing_has_no_tokens():
    for empty in ("", " ", "\u200b", "\x01"):
        assert moses.training_tokens(empty, "de") == ""
    assert moses.detokenise("", "de") == moses.detokenise(" ", "de") == ""


def test_a_line_of_markup_is_not_detokenised():
    assert moses.detokenise("<seg id = 1 > a . </seg>", "en") == "<seg id = 1 > a . </seg>"
    assert moses.detokenise("<a> b .", "en") == "<a> b."


# --- use ------------------------------------------------------------------------------------------


def test_functions_are_picklable_and_map_over_processes():
    lines = lines_of("de")[:20]
    tokens = functools.partial(moses.training_tokens, language="de")
    for function in (moses.training_tokens, moses.test_tokens, moses.detokenise):
        assert pickle.loads(pickle.dumps(function)) is function
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(tokens, lines) == [tokens(line) for line in lines]


@pytest.mark.parametrize(
    "function",
    [moses.normalise_punctuation, moses.tokenise, moses.detokenise, moses.training_tokens],
)
def test_without_sacremoses_the_error_names_the_cure(function, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacremoses", None)
    for cached in ("_punctuation_rules", "_tokeniser", "_detokeniser"):
        monkeypatch.setattr(moses, cached, getattr(moses, cached).__wrapped__)
    with pytest.raises(UserError, match=r"pip install 'fairseq-sparsemixer\[wmt\]'"):
        function("A line.", "en")


def test_importing_needs_neither_fairseq_nor_sacremoses():
    code = (
        "import sys; sys.modules.update(fairseq=None, sacremoses=None)\n"
        "from fairseq_sparsemixer.text import moses\n"
        "print(moses.remove_non_printing('a\\x00b'))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "a b\n"), result.stderr
