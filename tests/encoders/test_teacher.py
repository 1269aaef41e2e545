from pathlib import Path

import pytest
import torch
from teacher_models import (
    PLAIN,
    images,
    loaded,
    plain_encoder,
    preprocessed,
    published,
    reduced,
    saved,
    scrambled,
    tokens_by_timm,
)
from timm.models import get_pretrained_cfg
from torch._dynamo.utils import counters

from srepa_ds.encoders import teacher as teacher_module
from srepa_ds.encoders.teacher import (
    TEACHERS,
    Teacher,
    TeacherConfig,
    build_encoder,
    load_teacher,
)
from srepa_ds.errors import DataError

IMAGENET_STD = (0.229, 0.224, 0.225)

# An architecture's name ends with the tag of its published weights, if there are any.
PUBLISHED = [name for name, spec in TEACHERS.items() if "." in spec.architecture]
# The demo has a fixed, square input.
OF_ANY_SIZE = [name for name in TEACHERS if not name.startswith("digits-")]


def grid_at(name, resolution):
    if name.startswith("digits-"):
        return 8, 8
    height, width = resolution
    return height // 16, width // 16


@pytest.mark.parametrize(
    ("name", "resolution"),
    [
        *((name, side) for name in TEACHERS for side in ((256, 256), (512, 512))),
        *((name, (128, 192)) for name in OF_ANY_SIZE),
    ],
)
def test_every_row_gives_the_tokens_of_its_encoder(name, resolution, tmp_path):
    spec, source = reduced(name), published(name, grid=9)
    teacher = loaded(spec, saved(source, tmp_path), resolution=resolution)
    grid = grid_at(name, resolution)
    assert teacher.grid == grid
    pixels = images(resolution)
    tokens = teacher.tokens(pixels)
    expected = tokens_by_timm(spec, source, grid, pixels)
    assert tokens.patches.shape == (2, grid[0] * grid[1], teacher.width)
    assert torch.allclose(tokens.patches, expected[:, spec.num_prefix_tokens :], atol=1e-5)
    assert (tokens.cls is not None) is spec.has_cls
    if tokens.cls is not None:
        assert torch.allclose(tokens.cls, expected[:, 0], atol=1e-5)
    again = teacher.tokens(pixels)
    assert torch.equal(again.patches, tokens.patches)


def tokens_by_hand(encoder, spec, inputs):
    """Runs timm's plain ViT or its Eva block by block."""
    tokens = encoder._pos_embed(encoder.patch_embed(inputs))
    tokens, rope = tokens if isinstance(tokens, tuple) else (tokens, None)
    tokens = encoder.norm_pre(tokens)
    for block in encoder.blocks:
        tokens = block(tokens) if rope is None else block(tokens, rope=rope)
    return encoder.norm(tokens) if spec.final_norm else tokens


def of_one_block(spec):
    return spec.model_copy(update={"arguments": {**spec.arguments, "depth": 1}})


def check_at_full_width(name, resolution):
    spec = of_one_block(TEACHERS[name])
    encoder = build_encoder(spec, resolution=resolution)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.normal_(std=0.05, generator=generator)
    teacher = Teacher(encoder, spec, resolution=resolution, dtype=torch.float32)
    pixels = images(resolution, count=1)
    tokens = teacher.tokens(pixels)
    rows, columns = grid_at(name, (resolution, resolution))
    assert tokens.patches.shape == (1, rows * columns, spec.width)
    size = (rows * spec.patch_size, columns * spec.patch_size)
    with torch.no_grad():
        expected = tokens_by_hand(encoder, spec, preprocessed(spec, size, pixels))
    assert torch.allclose(tokens.patches, expected[:, spec.num_prefix_tokens :], atol=1e-4)
    assert (tokens.cls is not None) is spec.has_cls
    if tokens.cls is not None:
        assert torch.allclose(tokens.cls, expected[:, 0], atol=1e-4)


@pytest.mark.parametrize("name", TEACHERS)
def test_every_row_at_its_real_width(name):
    check_at_full_width(name, 256)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEACHERS)
def test_every_row_at_its_real_width_and_512_pixels(name):
    check_at_full_width(name, 512)


@pytest.mark.parametrize("name", TEACHERS)
def test_every_row_describes_the_real_model(name):
    spec = TEACHERS[name]
    with torch.device("meta"):
        encoder = plain_encoder(of_one_block(spec), 16)
    assert encoder.embed_dim == spec.width
    assert encoder.patch_embed.patch_size == (spec.patch_size, spec.patch_size)
    assert encoder.num_prefix_tokens == spec.num_prefix_tokens
    assert (encoder.cls_token is not None) is spec.has_cls
    assert encoder.num_classes == spec.num_classes
    assert not (spec.final_norm and isinstance(encoder.norm, torch.nn.Identity))


@pytest.mark.parametrize("name", OF_ANY_SIZE)
def test_every_row_sees_16_tokens_for_256_pixels(name):
    spec = TEACHERS[name]
    for resolution in ((256, 256), (512, 512), (256, 384), (768, 512)):
        height, width = (side // 16 * spec.patch_size for side in resolution)
        assert spec.input_size_at(resolution) == (height, width)
    assert spec.input_size_at(512) == spec.input_size_at((512, 512))


@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_of_published_weights_preprocess_as_published(name):
    spec = TEACHERS[name]
    published = get_pretrained_cfg(spec.architecture)
    assert tuple(published.mean) == spec.mean
    assert tuple(published.std) == spec.std


# The references' choices, written out again: input at 256 px, order, final norm, prefix tokens.
CONVENTIONS = {
    "dinov2-vit-b": (224, "normalise_then_resize", True, 1),
    "dinov2reg-vit-b": (224, "normalise_then_resize", True, 5),
    "dinov3-vit-b": (256, "resize_then_normalise", True, 5),
    "mocov3-vit-b": (256, "normalise_then_resize", True, 1),
    "clip-vit-l": (224, "resize_then_normalise", False, 1),
    "mae-vit-l": (256, "normalise_then_resize", False, 1),
    "jepa-vit-h": (224, "normalise_then_resize", True, 0),
    "dinov1-vit-b": (256, "normalise_then_resize", True, 1),
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_rows_follow_the_references(name):
    spec = TEACHERS[name]
    size, order, final_norm, prefix = CONVENTIONS[name]
    assert spec.input_size_at(256) == (size, size)
    assert (spec.order, spec.final_norm, spec.num_prefix_tokens) == (order, final_norm, prefix)
    dinov3 = name.startswith("dinov3")
    assert (spec.resize, spec.antialias) == (("bilinear", True) if dinov3 else ("bicubic", False))


def test_rows_are_the_encoders_they_are_named_after():
    """Facts that no weight shows: activations, epsilons, heads."""
    with torch.device("meta"):
        clip, moco, dinov3 = (
            plain_encoder(of_one_block(TEACHERS[name]), 16)
            for name in ("clip-vit-l", "mocov3-vit-s", "dinov3-vit-b")
        )
    act = clip.blocks[0].mlp.act
    assert torch.allclose(act(torch.tensor(1.0)), torch.sigmoid(torch.tensor(1.702)))
    assert isinstance(clip.norm_pre, torch.nn.LayerNorm)
    assert clip.patch_embed.proj.bias is None
    assert (moco.blocks[0].attn.num_heads, moco.blocks[0].attn.head_dim) == (12, 32)
    assert (moco.norm.eps, clip.norm.eps, dinov3.norm.eps) == (1e-6, 1e-5, 1e-5)


@pytest.mark.parametrize("name", ["teacher.safetensors", "teacher.pt"])
def test_a_teacher_trained_here_loads_as_it_was_saved(name, tmp_path):
    encoder = scrambled(build_encoder(PLAIN, resolution=16))
    teacher = loaded(PLAIN, saved(encoder, tmp_path, name))
    inputs = teacher.preprocess(images(16))
    with torch.no_grad():
        logits, features = encoder(inputs), encoder.forward_features(inputs)
    pooled, found, _ = teacher.features(images(16))
    assert torch.allclose(found, logits, atol=1e-6)
    assert torch.allclose(pooled, features[:, 0], atol=1e-6)
    assert torch.allclose(teacher.tokens(images(16)).patches, features[:, 1:], atol=1e-6)
    assert teacher.num_classes == 5


def test_tokens_can_stop_before_the_final_norm(tmp_path):
    encoder = scrambled(build_encoder(PLAIN, resolution=16))
    path = saved(encoder, tmp_path)
    raw = loaded(PLAIN.model_copy(update={"final_norm": False}), path).tokens(images(16))
    normed = loaded(PLAIN, path).tokens(images(16))
    assert not torch.allclose(raw.patches, normed.patches, atol=0.1)
    assert torch.allclose(encoder.norm(raw.patches), normed.patches, atol=1e-5)
    assert torch.allclose(encoder.norm(raw.cls), normed.cls, atol=1e-5)


def test_an_encoder_without_class_token_gives_none(tmp_path):
    arguments = {**PLAIN.arguments, "class_token": False, "global_pool": "avg", "fc_norm": False}
    update = {"arguments": arguments, "num_prefix_tokens": 0, "has_cls": False}
    spec = PLAIN.model_copy(update=update)
    encoder = scrambled(build_encoder(spec, resolution=16))
    teacher = loaded(spec, saved(encoder, tmp_path))
    tokens = teacher.tokens(images(16))
    assert tokens.cls is None
    assert tokens.patches.shape == (2, 16, 24)
    assert torch.allclose(tokens.patches.mean(1), teacher.features(images(16)).pooled, atol=1e-5)


@pytest.mark.parametrize("resize", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [False, True])
def test_preprocessing_follows_the_spec(resize, antialias, tmp_path):
    path = saved(build_encoder(PLAIN, resolution=16), tmp_path)
    update = {"resize": resize, "antialias": antialias, "mean": (0.1, 0.2, 0.3)}
    inputs = {}
    for order in ("normalise_then_resize", "resize_then_normalise"):
        spec = PLAIN.model_copy(update={**update, "order": order})
        inputs[order] = loaded(spec, path, resolution=40).preprocess(images(40))
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor(IMAGENET_STD)
    small = torch.nn.functional.interpolate(
        images(40) / 255, (16, 16), mode=resize, antialias=antialias, align_corners=False
    )
    expected = (small - mean[:, None, None]) / std[:, None, None]
    for found in inputs.values():
        assert torch.allclose(found, expected, atol=1e-4)
    normalised = (images(40) / 255 - mean[:, None, None]) / std[:, None, None]
    first = torch.nn.functional.interpolate(
        normalised, (16, 16), mode=resize, antialias=antialias, align_corners=False
    )
    assert torch.equal(inputs["normalise_then_resize"], first)
    assert torch.equal(inputs["resize_then_normalise"], expected)


def test_a_fixed_input_may_have_two_sides(tmp_path):
    spec = PLAIN.model_copy(update={"input_size": (12, 20)})
    teacher = loaded(
        spec, saved(build_encoder(PLAIN, resolution=16), tmp_path), resolution=(24, 40)
    )
    assert teacher.grid == (3, 5)
    assert teacher.preprocess(images((24, 40))).shape == (2, 3, 12, 20)
    assert teacher.tokens(images((24, 40))).patches.shape == (2, 15, 24)


def test_is_frozen_and_stays_in_evaluation_mode(tmp_path):
    dropout = PLAIN.model_copy(update={"arguments": {**PLAIN.arguments, "drop_rate": 0.5}})
    teacher = loaded(dropout, saved(build_encoder(PLAIN, resolution=16), tmp_path))
    holder = torch.nn.ModuleList([teacher]).train()
    assert holder.training
    assert not any(module.training for module in teacher.modules())
    assert not any(weight.requires_grad for weight in teacher.parameters())
    tokens = teacher.tokens(images(16))
    assert not tokens.patches.requires_grad
    # Not inference tensors: the losses save them for backward.
    assert not tokens.patches.is_inference()
    assert set(teacher.state_dict()) == {f"encoder.{key}" for key in teacher.encoder.state_dict()}


@pytest.mark.parametrize("final_norm", [False, True])
def test_precision_is_the_teachers_own(final_norm, tmp_path):
    path = saved(scrambled(build_encoder(PLAIN, resolution=16)), tmp_path)
    spec = PLAIN.model_copy(update={"final_norm": final_norm})
    exact, fast = (loaded(spec, path, dtype=dtype) for dtype in ("fp32", "bf16"))
    expected = exact.tokens(images(16)).patches
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(exact.tokens(images(16)).patches, expected)
    rounded = fast.tokens(images(16))
    assert rounded.patches.dtype == rounded.cls.dtype == torch.float32
    error = (rounded.patches - expected).norm() / expected.norm()
    assert 1e-4 < error < 5e-2
    assert torch.equal(fast.tokens(images(16)).patches, rounded.patches)
    assert fast.features(images(16)).logits.dtype == torch.float32
    assert next(fast.parameters()).dtype == torch.float32


@pytest.mark.slow
def test_a_compiled_teacher_says_the_same(unchecked_shapes, tmp_path):
    spec = of_one_block(PLAIN)
    path = saved(scrambled(build_encoder(spec, resolution=16)), tmp_path)
    plain, fast = (loaded(spec, path, compile=compiled) for compiled in (False, True))
    expected = plain.tokens(images(16))
    graphs = counters["stats"]["unique_graphs"]
    found = fast.tokens(images(16))
    assert counters["stats"]["unique_graphs"] > graphs
    assert torch.allclose(found.patches, expected.patches, atol=1e-5)
    assert torch.allclose(found.cls, expected.cls, atol=1e-5)
    assert not found.patches.requires_grad
    assert set(fast.state_dict()) == set(plain.state_dict())


def test_loading_leaves_the_random_numbers_alone(tmp_path):
    path = saved(build_encoder(PLAIN, resolution=16), tmp_path)
    before = torch.get_rng_state()
    loaded(PLAIN, path)
    assert torch.equal(torch.get_rng_state(), before)


def test_images_of_another_size_or_type_are_refused(tmp_path):
    teacher = loaded(PLAIN, saved(build_encoder(PLAIN, resolution=16), tmp_path))
    for wrong in (images(20), images((16, 20))):
        with pytest.raises(ValueError, match="takes"):
            teacher.tokens(wrong)


@pytest.mark.parametrize(("name", "is_own"), [("digits-vit", True), ("dinov2-vit-s", False)])
def test_missing_weights_are_named_with_what_makes_them(tmp_path, monkeypatch, name, is_own):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacher_module, "build_encoder", lambda *given, **more: None)
    config = TeacherConfig(name=name, weights=Path("none.safetensors"))
    with pytest.raises(DataError, match=f"no such file .looked for at {tmp_path}/none") as caught:
        load_teacher(config, resolution=16, device="cpu")
    assert ("srepa-ds teacher" in str(caught.value)) == is_own
