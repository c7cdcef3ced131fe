"""Sentences of the dictionary Ding."""

import pytest

from fairseq_sparsemixer.corpora.cleaning import SentencePair
from fairseq_sparsemixer.corpora.debian import ding

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
