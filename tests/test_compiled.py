"""Compiled blocks train as eager ones do, through DeepSpeed and through the loop of a run."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from builders import distance, metrics_of
from ranks import run_worker
from safetensors.torch import load_file

from srepa_ds.checkpoint.folder import step_folder
from srepa_ds.checkpoint.reader import CheckpointReader


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    run_worker("compiled_engine", 1, folder)
    return load_file(folder / "facts.safetensors")


def test_the_engine_trains_one_graph_as_it_trains_eager_blocks(facts):
    assert facts["graphs"] == 1
    for key in ("1.losses", "2.losses", "master"):
        assert distance(facts[f"compiled.{key}"], facts[f"eager.{key}"]) < 1e-6


def test_a_checkpoint_of_compiled_blocks_is_one_of_eager_blocks(facts):
    for key in ("2.losses", "master"):
        assert distance(facts[f"resumed.{key}"], facts[f"compiled.{key}"]) < 1e-6


def losses(folder: Path) -> list[float]:
    return [line["loss_total"] for line in metrics_of(folder)]


def masters(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(step_folder(folder / "checkpoints", 4))
    return {name: reader.tensor("master", name) for name in reader.names("master")}


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in tensors.values()])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "loss_bound", "weight_bound"), [("fp32", 1e-6, 1e-6), ("bf16", 1e-4, 5e-4)]
)
def test_a_compiled_run_is_the_eager_one_but_for_rounding_and_resumes(
    small_world, tmp_path, precision, loss_bound, weight_bound
):
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"engine.compile needs a C++ compiler on a CPU, and there is no {compiler}")
    common = [f"engine.precision={precision}", "engine.activation_checkpointing.policy=selective"]
    runs = [
        ("eager", "train.steps=4", "engine.compile=false"),
        ("whole", "train.steps=4", "engine.compile=true"),
        ("parts", "train.steps=2", "engine.compile=true"),
        ("parts", "train.steps=4", "engine.compile=true"),
    ]
    overrides = [";".join([f"run.folder={tmp_path / run}", *rest, *common]) for run, *rest in runs]
    run_worker("compiled_runs", 1, small_world.config, tmp_path / "graphs.json", *overrides)
    assert json.loads((tmp_path / "graphs.json").read_text()) == [0, 1, 1, 1]
    eager, whole, parts = (tmp_path / name for name in ("eager", "whole", "parts"))
    assert losses(whole) == pytest.approx(losses(eager), rel=loss_bound)
    assert losses(parts) == losses(whole)
    assert masters(whole).keys() == masters(eager).keys()
    assert distance(flat(masters(whole)), flat(masters(eager))) < weight_bound
    assert torch.equal(flat(masters(parts)), flat(masters(whole)))
