"""Keeps the first images of a set while the set is scored."""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import UInt8
from torch import Tensor

from srepa_ds.distributed import ranks
from srepa_ds.evaluation.images import ImageBlock


class FirstImages:
    """The first `count` images of a set that ranks draw or read in blocks."""

    def __init__(self, count: int):
        """Keeps nothing until `passing` is iterated over."""
        self._count = count
        self._kept: dict[int, Tensor] = {}

    def passing(self, blocks: Iterable[ImageBlock]) -> Iterator[ImageBlock]:
        """Yields `blocks` as they are, and keeps those of their images that are wanted."""
        for block in blocks:
            for number, image in zip(block.sample_ids.tolist(), block.images, strict=True):
                if number < self._count:
                    self._kept[number] = image.clone()
            yield block

    def on_main(self) -> UInt8[Tensor, "images 3 height width"] | None:
        """Returns the images of all ranks in order on the main rank, None elsewhere. Collective."""
        kept = [pair for one in ranks.gather_on_main(self._kept) for pair in one.items()]
        if not kept:
            return None
        return torch.stack([image for _, image in sorted(kept, key=lambda pair: pair[0])])
