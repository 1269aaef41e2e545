"""Counts what a forward pass keeps alive for the backward pass."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class KeptTensors(TorchDispatchMode):
    """A context that watches every tensor made in it; storages count once, and while they live.

    That is what the graph keeps of them, whether it saved them as a tensor or as a checkpoint, once
    the code that made them has let go of the rest. `weights` and casts of them are not counted.
    Works on meta and fake tensors too.
    """

    def __init__(self, weights: Iterable[Tensor]):
        super().__init__()
        # Held, so that no other storage takes over their addresses.
        self._weights = {weight.untyped_storage()._cdata: weight for weight in weights}
        self._made: dict[int, StorageWeakRef] = {}
        self._num_bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Returns func(*args, **kwargs), having noted the storages it made."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage()._cdata for tensor in given}
        of_weights = bool(known) and known <= self._weights.keys()
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if of_weights:
                    self._weights.setdefault(storage._cdata, tensor.detach())
                elif storage._cdata not in known | self._weights.keys():
                    self._made[storage._cdata] = StorageWeakRef(storage)
                    self._num_bytes[storage._cdata] = storage.nbytes()
        return made

    def num_bytes(self) -> int:
        """Returns the bytes of the storages that were made and still live."""
        alive = [key for key, reference in self._made.items() if not reference.expired()]
        return sum(self._num_bytes[key] for key in alive)
