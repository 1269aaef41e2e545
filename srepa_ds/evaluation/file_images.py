"""The images of a folder of files, as an image set."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srepa_ds.data.decoding import decoded
from srepa_ds.data.images import as_rgb
from srepa_ds.data.sources.image_file import image_file
from srepa_ds.data.sources.listing import is_image, is_litter
from srepa_ds.errors import DataError, SourceError
from srepa_ds.evaluation.images import StoredImages, Stripe
from srepa_ds.files import looked_for, reason_of, sha256_of
from srepa_ds.sampling.image_archive import checked_labels
from srepa_ds.sampling.outputs.png import LABELS, PngContent
from srepa_ds.sampling.sample_set import PROVENANCE

MOST_HASHED = 10_000
"""Files whose contents are hashed; of more, evenly spread ones, beside the sizes of all."""

_THREADS = 8


class FileImages(StoredImages):
    """The image files of a folder, in the order of their names, and of folders in it.

    Labels are read where `sample` has written them beside its pictures.
    """

    def __init__(self, folder: Path):
        """Lists the files and reads the first; raises DataError if there is none."""
        self._folder = folder
        try:
            names = [path for path in folder.rglob("*") if is_image(path.name) and path.is_file()]
        except OSError as error:
            raise DataError(f"{folder}: {reason_of(error)}") from error
        inside = (path.relative_to(folder) for path in names)
        self._names = sorted(name for name in inside if not any(map(is_litter, name.parts)))
        if not self._names:
            raise DataError(
                f"{folder}: holds no images{looked_for(folder)}; give a folder of PNG or JPEG "
                "files, an .npz, or shards"
            )
        super().__init__(len(self._names))
        self._labels = self._read_labels()
        height, width = self._read(self._names[0]).shape[1:]
        self._image_shape = (3, height, width)

    @property
    def where(self) -> str:
        """The path of the folder."""
        return str(self._folder)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        return self._image_shape

    @cached_property
    def _contents(self) -> dict[str, Any]:
        """The number of files, and a hash of names, sizes and the contents of `MOST_HASHED`."""
        found = hashlib.sha256()
        count = min(len(self._names), MOST_HASHED)
        spread = {number * len(self._names) // count for number in range(count)}
        try:
            for name in self._names:
                found.update(os.fsencode(name) + b"\0")
                found.update(b"%d\n" % (self._folder / name).stat().st_size)
            paths = [self._folder / self._names[number] for number in sorted(spread)]
            with ThreadPoolExecutor(_THREADS) as pool:
                for contents in pool.map(sha256_of, paths):
                    found.update(contents.encode())
        except OSError as error:
            raise DataError(f"{error.filename}: {reason_of(error)}") from error
        return {"files": len(self._names), "contents": found.hexdigest()[:16]}

    def _blocks(self, size: int, stripe: Stripe) -> Iterator[tuple[Tensor, Tensor | None, int]]:
        for indices, start in self._groups(size, stripe):
            images = [self._checked(self._names[index]) for index in indices.tolist()]
            labels = None if self._labels is None else self._labels[indices]
            yield torch.stack(images), labels, start

    def _read_labels(self) -> Tensor | None:
        # Other programs give files of this name other contents.
        if not ((self._folder / LABELS).is_file() and (self._folder / PROVENANCE).is_file()):
            return None
        try:
            labels = checked_labels(PngContent(self._folder).labels, len(self._names))
        except ValueError as error:
            raise DataError(
                f"{self._folder / LABELS}: {error}; remove it, or correct it"
            ) from error
        return torch.from_numpy(labels)

    def _checked(self, name: Path) -> Tensor:
        image = self._read(name)
        if image.shape != self.image_shape:
            _, height, width = self.image_shape
            raise DataError(
                f"{self._folder / name}: has {image.shape[1]} x {image.shape[2]} pixels, and "
                f"{self._names[0]} has {height} x {width}; scores need images of one size"
            )
        return image

    def _read(self, name: Path) -> Tensor:
        try:
            image = decoded(image_file(self._folder / name, root=self._folder))
        except SourceError:
            raise
        except DataError as error:
            raise DataError(f"{self._folder / name}: {error}; remove or replace it") from error
        return torch.from_numpy(np.array(as_rgb(image))).permute(2, 0, 1).contiguous()
