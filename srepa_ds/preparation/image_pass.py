"""The first pass: makes shards of the images of a source, and latents where they come along.

Latents come along if the source holds them, or if images are not stored, so that no second pass
could read them.
"""

import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from srepa_ds.data.decoding import decoded
from srepa_ds.data.images import center_crop
from srepa_ds.data.latent_file import write_latents
from srepa_ds.data.pixels import Pixels
from srepa_ds.data.prepared_folder import LatentReceipt, PreparedFolder, ShardReceipt, Skipped
from srepa_ds.data.shard_index import LatentDescription, ShardEntry
from srepa_ds.data.shard_writer import StoredSample, as_stored, write_shard
from srepa_ds.data.sources.source import Source, SourceItem
from srepa_ds.errors import DataError, SourceError
from srepa_ds.preparation.encoder import Encoder
from srepa_ds.preparation.parts import Part

_NAMES_OF_OBJECTS = re.compile(r" ?<[\w.]+ object at 0x[0-9a-f]+>")

READ_PER_THREAD = 4
"""Samples read ahead by each thread."""


class _Read(NamedTuple):
    """What became of one sample of the source: what its shard holds, or why it cannot be read."""

    stored: StoredSample | None = None
    pixels: Pixels | None = None
    """The image, if it is still to be encoded."""
    latents: tuple[Tensor | None, Tensor | None] = (None, None)
    """The source's latents of the image and of the mirrored image."""
    failure: str = ""


@dataclass(frozen=True)
class ImagePass:
    """Writes the shards of one part, one piece of the source after another."""

    source: Source
    part: Part
    folder: PreparedFolder
    skips: bool
    """Whether images that cannot be read are noted and left out."""
    latents: LatentDescription | None = None
    """The latents that come along; None if there are none, or if they are made afterwards."""
    encoder: Encoder | None = None
    """Encodes the images; None if the source holds the latents."""

    def write(self, numbers: Iterable[int], *, threads: int) -> Generator[int, None, None]:
        """Writes the shards `numbers`; yields the number of samples read each time, which is 1.

        Raises OutputError, and DataError for an image that cannot be read unless those are skipped.
        """
        pool = ThreadPoolExecutor(threads)
        try:
            for number in numbers:
                found: list[_Read] = []
                skipped: list[Skipped] = []
                indices = self.part.of_shard(number)
                for index, read in zip(indices, self._ahead(pool, indices, threads), strict=True):
                    if read.stored is not None:
                        found.append(self._encoded(read))
                        yield 1
                        continue
                    key = self.source.key(index)
                    if not self.skips:
                        raise DataError(
                            f"{key}: {read.failure}; mend the source, or set on_error=skip to "
                            "leave such images out; finished shards stay"
                        )
                    skipped.append(Skipped(key=key, reason=read.failure))
                    yield 1
                entry = self._write(number, found) if found else None
                self.folder.note(number, ShardReceipt(shard=entry, skipped=tuple(skipped)))
        finally:
            # Also where the caller stops early: another rank may have failed.
            pool.shutdown(cancel_futures=True)

    def _ahead(
        self, pool: ThreadPoolExecutor, indices: Sequence[int], threads: int
    ) -> Iterator[_Read]:
        """Yields what is read of each sample, in order; a bounded number is read ahead."""
        window = READ_PER_THREAD * threads + (self.encoder.batch_size if self.encoder else 0)
        waiting: deque[Future[_Read]] = deque()
        for index in indices:
            waiting.append(pool.submit(self._read, index))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _write(self, number: int, found: list[_Read]) -> ShardEntry:
        folder, is_shared = self.folder.folder, self.folder.is_shared
        samples = [read.stored for read in found if read.stored is not None]
        entry = write_shard(folder, number, samples, self.folder.description, concurrent=is_shared)
        if self.latents is not None:
            encoded = self.encoder.finish() if self.encoder else _stacked(found)
            latents = write_latents(
                folder,
                number,
                self.latents,
                *encoded,
                shard_sha256=entry.sha256,
                concurrent=is_shared,
            )
            receipt = LatentReceipt(latents=latents, described=self.latents)
            self.folder.note_latents(number, receipt)
        return entry

    def _encoded(self, read: _Read) -> _Read:
        """Hands an image to the encoder, and returns the rest of what was read."""
        if self.encoder is None:
            return read
        assert read.pixels is not None
        self.encoder.add(read.pixels)
        return read._replace(pixels=None)

    def _read(self, index: int) -> _Read:
        try:
            item = self.source.item(index)
            label, key = int(self.source.labels[index]), self.source.key(index)
            described, pixels = self.part.description, self._pixels(item)
            image = None if pixels is None else as_stored(pixels, described)
        except SourceError:
            raise
        except DataError as error:
            # Python's names of objects differ from run to run, and the list of images must not.
            reason = _NAMES_OF_OBJECTS.sub("", str(error))
            # A link may lead to a name that is not Unicode.
            return _Read(failure=reason.encode(errors="backslashreplace").decode())
        except MemoryError as error:
            raise SourceError(
                f"{self.source.key(index)}: there is no memory to decode it; set threads to less, "
                "and run the same command again"
            ) from error
        return _Read(
            StoredSample(image, label, key),
            pixels if self.encoder else None,
            (item.moments, item.moments_mirrored),
        )

    def _pixels(self, item: SourceItem) -> Pixels | None:
        """Returns the image's centre crop, None if it is not needed; raises DataError."""
        described = self.part.description
        is_needed = described.pixels is not None or self.encoder is not None
        if not is_needed or item.image is None:
            return None
        image = decoded(item.image) if isinstance(item.image, bytes) else item.image
        height, width = described.image_shape[1:]
        if item.moments is not None and image.size != (width, height):
            raise DataError(
                f"has {image.width} x {image.height} pixels, and its latent is of the whole image; "
                f"set image_size to match (it is {height})"
            )
        return center_crop(image, height)


def _stacked(found: Sequence[_Read]) -> tuple[Tensor, Tensor | None]:
    """Returns the latents of the source, and of the mirrored images if it holds them."""
    plain = [read.latents[0] for read in found if read.latents[0] is not None]
    mirrored = [read.latents[1] for read in found if read.latents[1] is not None]
    return torch.stack(plain), torch.stack(mirrored) if mirrored else None
