"""Inception against golden features, torch-fidelity's network called plainly, and TensorFlow 1."""

import math
import os
import sys

import numpy as np
import pytest
import torch
from inception_weights import recipe, settings_of, write_weights
from places import GOLDEN
from safetensors.torch import load_file, save_file
from teacher_models import images
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from srepa_ds.encoders.extractors import ExtractorConfig, load_extractor
from srepa_ds.encoders.features import Extractor
from srepa_ds.encoders.inception import load_inception
from srepa_ds.errors import ConfigError, DataError
from srepa_ds.files import sha256_of
from srepa_ds.schema import validated

SETS = ("s64.sample", "s64.ref", "s256")


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "inception.safetensors")


@pytest.fixture(scope="module")
def inception(inception_file):
    return load_inception(inception_file, sha256="of a test", device="cpu")


@pytest.fixture(scope="module")
def other_file(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("other") / "other.pth", seed=3)


def plain(path, *layers):
    """Returns torch-fidelity's own network with weights that its loader reads."""
    return FeatureExtractorInceptionV3(
        "inception", list(layers), feature_extractor_weights_path=path
    )


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_golden(inception, golden, name, chosen):
    found = inception.features(golden[f"{name}.images"][chosen].permute(0, 3, 1, 2))
    parts = {"pool3": found.pooled, "spatial": found.spatial, "logits_without_bias": found.logits}
    compared = [key for key in parts if f"{name}.{key}" in golden]
    assert compared[:2] == ["pool3", "spatial"]
    for key in compared:
        assert relative(parts[key], golden[f"{name}.{key}"][chosen]) < 1e-4, (name, key)


def test_the_recipe_gives_the_weights_of_the_golden_features(inception_file, golden):
    state = torch.load(inception_file)
    total = sum(value.double().abs().sum().item() for value in state.values())
    assert total == pytest.approx(golden["weights.checksum"].item(), rel=1e-12)


@pytest.mark.parametrize("name", SETS)
def test_golden_features(inception, golden, name):
    assert_golden(inception, golden, name, slice(1, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_golden_features_of_all_images(inception, golden, name):
    assert_golden(inception, golden, name, slice(None))


@pytest.mark.parametrize("size", [(75, 131), (299, 299), (512, 33)])
def test_other_weights_and_sizes_agree_with_the_plain_network(other_file, size):
    pixels = images(size, seed=5)
    network = plain(other_file, "2048", "logits_unbiased", "logits")
    kept = []
    network.Mixed_6d.register_forward_hook(lambda module, given, output: kept.append(output))
    pooled, unbiased, biased = network(pixels)
    found = load_inception(other_file, sha256="", device="cpu").features(pixels)
    assert relative(found.pooled, pooled) < 1e-6
    assert relative(found.logits, unbiased) < 1e-6
    assert relative(found.logits, biased) > 0.1, "the bias has no part in it"
    spatial = found.spatial.reshape(2, 17, 17, 7)
    for channel in range(7):
        assert relative(spatial[..., channel], kept[0][:, channel]) < 1e-6


def test_spatial_features_have_the_channels_last(inception):
    kept = []
    block = inception.network.get_submodule("Mixed_6d.branch1x1")
    handle = block.register_forward_hook(lambda module, given, output: kept.append(output))
    found = inception.features(images(40)).spatial
    handle.remove()
    (branch,) = kept
    assert branch.shape == (2, 192, 17, 17)
    assert found.shape == (2, 2023)
    assert branch.min() == 0
    for row, column, channel in ((0, 0, 0), (0, 0, 6), (0, 1, 0), (5, 16, 3), (16, 16, 6)):
        index = (row * 17 + column) * 7 + channel
        assert torch.equal(found[:, index], branch[:, channel, row, column])


def of_tensorflow(pixels, side=299):
    """Resizes as TensorFlow 1: source = target * in / out, no half-pixel centres, no filter.

    Coordinates are float32, as in its kernel.
    """
    result = pixels.double().numpy()
    for axis in (3, 2):
        length = result.shape[axis]
        source = np.arange(side, dtype=np.float32) * np.float32(length / side)
        low = np.floor(source).astype(int)
        high = np.minimum(low + 1, length - 1)
        share = (source - low.astype(np.float32)).reshape((-1, 1) if axis == 2 else (-1,))
        first, second = result.take(low, axis), result.take(high, axis)
        result = first + (second - first) * share
    return torch.from_numpy((result - 128) / 128)


@pytest.mark.parametrize("size", [64, (299, 200), (600, 31)])
def test_the_network_sees_the_images_as_tensorflow_resizes_them(inception, size):
    seen = []
    first = inception.network.get_submodule("Conv2d_1a_3x3")
    handle = first.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    pixels = images(size, count=1)
    inception.features(pixels)
    handle.remove()
    assert seen[0].shape == (1, 3, 299, 299)
    assert torch.allclose(seen[0].double(), of_tensorflow(pixels), atol=1e-5)
    centred = torch.nn.functional.interpolate(pixels.float(), (299, 299), mode="bilinear")
    assert not torch.allclose(seen[0], (centred - 128) / 128, atol=1e-2)


def test_the_batch_size_does_not_matter(inception):
    pixels = images(48, count=5)
    together = inception.features(pixels)
    for begin, end in ((0, 1), (1, 3), (3, 5)):
        part = inception.features(pixels[begin:end])
        for found, whole in zip(part, together, strict=True):
            assert relative(found, whole[begin:end]) < 1e-5


def test_products_are_exact_float32_everywhere(inception):
    seen = []
    layer = inception.network.get_submodule("Mixed_5b")

    def look(module, given, output):
        backends = torch.backends
        seen.append((backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision))
        seen.append(output.dtype)

    before = torch.backends.cudnn.conv.fp32_precision
    handle = layer.register_forward_hook(look)
    pixels = images(32, count=1)
    expected = inception.features(pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = inception.features(pixels)
    handle.remove()
    assert seen == [("ieee", "ieee"), torch.float32] * 2
    assert torch.backends.cudnn.conv.fp32_precision == before
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_it_is_a_frozen_extractor(inception):
    assert isinstance(inception, Extractor)
    assert (inception.width, inception.spatial_width, inception.num_classes) == (2048, 2023, 1008)
    assert not any(parameter.requires_grad for parameter in inception.parameters())
    assert not inception.network.training


class _Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_pickle_that_would_run_code_does_not(tmp_path):
    marker, path = tmp_path / "it ran", tmp_path / "attack.pth"
    torch.save({"fc.bias": _Attack(marker)}, path)
    config = validated(ExtractorConfig, settings_of(path), source="test")
    with pytest.raises(DataError, match=r"attack\.pth: cannot be read: it holds Python objects"):
        load_extractor(config, resolution=32, device="cpu")
    assert not marker.exists()
    with pytest.raises(Exception, match=r"state_dict|Missing|fc\.bias"):
        plain(path, "2048")
    assert marker.exists(), "torch-fidelity's own loader runs it"


def test_loading_leaves_random_numbers_alone(inception_file):
    before = torch.get_rng_state()
    load_inception(inception_file, sha256="", device="cpu")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("fc.weight"), r"1 missing: fc\.weight"),
        (lambda state: state.update(extra=torch.ones(1)), "1 unexpected: extra"),
        (
            lambda state: state.update({"fc.bias": torch.ones(1000)}),
            r"1 of another shape: fc\.bias \(1000,\) instead of \(1008,\)",
        ),
        (lambda state: state.clear(), r"\d+ missing: Conv2d_1a_3x3\.bn\.bias"),
    ],
)
def test_weights_must_fit(inception_file, tmp_path, change, words):
    state = torch.load(inception_file)
    change(state)
    save_file(state, tmp_path / "changed.safetensors")
    with pytest.raises(DataError, match=words):
        load_inception(tmp_path / "changed.safetensors", sha256="", device="cpu")


def test_a_file_of_other_things_is_refused(tmp_path):
    torch.save({"model": {}, "step": 3}, tmp_path / "x.pth")
    with pytest.raises(DataError, match="holds no state_dict, but model, step"):
        load_inception(tmp_path / "x.pth", sha256="", device="cpu")


def test_counters_of_batches_may_be_missing(inception_file, tmp_path):
    state = {k: v for k, v in torch.load(inception_file).items() if "num_batches" not in k}
    assert 0 < len(state) < len(recipe())
    save_file(state, tmp_path / "older.safetensors")
    load_inception(tmp_path / "older.safetensors", sha256="", device="cpu")


def test_without_torch_fidelity_the_extra_is_named(inception_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(DataError, match=r"pip install 'srepa_ds\[eval\]'"):
        load_inception(inception_file, sha256="", device="cpu")


def test_local_weights_are_compared_with_the_published_hash(inception_file, tmp_path):
    def loaded(**settings):
        tree = {"name": "inception", "weights": str(inception_file), **settings}
        config = validated(ExtractorConfig, tree, source="test")
        return load_extractor(config, resolution=32, device="cpu")

    found = sha256_of(inception_file)
    with pytest.raises(DataError, match=rf"not the published weights \(sha256 {found}, expected 6"):
        loaded()
    with pytest.raises(DataError, match=rf"has sha256 {found}, and extractor\.weights_sha256 is 0"):
        loaded(weights_sha256="0" * 64)
    extractor = loaded(weights_sha256=found)
    assert extractor.identity == {"name": "inception", "weights_sha256": found, "dtype": "float32"}
    with pytest.raises(DataError, match=r"none\.pth: No such file or directory; correct it"):
        loaded(weights=str(tmp_path / "none.pth"))


def test_without_a_file_the_published_one_must_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("SREPA_FETCHED", str(tmp_path / "fetched"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inception").mkdir()
    config = ExtractorConfig(name="inception")
    assert config.weights_fault() is None
    with pytest.raises(
        DataError, match=r"'inception' \(https://github\.com/toshas.*srepa-ds fetch"
    ):
        load_extractor(config, resolution=32, device="cpu")


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"name": "inception", "dtype": "bf16"}, "dtype: Inception computes in fp32"),
        ({"name": "inception", "compile": True}, "compile: Inception runs as it is"),
        ({"name": "inception", "weights_sha256": "0" * 64}, "weights_sha256 belongs to a file"),
        ({"name": "inception", "weights": "x", "weights_sha256": "abc"}, "weights_sha256"),
        ({"name": "inceptionv3"}, "did you mean 'inception'?"),
        ({}, "exactly one of name and spec"),
    ],
)
def test_faults_of_the_settings(tree, words):
    with pytest.raises(ConfigError) as caught:
        validated(ExtractorConfig, tree, source="test")
    assert words in str(caught.value)


def test_the_inception_score_of_equal_images_is_one(inception):
    logits = inception.features(images(32, count=1).expand(3, -1, -1, -1)).logits
    p = logits.double().softmax(1)
    assert math.exp((p * (p.log() - p.mean(0).log())).sum(1).mean()) == pytest.approx(1, abs=1e-6)
