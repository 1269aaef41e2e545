import io
from html.parser import HTMLParser

from PIL import Image

from srepa_ds.report.markup import Markup, element, image, joined, note, png_of, section, table


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def read(markup):
    reader = Reader()
    reader.feed(markup)
    reader.close()
    return reader


NASTY = "<script>alert('1 & \"2\"')</script>"


def test_text_and_attributes_survive_as_text():
    reader = read(element("p", NASTY, element("b", NASTY), title=NASTY))
    assert reader.tags == [("p", {"title": NASTY}), ("b", {})]
    assert reader.text == NASTY * 2


def test_every_way_of_adding_text_escapes():
    parts = [note(NASTY), section("a", NASTY, NASTY), table([(NASTY, NASTY)], header=(NASTY,))]
    reader = read(joined(NASTY, *parts))
    assert "script" not in [tag for tag, _ in reader.tags]
    assert reader.text == NASTY * 7


def test_markup_is_not_escaped_twice():
    assert joined(joined("<"), Markup("<b>")) == "&lt;<b>"


def test_attribute_names():
    markup = element("source", class_="a", data_name="b", media=None)
    assert markup == '<source class="a" data-name="b">'


def test_a_note_is_one_line():
    assert read(note("one\n  two\tthree")).text == "one two three"


def test_a_picture_for_each_screen():
    light, dark = (png_of(Image.new("RGB", (2, 3), colour)) for colour in ("white", "black"))
    assert Image.open(io.BytesIO(light)).size == (2, 3)
    reader = read(image(light, alt=NASTY, dark=dark))
    assert [tag for tag, _ in reader.tags] == ["picture", "source", "img"]
    assert reader.tags[1][1]["media"] == "(prefers-color-scheme: dark)"
    assert reader.tags[1][1]["srcset"] != reader.tags[2][1]["src"]
    assert reader.tags[2][1]["alt"] == NASTY
