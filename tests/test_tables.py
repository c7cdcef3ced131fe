"""Tables as text and as Markdown."""

import re

import pytest

from fairseq_sparsemixer.tables import escape, markdown

HOSTILE = [
    "a|b",
    "`code`",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "&lt;b&gt;",
    "[link](javascript:x)",
    "*bold* _too_ ~~gone~~",
    "back\\|slash\\",
    "two\nlines\r\nand\u2028three",
]


def cells_of(line):
    r"""As GitHub's Markdown splits a row: at each | that has no \ before it."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", re.sub(r"\\\\", "\0", line))[1:-1]]


def shown(markup):
    """What is shown of text in which nothing is markup but backslashes."""
    assert not re.search(r"(?<!\\)[`*\[\]<&~]", re.sub(r"\\\\", "\0", markup)), markup
    return re.sub(r"\\([^a-zA-Z0-9\s])", r"\1", markup.replace("\0", "\\\\"))


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_users_is_shown_as_it_is(text):
    lines = markdown([["model", "loss"], [escape(text), "1.0"], ["b", "2"]]).split("\n")
    assert len(lines) == 4
    assert len({len(cells_of(line)) for line in lines}) == 1
    cell, number = cells_of(lines[2])
    assert shown(cell) == " ".join(text.splitlines())
    assert number == "1.0"


def test_names_stay_readable():
    for name in ("sparsemixer-4-seed1", "checkpoint_best.pt", "runs/wmt14/base", 'x="{a: 1}"'):
        assert escape(name) == name


def test_markup_of_our_own_is_kept():
    assert "| `switch` |" in markdown([["router"], ["`switch`"]])
