"""`srepa-ds version`: the installed packages beside the versions this release was tested with."""

import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from srepa_ds import __version__
from srepa_ds.errors import DataError
from srepa_ds.files import shipped_with_package

TESTED = Path("constraints/tested.txt")
_BROUGHT_ALONG = ("triton",)
"""Packages that compute for us in a version that another package chooses."""


class Version(NamedTuple):
    """A package that srepa_ds or one of its extras requires."""

    package: str
    installed: str | None
    tested: str | None

    @property
    def note(self) -> str:
        """A remark on the installed version; empty if it is the tested one."""
        if self.installed is None:
            return "not installed"
        if self.tested is None:
            return "not tested"
        return "" if self.installed.partition("+")[0] == self.tested else "differs"


def version() -> str:
    """Returns the table that `srepa-ds version` prints.

    Raises DataError if the package is not, or only partly, installed.
    """
    return table(versions())


def versions() -> list[Version]:
    """Returns a row for every package in setup.cfg outside the extra `dev`, sorted by name."""
    tested = _tested()
    names = sorted({*_required(), *_BROUGHT_ALONG})
    return [Version(name, _installed(name), tested.get(_normal(name))) for name in names]


def table(rows: list[Version]) -> str:
    """Returns the rows as aligned lines, headed by the versions of srepa_ds and Python."""
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
        requirements = metadata.requires("srepa_ds") or ()
    except metadata.PackageNotFoundError:
        raise DataError("srepa_ds is not installed; run `pip install --editable .`") from None
    for requirement in requirements:
        if not re.search(r"extra == ['\"]dev['\"]", requirement):
            yield re.split(r"[^\w.-]", requirement)[0]


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
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
