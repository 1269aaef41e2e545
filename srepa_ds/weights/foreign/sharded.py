"""Weights in several files with an index, as the Hub's libraries write them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from srepa_ds.documents.json_reader import read_json
from srepa_ds.errors import CheckpointError, listed
from srepa_ds.files import is_plain_name, reason_of
from srepa_ds.weight_file import plain_tensors, read_weight_file

INDEX_ENDING = ".index.json"
_SHARD_ENDINGS = (".safetensors", ".bin")
_AGAIN = "download or export the folder again"
_MOST_NAMED = 3


def read_shards(index: Path) -> dict[str, Tensor]:
    """Returns all tensors of an index, mapped from the files beside it.

    A file may be a link to elsewhere, as in the Hub's cache; its name may not lead out of the
    folder. Raises CheckpointError if the index or a file cannot be read, or if the files do not
    hold exactly the tensors that the index says are in them.
    """
    tensors: dict[str, Tensor] = {}
    for shard, names in _names_by_shard(index).items():
        tensors |= _tensors_of(index.parent / shard, names, index)
    return tensors


def shards_of(index: Path) -> list[Path]:
    """Returns the files that an index names; raises CheckpointError as `read_shards` does."""
    return [index.parent / name for name in _names_by_shard(index)]


def _names_by_shard(index: Path) -> dict[str, list[str]]:
    try:
        document = read_json(index)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index}: {reason_of(error)}; {_AGAIN}") from error
    places = document.get("weight_map") if isinstance(document, Mapping) else None
    if not isinstance(places, Mapping) or not places:
        raise CheckpointError(f"{index}: it has no weight_map from tensors to files; {_AGAIN}")
    shards: dict[str, list[str]] = {}
    for name, shard in places.items():
        _check_name(shard, index)
        shards.setdefault(shard, []).append(name)
    return shards


def _check_name(shard: Any, index: Path) -> None:
    if not isinstance(shard, str) or not is_plain_name(shard):
        raise CheckpointError(
            f"{index} names {str(shard)[:80]!r}, which is no file in its folder; it is damaged or "
            "malicious"
        )
    if not shard.endswith(_SHARD_ENDINGS):
        raise CheckpointError(f"{index} names {shard[:80]!r}, which is no file of weights")


def _tensors_of(shard: Path, names: Sequence[str], index: Path) -> dict[str, Tensor]:
    found = read_weight_file(
        shard,
        named=str(shard),
        setting=f"the folder: {index.name} names it",
        fault=CheckpointError,
    )
    if missing := [name for name in names if name not in found]:
        raise CheckpointError(
            f"{shard} lacks {listed(missing, most=_MOST_NAMED)}, which {index.name} says are in "
            f"it; {_AGAIN}"
        )
    expected = {*names}
    if unknown := [name for name in found if name not in expected]:
        raise CheckpointError(
            f"{shard} has {listed(unknown, most=_MOST_NAMED)}, which {index.name} does not say "
            f"are in it; {_AGAIN}"
        )
    other = [name for name, value in found.items() if not isinstance(value, Tensor)]
    if other:
        raise CheckpointError(
            f"{shard} does not hold a state_dict: {listed(other, most=_MOST_NAMED)} are not tensors"
        )
    return plain_tensors(found, shard, named=str(shard), fault=CheckpointError)
