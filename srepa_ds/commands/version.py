"""Which packages are installed, beside those that this release was tested with."""

import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

from srepa_ds import __version__
from srepa_ds.errors import DataError
from srepa_ds.files import shipped_with_package

TESTED = Path("constraints/tested.txt")
_BROUGHT_ALONG = ("triton",)
"""Packages that compute for us, whose version another package chooses."""


class Version(NamedTuple):
    """A package that this one, or one of its extras, needs."""

    package: str
    installed: str | None
    tested: str | None

    @property
    def note(self) -> str:
        """What stands out: the empty string for the version that was tested."""
        if self.installed is None:
            return "not installed"
        if self.tested is None:
            return "not tested"
        return "" if self.installed.partition("+")[0] == self.tested else "differs"


def versions() -> list[Version]:
    """Returns a row for every package of setup.cfg, those of the extra `dev` left out, by name.

    Raises DataError where the package is not, or not wholly, installed.
    """
    tested = _tested()
    names = sorted({*_required(), *_BROUGHT_ALONG})
    return [Version(name, _installed(name), tested.get(_normal(name))) for name in names]


def table(rows: list[Version]) -> str:
    """Returns the rows as aligned lines, below a line with the versions of srepa_ds and Python."""
    cells = [("package", "installed", "tested with", "")]
    cells += [(row.package, row.installed or "-", row.tested or "-", row.note) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    return "\n".join([f"srepa_ds {__version__}, Python {platform.python_version()}", "", *lines])


def _required() -> Iterator[str]:
    try:
        requirements = requires("srepa_ds") or ()
    except PackageNotFoundError:
        raise DataError("srepa_ds is not installed; run `pip install --editable .`") from None
    for requirement in requirements:
        if not re.search(r"extra == ['\"]dev['\"]", requirement):
            yield re.split(r"[^\w.-]", requirement)[0]


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _tested() -> dict[str, str]:
    path = shipped_with_package(TESTED)
    if path is None:
        raise DataError(f"{TESTED} is missing from the installation; install srepa_ds again")
    lines = path.read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if "==" in line)
    return {_normal(name): pin.strip() for name, pin in pins}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
