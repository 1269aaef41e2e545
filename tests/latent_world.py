"""A small world of photographs: a folder of them, a VAE, a teacher, and their configurations."""

from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from skimage import data
from small_vae import write_vae

CLASSES = ("n01440764", "n01443537", "n01484850")
TEACHER = {
    "architecture": "vit_tiny_patch16_224",
    "arguments": {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8},
    "width": 32,
    "patch_size": 8,
    "input_size": 32,
    "num_classes": 3,
}


@dataclass(frozen=True)
class LatentWorld:
    """A folder with everything that a training on latents needs, but for the data set."""

    folder: Path

    @property
    def prepare(self) -> Path:
        return self.folder / "prepare.yaml"

    @property
    def experiment(self) -> Path:
        return self.folder / "experiment.yaml"

    @property
    def data(self) -> Path:
        return self.folder / "data"


def write_latent_world(folder: Path, *, images_per_class: int = 12) -> LatentWorld:
    """Writes photographs in class folders, a VAE and a teacher with random weights."""
    write_photographs(folder / "images", images_per_class=images_per_class)
    write_vae(folder / "vae")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoder = timm.create_model(
            TEACHER["architecture"], img_size=32, num_classes=3, **TEACHER["arguments"]
        )
    save_file(encoder.state_dict(), folder / "teacher.safetensors")
    world = LatentWorld(folder)
    vae = {"kind": "vae", "weights": str(folder / "vae")}
    teacher = {"spec": TEACHER, "weights": str(folder / "teacher.safetensors"), "dtype": "fp32"}
    prepare = {
        "kind": "prepare",
        "source": {"kind": "image_folder", "path": str(folder / "images")},
        "image_size": 32,
        "output": str(world.data),
        "samples_per_shard": 10,
        "holdout_fraction": 0.25,
        "latents": {"codec": vae},
    }
    experiment = {
        "run": {"folder": str(folder / "run")},
        "data": {"folder": str(world.data / "train")},
        "codec": vae,
        "model": {
            "variant": "SiT-Ti/2", "input_size": 8, "in_channels": 4, "num_classes": 3,
            "depth": 2, "hidden_size": 48, "num_heads": 3,
        },
        "alignments": [
            {
                "teacher": teacher, "depth": 1, "projector": {"hidden_width": 32},
                "pointwise": {"weight": 1.0}, "structural": {"kind": "mse", "weight": 2.0},
            }
        ],
        "optimizer": {"learning_rate": 1e-3},
        "ema": {"decay": 0.5},
        "train": {"steps": 6, "batch_size": 8, "log_every_steps": 1},
        "engine": {"precision": "fp32", "deepspeed": "ds_configs/zero2.json"},
        "checkpoint": {"every_steps": 3, "keep_last": 3},
        "monitor": {
            "images_every_steps": 3, "num_images": 6, "num_steps": 3,
            "heldout": str(world.data / "heldout"), "heldout_every_steps": 3,
        },
        "sample": {"num_steps": 4, "num_samples": 8, "batch_size": 4},
        "evaluate": {"reference": str(world.data / "heldout"), "extractor": teacher},
    }  # fmt: skip
    world.prepare.write_text(yaml.safe_dump(prepare))
    world.experiment.write_text(yaml.safe_dump(experiment))
    return world


def write_photographs(folder: Path, *, images_per_class: int) -> None:
    """Writes overlapping cuts of a photograph for each class, as JPEG files."""
    photographs = (data.astronaut(), data.chelsea(), data.coffee())
    for name, pixels in zip(CLASSES, photographs, strict=True):
        (folder / name).mkdir(parents=True)
        whole = Image.fromarray(pixels)
        for number in range(images_per_class):
            left, top = 11 * number, 7 * number
            cut = whole.crop((left, top, left + 200, top + 180))
            cut.save(folder / name / f"{name}_{number}.JPEG", quality=95)
