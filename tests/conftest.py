"""Small real things shared by tests: shards, a teacher, an experiment."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jaxtyping
import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from small_run import small_run as small_run

from srepa_ds.data.shard_index import DatasetDescription
from srepa_ds.data.shard_writer import ShardWriter

TEACHER = {
    "architecture": "vit_tiny_patch16_224",
    "arguments": {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 2},
    "width": 32,
    "patch_size": 2,
    "input_size": 16,
    "num_classes": 10,
}


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """Undoes what a command line does to the logger, so that a test can listen to it.

    Before the test as well as after: a fixture of a module may have run a command.
    """
    _reset_logging()
    yield
    _reset_logging()


def _reset_logging() -> None:
    log = logging.getLogger("srepa_ds")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.NOTSET)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """As in production: shapes are not checked at run time, and Dynamo can trace the functions."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@dataclass(frozen=True)
class SmallWorld:
    """A folder with everything a small experiment needs."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "experiment.yaml"


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    """Shards of random images, a random teacher, and `experiment.yaml` (sREPA-MSE)."""
    folder = tmp_path_factory.mktemp("world")
    write_shards(folder / "shards", num_samples=90)
    write_teacher(folder / "teacher.safetensors")
    teacher = {"spec": TEACHER, "weights": str(folder / "teacher.safetensors"), "dtype": "fp32"}
    experiment = {
        "run": {"folder": str(folder / "run")},
        "data": {"folder": str(folder / "shards")},
        "model": {
            "variant": "SiT-Ti/2", "input_size": 16, "in_channels": 3, "num_classes": 10,
            "depth": 3, "hidden_size": 48, "num_heads": 3,
        },
        "alignments": [
            {
                "teacher": teacher, "depth": 2, "projector": {"hidden_width": 64},
                "pointwise": {"weight": 1.0}, "structural": {"kind": "mse", "weight": 2.0},
            }
        ],
        "optimizer": {"learning_rate": 1e-3},
        "ema": {"decay": 0.9},
        "train": {"steps": 10, "batch_size": 16, "log_every_steps": 1},
        "engine": {"precision": "fp32", "deepspeed": "ds_configs/zero2.json"},
        "checkpoint": {"every_steps": 5, "keep_last": 3, "keep_every_steps": 0},
        "sample": {"num_steps": 4, "num_samples": 64, "batch_size": 16, "cfg_scale": 1.5},
        "evaluate": {"reference": str(folder / "shards"), "extractor": teacher},
    }  # fmt: skip
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    return SmallWorld(folder)


def write_shards(folder: Path, *, num_samples: int) -> None:
    """Writes smooth random colour images of ten classes."""
    generator = torch.Generator().manual_seed(5)
    description = DatasetDescription(
        source={"kind": "test"}, image_shape=(3, 16, 16), class_names=tuple("0123456789")
    )
    with ShardWriter(folder, description=description, samples_per_shard=40) as writer:
        for number in range(num_samples):
            coarse = torch.rand(1, 3, 4, 4, generator=generator) * 255
            image = torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear")
            writer.add(image[0].permute(1, 2, 0).byte().contiguous().numpy(), number % 10)


def write_teacher(path: Path) -> None:
    """Writes a small timm ViT with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        arguments = {"img_size": 16, "num_classes": 10, **TEACHER["arguments"]}
        model = timm.create_model(TEACHER["architecture"], **arguments)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
