"""`Batch`: one micro batch, as the loader delivers it to training."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from srepa_ds.data.stored_tokens import StoredTokens
from srepa_ds.errors import DataError


@dataclass(frozen=True)
class Batch:
    """One micro batch on one device; at least one of `images` and `moments` is not None."""

    images: UInt8[Tensor, "batch channels height width"] | None
    """Pixels: the teacher's input, and the identity codec's."""
    moments: Float[Tensor, "batch moments latent_height latent_width"] | None
    """Latents: mean and standard deviation of a VAE's posterior, concatenated over channels."""
    labels: Int64[Tensor, " batch"]
    sample_ids: Int64[Tensor, " batch"]
    """Index in the data set; messages name samples by it."""
    positions: Int64[Tensor, " batch"]
    """The global sample counter: the key of all training noise."""
    latent_values: Literal["moments", "samples"] = "moments"
    """With `samples`, `moments` hold one draw from each posterior instead."""
    teacher_tokens: tuple[StoredTokens | None, ...] = ()
    """One entry per token store given to the data set; None where the store is None."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def pixels(self) -> UInt8[Tensor, "batch channels height width"]:
        """The images; raises DataError if the shards hold none."""
        if self.images is None:
            raise DataError(
                "these shards hold no images, only moments; prepare them again with images"
            )
        return self.images

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Returns the batch on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Returns the batch in page-locked memory; the data loader's pinning calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def named_tensors(self) -> dict[str, Tensor]:
        """Returns the batch's own tensors that are present, by field; not the teachers' tokens."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in own.items() if isinstance(value, Tensor)}

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        moved = {name: change(tensor) for name, tensor in self.named_tensors().items()}
        tokens = tuple(t if t is None else t.map(change) for t in self.teacher_tokens)
        return replace(self, **moved, teacher_tokens=tokens)
