"""Whose model a folder holds, so that an export replaces no other one without being told to."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srepa_ds.documents.json_reader import read_json
from srepa_ds.errors import CheckpointError, OutputError, listed
from srepa_ds.files import PARTIAL, claimed, is_of_the_system, writing
from srepa_ds.weight_file import read_weight_file

FORMAT, PIPELINE_FORMAT = "srepa_ds.model", "srepa_ds.diffusers"
"""What an exported model, and one for diffusers, says of its format."""
DOCUMENT = "config.json"
CARD, PICTURE = "README.md", "samples.png"
"""What may lie beside any model, for people who find it."""

_NAMES: Mapping[str, re.Pattern[str]] = {
    "srepa_ds": re.compile(
        r"config\.json|model\.safetensors(\.index\.json)?|model-\d{5}-of-\d{5}\.safetensors"
    ),
    "repa": re.compile(r"\d{7,}\.pt"),
    "diffusers": re.compile(r"model_index\.json|provenance\.json|transformer|scheduler|vae"),
}
"""The files and folders that a model consists of, by the format of its export."""

# What an export that is under way or was killed leaves; the last is safetensors' own.
_BESIDE = frozenset({CARD, PICTURE})
_PARTS = "|".join([*(pattern.pattern for pattern in _NAMES.values()), *map(re.escape, _BESIDE)])
_UNFINISHED = re.compile(rf"({_PARTS}){re.escape(PARTIAL)}|\.tmp\w{{6}}")
_CURE = "choose another export.folder, or fix its permissions and make room"


@dataclass(frozen=True)
class HeldModel:
    """A model that a folder holds."""

    format: str
    names: frozenset[str]
    """Its files and folders, and those beside it."""

    runs: frozenset[str | None]
    """The folders of the runs that it is of: one, if its files are of one; None if none tells."""

    def __str__(self) -> str:
        runs = ", ".join(sorted(run or "unknown" for run in self.runs))
        return f"a model of the run {runs} in the format {self.format}"


@contextmanager
def room_for_model(
    folder: Path, *, format: str, config: Mapping[str, Any], replace: bool
) -> Iterator[None]:
    """Holds `folder`, which may be a link, for an export of the run of `config` in `format`.

    A model of the same run in the same format may lie there; with `replace`, any model of a known
    format, which is removed after the block, as are leftovers of exports that were killed. Raises
    OutputError if the folder holds anything else, cannot be written to, or another process exports
    into it.
    """
    with writing(f"the model to {folder}", cure=_CURE):
        # Before the claim: whoever holds a folder with other files does not export into it.
        known_names(folder)
    otherwise = ", or choose another export.folder"
    with claimed(folder, doing="exporting into", cure=_CURE, otherwise=otherwise):
        with writing(f"the model to {folder}", cure=_CURE):
            held, run = held_model(folder), run_of(config)
            is_other = held is not None and (held.format, held.runs) != (format, {run})
            # A trainer's files are its checkpoints: one may be replaced, never all of them.
            are_files = held is not None and held.format == "repa"
            if is_other and (not replace or (are_files and format != "repa")):
                cure = "" if are_files and format != "repa" else ", or add --replace to replace it"
                raise OutputError(
                    f"{folder} holds {held}, and this is one of the run {run or 'unknown'} in the "
                    f"format {format}; choose another export.folder{cure}"
                )
            is_left = held is None or not is_other or are_files
            earlier = {} if is_left else _stamps(folder, held.names)
            yield
            _remove_unchanged(folder, earlier)
            _remove_leftovers(folder)


def run_of(config: Mapping[str, Any]) -> str | None:
    """Returns what tells the run of an experiment's tree from others: folder, and a hash.

    The folder alone is often relative. The hash is of what a run keeps for its whole life.
    """
    folder = folder_of(config)
    if folder is None:
        return None
    seed = config["run"].get("seed", 0)
    kept = [seed, *(_without(config.get(name), left) for name, left in _KEPT.items())]
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()
    return f"{folder} [{digest[:_DIGITS]}]"


_KEPT = {"model": "attention", "objective": "", "optimizer": "cpu_adam", "ema": ""}
"""Sections that no resumed run may change, and the field of each that it may."""

_DIGITS = 12


def _without(section: Any, field: str) -> Any:
    if not isinstance(section, Mapping):
        return section
    return {name: value for name, value in section.items() if name != field}


def folder_of(config: Mapping[str, Any]) -> str | None:
    """Returns the folder of the run of an experiment's tree, as it was written there."""
    section = config.get("run")
    folder = section.get("folder") if isinstance(section, Mapping) else None
    return folder if isinstance(folder, str) else None


def held_model(folder: Path) -> HeldModel | None:
    """Returns the model in `folder`, None if there is none; raises OutputError for anything else.

    A system's own files, and those of exports that were killed, are passed over.
    """
    names = frozenset(name for name in known_names(folder) if not _UNFINISHED.fullmatch(name))
    if not names:
        return None
    parts = names - _BESIDE
    (format,) = [form for form in _NAMES if all(map(_NAMES[form].fullmatch, parts))]
    runs = _RUNS[format](folder, parts)
    if runs is None:
        raise _foreign(folder, names)
    return HeldModel(format, names, runs)


def known_names(folder: Path) -> set[str]:
    """Returns the names in `folder`; raises OutputError unless they may be of one model."""
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    names = {name for name in names if _UNFINISHED.fullmatch(name) or not is_of_the_system(name)}
    whole = {name for name in names if not _UNFINISHED.fullmatch(name)}
    parts = whole - _BESIDE
    is_known = any(all(map(pattern.fullmatch, parts)) for pattern in _NAMES.values())
    if whole and not (parts and is_known):
        raise _foreign(folder, names)
    return names


def _foreign(folder: Path, names: set[str] | frozenset[str]) -> OutputError:
    return OutputError(
        f"{folder} holds files other than an exported model ({listed(sorted(names), most=3)}); "
        "choose another export.folder"
    )


def _own_runs(folder: Path, names: frozenset[str]) -> frozenset[str | None] | None:
    # Only a kill between the renames leaves weights beside a document without its name.
    mark = DOCUMENT if DOCUMENT in names else DOCUMENT + PARTIAL
    try:
        document = read_json(folder / mark)
        if document["format"] != FORMAT:
            return None
        config = document.get("config")
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None
    return frozenset({run_of(config) if isinstance(config, Mapping) else None})


def _runs_of_repa(folder: Path, names: frozenset[str]) -> frozenset[str | None]:
    return frozenset(_run_of_file(folder / name) for name in names)


def _run_of_file(path: Path) -> str | None:
    try:
        found = read_weight_file(path, named=str(path), setting="", fault=CheckpointError)
        args = vars(found["args"])
        # REPA's own files name the folder alone.
        return args.get("run_id") or str(Path(args["output_dir"]) / args["exp_name"])
    except (CheckpointError, LookupError, TypeError):
        return None


def _runs_of_pipeline(folder: Path, names: frozenset[str]) -> frozenset[str | None] | None:
    try:
        mark = read_json(folder / "provenance.json")
        # A pipeline of somebody else is not to be replaced, even if it has such a file.
        if mark["format"] != PIPELINE_FORMAT:
            return None
        run = mark["run_id"]
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return None
    return frozenset({run if isinstance(run, str) else None})


_RUNS = {"srepa_ds": _own_runs, "repa": _runs_of_repa, "diffusers": _runs_of_pipeline}


def _stamps(folder: Path, names: frozenset[str]) -> dict[str, tuple[int, int]]:
    """Returns what tells whether the files of these names have been written anew."""
    return {name: _stamp(folder / name) for name in names}


def _stamp(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_ino, found.st_mtime_ns


def _remove_unchanged(folder: Path, earlier: Mapping[str, tuple[int, int]]) -> None:
    """Removes the parts of a replaced model that the new one has not written over."""
    for name, stamp in earlier.items():
        path = folder / name
        if not os.path.lexists(path) or _stamp(path) != stamp:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove_leftovers(folder: Path) -> None:
    """Removes what killed exports left in `folder`, and what those of the first release left."""
    for left in [path for path in folder.iterdir() if _UNFINISHED.fullmatch(path.name)]:
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)
    place = folder.absolute()
    for ending in ("writing", "replaced") if place.name else ():
        left = place.parent / f".{place.name}.{ending}"
        first_release = {"model.safetensors", DOCUMENT}
        # Not Path.is_dir, for which a name that is too long is an error.
        # An empty one may be of an export for diffusers that has just begun.
        names = {path.name for path in left.iterdir()} if os.path.isdir(left) else set()
        if names and names <= first_release:
            shutil.rmtree(left, ignore_errors=True)
