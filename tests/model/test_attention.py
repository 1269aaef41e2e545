import copy
import logging
import re
import sys
from types import ModuleType

import pytest
import torch
from plain_sit import tiny_config, tiny_inputs, tiny_model
from torch._dynamo.testing import CompileCounter

from srepa_ds.errors import ConfigError
from srepa_ds.model.activation_checkpointing import ActivationCheckpointingConfig
from srepa_ds.model.attention import Attention
from srepa_ds.model.attention_backends import (
    ATTENTION_BACKENDS,
    activate_torch_flash,
    bypasses_torch_operators,
    choose_backend,
    is_attention,
)
from srepa_ds.model.sit import SiT

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


def softmax_attention(query, key, value):
    scores = torch.einsum("bhid,bhjd->bhij", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), value)


def waves(length, head_dim, device, dtype):
    numbers = torch.arange(4 * 2 * length * head_dim).reshape(4, 1, 2, length, head_dim)
    waves = (numbers * 0.377).sin() + (numbers * 0.0131).cos()
    return [wave.to(device, dtype).requires_grad_() for wave in waves]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("length", [256, 257, 1000, 1024])
@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("device", DEVICES, ids=["cpu", "cuda"])
@pytest.mark.parametrize("name", list(ATTENTION_BACKENDS))
def test_values_and_gradients_are_those_of_softmax(name, device, head_dim, length, dtype):
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    reason = ATTENTION_BACKENDS[name].unavailable(device, head_dim, dtype)
    if reason is not None:
        pytest.skip(reason)
    *given, weight = waves(length, head_dim, device, dtype)
    attended = ATTENTION_BACKENDS[name].bind()(*given)
    found = attended, *torch.autograd.grad(attended, given, weight.detach())
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    expected = softmax_attention(*exact)
    expected = expected, *torch.autograd.grad(expected, exact, weight.detach().double())
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for tensor, same in zip(found, expected, strict=True):
        assert tensor.dtype == dtype
        assert ((tensor.double() - same).norm() / same.norm()).item() < bound


@pytest.mark.parametrize("request_", ["flash_attn", "flash_attn_2", "flash_attn_4", "xformers"])
def test_what_is_missing_is_named_at_the_first_forward_pass(request_):
    model = SiT(tiny_config(attention=request_, hidden_size=36))
    with pytest.raises(ConfigError) as caught:
        model(*tiny_inputs())
    message = str(caught.value)
    assert f"model.attention: '{request_}' cannot run here" in message
    assert "it needs a CUDA device, the model is on cpu" in message
    assert "not 12" in message
    assert "use 'sdpa'" in message
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        model.choose_attention(device=CPU, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_4", "xformers"])
def test_every_missing_thing_is_named(name):
    unavailable = ATTENTION_BACKENDS[name].unavailable
    reason = unavailable(CPU, 264, torch.float64)
    assert "needs a CUDA device" in reason
    assert "not in float64" in reason
    assert "multiples of 8 up to 256, not 264" in reason
    assert "head dims" not in unavailable(CPU, 72, torch.bfloat16)
    assert "computes in" not in unavailable(CPU, 72, torch.bfloat16)


def test_auto_takes_the_best_that_runs_and_says_why_not_the_others(caplog):
    choose_backend.cache_clear()
    caplog.set_level(logging.INFO, logger="srepa_ds")
    inputs = tiny_inputs()
    model, plain = SiT(tiny_config(attention="auto")), SiT(tiny_config())
    assert torch.equal(model(*inputs).velocity, plain(*inputs).velocity)
    model(*inputs)
    assert model.choose_attention(device=CPU, dtype=torch.float32) == "sdpa"
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("attention 'auto' is sdpa here; not flash_attn_4: ")
    assert re.search("flash_attn_4:.*needs a CUDA device", message)
    assert "not math: comes after it" in message


def test_torch_keeps_its_own_kernels_on_the_cpu():
    assert activate_torch_flash(device=CPU, head_dim=64, dtype=torch.bfloat16) is None


def tokens_first_softmax(query, key, value):
    given = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return softmax_attention(*given).transpose(1, 2), "the denominators' logarithms"


@pytest.fixture(params=["flash_attn_2", "flash_attn_4", "xformers"])
def stand_in(request, monkeypatch):
    """A backend whose package is installed and computes with plain products."""
    module, function = {
        "flash_attn_2": ("flash_attn.flash_attn_interface", "flash_attn_func"),
        "flash_attn_4": ("flash_attn.cute", "flash_attn_func"),
        "xformers": ("xformers.ops", "memory_efficient_attention"),
    }[request.param]
    package = ModuleType(module)
    setattr(package, function, tokens_first_softmax)
    monkeypatch.setitem(sys.modules, module.partition(".")[0], ModuleType("parent"))
    monkeypatch.setitem(sys.modules, module, package)
    return request.param


def test_a_package_is_imported_when_its_backend_is_taken(stand_in, monkeypatch):
    model = tiny_model(attention=stand_in)
    plain = tiny_model()
    for block in model.blocks:
        assert block.attn.attend is plain.blocks[0].attn.attend
        block.attn.use(stand_in)
    for name in [name for name in sys.modules if name.startswith(("flash_attn", "xformers"))]:
        monkeypatch.setitem(sys.modules, name, None)
    attention = copy.deepcopy(model.blocks[0].attn)
    tokens = torch.linspace(-1, 1, 2 * 15 * 36).sin().reshape(2, 15, 36)
    torch.testing.assert_close(attention(tokens), plain.blocks[0].attn(tokens))


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_package_is_traced_without_its_import_in_one_graph_for_all_blocks(stand_in, monkeypatch):
    torch._dynamo.reset()
    # Set as by `choose_attention`, which refuses it on a CPU.
    model = SiT(tiny_config(depth=3), torch.Generator().manual_seed(0))
    for module in model.modules():
        if isinstance(module, Attention):
            module.use(stand_in)
    for name in [name for name in sys.modules if name.startswith(("flash_attn", "xformers"))]:
        monkeypatch.setitem(sys.modules, name, None)
    expected = model(*tiny_inputs()).velocity
    counter = CompileCounter()
    model.compile_blocks(backend=counter)
    torch.testing.assert_close(model(*tiny_inputs()).velocity, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aten::_scaled_dot_product_flash_attention_for_cpu", True),
        ("aten::_scaled_dot_product_cudnn_attention", True),
        ("aten::_efficient_attention_forward", True),
        ("flash_attn::_flash_attn_forward", True),
        ("flash_attn_3::fwd", True),
        ("xformers_flash3::flash_fwd", True),
        ("xformers::efficient_attention_forward_cutlass", True),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", False),
        ("flash_attn::_flash_attn_backward", False),
        ("xformers_flash::flash_bwd", False),
        ("aten::bmm", False),
        ("aten::_softmax", False),
    ],
)
def test_operators_of_attention_are_known_by_name(name, expected):
    assert is_attention(name) is expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_only_some_backends_are_operators_of_torch(dtype):
    settings = {"device": CPU, "head_dim": 64, "dtype": dtype}
    assert not bypasses_torch_operators("sdpa", **settings)
    assert bypasses_torch_operators("math", **settings)


def test_a_package_that_calls_no_operator_of_its_own_cannot_be_kept(stand_in):
    assert bypasses_torch_operators(stand_in, device=CPU, head_dim=16, dtype=torch.float32)


@pytest.mark.parametrize(
    ("attention", "policy", "warns"),
    [
        ("math", "selective", True),
        ("math", "full", False),
        ("sdpa", "selective", False),
        ("auto", "selective", False),
    ],
)
def test_selective_checkpointing_says_what_it_cannot_keep(attention, policy, warns, caplog):
    caplog.set_level(logging.WARNING, logger="srepa_ds")
    model = SiT(tiny_config(attention=attention))
    model.set_activation_checkpointing(ActivationCheckpointingConfig(policy=policy))
    model.choose_attention(device=CPU, dtype=torch.float32)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == warns
    assert all("cannot keep the outputs of attention 'math'" in message for message in messages)
