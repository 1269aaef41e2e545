"""Folders that take their name only when everything in them is written."""

import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from srepa_ds.errors import OutputError, listed
from srepa_ds.files import flush_to_disk

# What desktops leave in folders that people look at.
_OF_SYSTEMS = (".DS_Store", "Thumbs.db", "desktop.ini")


def write_whole_folder(
    place: Path, write: Callable[[Path], object], *, names: Collection[str]
) -> None:
    """Writes `place`, an existing folder that this process has claimed, as a whole.

    `write` makes the folder it is given, `.<name>.writing` beside `place`, which then takes the
    name. What was there stays whole up to a kill between two renames, and then lies beside as
    `.<name>.replaced`. Such folders of killed processes are removed if they hold nothing but
    `names`. Raises OutputError if they hold anything else, what `write` raises, and OSError;
    `place` is then as it was.
    """
    aside = place.with_name(f".{place.name}.writing")
    earlier = place.with_name(f".{place.name}.replaced")
    _refuse_hidden(place, names)
    if os.path.lexists(earlier) and not any(place.iterdir()):
        # A kill between the two renames: that is the only one.
        _refuse_others(earlier, names)
        os.rename(earlier, place)
    for left in (aside, earlier):
        _remove_leftover(left, names)
    try:
        write(aside)
        flush_to_disk(aside)
        os.rename(place, earlier)
        try:
            os.rename(aside, place)
        except OSError:
            os.rename(earlier, place)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    flush_to_disk(place.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def _refuse_hidden(place: Path, names: Collection[str]) -> None:
    """Raises OutputError for a folder that is more than an export, such as a clone of git's."""
    hidden = sorted(p.name for p in place.iterdir() if p.name not in {*names, *_OF_SYSTEMS})
    if hidden:
        raise OutputError(
            f"{place} holds {listed(hidden, most=3)}, which would go with the earlier export; "
            "choose another export.folder"
        )
    if Path.cwd().is_relative_to(place):
        raise OutputError(
            f"{place} is where this command runs, and is replaced as a whole; choose another "
            "export.folder"
        )


def _remove_leftover(left: Path, names: Collection[str]) -> None:
    if os.path.lexists(left):
        _refuse_others(left, names)
        shutil.rmtree(left)


def _refuse_others(left: Path, names: Collection[str]) -> None:
    if left.is_symlink() or not left.is_dir() or not {p.name for p in left.iterdir()} <= {*names}:
        raise OutputError(f"{left} is in the way of the export; move it elsewhere")
