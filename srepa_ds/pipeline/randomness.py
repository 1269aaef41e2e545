"""Where the noise of drawn images comes from: a seed and their numbers, or torch's generators."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Int64
from torch import Tensor

from srepa_ds import noise
from srepa_ds.noise import NoiseStream

Generators = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True)
class Randomness:
    """The noise of a batch of latents of `shape`, image by image for a seed."""

    shape: tuple[int, ...]
    device: torch.device
    seed: int | None
    sample_ids: Int64[Tensor, " batch"]
    generator: Generators

    def start(self) -> Float[Tensor, "batch channels height width"]:
        """Returns the noise to start from, in float64."""
        return self._normal(NoiseStream.SAMPLE_START, torch.float32, draw=0).double()

    def of_step(self, index: int) -> Float[Tensor, "batch channels height width"]:
        """Returns the noise of a step of the SDE, in float64."""
        return self._normal(NoiseStream.SAMPLE_STEP, torch.float64, draw=index)

    def _normal(self, noise_stream: NoiseStream, dtype: torch.dtype, *, draw: int) -> Tensor:
        if self.seed is None:
            return randn_tensor(
                self.shape, generator=self.generator, device=self.device, dtype=dtype
            )
        shape = self.shape[1:]
        return noise.normal(self.seed, noise_stream, self.sample_ids, shape, draw=draw, dtype=dtype)


def randomness_of(
    shape: tuple[int, ...],
    device: torch.device,
    *,
    seed: int | None,
    sample_ids: Sequence[int] | None,
    generator: Generators,
) -> Randomness:
    """Returns the noise that a call asks for; without `sample_ids` images are 0, 1, 2, ...

    Raises ValueError for settings that contradict.
    """
    if seed is not None and generator is not None:
        raise ValueError("seed and generator both say where noise comes from; give one of them")
    if seed is None and sample_ids is not None:
        raise ValueError("sample_ids are the images of a seed; give the seed too")
    ids = range(shape[0]) if sample_ids is None else sample_ids
    if len(ids) != shape[0]:
        raise ValueError(f"{len(ids)} sample_ids were given for {shape[0]} class_labels")
    numbers = torch.tensor(list(ids), dtype=torch.int64, device=device)
    return Randomness(shape, device, seed, numbers, generator)
