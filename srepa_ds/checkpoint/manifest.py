"""The manifest: size and sha256 of every file of a folder, written last.

A folder is whole if and only if its manifest exists and matches.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srepa_ds.documents.json_reader import read_json
from srepa_ds.files import flush_to_disk, is_plain_name, sha256_of

MANIFEST = "manifest.json"
FOREIGN = "of format"
"""Begins the fault of a folder of another format, which is not damaged."""

FileEntry = dict[str, Any]
"""A file's size and sha256 under the names of the manifest: `bytes`, `sha256`."""


def entry_of(path: Path) -> FileEntry:
    """Returns the entry of the file at `path`; raises OSError."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def write_manifest(
    folder: Path, files: Mapping[str, FileEntry], *, format: str, version: int
) -> None:
    """Writes the manifest of `files` and waits until it is on disk; raises OSError."""
    path = folder / MANIFEST
    document = {"format": format, "version": version, "files": files}
    path.write_text(json.dumps(document, indent=1))
    flush_to_disk(path)


def fault_in(folder: Path, *, format: str, version: int, needed: str) -> str | None:
    """Returns why `folder` is not whole, or None if it is; its manifest must name `needed`."""
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest["format"] != format or manifest["version"] != version:
            mark = f"{manifest['format']} {manifest['version']}"
            return f"{FOREIGN} {mark}, not {format} {version}"
        if needed not in manifest["files"]:
            return f"its manifest does not name {needed}"
        for name, expected in manifest["files"].items():
            if not is_plain_name(name):
                return f"its manifest names {name!r}, which is not a file in it"
            fault = _fault_of_file(folder / name, expected)
            if fault is not None:
                return f"{name} {fault}"
    except FileNotFoundError:
        return f"{MANIFEST} is missing" if folder.is_dir() else "there is no such folder"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    return None


def _fault_of_file(path: Path, expected: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"has {size} bytes, not {expected['bytes']}"
    return None if entry_of(path) == expected else "does not match its checksum"
