"""The training steps that are timed: each case is a row of the table."""

from dataclasses import dataclass

import torch
import yaml

from srepa_ds.config.experiment import Config, config_from
from srepa_ds.model.precision import PRECISIONS

MODES = {
    "sit": {},
    "repa": {"pointwise": {"weight": 0.5}},
    "srepa-mse": {"pointwise": {"weight": 1.0}, "structural": {"kind": "mse", "weight": 2.0}},
    "srepa-kl": {"pointwise": {"weight": 1.0}, "structural": {"kind": "kl", "weight": 0.5}},
}
PLAIN = "plain loop"
ARRANGEMENTS = {
    "cuda": [
        f"{PLAIN} precision=bf16_autocast",
        "precision=bf16 compile=true",
        "precision=bf16",
    ],
    # Few processors compute in bf16; on others it is several times slower than fp32.
    "cpu": [
        f"{PLAIN} precision=fp32",
        "precision=fp32",
        "precision=fp32 activation_checkpointing.policy=full",
    ],
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    pixels: int
    mode: str
    batch: int
    teacher: str
    arrangement: str
    """Settings of `engine`, as in `precision=bf16 activation_checkpointing.policy=full`, or of
    `model`, as in `model.attention=math`; those of the plain loop start with its name."""

    @property
    def is_plain(self) -> bool:
        """True for the plain loop, whose only setting is `precision`."""
        return self.arrangement.startswith(PLAIN)

    @property
    def config(self) -> Config:
        """The experiment that this step belongs to; its paths are not read."""
        model = {
            "variant": self.model,
            "input_size": self.pixels // 8,
            "in_channels": 4,
            "num_classes": 1000,
        }
        tree: dict = {
            "run": {"folder": "unused"},
            "data": {"folder": "unused"},
            "model": model,
            "train": {"steps": 1, "batch_size": self.batch},
            # One process has nothing to shard; on a CPU the copies of higher stages cost time.
            "engine": {"deepspeed": "ds_configs/zero0.json"},
        }
        for setting in self.arrangement.removeprefix(PLAIN).split():
            path, _, value = setting.partition("=")
            sections = path.removeprefix("engine.").split(".")
            branch = tree if sections[0] in tree else tree["engine"]
            for section in sections[:-1]:
                branch = branch.setdefault(section, {})
            branch[sections[-1]] = yaml.safe_load(value)
        if MODES[self.mode]:
            exact = [name for name, row in PRECISIONS.items() if row.products == torch.float32]
            dtype = "fp32" if tree["engine"].get("precision") in exact else "bf16"
            teacher = {"name": self.teacher, "weights": "unused.safetensors", "dtype": dtype}
            depth = 4 if self.model.startswith(("SiT-S", "SiT-B")) else 8
            tree["alignments"] = [{"teacher": teacher, "depth": depth, **MODES[self.mode]}]
        return config_from(tree, source=f"--arrangements '{self.arrangement}'")
