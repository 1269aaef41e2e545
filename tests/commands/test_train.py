"""Training as users run it: independence of ranks, exact resume, kills and signals."""

import json
import signal
from pathlib import Path

import pytest
from builders import metrics_of
from ranks import RankProcess, run_function, start_ranks, wait_for
from safetensors.torch import load_file
from trainings import train_runs

from srepa_ds.checkpoint.folder import fault_of, step_folder
from srepa_ds.checkpoint.reader import CheckpointReader

ZERO = "engine.deepspeed=ds_configs/zero{}.json"


def losses(folder: Path) -> list[float]:
    return [line["loss_total"] for line in metrics_of(folder)]


def start_training(world, folder: Path, *overrides: str) -> list[RankProcess]:
    command = ["-m", "srepa_ds", "train", str(world.config), f"run.folder={folder}", *overrides]
    return start_ranks(command, 2)


def assert_same_state(folder: Path, other: Path) -> None:
    """Compares every stored byte of masters, moments and averages."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files
    assert files == sorted(path.name for path in other.glob("*.safetensors"))
    for name in files:
        one, two = load_file(folder / name), load_file(other / name)
        assert one.keys() == two.keys()
        assert all(one[key].equal(two[key]) for key in one), name


@pytest.fixture(scope="module")
def twenty_steps(small_world, tmp_path_factory) -> dict[int, Path]:
    """Twenty steps of the same run on 1 rank (stage 0) and on 2 (stage 2)."""
    root = tmp_path_factory.mktemp("twenty")
    folders = {world_size: root / str(world_size) for world_size in (1, 2)}
    for world_size, folder in folders.items():
        overrides = [f"run.folder={folder}", "train.steps=20", ZERO.format(2 * (world_size - 1))]
        run_function(train_runs, world_size, [small_world.config, *overrides])
    return folders


@pytest.mark.slow
def test_losses_do_not_depend_on_the_number_of_ranks(twenty_steps):
    one, two = losses(twenty_steps[1]), losses(twenty_steps[2])
    assert len(one) == 20
    assert one == pytest.approx(two, rel=1e-4)
    assert one[-1] < one[0]


def test_a_run_leaves_its_description(twenty_steps):
    folder = twenty_steps[2]
    written = {path.name for path in folder.iterdir()}
    documents = {"config.yaml", "ds_config.json", "environment.json", "metrics.jsonl"}
    assert documents | {"tensorboard", "checkpoints"} <= written
    assert (folder / "checkpoints" / "latest").read_text() == "step-0000020\n"
    assert json.loads((folder / "environment.json").read_text())["world_size"] == 2
    last = metrics_of(folder)[-1]
    assert {"loss_flow", "loss_pointwise", "loss_structural", "gradient_norm"} <= last.keys()


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_run_bit_for_bit(small_world, tmp_path):
    # Large enough steps that the kill comes between the checkpoint and the end.
    overrides = ("train.batch_size=48", "train.steps=10", "model.hidden_size=96")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_function(train_runs, 2, [small_world.config, f"run.folder={whole}", *overrides])
    ranks = start_training(small_world, broken, *overrides)
    wait_for(broken / "checkpoints" / "step-0000005", ranks)
    for process in ranks:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (broken / "checkpoints" / "step-0000010").exists()
    # As if the kill had come while the step was saved once more, between two names.
    five = step_folder(broken / "checkpoints", 5)
    five.rename(five.with_name(f".writing-replaced-{five.name}"))
    run_function(train_runs, 2, [small_world.config, f"run.folder={broken}", *overrides])
    assert (five / "good").is_file()
    assert losses(broken) == losses(whole)
    assert [line["step"] for line in metrics_of(broken)] == list(range(1, 11))
    assert_same_state(*(step_folder(f / "checkpoints", 10) for f in (whole, broken)))


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_resumes(small_world, tmp_path):
    overrides = ("train.steps=400", "checkpoint.every_steps=1000")
    ranks = start_training(small_world, tmp_path, *overrides)
    wait_for(tmp_path / "metrics.jsonl", ranks)
    for process in ranks:
        process.send_signal(signal.SIGTERM)
    outputs = [process.output(seconds=60) for process in ranks]
    assert [process.returncode for process in ranks] == [75, 75], outputs
    (saved,) = (tmp_path / "checkpoints").glob("step-*")
    assert fault_of(saved) is None
    step = CheckpointReader(saved).state["step"]
    assert 0 < step < 400
    assert f"stopped by a signal at step {step}" in outputs[0]
    overrides = (f"run.folder={tmp_path}", f"train.steps={step + 2}")
    run_function(train_runs, 2, [small_world.config, *overrides])
    assert [line["step"] for line in metrics_of(tmp_path)] == list(range(1, step + 3))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_is_exact_in_every_stage(small_world, tmp_path, stage, precision):
    common = (ZERO.format(stage), f"engine.precision={precision}", "train.accumulation_steps=2")
    runs = [
        (f"run.folder={tmp_path}/whole", "train.steps=6", *common),
        (f"run.folder={tmp_path}/parts", "train.steps=3", *common),
        (f"run.folder={tmp_path}/parts", "train.steps=6", *common),
    ]
    run_function(train_runs, 2, *([small_world.config, *run] for run in runs))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_same_state(*(step_folder(tmp_path / f / "checkpoints", 6) for f in ("whole", "parts")))


@pytest.mark.slow
def test_a_checkpoint_resumes_in_another_topology(small_world, tmp_path):
    whole = (f"run.folder={tmp_path}/whole", "train.steps=6", ZERO.format(2))
    run_function(train_runs, 2, [small_world.config, *whole])
    first = (f"run.folder={tmp_path}/moved", "train.steps=3", ZERO.format(2))
    run_function(train_runs, 2, [small_world.config, *first])
    second = (f"run.folder={tmp_path}/moved", "train.steps=6", ZERO.format(3))
    run_function(train_runs, 1, [small_world.config, *second])
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
