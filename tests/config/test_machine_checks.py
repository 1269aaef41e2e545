"""What a machine cannot train is refused by orders of magnitude, and nothing else is."""

import json
import sysconfig
import time
from pathlib import Path

import pytest
import torch
from places import ROOT

from srepa_ds.cli import run
from srepa_ds.config import machine_checks
from srepa_ds.config.experiment import load_config
from srepa_ds.config.machine_checks import check_machine, missing_compiler
from srepa_ds.distributed.ranks import Rank
from srepa_ds.errors import ConfigError
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SIT_VARIANTS
from srepa_ds.schema import kind_of
from srepa_ds.trees import load_tree

CPU = torch.device("cpu")
MSE = ROOT / "configs/digits-srepa-mse.yaml"


def faults(*overrides: str, world_size: int = 1) -> dict[str, str]:
    config = load_config(MSE, overrides)
    try:
        check_machine(config, Rank(0, world_size, CPU))
    except ConfigError as error:
        return {fault.path: fault.message for fault in error.faults}
    return {}


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/digits-*.yaml")), ids=lambda p: p.name)
def test_shipped_experiments_are_trained(path):
    if kind_of(load_tree(path)) == "experiment":
        check_machine(load_config(path), Rank(0, 1, CPU))


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (["train.batch_size=1000000000"], "train.batch_size"),
        (["model.depth=1000000000"], "model"),
        (["model.hidden_size=3000000000"], "model"),
        (["model.depth=1000000000", "model.hidden_size=3000000000"], "model"),
        (["model.num_classes=1000000000000"], "model"),
        (["alignments.0.projector.hidden_width=1000000000"], "model"),
        (["model.input_size=1000000000", "model.patch_size=2"], "train.batch_size"),
    ],
)
def test_what_cannot_fit_is_refused_at_once(overrides, path):
    faults()
    began = time.monotonic()
    found = faults(*overrides)
    assert time.monotonic() - began < 5
    assert list(found) == [path]
    assert "a rank needs at least" in found[path]
    assert "the machine has" in found[path]


def test_more_ranks_and_smaller_micro_batches_count(monkeypatch):
    terabyte = 1 << 40
    monkeypatch.setattr(machine_checks.os, "sysconf", lambda name: 1 << 20)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    batch = "train.batch_size=10000000"
    assert faults(batch)
    assert not faults(batch, "train.accumulation_steps=100")
    assert not faults(batch, world_size=100)
    # 1 TiB for 1e13 bytes of states, which stage 2 divides among the ranks.
    large = ("model.hidden_size=12288", "model.depth=230", "engine.activation_checkpointing.k=1",
             "engine.activation_checkpointing.policy=full")  # fmt: skip
    assert faults(*large)["model"].startswith("has some 6.3e+11 weights: a rank needs at least")
    assert not faults(*large, world_size=3)
    assert faults(*large, f"engine.deepspeed={ROOT}/ds_configs/zero0.json", world_size=3)
    assert 16 * 6.3e11 > 4 * terabyte


@pytest.mark.parametrize("variant", SIT_VARIANTS)
def test_the_bound_on_weights_is_below_their_number_and_close(variant):
    config = load_config(MSE, [f"model.variant={variant}", "model.input_size=32"]).model
    with torch.device("meta"):
        exact = sum(weight.numel() for weight in SiT(config, None).parameters())
    assert 0.9 * exact < machine_checks._of_model(config) <= exact


def compiling(monkeypatch, tmp_path, *programs: str, **environment: str) -> str | None:
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in programs:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return missing_compiler(CPU)


def test_a_missing_compiler_is_named_with_the_cure(monkeypatch, tmp_path):
    words = "there is no C++ compiler; install g++, or set CXX to a C++ compiler"
    assert compiling(monkeypatch, tmp_path) == words
    assert missing_compiler(torch.device("cuda")) == (
        "there is no C compiler; install gcc, or set CC to a C compiler"
    )
    found = faults("engine.compile=true", "alignments.0.teacher.compile=true")
    assert found == {
        path: f"torch.compile cannot work here: {words}; or set it to false"
        for path in ("engine.compile", "alignments.0.teacher.compile")
    }
    assert not faults()


def test_a_compiler_is_found_as_torch_finds_it(monkeypatch, tmp_path):
    header = Path(sysconfig.get_path("include")) / "Python.h"
    assert header.is_file(), "these tests need the headers of Python"
    assert compiling(monkeypatch, tmp_path, "c++ own", "g++") is None
    assert compiling(monkeypatch, tmp_path, CXX="nowhere/g++ -O2") is not None
    assert compiling(monkeypatch, tmp_path, "ccache", CXX="ccache g++") is None
    monkeypatch.setattr(machine_checks.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h is missing" in (missing_compiler(CPU) or "")


@pytest.mark.parametrize("setting", ["model.depth=1000000000", "train.batch_size=1000000000"])
def test_nothing_is_written_before_the_refusal(tmp_path, monkeypatch, capsys, setting):
    monkeypatch.chdir(tmp_path)
    assert run(["train", str(MSE), f"run.folder={json.dumps(str(tmp_path / 'run'))}", setting]) == 2
    assert "a rank needs at least" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
