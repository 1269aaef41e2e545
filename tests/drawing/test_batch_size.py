"""How far the images of a set depend on the batch size they are drawn with."""

import pytest
import torch
from builders import randomised

from srepa_ds.codec.identity import IdentityCodec
from srepa_ds.interpolant import INTERPOLANTS
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig
from srepa_ds.sampling.config import SamplerConfig
from srepa_ds.sampling.generate import generate, plan_chunks

SIZES = {
    "digits": {"variant": "SiT-Ti/2"},
    "wider": {"variant": "SiT-S/2", "depth": 2},
}
# Largest share of pixels that differ, and by how many levels; measured: see docs/evaluation.md.
BOUNDS = {"fp32": (0.001, 1), "bf16": (0.3, 3)}


def images(model: SiT, config: SamplerConfig) -> torch.Tensor:
    codec, path, chunks = IdentityCodec(), INTERPOLANTS["linear"], plan_chunks(config)
    batches = generate(model, codec, path, config, chunks=chunks, device="cpu")
    return torch.cat([batch.images for batch in batches]).int()


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("name", SIZES)
def test_another_batch_size_changes_few_pixels_by_little(name, precision):
    sizes = SiTConfig(**SIZES[name], input_size=16, in_channels=3, num_classes=10)
    model = randomised(SiT(sizes), seed=1, scale=0.05).requires_grad_(False)
    settings = {"num_steps": 4, "num_samples": 4, "cfg_scale": 1.5, "precision": precision}
    whole = images(model, SamplerConfig(batch_size=4, **settings))
    assert whole.float().std() > 40
    assert torch.equal(whole, images(model, SamplerConfig(batch_size=4, **settings)))
    share, levels = BOUNDS[precision]
    for size in (1, 3):
        difference = (images(model, SamplerConfig(batch_size=size, **settings)) - whole).abs()
        assert (difference > 0).float().mean() <= share
        assert difference.max() <= levels
