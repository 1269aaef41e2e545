"""Where a sample set comes from: all that decides its pixels."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from srepa_ds.sampling.solvers import SamplerConfig
from srepa_ds.schema import to_tree


@dataclass(frozen=True)
class Provenance:
    """What a sample set was made with, as JSON values."""

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
    codec: str,
    class_token: bool,
    versions: Mapping[str, str],
) -> Provenance:
    """Returns the provenance of the set that `config` draws from a checkpoint.

    `ema` names the weights ("none" for the trained ones), `path` the interpolant, `versions` the
    libraries whose arithmetic the pixels depend on. The guidance of a class token is a fact only of
    models that have one: `class_token`.
    """
    sampler = to_tree(config)
    if not class_token:
        del sampler["cls_cfg_scale"]
    facts = {
        "checkpoint_sha256": checkpoint_sha256,
        "ema": ema,
        "path": path,
        "codec": codec,
        "sampler": sampler,
        "versions": dict(versions),
    }
    return Provenance(json.loads(json.dumps(facts)))


def differences(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], *, under: str = ""
) -> list[str]:
    """Returns one line "fact: stored, now wanted" for every fact that differs."""
    lines = []
    for key in sorted({*stored, *wanted}):
        name, old, new = f"{under}{key}", stored.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, under=f"{name}.")
        elif old != new:
            lines.append(f"{name}: {old!r} there, {new!r} now")
    return lines
