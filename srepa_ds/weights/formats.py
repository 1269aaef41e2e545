"""The formats of an export, one row of a table each."""

from collections.abc import Callable, Mapping
from pathlib import Path

from srepa_ds.weights.export_request import ExportRequest as ExportRequest
from srepa_ds.weights.exported import write_model
from srepa_ds.weights.repa_file import write_repa_file


def _own(folder: Path, request: ExportRequest) -> Path:
    source = request.source
    write_model(folder, source.tensors, config=source.config, provenance=source.provenance)
    return folder


def _repa(folder: Path, request: ExportRequest) -> Path:
    path = folder / f"{request.source.provenance['step']:07d}.pt"
    folder.mkdir(parents=True, exist_ok=True)
    write_repa_file(path, request)
    return path


EXPORT_FORMATS: Mapping[str, Callable[[Path, ExportRequest], Path]] = {
    "srepa_ds": _own,
    "repa": _repa,
}
"""Writes a model into a folder, and returns what it wrote: the folder, or a file in it.

Each raises OutputError, and CheckpointError for a model that the format cannot hold.
"""
