"""Published checkpoints, built with random weights in their exact layouts, and their positions."""

import argparse
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from teacher_models import (
    PLAIN,
    images,
    loaded,
    plain_encoder,
    published,
    reduced,
    saved,
    scrambled,
    tokens_by_timm,
)
from timm.layers import resample_abs_pos_embed

from srepa_ds.encoders.layouts import LAYOUTS
from srepa_ds.encoders.teacher import TEACHERS, TeacherConfig, build_encoder, load_teacher
from srepa_ds.errors import ConfigError, DataError

WIDTH = 24


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def training(**parts):
    """Returns the other entries of a training's checkpoint."""
    return {
        **parts,
        "optimizer": {"state": {0: {"exp_avg": noise(3)}}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 299,
        "args": argparse.Namespace(batch_size=64, output_dir="runs"),
    }


def moco_names(state):
    """The published ViT-L, in which four modules are misnamed after a block's number."""
    wrong = {
        "blocks.13.norm1.": "blocks.13.norm13.",
        "blocks.13.mlp.fc1.": "blocks.13.mlp.fc13.",
        "blocks.14.norm2.": "blocks.14.norm14.",
        "blocks.14.mlp.fc2.": "blocks.14.mlp.fc14.",
    }
    renamed = {}
    for key, value in state.items():
        for right, misnamed in wrong.items():
            key = key.replace(right, misnamed)
        renamed[key] = value
    assert sum(key not in state for key in renamed) == (8 if "blocks.14.norm2.bias" in state else 0)
    return renamed


def as_mocov3(state):
    heads = {"head.0.weight": noise(8, WIDTH), "head.1.running_mean": noise(8)}
    encoders = {
        **prefixed("module.base_encoder.", {**moco_names(state), **heads}),
        **prefixed("module.momentum_encoder.", {k: v + 1 for k, v in state.items()}),
        "module.predictor.0.weight": noise(8, 8),
    }
    return training(arch="vit_large", state_dict=encoders, scaler={"scale": 65536.0})


def as_ijepa(state):
    return training(
        encoder=prefixed("module.", state),
        predictor={"module.predictor_embed.weight": noise(3, WIDTH)},
        target_encoder=prefixed("module.", {key: value + 1 for key, value in state.items()}),
        opt={"state": {}, "param_groups": []},
        scaler=None,
        loss=0.3,
    )


def as_mae(state):
    decoder = {
        "mask_token": noise(1, 1, 16),
        "decoder_pos_embed": noise(1, 197, 16),
        "decoder_embed.weight": noise(16, WIDTH),
        "decoder_blocks.0.norm1.weight": noise(16),
        "decoder_norm.weight": noise(16),
        "decoder_pred.weight": noise(768, 16),
    }
    return training(model={**state, **decoder}, scaler={})


def as_dino(state, backbone="backbone."):
    head = {"head.mlp.0.weight": noise(8, WIDTH), "head.last_layer.weight_g": noise(8, 1)}
    networks = {**prefixed(backbone, state), **head}
    return training(
        student=prefixed("module.", {key: value + 1 for key, value in networks.items()}),
        teacher=networks,
        dino_loss={"center": noise(1, 8)},
        fp16_scaler=None,
    )


def as_clip(state):
    """OpenAI's model: half precision, text tower and visual tower, no patch bias."""
    swaps = [
        (r"^norm_pre\.", "ln_pre."),
        (r"^norm\.", "ln_post."),
        (r"^patch_embed\.proj\.weight", "conv1.weight"),
        (r"^blocks\.", "transformer.resblocks."),
        (r"\.norm(\d)\.", r".ln_\1."),
        (r"attn\.qkv\.", "attn.in_proj_"),
        (r"attn\.proj\.", "attn.out_proj."),
        (r"mlp\.fc1\.", "mlp.c_fc."),
        (r"mlp\.fc2\.", "mlp.c_proj."),
    ]
    visual = {}
    for key, value in state.items():
        for pattern, replacement in swaps:
            key = re.sub(pattern, replacement, key)
        visual[key] = value
    visual["class_embedding"] = visual.pop("cls_token")[0, 0]
    visual["positional_embedding"] = visual.pop("pos_embed")[0]
    return visual


def as_openai(state):
    text = {
        "positional_embedding": noise(77, 16),
        "text_projection": noise(16, 8),
        "logit_scale": torch.tensor(4.6),
        "token_embedding.weight": noise(50, 16),
        "transformer.resblocks.0.ln_1.weight": noise(16),
        "ln_final.weight": noise(16),
        "visual.proj": noise(WIDTH, 8),
    }
    whole = {**prefixed("visual.", as_clip(state)), **text}
    return {key: value.half() for key, value in whole.items()}


def as_dinov2(state):
    """Registers, a class row in the position embedding and a mask token, as they publish it."""
    row = torch.full((1, 1, WIDTH), 0.25)
    rest = {key: state[key] for key in state if key not in ("reg_token", "pos_embed")}
    return {
        **rest,
        "mask_token": torch.zeros(1, WIDTH),
        "register_tokens": state["reg_token"],
        "cls_token": state["cls_token"] - row,
        "pos_embed": torch.cat((row, state["pos_embed"]), 1),
    }


def as_dinov3(state, bias=0.0):
    swaps = {
        "reg_token": "storage_tokens",
        ".gamma_1": ".ls1.gamma",
        ".gamma_2": ".ls2.gamma",
        ".mlp.fc1_g.": ".mlp.w1.",
        ".mlp.fc1_x.": ".mlp.w2.",
    }
    swaps |= {".mlp.fc2.": ".mlp.w3."} if any(".mlp.fc1_g." in key for key in state) else {}
    layout = {"mask_token": noise(1, WIDTH), "rope_embed.periods": noise(3)}
    for key, value in state.items():
        if key.endswith(("q_bias", "v_bias")):
            continue
        for ours, theirs in swaps.items():
            key = key.replace(ours, theirs)
        layout[key] = value
        if key.endswith("attn.qkv.weight"):
            block = key.removesuffix("qkv.weight")
            zeros, query = torch.zeros(WIDTH), state.get(block + "q_bias")
            parts = [zeros + bias, zeros, zeros] if query is None else None
            parts = parts or [query, zeros, state[block + "v_bias"]]
            layout[block + "qkv.bias"] = torch.cat(parts)
            layout[block + "qkv.bias_mask"] = torch.ones(3 * WIDTH)
    return layout


def bare(state):
    return dict(state)


PUBLISHED_LAYOUTS = [
    ("mocov3-vit-s", as_mocov3, 14, "vit-s-300ep.pth.tar"),
    ("mocov3-vit-b", as_mocov3, 14, "vit-b-300ep.pth.tar"),
    ("mocov3-vit-l", as_mocov3, 14, "mocov3_vitl.pth"),
    ("jepa-vit-h", as_ijepa, 16, "IN1K-vit.h.14-300e.pth.tar"),
    ("mae-vit-l", as_mae, 14, "mae_visualize_vit_large.pth"),
    ("mae-vit-l", lambda state: {"model": state}, 14, "mae_pretrain_vit_large.pth"),
    ("dinov1-vit-b", as_dino, 14, "dino_vitbase16_pretrain_full_checkpoint.pth"),
    ("dinov1-vit-b", lambda state: as_dino(state, "module.backbone."), 14, "wrapped.pth"),
    ("dinov1-vit-b", bare, 14, "dino_vitbase16_pretrain.pth"),
    ("clip-vit-l", as_openai, 16, "ViT-L-14.pt"),
    ("dinov2-vit-b", lambda state: {**state, "mask_token": noise(1, 24)}, 37, "vitb14.pth"),
    ("dinov2reg-vit-s", as_dinov2, 37, "dinov2_vits14_reg4_pretrain.pth"),
    ("dinov3-vit-b", as_dinov3, 16, "dinov3_vitb16_pretrain_lvd1689m.pth"),
    ("dinov3-vit-hplus", as_dinov3, 16, "dinov3_vith16plus_pretrain_lvd1689m.pth"),
    ("pe-spatial-vit-s", as_clip, 32, "PE-Spatial-S16-512.pt"),
    (
        "pe-spatial-vit-b",
        lambda s: prefixed("visual.", as_clip(s)),
        32,
        "PE-Spatial-B16-512.safetensors",
    ),
]


def written(layout, path):
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in layout.items()}, path)
    else:
        torch.save(layout, path)
    return path


@pytest.mark.parametrize(("name", "layout", "grid", "file"), PUBLISHED_LAYOUTS)
def test_published_layouts_load(name, layout, grid, file, tmp_path):
    # MoCo v3's misnamed weights are in blocks 13 and 14.
    depth = {"depth": 16} if name == "mocov3-vit-l" else {}
    heads = {"num_heads": 12} if name in ("mocov3-vit-s", "mocov3-vit-b") else {}
    spec = reduced(name, **depth, **heads)
    source = published(name, grid, **depth, **heads)
    path = written(layout(source.state_dict()), tmp_path / file)
    if name == "clip-vit-l":
        source.load_state_dict({k: v.half().float() for k, v in source.state_dict().items()})
    for resolution in (256, 512):
        teacher = loaded(spec, path, resolution=resolution)
        pixels = images(resolution, count=1)
        side = resolution // 16
        expected = tokens_by_timm(spec, source, (side, side), pixels)
        found = teacher.tokens(pixels)
        assert torch.allclose(found.patches, expected[:, spec.num_prefix_tokens :], atol=1e-5)
        if found.cls is not None:
            assert torch.allclose(found.cls, expected[:, 0], atol=1e-5)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: prefixed("net.", state),
        lambda state: {"state_dict": prefixed("module.model.", state), "epoch": 3},
        lambda state: {"model": {"state_dict": prefixed("backbone.", state)}},
        lambda state: prefixed("_orig_mod.", state),
        lambda state: {key.replace("blocks.", "blocks._orig_mod."): state[key] for key in state},
    ],
)
@pytest.mark.parametrize("name", ["dinov2-vit-b", "mae-vit-l"])
def test_wrapped_weights_load(name, wrap, tmp_path):
    spec = reduced(name)
    source = published(name).state_dict()
    path = written(wrap({**source, "mask_token": noise(1, WIDTH)}), tmp_path / "wrapped.pt")
    found = loaded(spec, path, resolution=256).encoder.state_dict()
    for key in found.keys() - {"pos_embed"}:
        assert torch.equal(found[key], source[key]), key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_leave_timms_own_names_alone(layout):
    headless = PLAIN.model_copy(update={"num_classes": 0})
    state = build_encoder(headless, resolution=16).state_dict()
    # DINOv3's models in timm have no bias of that name.
    kept = {key: state[key] for key in state if not key.endswith("qkv.bias")}
    found = LAYOUTS[layout](kept)
    assert found.keys() == kept.keys()
    assert all(found[key] is kept[key] for key in kept)


VALUES = [
    torch.zeros(()),
    torch.zeros(0),
    torch.zeros(7),
    torch.zeros(1, 3, 5),
    torch.zeros(2, 1, 1, 1),
    torch.arange(6),
    torch.zeros(3, dtype=torch.bool),
    torch.ones(2, device="meta"),
    torch.eye(3).to_sparse(),
    "text",
    None,
]


@pytest.mark.parametrize("name", ["dinov2-vit-b", "dinov3-vit-b", "mocov3-vit-s", "clip-vit-l"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_no_content_under_a_known_name_gives_any_other_error(tmp_path_factory, name, data):
    spec = reduced(name)
    layout = as_clip if name == "clip-vit-l" else dict
    state = {**layout(published(name).state_dict()), "blocks.0.attn.qkv.bias": torch.zeros(72)}
    for key in data.draw(st.lists(st.sampled_from(sorted(state)), min_size=1, max_size=3)):
        state[key] = data.draw(st.sampled_from(VALUES))
    path = tmp_path_factory.getbasetemp() / "teacher.pt"
    torch.save(state, path)
    try:
        loaded(spec, path, resolution=256)
    except DataError as error:
        said = str(error)
    else:
        said = f"teacher weights {path}"
    assert said.startswith(f"teacher weights {path}")


def test_dinov3s_biases_have_to_fit(tmp_path):
    """timm's filter would drop them from a model without biases: a different teacher."""
    spec = reduced("dinov3-vit-b")
    state = published("dinov3-vit-b").state_dict()
    path = written(as_dinov3(state, bias=0.5), tmp_path / "dinov3.pth")
    with pytest.raises(DataError, match=r"4 unexpected: blocks\.0\.attn\.q_bias"):
        loaded(spec, path, resolution=256)
    update = {"architecture": "vit_base_patch16_dinov3_qkvb.lvd1689m"}
    spec = spec.model_copy(update=update)
    source = scrambled(plain_encoder(spec, 16))
    path = written(as_dinov3(source.state_dict()), tmp_path / "biased.pth")
    found = loaded(spec, path, resolution=256).tokens(images(256))
    expected = tokens_by_timm(spec, source, (16, 16), images(256))
    assert torch.allclose(found.patches, expected[:, 5:], atol=1e-5)


# The file's table and the teacher's grid: up, down, same, and every way of not being square.
GRIDS = [
    (9, (16, 16)),
    (37, (16, 16)),
    (16, (16, 16)),
    (14, (16, 24)),
    (20, (12, 8)),
    (16, (8, 32)),
]


@pytest.mark.parametrize(("side", "grid"), GRIDS)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "name",
    ["dinov2-vit-s", "dinov2reg-vit-s", "jepa-vit-h", "mae-vit-l", "pe-core-vit-b"],
)
def test_positions_are_resampled_as_timm_does(name, side, grid, half, tmp_path):
    source = published(name, grid=side)
    if half:
        source = source.half()
    path = saved(source, tmp_path)
    resolution = (16 * grid[0], 16 * grid[1])
    encoder = loaded(reduced(name), path, resolution=resolution).encoder
    table = source.pos_embed.float()
    prefix = table.shape[1] - side * side
    expected = resample_abs_pos_embed(
        table, new_size=list(grid), old_size=[side, side], num_prefix_tokens=prefix
    )
    assert encoder.pos_embed.dtype == torch.float32
    assert torch.equal(encoder.pos_embed, expected)
    assert torch.equal(encoder.pos_embed[:, :prefix], table[:, :prefix])


def test_positions_of_unknown_models_are_resampled_too(tmp_path):
    """timm does not know the size they were made for, and would keep any of the same number."""
    spec = PLAIN.model_copy(update={"input_size": None, "input_size_per_256": 256})
    source = scrambled(build_encoder(spec, resolution=16))
    found = loaded(spec, saved(source, tmp_path), resolution=(8, 32)).encoder.pos_embed
    expected = resample_abs_pos_embed(
        source.pos_embed, new_size=[2, 8], old_size=[4, 4], num_prefix_tokens=1
    )
    assert torch.equal(found, expected)


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


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_a_table_of_no_square_stays_what_it_was_trained_as(shape, tmp_path):
    spec = PLAIN.model_copy(update={"input_size": None, "input_size_per_256": 256})
    source = scrambled(build_encoder(spec, resolution=shape))
    teacher = loaded(spec, saved(source, tmp_path), resolution=shape)
    assert torch.equal(teacher.encoder.pos_embed, source.pos_embed)
    assert teacher.grid == (shape[0] // 4, shape[1] // 4)


def test_a_head_is_left_out_unless_asked_for(tmp_path):
    path = saved(scrambled(build_encoder(PLAIN, resolution=16)), tmp_path)
    headless = PLAIN.model_copy(update={"num_classes": 0})
    teacher = loaded(headless, path)
    features = teacher.features(images(16))
    assert features.logits is None
    assert torch.equal(features.pooled, loaded(PLAIN, path).features(images(16)).pooled)
    path = saved(teacher.encoder, tmp_path, "headless.safetensors")
    with pytest.raises(DataError, match=r"2 missing: head\.weight, head\.bias"):
        loaded(PLAIN, path)


def test_siglips_pooling_head_is_left_out(tmp_path):
    spec = reduced("siglip2-vit-b")
    whole = spec.model_copy(update={"architecture": "vit_base_patch16_siglip_256.v2_webli"})
    source = scrambled(plain_encoder(whole, 16))
    assert any(key.startswith("attn_pool.") for key in source.state_dict())
    teacher = loaded(spec, saved(source, tmp_path), resolution=256)
    with torch.no_grad():
        expected = source.forward_features(teacher.preprocess(images(256)))
    assert torch.allclose(teacher.tokens(images(256)).patches, expected, atol=1e-5)


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
        (
            lambda s: {"stem.weight": torch.ones(2)},
            ["32 missing: cls_token, pos_embed", " and 27 more"],
        ),
        (
            lambda s: {**s, "patch_embed.proj.weight": torch.ones(24, 3, 8, 8)},
            ["patches of (8, 8) px, but the teacher's are (4, 4)"],
        ),
        (
            lambda s: {
                "visual.class_embedding": s["cls_token"],
                "visual.conv1.weight": torch.ones(24, 3, 8, 8),
            },
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
        ("broken.pth.tar", b"PK\x03\x04 cut", "cannot be read"),
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
    """A class that a hostile pickle could name."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": Payload()}, r"Python objects \(\S*Payload\).*save its state_dict alone"),
        (torch.ones(3), "holds a Tensor, not a state_dict"),
        ({"epoch": 3}, "no state_dict where the layout 'timm' has it, but epoch"),
        ({"model": {}}, "no state_dict"),
        (training(model={"weight": 3}), "but args, epoch, model"),
        ({0: torch.ones(1), 1: torch.ones(1)}, "2 unexpected: 0, 1"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_are_opened_as_weights_only(content, message, legacy, tmp_path):
    path = tmp_path / "foreign.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(DataError, match=message) as caught:
        loaded(PLAIN, path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_opening_settings_leaves_no_trace(legacy, tmp_path):
    source = scrambled(build_encoder(PLAIN, resolution=16))
    path = tmp_path / "training.pth"
    content = training(model=source.state_dict())
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    teacher = loaded(PLAIN, path)
    assert torch.equal(teacher.encoder.pos_embed, source.pos_embed)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_archives_are_named(tmp_path):
    """OpenAI's own download is an archive of TorchScript, a program, so it is not opened."""
    path = tmp_path / "ViT-L-14.pt"
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(path)
    with pytest.raises(DataError, match=r"TorchScript archive; load it with"):
        loaded(PLAIN, path)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The cache of the Hub's client as the only place for published weights."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("SREPA_FETCHED", str(tmp_path / "fetched"))
    return tmp_path / "hub"


def in_cache(cache, repository, state):
    revision = "0" * 40
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "snapshots" / revision).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    save_file(state, folder / "snapshots" / revision / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "repository", "head"),
    [
        ("dinov2-vit-s", "timm/vit_small_patch14_dinov2.lvd142m", 0),
        ("mae-vit-l", "timm/vit_large_patch16_224.mae", 0),
        ("clip-vit-l", "timm/vit_large_patch14_clip_224.openai", 768),
        ("siglip2-vit-b", "timm/vit_base_patch16_siglip_gap_256.v2_webli", 0),
        ("pe-core-vit-b", "timm/vit_pe_core_base_patch16_224.fb", 1024),
        ("dinov3-vit-s", "timm/vit_small_patch16_dinov3.lvd1689m", 0),
    ],
)
def test_published_weights_are_found_in_the_cache(name, repository, head, offline):
    spec = reduced(name)
    whole = spec.model_copy(update={"num_classes": head})
    encoder = scrambled(plain_encoder(whole, 32))
    in_cache(offline, repository, encoder.state_dict())
    teacher = load_teacher(TeacherConfig(spec=spec, dtype="fp32"), resolution=256, device="cpu")
    expected = tokens_by_timm(whole, encoder, (16, 16), images(256))
    found = teacher.tokens(images(256)).patches
    assert torch.allclose(found, expected[:, spec.num_prefix_tokens :], atol=1e-5)


def test_weights_that_were_not_fetched_say_what_to_do(offline):
    config = TeacherConfig(name="dinov3-vit-s")
    with pytest.raises(DataError, match=r"dinov3\.lvd1689m'.* were not fetched") as caught:
        load_teacher(config, resolution=16, device="cpu")
    assert "give teacher.weights: a local .safetensors" in str(caught.value)


UNPUBLISHED = [name for name, spec in TEACHERS.items() if "." not in spec.architecture]


@pytest.mark.parametrize("name", UNPUBLISHED)
def test_rows_without_published_weights_demand_a_file(name, offline):
    """For an architecture's name alone, timm would fetch weights of another training."""
    config = TeacherConfig(name=name)
    with pytest.raises(ConfigError, match=rf"teacher\.weights: .*'{name}'; give a local") as caught:
        load_teacher(config, resolution=256, device="cpu")
    assert "tag" not in str(caught.value)
    assert TeacherConfig(name=name, weights=Path("somewhere.pt")).weights_fault() is None


def test_an_architecture_without_tag_demands_a_file_or_a_tag():
    with pytest.raises(ConfigError, match=r"with a tag: .*vit_tiny_patch16_224"):
        load_teacher(TeacherConfig(spec=PLAIN), resolution=16, device="cpu")


def test_safetensors_hold_what_was_saved(tmp_path):
    source = scrambled(build_encoder(PLAIN, resolution=16))
    path = saved(source, tmp_path)
    teacher = loaded(PLAIN, path)
    stored = load_file(path)
    for key, value in teacher.encoder.state_dict().items():
        assert torch.equal(value, stored[key])
