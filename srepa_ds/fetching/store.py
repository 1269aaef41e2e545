"""Puts what is downloaded into the folder of fetched things: whole, or not at all."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from srepa_ds.encoders.fetched import (
    Fetched,
    FetchedDocument,
    fetched_folder,
    read_fetched,
    write_fetched,
)
from srepa_ds.encoders.publications import Published
from srepa_ds.errors import OutputError
from srepa_ds.files import PARTIAL, claimed, make_folder, writing

_CURE = "free some space, or set SREPA_FETCHED to a folder you may write to"


@runtime_checkable
class Plan(Protocol):
    """What there is to fetch of one published thing."""

    @property
    def published(self) -> Published:
        """The thing."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all its files."""

    @property
    def source(self) -> str:
        """Its address."""

    def fetch(self, folder: Path) -> Fetched:
        """Downloads its files into `folder` and returns what they are."""


def check_space(plans: Sequence[Plan]) -> None:
    """Raises OutputError if the disk has less space than `plans` take."""
    root = fetched_folder().absolute()
    needed = sum(plan.num_bytes for plan in plans)
    with writing(root, cure=_CURE):
        free = shutil.disk_usage(next(path for path in (root, *root.parents) if path.exists())).free
    if needed > free:
        raise OutputError(
            f"cannot write {root}: {needed / 1e9:,.2f} GB are to be fetched, and its disk has "
            f"{free / 1e9:,.2f} GB; {_CURE}"
        )


def bring(plan: Plan) -> Path:
    """Fetches the files of `plan`, and returns their folder.

    They come into a folder with another name, from which the next call goes on if this one ends
    early. Raises DataError as `plan.fetch` does, OutputError if the folder cannot be written or
    another process fetches into it.
    """
    root = fetched_folder()
    folder = root / plan.published.folder_name
    coming = folder.with_name(folder.name + PARTIAL)
    with claimed(root, doing="fetching into", cure=_CURE), writing(coming, cure=_CURE):
        make_folder(coming)
        try:
            entry = plan.fetch(coming)
        finally:
            _remove_without_progress(coming)
        _remove_others(coming, entry)
        _publish(coming, folder, entry)
    return folder


def _publish(coming: Path, folder: Path, entry: Fetched) -> None:
    """Gives the files their place, after `fetched.json` describes them."""
    root = folder.parent
    if folder.exists():
        shutil.rmtree(folder)
    document = read_fetched(root)
    known = {**document.fetched, folder.name: entry}
    write_fetched(root, FetchedDocument(fetched=known))
    coming.replace(folder)


def _remove_others(coming: Path, entry: Fetched) -> None:
    """Removes the notes of the Hub's client, and files of an earlier revision."""
    wanted = {parent for name in entry.files for parent in (Path(name), *Path(name).parents)}
    # Folders before what is in them, which may then be gone.
    for path in sorted(coming.rglob("*")):
        if path.relative_to(coming) not in wanted and path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remove_without_progress(coming: Path) -> None:
    """Removes the folder if it holds no file, whole or in part, with which the next call goes on.

    The Hub's client leaves notes in a hidden folder, and in some versions parts of files.
    """
    if not any(path.name[0] != "." for path in coming.iterdir()):
        if not any(coming.rglob("*.incomplete")):
            shutil.rmtree(coming, ignore_errors=True)
