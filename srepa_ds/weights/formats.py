"""The formats of an export, one row of a table each."""

from collections.abc import Callable, Mapping
from pathlib import Path

from srepa_ds.weights.diffusers_format import write_diffusers
from srepa_ds.weights.export_request import ExportRequest as ExportRequest
from srepa_ds.weights.exported import write_model


def _own(folder: Path, request: ExportRequest) -> Path:
    source = request.source
    write_model(folder, source.tensors, config=source.config, provenance=source.provenance)
    return folder


EXPORT_FORMATS: Mapping[str, Callable[[Path, ExportRequest], Path]] = {
    "srepa_ds": _own,
    "diffusers": write_diffusers,
}
"""Writes a model into a folder, and returns what it wrote: the folder, or a file in it.

Each raises OutputError, and CheckpointError for a model that the format cannot hold.
"""
