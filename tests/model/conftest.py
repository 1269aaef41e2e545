import jaxtyping
import pytest
import torch

from srepa_ds.model.attention import ATTENTION_BACKENDS

ON_THE_CPU = [
    name
    for name, backend in ATTENTION_BACKENDS.items()
    if backend.unavailable(torch.device("cpu"), 64, torch.float32) is None
]


@pytest.fixture(params=ON_THE_CPU)
def attention(request):
    """Every backend that runs on the CPU in float32; test_attention.py has them all."""
    return request.param


@pytest.fixture
def unchecked_shapes():
    """As in production: shapes are not checked at run time, and Dynamo can trace the functions."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
