"""The provenance of a sample set: everything that decides its pixels."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from srepa_ds import trees
from srepa_ds.sampling.config import SamplerConfig
from srepa_ds.schema import to_tree


@dataclass(frozen=True)
class Provenance:
    """The facts a sample set was made with, as JSON values."""

    facts: Mapping[str, Any]

    def text(self) -> str:
        """Returns the JSON text that is stored beside the samples."""
        return json.dumps(self.facts, indent=2, sort_keys=True) + "\n"

    def digest(self) -> str:
        """Returns the sha256 of the facts; part files carry it."""
        return hashlib.sha256(self.text().encode()).hexdigest()


def describe(
    config: SamplerConfig,
    *,
    checkpoint_sha256: str,
    ema: str,
    path: str,
    codec: Mapping[str, Any],
    class_token: bool,
    versions: Mapping[str, str],
) -> Provenance:
    """Returns the provenance of the set that `config` draws from a checkpoint.

    `ema` names the weights ("none" for the trained ones), `path` the interpolant, `versions` the
    libraries whose arithmetic decides the pixels, `codec` what decides them in the decoder.
    `class_token` tells whether the model has one; only then is its guidance a fact.
    """
    sampler = to_tree(config)
    if not class_token:
        del sampler["cls_cfg_scale"]
    # Sets of earlier releases, which had no choice, remain what they were.
    for name in ("labels", "preset", "guided_channels", "rounding"):
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
    }
    return Provenance(json.loads(json.dumps(facts)))


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Returns a line "fact: OLD there, NEW now" for every fact that differs."""
    changes = trees.differences(stored, wanted)
    return [f"{path}: {old!r} there, {new!r} now" for path, old, new in changes]
