"""A run between its steps: it monitors itself, and recovers from values that are not finite."""

import json
import math
from pathlib import Path

import pytest
import torch
from builders import metrics_of
from PIL import Image
from ranks import run_function
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainings import train_in_a_folder_that_goes_away, train_on_faulty_data, train_runs

from srepa_ds.checkpoint.folder import step_folder
from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.run_folder import RunFolder
from srepa_ds.training.history import rollbacks_after

pytestmark = pytest.mark.slow

# Weights below the threshold are never released under stage 3; at real sizes the large ones are.
RELEASED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
ARRANGEMENTS = {
    "stage 0": (2, "zero0", "fp32"),
    "stage 2": (2, "zero2", "bf16"),
    "stage 3": (2, "zero3", "bf16"),
    "stage 3, weights released": (2, "released", "fp32"),
}
STEPS = 6


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(step_folder(folder / "checkpoints", step))
    return {f"{k}/{n}": reader.tensor(k, n) for k in reader.kinds() for n in reader.names(k)}


@pytest.fixture(scope="module", params=ARRANGEMENTS)
def watched(request, small_world, tmp_path_factory) -> tuple[Path, Path]:
    """Returns the folders of the same run, without and with a monitor."""
    root = tmp_path_factory.mktemp("watched")
    world_size, arrangement, precision = ARRANGEMENTS[request.param]
    (root / "released.json").write_text(json.dumps(RELEASED))
    folder = root if arrangement == "released" else Path("ds_configs")
    common = [
        f"train.steps={STEPS}",
        f"engine.deepspeed={folder / arrangement}.json",
        f"engine.precision={precision}",
    ]
    looking = [
        "monitor.images_every_steps=2",
        "monitor.num_images=21",
        "monitor.evaluate_every_steps=3",
        "monitor.num_evaluated=50",
        "sample.label_mode=balanced",
    ]
    runs = [
        [small_world.config, f"run.folder={root / 'alone'}", *common],
        [small_world.config, f"run.folder={root / 'watched'}", *common, *looking],
    ]
    run_function(train_runs, world_size, *runs)
    return root / "alone", root / "watched"


def test_looking_changes_no_bit_of_the_run(watched):
    alone, seen = (weights(folder, STEPS) for folder in watched)
    assert alone.keys() == seen.keys()
    assert all(torch.equal(alone[key], seen[key]) for key in alone)


def test_it_leaves_pictures_and_distances(watched):
    _, folder = watched
    names = sorted(path.name for path in (folder / "pictures").iterdir())
    assert names == ["step-0000002.png", "step-0000004.png", "step-0000006.png"]
    first, last = (
        torch.frombuffer(
            bytearray(Image.open(folder / "pictures" / n).tobytes()), dtype=torch.uint8
        )
        for n in (names[0], names[-1])
    )
    assert first.shape == last.shape
    assert not torch.equal(first, last)
    distances = [line for line in metrics_of(folder) if "frechet_distance" in line]
    assert [line["step"] for line in distances] == [3, 6]
    assert all(math.isfinite(line["frechet_distance"]) for line in distances)
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [2, 4, 6]


def test_the_record_says_how_the_run_fares(watched):
    _, folder = watched
    lines = [line for line in metrics_of(folder) if "loss_total" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert line["alignment_cosine"] == -line["loss_pointwise"]
        assert 0 <= line["data_wait_share"] <= 1
        assert line["tflops_per_rank"] > 0
        assert line["peak_memory_gb"] > 0.1
        by_time = [value for key, value in line.items() if key.startswith("flow_t")]
        assert 0 < len(by_time) <= 10
        assert min(by_time) <= line["loss_flow"] <= max(by_time)
    # The average lags behind weights that move.
    assert 0 < lines[-1]["ema_distance"] < 1


def test_a_distance_is_that_of_the_exported_samples(small_world, tmp_path):
    """The distance of the last step is what `sample` and `evaluate` find for the exported EMA."""
    from srepa_ds.cli import run

    folder = tmp_path / "run"
    settings = [
        f"run.folder={folder}",
        "train.steps=4",
        "monitor.evaluate_every_steps=4",
        "monitor.num_evaluated=40",
        "sample.num_samples=40",
        "sample.batch_size=20",
    ]
    run_function(train_runs, 2, [small_world.config, *settings])
    for command in ("export", "sample", "evaluate"):
        assert run([command, str(small_world.config), *settings]) == 0
    (found,) = (line for line in metrics_of(folder) if "frechet_distance" in line)
    scores = json.loads((folder / "results.json").read_text())["scores"]
    assert found["frechet_distance"] == pytest.approx(scores["frechet_distance"], rel=1e-3)


@pytest.mark.parametrize(
    "lines_and_checkpoints",
    [
        ("train.log_every_steps=1", "checkpoint.every_steps=100"),
        ("train.log_every_steps=100", "checkpoint.every_steps=4"),
    ],
)
def test_a_folder_that_goes_away_ends_the_run_on_all_ranks(
    small_world, tmp_path, lines_and_checkpoints
):
    folder = tmp_path / "runs" / "run"
    messages = run_function(
        train_in_a_folder_that_goes_away,
        2,
        small_world.config,
        folder,
        "train.steps=8",
        *lines_and_checkpoints,
    )
    assert len(messages) == 2
    assert all(f"{folder} was removed, moved or replaced" in message for message in messages)
    # No checkpoint was written into a folder made anew.
    assert not folder.exists()


def faulty(world, folder: Path, span: tuple[int, int], *overrides: str):
    """Trains on data of which a span is broken; returns the record, and why training gave up."""
    common = [f"run.folder={folder}", "checkpoint.every_steps=4", "train.max_skipped_steps=2"]
    message, _ = run_function(train_on_faulty_data, 2, world.config, [span], *common, *overrides)
    return metrics_of(folder), message


def history(folder: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in line]


def test_a_skipped_step_is_explained_and_changes_nothing_else(small_world, tmp_path):
    lines, _ = faulty(small_world, tmp_path / "run", (35, 37), "train.steps=5")
    (line,) = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    told = json.loads(line)
    assert told["step"] == 3
    assert told["not_finite"] == ["flow", "pointwise", "structural"]
    assert len(told["sample_ids"]) == 16
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 0, 0]
    assert [line["step"] for line in lines if "loss_total" in line] == [1, 2, 4, 5]
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_several_in_a_row_roll_back_and_the_run_goes_on_behind_them(small_world, tmp_path):
    # Steps 6 and 7 take the samples from 80 to 112; the checkpoint of step 4 is the last good one.
    folder = tmp_path / "run"
    lines, message = faulty(small_world, folder, (80, 112), "train.steps=9")
    assert [line["step"] for line in history(folder, "sample_ids")] == [6, 7]
    (rollback,) = history(folder, "rolled_back_to")
    assert rollback == {"step": 7, "rolled_back_to": 4, "samples_seen": 112}
    # The last checkpoint lies behind the failure, so it no longer counts.
    assert rollbacks_after(RunFolder(folder), 9).count == 0
    assert [line["step"] for line in lines] == list(range(1, 10))
    state = CheckpointReader(step_folder(folder / "checkpoints", 9)).state
    assert state["step"] == 9
    # Nine steps that count, the fifth taken twice, and two that were lost.
    assert state["samples_seen"] == (9 + 1 + 2) * 16
    assert message is None


def test_it_gives_up_after_as_many_rollbacks_as_allowed_over_restarts(small_world, tmp_path):
    folder = tmp_path / "run"
    looking = ("monitor.images_every_steps=1", "monitor.num_images=4")
    looking += ("monitor.evaluate_every_steps=1", "monitor.num_evaluated=40")
    for _ in range(2):
        limits = ("train.steps=9", "train.max_rollbacks=2")
        lines, message = faulty(small_world, folder, (80, 9999), *limits, *looking)
        assert "after 2 rollbacks; step-0000004 is good" in message
        assert "skipped.jsonl" in message
        assert len(history(folder, "rolled_back_to")) == 2
        # Step 5 was taken, looked at, and taken back.
        assert {line["step"] for line in lines if "loss_total" in line} == {1, 2, 3, 4}
        assert [(line["step"], line["skipped"]) for line in lines[-2:]] == [(5, 1), (6, 1)]
        pictures = sorted(path.name for path in (folder / "pictures").iterdir())
        assert pictures == [f"step-000000{step}.png" for step in (1, 2, 3, 4)]
        events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
        events.Reload()
        assert [event.step for event in events.Images("samples")] == [1, 2, 3, 4]


def test_a_restart_goes_on_where_the_rollback_did(small_world, tmp_path):
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    # It ends after its first rollback, before it could write a checkpoint.
    limits = ("train.steps=9", "train.max_rollbacks=1")
    _, message = faulty(small_world, broken, (80, 176), *limits)
    assert "after 1 rollback" in message
    assert history(broken, "rolled_back_to")[0]["samples_seen"] == 112
    # What was wrong from 112 on is mended.
    resumed, message = faulty(small_world, broken, (80, 112), *limits)
    assert message is None
    uninterrupted, _ = faulty(small_world, whole, (80, 112), "train.steps=9")
    assert [line["loss_total"] for line in resumed] == [x["loss_total"] for x in uninterrupted]
    found, expected = weights(broken, 9), weights(whole, 9)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(small_world, tmp_path):
    folder = tmp_path / "run"
    _, message = faulty(small_world, folder, (0, 9999), "train.steps=9")
    assert "steps 1 to 2 were not finite, and there is no" in message
