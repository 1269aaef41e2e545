"""The second pass: encodes the images of finished shards, shard by shard."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.data.contents import check_contents
from srepa_ds.data.latent_file import write_latents
from srepa_ds.data.prepared_folder import LatentReceipt, PreparedFolder
from srepa_ds.data.shard_index import LatentDescription
from srepa_ds.data.shards import ShardDataset
from srepa_ds.distributed.heartbeat import moved


@dataclass(frozen=True)
class LatentPass:
    """Writes the latents of one part of a data set."""

    codec: LatentCodec
    dataset: ShardDataset
    folder: PreparedFolder
    described: LatentDescription
    batch_size: int

    def write(self, numbers: Iterable[int]) -> Iterator[int]:
        """Writes the latents of shards `numbers`; yields how many images were encoded each time.

        Raises OutputError, and DataError for a damaged shard or latents that are not finite.
        """
        for number in numbers:
            entry = self.dataset.index.shards[number]
            # The file will say that it holds the latents of these contents.
            check_contents(self.dataset.indexed_files[number])
            plain: list[Tensor] = []
            mirrored: list[Tensor] = []
            for samples in self._batches(number):
                images = self.dataset.read(samples).pixels
                plain.append(self.codec.moments(images).cpu())
                if self.described.mirrored:
                    mirrored.append(self.codec.moments(images.flip(3)).cpu())
                moved()
                yield len(samples)
            latents = write_latents(
                self.folder.folder,
                number,
                self.described,
                torch.cat(plain),
                torch.cat(mirrored) if mirrored else None,
                shard_sha256=entry.sha256,
                concurrent=self.folder.is_shared,
            )
            receipt = LatentReceipt(latents=latents, described=self.described)
            self.folder.note_latents(number, receipt)

    def _batches(self, number: int) -> tuple[Tensor, ...]:
        """Returns the samples of a shard in batches, the same for any number of ranks."""
        counts = [entry.num_samples for entry in self.dataset.index.shards]
        start = sum(counts[:number])
        return torch.arange(start, start + counts[number]).split(self.batch_size)
