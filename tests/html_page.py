"""A page as its tags and texts; a page whose tags do not close in order is refused."""

import json
from html.parser import HTMLParser


class Page(HTMLParser):
    """Every tag with its attributes, the texts by tag, and whether tags close in order."""

    VOID = ("meta", "link", "input", "img", "line", "rect", "circle", "polyline", "br")

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.open = [], {}, []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)

    @property
    def data(self):
        return json.loads(next(text for text in self.text["script"] if text.startswith("{")))
