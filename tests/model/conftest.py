import pytest
import torch

from srepa_ds.model.attention_backends import ATTENTION_BACKENDS

ON_THE_CPU = [
    name
    for name, backend in ATTENTION_BACKENDS.items()
    if backend.unavailable(torch.device("cpu"), 64, torch.float32) is None
]


@pytest.fixture(params=ON_THE_CPU)
def attention(request):
    """Each backend that runs on the CPU in float32; test_attention.py tests all backends."""
    return request.param
