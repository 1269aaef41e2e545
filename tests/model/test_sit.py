import json
import math
import re

import pytest
import torch
from places import GOLDEN
from plain_sit import plain_sit, tiny_config, tiny_inputs, tiny_model
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from srepa_ds.errors import ConfigError
from srepa_ds.model.embeddings import position_embedding
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SIT_VARIANTS, SiTConfig
from srepa_ds.schema import validated


def golden_projection(hidden, golden):
    for index in (0, 2, 4):
        hidden = hidden if index == 0 else F.silu(hidden)
        name = f"param.projectors.0.{index}"
        hidden = F.linear(hidden, golden[f"{name}.weight"], golden[f"{name}.bias"])
    return hidden


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_the_reference_model_is_reproduced(qk_norm, attention):
    golden = load_file(GOLDEN / f"sit_qknorm{int(qk_norm)}.safetensors")
    sizes = json.loads((GOLDEN / "meta.json").read_text())["sit"]
    shared = SiTConfig.model_fields.keys() & sizes.keys()
    config = SiTConfig(
        variant="SiT-B/4",
        qk_norm=qk_norm,
        attention=attention,
        **{name: sizes[name] for name in shared},
    )
    model = SiT(config)
    weights = {name[6:]: w for name, w in golden.items() if name.startswith("param.")}
    own = {name: w for name, w in weights.items() if not name.startswith("projectors.")}
    torch.testing.assert_close(model.pos_embed, own["pos_embed"], rtol=0, atol=0)
    model.load_state_dict(own)
    out = model(golden["in.x"], golden["in.t"], golden["in.y"], depths=(sizes["encoder_depth"],))
    torch.testing.assert_close(out.velocity, golden["out.v"], rtol=1e-5, atol=1e-5)
    projected = golden_projection(out.hidden[0], golden)
    torch.testing.assert_close(projected, golden["out.z0"], rtol=1e-5, atol=1e-5)


def wave(shape, number):
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return (0.1 * torch.sin(0.37 * k + 1.3 * number)).reshape(shape)


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
    )
    model = SiT(config).double()
    projectors = [(32, 48), (32,), (32, 32), (32,), (20, 32), (20,)]
    # The reference counts its projectors between the blocks and the final layer.
    names = [name for name, _ in model.named_parameters()]
    num_before = sum(not name.startswith("final_layer.") for name in names)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        shift = len(projectors) if name.startswith("final_layer.") else 0
        parameter.copy_(wave(parameter.shape, number + shift))
    x_t = torch.sin(0.11 * torch.arange(768, dtype=torch.float64)).reshape(3, 4, 8, 8)
    t = torch.tensor([0, 0.31, 1], dtype=torch.float64)
    out = model(x_t, t, torch.tensor([0, 7, 10]), depths=(1,))
    projected = out.hidden[0]
    for layer in range(3):
        projected = projected if layer == 0 else F.silu(projected)
        number = num_before + 2 * layer
        weight = wave(projectors[2 * layer], number)
        projected = F.linear(projected, weight, wave(projectors[2 * layer + 1], number + 1))
    assert projected.shape == (3, 16, 20)
    for tensor, expected in [
        (out.velocity, (-16.407899179, 1028.803702644, -0.268596956, -0.290474914)),
        (projected, (-4.394671766, 71.274727871, -0.040584155, 0.000323441)),
    ]:
        flat = tensor.flatten()
        numbers = torch.stack((flat.sum(), flat.abs().sum(), flat[0], flat[-1]))
        torch.testing.assert_close(numbers, torch.tensor(expected).double(), rtol=2e-6, atol=2e-6)


NUM_PARAMETERS = {
    "SiT-S/2": 32_957_200,
    "SiT-S/4": 32_920_384,
    "SiT-S/8": 33_049_600,
    "SiT-B/2": 130_500_112,
    "SiT-B/4": 130_426_432,
    "SiT-B/8": 130_684_672,
    "SiT-L/2": 458_086_416,
    "SiT-L/4": 457_988_160,
    "SiT-L/8": 458_332_416,
    "SiT-XL/2": 675_111_184,
    "SiT-XL/4": 675_000_640,
    "SiT-XL/8": 675_387_904,
    "SiT-3B/2": 3_036_885_008,
}
SHAPES = json.loads((GOLDEN / "sit_shapes.json").read_text())


def imagenet_model(variant):
    with torch.device("meta"):
        return SiT(SiTConfig(variant=variant, input_size=32, in_channels=4, num_classes=1000))


@pytest.mark.parametrize("variant", [name for name in SIT_VARIANTS if name != "SiT-Ti/2"])
def test_variants_have_the_published_number_of_parameters(variant):
    # SiT-3B/2 is not a published size; counted by hand from its layers.
    state = imagenet_model(variant).state_dict()
    assert next(iter(state)) == "pos_embed"
    assert sum(tensor.numel() for tensor in state.values()) == NUM_PARAMETERS[variant]


@pytest.mark.parametrize("variant", list(SHAPES))
def test_state_dict_has_the_official_names_shapes_and_order(variant):
    state = imagenet_model(variant).state_dict()
    ours = {
        name: list(tensor.shape)
        for name, tensor in state.items()
        if not name.startswith("blocks.") or name.startswith("blocks.0.")
    }
    official = SHAPES[variant]["state_dict"]
    official = {n: s for n, s in official.items() if not n.startswith("projectors.")}
    assert list(ours.items()) == list(official.items())
    num_trainable = sum(p.numel() for p in imagenet_model(variant).parameters())
    assert num_trainable == SHAPES[variant]["params_without_projector_and_pos_embed"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True},
        {"input_size": 5, "patch_size": 1},
        {"input_size": (9, 3), "patch_size": 3, "num_heads": 1, "hidden_size": 20, "depth": 3},
    ],
)
def test_values_and_gradients_are_those_of_the_written_out_model(changes, attention):
    model = tiny_model(attention=attention, **changes).double()
    x_t, t, labels = tiny_inputs(dtype=torch.float64, **changes)
    depths = tuple(range(model.config.shape.depth, 0, -1))
    out = model(x_t, t, labels, depths=depths)
    state = {n: w.detach().clone().requires_grad_() for n, w in model.state_dict().items()}
    velocity, hidden, _ = plain_sit(state, model.config, x_t, t, labels)
    assert out.velocity.dtype == torch.float64
    torch.testing.assert_close(out.velocity, velocity, rtol=1e-10, atol=1e-10)
    for depth, tapped in zip(depths, out.hidden, strict=True):
        torch.testing.assert_close(tapped, hidden[depth - 1], rtol=1e-10, atol=1e-10)

    (out.velocity.square().sum() + out.hidden[-1].sin().sum()).backward()
    (velocity.square().sum() + hidden[0].sin().sum()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-9, atol=1e-9)


def test_taps_come_in_the_order_asked():
    model, inputs = tiny_model(depth=3), tiny_inputs()
    first, second, third = model(*inputs, depths=(1, 2, 3)).hidden
    assert torch.equal(model(*inputs, depths=(3, 1)).hidden[0], third)
    again = model(*inputs, depths=(2, 1, 2)).hidden
    assert all(torch.equal(a, b) for a, b in zip(again, (second, first, second), strict=True))
    assert model(*inputs).hidden == ()


def test_at_the_start_blocks_are_the_identity_and_the_velocity_is_zero():
    model = SiT(tiny_config(), torch.Generator().manual_seed(0))
    inputs = tiny_inputs()
    out = model(*inputs, depths=(1, 2))
    assert torch.equal(out.velocity, torch.zeros_like(inputs[0]))
    embedded = model.x_embedder(inputs[0]) + model.pos_embed
    assert torch.equal(out.hidden[0], embedded)
    assert torch.equal(out.hidden[1], embedded)


def test_initial_weights_have_the_distributions_of_the_reference():
    config = tiny_config(hidden_size=128, num_heads=4, num_classes=50, in_channels=4)
    state = SiT(config, torch.Generator().manual_seed(0)).state_dict()
    for name, weight in state.items():
        if name.endswith(".bias") or "adaLN" in name or name.startswith("final_layer"):
            assert not weight.any(), name
        elif name.startswith(("t_embedder", "y_embedder")):
            assert abs(weight.std() - 0.02) < 0.001, name
            assert abs(weight.mean()) < 0.001, name
        elif name != "pos_embed":
            matrix = weight.flatten(1)
            bound = math.sqrt(6 / (matrix.shape[0] + matrix.shape[1]))
            assert 0.97 * bound < weight.abs().max() <= bound, name
            assert abs(weight.std() / (bound / math.sqrt(3)) - 1) < 0.06, name
    assert abs(state["blocks.0.attn.qkv.weight"].abs().max() - math.sqrt(6 / 512)) < 1e-3


def test_initial_weights_depend_on_the_generator_alone():
    config = tiny_config(qk_norm=True)
    ambient = torch.get_rng_state()
    first = SiT(config, torch.Generator().manual_seed(3)).state_dict()
    assert torch.equal(torch.get_rng_state(), ambient)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        second = SiT(config, torch.Generator().manual_seed(3)).state_dict()
    other = SiT(config, torch.Generator().manual_seed(4)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    assert not torch.equal(first["blocks.0.mlp.fc1.weight"], first["blocks.1.mlp.fc1.weight"])


def test_without_a_generator_weights_wait_as_zeros():
    state = SiT(tiny_config(qk_norm=True)).state_dict()
    for name, weight in state.items():
        if name == "pos_embed":
            assert torch.equal(weight, position_embedding((3, 5), 36))
        else:
            expected = 1.0 if name.endswith("_norm.weight") else 0.0
            assert (weight == expected).all(), name


def test_the_position_embedding_is_a_buffer():
    model = SiT(tiny_config())
    assert "pos_embed" not in dict(model.named_parameters())
    assert model.pos_embed.dtype == torch.float32


def relative_error(value, reference):
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_bfloat16_weights_and_autocast_stay_near_float32(qk_norm, attention):
    model = tiny_model(qk_norm=qk_norm, attention=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    inputs = tiny_inputs()
    exact = model(*inputs, depths=(2,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(*inputs, depths=(2,))
    exact_gradients = torch.autograd.grad(exact.velocity.square().sum(), model.parameters())
    half = tiny_model(qk_norm=qk_norm, attention=attention)
    for parameter, source in zip(half.parameters(), model.parameters(), strict=True):
        parameter.data = source.detach().bfloat16()
    rounded = half(*inputs, depths=(2,))
    for out in (autocast, rounded):
        assert out.velocity.dtype == torch.float32
        assert out.hidden[0].dtype == torch.float32
        assert 1e-5 < relative_error(out.velocity, exact.velocity) < 0.02
        assert relative_error(out.hidden[0], exact.hidden[0]) < 0.01
    gradients = torch.autograd.grad(rounded.velocity.square().sum(), half.parameters())
    # Together: some gradients are zero up to rounding (a bias on all keys changes nothing).
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients)
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    expected = torch.cat([gradient.flatten() for gradient in exact_gradients])
    assert relative_error(joined, expected) < 0.02


def test_the_residual_stream_of_a_bfloat16_model_is_not_rounded():
    model = SiT(tiny_config(input_size=(6, 256)))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    out = model(*tiny_inputs(input_size=(6, 256)), depths=(2,))
    assert torch.equal(out.hidden[0], model.pos_embed.expand(3, -1, -1))


@pytest.mark.parametrize("width", [None, 5])
def test_the_residual_stream_lies_token_by_token_in_memory(width):
    model = tiny_model(class_token_width=width)
    cls_t = None if width is None else torch.randn(3, width)
    for tapped in model(*tiny_inputs(), cls_t=cls_t, depths=(1, 2)).hidden:
        assert tapped.is_contiguous()


# The checker looks at a random item of a tuple, which torch.compile cannot trace.
@pytest.mark.usefixtures("unchecked_shapes")
def test_the_compiled_model_is_one_graph_with_the_same_numbers():
    model, inputs = tiny_model(), tiny_inputs()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    out, expected = compiled(*inputs, depths=(1,)), model(*inputs, depths=(1,))
    torch.testing.assert_close(out.velocity, expected.velocity)
    torch.testing.assert_close(out.hidden[0], expected.hidden[0])


def test_blocks_may_be_recomputed_in_the_backward_pass():
    model = tiny_model()
    inputs = tiny_inputs()
    expected = torch.autograd.grad(model(*inputs).velocity.sum(), model.parameters())
    for block in model.blocks:
        plain = block.forward
        block.forward = lambda *a, plain=plain: checkpoint(plain, *a, use_reentrant=False)
    gradients = torch.autograd.grad(model(*inputs).velocity.sum(), model.parameters())
    for gradient, same in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, same)


@pytest.mark.parametrize("shape", [(2, 3, 10, 6), (2, 4, 6, 10), (2, 3, 6, 12)])
def test_latents_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"(3, 6, 10), got {shape[1:]}")):
        SiT(tiny_config())(torch.zeros(shape), torch.zeros(2), torch.tensor([0, 1]))


@pytest.mark.parametrize("depths", [(0,), (3,), (1, -1)])
def test_depths_outside_the_model_are_refused(depths):
    with pytest.raises(ValueError, match="blocks are 1 to 2"):
        SiT(tiny_config())(*tiny_inputs(), depths=depths)


@pytest.mark.parametrize("variant", list(SIT_VARIANTS))
def test_config_derives_its_sizes(variant):
    config = SiTConfig(variant=variant, input_size=(32, 64), in_channels=4, num_classes=7)
    patch = SIT_VARIANTS[variant].patch_size
    assert config.shape == SIT_VARIANTS[variant]
    assert config.latent_shape == (4, 32, 64)
    assert config.grid == (32 // patch, 64 // patch)
    assert config.num_tokens == 2048 // patch**2
    assert config.head_dim == {"XL": 72, "Ti": 32, "3B": 128}.get(variant[4:-2], 64)
    assert config.null_label == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "SiT-B2"}, "did you mean 'SiT-B/2'"),
        ({"input_size": 7}, "multiples of 2"),
        ({"input_size": [8, 9]}, "multiples of 2"),
        ({"num_heads": 5}, "num_heads that divides"),
        ({"hidden_size": 6, "num_heads": 3}, "multiple of 4"),
        ({"num_classes": 0}, "num_classes"),
        ({"in_channels": -4}, "in_channels"),
        ({"depth": 0}, "depth"),
        ({"attention": "sdp"}, "did you mean 'sdpa'"),
        ({"head_count": 3}, "head_count"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    tree = {"variant": "SiT-B/2", "input_size": 8, "in_channels": 4, "num_classes": 10}
    with pytest.raises(ConfigError, match=message):
        validated(SiTConfig, tree | changes, source="test")


def test_a_config_survives_its_own_json():
    config = tiny_config()
    tree = json.loads(config.model_dump_json())
    assert validated(SiTConfig, tree, source="test") == config
