"""The encoders of FDr6 against plain calls of timm, with small random weights."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file
from teacher_models import SMALL, images, scrambled
from timm.layers import resample_abs_pos_embed
from torch.nn.functional import interpolate, pad

from srepa_ds.encoders.extractors import ExtractorConfig, load_extractor
from srepa_ds.encoders.features import Extractor
from srepa_ds.encoders.timm_extractor import (
    FDR_ENCODERS,
    build_pooled_encoder,
    load_timm_extractor,
)
from srepa_ds.errors import ConfigError, DataError

SMALL_CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24]}
# Side of the input after padding to whole patches.
PADDED = {
    "fdr-convnext": 224,
    "fdr-dinov2": 266,
    "fdr-mae": 224,
    "fdr-siglip": 224,
    "fdr-clip": 266,
}


def small(name):
    """Returns a row with narrow blocks."""
    spec = FDR_ENCODERS[name]
    arguments = {**spec.arguments, **(SMALL_CONVNEXT if name == "fdr-convnext" else SMALL)}
    return replace(spec, arguments=arguments, width=24)


def plain_model(name, **arguments):
    own = SMALL_CONVNEXT if name == "fdr-convnext" else SMALL
    return timm.create_model(FDR_ENCODERS[name].architecture, pretrained=False, **own, **arguments)


@pytest.fixture(params=FDR_ENCODERS)
def name(request):
    return request.param


@pytest.fixture
def source(name):
    """A model of the published input and classes."""
    return scrambled(plain_model(name))


@pytest.fixture
def weights(source, tmp_path):
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def loaded(name, weights, resolution, **settings):
    spec = small(name)
    return load_timm_extractor(
        spec, weights, name=name, resolution=resolution, device="cpu", **settings
    )


def inputs_of(name, pixels):
    """Returns the padded input: antialiased, not clamped, normalised, zeros right and below."""
    spec, side = FDR_ENCODERS[name], FDR_ENCODERS[name].input_size
    unit = pixels.float() / 255
    if unit.shape[-1] != side:
        unit = interpolate(unit, (side, side), mode="bicubic", antialias=True)
        assert unit.min() < 0
    normal = (unit - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]
    more = PADDED[name] - side
    return pad(normal, (0, more, 0, more))


def by_timm(name, source, pixels):
    """Returns timm's features for an input of a fixed size."""
    inputs = inputs_of(name, pixels)
    if name == "fdr-convnext":
        return source.forward_features(inputs).mean((2, 3))
    model = plain_model(name, img_size=PADDED[name]).eval()
    state = dict(source.state_dict())
    grid, prefix = model.patch_embed.grid_size, model.num_prefix_tokens
    old = source.patch_embed.grid_size
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], new_size=list(grid), old_size=list(old), num_prefix_tokens=prefix
    )
    model.load_state_dict(state)
    tokens = model.forward_features(inputs)
    if name == "fdr-siglip":
        return model.fc_norm(model.attn_pool(tokens))
    assert not isinstance(model.norm, torch.nn.Identity)
    return tokens[:, 0]


@pytest.mark.parametrize("resolution", [256, 300])
def test_features_are_those_of_timm(name, source, weights, resolution):
    pixels = images(resolution)
    with torch.no_grad():
        expected = by_timm(name, source, pixels)
    exact = loaded(name, weights, resolution, dtype=torch.float32)
    found = exact.features(pixels)
    assert found.pooled.shape == (2, 24)
    assert found.logits is None
    assert found.spatial is None
    assert torch.allclose(found.pooled, expected, rtol=1e-4, atol=1e-4)
    rounded = loaded(name, weights, resolution).features(pixels).pooled
    assert rounded.dtype == torch.float32
    error = (rounded - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.1, "products in bf16"


def test_rows_describe_the_published_models(name):
    spec = FDR_ENCODERS[name]
    with torch.device("meta"):
        encoder = build_pooled_encoder(spec)
        features = encoder.forward_features(torch.empty(1, 3, spec.input_size, spec.input_size))
        pooled = encoder.forward_head(features, pre_logits=True)
    assert pooled.shape == (1, spec.width)
    found = encoder.pretrained_cfg
    assert torch.allclose(torch.tensor(found["mean"]), torch.tensor(spec.mean))
    assert torch.allclose(torch.tensor(found["std"]), torch.tensor(spec.std))
    assert ExtractorConfig(name=name).weights_fault() is None


def test_they_are_frozen_extractors(name, weights):
    extractor = loaded(name, weights, 64)
    assert isinstance(extractor, Extractor)
    assert (extractor.width, extractor.num_classes, extractor.spatial_width) == (24, 0, None)
    assert not extractor.train().training
    assert not extractor.encoder.training
    assert not any(parameter.requires_grad for parameter in extractor.parameters())


def test_identities_tell_weights_rows_and_precisions_apart(name, weights, tmp_path):
    identity = loaded(name, weights, 64).identity
    assert json.loads(json.dumps(identity)) == identity
    assert identity["name"] == name
    assert identity["dtype"] == "bfloat16"
    exact = loaded(name, weights, 64, dtype=torch.float32).identity
    assert {key for key in identity if identity[key] != exact[key]} == {"dtype"}
    save_file(scrambled(plain_model(name), seed=1).state_dict(), tmp_path / "other.safetensors")
    other = loaded(name, tmp_path / "other.safetensors", 64).identity
    assert {key for key in identity if identity[key] != other[key]} == {"weights_sha256"}


def test_wrong_uses_have_one_message(tmp_path, monkeypatch):
    monkeypatch.setenv("SREPA_FETCHED", str(tmp_path / "fetched"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(FDR_ENCODERS, "fdr-mae", small("fdr-mae"))
    config = ExtractorConfig(name="fdr-mae")
    with pytest.raises(DataError, match=r"not fetched.*or give extractor\.weights"):
        load_extractor(config, resolution=32, device="cpu")
    missing = config.model_copy(update={"weights": tmp_path / "none.pt"})
    with pytest.raises(DataError, match=r"extractor weights .*none\.pt: no such file"):
        load_extractor(missing, resolution=32, device="cpu")
    with pytest.raises(ConfigError, match=r"'fdr-mae' takes square images.*32 x 48 px"):
        load_extractor(missing, resolution=(32, 48), device="cpu")
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    foreign = config.model_copy(update={"weights": tmp_path / "x.safetensors"})
    with pytest.raises(DataError, match=r"do not fit the extractor\n.*missing"):
        load_extractor(foreign, resolution=32, device="cpu")


def test_images_of_another_size_are_refused(tmp_path):
    model = scrambled(plain_model("fdr-mae"))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    extractor = loaded("fdr-mae", tmp_path / "model.safetensors", 32)
    with pytest.raises(ValueError, match=r"fdr-mae takes \(3, 32, 32\) of torch\.uint8"):
        extractor.features(images(33))
