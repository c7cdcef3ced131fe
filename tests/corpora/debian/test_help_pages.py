"""LibreOffice's help."""

import pytest
from support.debian import help_page

from fairseq_sparsemixer.corpora.cleaning import SentencePair
from fairseq_sparsemixer.corpora.debian import help_pages

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
