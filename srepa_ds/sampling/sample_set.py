"""Reads what lies beside the images of a sample set: contact sheet and provenance."""

import io
from pathlib import Path
from typing import Any

from PIL import Image

from srepa_ds.documents.json_reader import read_json
from srepa_ds.errors import DataError

SAMPLES = "samples.npz"
PROVENANCE = "provenance.json"
CONTACT_SHEET = "contact_sheet.png"


def read_contact_sheet(folder: Path) -> Image.Image:
    """Returns the picture of a few samples of each class; raises DataError unless it is whole."""
    path = folder / CONTACT_SHEET
    try:
        return Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    # The decoder has many errors for damage; among them are SyntaxError and struct.error.
    except Exception as error:
        raise _unfinished(path, _reason(error)) from error


def read_provenance(folder: Path) -> dict[str, Any]:
    """Returns the provenance of a sample set; empty if it has none.

    Raises DataError if the file is damaged.
    """
    path = folder / PROVENANCE
    try:
        document = read_json(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"{path}: {_reason(error)}; fix its permissions") from error
    except ValueError as error:
        raise _of_unknown_origin(path, f"is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise _of_unknown_origin(path, "is not a JSON object")
    return document


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__


def _unfinished(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path} is not a finished sample set ({reason}); draw one with `srepa-ds sample CONFIG`"
    )


def _of_unknown_origin(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path}: {reason}, so the samples' origin is unknown; give another folder, or remove this "
        "one to draw them again"
    )
