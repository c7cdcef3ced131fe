"""A page of HTML as text and outline."""

import collections
import html.parser
import re


class Outline(html.parser.HTMLParser):
    """What a page is made of; complains about tags that do not match."""

    VOID = ("meta", "link", "br", "hr", "img", "input")

    def __init__(self, text):
        super().__init__()
        self.ids, self.addresses, self.open, self.tags = [], [], [], collections.Counter()
        self.headings, self.scopeless, self.text = [], 0, []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags[tag] += 1
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag not in self.VOID:
            self.open.append(tag)
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            if attributes.get(name):
                self.addresses.append(attributes[name])
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        self.scopeless += tag == "th" and "scope" not in attributes

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.text.append(data)


def words_of(path):
    """The text of a page, with single spaces (of which those that do not break stay)."""
    return re.sub("[ \n]+", " ", " ".join(Outline(path.read_text(encoding="utf-8")).text))
