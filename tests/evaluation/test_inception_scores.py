"""The scores of ADM's evaluator, from images to numbers, with random weights."""

import json

import numpy as np
import pytest
import torch
from golden_sit import GOLDEN
from inception_weights import settings_of, write_weights
from plain_manifold import plain_precision_recall
from safetensors.torch import load_file

from srepa_ds.commands.evaluate import evaluate, write_reference
from srepa_ds.config.experiment import load_config
from srepa_ds.distributed import ranks
from srepa_ds.errors import DataError
from srepa_ds.metrics.inception_score import inception_score

pytestmark = pytest.mark.slow

FEW = 6


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "inception.safetensors")


@pytest.fixture(scope="module")
def place(golden, tmp_path_factory):
    """Returns a folder with the weights, the samples and the reference."""
    folder = tmp_path_factory.mktemp("inception")
    write_weights(folder / "weights.pth")
    for name, key in (("samples", "s64.sample.images"), ("reference", "s64.ref.images")):
        np.savez(folder / f"{name}.npz", golden[key].numpy())
        # Inception takes its time on a CPU.
        np.savez(folder / f"few-{name}.npz", golden[key].numpy()[:FEW])
    return folder


def configured(small_world, place, run, *overrides, few="few-"):
    return load_config(
        small_world.config,
        [
            f"run.folder={run}",
            f"evaluate.samples={place}/{few}samples.npz",
            f"evaluate.reference={place}/{few}reference.npz",
            f"evaluate.extractor={json.dumps(settings_of(place / 'weights.pth'))}",
            "evaluate.batch_size=8",
            *overrides,
        ],
    )


def scored(config):
    try:
        evaluate(config)
    finally:
        ranks.close()
    return json.loads(config.run_folder.results.read_text())["scores"]


def saved(config, path):
    try:
        return write_reference(config, path)
    finally:
        ranks.close()


def test_the_five_scores_are_the_golden_ones(small_world, place, golden, tmp_path):
    found = scored(configured(small_world, place, tmp_path / "run", few=""))
    assert found["frechet_distance"] == pytest.approx(golden["s64.fid"].item(), rel=1e-4)
    assert found["spatial_frechet_distance"] == pytest.approx(golden["s64.sfid"].item(), rel=1e-4)
    # Twenty images are one split of at most 5,000.
    expected = inception_score(golden["s64.sample.logits_without_bias"]).item()
    assert found["inception_score"] == pytest.approx(expected, rel=1e-5)
    pooled = (golden[f"s64.{name}.pool3"] for name in ("sample", "ref"))
    precision, recall = (inside.double().mean() for inside in plain_precision_recall(*pooled, 20))
    assert found["precision"] == precision.item()
    assert found["recall"] == recall.item()


def test_a_reference_of_ones_own_is_read_as_adm_publishes_them(
    small_world, place, golden, tmp_path
):
    config = configured(small_world, place, tmp_path / "run", "evaluate.num_manifold_images=4")
    saved(config, tmp_path / "own" / "reference.npz")
    with np.load(tmp_path / "own" / "reference.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    # As ADM's script computes them.
    for name, key in (("", "s64.ref.pool3"), ("_s", "s64.ref.spatial")):
        features = golden[key].numpy()[:FEW]
        np.testing.assert_allclose(arrays[f"mu{name}"], features.mean(0), rtol=1e-3, atol=1e-5)
        expected = np.cov(features, rowvar=False)
        np.testing.assert_allclose(arrays[f"sigma{name}"], expected, atol=1e-4 * expected.max())
    chosen = golden["s64.ref.images"][torch.arange(4) * FEW // 4].numpy()
    np.testing.assert_array_equal(arrays["arr_0"], chosen)
    # The statistics are of all images, and four serve for precision and recall.
    own = scored(
        config := configured(
            small_world,
            place,
            tmp_path / "other",
            f"evaluate.reference={tmp_path}/own/reference.npz",
        )
    )
    direct = scored(
        configured(small_world, place, tmp_path / "third", "evaluate.num_manifold_images=4")
    )
    assert own.keys() == direct.keys()
    for name, value in direct.items():
        assert own[name] == pytest.approx(value, rel=1e-9), name
    with pytest.raises(DataError, match="holds statistics already; give the images"):
        saved(config, tmp_path / "again.npz")


def test_statistics_of_another_extractor_are_not_adm_s(small_world, tmp_path):
    config = load_config(small_world.config, [f"run.folder={tmp_path}/run"])
    with pytest.raises(DataError, match=r"ADM's statistics are of inception"):
        saved(config, tmp_path / "reference.npz")
    assert not (tmp_path / "reference.npz").exists()


def test_images_stand_in_for_spatial_statistics_that_are_not_stored(small_world, place, tmp_path):
    pooled = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    np.savez(tmp_path / "half.npz", np.load(place / "few-reference.npz")["arr_0"][:3], **pooled)
    given = (
        "evaluate.metrics=[frechet, spatial_frechet]",
        f"evaluate.reference={tmp_path}/half.npz",
        f"evaluate.samples={tmp_path}/half.npz",
    )
    found = scored(configured(small_world, place, tmp_path / "run", *given))
    # The same images; the pooled statistics are those of no images.
    assert found["spatial_frechet_distance"] == pytest.approx(0, abs=1e-3)
    assert found["frechet_distance"] > 1
    notes = json.loads((tmp_path / "run" / "results.json").read_text())["notes"]
    assert any("measured against the reference's images" in note for note in notes)


def test_statistics_without_images_give_no_precision(small_world, place, tmp_path):
    saved(configured(small_world, place, tmp_path / "run"), tmp_path / "whole.npz")
    with np.load(tmp_path / "whole.npz") as whole:
        np.savez(tmp_path / "bare.npz", **{n: whole[n] for n in whole.files if n != "arr_0"})
    bare = f"evaluate.reference={tmp_path}/bare.npz"
    found = scored(configured(small_world, place, tmp_path / "run", bare))
    assert set(found) == {"frechet_distance", "spatial_frechet_distance", "inception_score"}
    notes = json.loads((tmp_path / "run" / "results.json").read_text())["notes"]
    assert any(note.startswith("precision_recall is left out: evaluate.ref") for note in notes)
