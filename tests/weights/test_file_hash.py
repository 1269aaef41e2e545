"""The hash of a weight file that is not written."""

import hashlib

import pytest
import torch
from builders import randomised
from safetensors.torch import save

from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig
from srepa_ds.weights.file_hash import hash_of_weight_file
from srepa_ds.weights.weight_files import METADATA

SIZES = SiTConfig(
    variant="SiT-S/2", input_size=4, in_channels=3, num_classes=5, depth=11, hidden_size=24,
    num_heads=2,
)  # fmt: skip


@pytest.mark.parametrize(
    "tensors",
    [
        randomised(SiT(SIZES)).state_dict(),
        {"b": torch.randn(4, 3).T, "a.c": torch.randn(()), "a": torch.randn(0, 3)},
        {"parameter \u00e9": torch.nn.Parameter(torch.randn(3))},
    ],
)
def test_it_is_that_of_the_file(tensors):
    content = save({name: value.contiguous() for name, value in tensors.items()}, METADATA)
    assert hash_of_weight_file(tensors, METADATA) == hashlib.sha256(content).hexdigest()


def test_another_order_of_the_same_weights_has_the_same_hash():
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}
    turned = dict(reversed(tensors.items()))
    assert hash_of_weight_file(turned, METADATA) == hash_of_weight_file(tensors, METADATA)
