"""Scores over ranks are those of plain functions over all features at once."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_function

from srepa_ds.commands.evaluate import evaluate
from srepa_ds.config.experiment import load_config
from srepa_ds.data.shards import ShardDataset
from srepa_ds.distributed import ranks
from srepa_ds.encoders.extractors import load_extractor
from srepa_ds.errors import DataError
from srepa_ds.evaluation.reference import open_reference
from srepa_ds.metrics.frechet import gaussian_frechet_distance
from srepa_ds.metrics.scores import FeatureSet, measure

COUNT = 1100


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Returns an archive of enough images for every metric."""
    folder = tmp_path_factory.mktemp("drawn")
    pixels = np.random.default_rng(0).integers(0, 255, (COUNT, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "samples.npz", pixels, np.arange(COUNT) % 10)
    np.savez(folder / "real.npz", np.roll(pixels[::-1], 3, axis=2) // 2 + 60)
    return folder


def scores(config: str, *overrides: str) -> None:
    """Evaluates on this rank, with the name of the results' folder after the number of ranks."""
    evaluate(load_config(Path(config), overrides))


def settings(drawn, run):
    return (
        f"run.folder={run}",
        f"evaluate.samples={drawn}/samples.npz",
        f"evaluate.reference={drawn}/real.npz",
        "evaluate.batch_size=64",
        "evaluate.num_manifold_images=1050",
    )


@pytest.mark.slow
def test_scores_do_not_depend_on_the_number_of_ranks(small_world, drawn, tmp_path):
    results = []
    for world_size in (1, 2):
        given = settings(drawn, tmp_path / str(world_size))
        run_function(scores, world_size, str(small_world.config), *given)
        results.append(json.loads((tmp_path / str(world_size) / "results.json").read_text()))
    one, two = (result["scores"] for result in results)
    assert set(one) == {
        *("frechet_distance", "precision", "recall", "kernel_distance", "class_accuracy")
    }
    for name in ("precision", "recall", "class_accuracy", "kernel_distance"):
        assert one[name] == two[name], name
    assert two["frechet_distance"] == pytest.approx(one["frechet_distance"], rel=1e-6)
    assert results[0]["class_precision"] == results[1]["class_precision"]
    assert set(results[0]["class_precision"]) == {str(number) for number in range(10)}


def evaluated(small_world, drawn, run, *overrides):
    config = load_config(small_world.config, [*settings(drawn, run), *overrides])
    try:
        evaluate(config)
    finally:
        ranks.close()
    return json.loads((run / "results.json").read_text())


def pooled(small_world, archive):
    """Returns the plain features of all images of an archive."""
    config = load_config(small_world.config).evaluate
    extractor = load_extractor(config.extractor, resolution=(16, 16), device="cpu")
    images = torch.from_numpy(np.load(archive)["arr_0"]).permute(0, 3, 1, 2)
    return extractor.features(images.contiguous()).pooled


@pytest.mark.slow
def test_scores_are_those_of_the_features(small_world, drawn, tmp_path):
    found = evaluated(small_world, drawn, tmp_path / "run")["scores"]
    samples, real = (pooled(small_world, drawn / n) for n in ("samples.npz", "real.npz"))
    chosen = torch.arange(1050) * COUNT // 1050
    plain = measure(
        {"pooled": FeatureSet(rows=samples)},
        {"pooled": FeatureSet(rows=real[chosen])},
        metrics=("precision_recall", "kernel_distance"),
    ).scores
    assert found["precision"] == plain.precision
    assert found["recall"] == plain.recall
    assert found["kernel_distance"] == pytest.approx(plain.kernel_distance, rel=1e-6)
    distance = gaussian_frechet_distance(
        samples.mean(0), torch.cov(samples.double().T), real.mean(0), torch.cov(real.double().T)
    )
    assert found["frechet_distance"] == pytest.approx(distance.item(), rel=1e-6)


@pytest.mark.slow
def test_further_extractors_see_the_same_images(small_world, drawn, tmp_path):
    spec = load_config(small_world.config).evaluate.extractor
    other = {"spec": spec.spec.model_dump(mode="json"), "weights": str(spec.weights)}
    given = f"evaluate.further_extractors={json.dumps([other])}"
    found = evaluated(small_world, drawn, tmp_path / "run", given)
    further = found["further_scores"][spec.spec.architecture]
    # The second extractor computes in bf16.
    assert further["frechet_distance"] == pytest.approx(
        found["scores"]["frechet_distance"], rel=0.1
    )
    assert set(further) == {"frechet_distance", "kernel_distance"}
    assert set(found["extractors"]) == {spec.label, spec.spec.architecture}


def test_metrics_that_were_not_asked_for_are_not_computed(small_world, drawn, tmp_path):
    found = evaluated(small_world, drawn, tmp_path / "run", "evaluate.metrics=[frechet]")
    assert set(found["scores"]) == {"frechet_distance", "class_accuracy"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "evaluate.metrics=[spatial_frechet]",
            r"'vit_tiny_patch16_224 \(fp32\)' has no such features",
        ),
        ("evaluate.num_manifold_images=900", "subsets of 1,000 images, but there are 900"),
    ],
)
def test_metrics_that_cannot_be_had_are_refused(small_world, drawn, tmp_path, given, message):
    asked = () if "metrics" in given else ("evaluate.metrics=[kernel_distance]",)
    with pytest.raises(DataError, match=message):
        evaluated(small_world, drawn, tmp_path / "run", given, *asked)
    assert not (tmp_path / "run").exists()


def test_images_are_drawn_and_scored_without_being_written(small_world, small_run, tmp_path):
    run = small_run("evaluate.draw=true", "sample.num_samples=20", "sample.batch_size=7")
    run.write_export()
    overrides = ["evaluate.draw=true", "sample.num_samples=20", "sample.batch_size=7"]
    config = load_config(small_world.config, [f"run.folder={run.folder}", *overrides])
    try:
        evaluate(config)
    finally:
        ranks.close()
    found = json.loads(run.config.run_folder.results.read_text())
    assert found["samples"]["sampler"]["num_samples"] == 20
    assert set(found["scores"]) == {"frechet_distance", "precision", "recall", "class_accuracy"}
    assert not list(run.folder.rglob("samples.npz"))


def test_statistics_alone_are_a_reference(tmp_path):
    np.savez(
        tmp_path / "adm.npz", mu=np.zeros(3), sigma=np.eye(3), mu_s=np.ones(2), sigma_s=np.eye(2)
    )
    reference = open_reference(tmp_path / "adm.npz", setting="evaluate.reference")
    assert reference.images is None
    assert torch.equal(reference.stored.pooled.covariance(), torch.eye(3, dtype=torch.float64))
    assert reference.stored.spatial.mean.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "one of mu and sigma, and both belong together"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"mu of \(3,\) and sigma of \(2, 2\)"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "holds NaN or infinity"),
        ({"count": np.zeros(3)}, "images should be in arr_0"),
    ],
)
def test_references_of_something_else_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "adm.npz", **arrays)
    with pytest.raises(DataError, match=rf"evaluate\.reference: .*{message}"):
        open_reference(tmp_path / "adm.npz", setting="evaluate.reference")


def test_a_reference_of_shards_is_thinned(small_world):
    shards = small_world.folder / "shards"
    images = open_reference(shards, setting="evaluate.reference", most=7).images
    assert len(images) == 7
    dataset = ShardDataset(shards)
    (block,) = images.blocks(10)
    expected = dataset.read(torch.arange(7) * len(dataset) // 7).pixels
    assert torch.equal(block.images, expected)
