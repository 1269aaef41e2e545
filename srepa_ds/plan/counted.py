"""Counts what a forward pass keeps alive for the backward pass, and what that repeats.

Everything runs on fake tensors: shapes without numbers, so any size in no memory and no GPU.
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

from srepa_ds.model.activation_checkpointing import Precision, RematConfig
from srepa_ds.model.attention import Attention
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig
from srepa_ds.plan.product_flops import ProductFlops


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


def counted_bytes(
    config: SiTConfig, *, batch: int, precision: Precision, remat: RematConfig, device_type: str
) -> int:
    """Returns the bytes that a forward pass keeps, on a fake "cpu" or "cuda" device.

    Offloaded tensors are counted like the others. Attention is the flash kernel of that device.
    """
    model = _meta_model(config, remat)
    with FakeTensorMode(), _autocast(device_type, precision):
        _make_fake(model, precision, device_type)
        with KeptTensors([*model.parameters(), model.pos_embed]) as kept:
            velocity = _velocity(model, batch)
            num_bytes = kept.num_bytes()
    assert velocity.requires_grad
    return num_bytes


def counted_flops(
    config: SiTConfig, *, batch: int, precision: Precision, remat: RematConfig
) -> int:
    """Returns the FLOPs of matrix products in a backward pass, on a fake CPU."""
    model = _meta_model(config, remat)
    with FakeTensorMode(), _autocast("cpu", precision):
        _make_fake(model, precision, "cpu")
        velocity = _velocity(model, batch)
        with ProductFlops() as counter:
            velocity.sum().backward()
    return counter.total


def _meta_model(config: SiTConfig, remat: RematConfig) -> SiT:
    with torch.device("meta"):
        model = SiT(config)
    model.set_remat(remat)
    return model


def _make_fake(model: SiT, precision: Precision, device_type: str) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            fake = torch.empty(weight.shape, dtype=dtype, device=device_type)
            setattr(module, name, nn.Parameter(fake))
        if device_type == "cuda" and isinstance(module, Attention):
            # torch's choice among kernels asks the device, which is not there.
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
    # torch.autocast turns itself off where there is no GPU.
    before = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    torch.set_autocast_enabled(device_type, precision == "bf16_autocast")
    torch.set_autocast_dtype(device_type, torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(device_type, before[0])
        torch.set_autocast_dtype(device_type, before[1])
