"""Teacher tokens in the form a store holds them: bf16, or int8 with a scale per token."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from jaxtyping import BFloat16, Bool, Float, Float32, Int8
from torch import Tensor

Storage = Literal["bf16", "int8"]

_INT8_MAX = 127


@dataclass(frozen=True)
class StoredTokens:
    """One teacher's tokens of some images, still in the form of the store."""

    patches: BFloat16[Tensor, "batch tokens width"] | Int8[Tensor, "batch tokens width"]
    """In row-major order of the grid."""
    patches_scale: Float32[Tensor, "batch tokens"] | None
    """Factor of each int8 token; None for bf16."""
    cls: Float32[Tensor, "batch width"] | None
    """The class token, None for a teacher without one."""

    def __len__(self) -> int:
        return len(self.patches)

    def patches_float32(self) -> Float32[Tensor, "batch tokens width"]:
        """Returns the patch tokens in float32, on their device."""
        if self.patches_scale is None:
            return self.patches.float()
        return self.patches.float() * self.patches_scale[..., None]

    def finite(self) -> Bool[Tensor, " batch"]:
        """Returns, for each image, whether all its tokens are finite."""
        finite = self.patches_float32().isfinite().flatten(1).all(1)
        return finite if self.cls is None else finite & self.cls.isfinite().all(1)

    def named_tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that are present, by field."""
        present = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in present.items() if tensor is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> "StoredTokens":
        """Returns the tokens with `change` applied to each tensor."""
        return replace(self, **{name: change(t) for name, t in self.named_tensors().items()})

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "StoredTokens":
        """Returns the tokens on `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))


def as_stored(
    patches: Float[Tensor, "batch tokens width"],
    cls: Float[Tensor, "batch width"] | None,
    *,
    storage: Storage,
) -> StoredTokens:
    """Returns tokens in the form a store holds them, on their device.

    int8 rounds to the nearest of 255 values between -max|x| and max|x| of the token, so it is off
    by at most half a `patches_scale`. A token of zeros has scale 0. Values that are not finite stay
    so in `patches_float32`.
    """
    kept_cls = None if cls is None else cls.float()
    if storage == "bf16":
        return StoredTokens(patches.to(torch.bfloat16), None, kept_cls)
    exact = patches.float()
    scale = exact.abs().amax(-1) / _INT8_MAX
    divisor = torch.where(scale > 0, scale, 1.0)
    # Without nan_to_num the cast of NaN would be undefined; the scale keeps it.
    steps = (exact / divisor[..., None]).round().nan_to_num().clamp(-_INT8_MAX, _INT8_MAX)
    return StoredTokens(steps.to(torch.int8), scale, kept_cls)
