"""The weight files of an exported model: one, or shards with an index as on the Hub."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory

from srepa_ds.documents.safetensors_writer import TensorEntry, in_file_order

STEM = "model"
WEIGHTS = f"{STEM}.safetensors"
INDEX = f"{WEIGHTS}.index.json"
METADATA = {"format": "pt"}
"""What a weight file says of itself."""

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def is_weight_file(name: str) -> bool:
    """Returns whether an exported model may have a weight file of this name."""
    return _WEIGHTS.fullmatch(name) is not None


def split_into_files(
    entries: Sequence[TensorEntry], max_shard_size: str | None, *, stem: str = STEM
) -> dict[str, list[TensorEntry]]:
    """Returns the entries of each file, in its order; without a size there is one file."""
    if max_shard_size is None:
        return {f"{stem}.safetensors": in_file_order(entries)}
    by_name = {entry.name: entry for entry in entries}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda entry: entry.num_bytes,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    files = split.filename_to_tensors.items()
    return {file: in_file_order([by_name[name] for name in names]) for file, names in files}


def index_of(files: Mapping[str, Sequence[TensorEntry]]) -> dict[str, Any]:
    """Returns the index of shards, in the form that the Hub's libraries read."""
    total = sum(entry.num_bytes for entries in files.values() for entry in entries)
    places = {entry.name: file for file, entries in files.items() for entry in entries}
    return {"metadata": {"total_size": total}, "weight_map": places}


def hash_of_files(hashes: Mapping[str, str]) -> str:
    """Returns the hash of a model by those of its weight files: of one, its own."""
    weights = {name: sha256 for name, sha256 in sorted(hashes.items()) if is_weight_file(name)}
    if list(weights) == [WEIGHTS]:
        return weights[WEIGHTS]
    lines = "".join(f"{name} {sha256}\n" for name, sha256 in weights.items())
    return hashlib.sha256(lines.encode()).hexdigest()
