"""Reads data sets: shards of images and labels, and the latents beside them.

A folder holds `shard-00000.safetensors`, ..., perhaps `latents-00000.safetensors`, ..., and
`index.json`, which is written last: a folder without one is not a data set.
"""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64, UInt8
from PIL import Image
from torch import Tensor

from srepa_ds.data.batch import Batch
from srepa_ds.data.contents import IndexedFile, are_small, check_contents
from srepa_ds.data.headers import rows_of
from srepa_ds.data.latent_file import check_latents, indexed_latents, latent_forms
from srepa_ds.data.pixels import decode_into, import_decoder
from srepa_ds.data.reading import Reading
from srepa_ds.data.sample_files import Row, SampleFiles
from srepa_ds.data.shard_file import check_labels, check_shard, indexed_shards, shard_forms
from srepa_ds.data.shard_index import LatentIndex, ShardIndex, again, read_index
from srepa_ds.data.token_store import TokenStore
from srepa_ds.errors import DataError

log = logging.getLogger("srepa_ds")


class Parts(NamedTuple):
    """The parts of a sample that `ShardDataset.read` returns, where the data set has them."""

    images: bool = True
    moments: bool = True


EVERY_PART = Parts()


class ShardDataset:
    """An open folder of shards; opening it checks every header and reads no pixel."""

    def __init__(
        self,
        folder: Path,
        token_stores: Sequence[TokenStore | None] = (),
        *,
        parts: Parts = EVERY_PART,
        index: ShardIndex | None = None,
    ):
        """Opens `folder`; `read` returns `parts`, and the tokens of `token_stores`.

        `index` replaces the folder's own, which may not be written yet. Raises DataError naming
        the first file that contradicts the index, or the first store that belongs to other images.
        """
        self.folder = folder
        self.index: ShardIndex = read_index(folder) if index is None else index
        self._reads_images = parts.images and self.index.pixels is not None
        shards = self.index.shards
        counts = [entry.num_samples for entry in shards]
        self._files = SampleFiles(
            [check_shard(folder, self.index, entry) for entry in shards],
            counts,
            rows_of(shard_forms(shards[0], self.index)),
        )
        self._latents = self._open_latents(counts) if parts.moments else None
        self._token_stores = tuple(token_stores)
        for store in self._token_stores:
            if store is not None:
                store.check_fits(self.index, folder)

    def __len__(self) -> int:
        return self.index.num_samples

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of the images, also of those that are not stored."""
        return self.index.image_shape

    def require_images(self, why: str) -> None:
        """Checks that the data set holds images; raises DataError, which says what they are for."""
        if self.index.pixels is None:
            raise DataError(
                f"{self.folder}: holds latents without images, and {why}; prepare it with images "
                "(pixels: webp)"
            )

    @property
    def latents(self) -> LatentIndex | None:
        """The latents of the data set, if they were encoded."""
        return self.index.latents

    @property
    def num_classes(self) -> int:
        """Number of classes; every label is below it."""
        return self.index.num_classes

    @property
    def labels(self) -> Int64[Tensor, " samples"]:
        """The labels of the whole data set."""
        return self._files.tensor("labels")

    @property
    def indexed_files(self) -> tuple[IndexedFile, ...]:
        """The hash that the index gives for each shard, and each file of latents."""
        latents = indexed_latents(self.folder, self.index.latents)
        return indexed_shards(self.folder, self.index) + latents

    def read(
        self,
        indices: Int64[Tensor, " batch"],
        *,
        positions: Int64[Tensor, " batch"] | None = None,
        mirrored: Bool[Tensor, " batch"] | None = None,
    ) -> Batch:
        """Returns the samples `indices`, in their order; `positions` default to the indices.

        Where `mirrored`, the sample is that of the image mirrored left to right. Raises IndexError
        outside [0, len), and DataError for a file that can no longer be read.
        """
        moments = None if self._latents is None else self._moments(self._latents, indices, mirrored)
        return Batch(
            images=self._images(indices, mirrored) if self._reads_images else None,
            moments=moments,
            latent_values=self.latents.values if self.latents else "moments",
            labels=self._files.kept(indices, "labels"),
            sample_ids=indices,
            positions=indices if positions is None else positions,
            teacher_tokens=tuple(s if s is None else s.read(indices) for s in self._token_stores),
        )

    def keys(self, indices: Int64[Tensor, " batch"]) -> list[str]:
        """Returns the names that the samples have in their source.

        Data sets of format 1 keep no names: there it is the number. Raises as `read` does.
        """
        if self.index.version == 1:
            return [str(number) for number in indices.tolist()]
        blobs = self._files.blobs(indices, "key")
        return [blob.numpy().tobytes().decode(errors="replace") for blob in blobs]

    def read_by(self, reading: Reading) -> "ShardDataset":
        """Returns the same data set, with its own open files, read in another way."""
        other = copy.copy(self)
        other._files = self._files.read_by(reading)
        other._latents = self._latents and self._latents.read_by(reading)
        other._token_stores = tuple(s and s.read_by(reading) for s in self._token_stores)
        return other

    def make_ready(self) -> None:
        """Loads what processes forked afterwards can share; raises DataError.

        That is the decoder, the labels and the places of images: 16 bytes a sample.
        """
        is_encoded = self._reads_images and self.index.pixels != "raw"
        self._files.keep("labels", *(["image_ends"] if is_encoded else []))
        if is_encoded:
            import_decoder(str(self.index.pixels))

    def compare_if_small(self) -> None:
        """Compares the shards with the index if that takes a moment, and says so otherwise.

        Raises DataError naming the first shard that is damaged.
        """
        if not are_small(self.indexed_files):
            log.info("%s: not compared with its index; `srepa-ds verify` does it", self.folder)
            return
        for file in self.indexed_files:
            check_contents(file)

    def samples_in(self, path: Path) -> range | None:
        """Returns the samples of which a part lies in a file, None for any other file."""
        counts = [entry.num_samples for entry in self.index.shards]
        latents = self.index.latents.files if self.index.latents else ()
        entries = [(self.folder, self.index.shards), (self.folder, latents)]
        entries += [(store.folder, store.index.files) for store in self._token_stores if store]
        for folder, files in entries:
            end = 0
            for entry, count in zip(files, counts, strict=False):
                start, end = end, end + count
                if folder / entry.file == path:
                    return range(start, end)
        return None

    def verify(self) -> None:
        """Checks the hash of every file and the labels of every shard; reads the whole data set.

        Raises DataError naming the first file that is damaged.
        """
        for file in self.indexed_files:
            check_contents(file)
        for number, entry in enumerate(self.index.shards):
            labels = self._files.tensor("labels", file=number)
            check_labels(self.folder / entry.file, labels, num_classes=self.num_classes)

    def _open_latents(self, counts: Sequence[int]) -> SampleFiles | None:
        latents = self.index.latents
        if latents is None:
            return None
        files = [
            check_latents(self.folder, latents, entry, num_samples=count)
            for entry, count in zip(latents.files, counts, strict=True)
        ]
        return SampleFiles(files, counts, rows_of(latent_forms(latents, counts[0])))

    def _images(
        self, indices: Int64[Tensor, " batch"], mirrored: Bool[Tensor, " batch"] | None
    ) -> UInt8[Tensor, "batch 3 height width"]:
        if self.index.pixels == "raw":
            images = self._files.gather(indices, names={"images"})["images"]
        else:
            images = self._decoded(indices)
        if mirrored is not None:
            images[mirrored] = images[mirrored].flip(3)
        return images

    def _decoded(self, indices: Int64[Tensor, " batch"]) -> UInt8[Tensor, "batch 3 height width"]:
        images = Row(torch.uint8, self.image_shape).empty(len(indices))
        contents = self._files.blobs(indices, "image")
        for room, blob, index in zip(images, contents, indices.tolist(), strict=True):
            try:
                decode_into(room, blob, str(self.index.pixels))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise DataError(
                    f"{self.folder}: the image of sample {index} cannot be decoded ({error}); "
                    f"{again(self.folder)}"
                ) from error
        return images

    def _moments(
        self,
        files: SampleFiles,
        indices: Int64[Tensor, " batch"],
        mirrored: Bool[Tensor, " batch"] | None,
    ) -> Tensor:
        if mirrored is None or not mirrored.any():
            return files.gather(indices, names={"moments"})["moments"]
        plain = files.gather(indices[~mirrored], names={"moments"})["moments"]
        turned = files.gather(indices[mirrored], names={"moments_mirrored"})["moments_mirrored"]
        moments = plain.new_empty((len(indices), *plain.shape[1:]))
        moments[~mirrored], moments[mirrored] = plain, turned
        return moments
