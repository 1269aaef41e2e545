"""HTML built of elements: text is escaped unless it is markup already."""

import base64
import html
import io
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import ParamSpec

from PIL import Image

from srepa_ds.errors import SRepaError

log = logging.getLogger("srepa_ds")
P = ParamSpec("P")

_VOID = frozenset({"img", "meta", "source"})


class Markup(str):
    """Text that is HTML already."""


def element(tag: str, /, *children: str, **attributes: str | None) -> Markup:
    """Returns an element around `children`, in which all text but `Markup` is escaped.

    A trailing underscore in an attribute's name is dropped (`class_`), and an attribute that is
    None is left out.
    """
    opening = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        return Markup(f"<{tag}{opening}>")
    return Markup(f"<{tag}{opening}>{joined(*children)}</{tag}>")


def joined(*children: str) -> Markup:
    """Returns `children` one after the other, escaped unless they are markup."""
    return Markup("".join(c if isinstance(c, Markup) else html.escape(c) for c in children))


def section(name: str, title: str, *children: str) -> Markup:
    """Returns a section with a heading and the id `name`."""
    return element("section", element("h2", title), *children, id=name)


def note(text: str) -> Markup:
    """Returns a one-line note about something missing or doubtful."""
    return element("p", " ".join(text.split()), class_="note")


def or_note(name: str, build: Callable[P, Markup], *args: P.args, **kwargs: P.kwargs) -> Markup:
    """Returns `build(*args, **kwargs)`, or a note with the SRepaError that it raises."""
    try:
        return build(*args, **kwargs)
    except SRepaError as error:
        log.warning("the report has no %s: %s", name, error)
        return note(f"No {name}: {error}")


def details(summary: str, text: str) -> Markup:
    """Returns preformatted `text`, folded under `summary`."""
    return element("details", element("summary", summary), element("pre", text))


def table(rows: Iterable[Sequence[str]], *, header: Sequence[str] = ()) -> Markup:
    """Returns a table whose first column names the rows; it scrolls if wider than the page."""
    head = [element("tr", *(element("th", cell, scope="col") for cell in header))] if header else []
    body = [
        element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in rest))
        for first, *rest in rows
    ]
    return element("div", element("table", *head, *body), class_="scroll")


def image(png: bytes, *, alt: str, class_: str | None = None, dark: bytes | None = None) -> Markup:
    """Returns a picture embedded in the page; `dark` replaces it on a dark screen."""
    light = element("img", src=_data(png), alt=alt, class_=class_)
    if dark is None:
        return light
    other = element("source", srcset=_data(dark), media="(prefers-color-scheme: dark)")
    return element("picture", other, light)


def png_of(picture: Image.Image) -> bytes:
    """Returns `picture` as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
