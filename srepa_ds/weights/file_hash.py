"""The hash that a weight file would have, without writing it or holding it in memory."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from srepa_ds.documents.safetensors_writer import (
    in_file_order,
    safetensors_header,
    values_of,
)
from srepa_ds.weights.lazy import entries_of


def hash_of_weight_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Returns the sha256 of the file that `safetensors.torch.save_file` writes, in hexadecimal.

    In float32. Tensors that are lazy are read one at a time.
    """
    entries = in_file_order(entries_of(tensors, torch.float32))
    digest = hashlib.sha256(safetensors_header(entries, metadata))
    for entry in entries:
        digest.update(values_of(tensors[entry.name], entry))
    return digest.hexdigest()
