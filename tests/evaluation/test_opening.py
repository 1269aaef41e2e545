"""What is checked, chosen and noted before an image is looked at."""

import os
from pathlib import Path

import numpy as np
import pytest
from ranks import run_function
from safetensors.torch import load_file, save_file

from srepa_ds.config.experiment import load_config
from srepa_ds.config.sections import EvaluateConfig
from srepa_ds.distributed import ranks
from srepa_ds.encoders.extractors import ExtractorConfig
from srepa_ds.errors import ConfigError, DataError
from srepa_ds.evaluation.choosing import Choosing
from srepa_ds.evaluation.image_sets import open_images
from srepa_ds.evaluation.opening import open_evaluator
from srepa_ds.evaluation.reference import open_reference
from srepa_ds.files import sha256_of
from srepa_ds.metrics.scores import METRICS

INCEPTION = ExtractorConfig(name="inception")
POOLED = {"mu": np.zeros(3), "sigma": np.eye(3)}
SPATIAL = {"mu_s": np.zeros(2), "sigma_s": np.eye(2)}
IMAGES = np.random.default_rng(0).integers(0, 256, (1000, 4, 4, 3), dtype=np.uint8)


def choosing(folder, asked=None, **arrays):
    """Returns the choice for 5,000 images against a reference of `arrays`."""
    np.savez(folder / "reference.npz", **arrays)
    settings = EvaluateConfig(reference=folder / "reference.npz", extractor=INCEPTION)
    reference = open_reference(settings.reference, setting="evaluate.reference")
    return Choosing(settings, reference, 5000, asked)


def test_everything_is_chosen_where_everything_is_there(tmp_path):
    made = choosing(tmp_path, arr_0=IMAGES, **POOLED, **SPATIAL)
    assert made.metrics_of(INCEPTION, is_first=True) == tuple(METRICS)
    assert made.remarks == []


def test_statistics_alone_leave_out_what_needs_images(tmp_path):
    made = choosing(tmp_path, **POOLED)
    assert made.metrics_of(INCEPTION, is_first=True) == ("frechet", "inception_score")
    left_out = [remark.partition(" is left out: evaluate.reference: ") for remark in made.remarks]
    assert [name for name, _, _ in left_out] == [
        *("spatial_frechet", "precision_recall", "kernel_distance")
    ]
    assert all("reference.npz holds statistics without images" in why for _, _, why in left_out)


def test_what_statistics_alone_cannot_give_is_refused_where_it_was_asked_for(tmp_path):
    message = r"evaluate\.reference: .*reference\.npz holds .* precision_recall needs images; give"
    with pytest.raises(DataError, match=message):
        choosing(tmp_path, ("precision_recall",), **POOLED).metrics_of(INCEPTION, is_first=True)
    other = ExtractorConfig(name="dinov2-vit-s")
    with pytest.raises(DataError, match=r"frechet of dinov2-vit-s needs images.* out of evaluate"):
        choosing(tmp_path, **POOLED).metrics_of(other, is_first=False)


def test_spatial_statistics_that_are_not_stored_are_taken_from_images_with_a_note(tmp_path):
    made = choosing(tmp_path, arr_0=IMAGES, **POOLED)
    assert "spatial_frechet" in made.metrics_of(INCEPTION, is_first=True)
    (remark,) = made.remarks
    assert "spatial_frechet is measured against the reference's images" in remark


def test_spatial_statistics_alone_are_refused(tmp_path):
    with pytest.raises(DataError, match="mu_s and sigma_s without mu and sigma"):
        choosing(tmp_path, arr_0=IMAGES, **SPATIAL)


def test_of_a_reference_of_any_form_most_images_are_spread_over_it(tmp_path):
    np.savez(tmp_path / "reference.npz", IMAGES)
    images = open_reference(tmp_path / "reference.npz", setting="evaluate.reference", most=7).images
    (block,) = images.blocks(10)
    expected = IMAGES[np.arange(7) * 1000 // 7].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(block.images.numpy(), expected)


def opened(settings, images):
    """Opens an evaluator for images on this rank."""
    return open_evaluator(
        settings,
        image_shape=images.image_shape,
        count=len(images),
        rank=ranks.initialize(),
        samples=images,
    )


@pytest.fixture
def open_own_inception(inception_file, tmp_path):
    def open_with(**arrays):
        np.savez(tmp_path / "reference.npz", **arrays)
        digest = sha256_of(inception_file)
        extractor = ExtractorConfig(name="inception", weights=inception_file, weights_sha256=digest)
        settings = EvaluateConfig(reference=tmp_path / "reference.npz", extractor=extractor)
        np.savez(tmp_path / "samples.npz", IMAGES[:20])
        return opened(settings, open_images(tmp_path / "samples.npz", setting="evaluate.samples"))

    yield open_with
    ranks.close()


def test_statistics_of_other_features_are_refused(open_own_inception):
    message = r"reference\.npz: mu has 3 values, and 2,048 are needed"
    with pytest.raises(DataError, match=rf"evaluate\.reference: .*{message}"):
        open_own_inception(arr_0=IMAGES[:20], **POOLED)


def test_weights_that_are_not_the_published_ones_are_noted(open_own_inception):
    evaluator = open_own_inception(arr_0=IMAGES[:20])
    assert any("other weights than the published ones" in note for note in evaluator.remarks)


FILES = {"weights": "extractor", "reference": "evaluate.reference", "samples": "evaluate.samples"}


def met_by_different_ranks(config: str) -> list[str]:
    """Returns what this rank is told when one of `FILES` is another one on the second rank."""
    folder, told = Path(config).parent, []
    for differs in (*FILES, None):
        other = os.environ["RANK"] == "1"
        where = {name: folder / ("ab"[other and name == differs]) / name for name in FILES}
        given = (
            f"evaluate.extractor.weights={where['weights']}",
            f"evaluate.reference={where['reference']}",
        )
        images = open_images(where["samples"], setting="evaluate.samples")
        try:
            opened(load_config(Path(config), given).evaluate, images)
            told.append("")
        except ConfigError as error:
            told.append(str(error))
    return told


@pytest.mark.slow
def test_ranks_with_different_files_are_told_which(small_world, tmp_path):
    world = small_world.copied_to(tmp_path / "world")
    weights = load_file(world.folder / "teacher.safetensors")
    for name, seed in (("a", 0), ("b", 1)):
        folder = world.folder / name
        folder.mkdir()
        save_file({key: value + seed for key, value in weights.items()}, folder / "weights")
        draw = np.random.default_rng(seed).integers
        for archive in ("samples", "reference"):
            with (folder / archive).open("wb") as file:
                np.savez(file, draw(0, 256, (20, 16, 16, 3), dtype=np.uint8))
    one, two = run_function(met_by_different_ranks, 2, str(world.config))
    assert one == two
    *different, same = one
    assert same == ""
    for told, named in zip(different, FILES.values(), strict=True):
        (fault,) = [line for line in told.splitlines() if " on " in line]
        assert "ranks evaluate with different files; give all of them the same files" in told
        assert named in fault
