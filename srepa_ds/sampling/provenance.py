"""The provenance of a sample set: everything that decides its pixels."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from srepa_ds import trees
from srepa_ds.sampling.config import SamplerConfig, count_evaluations
from srepa_ds.sampling.presets import decoder_deviation, deviations
from srepa_ds.schema import to_tree

DEVICES = "devices"
NOTES = ("evaluations", "preset", "deviations", "decoder", DEVICES)
"""What is stored beside the facts and is not compared."""


@dataclass(frozen=True)
class Provenance:
    """The facts a sample set was made with, and notes beside them, as JSON values."""

    facts: Mapping[str, Any]
    """Everything that decides the pixels."""

    notes: Mapping[str, Any] = field(default_factory=dict)
    """Function evaluations per image; the preset, and the settings that deviate from it; the
    decoder's name, and the devices that drew."""

    def text(self) -> str:
        """Returns the JSON text that is stored beside the samples."""
        return _text({**self.facts, **self.notes})

    def digest(self) -> str:
        """Returns the sha256 of the facts; part files carry it."""
        return hashlib.sha256(_text(self.facts).encode()).hexdigest()


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Further:
    """Facts that only some sets have."""

    guide_sha256: str | None = None
    """Hash of the guide's weights, with autoguidance."""

    labels_sha256: str | None = None
    """Hash of the labels that a file lists."""

    compiled: bool = False
    """Whether torch.compile made the model's kernels, which round otherwise."""

    model: Mapping[str, Any] = field(default_factory=dict)
    """The sizes of a model that a file of weights does not describe."""

    guide: Mapping[str, Any] = field(default_factory=dict)
    """Those of the guide."""

    @property
    def facts(self) -> dict[str, Any]:
        """The facts that differ from those of ordinary sets."""
        return {name: value for name, value in vars(self).items() if value}

    @property
    def deviations(self) -> dict[str, dict[str, Any]]:
        """What no paper has, as `presets.deviations` does; rounding and sizes are none."""
        found = {name: getattr(self, name) for name in ("guide_sha256", "labels_sha256")}
        return {name: {"preset": None, "here": here} for name, here in found.items() if here}


def describe(
    config: SamplerConfig,
    *,
    checkpoint_sha256: str,
    ema: str,
    path: str,
    codec: Mapping[str, Any],
    class_token: bool,
    versions: Mapping[str, str],
    further: Further = Further(),
    decoder: str | None = None,
    devices: Sequence[str] = (),
) -> Provenance:
    """Returns the provenance of the set that `config` draws from a checkpoint.

    `ema` names the weights ("none" for the trained ones), `path` the interpolant, `versions` the
    libraries whose arithmetic decides the pixels, `codec` what decides them in the decoder.
    `class_token` tells whether the model has one; only then is its guidance a fact. The name of the
    `decoder`, if it is a VAE, and the `devices` that draw are noted.
    """
    sampler = to_tree(config)
    preset = sampler.pop("preset")
    if not class_token:
        del sampler["cls_cfg_scale"]
    # Sets of earlier releases, which had no choice, remain what they were.
    for name in ("labels", "guided_channels", "rounding"):
        if sampler[name] == SamplerConfig.model_fields[name].default:
            del sampler[name]
    facts = {
        "checkpoint_sha256": checkpoint_sha256,
        "ema": ema,
        "path": path,
        # By its name alone where nothing else is to be said, as in earlier releases.
        "codec": dict(codec) if len(codec) > 1 else codec["kind"],
        "sampler": sampler,
        "versions": dict(versions),
        **further.facts,
    }
    autoguided = further.guide_sha256 is not None
    notes: dict[str, Any] = {
        "evaluations": vars(count_evaluations(config, autoguided=autoguided)),
    }
    if decoder is not None:
        notes["decoder"] = decoder
    if devices:
        notes[DEVICES] = sorted(set(devices))
    if preset is not None:
        of_decoder = {} if decoder is None else decoder_deviation(preset, decoder)
        found = {**deviations(config), **of_decoder, **further.deviations}
        notes |= {"preset": preset, "deviations": found}
    return Provenance(json.loads(json.dumps(facts)), json.loads(json.dumps(notes)))


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Returns a line "fact: OLD there, NEW now" for every fact that differs; notes do not count."""
    changes = trees.differences(_facts_of(stored), _facts_of(wanted))
    return [f"{path}: {old!r} there, {new!r} now" for path, old, new in changes]


def _facts_of(document: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name not in NOTES}
