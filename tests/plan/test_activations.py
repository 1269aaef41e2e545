"""Checkpointing policies: the memory they keep, their cost, and unchanged gradients."""

import copy

import pytest
import torch
from plain_sit import tiny_inputs, tiny_model
from torch._dynamo.testing import CompileCounter

from srepa_ds.config.experiment import config_from
from srepa_ds.errors import ConfigError
from srepa_ds.model.activation_checkpointing import ActivationCheckpointingConfig, offloaded
from srepa_ds.model.variants import SiTConfig
from srepa_ds.plan.activations import activation_bytes, recompute_flops
from srepa_ds.plan.counted import KeptTensors, counted_bytes, counted_flops
from srepa_ds.schema import validated

POLICIES = {
    "none": ActivationCheckpointingConfig(),
    "full": ActivationCheckpointingConfig(policy="full"),
    "every_k": ActivationCheckpointingConfig(policy="every_k", k=2),
    "attention": ActivationCheckpointingConfig(policy="selective"),
    "products": ActivationCheckpointingConfig(policy="selective", keep="products"),
}
# Dynamo looks at `.grad` of every tensor, and silences the warning by a hook that pytest preempts.
tracing = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
RECOMPUTING = [name for name in POLICIES if name != "none"]


def gradients(model, inputs, *, autocast=False):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = model(*inputs, depths=(1,))
    loss = out.velocity.square().sum() + out.hidden[0].sin().sum()
    return [loss.detach(), *torch.autograd.grad(loss, model.parameters())]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("policy", RECOMPUTING)
@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast", "bf16"])
def test_every_policy_has_the_gradients_of_none(precision, policy, offload):
    model = tiny_model(depth=3, qk_norm=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16() if precision == "bf16" else parameter.data
    autocast = precision == "bf16_autocast"
    expected = gradients(model, tiny_inputs(), autocast=autocast)
    names = list(model.state_dict())
    model.set_activation_checkpointing(POLICIES[policy].model_copy(update={"offload": offload}))
    found = gradients(model, tiny_inputs(), autocast=autocast)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert list(model.state_dict()) == names


def kept_bytes(model, inputs):
    with KeptTensors([*model.parameters(), model.pos_embed]) as kept:
        velocity = model(*inputs).velocity
        num_bytes = kept.num_bytes()
    assert velocity.requires_grad
    return num_bytes


@pytest.mark.parametrize("policy", POLICIES)
def test_real_tensors_are_kept_as_the_formula_says(policy):
    sizes = {"input_size": 16, "hidden_size": 64, "num_heads": 1, "depth": 4}
    model, inputs = tiny_model(**sizes), tiny_inputs(**sizes)
    model.set_activation_checkpointing(POLICIES[policy])
    expected = activation_bytes(
        model.config, batch=3, precision="fp32", checkpointing=POLICIES[policy], device_type="cpu"
    )
    assert kept_bytes(model, inputs) == pytest.approx(expected.device, rel=0.05)


def b2(**changes):
    settings = {"variant": "SiT-B/2", "input_size": 32, "in_channels": 4, "num_classes": 1000}
    return SiTConfig(**(settings | {"depth": 3} | changes))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast", "bf16"])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"variant": "SiT-XL/2", "depth": 2, "input_size": 64, "class_token_width": 768},
        {"variant": "SiT-S/2", "depth": 2, "qk_norm": True},
    ],
    ids=["B-256", "XL-512-cls", "S-256-qk"],
)
def test_bytes_are_those_of_the_formula(changes, device_type, precision, policy):
    checkpointing, config = POLICIES[policy], b2(**changes)
    counted = counted_bytes(
        config, batch=2, precision=precision, checkpointing=checkpointing, device_type=device_type
    )
    expected = activation_bytes(
        config, batch=2, precision=precision, checkpointing=checkpointing, device_type=device_type
    )
    assert expected.device == pytest.approx(counted, rel=0.02)
    assert expected.host == 0


@pytest.mark.parametrize(
    "changes", [{"depth": 2}, {"variant": "SiT-XL/2", "input_size": 64, "depth": 1}]
)
def test_repeated_products_are_those_of_the_formula(changes):
    config = b2(**changes)
    settings = {"batch": 2, "precision": "bf16_autocast"}
    once = counted_flops(config, checkpointing=POLICIES["none"], **settings)
    for checkpointing in POLICIES.values():
        repeated = counted_flops(config, checkpointing=checkpointing, **settings) - once
        assert recompute_flops(config, batch=2, checkpointing=checkpointing) == repeated


def test_policies_are_ordered_by_what_they_keep():
    config = b2(depth=None)

    def kept(policy):
        return activation_bytes(
            config, batch=1, precision="bf16", checkpointing=POLICIES[policy]
        ).device

    assert kept("full") < kept("attention") < kept("products") < kept("none")
    assert kept("full") < kept("every_k") < kept("none")
    everywhere = ActivationCheckpointingConfig(policy="every_k", k=1)
    assert (
        kept("full")
        == activation_bytes(config, batch=1, precision="bf16", checkpointing=everywhere)[0]
    )


def test_offload_moves_the_inputs_of_blocks():
    config = b2()
    plain = activation_bytes(config, batch=2, precision="bf16", checkpointing=POLICIES["full"])
    checkpointing = ActivationCheckpointingConfig(policy="full", offload=True)
    moved = activation_bytes(config, batch=2, precision="bf16", checkpointing=checkpointing)
    residual_stream = 4 * 2 * config.num_tokens * 768
    assert moved.host == 3 * residual_stream
    assert plain.device - moved.device == 3 * residual_stream
    assert moved.transient - plain.transient == residual_stream


def test_offloading_copies_the_stream_and_nothing_else():
    stream, other = (torch.rand(2, 3, 4, requires_grad=True) for _ in range(2))
    with offloaded(stream):
        product = stream * other
    saved = {product.grad_fn._saved_self.data_ptr(), product.grad_fn._saved_other.data_ptr()}
    assert stream.data_ptr() not in saved
    assert other.data_ptr() in saved
    product.sum().backward()
    assert torch.equal(other.grad, stream)


def test_offloading_keeps_the_layout():
    stream = torch.rand(2, 4, 3, requires_grad=True).mT
    with offloaded(stream):
        product = stream * 2 * stream
    assert product.grad_fn._saved_other.stride() == stream.stride()


@pytest.mark.usefixtures("unchecked_shapes")
@tracing
@pytest.mark.parametrize("policy", ["none", "full", "products"])
def test_compiled_blocks_share_one_graph_and_have_the_same_gradients(policy):
    torch._dynamo.reset()
    model = tiny_model(depth=3)
    expected = gradients(model, tiny_inputs())
    names = list(model.state_dict())
    counter = CompileCounter()
    model.set_activation_checkpointing(POLICIES[policy])
    model.compile_blocks(backend=counter)
    found = gradients(model, tiny_inputs())
    assert counter.frame_count == 1
    for gradient, same in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, same)
    assert list(model.state_dict()) == names
    assert list(copy.deepcopy(model).state_dict()) == names


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
@tracing
@pytest.mark.parametrize(
    ("policy", "offload"), [("none", False), ("attention", False), ("full", True)]
)
def test_a_compiled_training_step_is_the_eager_one_but_for_rounding(policy, offload):
    torch._dynamo.reset()
    stepped = []
    for compiled in (False, True):
        model = tiny_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        model.set_activation_checkpointing(POLICIES[policy].model_copy(update={"offload": offload}))
        if compiled:
            model.compile_blocks()
        found = gradients(model, tiny_inputs(), autocast=True)
        for parameter, gradient in zip(model.parameters(), found[1:], strict=True):
            parameter.grad = gradient
        optimizer.step()
        weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        stepped.append((found[0], torch.cat([g.flatten() for g in found[1:]]), weights))
    for eager, fast in zip(*stepped, strict=True):
        assert ((fast - eager).norm() / eager.norm()).item() < 0.01


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"offload": True}, "choose another policy"),
        ({"policy": "some"}, "policy"),
        ({"policy": "every_k", "k": 0}, "k"),
        ({"keep": "norms"}, "keep"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tree, message):
    with pytest.raises(ConfigError, match=message):
        validated(ActivationCheckpointingConfig, tree, source="test")


def experiment(k):
    model = {"variant": "SiT-S/2", "input_size": 32, "in_channels": 4, "num_classes": 10}
    return {
        "run": {"folder": "run"},
        "data": {"folder": "data"},
        "model": {**model, "depth": 3},
        "train": {"steps": 1},
        "engine": {"activation_checkpointing": {"policy": "every_k", "k": k, "offload": True}},
    }


def test_every_k_beyond_the_model_is_refused():
    assert config_from(experiment(3), source="test").engine.activation_checkpointing.k == 3
    with pytest.raises(ConfigError) as caught:
        config_from(experiment(4), source="test")
    (fault,) = caught.value.faults
    assert fault.path == "engine.activation_checkpointing.k"
    assert "4 exceeds the model's 3 blocks" in fault.message


def test_sampling_keeps_nothing_and_is_unchanged():
    model = tiny_model()
    with torch.no_grad():
        expected = model(*tiny_inputs()).velocity
        model.set_activation_checkpointing(
            ActivationCheckpointingConfig(policy="full", offload=True)
        )
        assert torch.equal(model(*tiny_inputs()).velocity, expected)
