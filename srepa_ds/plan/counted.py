"""Counts the bytes a forward pass keeps for the backward pass, and the FLOPs of the latter.

Everything runs on fake tensors, shapes without numbers: any size, without memory or a GPU.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from srepa_ds.model.activation_checkpointing import ActivationCheckpointingConfig
from srepa_ds.model.attention import Attention
from srepa_ds.model.precision import PRECISIONS, Precision
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig
from srepa_ds.plan.product_flops import ProductFlops


class KeptTensors(TorchDispatchMode):
    """A context that tracks every tensor made in it; each storage counts once, while it lives.

    Once the code that made them has dropped its references, those still alive are the ones the
    graph keeps, as saved tensors or for checkpointing. `weights` and casts of them are not counted.
    Works on meta and fake tensors too.
    """

    def __init__(self, weights: Iterable[Tensor]):
        super().__init__()
        # Referenced, so that no other storage gets their addresses.
        self._weights = {weight.untyped_storage()._cdata: weight for weight in weights}
        self._made: dict[int, StorageWeakRef] = {}
        self._num_bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Returns func(*args, **kwargs) and records the storages it made."""
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
        """Returns the bytes of the storages that are still alive."""
        alive = [key for key, reference in self._made.items() if not reference.expired()]
        return sum(self._num_bytes[key] for key in alive)


def counted_bytes(
    config: SiTConfig,
    *,
    batch: int,
    precision: Precision,
    checkpointing: ActivationCheckpointingConfig,
    device_type: str,
) -> int:
    """Returns the bytes that a forward pass keeps, on a fake "cpu" or "cuda" device.

    Offloaded tensors are counted like the others. Attention is the flash kernel of that device.
    """
    model = _meta_model(config, checkpointing)
    with FakeTensorMode(), _autocast(device_type, precision):
        _make_fake(model, precision, device_type)
        with KeptTensors([*model.parameters(), model.pos_embed]) as kept:
            velocity = _velocity(model, batch)
            num_bytes = kept.num_bytes()
    assert velocity.requires_grad
    return num_bytes


def counted_flops(
    config: SiTConfig,
    *,
    batch: int,
    precision: Precision,
    checkpointing: ActivationCheckpointingConfig,
) -> int:
    """Returns the FLOPs of matrix products in a backward pass, on a fake CPU."""
    model = _meta_model(config, checkpointing)
    with FakeTensorMode(), _autocast("cpu", precision):
        _make_fake(model, precision, "cpu")
        velocity = _velocity(model, batch)
        with ProductFlops() as counter:
            velocity.sum().backward()
    return counter.total


def _meta_model(config: SiTConfig, checkpointing: ActivationCheckpointingConfig) -> SiT:
    with torch.device("meta"):
        model = SiT(config)
    model.set_activation_checkpointing(checkpointing)
    return model


def _make_fake(model: SiT, precision: Precision, device_type: str) -> None:
    dtype = PRECISIONS[precision].weights
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            fake = torch.empty(weight.shape, dtype=dtype, device=device_type)
            setattr(module, name, nn.Parameter(fake))
        if device_type == "cuda" and isinstance(module, Attention):
            # torch would ask the device, which does not exist, which kernel to use.
            module.attend = _cuda_flash_attention
    model.pos_embed = torch.empty(model.pos_embed.shape, device=device_type)


def _cuda_flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def _velocity(model: SiT, batch: int) -> Tensor:
    device = model.pos_embed.device
    x_t = torch.empty(batch, *model.latent_shape, device=device)
    labels = torch.empty(batch, dtype=torch.int64, device=device)
    width = model.class_token_width
    cls_t = None if width is None else torch.empty(batch, width, device=device)
    return model(x_t, torch.empty(batch, device=device), labels, cls_t=cls_t).velocity


@contextmanager
def _autocast(device_type: str, precision: Precision) -> Iterator[None]:
    # torch.autocast disables itself without a GPU.
    before = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    torch.set_autocast_enabled(device_type, PRECISIONS[precision].is_autocast)
    torch.set_autocast_dtype(device_type, torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(device_type, before[0])
        torch.set_autocast_dtype(device_type, before[1])
