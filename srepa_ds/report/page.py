"""The page around the sections: one file, no script, nothing fetched, light and dark."""

import importlib.util
from collections.abc import Iterable

from srepa_ds.errors import SRepaError
from srepa_ds.report.markup import Markup, element, joined

# The page fetches nothing, whatever text of a run ends up in it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1d2127; --soft: #5d6673; --line: #dfe3e8; --paper: #fdfdfc; --panel: #f4f5f6;
  --accent: #1a5fb4; --doubt: #8a5a00; --doubt-paper: #fdf4df;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e7eb; --soft: #9aa4b1; --line: #343a42; --paper: #15181c; --panel: #1d2126;
    --accent: #7fb5f5; --doubt: #e9c46a; --doubt-paper: #2b2415;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 68rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%;
}
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 {
  font-size: 1.25rem; margin: 3rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line);
}
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
.mode { color: var(--soft); font-size: 1.1rem; margin-bottom: 1.5rem; }
.soft, figcaption, small { color: var(--soft); }
.note {
  color: var(--doubt); background: var(--doubt-paper); max-width: none;
  margin: 1rem 0; padding: .5rem .75rem; border-radius: .35rem; overflow-wrap: anywhere;
}
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; }
th, td {
  text-align: left; vertical-align: top; padding: .3rem 1.5rem .3rem 0;
  border-bottom: 1px solid var(--line);
}
th { font-weight: 500; color: var(--soft); }
th[scope=row] { white-space: nowrap; }
td { overflow-wrap: anywhere; min-width: 4rem; }
.scores td { font-size: 1.25rem; font-weight: 600; white-space: nowrap; }
.scores td ~ td { font-size: .9rem; font-weight: 400; color: var(--soft); white-space: normal; }
.scores th, .scores td { vertical-align: middle; }
@media (max-width: 40rem) {
  .scores tr {
    display: grid; grid-template-columns: 1fr auto; align-items: baseline;
    padding: .4rem 0; border-bottom: 1px solid var(--line);
  }
  .scores th, .scores td { border: 0; padding: 0; text-align: right; }
  .scores th, .scores td ~ td { text-align: left; }
  .scores td ~ td { grid-column: 1 / -1; }
}
.bar { display: flex; align-items: center; gap: .6rem; width: 16rem; }
.bar i { height: .6rem; background: var(--accent); border-radius: .15rem; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .875rem; line-height: 1.4; }
img { display: block; max-width: 100%; }
.panels, .sheets, .cards { display: grid; gap: 1.5rem; margin: 1rem 0; }
.panels { grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); }
.panels figcaption { display: flex; justify-content: space-between; gap: 1rem; }
.panels figcaption b { color: var(--ink); font-weight: 600; }
.panels img { width: 100%; }
.sheets { grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
.sheets img { width: 100%; margin-bottom: .5rem; border-radius: .25rem; }
.sheets .note { align-self: start; margin: 0; }
.cards { grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); }
.card { background: var(--panel); border-radius: .5rem; padding: .9rem; }
.before { display: flex; gap: .75rem; align-items: center; margin-bottom: .9rem; }
.before img { width: 4.5rem; border-radius: .2rem; }
.maps { display: grid; gap: .35rem; grid-template-columns: repeat(var(--columns), 1fr); }
.maps span { font-size: .75rem; line-height: 1.25; align-self: end; }
.maps small { display: block; }
.maps img { width: 100%; border-radius: .15rem; }
.pixels { image-rendering: pixelated; }
.scale { display: flex; align-items: center; gap: .6rem; font-size: .875rem; }
.scale img { width: 8rem; height: .7rem; border-radius: .15rem; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--accent); }
pre {
  overflow-x: auto; background: var(--panel); padding: 1rem; border-radius: .35rem;
  font: .8125rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
}
"""


def page(title: str, *, header: Markup, sections: Iterable[Markup]) -> str:
    """Returns the whole document."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        # A style sheet is not text of the document: escaping would change it.
        element("style", Markup(_STYLE)),
    )
    body = element("body", element("header", header), element("main", *sections))
    return joined(Markup("<!DOCTYPE html>\n"), element("html", head, body, lang="en")) + "\n"


def require_matplotlib() -> None:
    """Checks that matplotlib is installed; raises SRepaError."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SRepaError(
            "the report draws with matplotlib, which is not installed; install the extra: "
            "pip install 'srepa_ds[demo]'"
        )
