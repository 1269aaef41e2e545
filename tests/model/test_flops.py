"""The closed form against torch's own count of a real forward and backward pass."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from srepa_ds.model.embeddings import SINUSOID_WIDTH
from srepa_ds.model.flops import forward_flops, training_flops
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig

CASES = {
    "square": {"input_size": 16},
    "wide": {"input_size": (8, 20), "in_channels": 3},
    "coarse": {"input_size": 16, "patch_size": 4},
    "class token": {"input_size": 8, "class_token_width": 24},
}


@pytest.mark.parametrize("case", CASES)
def test_counts_what_torch_counts(case):
    settings = {"in_channels": 4, "hidden_size": 48, "num_heads": 4, "depth": 3, **CASES[case]}
    # Products written out, because torch does not count those inside every attention kernel.
    config = SiTConfig(variant="SiT-S/2", num_classes=10, attention="math", **settings)
    model = SiT(config, torch.Generator().manual_seed(0))
    batch = 2
    x_t = torch.randn(batch, *config.latent_shape, requires_grad=True)
    width = config.class_token_width
    cls_t = None if width is None else torch.randn(batch, width, requires_grad=True)
    labels = torch.zeros(batch, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        output = model(x_t, torch.rand(batch), labels, cls_t=cls_t)
    assert counter.get_total_flops() == batch * forward_flops(config)
    loss = output.velocity.sum()
    if output.cls_velocity is not None:
        loss = loss + output.cls_velocity.sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    # The sinusoid of time wants no gradient, so its first map has one product less.
    unwanted = 2 * SINUSOID_WIDTH * config.shape.hidden_size
    expected = training_flops(config) - forward_flops(config) - unwanted
    assert counter.get_total_flops() == batch * expected


def test_the_papers_gigaflops():
    """DiT's paper counts multiply-accumulates: 118.64 for XL/2 at 256 px, 524.60 at 512 px."""
    for input_size, expected in ((32, 118.64), (64, 524.60)):
        config = SiTConfig(
            variant="SiT-XL/2", input_size=input_size, in_channels=4, num_classes=1000
        )
        assert forward_flops(config) / 2e9 == pytest.approx(expected, rel=0.01)
