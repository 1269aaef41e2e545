import numpy as np
import pytest
import torch

from srepa_ds.data.shards import ShardDataset
from srepa_ds.encoders.teacher import load_teacher
from srepa_ds.errors import DataError
from srepa_ds.noise import NoiseStream, normal
from srepa_ds.report.probe import probe
from srepa_ds.report.student_vs_teacher import compare
from srepa_ds.weights.exported import read_model

T = 0.3


def compared(run):
    exported = read_model(run.config.weights_folder)
    real = ShardDataset(run.config.evaluate.reference)
    seen = probe(run.config, exported, real, t=T, device=torch.device("cpu"))
    return seen, compare(run.config, exported, seen)


def correlations(student, teacher):
    found = []
    for tokens in zip(student, teacher, strict=True):
        grams = []
        for x in tokens:
            unit = (x / x.norm(dim=-1, keepdim=True)).double().numpy()
            grams.append((unit @ unit.T)[~np.eye(len(unit), dtype=bool)])
        found.append(np.corrcoef(*grams)[0, 1])
    return found


@torch.no_grad()
def test_tokens_are_those_of_teacher_model_and_projector(small_run):
    run = small_run()
    run.write_export()
    seen, (comparison,) = compared(run)
    batch = ShardDataset(run.config.evaluate.reference).read(seen.batch.sample_ids)
    clean = batch.images.float() / 127.5 - 1
    # Another draw than training's, which counts through the same numbers.
    gaussian = normal(0, NoiseStream.NOISE, batch.sample_ids, (3, 16, 16), draw=1)
    x_t = (1 - T) * clean + T * gaussian
    torch.testing.assert_close(seen.x_t, x_t)
    teacher = load_teacher(run.config.alignments[0].teacher, resolution=16, device="cpu")
    target = teacher.tokens(batch.images).patches
    times = torch.full((len(batch),), T)
    (hidden,) = run.objective.sit(x_t, times, batch.labels, depths=(2,)).hidden
    projected = run.objective.projectors[0](hidden)
    assert [space.name for space in comparison.spaces] == ["teacher", "block 2", "projected"]
    assert comparison.spaces[0].correlations is None
    for space, tokens in zip(comparison.spaces[1:], (hidden, projected), strict=True):
        expected = correlations(tokens, target)
        assert space.correlations.tolist() == pytest.approx(expected, abs=1e-5)
    for space, tokens in zip(comparison.spaces, (target, hidden, projected), strict=True):
        unit = torch.nn.functional.normalize(tokens[seen.shown], dim=-1)
        for row, queries in enumerate(comparison.queries.tolist()):
            expected = unit[row, queries] @ unit[row].T
            torch.testing.assert_close(space.similarities[row], expected, atol=1e-5, rtol=1e-5)


def test_images_are_spread_over_the_classes(small_run):
    run = small_run()
    run.write_export()
    seen, (comparison,) = compared(run)
    assert len(set(seen.batch.sample_ids.tolist())) == len(seen.batch) == 32
    assert set(seen.batch.labels.tolist()) == set(range(10))
    assert len(set(seen.batch.labels[seen.shown].tolist())) == 3
    assert comparison.grid == (8, 8)
    assert comparison.queries[:, 0].tolist() == [4 * 8 + 4] * 3


def test_noise_belongs_to_the_image(small_run):
    run = small_run()
    run.write_export()
    (first, _), (again, _) = compared(run), compared(run)
    assert torch.equal(first.x_t, again.x_t)
    residual = first.x_t - (1 - T) * (first.batch.images.float() / 127.5 - 1)
    assert float(residual.std()) == pytest.approx(T, rel=0.02)
    assert len(residual[:, 0, 0, 0].unique()) == len(residual)


def test_a_model_without_teacher_is_held_against_the_extractor(small_run):
    run = small_run("alignments=[]")
    run.write_export()
    _, (comparison,) = compared(run)
    assert not comparison.is_aligned
    assert [space.name for space in comparison.spaces] == ["teacher", "block 2"]


def test_each_teacher_has_its_own_projector(small_run, small_world):
    alignment = small_run().config.alignments[0].model_dump_json()
    run = small_run(f"alignments=[{alignment}, {alignment}]", "alignments.1.depth=3")
    run.write_export()
    _, comparisons = compared(run)
    names = [[space.name for space in comparison.spaces] for comparison in comparisons]
    assert names == [["teacher", f"block {depth}", "projected"] for depth in (2, 3)]
    first, second = (c.spaces[2].similarities for c in comparisons)
    assert not torch.allclose(first, second)


def test_without_projector_the_hidden_tokens_remain(small_run):
    run = small_run()
    run.objective.projectors = torch.nn.ModuleList()
    run.write_export()
    _, (comparison,) = compared(run)
    assert comparison.is_aligned
    assert [space.name for space in comparison.spaces] == ["teacher", "block 2"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("evaluate=null", "alignments=[]"), "no section `evaluate`"),
        (("alignments=[]", "model.patch_size=4"), "grid of"),
        (("model.num_classes=11",), "in 10 classes"),
        (("model.input_size=8",), r"shape \(3, 16, 16\)"),
    ],
)
def test_what_cannot_be_compared_is_said(small_run, small_world, overrides, message):
    run = small_run(*overrides)
    run.write_export()
    exported = read_model(run.config.weights_folder)
    real = ShardDataset(small_world.folder / "shards")
    with pytest.raises(DataError, match=message):
        compare(
            run.config,
            exported,
            probe(run.config, exported, real, t=T, device=torch.device("cpu")),
        )
