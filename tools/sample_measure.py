"""Times the sampler and a plain loop on one model with random weights."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from plain_sampler import plain_batch
from step_measure import matmul_ceiling
from torch import Tensor, nn

from srepa_ds.codec.identity import IdentityCodec
from srepa_ds.codec.latent_codec import Rounding
from srepa_ds.drawing.compiled import CompiledModel
from srepa_ds.interpolant import INTERPOLANTS
from srepa_ds.model.flops import forward_flops
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig
from srepa_ds.sampling.config import SamplerConfig, count_evaluations
from srepa_ds.sampling.generate import generate, plan_chunks
from srepa_ds.sampling.state import SamplingModel


@dataclass(frozen=True)
class Speed:
    """The speed of one way to draw."""

    name: str
    images_per_second: float
    """The latents of images: no decoder is measured."""

    share: float
    """Share of the operations per second that a large product reaches on this device."""


class FirstChannels(IdentityCodec):
    """Takes three channels of latents as pixels, so that no decoder is measured."""

    def decode(
        self, latents: Tensor, *, rounding: Rounding = "truncate", refuse_broken: bool = False
    ) -> Tensor:
        """Returns the first three channels as pixels."""
        return super().decode(latents[:, :3], rounding=rounding, refuse_broken=refuse_broken)


def measured(
    variant: str, config: SamplerConfig, *, latent_size: int, compiled: bool, rounds: int
) -> list[Speed]:
    """Returns the speed of the plain loop, of ours, and of ours compiled if that is asked for.

    Each is warmed up and then timed `rounds` times in turns; the fastest round counts. The plain
    loop guides every step if the scale is above 1, as REPA's does with its default interval.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = SiTConfig(variant=variant, input_size=latent_size, in_channels=4, num_classes=1000)
    model = _random(SiT(sizes)).to(device).eval().requires_grad_(False)
    ways = {
        "plain loop": lambda: _plain(model, config, device),
        "srepa_ds": lambda: _ours(model, config, device),
    }
    if compiled:
        size = min(config.batch_size, config.num_samples)
        quick = CompiledModel(model, batch_size=size, cuda_graphs=False)
        ways["srepa_ds, compiled"] = lambda: _ours(quick, config, device)
    for way in ways.values():
        way()
    seconds = [{name: _seconds(way) for name, way in ways.items()} for _ in range(rounds)]
    evaluations, ceiling = count_evaluations(config), matmul_ceiling(device)
    flops = forward_flops(sizes) * (evaluations.conditional + evaluations.unconditional)
    speeds = {
        name: config.num_samples / min(of_round[name] for of_round in seconds) for name in ways
    }
    return [Speed(name, speed, speed * flops / ceiling) for name, speed in speeds.items()]


def _random(model: SiT) -> SiT:
    """Fills the weights: a model as it is initialised is the same in all ways, but zero."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.02, generator=generator)
    return model


def _plain(model: SiT, config: SamplerConfig, device: torch.device) -> None:
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    for chunk in plan_chunks(config):
        labels = torch.randint(0, 1000, (chunk.stop - chunk.start,), device=device)
        plain_batch(
            model, labels, num_steps=config.num_steps, cfg_scale=config.cfg_scale, dtype=dtype
        ).cpu()


def _ours(model: SamplingModel, config: SamplerConfig, device: torch.device) -> None:
    chunks, path = plan_chunks(config), INTERPOLANTS["linear"]
    for _ in generate(model, FirstChannels(), path, config, chunks=chunks, device=device):
        pass


def _seconds(way: Callable[[], None]) -> float:
    """Returns the seconds of a call that ends with its images on the host."""
    begin = time.perf_counter()
    way()
    return time.perf_counter() - begin
