"""Which training steps are timed: a row of the table each."""

from dataclasses import dataclass

import yaml

from srepa_ds.config.experiment import Config, config_from

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
    # Few processors compute in bf16; without, it is a multiple slower than fp32.
    "cpu": [f"{PLAIN} precision=fp32", "precision=fp32", "precision=fp32 remat.policy=full"],
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
    """Settings of the engine's section, `precision=bf16 remat.policy=full`, or of `model`, as in
    `model.attention=math`; those of the plain loop begin with its name."""

    @property
    def is_plain(self) -> bool:
        """True for the plain loop, which only knows `precision`."""
        return self.arrangement.startswith(PLAIN)

    @property
    def config(self) -> Config:
        """The experiment whose step this is; nothing is read from the paths it names."""
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
            # One process has nothing to share out; on a CPU the copies of higher stages show.
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
            dtype = "fp32" if tree["engine"].get("precision") == "fp32" else "bf16"
            teacher = {"name": self.teacher, "weights": "unused.safetensors", "dtype": dtype}
            depth = 4 if self.model.startswith(("SiT-S", "SiT-B")) else 8
            tree["alignments"] = [{"teacher": teacher, "depth": depth, **MODES[self.mode]}]
        return config_from(tree, source=f"--arrangements '{self.arrangement}'")
