"""The settings of an export: which weights, in which format."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from srepa_ds.optim.ema import MAIN_EMA, RelativeLength
from srepa_ds.schema import OnlyFor, Section

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT])B")
_UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def _checked_size(text: str) -> str:
    match = _SIZE.fullmatch(text)
    if match is None or float(match[1]) * _UNITS[match[2]] < 1:
        raise ValueError(f"'{text}' is no size; write a number and its unit: 500MB, 5GB")
    return text


ShardSize = Annotated[str, AfterValidator(_checked_size)]
"""A size as huggingface_hub reads it; units are powers of 1000."""


def _identifier(license: str | None) -> str | None:
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ValueError("write it as the Hub does, in small letters: apache-2.0, mit, other")
    return license


class ExportConfig(Section):
    """The weights that `srepa-ds export` writes, and the format."""

    format: Literal["srepa_ds", "repa", "diffusers"] = "srepa_ds"
    """`srepa_ds`: `model.safetensors` and `config.json`, which `sample` draws from. `repa`: a file
    of REPA's trainer (`0400000.pt`). `diffusers`: a folder for `SiTPipeline`."""

    weights: str = MAIN_EMA
    """`ema`, another stored average (`ema-0.999`, `ema-power-0.05`), or `master`: the weights of
    the last step. A file of REPA's trainer has these anyway, and beside them the average that is
    named here, else `ema`."""

    power_sigma: RelativeLength | None = None
    """Instead, a power-function average of this relative length, combined from those in the run's
    checkpoints (ema.power_sigmas)."""

    step: int | None = Field(default=None, ge=1)
    """The checkpoint's step; without it the newest valid one."""

    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"], OnlyFor("format", ("srepa_ds", "diffusers"))
    ] = "fp32"
    """The numbers of the weights; the position embedding stays fp32."""

    projectors: Annotated[bool, OnlyFor("format", ("srepa_ds", "repa"))] = True
    """Whether the projectors of the alignments are written too; sampling does not need them."""

    max_shard_size: Annotated[ShardSize | None, OnlyFor("format", ("srepa_ds", "diffusers"))] = None
    """Write several files up to this size ("5GB", "500MB"), a larger tensor alone in one, and an
    index, as the Hub's libraries do; null writes one file."""

    optimizer: Annotated[bool, OnlyFor("format", "repa")] = True
    """Whether Adam's state is written too, so that REPA's trainer can go on."""

    license: Annotated[str | None, AfterValidator(_identifier)] = None
    """The licence that the model card states, as the Hub names it (`apache-2.0`); without it the
    card says `other`, and that it is not stated."""

    folder: Path | None = None
    """Where to; without it `<run.folder>/export`, or `export-repa`, `export-diffusers`."""
