"""The formats of an export, one row of a table each."""

from collections.abc import Callable, Mapping
from pathlib import Path

from srepa_ds.weights.diffusers_format import write_diffusers
from srepa_ds.weights.export_request import ExportRequest as ExportRequest
from srepa_ds.weights.exported import write_model
from srepa_ds.weights.lazy import DTYPES
from srepa_ds.weights.ownership import room_for_model
from srepa_ds.weights.repa_file import write_repa_file


def _own(folder: Path, request: ExportRequest) -> Path:
    source, settings = request.source, request.config
    write_model(
        folder,
        source.tensors if settings.projectors else source.tensors.only(_is_no_projector),
        config=source.config,
        provenance={**source.provenance, "dtype": settings.dtype},
        dtype=DTYPES[settings.dtype],
        max_shard_size=settings.max_shard_size,
        replace=request.replace,
    )
    return folder


def _is_no_projector(name: str) -> bool:
    return not name.startswith("projectors.")


def _repa(folder: Path, request: ExportRequest) -> Path:
    source = request.source
    path = folder / f"{source.provenance['step']:07d}.pt"
    with room_for_model(folder, format="repa", config=source.config, replace=request.replace):
        write_repa_file(path, request)
    return path


EXPORT_FORMATS: Mapping[str, Callable[[Path, ExportRequest], Path]] = {
    "srepa_ds": _own,
    "repa": _repa,
    "diffusers": write_diffusers,
}
"""Writes a model into a folder, and returns what it wrote: the folder, or a file in it.

Each raises OutputError, and CheckpointError for a model that the format cannot hold.
"""
