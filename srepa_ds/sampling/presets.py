"""The table of presets, `PRESETS`: the settings with which papers draw their images."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from srepa_ds.schema import Section, to_tree

# What all rows share: REPA's generate, which the others took over.
_COMMON: Mapping[str, Any] = {
    "solver": "euler_maruyama",
    "num_steps": 250,
    "cfg_scale": 1.0,
    "cls_cfg_scale": 0.0,
    "guidance_low": 0.0,
    "guidance_high": 1.0,
    "guided_channels": None,
    "label_mode": "random",
    "labels": None,
    "num_samples": 50_000,
    "seed": 0,
    "rounding": "truncate",
}
# These drew with TF32, so float32 is no deviation.
_ORDINARY_PRECISIONS = ("fp32", "tf32")


@dataclass(frozen=True)
class Preset:
    """A row of `PRESETS`: how one paper draws the images it scores, and where it says so.

    The decoder is `sample.decoder`, which no preset sets: another one is a deviation.
    """

    source: str
    """The paper or code, and the place in it."""

    changes: Mapping[str, Any] = field(default_factory=dict)

    decoder: str = "stabilityai/sd-vae-ft-ema"
    """The VAE that decodes the images."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the sampler, by name."""
        return {**_COMMON, **self.changes}


PRESETS: dict[str, Preset] = {
    "unguided": Preset("sREPA, Table 1: SDE, Euler-Maruyama with 250 steps, no guidance"),
    "repa": Preset(
        "REPA, the README of its code: cfg-scale 1.8 up to guidance-high 0.7",
        {"cfg_scale": 1.8, "guidance_high": 0.7},
    ),
    "srepa": Preset(
        "sREPA, ImageNet at 256 px: guidance 1.325; no interval is mentioned", {"cfg_scale": 1.325}
    ),
    "srepa-512": Preset(
        "sREPA, ImageNet at 512 px: guidance 1.35; no interval is mentioned", {"cfg_scale": 1.35}
    ),
    "reg": Preset(
        "REG, eval.sh of its code: cfg-scale and cls-cfg-scale 2.3 up to guidance-high 0.85",
        {"cfg_scale": 2.3, "cls_cfg_scale": 2.3, "guidance_high": 0.85},
    ),
    "irepa": Preset(
        "iREPA, the defaults of its code: SDE with 250 steps, no guidance, the decoder of ft-mse",
        decoder="stabilityai/sd-vae-ft-mse",
    ),
    "sit": Preset(
        "SiT, Ma et al. 2024, and its code: SDE, Euler-Maruyama with 250 steps, guidance 1.5 of "
        "the first 3 of 4 channels; pixels are 127.5 x + 128, cut off: rounded to the nearest",
        {"cfg_scale": 1.5, "guided_channels": 3, "rounding": "round"},
    ),
}


def decoder_deviation(preset: str | None, decoder: str) -> dict[str, dict[str, Any]]:
    """Returns the name of the decoder, if it is not that of the preset, as `deviations` does.

    The last part of a name counts: a folder `sd-vae-ft-ema` is taken for what its name says.
    """
    row = PRESETS.get(preset or "")
    if row is None or decoder.split("/")[-1] == row.decoder.split("/")[-1]:
        return {}
    return {"decoder": {"preset": row.decoder, "here": decoder}}


def deviations(config: Section) -> dict[str, dict[str, Any]]:
    """Returns the settings that differ from those of the preset, with both values, as JSON values.

    `config` is a sampler's; without a preset nothing deviates.
    """
    tree = to_tree(config)
    preset = PRESETS.get(tree["preset"])
    if preset is None:
        return {}
    wanted = dict(preset.settings)
    if tree["precision"] not in _ORDINARY_PRECISIONS:
        wanted["precision"] = "fp32"
    return {
        name: {"preset": value, "here": tree[name]}
        for name, value in wanted.items()
        if tree[name] != value
    }
