"""The second pass: encodes the images of finished shards, shard by shard."""

from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.data.contents import check_contents
from srepa_ds.data.headers import rows_of
from srepa_ds.data.latent_file import latent_forms, write_latents
from srepa_ds.data.prepared_folder import PreparedFolder
from srepa_ds.data.receipts import LatentReceipt
from srepa_ds.data.shard_file import number_of
from srepa_ds.data.shard_index import LatentDescription
from srepa_ds.data.shards import ShardDataset


@dataclass(frozen=True)
class LatentPass:
    """Writes the latents of one part of a data set."""

    codec: LatentCodec
    dataset: ShardDataset
    folder: PreparedFolder
    described: LatentDescription
    batch_size: int

    def write(self, numbers: Iterable[int]) -> Generator[int, None, None]:
        """Writes the latents of shards `numbers`; yields how many images were encoded each time.

        Raises OutputError, and DataError for a damaged shard or latents that are not finite.
        """
        entries = self.dataset.index.shards
        places = {number_of(entry.file): place for place, entry in enumerate(entries)}
        for number in numbers:
            yield from self._write(number, places[number])

    def _write(self, number: int, place: int) -> Generator[int, None, None]:
        """Writes the latents of shard `number`, which is at `place` in the index."""
        # The file will say that it holds the latents of these contents.
        check_contents(self.dataset.indexed_files[place])
        entry = self.dataset.index.shards[place]
        # In the precision that is stored: that is all that is kept of a shard in memory.
        rows = rows_of(latent_forms(self.described, entry.num_samples))
        latents = {name: row.empty(entry.num_samples) for name, row in rows.items()}
        done = 0
        # Closed here: a generator that an error leaves waiting would keep its thread.
        with closing(self._images(self._batches(place))) as batches:
            for images in batches:
                self._encode(images, {name: whole[done:] for name, whole in latents.items()})
                done += len(images)
                yield len(images)
        written = write_latents(
            self.folder.folder,
            number,
            self.described,
            latents["moments"],
            latents.get("moments_mirrored"),
            shard_sha256=entry.sha256,
            concurrent=self.folder.is_shared,
        )
        receipt = LatentReceipt(latents=written, described=self.described)
        self.folder.note_latents(number, receipt)

    def _images(self, batches: Sequence[Tensor]) -> Generator[Tensor, None, None]:
        """Yields the images of each batch of samples; a thread decodes the next batch meanwhile."""
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self._decoded, batches[0])
            for samples in batches[1:]:
                images, coming = coming.result(), pool.submit(self._decoded, samples)
                yield images
            yield coming.result()

    def _decoded(self, samples: Tensor) -> Tensor:
        return self.dataset.read(samples).pixels

    def _encode(self, images: Tensor, room: dict[str, Tensor]) -> None:
        room["moments"][: len(images)] = self.codec.moments(images)
        if "moments_mirrored" in room:
            room["moments_mirrored"][: len(images)] = self.codec.moments(images.flip(3))

    def _batches(self, place: int) -> tuple[Tensor, ...]:
        """Returns the samples of a shard in batches, the same for any number of ranks."""
        counts = [entry.num_samples for entry in self.dataset.index.shards]
        start = sum(counts[:place])
        return torch.arange(start, start + counts[place]).split(self.batch_size)
