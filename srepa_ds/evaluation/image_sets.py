"""The forms of image sets: ADM's archive, a folder of image files, shards, a sample set."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from numpy import ndarray
from torch import Tensor

from srepa_ds.data.contents import IndexedFile
from srepa_ds.data.index_document import INDEX_NAME
from srepa_ds.data.shards import Parts, ShardDataset
from srepa_ds.encoders.published import local_file
from srepa_ds.errors import DataError
from srepa_ds.evaluation.file_images import FileImages
from srepa_ds.evaluation.images import ImageSet, StoredImages, Stripe
from srepa_ds.files import looked_for
from srepa_ds.sampling.image_archive import ImageArchive
from srepa_ds.sampling.outputs.content import regrouped
from srepa_ds.sampling.outputs.png import LABELS
from srepa_ds.sampling.outputs.table import OUTPUTS
from srepa_ds.sampling.sample_set import PROVENANCE, SAMPLES


class NpzImages(StoredImages):
    """The images of an archive as ADM's evaluator reads it."""

    def __init__(self, path: Path):
        """Reads headers and labels; raises DataError."""
        self._archive = ImageArchive(path)
        super().__init__(len(self._archive))

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
    def _contents(self) -> dict[str, Any]:
        path = self._archive.path
        return {
            "file": path.name,
            "bytes": path.stat().st_size,
            "contents": self._archive.contents,
        }

    def _blocks(self, size: int, stripe: Stripe) -> Iterator[tuple[Tensor, Tensor | None, int]]:
        """Yields the blocks of `stripe`; all other images are read past."""
        labels = None if self._archive.labels is None else torch.from_numpy(self._archive.labels)
        groups = self._indices.split(size)
        for number, rows in enumerate(self._rows(size)):
            if stripe.has(number):
                images = torch.from_numpy(rows).permute(0, 3, 1, 2).contiguous()
                yield images, None if labels is None else labels[groups[number]], number * size

    def _rows(self, size: int) -> Iterator[ndarray]:
        blocks = self._archive.blocks(size)
        return blocks if self._takes_all else regrouped(self._wanted(blocks), size)

    def _wanted(self, blocks: Iterator[ndarray]) -> Iterator[ndarray]:
        start = 0
        for rows in blocks:
            first, end = torch.searchsorted(
                self._indices, torch.tensor([start, start + len(rows)])
            ).tolist()
            yield rows[(self._indices[first:end] - start).numpy()]
            start += len(rows)


class ShardImages(StoredImages):
    """The images of a data set that `srepa-ds prepare`, or `sample`, has written."""

    def __init__(self, folder: Path):
        """Opens the data set; raises DataError."""
        self.dataset = ShardDataset(folder, parts=Parts(moments=False))
        self.dataset.require_images("the extractor looks at images")
        super().__init__(len(self.dataset))

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
    def _contents(self) -> dict[str, Any]:
        return {"dataset_id": self.dataset.index.dataset_id}

    def _blocks(self, size: int, stripe: Stripe) -> Iterator[tuple[Tensor, Tensor | None, int]]:
        for indices, start in self._groups(size, stripe):
            batch = self.dataset.read(indices)
            yield batch.pixels, batch.labels, start


def open_images(path: Path, *, setting: str) -> ImageSet:
    """Returns the images at `path`: an archive, a sample set, shards, or a folder of files.

    Of a sample set, the first of its `OUTPUTS` that is there is read. A name of `WEB_FILES` stands
    for what was fetched. Raises DataError, which names the `setting`, if there are none.
    """
    path = local_file(path, setting=setting)
    try:
        path = _place_of_images(path)
        if path.is_file():
            return NpzImages(path)
        if (path / INDEX_NAME).is_file():
            return ShardImages(path)
        if path.is_dir():
            return FileImages(path)
    except DataError as error:
        raise DataError(f"{setting}: {error}") from error
    raise DataError(
        f"{setting}: {path}: no such file or folder{looked_for(path)}; give images, or draw them "
        "with `srepa-ds sample CONFIG`"
    )


def _place_of_images(path: Path) -> Path:
    """Returns where the images of a sample set lie, and any other path as it is.

    Raises DataError for a set that is not finished.
    """
    if (path / INDEX_NAME).is_file():
        return path
    if (path / SAMPLES).is_file():
        return path / SAMPLES
    # A folder of pictures that `sample` wrote has a provenance of its own, and labels.
    if not (path / PROVENANCE).is_file() or (path / LABELS).is_file():
        return path
    for output in OUTPUTS.values():
        if output.is_there(path):
            return path / output.name
    raise DataError(
        f"{path}: holds a sample set that is not finished; run `srepa-ds sample CONFIG` again"
    )
