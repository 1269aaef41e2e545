"""The source `archive`: a zip or tar of such a tree as `image_folder` reads, not extracted."""

from pathlib import Path
from typing import Literal

from srepa_ds.data.sources.entries import Contents, Entry, Reader, safe_name
from srepa_ds.data.sources.listing import (
    ListedSource,
    is_image,
    is_litter,
    listed_by_class,
    reading,
)
from srepa_ds.data.sources.source import SourceItem
from srepa_ds.data.sources.tar_file import read_tar_entry, tar_contents
from srepa_ds.data.sources.zip_file import read_zip_entry, zip_contents
from srepa_ds.errors import DataError, listed
from srepa_ds.schema import Section

_ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06")


class ArchiveConfig(Section):
    """A zip or an uncompressed tar with a folder of images for each class."""

    kind: Literal["archive"]
    """The archive is not extracted. A tar of tars, as ImageNet's `ILSVRC2012_img_train.tar`, has a
    class for each tar in it. An archive with links, or paths that lead out of it, is refused."""
    path: Path
    """The archive."""
    within: str | None = None
    """The folder in the archive that holds the folders of the classes. Without it: the outermost
    that holds more than one folder, such as `train` if all images are below it."""

    def opened(self) -> "Archive":
        """Returns the source; raises DataError if the archive cannot be read or has no images."""
        return Archive(self.path, within=self.within)


class Archive(ListedSource):
    """Images in an archive, in a folder for each class."""

    def __init__(self, path: Path, *, within: str | None = None):
        """Lists the images; raises DataError."""
        self._path = path
        with reading(path, needs="a zip or tar"):
            contents, self._read = _contents(path)
        files = {
            entry.name: entry
            for entry in contents.files
            if is_image(entry.name) and not any(map(is_litter, entry.name.split("/")))
        }
        folders = _folders(contents, files)
        prefix = _root(path, folders, files, within)
        self._entries = {
            name.removeprefix(prefix): entry
            for name, entry in files.items()
            if name.startswith(prefix) and "/" in name.removeprefix(prefix)
        }
        classes = {
            name.removeprefix(prefix).partition("/")[0]
            for name in folders
            if name.startswith(prefix)
        }
        if not classes:
            raise DataError(f"{path}: holds no folder of images; each class needs a folder")
        sizes = [(name, entry.size) for name, entry in self._entries.items()]
        super().__init__(path, *listed_by_class(sizes, classes))

    def item(self, index: int) -> SourceItem:
        """Returns one image, as the contents of its file; raises DataError."""
        return SourceItem(self._read(self._path, self._entries[self.key(index)]))


def _contents(path: Path) -> tuple[Contents, Reader]:
    """Returns what the archive holds; raises OSError and DataError."""
    with path.open("rb") as file:
        is_zip = file.read(4) in _ZIP_MAGICS
    if is_zip:
        return zip_contents(path), read_zip_entry
    return tar_contents(path), read_tar_entry


def _folders(contents: Contents, files: dict[str, Entry]) -> set[str]:
    """Returns all folders of the archive, whether it lists them or only files in them."""
    folders = {name for name in contents.folders if name}
    folders |= {name.rpartition("/")[0] for name in files if "/" in name}
    with_parents = set()
    for name in folders:
        parts = name.split("/")
        if not any(map(is_litter, parts)):
            with_parents |= {"/".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return with_parents


def _root(path: Path, folders: set[str], files: dict[str, Entry], within: str | None) -> str:
    """Returns the folder that holds the folders of the classes, as the beginning of their names."""
    if within is not None:
        root = safe_name(path, within)
        if root and root not in folders:
            known = listed(sorted(name for name in folders if "/" not in name))
            raise DataError(f"{path}: holds no folder {root!r}; it holds {known}")
        return f"{root}/" if root else ""
    with_images = {name.rpartition("/")[0] for name in files}
    root = ""
    while True:
        prefix = f"{root}/" if root else ""
        inside = [
            name for name in folders if name.startswith(prefix) and "/" not in name[len(prefix) :]
        ]
        # One folder alone is that of all classes, unless it holds images itself.
        if len(inside) != 1 or inside[0] in with_images or root in with_images:
            return prefix
        root = inside[0]
