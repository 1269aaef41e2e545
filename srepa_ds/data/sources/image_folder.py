"""The source `image_folder`: a folder for each class, with images in it or below it."""

import hashlib
import os
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from srepa_ds.data.sources.source import SourceItem
from srepa_ds.errors import DataError
from srepa_ds.schema import Section


class ImageFolderConfig(Section):
    """A folder with a folder of images for each class, such as ImageNet's `train`."""

    kind: Literal["image_folder"]
    """Every folder in it is a class; labels are their places in the order of their names."""
    path: Path
    """The folder that holds the folders of the classes."""

    def opened(self) -> "ImageFolder":
        """Returns the source; raises DataError if the folder cannot be read or has no images."""
        return ImageFolder(self.path)


class ImageFolder:
    """Images in a folder for each class."""

    latents = None

    def __init__(self, root: Path):
        self._root = root
        suffixes = {name for name, _ in Image.registered_extensions().items()}
        found = []
        for folder, folders, names in os.walk(root):
            folders.sort()
            place = Path(folder).relative_to(root)
            found += [
                (place / name).as_posix()
                for name in names
                if place.parts and Path(name).suffix.lower() in suffixes
            ]
        self._keys = sorted(found)
        if not found:
            raise DataError(f"{root}: holds no folder of images")
        self.class_ids = tuple(sorted({key.split("/")[0] for key in self._keys}))
        self.class_names = self.class_ids
        numbers = {name: number for number, name in enumerate(self.class_ids)}
        self.labels = torch.tensor([numbers[key.split("/")[0]] for key in self._keys])

    @property
    def fingerprint(self) -> str:
        """The hash of all names and sizes."""
        sizes = [f"{key}\0{(self._root / key).stat().st_size}" for key in self._keys]
        return hashlib.sha256("\n".join(sizes).encode()).hexdigest()[:16]

    def key(self, index: int) -> str:
        """Returns the path of an image inside the folder."""
        return self._keys[index]

    def item(self, index: int) -> SourceItem:
        """Returns one image, as the contents of its file; raises DataError."""
        try:
            return SourceItem((self._root / self._keys[index]).read_bytes())
        except OSError as error:
            raise DataError(error.strerror or str(error)) from error
