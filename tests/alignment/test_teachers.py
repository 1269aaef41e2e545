from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from srepa_ds.alignment.teachers import (
    TEACHERS,
    TeacherConfig,
    TeacherSpec,
    build_encoder,
    load_teacher,
)
from srepa_ds.errors import ConfigError, DataError
from srepa_ds.schema import to_tree, validated

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2}
PLAIN = TeacherSpec(
    architecture="vit_tiny_patch16_224",
    arguments={**SMALL, "patch_size": 4},
    width=24,
    patch_size=4,
    input_size=16,
    num_classes=5,
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# An architecture's name ends with the tag of its published weights, if there are any.
PUBLISHED = [name for name, spec in TEACHERS.items() if "." in spec.architecture]


def reduced(name):
    """A row of the table with two narrow blocks, everything else as it is."""
    spec = TEACHERS[name]
    return spec.model_copy(update={"arguments": {**spec.arguments, **SMALL}, "width": 24})


def scrambled(encoder, seed=0):
    """Fills every weight, so that none is at a value that hides a fault."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        key: 0.3 * torch.randn(value.shape, generator=generator)
        for key, value in encoder.state_dict().items()
    }
    encoder.load_state_dict(state)
    return encoder.eval()


def images(resolution, count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, resolution, resolution)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def saved(encoder, folder, name="teacher.safetensors"):
    path = Path(folder) / name
    if path.suffix == ".safetensors":
        save_file(encoder.state_dict(), path)
    else:
        torch.save({"model": encoder.state_dict(), "epoch": 3}, path)
    return path


def loaded(spec, path, *, resolution=16, dtype="fp32"):
    config = TeacherConfig(spec=spec, weights=path, dtype=dtype)
    return load_teacher(config, resolution=resolution, device="cpu")


def plain_encoder(spec, side):
    """timm's own model of a row, for a grid of `side` by `side` patches."""
    return timm.create_model(
        spec.architecture,
        img_size=spec.patch_size * side,
        num_classes=spec.num_classes,
        **spec.arguments,
    )


def published(name, grid=37):
    """A narrow encoder in the layout of the published weights, for inputs of `grid` patches."""
    return scrambled(plain_encoder(reduced(name), grid))


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("resolution", [128, 256])
def test_every_row_gives_the_tokens_of_its_encoder(name, resolution, tmp_path):
    source = published(name, grid=9)
    spec = reduced(name)
    teacher = loaded(spec, saved(source, tmp_path), resolution=resolution)
    size = spec.input_size or spec.input_size_per_256 * resolution // 256
    side = size // spec.patch_size
    tokens = teacher.tokens(images(resolution))
    assert teacher.grid == (side, side)
    assert tokens.patches.shape == (2, side * side, teacher.width)

    plain = plain_encoder(spec, side).eval()
    state = source.state_dict()
    # Some encoders add positions to the patches alone, others to class token and registers too.
    prefix = state["pos_embed"].shape[1] - 9 * 9
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], new_size=[side, side], num_prefix_tokens=prefix
    )
    plain.load_state_dict(state)
    unit = images(resolution).float() / 255
    unit = (unit - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]
    inputs = torch.nn.functional.interpolate(
        unit, (size, size), mode=spec.resize, align_corners=False, antialias=spec.antialias
    )
    seen = []
    if not spec.final_norm:
        plain.norm.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        seen.append(plain.forward_features(inputs))
    assert torch.allclose(tokens.patches, seen[0][:, plain.num_prefix_tokens :], atol=1e-5)
    assert (tokens.cls is not None) is spec.has_cls
    if tokens.cls is not None:
        assert torch.allclose(tokens.cls, seen[0][:, 0], atol=1e-5)
    again = teacher.tokens(images(resolution))
    assert torch.equal(again.patches, tokens.patches)


@pytest.mark.parametrize("name", TEACHERS)
def test_every_row_describes_the_real_model(name):
    spec = TEACHERS[name]
    with torch.device("meta"):
        encoder = plain_encoder(spec, 16)
    assert encoder.embed_dim == spec.width
    assert encoder.patch_embed.patch_size == (spec.patch_size, spec.patch_size)
    assert encoder.num_prefix_tokens == spec.num_prefix_tokens
    assert (encoder.cls_token is not None) is spec.has_cls
    assert encoder.num_classes == spec.num_classes
    for resolution in (128, 256, 512):
        assert spec.input_size_at(resolution) % spec.patch_size == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_of_published_weights_preprocess_as_published(name):
    spec = TEACHERS[name]
    with torch.device("meta"):
        published = timm.create_model(spec.architecture).pretrained_cfg
    assert tuple(published["mean"]) == spec.mean
    assert tuple(published["std"]) == spec.std


@pytest.mark.parametrize("name", [name for name in TEACHERS if name.startswith("dinov2")])
def test_dinov2_sees_14_pixels_for_every_16(name):
    assert [TEACHERS[name].input_size_at(size) for size in (256, 512)] == [224, 448]


def test_position_embedding_is_resampled_with_antialiasing(tmp_path):
    source = published("dinov2-vit-s")
    teacher = loaded(reduced("dinov2-vit-s"), saved(source, tmp_path), resolution=256)
    table = source.pos_embed[0, 1:].reshape(1, 37, 37, 24).permute(0, 3, 1, 2)
    for antialias, equal in ((True, True), (False, False)):
        expected = torch.nn.functional.interpolate(
            table, (16, 16), mode="bicubic", antialias=antialias
        )
        found = teacher.encoder.pos_embed[0, 1:].reshape(1, 16, 16, 24).permute(0, 3, 1, 2)
        assert torch.allclose(found, expected, atol=1e-6) is equal
    assert torch.equal(teacher.encoder.pos_embed[:, :1], source.pos_embed[:, :1])


def test_facebooks_own_layout_loads(tmp_path):
    """Registers, a class row in the position embedding and a mask token, as they publish it."""
    source = published("dinov2reg-vit-s", grid=16)
    state = dict(source.state_dict())
    cls_row = torch.full((1, 1, 24), 0.25)
    layout = {
        **{key: value for key, value in state.items() if key not in ("reg_token", "pos_embed")},
        "mask_token": torch.zeros(1, 24),
        "register_tokens": state["reg_token"],
        "cls_token": state["cls_token"] - cls_row,
        "pos_embed": torch.cat((cls_row, state["pos_embed"]), 1),
    }
    path = tmp_path / "dinov2_vits14_reg4_pretrain.pth"
    torch.save(layout, path)
    spec = reduced("dinov2reg-vit-s")
    theirs = loaded(spec, path, resolution=256).tokens(images(256))
    ours = loaded(spec, saved(source, tmp_path), resolution=256).tokens(images(256))
    assert torch.allclose(theirs.patches, ours.patches, atol=1e-5)


@pytest.mark.parametrize("name", ["teacher.safetensors", "teacher.pt"])
def test_a_teacher_trained_here_loads_as_it_was_saved(name, tmp_path):
    encoder = scrambled(build_encoder(PLAIN, resolution=16))
    teacher = loaded(PLAIN, saved(encoder, tmp_path, name))
    inputs = teacher.preprocess(images(16))
    with torch.no_grad():
        logits, features = encoder(inputs), encoder.forward_features(inputs)
    pooled, found = teacher.classify(images(16))
    assert torch.allclose(found, logits, atol=1e-6)
    assert torch.allclose(pooled, features[:, 0], atol=1e-6)
    assert torch.allclose(teacher.tokens(images(16)).patches, features[:, 1:], atol=1e-6)
    assert teacher.num_classes == 5


def test_a_head_is_left_out_unless_asked_for(tmp_path):
    path = saved(scrambled(build_encoder(PLAIN, resolution=16)), tmp_path)
    headless = PLAIN.model_copy(update={"num_classes": 0})
    teacher = loaded(headless, path)
    features = teacher.classify(images(16))
    assert features.logits is None
    assert torch.equal(features.pooled, loaded(PLAIN, path).classify(images(16)).pooled)
    path = saved(teacher.encoder, tmp_path, "headless.safetensors")
    with pytest.raises(DataError, match=r"2 missing: head\.weight, head\.bias"):
        loaded(PLAIN, path)


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
    assert torch.allclose(tokens.patches.mean(1), teacher.classify(images(16)).pooled, atol=1e-5)


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


def test_precision_is_the_teachers_own(tmp_path):
    path = saved(scrambled(build_encoder(PLAIN, resolution=16)), tmp_path)
    exact, fast = (loaded(PLAIN, path, dtype=dtype) for dtype in ("fp32", "bf16"))
    expected = exact.tokens(images(16)).patches
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(exact.tokens(images(16)).patches, expected)
    rounded = fast.tokens(images(16))
    assert rounded.patches.dtype == rounded.cls.dtype == torch.float32
    error = (rounded.patches - expected).norm() / expected.norm()
    assert 1e-4 < error < 5e-2
    assert fast.classify(images(16)).logits.dtype == torch.float32
    assert next(fast.parameters()).dtype == torch.float32


def test_loading_leaves_the_random_numbers_alone(tmp_path):
    path = saved(build_encoder(PLAIN, resolution=16), tmp_path)
    before = torch.get_rng_state()
    loaded(PLAIN, path)
    assert torch.equal(torch.get_rng_state(), before)


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda s: without(s, "norm.weight"), ["1 missing: norm.weight"]),
        (lambda s: {**s, "blocks.9.gate": torch.ones(1)}, ["1 unexpected: blocks.9.gate"]),
        (
            lambda s: {**s, "norm.bias": torch.ones(7), "extra": torch.ones(1)},
            ["1 of another shape: norm.bias (7,) instead of (24,)", "1 unexpected: extra"],
        ),
        (lambda s: {"stem.weight": torch.ones(2)}, ["32 missing: cls_token, pos_embed", ", ..."]),
        (
            lambda s: {**s, "patch_embed.proj.weight": torch.ones(24, 3, 8, 8)},
            ["patches of (8, 8) px, but the teacher's are (4, 4)"],
        ),
        (lambda s: {**s, "pos_embed": torch.ones(1, 12, 24)}, ["pos_embed (1, 12, 24)"]),
    ],
)
def test_weights_that_do_not_fit_are_named(change, messages, tmp_path):
    path = tmp_path / "foreign.safetensors"
    state = build_encoder(PLAIN, resolution=16).state_dict()
    save_file(change(dict(state)), path)
    with pytest.raises(DataError) as caught:
        loaded(PLAIN, path)
    for message in [*messages, str(path)]:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.safetensors", None, "no such file"),
        ("broken.safetensors", b"not a header", "cannot be read"),
        ("broken.pt", b"not a pickle", "cannot be read"),
        ("empty.pt", b"", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read_are_named(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        loaded(PLAIN, path)
    assert str(path) in str(caught.value)


class Payload:
    """What a hostile pickle would name."""


@pytest.mark.parametrize("content", [{"model": Payload()}, torch.ones(3), {"epoch": 3}])
def test_pickles_are_opened_as_weights_only(content, tmp_path):
    path = tmp_path / "foreign.pt"
    torch.save(content, path)
    with pytest.raises(DataError, match=r"foreign\.pt"):
        loaded(PLAIN, path)


@pytest.mark.parametrize(
    ("tree", "path", "message"),
    [
        ({}, "", "exactly one of name and spec"),
        ({"name": "dinov2-vit-b", "spec": to_tree(PLAIN)}, "", "exactly one of name and spec"),
        ({"name": "dinov2-vit-bb"}, "name", "did you mean 'dinov2-vit-b'"),
        (
            {"spec": {**to_tree(PLAIN), "architecture": "vit_tiny_patch16_225"}},
            "",
            "did you mean 'vit_tiny_patch16_224'",
        ),
        (
            {"spec": {**to_tree(PLAIN), "input_size_per_256": 224}},
            "spec",
            "exactly one of input_size",
        ),
        ({"spec": {**to_tree(PLAIN), "num_prefix_tokens": 0}}, "spec", "has_cls"),
        ({"spec": {**to_tree(PLAIN), "std": [0.2, 0.0, 0.2]}}, "spec", "std must be positive"),
        (
            {"spec": {**to_tree(PLAIN), "arguments": {"img_size": 3}}},
            "spec",
            "img_size cannot be given",
        ),
    ],
)
def test_faults_of_the_configuration(tree, path, message):
    with pytest.raises(ConfigError) as caught:
        validated(TeacherConfig, tree, source="test")
    (fault,) = caught.value.faults
    assert fault.path == path
    assert message in fault.message


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"width": 25}, "teacher.spec.width: is 25, but the model's is 24"),
        ({"num_prefix_tokens": 2}, "teacher.spec.num_prefix_tokens: is 2"),
        ({"arguments": {**PLAIN.arguments, "blocks": 2}}, "unexpected keyword argument 'blocks'"),
        ({"arguments": {**SMALL, "patch_size": 4, "num_heads": 5}}, "timm cannot build"),
        ({"input_size": 18}, "18 px, which is not a multiple of its patch size 4"),
    ],
)
def test_specs_that_describe_no_model_are_refused(update, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        build_encoder(PLAIN.model_copy(update=update), resolution=16)


def test_a_resolution_without_whole_patches_is_refused():
    with pytest.raises(ConfigError, match=r"87\.5 px"):
        TEACHERS["dinov2-vit-b"].input_size_at(100)


def test_pretrained_weights_need_a_source():
    """Nothing was ever published for this architecture, so nothing is fetched."""
    unpublished = PLAIN.model_copy(
        update={"architecture": "vit_small_patch16_18x2_224", "num_classes": 0}
    )
    with pytest.raises(DataError, match=r"teacher\.weights: a local"):
        load_teacher(TeacherConfig(spec=unpublished), resolution=16, device="cpu")


def test_images_of_another_size_or_type_are_refused(tmp_path):
    teacher = loaded(PLAIN, saved(build_encoder(PLAIN, resolution=16), tmp_path))
    with pytest.raises(ValueError, match="takes"):
        teacher.tokens(images(20))
