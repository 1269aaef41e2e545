import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import timm
import torch
from builders import TEACHER, largest_file
from safetensors.torch import load_file

from srepa_ds.commands.evaluate import evaluate
from srepa_ds.config.experiment import load_config
from srepa_ds.data.shard_file import shard_name
from srepa_ds.data.shards import ShardDataset
from srepa_ds.errors import ConfigError, DataError, OutputError
from srepa_ds.report.scores import score_table

PROVENANCE = {"ema": "0.9", "sampler": {"solver": "heun"}}


@pytest.fixture
def experiment(small_world, tmp_path):
    """Returns a configuration whose samples lie in `tmp_path / "samples"`."""

    def make(*overrides):
        folders = [f"run.folder={tmp_path / 'run'}", f"evaluate.samples={tmp_path / 'samples'}"]
        return load_config(small_world.config, [*folders, "evaluate.batch_size=7", *overrides])

    return make


@pytest.fixture
def reference(small_world):
    dataset = ShardDataset(small_world.folder / "shards")
    return dataset.read(torch.arange(len(dataset)))


@pytest.fixture
def drawn(reference, tmp_path):
    """Returns noised copies of a few real images and some of pure noise, with random labels."""
    generator = torch.Generator().manual_seed(0)
    pixels = reference.images[torch.arange(50) % 5 * 3].permute(0, 2, 3, 1)
    noise = torch.randint(-8, 9, pixels.shape, generator=generator)
    images = (pixels + noise).clamp(0, 255).byte()
    images[40:] = 255 * torch.randint(0, 2, pixels[40:].shape, generator=generator).byte()
    labels = torch.randint(0, 10, (50,), generator=generator)
    write(tmp_path / "samples", images, labels)
    return images.permute(0, 3, 1, 2), labels


def write(folder, images, labels=None, provenance=PROVENANCE):
    folder.mkdir()
    np.savez(folder / "samples.npz", images.numpy(), *([] if labels is None else [labels.numpy()]))
    (folder / "provenance.json").write_text(json.dumps(provenance))


@torch.no_grad()
def seen(small_world, images):
    """Returns the plain timm model's class-token features of images, and the predicted classes."""
    model = timm.create_model(
        TEACHER["architecture"], img_size=16, num_classes=10, **TEACHER["arguments"]
    )
    model.load_state_dict(load_file(small_world.folder / "teacher.safetensors"))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    inputs = (images / 255 - mean[:, None, None]) / std[:, None, None]
    model.eval()
    return model.forward_features(inputs)[:, 0].double(), model(inputs).argmax(1)


def plain_distance(samples, reference):
    (a, b), (mean_a, mean_b) = (
        [statistic(features.numpy()) for features in (samples, reference)]
        for statistic in (lambda x: np.cov(x, rowvar=False), lambda x: x.mean(axis=0))
    )
    cross = np.sqrt(np.linalg.eigvals(a @ b).real.clip(min=0)).sum()
    return ((mean_a - mean_b) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * cross


def plain_coverage(points, others):
    """Returns the share of points within the third-neighbour distance of any of the others."""
    radii = torch.cdist(others, others).sort(dim=1).values[:, 3]
    return (torch.cdist(points, others) <= radii).any(dim=1).double().mean().item()


def test_scores_are_those_of_the_features(experiment, small_world, reference, drawn):
    images, labels = drawn
    features, classes = seen(small_world, images)
    real, real_classes = seen(small_world, reference.images)
    config = experiment()
    scores = evaluate(config)
    assert scores.frechet_distance == pytest.approx(plain_distance(features, real), rel=1e-4)
    assert scores.precision == plain_coverage(features, real)
    assert scores.recall == plain_coverage(real, features)
    assert scores.class_accuracy == (classes == labels).double().mean().item()
    # Values that could be mistaken for one another would test nothing.
    assert len({0.0, 1.0, scores.precision, scores.recall, scores.class_accuracy}) == 5

    document = json.loads(config.run_folder.results.read_text())
    assert document["scores"] == {
        "frechet_distance": scores.frechet_distance,
        "precision": scores.precision,
        "recall": scores.recall,
        "class_accuracy": scores.class_accuracy,
    }
    expected = (real_classes == reference.labels).double().mean().item()
    assert document["reference_class_accuracy"] == expected
    assert document["samples"] == PROVENANCE
    assert document["settings"]["reference"] == str(small_world.folder / "shards")
    weights = (small_world.folder / "teacher.safetensors").read_bytes()
    assert document["extractor_sha256"] == hashlib.sha256(weights).hexdigest()
    dataset = ShardDataset(small_world.folder / "shards")
    assert document["reference_id"] == dataset.index.dataset_id
    assert [path.name for path in config.run.folder.iterdir()] == ["results.json"]


def test_a_set_of_others_has_neither_labels_nor_provenance(experiment, drawn, tmp_path):
    folder = tmp_path / "others"
    write(folder, drawn[0].permute(0, 2, 3, 1))
    (folder / "provenance.json").unlink()
    config = experiment(f"evaluate.samples={folder}")
    assert evaluate(config).class_accuracy is None
    document = json.loads(config.run_folder.results.read_text())
    assert document["scores"].keys() == {"frechet_distance", "precision", "recall"}
    assert document["samples"] == {}


def torn(folder):
    path = folder / "samples.npz"
    path.write_bytes(path.read_bytes()[:-50])


def empty(folder):
    (folder / "samples.npz").write_bytes(b"")


def absent(folder):
    (folder / "samples.npz").unlink()


def list_as_provenance(folder):
    (folder / "provenance.json").write_text("[]")


def torn_provenance(folder):
    (folder / "provenance.json").write_text('{"ema": ')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (torn, r"samples\.npz: cannot be read as images \(it is not an .npz archive"),
        (empty, r"samples\.npz: cannot be read as images .*\(it is empty\)"),
        (absent, r"a sample set that is not finished; run `srepa-ds sample CONFIG` again"),
        (list_as_provenance, r"provenance\.json: is not a JSON object.*give another folder"),
        (torn_provenance, r"provenance\.json: is not JSON \(.*give another folder"),
    ],
)
def test_a_damaged_set_is_refused_before_anything_is_computed(
    experiment, drawn, tmp_path, damage, message
):
    damage(tmp_path / "samples")
    # This extractor cannot be loaded: if it came first, the message would be about it.
    config = experiment("evaluate.extractor.weights=nowhere.safetensors")
    with pytest.raises(DataError, match=message):
        evaluate(config)
    assert not config.run.folder.exists()


def test_images_of_another_size_are_refused(experiment, tmp_path):
    write(tmp_path / "samples", torch.zeros(8, 20, 20, 3, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"16 x 16 px.*20 x 20; give a reference of the same size"):
        evaluate(experiment())


def test_a_damaged_reference_is_refused(experiment, drawn, small_world, tmp_path):
    world = small_world.copied_to(tmp_path / "world")
    path = world.folder / "shards" / shard_name(1)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=rf"{shard_name(1)}: contents changed since it was written"):
        evaluate(experiment(f"evaluate.reference={path.parent}"))
    assert not (tmp_path / "run").exists()


def test_without_its_section_nothing_is_evaluated(small_world):
    with pytest.raises(ConfigError, match="evaluate: is required"):
        evaluate(load_config(small_world.config, ["evaluate=null"]))


def test_results_that_cannot_be_written(experiment, drawn):
    config = experiment()
    config.run_folder.results.mkdir(parents=True)
    with pytest.raises(OutputError, match=r"cannot write .*results\.json"):
        evaluate(config)
    assert [path.name for path in config.run.folder.iterdir()] == ["results.json"]


def test_results_that_cannot_be_written_are_refused_before_images_are_looked_at(
    experiment, drawn, tmp_path
):
    config = experiment()
    config.run_folder.results.mkdir(parents=True)
    samples = tmp_path / "samples" / "samples.npz"
    content = bytearray(samples.read_bytes())
    # In the pixels: whoever reads them finds it.
    content[len(content) // 3] ^= 255
    samples.write_bytes(content)
    with pytest.raises(OutputError, match=r"cannot write .*results\.json"):
        evaluate(config)
    config.run_folder.results.rmdir()
    with pytest.raises(DataError, match=r"samples\.npz"):
        evaluate(config)
    # Trying the place has left nothing there.
    assert list(config.run.folder.iterdir()) == []


def test_scores_are_said_before_they_are_written(experiment, drawn, caplog):
    caplog.set_level("INFO", "srepa_ds")
    config = experiment()

    # An empty file fits, and the results do not.
    with largest_file(100), pytest.raises(OutputError, match=r"cannot write .*results\.json"):
        evaluate(config)
    assert re.search(r"FD-vit\S* .*\d\.\d{4}  precision 0\.\d{4}", caplog.text)


def test_the_provenance_of_a_set_is_not_that_of_an_archive_beside_it(experiment, drawn, tmp_path):
    folder = tmp_path / "samples"
    shutil.copy(folder / "samples.npz", folder / "theirs.npz")
    for name, expected in (("theirs.npz", {}), ("samples.npz", PROVENANCE), (".", PROVENANCE)):
        config = experiment(f"evaluate.samples={folder / name}")
        evaluate(config)
        assert json.loads(config.run_folder.results.read_text())["samples"] == expected, name


def test_few_images_are_noted_beside_the_scores(experiment, drawn, reference, tmp_path, caplog):
    config = experiment()
    evaluate(config)
    # 50 images and 90 real ones, for features of width 32.
    (left_out,) = json.loads(config.run_folder.results.read_text())["notes"]
    assert left_out.startswith("kernel_distance is left out: the kernel distance takes subsets of")
    write(tmp_path / "few", reference.images[:5].permute(0, 2, 3, 1))
    evaluate(experiment(f"evaluate.samples={tmp_path}/few"))
    sentence, _ = json.loads(config.run_folder.results.read_text())["notes"]
    assert sentence.startswith("5 drawn images for features of width 32: at least 33 are needed")
    assert sentence in caplog.text
    assert sentence in score_table(json.loads(config.run_folder.results.read_text()))


@pytest.mark.parametrize("count", [1, 3])
def test_sets_too_small_for_neighbours_are_refused_at_once(experiment, reference, tmp_path, count):
    write(tmp_path / "few", reference.images[:count].permute(0, 2, 3, 1))
    # This extractor cannot be loaded: if it came first, the message would be about it.
    few = (f"evaluate.samples={tmp_path}/few", "evaluate.extractor.weights=nowhere.safetensors")
    with pytest.raises(DataError, match=f"need.* sample images, got {count}"):
        evaluate(experiment(*few))


def test_the_runs_folder_may_be_a_link(experiment, drawn, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    evaluate(experiment())
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["results.json"]
    (tmp_path / "run").unlink()
    (tmp_path / "run").symlink_to("unmounted")
    with pytest.raises(OutputError, match="run is a link to unmounted, which does not exist"):
        evaluate(experiment())


def test_an_unfinished_document_of_another_process_is_left_alone(experiment, drawn, tmp_path):
    (tmp_path / "run").mkdir()
    unfinished = tmp_path / "run" / "results.json.partial"
    unfinished.write_text("of another process")
    evaluate(experiment())
    assert unfinished.read_text() == "of another process"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "results.json",
        "results.json.partial",
    ]
