"""The closed form against the FLOPs counted in a real forward and backward pass."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from srepa_ds.model.embeddings import SINUSOID_WIDTH
from srepa_ds.model.flops import forward_flops, training_flops
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig
from srepa_ds.plan.product_flops import ProductFlops

CASES = {
    "square": {"input_size": 16},
    "wide": {"input_size": (8, 20), "in_channels": 3},
    "coarse": {"input_size": 16, "patch_size": 4},
    "class token": {"input_size": 8, "class_token_width": 24},
}


@pytest.mark.parametrize("case", CASES)
def test_the_closed_form_is_what_a_step_computes(case):
    settings = {"in_channels": 4, "hidden_size": 48, "num_heads": 4, "depth": 3, **CASES[case]}
    # Products written out, because torch does not count those inside every attention kernel.
    config = SiTConfig(variant="SiT-S/2", num_classes=10, attention="math", **settings)
    model = SiT(config, torch.Generator().manual_seed(0))
    batch = 2
    x_t = torch.randn(batch, *config.latent_shape, requires_grad=True)
    width = config.class_token_width
    cls_t = None if width is None else torch.randn(batch, width, requires_grad=True)
    labels = torch.zeros(batch, dtype=torch.int64)
    with ProductFlops() as counter:
        output = model(x_t, torch.rand(batch), labels, cls_t=cls_t)
    assert counter.total == batch * forward_flops(config)
    loss = output.velocity.sum()
    if output.cls_velocity is not None:
        loss = loss + output.cls_velocity.sum()
    with ProductFlops() as counter:
        loss.backward()
    # The sinusoid of time needs no gradient, so the map after it has one product less.
    unwanted = 2 * SINUSOID_WIDTH * config.shape.hidden_size
    expected = training_flops(config) - forward_flops(config) - unwanted
    assert counter.total == batch * expected


def test_the_papers_gigaflops():
    """DiT's paper counts multiply-accumulates: 118.64 for XL/2 at 256 px, 524.60 at 512 px."""
    for input_size, expected in ((32, 118.64), (64, 524.60)):
        config = SiTConfig(
            variant="SiT-XL/2", input_size=input_size, in_channels=4, num_classes=1000
        )
        assert forward_flops(config) / 2e9 == pytest.approx(expected, rel=0.01)


def rand(*shape):
    return torch.randn(shape, requires_grad=True)


# One operator each. The backward pass takes two products for each forward product.
PRODUCTS = {
    "mm": (lambda: rand(2, 3) @ rand(3, 5), 2 * 2 * 3 * 5),
    "bmm": (lambda: rand(7, 2, 3) @ rand(7, 3, 5), 7 * 2 * 2 * 3 * 5),
    "addmm": (lambda: torch.addmm(rand(5), rand(2, 3), rand(3, 5)), 2 * 2 * 3 * 5),
    "linear": (
        lambda: torch.nn.functional.linear(rand(4, 2, 3), rand(5, 3), rand(5)),
        2 * 4 * 2 * 3 * 5,
    ),
    "convolution": (
        lambda: torch.nn.functional.conv2d(rand(2, 3, 8, 4), rand(5, 3, 2, 2), stride=2),
        2 * (2 * 5 * 4 * 2) * (3 * 2 * 2),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_each_operator_has_the_flops_of_its_shapes(name):
    compute, expected = PRODUCTS[name]
    with ProductFlops() as counter:
        result = compute()
    assert counter.total == expected
    with ProductFlops() as counter:
        result.sum().backward()
    assert counter.total == 2 * expected


@pytest.mark.parametrize(
    # Written out, the scores are kept instead of recomputed.
    ("backend", "backward"),
    [(SDPBackend.MATH, 4), (SDPBackend.FLASH_ATTENTION, 5)],
)
def test_attention_is_two_products_and_its_backward_pass_four_or_five(backend, backward):
    heads = [rand(2, 3, 7, 16) for _ in range(3)]
    product = 2 * (2 * 3) * 7 * 7 * 16
    with sdpa_kernel(backend), ProductFlops() as counter:
        out = torch.nn.functional.scaled_dot_product_attention(*heads)
    assert counter.total == 2 * product
    with ProductFlops() as counter:
        out.sum().backward()
    assert counter.total == backward * product


@pytest.mark.parametrize("name", ["dot", "mv"])
def test_a_product_without_a_formula_is_not_counted_as_nothing(name):
    left = torch.ones(3) if name == "dot" else torch.ones(2, 3)
    with pytest.raises(LookupError, match=f"operator {name}"), ProductFlops():
        getattr(torch, name)(left, torch.ones(3))


def test_what_is_done_element_by_element_counts_as_nothing():
    with ProductFlops() as counter:
        torch.lgamma(torch.ones(3)).exp().sum()
        torch.nn.functional.interpolate(torch.ones(1, 1, 4, 4), scale_factor=2, mode="bilinear")
    assert counter.total == 0
