"""The table of extractors, `EXTRACTORS`: encoders in whose feature spaces images are compared."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator

from srepa_ds.encoders.features import Extractor
from srepa_ds.encoders.fetched import sha256_once
from srepa_ds.encoders.inception import load_inception
from srepa_ds.encoders.publications import PUBLISHED, WEB_FILES, Published
from srepa_ds.encoders.published import fetched_file, local_weights
from srepa_ds.encoders.spec import Resolution
from srepa_ds.encoders.teacher import TEACHERS, TeacherConfig, TeacherSpec, load_teacher
from srepa_ds.encoders.timm_extractor import FDR_ENCODERS, load_timm_extractor
from srepa_ds.errors import ConfigError, DataError, Fault
from srepa_ds.files import looked_for, reason_of
from srepa_ds.schema import MayChange, Section, one_of

Loader = Callable[["ExtractorConfig", Resolution, torch.device | str], Extractor]

INCEPTION = "inception"
_WEIGHTS = "extractor.weights"


@dataclass(frozen=True)
class ExtractorRow:
    """A row of `EXTRACTORS`."""

    load: Loader
    """(settings, resolution of the images, device) -> the encoder."""
    published: Callable[["ExtractorConfig"], Published]
    """The weights that are taken if settings name no file. Raises DataError if there are none."""


def _load_teacher(
    config: "ExtractorConfig", resolution: Resolution, device: torch.device | str
) -> Extractor:
    teacher = config.teacher
    assert teacher is not None
    return load_teacher(teacher, resolution=resolution, device=device)


def _weights_of_teacher(config: "ExtractorConfig") -> Published:
    teacher = config.teacher
    assert teacher is not None
    return PUBLISHED["timm"](teacher.resolved.architecture)


def _load_inception(
    config: "ExtractorConfig", resolution: Resolution, device: torch.device | str
) -> Extractor:
    weights = config.weights or fetched_file(INCEPTION, setting=_WEIGHTS)
    return load_inception(weights, sha256=_checked_hash(weights, config), device=device)


def _load_fdr(
    config: "ExtractorConfig", resolution: Resolution, device: torch.device | str
) -> Extractor:
    name = config.name or ""
    spec = FDR_ENCODERS[name]
    return load_timm_extractor(
        spec,
        config.weights or local_weights(spec.architecture, setting=_WEIGHTS),
        name=name,
        resolution=resolution,
        device=device,
        dtype=torch.float32 if config.dtype == "fp32" else torch.bfloat16,
        compiled=config.compile,
    )


def _weights_of_fdr(config: "ExtractorConfig") -> Published:
    return PUBLISHED["timm"](FDR_ENCODERS[config.name or ""].architecture)


_TEACHER = ExtractorRow(_load_teacher, _weights_of_teacher)

EXTRACTORS: dict[str, ExtractorRow] = {
    INCEPTION: ExtractorRow(_load_inception, lambda config: WEB_FILES[INCEPTION]),
    **dict.fromkeys(FDR_ENCODERS, ExtractorRow(_load_fdr, _weights_of_fdr)),
    **dict.fromkeys(TEACHERS, _TEACHER),
}


class ExtractorConfig(Section):
    """An extractor and its weights."""

    name: Annotated[str, one_of("extractor", EXTRACTORS)] | None = None
    """A known extractor, or null if `spec` describes one. `inception` is that of the FID; the rows
    `fdr-...` are the other five of FDr6; every known teacher is one."""

    spec: TeacherSpec | None = None
    """Any other timm ViT, or null."""

    weights: Annotated[Path | None, MayChange] = None
    """A file of local weights; null takes the published ones, which `srepa-ds fetch` downloads."""

    weights_sha256: Annotated[str | None, MayChange] = Field(default=None, pattern="^[0-9a-f]{64}$")
    """The sha256 that the file `weights` must have. With null, Inception's must be that of the
    published file, and others are not compared."""

    dtype: Literal["bf16", "fp32"] | None = None
    """Precision of the encoder's products; null: fp32 for Inception, which has no other, and bf16
    for all others."""

    compile: Annotated[bool, MayChange] = False
    """Whether to compile the encoder with torch.compile, about a minute at the start; not for
    Inception."""

    @model_validator(mode="after")
    def _one_extractor(self) -> "ExtractorConfig":
        if (self.name is None) == (self.spec is None):
            raise ValueError("give exactly one of name and spec")
        if self.weights_sha256 is not None and self.weights is None:
            raise ValueError("weights_sha256 belongs to a file; give weights, or leave it out")
        if self.name == INCEPTION and self.dtype == "bf16":
            raise ValueError("dtype: Inception computes in fp32 as ADM's evaluator; leave it out")
        if self.name == INCEPTION and self.compile:
            raise ValueError("compile: Inception runs as it is; leave it out")
        return self

    @property
    def label(self) -> str:
        """The name that tables print, with the precision if it is not the usual one."""
        name = self.name or (self.spec.architecture if self.spec else "")
        return f"{name} (fp32)" if self.dtype == "fp32" and self.name != INCEPTION else name

    @property
    def row(self) -> ExtractorRow:
        """The row of `EXTRACTORS`; any timm ViT has that of the teachers."""
        return EXTRACTORS[self.name] if self.name else _TEACHER

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
        if self.weights is not None:
            return None
        if teacher := self.teacher:
            return teacher.weights_fault()
        try:
            self.row.published(self)
        except DataError as error:
            return Fault("weights", str(error))
        return None


def load_extractor(
    config: ExtractorConfig, *, resolution: Resolution, device: torch.device | str
) -> Extractor:
    """Returns the frozen extractor of `config` for images of `resolution` pixels.

    Raises ConfigError if no weights are available, DataError for weights that are missing, not
    fetched, damaged, of another model or of another hash than expected.
    """
    if fault := config.weights_fault():
        raise ConfigError("extractor", [Fault(f"extractor.{fault.path}", fault.message)])
    if config.weights is not None and config.weights_sha256 is not None:
        _checked_hash(config.weights, config)
    return config.row.load(config, resolution, device)


def _checked_hash(weights: Path, config: ExtractorConfig) -> str:
    """Returns the hash of a file that must have the expected one; raises DataError."""
    published = WEB_FILES[INCEPTION].sha256 if config.name == INCEPTION else None
    try:
        found = sha256_once(weights)
    except OSError as error:
        raise DataError(
            f"{_WEIGHTS}: {weights}: {reason_of(error)}{looked_for(weights)}; correct it"
        ) from error
    if config.weights_sha256 not in (None, found):
        raise DataError(
            f"{weights}: has sha256 {found}, and extractor.weights_sha256 is "
            f"{config.weights_sha256}; give the file of that hash, or correct the setting"
        )
    if config.weights_sha256 is None and found != published:
        raise DataError(
            f"{weights}: not the published weights (sha256 {found}, expected {published}); leave "
            f"out {_WEIGHTS} to take the fetched file, or, if other weights are meant, set "
            "extractor.weights_sha256 to their hash"
        )
    return found
