"""The files of a sweep's folder: `sweep.json`, `sweep.md`, `sweep.html`, a picture per point."""

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from srepa_ds.evaluation.sweep_rows import SweepRow, write_rows
from srepa_ds.files import write_aside, writing
from srepa_ds.report.markup import png_of
from srepa_ds.report.sweep import contact_strip, markdown, sweep_page

CURE = "choose another sweep.folder, or fix its permissions"


def publish(
    folder: Path,
    rows: Sequence[SweepRow],
    done: Sequence[SweepRow],
    labels: Sequence[str],
    *,
    images: UInt8[Tensor, "images 3 height width"] | None = None,
) -> None:
    """Writes all files; each is whole at any moment, and the table follows the pictures.

    `rows` are all of the folder, `done` those of this sweep, which the pages show; `images` are the
    first of the last one, None if they are there already. Raises OutputError.
    """
    with writing(folder, cure=CURE):
        if images is not None:
            png = png_of(contact_strip(images))
            write_aside(folder / done[-1].picture, lambda aside: aside.write_bytes(png))
        write_rows(folder, rows)
        _write(folder / "sweep.md", markdown(done, labels))
        _write(folder / "sweep.html", sweep_page(done, labels, folder=folder))


def _write(path: Path, text: str) -> None:
    # A run's name may be no Unicode.
    content = text.encode("utf-8", errors="replace")
    write_aside(path, lambda aside: aside.write_bytes(content))
