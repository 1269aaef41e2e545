"""The hash that a weight file would have, without writing it or holding it in memory."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

_ALIGNMENT = 8


def hash_of_weight_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Returns the sha256 of the file that `safetensors.torch.save_file` writes, in hexadecimal.

    The layout is safetensors' own: the header's length, the header, and the tensors by name, which
    are all float32; with other dtypes the order would be another. Raises ValueError for those.
    """
    if other := {value.dtype for value in tensors.values()} - {torch.float32}:
        raise ValueError(f"weights are float32, not {other}")
    ordered = {name: tensors[name] for name in sorted(tensors)}
    digest = hashlib.sha256(_header(ordered, metadata))
    for tensor in ordered.values():
        digest.update(tensor.detach().contiguous().numpy().data)
    return digest.hexdigest()


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Returns the first bytes of the file, up to its tensors."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        form = {"dtype": "F32", "shape": list(tensor.shape)}
        entries[name] = {**form, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
