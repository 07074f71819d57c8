"""What stands on a page, by Python's own parser."""

import base64
import re
from html.parser import HTMLParser

VOID = {"meta", "img", "wbr"}
HARMLESS = "html head meta title style body main header h1 h2 p b div span details summary figure figcaption img"
HARMLESS += " table tr th td wbr"


class Reader(HTMLParser):
    """Checks that tags are closed in order, and keeps what it has seen."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], {}, []
        self.feed(text)
        self.close()
        assert self.open == [], "not closed"

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in {*self.open}:
            self.texts[tag][-1] += data


def folded(text):
    """The parts that are folded, by what they are called."""
    reader = Reader(text)
    assert all("open" not in attributes for tag, attributes in reader.tags if tag == "details")
    return reader.texts.get("summary", [])


def assert_self_contained(text, pictures):
    """The page is well-formed; nothing on it is loaded, sent or run; all that it shows is in it, in words too."""
    tags = Reader(text).tags
    images = [attributes for tag, attributes in tags if tag == "img"]
    assert len(images) == pictures
    for image in images:
        assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
        assert len(image["alt"]) > 20
    assert {tag for tag, _ in tags} <= {*HARMLESS.split()}
    for tag, attributes in tags:
        assert tag == "img" or not attributes.keys() & {"src", "srcset", "data", "action", "background", "href"}
        assert not any(name.startswith("on") or "refresh" in str(value) for name, value in attributes.items())
    for image in images:
        text = text.replace(image["src"], "")
    assert not re.search(r"https?:|//|url\(|@import|data:", text)
