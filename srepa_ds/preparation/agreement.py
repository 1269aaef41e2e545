"""Whether stored latents are those that a codec makes of the same images."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from srepa_ds.codec.latent_codec import LatentCodec, LatentValues
from srepa_ds.data.decoding import decoded
from srepa_ds.data.images import center_crop
from srepa_ds.data.shard_index import LatentDescription
from srepa_ds.data.sources.source import Source
from srepa_ds.errors import DataError

MOST_OF_SPREAD = 0.1
"""How far means may lie from each other, relative to their spread within channels. VAEs with random
weights: 0.0004 after storage in fp16, 0.02 after encoding in bf16, 0.4 with every weight moved by
10 %, 1.05 for the mirrored images, 1.7 and more for another VAE."""
_MOST_OF_STDS = 0.5
"""The same for standard deviations, relative to their size: 0.03 in bf16 if they are 2e-4, as those
of trained VAEs. Logarithms of variances in their place are off by 10 and more."""
_DRAWN = 2.0
"""How far a draw may lie from the mean, in standard deviations, on the average of all numbers."""
_NUM_COMPARED = 8


def difference(
    stored: Float[Tensor, "batch stored h w"],
    encoded: Float[Tensor, "batch moments h w"],
    values: LatentValues,
) -> str | None:
    """Returns how stored latents differ from `encoded` moments of the same images.

    None if they fit, which they do whatever the precision of storage and encoding.
    """
    mean, std = encoded.float().chunk(2, dim=1)
    found = stored.float().to(mean.device)
    centred = mean - mean.mean(dim=(0, 2, 3), keepdim=True)
    # Of a single place, or of equal images, the spread says nothing.
    spread = max(centred.norm().item(), MOST_OF_SPREAD * mean.norm().item(), 1e-12)
    allowed = MOST_OF_SPREAD
    if values == "samples":
        allowed += _DRAWN * std.norm().item() / spread
    else:
        found, found_std = found.chunk(2, dim=1)
        off = (found_std - std).norm().item() / std.norm().item()
        if not off <= _MOST_OF_STDS:
            return f"standard deviations differ by {off:.3g} of their size"
    distance = (found - mean).norm().item() / spread
    if not distance <= allowed:
        return f"means differ by {distance:.3g} of their spread"
    return None


def check_source_latents(
    source: Source, codec: LatentCodec, described: LatentDescription, *, image_size: int
) -> int:
    """Checks some of the latents that a source holds against its images; returns how many.

    Images that cannot be read are left to the preparation. Raises DataError if the codec makes
    other latents of them.
    """
    count = min(_NUM_COMPARED, len(source.labels))
    stored, encoded, keys = [], [], []
    for number in range(count):
        index = number * len(source.labels) // count
        pair = _both(source, index, image_size)
        if pair is not None:
            image, latent = pair
            # One by one: large images need not fit into memory together.
            encoded.append(codec.moments(image[None]).cpu())
            stored.append(latent[None])
            keys.append(source.key(index))
    reason = difference(torch.cat(stored), torch.cat(encoded), described.values) if stored else None
    if reason is not None:
        raise DataError(
            f"latents.codec: is not the codec of the latents that the source holds: of the images "
            f"{keys[0]} to {keys[-1]}, {reason}; give the weights they were encoded with, or "
            "`codec: {kind: stored}` to take them as they are"
        )
    return len(stored)


def _both(
    source: Source, index: int, image_size: int
) -> tuple[UInt8[Tensor, "3 height width"], Tensor] | None:
    """Returns the image and the latent of one sample, None if one of them cannot be read."""
    try:
        item = source.item(index)
        if item.image is None or item.moments is None:
            return None
        image = decoded(item.image) if isinstance(item.image, bytes) else item.image
        pixels = center_crop(image, image_size)
    except DataError:
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1), item.moments
