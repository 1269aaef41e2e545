"""Finds published weights on this machine; nothing here downloads."""

from pathlib import Path

from srepa_ds.errors import DataError


def local_folder(weights: Path, *, setting: str) -> Path:
    """Returns the folder of `weights`: that path, or what was fetched of a repository's name.

    Raises DataError, which names the `setting`, if there is neither.
    """
    if weights.is_dir():
        return weights
    raise DataError(f"{setting}: {weights} is neither a folder nor fetched; run `srepa-ds fetch`")
