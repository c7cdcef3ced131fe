"""A miniature of the archive of IWSLT14 German-English, with the true names."""

from support import statmt

PATH = "/fairseq/data/iwslt14/de-en.tgz"
TEST_SETS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
DROPPED = [
    ("Zu lang für das andere: eins zwei drei vier fünf sechs", "Too short."),
    ("Wort " * 176, "word " * 176),
    ("", "Nothing on the other side."),
]


def talks():
    """Pairs of German and English of the training text, those that are dropped last."""
    pairs = [(german, english) for english, german in statmt.sentences(200, 11)]
    return [*pairs, ("Er sagte: <b>Ja</b> & „Nein“.", "He’d say: <b>yes</b> & “no”."), *DROPPED]


def test_pairs():
    """Those of each test set, in order."""
    return {
        name: [(german, f"It’s {english}") for english, german in statmt.sentences(6, 20 + number)]
        for number, name in enumerate(TEST_SETS)
    }


def members():
    """What is in the archive: tagged training text, and an XML file for each test set."""
    files = {"de-en/README": b"Not wanted.\n", "de-en/IWSLT14.TED.tst2013.de-en.de.xml": b"<a>\n"}
    for side, language in enumerate(("de", "en")):
        said = [pair[side] for pair in talks()]
        head = [
            "<url>http://example.org/talks/1</url>",
            "<keywords>talks, words</keywords>",
            "<talkid>1</talkid>",
            f"<title>{said[0]}</title>",
            f"<description>{said[1]}</description>",
        ]
        lines = [*head, *(f" {line} " for line in said[2:])]
        files[f"de-en/train.tags.de-en.{language}"] = "".join(f"{x}\n" for x in lines).encode()
        for name, pairs in test_pairs().items():
            segments = statmt.sgm([(pair[side],) for pair in pairs], 0)
            files[f"de-en/IWSLT14.{name}.de-en.{language}.xml"] = b"<?xml?>\n" + segments
    return files
