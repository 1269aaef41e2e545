"""Passes a batch from a worker to its rank in one piece of shared memory.

Each tensor that travels by itself costs both processes a file descriptor and a connection, 0.3 ms
or so; a batch of latents is read in less.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from srepa_ds.data.batch import Batch
from srepa_ds.data.stored_tokens import StoredTokens

_ALIGNMENT = 64


class _Place(NamedTuple):
    """A tensor's place in the buffer."""

    field: str
    store: int | None
    """The number of the token store whose field it is; None for the batch's own."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def of(self, buffer: Tensor) -> Tensor:
        """Returns the tensor there, which shares the memory."""
        size = self.dtype.itemsize * math.prod(self.shape)
        return buffer[self.start : self.start + size].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class PackedBatch:
    """A batch whose tensors lie in one buffer."""

    buffer: UInt8[Tensor, " bytes"]
    places: tuple[_Place, ...]
    latent_values: str
    num_stores: int

    def pin_memory(self) -> "PackedBatch":
        """Returns the batch in page-locked memory; the data loader's pinning calls this."""
        pinned = self.buffer.pin_memory()
        return PackedBatch(pinned, self.places, self.latent_values, self.num_stores)

    def unpacked(self) -> Batch:
        """Returns the batch; its tensors share the buffer."""
        own = {place.field: place.of(self.buffer) for place in self.places if place.store is None}
        stores: list[dict[str, Tensor]] = [{} for _ in range(self.num_stores)]
        for place in self.places:
            if place.store is not None:
                stores[place.store][place.field] = place.of(self.buffer)
        return Batch(
            images=own.get("images"),
            moments=own.get("moments"),
            labels=own["labels"],
            sample_ids=own["sample_ids"],
            positions=own["positions"],
            latent_values="samples" if self.latent_values == "samples" else "moments",
            teacher_tokens=tuple(_tokens(fields) for fields in stores),
        )


def packed(batch: Batch) -> PackedBatch:
    """Returns a batch in memory that other processes can map.

    Raises RuntimeError if /dev/shm is full.
    """
    named = [(name, None, tensor) for name, tensor in batch.named_tensors().items()]
    for number, tokens in enumerate(batch.teacher_tokens):
        if tokens is not None:
            named += [(name, number, tensor) for name, tensor in tokens.named_tensors().items()]
    places, start = [], 0
    for name, store, tensor in named:
        places.append(_Place(name, store, tensor.dtype, tuple(tensor.shape), start))
        start += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    # Zeros that were never written take no memory until they are shared.
    buffer = torch.zeros(start, dtype=torch.uint8).share_memory_()
    for place, (_, _, tensor) in zip(places, named, strict=True):
        place.of(buffer).copy_(tensor)
    return PackedBatch(buffer, tuple(places), batch.latent_values, len(batch.teacher_tokens))


def _tokens(fields: dict[str, Tensor]) -> StoredTokens | None:
    if not fields:
        return None
    return StoredTokens(fields["patches"], fields.get("patches_scale"), fields.get("cls"))
