"""The source `image_folder`: a folder for each class, with images in it or below it."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from srepa_ds.data.sources.image_file import image_file
from srepa_ds.data.sources.listing import (
    ListedSource,
    is_image,
    is_litter,
    listed_by_class,
    listing_shown,
    reading,
)
from srepa_ds.data.sources.source import SourceItem
from srepa_ds.errors import DataError, listed
from srepa_ds.files import reason_of
from srepa_ds.schema import Section

log = logging.getLogger("srepa_ds")

# Sizes take a request each, for which network disks need milliseconds.
_THREADS = 16


class ImageFolderConfig(Section):
    """A folder with a folder of images for each class, such as ImageNet's `train`."""

    kind: Literal["image_folder"]
    """Every folder in it is a class, one without images too; labels are their places in the order
    of their names, as in torchvision's `ImageFolder`. Hidden files and folders, `__MACOSX`, files
    with other endings and images beside the folders are left out."""
    path: Path
    """The folder that holds the folders of the classes."""
    follow_links: bool = False
    """Whether links may lead out of the folder. Those that stay inside are always followed."""

    def opened(self) -> "ImageFolder":
        """Returns the source; raises DataError if the folder cannot be read or has no images."""
        return ImageFolder(self.path, follow_links=self.follow_links)


class ImageFolder(ListedSource):
    """Images in a folder for each class."""

    def __init__(self, root: Path, *, follow_links: bool = False):
        """Lists the images; raises DataError."""
        self._root = root
        scan = _Scan(os.path.realpath(root), follow_links)
        found = _Found()
        with reading(root, needs="a folder"):
            classes = _classes(root, scan, found)
            with ThreadPoolExecutor(_THREADS) as pool:
                each = pool.map(scan.below, classes)
                for one in listing_shown(each, root, "folders of classes"):
                    found.add(one)
        if found.bad_links:
            raise DataError(
                f"{root}: {listed(sorted(found.bad_links))}; remove such links, or replace them by "
                "what they lead to; source.follow_links: true allows those that lead out"
            )
        if not classes:
            raise DataError(f"{root}: holds no folder of images; each class needs a folder")
        self._unreadable = found.unreadable
        super().__init__(root, *listed_by_class(found.sizes, [place.key for place in classes]))
        _mention_empty(root, self.class_ids, set(self.labels.tolist()))

    def item(self, index: int) -> SourceItem:
        """Returns one image, as the contents of its file; raises DataError."""
        key = self.key(index)
        if reason := self._unreadable.get(key):
            raise DataError(reason)
        return SourceItem(image_file(self._root / key, root=self._root))


class _Place(NamedTuple):
    """A folder of the tree."""

    key: str
    path: str
    real: str
    came_from: tuple[str, ...] = ()
    """The real folders of the links that led here."""


@dataclass
class _Found:
    """What a folder and those below it hold."""

    sizes: list[tuple[str, int]] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    bad_links: list[str] = field(default_factory=list)

    def add(self, other: "_Found") -> None:
        self.sizes += other.sizes
        self.unreadable |= other.unreadable
        self.bad_links += other.bad_links


@dataclass(frozen=True)
class _Scan:
    """Lists the folder `root`, whose path has no links."""

    root: str
    follow_links: bool

    def below(self, place: _Place) -> _Found:
        """Returns what a folder holds; raises OSError."""
        found, waiting = _Found(), [place]
        while waiting:
            folder = waiting.pop()
            with os.scandir(folder.path) as entries:
                for entry in entries:
                    if is_litter(entry.name):
                        continue
                    key = f"{folder.key}/{entry.name}"
                    if _is_folder(entry):
                        waiting += self.folder(entry, key, folder, found)
                    elif is_image(entry.name) and _is_file_or_lost(entry):
                        found.sizes.append((key, self._size(entry, key, found)))
        return found

    def folder(
        self, entry: os.DirEntry[str], key: str, parent: _Place, found: _Found
    ) -> list[_Place]:
        """Returns the folder that `entry` is, or is a link to; none if the link is refused."""
        if not entry.is_symlink():
            place = os.path.join(parent.real, entry.name)
            return [_Place(key, entry.path, place, parent.came_from)]
        real = os.path.realpath(entry.path)
        came_from = (*parent.came_from, parent.real)
        if any(_is_within(place, real) for place in came_from):
            found.bad_links.append(f"{key} is a link to a folder around it, {real}")
        elif not self.follow_links and not _is_within(real, self.root):
            found.bad_links.append(f"{key} is a link out of the folder, to {real}")
        else:
            return [_Place(key, entry.path, real, came_from)]
        return []

    def _size(self, entry: os.DirEntry[str], key: str, found: _Found) -> int:
        if entry.is_symlink():
            real = os.path.realpath(entry.path)
            if not self.follow_links and not _is_within(real, self.root):
                found.unreadable[key] = (
                    f"is a link out of the folder, to {real}; source.follow_links allows it"
                )
                return -1
        try:
            return entry.stat().st_size
        except OSError as error:
            found.unreadable[key] = reason_of(error)
            return -1


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # Of a link to itself, `entry.is_dir` raises OSError.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_file_or_lost(entry: os.DirEntry[str]) -> bool:
    """Returns whether it is a file, or a link to nothing; not a pipe, whose reader would wait."""
    if not entry.is_symlink():
        return entry.is_file()
    return os.path.isfile(entry.path) or not os.path.exists(entry.path)


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def _classes(root: Path, scan: _Scan, found: _Found) -> list[_Place]:
    """Returns the folders of the classes, and logs how many images lie beside them."""
    top, beside, classes = _Place("", str(root), scan.root), 0, []
    with os.scandir(root) as entries:
        for entry in entries:
            if is_litter(entry.name):
                continue
            if _is_folder(entry):
                classes += scan.folder(entry, entry.name, top, found)
            beside += is_image(entry.name) and _is_file_or_lost(entry)
    if beside and classes:
        log.info("%s: images beside the folders of classes are left out (%d)", root, beside)
    return classes


def _mention_empty(root: Path, ids: tuple[str, ...], labels: set[int]) -> None:
    empty = [name for label, name in enumerate(ids) if label not in labels]
    if empty:
        log.info(
            "%s: %s has no images, and still a label of its own; remove folders that are not "
            "classes",
            root,
            listed(empty),
        )
