"""The formats of an export, one row of a table each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from srepa_ds.weights.export_config import ExportConfig
from srepa_ds.weights.exported import write_model
from srepa_ds.weights.from_checkpoint import CheckpointWeights


@dataclass(frozen=True)
class ExportRequest:
    """What is to be written, and how."""

    source: CheckpointWeights
    config: ExportConfig
    replace: bool = False
    """Whether a model of another run may be replaced."""
    vae: Path | None = None
    """The folder of the VAE that decodes, where the model has one and it is on this machine."""
    class_names: Mapping[int, str] = field(default_factory=dict)
    """The names of classes, as far as they are known."""


def _own(folder: Path, request: ExportRequest) -> Path:
    source = request.source
    write_model(folder, source.tensors, config=source.config, provenance=source.provenance)
    return folder


EXPORT_FORMATS: Mapping[str, Callable[[Path, ExportRequest], Path]] = {"srepa_ds": _own}
"""Writes a model into a folder, and returns what it wrote: the folder, or a file in it.

Each raises OutputError, and CheckpointError for a model that the format cannot hold.
"""
