"""After `srepa-ds fetch`, everything else runs where there is no network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_stand_in import hub_stand_in
from places import ROOT
from safetensors.torch import save
from small_vae import write_vae
from teacher_models import SMALL, plain_encoder, scrambled

from srepa_ds.data.shards import ShardDataset
from srepa_ds.encoders.teacher import TeacherSpec

TEACHER = {
    "architecture": "vit_tiny_patch16_224.augreg_in21k",
    "arguments": {**SMALL, "patch_size": 8},
    "width": 24,
    "patch_size": 8,
    "input_size": 16,
}


class Closed:
    """A folder whose programs reach no other machine."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.log = folder / "attempts"
        paths = [str(ROOT / "tests/closed_network"), str(ROOT)]
        # Without the variables that would keep the program offline before it does so itself.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "SREPA_"))}
        self.variables = {
            **inherited,
            "PYTHONPATH": os.pathsep.join(paths),
            "CLOSED_NETWORK_LOG": str(self.log),
            "HF_HOME": str(folder / "home"),
            "OMP_NUM_THREADS": "1",
        }

    def python(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs Python in the folder and returns what came of it."""
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env={**self.variables, **variables},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    def succeeded(self, *arguments: str, **variables: str) -> str:
        """Runs `srepa-ds ARGUMENTS`, which must succeed; returns what it printed."""
        done = self.python("-m", "srepa_ds", *arguments, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture
def closed(tmp_path):
    return Closed(tmp_path)


def test_the_network_is_closed(closed):
    for host in ("192.0.2.1", "example.org"):
        done = closed.python("-c", f"import socket; socket.create_connection(('{host}', 80))")
        assert "the network is closed" in done.stderr
    assert len(closed.log.read_text().splitlines()) == 2


def vae_files(folder: Path) -> dict[str, bytes]:
    """Returns the files of a VAE that makes one place of 4 x 4 pixels."""
    return {path.name: path.read_bytes() for path in write_vae(folder).iterdir()}


def write_configurations(folder: Path) -> None:
    codec = {"kind": "vae", "weights": "some/vae"}
    prepare = yaml.safe_load((ROOT / "configs/digits-prepare.yaml").read_text())
    prepare |= {"output": "data", "latents": {"codec": codec}}
    (folder / "prepare.yaml").write_text(yaml.safe_dump(prepare))
    experiment = {
        "run": {"folder": "run"},
        "data": {"folder": "data/heldout"},
        "codec": codec,
        "model": {
            "variant": "SiT-Ti/2", "input_size": 4, "in_channels": 4, "num_classes": 10,
            "depth": 2, "hidden_size": 24, "num_heads": 2,
        },
        "alignments": [
            {
                "teacher": {"spec": TEACHER}, "depth": 1, "projector": {"hidden_width": 16},
                "pointwise": {"weight": 1.0},
            }
        ],
        "train": {"steps": 2, "batch_size": 8, "log_every_steps": 1},
        "engine": {"precision": "fp32", "deepspeed": "ds_configs/zero2.json"},
        "sample": {"num_steps": 2, "num_samples": 4, "batch_size": 4},
    }  # fmt: skip
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment))


@pytest.mark.slow
def test_what_was_fetched_suffices_for_all_commands(closed, tmp_path):
    teacher = save(scrambled(plain_encoder(TeacherSpec(**TEACHER), 2)).state_dict())
    files = {
        "some/vae": vae_files(tmp_path / "vae"),
        "timm/vit_tiny_patch16_224.augreg_in21k": {"model.safetensors": teacher},
    }
    write_configurations(tmp_path)
    with hub_stand_in(files) as hub:
        closed.succeeded("fetch", "experiment.yaml", HF_ENDPOINT=hub.address)
    assert len(hub.gets("diffusion_pytorch_model.safetensors")) == 1
    said = closed.succeeded("prepare", "prepare.yaml")
    said += closed.succeeded("train", "experiment.yaml", "--ranks", "2")
    said += closed.succeeded("export", "experiment.yaml")
    said += closed.succeeded("sample", "experiment.yaml")
    assert not closed.log.exists(), closed.log.read_text()
    assert "accelerate" not in said
    assert ShardDataset(tmp_path / "data/heldout").index.latents is not None
    provenance = next((tmp_path / "run/samples").rglob("provenance.json"))
    assert json.loads(provenance.read_text())
