"""Compiled models draw as eager ones do, up to rounding, and compile once per size."""

import os
import shutil

import pytest
import torch
from builders import randomised
from torch._dynamo.testing import CompileCounterWithBackend

from srepa_ds.codec.identity import IdentityCodec
from srepa_ds.drawing import compiled
from srepa_ds.drawing.compiled import CompiledModel, check_cuda_graphs
from srepa_ds.errors import ConfigError
from srepa_ds.interpolant import INTERPOLANTS
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig
from srepa_ds.sampling.config import SamplerConfig
from srepa_ds.sampling.generate import generate, plan_chunks

SIZES = {"variant": "SiT-S/2", "input_size": 4, "in_channels": 3, "num_classes": 5}
TINY = SiTConfig(**SIZES, depth=1, hidden_size=24, num_heads=2)
# The last chunk is short, and part of the interval is not guided.
CONFIG = SamplerConfig(num_steps=3, num_samples=7, batch_size=4, cfg_scale=1.5, guidance_high=0.7)


def tiny(**changes) -> SiT:
    config = TINY.model_copy(update=changes)
    return randomised(SiT(config), seed=1).eval().requires_grad_(False)


def images(model, config=CONFIG) -> torch.Tensor:
    codec, path, chunks = IdentityCodec(), INTERPOLANTS["linear"], plan_chunks(config)
    batches = generate(model, codec, path, config, chunks=chunks, device="cpu")
    return torch.cat([batch.images for batch in batches])


@pytest.fixture
def counter(monkeypatch, unchecked_shapes):
    """Counts graphs instead of generating code for them."""
    torch._dynamo.reset()
    counter, compile = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(
        compiled.torch,
        "compile",
        lambda call, dynamic, mode: compile(call, dynamic=dynamic, backend=counter),
    )
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("width", [None, 5])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_graph_for_each_of_two_sizes(counter, width, precision):
    model = tiny(class_token_width=width)
    config = CONFIG.model_copy(update={"precision": precision})
    found = images(CompiledModel(model, batch_size=4, cuda_graphs=False), config)
    assert counter.frame_count == 2
    # Filled up, the last chunk may round otherwise.
    assert (found.int() - images(model, config).int()).abs().max() <= 1
    assert found.float().std() > 20


def test_the_images_of_a_short_chunk_are_those_of_a_whole_one(counter):
    model = CompiledModel(tiny(), batch_size=4, cuda_graphs=False)
    whole = images(model, CONFIG.model_copy(update={"num_samples": 8}))
    assert torch.equal(images(model), whole[:7])


def test_a_guide_and_its_model_are_compiled_apart(counter):
    models = [CompiledModel(tiny(depth=d), batch_size=4, cuda_graphs=False) for d in (2, 1)]
    eager = [tiny(depth=d) for d in (2, 1)]

    def drawn(model, guide):
        codec, path, chunks = IdentityCodec(), INTERPOLANTS["linear"], plan_chunks(CONFIG)
        options = {"chunks": chunks, "device": "cpu", "guide": guide}
        batches = generate(model, codec, path, CONFIG, **options)
        return torch.cat([batch.images for batch in batches]).int()

    assert (drawn(*models) - drawn(*eager)).abs().max() <= 1
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "levels"), [("fp32", 1), ("bf16", 8)])
def test_compiled_code_draws_the_eager_images(unchecked_shapes, precision, levels):
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"torch.compile needs a C++ compiler on a CPU, and there is no {compiler}")
    torch._dynamo.reset()
    config = CONFIG.model_copy(update={"precision": precision})
    found = images(CompiledModel(tiny(), batch_size=4, cuda_graphs=False), config).int()
    difference = (found - images(tiny(), config).int()).abs()
    assert difference.max() <= levels
    assert difference.float().mean() < levels / 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.slow
def test_cuda_graphs_draw_the_compiled_images(unchecked_shapes):
    def drawn(*, cuda_graphs):
        torch._dynamo.reset()
        model = CompiledModel(tiny().cuda(), batch_size=4, cuda_graphs=cuda_graphs)
        codec, path, chunks = IdentityCodec(), INTERPOLANTS["linear"], plan_chunks(CONFIG)
        batches = generate(model, codec, path, CONFIG, chunks=chunks, device="cuda")
        return torch.cat([batch.images for batch in batches]).int()

    assert (drawn(cuda_graphs=True) - drawn(cuda_graphs=False)).abs().max() <= 1


def test_cuda_graphs_need_a_gpu():
    check_cuda_graphs(True, torch.device("cuda", 0))
    check_cuda_graphs(False, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"sample\.cuda_graphs: needs a GPU, .* its cpu"):
        check_cuda_graphs(True, torch.device("cpu"))
