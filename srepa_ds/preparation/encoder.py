"""Encodes images as they come, in batches that no shard shares."""

import torch
from torch import Tensor

from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.data.pixels import Pixels
from srepa_ds.distributed.heartbeat import moved


class Encoder:
    """Collects the images of one shard and encodes each full batch of them."""

    def __init__(self, codec: LatentCodec, *, batch_size: int, mirrored: bool):
        """With `mirrored`, the mirrored images are encoded too."""
        self._codec = codec
        self.batch_size = batch_size
        self._mirrored = mirrored
        self._waiting: list[Tensor] = []
        self._plain: list[Tensor] = []
        self._turned: list[Tensor] = []

    def add(self, image: Pixels) -> None:
        """Takes the next image of the shard."""
        self._waiting.append(torch.from_numpy(image).permute(2, 0, 1))
        if len(self._waiting) == self.batch_size:
            self._encode()

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """Returns the moments of all images of the shard, and of their mirrored ones.

        The next image begins another shard.
        """
        if self._waiting:
            self._encode()
        plain, turned = torch.cat(self._plain), self._turned
        found = plain, torch.cat(turned) if turned else None
        self._plain, self._turned = [], []
        return found

    def _encode(self) -> None:
        images = torch.stack(self._waiting)
        self._waiting = []
        self._plain.append(self._codec.moments(images).cpu())
        if self._mirrored:
            self._turned.append(self._codec.moments(images.flip(3)).cpu())
        moved()
