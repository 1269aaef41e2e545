import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT

from srepa_ds.alignment.alignment import Alignment, AlignmentConfig, TeacherShape
from srepa_ds.distributed import ranks
from srepa_ds.encoders.teacher import TeacherConfig, TeacherTokens
from srepa_ds.errors import ConfigError

TOOL = ROOT / "tools" / "bench_step.py"


@pytest.fixture
def tool(monkeypatch):
    """Imports a file next to the tool, as the tool does."""
    monkeypatch.syspath_prepend(TOOL.parent)
    monkeypatch.chdir(ROOT)
    return importlib.import_module


def test_an_arrangement_is_settings_of_the_engine_or_of_a_section(tool):
    arrangement = "precision=bf16 activation_checkpointing.policy=full model.attention=math"
    case = tool("step_case").Case("SiT-S/2", 64, "repa", 4, "dinov2-vit-b", arrangement)
    config = case.config
    assert (config.engine.precision, config.engine.activation_checkpointing.policy) == (
        "bf16",
        "full",
    )
    assert config.model.attention == "math"
    assert not case.is_plain


def test_an_unknown_setting_is_named(tool):
    case = tool("step_case").Case("SiT-S/2", 64, "sit", 4, "dinov2-vit-b", "precison=bf16")
    with pytest.raises(ConfigError, match="precison"):
        _ = case.config


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_the_plain_loop_computes_the_losses_of_the_engine(tool, kind):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 16, 8, generator=generator) for _ in range(2))
    alignment = AlignmentConfig(
        teacher=TeacherConfig(name="dinov2-vit-b", weights=Path("unused.safetensors")),
        depth=4,
        pointwise={"weight": 0.7},
        structural={"kind": kind, "weight": 1.3},
    )
    terms = Alignment(alignment, (4, 4), TeacherShape(8, (4, 4)))(
        torch.nn.Identity(), student, TeacherTokens(teacher, None), alignment.weights_at(0)
    )
    found = tool("plain_loop").aligned(student, teacher, alignment)
    torch.testing.assert_close(found, 0.7 * terms.pointwise + 1.3 * terms.structural)


def test_a_step_leaves_its_loss_on_the_device(tool):
    weight = torch.nn.Parameter(torch.ones(2))
    measure = tool("step_measure")
    times = measure.step_times(lambda: weight.sum(), 3, torch.device("cpu"))
    assert len(times) == 3
    assert min(times) > 0
    case = tool("step_case").Case("SiT-Ti/2", 32, "sit", 2, "none", "plain loop precision=fp32")
    loss = tool("step_build").step_of(case)()
    ranks.close()
    assert isinstance(loss, torch.Tensor)
    assert not loss.requires_grad


def test_the_defaults_for_a_gpu_are_few_processes(tool):
    assert len(tool("step_case").ARRANGEMENTS["cuda"]) <= 3


def test_nothing_runs_past_the_time_given(tmp_path):
    command = [sys.executable, TOOL, "--minutes", "0", "--rounds", "1", "--output", tmp_path]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    rows = printed.splitlines()[2:]
    assert len(rows) == 3
    assert all("not finished: the 0 minutes of --minutes are over" in row for row in rows)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_steps_of_both_are_timed_and_profiled(tmp_path):
    command = [sys.executable, TOOL, "--models", "SiT-S/2", "--pixels", "32", "--batch", "1"]
    command += [
        "--modes",
        "srepa-mse",
        "--steps",
        "1",
        "--warmup",
        "1",
        "--rounds",
        "1",
        "--output",
        tmp_path,
    ]
    command += ["--arrangements", "plain loop precision=fp32", "precision=fp32"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["arrangement"] for row in rows] == command[-2:]
    assert all(min(row["times"]) > 0 and row["ceiling"] > 0 for row in rows)
    plain, ours = (row["times"][0] for row in rows)
    assert f"{plain / ours:.2f}x" in printed
    assert all("aten::addmm" in table.read_text() for table in tmp_path.glob("*.txt"))
    assert len(list(tmp_path.glob("*.txt"))) == 2
