"""Devices: the one each rank computes on, and the check that all ranks have the same kind."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from srepa_ds.errors import TopologyError, raised_on_all_ranks


def choose_accelerator() -> None:
    """Tells DeepSpeed to use the CPU on a machine without GPU. Call it before importing it."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def local_device(local_rank: int = 0) -> torch.device:
    """Returns the device of a local rank: its GPU, or the CPU where there is none.

    Raises TopologyError if the node has fewer GPUs than local ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise TopologyError(
            f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()}; "
            "start as many ranks per node as it has GPUs"
        )
    return torch.device("cuda", local_rank)


def take_device(local_rank: int = 0) -> torch.device:
    """Makes the device of a local rank this process's current one and returns it.

    Raises TopologyError if there is none, as `local_device` does, or if it cannot be used.
    """
    device = local_device(local_rank)
    if device.type == "cuda":
        try:
            torch.cuda.set_device(device)
        except RuntimeError as error:
            raise TopologyError(
                f"local rank {local_rank}: its GPU is not usable: {error}"
            ) from error
    return device


def use_exact_float32() -> None:
    """Makes float32 convolutions exact, as products are: torch's default on GPUs is TF32."""
    torch.backends.cudnn.allow_tf32 = False


@contextmanager
def tensor_float32(allowed: bool) -> Iterator[None]:
    """Allows or forbids TF32 in float32 products and convolutions while the block runs."""
    libraries: Any = torch.backends
    backends = (libraries.cuda.matmul, libraries.cudnn.conv)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "tf32" if allowed else "ieee"
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


def agreed_device(store: dist.Store, rank: int, world_size: int, local_rank: int) -> torch.device:
    """Takes this rank's device and returns it.

    Raises TopologyError on all ranks if one has no device, or if their devices differ in kind. The
    ranks tell each other through the store: a rank without its device cannot join the group.
    """
    if store.check([f"device/{rank}"]):
        raise TopologyError(
            f"{place_of(rank)}: torchrun restarts with the store of the previous attempt, whose "
            "ranks would be taken for the new ones; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where "
            "torchrun is started, or run it again instead of using --max-restarts"
        )
    device, fault = None, ""
    try:
        device = take_device(local_rank)
    except TopologyError as error:
        fault = str(error)
    said = {"where": place_of(rank), "kind": device.type if device else "", "fault": fault}
    store.set(f"device/{rank}", json.dumps(said))
    told = [
        json.loads(text) for text in store.multi_get([f"device/{k}" for k in range(world_size)])
    ]
    if device is not None and all(other["kind"] == device.type for other in told):
        return device
    _wait_until_all_know(store, rank, world_size)
    raise raised_on_all_ranks(TopologyError(_device_fault(told)))


def _device_fault(told: list[dict[str, str]]) -> str:
    for rank in told:
        if rank["fault"]:
            return f"{rank['where']}: {rank['fault']}"
    gpu = next(rank["where"] for rank in told if rank["kind"] == "cuda")
    none = next(rank["where"] for rank in told if rank["kind"] != "cuda")
    return (
        f"{none} sees no GPU, {gpu} has one; repair the driver where it is missing, or set "
        "CUDA_VISIBLE_DEVICES= (empty) on all nodes to train on their CPUs"
    )


def _wait_until_all_know(store: dist.Store, rank: int, world_size: int) -> None:
    """Waits on rank 0, which may host the store, until all other ranks have read from it."""
    if store.add("know", 1) == world_size:
        store.set("all know", "")
    if rank == 0:
        store.wait(["all know"])


def place_of(number: int) -> str:
    """Returns the name of a rank in messages, with its machine."""
    return f"rank {number} ({platform.node()})"
