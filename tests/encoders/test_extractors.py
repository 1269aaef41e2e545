"""Every row of `EXTRACTORS` loads, gives features and says what decides them."""

import json
from dataclasses import replace

import pytest
import timm
from safetensors.torch import save_file
from teacher_models import PLAIN, SMALL, images, plain_encoder, published, reduced, saved, scrambled

from srepa_ds.encoders.extractors import EXTRACTORS, ExtractorConfig, load_extractor
from srepa_ds.encoders.features import Extractor
from srepa_ds.encoders.published import find_published
from srepa_ds.encoders.teacher import TEACHERS
from srepa_ds.encoders.timm_extractor import FDR_ENCODERS
from srepa_ds.errors import ConfigError, DataError
from srepa_ds.files import sha256_of


@pytest.fixture
def weights_of(monkeypatch, tmp_path, inception_file):
    """Makes a row of the table small, and returns a file of weights for it."""

    def arrange(name):
        if name == "inception":
            return inception_file
        if name in TEACHERS:
            source = published(name, grid=8)
            monkeypatch.setitem(TEACHERS, name, reduced(name))
            return saved(source, tmp_path)
        spec = FDR_ENCODERS[name]
        own = {"depths": [1] * 4, "dims": [8, 12, 16, 24]} if name == "fdr-convnext" else SMALL
        small = replace(spec, arguments={**spec.arguments, **own}, width=24)
        monkeypatch.setitem(FDR_ENCODERS, name, small)
        source = scrambled(timm.create_model(spec.architecture, pretrained=False, **own))
        save_file(source.state_dict(), tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    return arrange


@pytest.mark.parametrize("name", EXTRACTORS)
def test_every_row_is_an_extractor(name, weights_of):
    weights = weights_of(name)
    config = ExtractorConfig(name=name, weights=weights, weights_sha256=sha256_of(weights))
    assert config.weights_fault() is None
    extractor = load_extractor(config, resolution=256, device="cpu")
    assert isinstance(extractor, Extractor)
    found = extractor.features(images(256))
    assert found.pooled.shape == (2, extractor.width)
    assert found.pooled.isfinite().all()
    logits, spatial = found.logits, found.spatial
    assert (0 if logits is None else logits.shape[1]) == extractor.num_classes
    assert (None if spatial is None else spatial.shape[1]) == extractor.spatial_width
    identity = extractor.identity
    assert json.loads(json.dumps(identity)) == identity
    assert identity["weights_sha256"]
    assert identity["dtype"] == ("float32" if name == "inception" else "bfloat16")
    assert "name" in identity or "spec" in identity
    other = config.model_copy(update={"weights_sha256": "0" * 64})
    with pytest.raises(DataError, match=r"extractor\.weights_sha256 is 0"):
        load_extractor(other, resolution=256, device="cpu")


@pytest.mark.parametrize("name", EXTRACTORS)
def test_without_weights_they_are_published_or_it_is_a_fault(name, monkeypatch, tmp_path):
    monkeypatch.setenv("SREPA_FETCHED", str(tmp_path / "fetched"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    config = ExtractorConfig(name=name)
    fault = config.weights_fault()
    if fault is None:
        assert find_published(config.row.published(config)) is None
        return
    assert fault.path == "weights"
    with pytest.raises(ConfigError, match=r"extractor\.weights"):
        load_extractor(config, resolution=256, device="cpu")


def test_any_timm_vit_is_an_extractor(tmp_path):
    source = scrambled(plain_encoder(PLAIN, 4))
    config = ExtractorConfig(spec=PLAIN, weights=saved(source, tmp_path), dtype="fp32")
    extractor = load_extractor(config, resolution=16, device="cpu")
    found = extractor.features(images(16))
    assert found.pooled.shape == (2, 24)
    assert found.logits.shape == (2, 5)
    assert extractor.identity["spec"]["architecture"] == PLAIN.architecture


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"name": "inception"}, "inception"),
        ({"name": "inception", "dtype": "fp32"}, "inception"),
        ({"name": "dinov2-vit-l"}, "dinov2-vit-l"),
        ({"name": "dinov2-vit-l", "dtype": "bf16"}, "dinov2-vit-l"),
        ({"name": "dinov2-vit-l", "dtype": "fp32"}, "dinov2-vit-l (fp32)"),
        ({"name": "fdr-mae"}, "fdr-mae"),
        ({"spec": PLAIN}, PLAIN.architecture),
    ],
)
def test_labels(settings, label):
    assert ExtractorConfig(**settings).label == label
