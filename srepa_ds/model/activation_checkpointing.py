"""Activation checkpointing: blocks keep little for the backward pass and recompute the rest."""

import inspect
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from srepa_ds.model.attention_backends import is_attention
from srepa_ds.schema import Section

Kept = Literal["everything", "nothing", "attention", "products"]


class ActivationCheckpointingConfig(Section):
    """Activation checkpointing: saves memory at the cost of a second forward pass."""

    policy: Literal["none", "full", "every_k", "selective"] = "none"
    """`full` recomputes every block in the backward pass, `every_k` every k-th, `selective` every
    block except the outputs that `keep` names; `none` keeps everything."""

    k: int = Field(default=2, ge=1)
    """`every_k`: blocks k, 2k, 3k, ... are recomputed, the others keep everything."""

    keep: Literal["attention", "products"] = "attention"
    """`selective`: keep the outputs of attention, or of all linear maps too, so that only norms,
    modulation and GELU are recomputed."""

    offload: bool = False
    """Whether the inputs of recomputed blocks are moved to the CPU's memory until then. The outputs
    that `selective` keeps stay on the device."""

    def kept_by(self, number: int) -> Kept:
        """Returns what block `number` (from 1) keeps in addition to its input."""
        if self.policy == "none" or (self.policy == "every_k" and number % self.k):
            return "everything"
        return self.keep if self.policy == "selective" else "nothing"

    @model_validator(mode="after")
    def _offload_has_a_use(self) -> "ActivationCheckpointingConfig":
        if self.offload and self.policy == "none":
            raise ValueError(
                "offload moves the inputs of recomputed blocks, and policy 'none' recomputes none; "
                "choose another policy"
            )
        return self


def run_block(
    block: nn.Module,
    residual_stream: Float[Tensor, "batch tokens hidden"],
    conditioning: Float[Tensor, "batch hidden"],
    *,
    kept: Kept,
) -> Float[Tensor, "batch tokens hidden"]:
    """Returns block(residual_stream, conditioning); its graph keeps its input and `kept`."""
    if kept == "everything" or not torch.is_grad_enabled():
        return block(residual_stream, conditioning)
    settings: dict[str, Any] = {}
    if kept == "attention":
        settings = {"context_fn": _keep_attention, **_BESIDE_HOOKS}
    elif kept == "products":
        settings = {"context_fn": _keep_products, **_BESIDE_HOOKS}
    # A block draws no random numbers, so there is no generator state to restore.
    return checkpoint(
        block,
        residual_stream,
        conditioning,
        use_reentrant=False,
        preserve_rng_state=False,
        **settings,
    )


# Selectively kept outputs stay on the device; newer versions of torch must be told so.
_BESIDE_HOOKS = {
    name: False
    for name in inspect.signature(checkpoint).parameters
    if name == "respect_saved_tensors_hooks"
}


_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def _attention_policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return _decision(is_attention(operator.name()))


def _products_policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return _decision(is_attention(operator.name()) or operator in _PRODUCTS)


def _decision(keep: bool) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_attention() -> Any:
    return create_selective_checkpoint_contexts(_attention_policy)


def _keep_products() -> Any:
    return create_selective_checkpoint_contexts(_products_policy)


class _OnTheCpu(NamedTuple):
    device: torch.device
    copy: Tensor


def offloaded(
    residual_stream: Float[Tensor, "batch tokens hidden"],
) -> AbstractContextManager[Any]:
    """Returns a context in which graphs keep `residual_stream` in CPU memory, pinned for GPUs.

    Copies are queued on the current CUDA stream and not waited for.
    """
    storage = residual_stream.untyped_storage().data_ptr()
    pinned = residual_stream.is_cuda

    def pack(tensor: Tensor) -> Tensor | _OnTheCpu:
        if tensor.untyped_storage().data_ptr() != storage:
            return tensor
        # In the layout of the residual stream, which is dense: compiled graphs require it.
        copy = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        return _OnTheCpu(tensor.device, copy.copy_(tensor, non_blocking=pinned))

    def unpack(packed: Tensor | _OnTheCpu) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        return packed.copy.to(packed.device, non_blocking=pinned)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
