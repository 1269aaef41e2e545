"""The number of attention heads of a model on disk, which no shape of its weights shows."""

from pathlib import Path

from srepa_ds.errors import CheckpointError
from srepa_ds.model.variants import SiTConfig
from srepa_ds.weights.exported import read_document
from srepa_ds.weights.foreign.folders import is_foreign_folder, settings_in


def heads_in(path: Path) -> int | None:
    """Returns the number that a folder tells, None for a file; raises CheckpointError."""
    if not path.is_dir():
        return None
    if not is_foreign_folder(path):
        return read_document(path).section(SiTConfig, "model").shape.num_heads
    found = settings_in(path).get("num_heads")
    if found is not None and (isinstance(found, bool) or not isinstance(found, int)):
        raise CheckpointError(f"{path}: its num_heads is {str(found)[:40]}, not a whole number")
    return found
