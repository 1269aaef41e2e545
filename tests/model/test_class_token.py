"""REG's model: a teacher's class token goes through the transformer with the patches."""

import math
import re

import pytest
import torch
from golden_sit import GOLDEN, golden_reg_sit
from plain_sit import plain_sit, tiny_config, tiny_inputs, tiny_model
from safetensors.torch import load_file

from srepa_ds.alignment.projector import ProjectorConfig, build_projector
from srepa_ds.errors import ConfigError
from srepa_ds.model.embeddings import position_embedding
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig
from srepa_ds.schema import validated

WIDTH = 7


def reg_config(**changes):
    return tiny_config(class_token_width=WIDTH, **changes)


def reg_model(**changes):
    return tiny_model(class_token_width=WIDTH, **changes)


def class_tokens(batch=3, dtype=torch.float32, width=WIDTH):
    return torch.arange(batch * width).mul(0.83).cos().reshape(batch, width).to(dtype)


def projector(width_in, hidden_width, width_out):
    config = ProjectorConfig(kind="mlp", hidden_width=hidden_width)
    return build_projector(config, width_in, width_out, None, grid=(4, 4))


@torch.no_grad()
def test_the_reference_model_is_reproduced(attention):
    golden = load_file(GOLDEN / "reg_sit.safetensors")
    model = golden_reg_sit(attention=attention)
    fresh = SiT(model.config)
    torch.testing.assert_close(fresh.pos_embed, golden["param.pos_embed"], rtol=0, atol=0)
    out = model(golden["in.x"], golden["in.t"], golden["in.y"], cls_t=golden["in.cls"], depths=(2,))
    torch.testing.assert_close(out.velocity, golden["out.v"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.cls_velocity, golden["out.cls_v"], rtol=1e-5, atol=1e-5)
    mlp = projector(64, 96, 48)
    prefix = "param.projectors.0."
    mlp.load_state_dict(
        {name.removeprefix(prefix): w for name, w in golden.items() if name.startswith(prefix)}
    )
    projected = mlp(out.hidden[0])
    assert projected.shape == (3, 17, 48)
    torch.testing.assert_close(projected, golden["out.z0"], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_reference_models_published_checksums_are_reproduced():
    config = SiTConfig(
        variant="SiT-B/2",
        input_size=8,
        in_channels=4,
        num_classes=10,
        depth=2,
        hidden_size=48,
        num_heads=3,
        class_token_width=20,
    )
    model, mlp = SiT(config).double(), projector(48, 32, 20).double()
    parameters = list(model.named_parameters())
    num_before = [name for name, _ in parameters].index("final_layer.linear.weight")
    # The reference counts its projectors between the blocks and the final layer.
    parameters[num_before:num_before] = mlp.named_parameters()
    for number, (_, parameter) in enumerate(parameters):
        k = torch.arange(parameter.numel(), dtype=torch.float64)
        parameter.copy_((0.1 * torch.sin(0.37 * k + 1.3 * number)).reshape(parameter.shape))
    x_t = torch.sin(0.11 * torch.arange(768, dtype=torch.float64)).reshape(3, 4, 8, 8)
    cls_t = torch.sin(0.23 * torch.arange(60, dtype=torch.float64) + 0.5).reshape(3, 20)
    t = torch.tensor([0, 0.31, 1], dtype=torch.float64)
    out = model(x_t, t, torch.tensor([0, 7, 10]), cls_t=cls_t, depths=(1,))
    for tensor, shape, expected in [
        (out.velocity, (3, 4, 8, 8), (-37.830801005, 1053.959341139, 0.054002630, -0.470650676)),
        (mlp(out.hidden[0]), (3, 17, 20), (-4.700961318, 75.709024235, -0.045531907, 0.000301595)),
        (out.cls_velocity, (3, 20), (-9.854128724, 85.403487167, -1.854536511, -0.045309282)),
    ]:
        assert tensor.shape == shape
        flat = tensor.flatten()
        numbers = torch.stack((flat.sum(), flat.abs().sum(), flat[0], flat[-1]))
        torch.testing.assert_close(numbers, torch.tensor(expected).double(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("variant", "count"),
    [
        ("SiT-S/2", 33_549_328),
        ("SiT-B/2", 131_683_600),
        ("SiT-L/2", 459_664_144),
        ("SiT-XL/2", 676_886_032),
    ],
)
def test_variants_have_the_published_number_of_parameters(variant, count):
    sizes = {"input_size": 32, "in_channels": 4, "num_classes": 1000, "class_token_width": 768}
    with torch.device("meta"):
        state = SiT(SiTConfig(variant=variant, **sizes)).state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == count


def test_the_state_is_a_plain_models_with_the_official_additions_in_order():
    plain, reg = SiT(tiny_config()).state_dict(), SiT(reg_config()).state_dict()
    shapes = {name: tuple(weight.shape) for name, weight in plain.items()}
    expected = {}
    for name, shape in shapes.items():
        expected[name] = (1, 16, 36) if name == "pos_embed" else shape
        if name == "final_layer.linear.bias":
            expected["final_layer.linear_cls.weight"] = (WIDTH, 36)
            expected["final_layer.linear_cls.bias"] = (WIDTH,)
    expected |= {"cls_projectors2.weight": (36, WIDTH), "cls_projectors2.bias": (36,)}
    expected |= {"wg_norm.weight": (36,), "wg_norm.bias": (36,)}
    found = [(name, tuple(weight.shape)) for name, weight in reg.items()]
    assert found == list(expected.items())
    assert not reg["pos_embed"][0, 0].any()
    assert torch.equal(reg["pos_embed"][:, 1:], position_embedding((3, 5), 36))


def test_initial_weights_are_a_plain_models_and_those_of_the_reference():
    plain = SiT(tiny_config(), torch.Generator().manual_seed(3)).state_dict()
    reg = SiT(reg_config(), torch.Generator().manual_seed(3)).state_dict()
    assert all(torch.equal(reg[name], plain[name]) for name in plain if name != "pos_embed")
    for name in ("final_layer.linear_cls.weight", "final_layer.linear_cls.bias"):
        assert not reg[name].any()
    assert not reg["cls_projectors2.bias"].any()
    bound = math.sqrt(6 / (36 + WIDTH))
    assert 0.95 * bound < reg["cls_projectors2.weight"].abs().max() <= bound
    assert abs(reg["cls_projectors2.weight"].std() / (bound / math.sqrt(3)) - 1) < 0.1
    assert (reg["wg_norm.weight"] == 1).all()
    assert not reg["wg_norm.bias"].any()


@pytest.mark.parametrize("changes", [{}, {"input_size": 5, "patch_size": 1, "qk_norm": True}])
def test_values_and_gradients_are_those_of_the_written_out_model(changes, attention):
    model = reg_model(attention=attention, **changes).double()
    inputs = tiny_inputs(dtype=torch.float64, **changes)
    cls_t = class_tokens(dtype=torch.float64).requires_grad_()
    out = model(*inputs, cls_t=cls_t, depths=(1, 2))
    state = {n: w.detach().clone().requires_grad_() for n, w in model.state_dict().items()}
    plain_cls_t = cls_t.detach().clone().requires_grad_()
    velocity, hidden, cls_velocity = plain_sit(state, model.config, *inputs, cls_t=plain_cls_t)
    assert out.hidden[0].shape[1] == model.config.num_tokens + 1
    for found, expected in [
        (out.velocity, velocity),
        (out.cls_velocity, cls_velocity),
        *zip(out.hidden, hidden, strict=True),
    ]:
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

    def scalar(velocity, cls_velocity, first):
        return velocity.square().sum() + cls_velocity.sin().sum() + first[:, 0].cos().sum()

    scalar(out.velocity, out.cls_velocity, out.hidden[0]).backward()
    scalar(velocity, cls_velocity, hidden[0]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(cls_t.grad, plain_cls_t.grad, rtol=1e-9, atol=1e-9)


def test_image_and_class_token_act_upon_each_other():
    model, (x_t, t, labels) = reg_model(), tiny_inputs()
    cls_t = class_tokens()
    out = model(x_t, t, labels, cls_t=cls_t)
    other_token = model(x_t, t, labels, cls_t=cls_t + torch.eye(3, WIDTH))
    other_image = model(x_t + torch.linspace(-1, 1, 10), t, labels, cls_t=cls_t)
    assert (other_token.velocity - out.velocity).abs().max() > 1e-3
    assert (other_image.cls_velocity - out.cls_velocity).abs().max() > 1e-3


def test_at_the_start_the_class_token_is_normalised_and_predicts_nothing():
    model = SiT(reg_config(), torch.Generator().manual_seed(0))
    out = model(*tiny_inputs(), cls_t=class_tokens(), depths=(2,))
    assert torch.equal(out.cls_velocity, torch.zeros(3, WIDTH))
    token = out.hidden[0][:, 0]
    torch.testing.assert_close(token.mean(-1), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(token.var(-1, correction=0), torch.ones(3), rtol=1e-4, atol=0)


def rounded(model):
    """The model's weights in bfloat16, biases of the embedded class token included."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def relative_error(value, reference):
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def test_bfloat16_weights_and_autocast_stay_near_float32():
    half, model = rounded(reg_model()), reg_model()
    with torch.no_grad():
        for parameter, source in zip(model.parameters(), half.parameters(), strict=True):
            parameter.copy_(source)
    inputs, cls_t = tiny_inputs(), class_tokens()
    exact = model(*inputs, cls_t=cls_t, depths=(2,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(*inputs, cls_t=cls_t, depths=(2,))
    for out in (autocast, half(*inputs, cls_t=cls_t, depths=(2,))):
        for found, expected in [
            (out.velocity, exact.velocity),
            (out.cls_velocity, exact.cls_velocity),
            (out.hidden[0], exact.hidden[0]),
        ]:
            assert found.dtype == torch.float32
            assert 1e-5 < relative_error(found, expected) < 0.02
    half(*inputs, cls_t=cls_t).cls_velocity.sum().backward()
    assert half.cls_projectors2.weight.grad.dtype == torch.bfloat16
    assert half.wg_norm.weight.grad.abs().sum() > 0


def test_the_class_token_enters_the_stream_of_a_bfloat16_model_unrounded():
    model = rounded(SiT(reg_config(), torch.Generator().manual_seed(0)))
    token = model(*tiny_inputs(), cls_t=class_tokens(), depths=(2,)).hidden[0][:, 0]
    assert not torch.equal(token, token.bfloat16().float())
    torch.testing.assert_close(token.var(-1, correction=0), torch.ones(3), rtol=1e-4, atol=0)


@pytest.mark.usefixtures("unchecked_shapes")
def test_the_compiled_model_is_one_graph_with_the_same_numbers():
    model, inputs, cls_t = reg_model(), tiny_inputs(), class_tokens()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    out, expected = compiled(*inputs, cls_t=cls_t), model(*inputs, cls_t=cls_t)
    torch.testing.assert_close(out.velocity, expected.velocity)
    torch.testing.assert_close(out.cls_velocity, expected.cls_velocity)


@pytest.mark.parametrize(
    ("width", "given", "message"),
    [
        (None, WIDTH, "takes no class token, got a class token of width 7"),
        (WIDTH, None, "takes a class token of width 7, got no class token"),
        (WIDTH, 8, "takes a class token of width 7, got a class token of width 8"),
    ],
)
def test_a_class_token_that_does_not_fit_is_refused(width, given, message):
    cls_t = None if given is None else class_tokens(width=given)
    with pytest.raises(ValueError, match=re.escape(message)):
        SiT(tiny_config(class_token_width=width))(*tiny_inputs(), cls_t=cls_t)


def test_a_plain_model_has_no_velocity_for_a_class_token():
    assert tiny_model()(*tiny_inputs()).cls_velocity is None


@pytest.mark.parametrize("width", [0, -3, "wide"])
def test_widths_that_are_none_are_refused(width):
    tree = {"variant": "SiT-B/2", "input_size": 8, "in_channels": 4, "num_classes": 10}
    with pytest.raises(ConfigError, match="class_token_width"):
        validated(SiTConfig, tree | {"class_token_width": width}, source="test")


def test_tokens_and_grid_remain_those_of_patches():
    assert reg_config().grid == tiny_config().grid == (3, 5)
    assert reg_config().num_tokens == 15
    assert (reg_config().num_prefix_tokens, tiny_config().num_prefix_tokens) == (1, 0)
