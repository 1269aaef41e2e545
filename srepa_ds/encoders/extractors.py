"""The table of extractors, `EXTRACTORS`: encoders in whose feature spaces images are compared."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import model_validator

from srepa_ds.encoders.features import Extractor
from srepa_ds.encoders.inception import load_inception
from srepa_ds.encoders.spec import Resolution
from srepa_ds.encoders.teacher import TEACHERS, TeacherConfig, TeacherSpec, load_teacher
from srepa_ds.errors import ConfigError, Fault
from srepa_ds.files import sha256_of
from srepa_ds.schema import MayChange, Section, one_of

Loader = Callable[["ExtractorConfig", Resolution, torch.device | str], Extractor]


@dataclass(frozen=True)
class ExtractorRow:
    """A row of `EXTRACTORS`."""

    load: Loader
    """(settings, resolution of the images, device) -> the encoder."""


def _load_teacher(
    config: "ExtractorConfig", resolution: Resolution, device: torch.device | str
) -> Extractor:
    teacher = config.teacher
    assert teacher is not None
    return load_teacher(teacher, resolution=resolution, device=device)


def _load_inception(
    config: "ExtractorConfig", resolution: Resolution, device: torch.device | str
) -> Extractor:
    assert config.weights is not None
    return load_inception(config.weights, sha256=sha256_of(config.weights), device=device)


EXTRACTORS: dict[str, ExtractorRow] = {
    "inception": ExtractorRow(_load_inception),
    **{name: ExtractorRow(_load_teacher) for name in TEACHERS},
}


class ExtractorConfig(Section):
    """An extractor and its weights."""

    name: Annotated[str, one_of("extractor", EXTRACTORS)] | None = None
    """A known extractor, or null if `spec` describes one. `inception` is that of the FID."""

    spec: TeacherSpec | None = None
    """Any other timm ViT, or null."""

    weights: Annotated[Path | None, MayChange] = None
    """A file of local weights; null takes the published ones, which `srepa-ds fetch` downloads."""

    dtype: Literal["bf16", "fp32"] | None = None
    """Precision of the encoder's products; null: fp32 for Inception, bf16 for all others."""

    compile: Annotated[bool, MayChange] = False
    """Whether to compile the encoder with torch.compile, about a minute at the start."""

    @model_validator(mode="after")
    def _one_extractor(self) -> "ExtractorConfig":
        if (self.name is None) == (self.spec is None):
            raise ValueError("give exactly one of name and spec")
        return self

    @property
    def label(self) -> str:
        """The name that tables print."""
        return self.name or (self.spec.architecture if self.spec else "")

    @property
    def teacher(self) -> TeacherConfig | None:
        """The same as a teacher's settings; None for extractors that are no teachers."""
        if self.name is not None and self.name not in TEACHERS:
            return None
        return TeacherConfig(
            name=self.name,
            spec=self.spec,
            weights=self.weights,
            dtype=self.dtype or "bf16",
            compile=self.compile,
        )

    def weights_fault(self) -> Fault | None:
        """Returns the fault if no local weights are given and none can be fetched; reads no file.

        The fault's path is relative to this section.
        """
        return self.teacher.weights_fault() if self.teacher else None


def load_extractor(
    config: ExtractorConfig, *, resolution: Resolution, device: torch.device | str
) -> Extractor:
    """Returns the frozen extractor of `config` for images of `resolution` pixels.

    Raises ConfigError if no weights are available, DataError for weights that are missing, not
    fetched, damaged or of another model.
    """
    if fault := config.weights_fault():
        raise ConfigError("extractor", [Fault(f"extractor.{fault.path}", fault.message)])
    row = EXTRACTORS[config.name] if config.name else ExtractorRow(_load_teacher)
    return row.load(config, resolution, device)
