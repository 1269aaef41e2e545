"""The small real things that tests build: data, a teacher, experiments, objectives, checkpoints."""

import json
import resource
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
import yaml
from places import ROOT
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from srepa_ds.alignment.alignment import TeacherShape
from srepa_ds.checkpoint.fragment_file import Piece
from srepa_ds.config.experiment import Config
from srepa_ds.data.shard_index import DatasetDescription
from srepa_ds.data.shard_writer import ShardWriter
from srepa_ds.objective import Objective

Module = TypeVar("Module", bound=nn.Module)

TEACHER = {
    "architecture": "vit_tiny_patch16_224",
    "arguments": {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 2},
    "width": 32,
    "patch_size": 2,
    "input_size": 16,
    "num_classes": 10,
}


@dataclass(frozen=True)
class SmallWorld:
    """A folder with everything a small experiment needs."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "experiment.yaml"

    def copied_to(self, folder: Path) -> "SmallWorld":
        """Returns a copy in `folder`, whose experiment names the files of the copy."""
        shutil.copytree(self.folder, folder)
        copy = SmallWorld(folder)
        copy.config.write_text(copy.config.read_text().replace(str(self.folder), str(folder)))
        return copy


def write_world(folder: Path) -> SmallWorld:
    """Writes shards of random images, a random teacher, and `experiment.yaml` (sREPA-MSE)."""
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
    world = SmallWorld(folder)
    world.config.write_text(yaml.safe_dump(experiment))
    return world


def write_shards(
    folder: Path, *, num_samples: int, size: tuple[int, int] = (16, 16), num_classes: int = 10
) -> None:
    """Writes smooth random colour images of all classes; `size` is height and width."""
    generator = torch.Generator().manual_seed(5)
    description = DatasetDescription(
        source={"kind": "test"},
        image_shape=(3, *size),
        class_names=tuple("0123456789"[:num_classes]),
    )
    with ShardWriter(folder, description=description, samples_per_shard=40) as writer:
        for number in range(num_samples):
            coarse = torch.rand(1, 3, size[0] // 4, size[1] // 4, generator=generator) * 255
            image = nn.functional.interpolate(coarse, size=size, mode="bilinear")
            writer.add(image[0].permute(1, 2, 0).byte().contiguous().numpy(), number % num_classes)


def write_teacher(path: Path) -> None:
    """Writes a small timm ViT with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        arguments = {"img_size": 16, "num_classes": 10, **TEACHER["arguments"]}
        model = timm.create_model(TEACHER["architecture"], **arguments)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)


def write_deepspeed_json(folder: Path, arrangement: str) -> Path:
    """Writes a file of `ds_configs` (its name without `zero`) with settings for a tiny model."""
    document = json.loads((ROOT / f"ds_configs/zero{arrangement}.json").read_text())
    settings = document["zero_optimization"]
    if settings["stage"] > 0:
        # Several buckets, as a large model has.
        settings["reduce_bucket_size"] = 5_000
    if settings["stage"] == 3:
        # As in a large model: some weights stay gathered, others are fetched little by little and
        # released after the forward pass.
        settings["stage3_param_persistence_threshold"] = 500
        settings["stage3_prefetch_bucket_size"] = 2_000
        settings["stage3_max_reuse_distance"] = 1_000
    path = folder / f"zero{arrangement}.json"
    path.write_text(json.dumps(document))
    return path


def odd_sizes() -> dict[str, Any]:
    """Returns a model and its alignment whose odd sizes make shares of ranks end inside weights."""
    spec = {"architecture": "vit_tiny_patch16_224", "width": 10, "patch_size": 2, "input_size": 4}
    alignment = {
        "teacher": {"spec": spec, "weights": "unused.safetensors"},
        "depth": 2,
        "projector": {"hidden_width": 13},
        "pointwise": {"weight": 1.0},
        "structural": {"kind": "mse", "weight": 2.0},
    }
    model = {"variant": "SiT-S/2", "input_size": 4, "in_channels": 3, "num_classes": 6}
    model |= {"depth": 3, "hidden_size": 20, "num_heads": 5}
    return {"model": model, "alignments": [alignment]}


def objective_of(
    config: Config,
    *,
    teacher_width: int | None = None,
    generator: torch.Generator | None = None,
) -> Objective:
    """Returns the objective of a configuration, whose teachers have the grid of its model."""
    widths = [teacher_width or alignment.teacher.resolved.width for alignment in config.alignments]
    return Objective(
        config.model,
        config.objective,
        config.alignments,
        teachers=tuple(TeacherShape(width, config.model.grid) for width in widths),
        generator=generator,
    )


def randomised(module: Module, *, seed: int = 0, scale: float = 0.2) -> Module:
    """Fills all weights with random numbers, also those a training starts from zero.

    A model as it is initialised lets blocks pass their input through, which hides faults.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    return module


def pieces_of(
    tensors: Mapping[str, Tensor], *, kind: str = "master", run: int = 1 << 30
) -> Iterator[Piece]:
    """Yields every tensor as pieces of a checkpoint, cut into runs of `run` elements."""
    for name, tensor in tensors.items():
        flat = tensor.detach().reshape(-1)
        for start in range(0, len(flat), run):
            yield Piece(kind, name, tuple(tensor.shape), start, flat[start : start + run])


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Returns the bytes of every file below `folder`, None for a folder, by relative path."""
    paths = folder.rglob("*")
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def distance(found: Tensor, expected: Tensor, *, start: Tensor | None = None) -> float:
    """Returns how far `found` is from `expected`, relative to the length of `expected`.

    With `start`, relative to the way from there to `expected`: a difference between two updates.
    """
    scale = expected if start is None else expected - start
    return ((found - expected).norm() / scale.norm()).item()


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Makes this process's writes beyond `num_bytes` of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class DeviceReads(TorchDispatchMode):
    """Counts the calls that make the host wait for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs an operator and counts it if it reads a value."""
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))
