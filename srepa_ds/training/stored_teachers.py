"""Finds the stored teacher tokens of an alignment and checks that they are its teacher's.

A store's folder is named after everything that decides the tokens, so no two teachers share one.
"""

import re
from pathlib import Path
from typing import Any

from srepa_ds.alignment.alignment import AlignmentConfig
from srepa_ds.config.experiment import Config
from srepa_ds.data.shards import ShardDataset
from srepa_ds.data.token_index import (
    PREPARE_TEACHER,
    again,
    is_finished,
    read_token_index,
    teacher_hash,
)
from srepa_ds.data.token_store import TokenStore
from srepa_ds.encoders.teacher import TeacherConfig
from srepa_ds.encoders.teacher_folder import check_reported
from srepa_ds.errors import DataError
from srepa_ds.files import sha256_of
from srepa_ds.schema import to_tree
from srepa_ds.trees import differences

STORES = "teachers"
"""The folder beside the shards that holds a folder for each store."""


def teacher_identity(config: TeacherConfig, *, image_size: tuple[int, int]) -> dict[str, Any]:
    """Returns everything that decides a teacher's tokens of images, as plain JSON values.

    Local weights are identified by their contents, pretrained ones by timm's name. Raises DataError
    if the file is missing, or `srepa-ds teacher` wrote other contents.
    """
    spec, found = config.resolved, weights_hash(config)
    weights = {"timm": spec.architecture} if found is None else {"sha256": found}
    return {
        "spec": to_tree(spec),
        "weights": weights,
        "dtype": config.dtype,
        "resolution": list(image_size),
    }


def weights_hash(config: TeacherConfig) -> str | None:
    """Returns the hash of a teacher's local weights, None for published ones.

    Raises DataError if the file is missing, or `srepa-ds teacher` wrote other contents.
    """
    if config.weights is None:
        return None
    try:
        found = sha256_of(config.weights)
    except OSError as error:
        raise DataError(
            f"teacher weights {config.weights}: {error.strerror or error}; correct teacher.weights"
        ) from error
    check_reported(config.weights, found)
    return found


def store_folder(data_folder: Path, alignment: AlignmentConfig, identity: dict[str, Any]) -> Path:
    """Returns the folder of an alignment's teacher tokens, beside the shards of `data_folder`."""
    name = alignment.teacher.name or alignment.teacher.resolved.architecture
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", name)
    own = f"{readable}-{alignment.stored_tokens}-{teacher_hash(identity)}"
    return data_folder / STORES / own


def open_stores(config: Config, dataset: ShardDataset) -> tuple[TokenStore | None, ...]:
    """Returns the store of each alignment, None where the teacher runs in training.

    Raises DataError for a store that is missing, unfinished, damaged, of other images or of another
    teacher, naming the differences.
    """
    return tuple(
        _opened(alignment, f"alignments.{number}.stored_tokens", dataset)
        if alignment.stored_tokens
        else None
        for number, alignment in enumerate(config.alignments)
    )


def open_store(folder: Path, identity: dict[str, Any], dataset: ShardDataset) -> TokenStore:
    """Returns the finished store in `folder`.

    Raises DataError if it is damaged, of other images or of another teacher than `identity`.
    """
    store = TokenStore(folder)
    store.check_fits(dataset.index, dataset.folder)
    differing = _differences(store.index.teacher, identity)
    if differing:
        # The folder's name does not fit its index, so it was moved or edited.
        raise DataError(
            f"{folder}: holds tokens of another teacher: {'; '.join(differing)}; {again(folder)}"
        )
    return store


def _opened(alignment: AlignmentConfig, setting: str, dataset: ShardDataset) -> TokenStore:
    height, width = dataset.image_shape[1:]
    identity = teacher_identity(alignment.teacher, image_size=(height, width))
    folder = store_folder(dataset.folder, alignment, identity)
    if not is_finished(folder):
        state = "is not finished" if folder.is_dir() else "does not exist"
        raise DataError(
            f"{setting}: {folder} {state}; run {PREPARE_TEACHER} first"
            f"{_nearest(folder, alignment, identity)}"
        )
    return open_store(folder, identity, dataset)


def _nearest(folder: Path, alignment: AlignmentConfig, identity: dict[str, Any]) -> str:
    """Returns a line about the finished store that differs least from the wanted one."""
    wanted = {"storage": alignment.stored_tokens, "teacher": identity}
    found = []
    for other in sorted(folder.parent.glob("*")):
        try:
            index = read_token_index(other)
        except DataError:
            continue
        there = {"storage": index.storage, "teacher": index.teacher}
        found.append((_differences(there, wanted), other.name))
    if not found:
        return ""
    differing, name = min(found, key=lambda pair: len(pair[0]))
    return f"\n{name} exists, but {'; '.join(differing)}"


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    return [f"{d.path} is {d.old!r} there and {d.new!r} here" for d in differences(there, here)]
