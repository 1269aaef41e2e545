"""The forms of image sets: ADM's archive, a folder of image files, shards."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srepa_ds.data.contents import IndexedFile
from srepa_ds.data.decoding import decoded
from srepa_ds.data.images import as_rgb
from srepa_ds.data.index_document import INDEX_NAME
from srepa_ds.data.shards import Parts, ShardDataset
from srepa_ds.data.sources.image_file import image_file
from srepa_ds.data.sources.listing import is_image, is_litter
from srepa_ds.encoders.published import local_file
from srepa_ds.errors import DataError, SourceError
from srepa_ds.evaluation.images import WHOLE, ImageBlock, ImageSet, Stripe
from srepa_ds.files import looked_for, reason_of
from srepa_ds.sampling.image_archive import ImageArchive
from srepa_ds.sampling.sample_set import PROVENANCE, SAMPLES


class NpzImages:
    """The images of an archive as ADM's evaluator reads it."""

    def __init__(self, path: Path):
        """Reads headers and labels; raises DataError."""
        self._archive = ImageArchive(path)

    def __len__(self) -> int:
        return len(self._archive)

    @property
    def where(self) -> str:
        """The path of the archive."""
        return str(self._archive.path)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        _, height, width, channels = self._archive.shape
        return channels, height, width

    @property
    def identity(self) -> dict[str, Any]:
        """Name and size of the file; its contents are read as they are scored."""
        path = self._archive.path
        return {"file": path.name, "bytes": path.stat().st_size}

    def blocks(self, size: int, stripe: Stripe = WHOLE) -> Iterator[ImageBlock]:
        """Yields the blocks that belong to `stripe`; all others are read past.

        Raises DataError if the archive is damaged.
        """
        start, labels = 0, self._archive.labels
        for number, rows in enumerate(self._archive.blocks(size)):
            ids = torch.arange(start, start + len(rows))
            start += len(rows)
            if stripe.has(number):
                images = torch.from_numpy(rows).permute(0, 3, 1, 2).contiguous()
                own = None if labels is None else torch.from_numpy(labels)[ids]
                yield ImageBlock(images, own, ids)


class FileImages:
    """The image files of a folder, in the order of their names, and of folders in it."""

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
        height, width = self._read(self._names[0]).shape[1:]
        self.image_shape = (3, height, width)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def where(self) -> str:
        """The path of the folder."""
        return str(self._folder)

    @property
    def identity(self) -> dict[str, Any]:
        """A hash of the files' names."""
        names = "\n".join(str(name) for name in self._names)
        return {"files": len(self), "names_sha256": hashlib.sha256(names.encode()).hexdigest()[:16]}

    def blocks(self, size: int, stripe: Stripe = WHOLE) -> Iterator[ImageBlock]:
        """Yields the blocks that belong to `stripe`.

        Raises DataError for a broken file, or one of another size than the first.
        """
        for number, start in enumerate(range(0, len(self), size)):
            if stripe.has(number):
                ids = torch.arange(start, min(start + size, len(self)))
                images = [self._checked(self._names[index]) for index in ids.tolist()]
                yield ImageBlock(torch.stack(images), None, ids)

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


class ShardImages:
    """The images of a data set that `srepa-ds prepare`, or `sample`, has written."""

    def __init__(self, folder: Path, *, chosen: Tensor | None = None):
        """Opens the data set; `chosen` are the indices of some of its images. Raises DataError."""
        self.dataset = ShardDataset(folder, parts=Parts(moments=False))
        self.dataset.require_images("the extractor looks at images")
        self._chosen = torch.arange(len(self.dataset)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @property
    def where(self) -> str:
        """The path of the folder."""
        return str(self.dataset.folder)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        return self.dataset.image_shape

    @property
    def indexed_files(self) -> tuple[IndexedFile, ...]:
        """The hash that the index gives for each file."""
        return self.dataset.indexed_files

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of the data set."""
        return {"dataset_id": self.dataset.index.dataset_id}

    def blocks(self, size: int, stripe: Stripe = WHOLE) -> Iterator[ImageBlock]:
        """Yields the blocks that belong to `stripe`; raises DataError."""
        for number, indices in enumerate(self._chosen.split(size)):
            if stripe.has(number):
                batch = self.dataset.read(indices)
                ids = torch.arange(number * size, number * size + len(indices))
                yield ImageBlock(batch.pixels, batch.labels, ids)


def open_images(path: Path, *, setting: str) -> ImageSet:
    """Returns the images at `path`: an archive, a sample set, shards, or a folder of files.

    A name of `WEB_FILES` stands for what was fetched. Raises DataError, which names the `setting`,
    if there are none.
    """
    path = local_file(path, setting=setting)
    try:
        if path.is_file():
            return NpzImages(path)
        if (path / INDEX_NAME).is_file():
            return ShardImages(path)
        if (path / SAMPLES).is_file():
            return NpzImages(path / SAMPLES)
        if (path / PROVENANCE).is_file():
            raise DataError(
                f"{path}: holds a sample set that is not finished; run `srepa-ds sample CONFIG` "
                "again"
            )
        if path.is_dir():
            return FileImages(path)
    except DataError as error:
        raise DataError(f"{setting}: {error}") from error
    raise DataError(
        f"{setting}: {path}: no such file or folder{looked_for(path)}; give images, or draw them "
        "with `srepa-ds sample CONFIG`"
    )
