"""Which device a rank computes on, and that all ranks have one of the same kind."""

import json
import os
import platform

import torch
import torch.distributed as dist

from srepa_ds.errors import TopologyError, met_by_all


def choose_accelerator() -> None:
    """Tells DeepSpeed, before it is imported, that a machine without GPU means to use its CPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def local_device(local_rank: int = 0) -> torch.device:
    """Returns the device of a local rank: its GPU, or the CPU where there is none.

    Raises TopologyError when the node has fewer GPUs than local ranks. From then on convolutions of
    float32 are that, as products are: torch's default on GPUs is TF32.
    """
    torch.backends.cudnn.allow_tf32 = False
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise TopologyError(
            f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()}; "
            "start as many ranks per node as it has GPUs"
        )
    try:
        torch.cuda.set_device(local_rank)
    except RuntimeError as error:
        raise TopologyError(f"local rank {local_rank}: its GPU is not usable: {error}") from error
    return torch.device("cuda", local_rank)


def agreed_device(store: dist.Store, rank: int, world_size: int, local_rank: int) -> torch.device:
    """Returns this rank's device; raises TopologyError on all ranks if one has none, or another's.

    By way of the store, for a rank without its device cannot join the group and say so there.
    """
    if store.check([f"device/{rank}"]):
        raise TopologyError(
            f"{place_of(rank)}: torchrun restarts with the store of the attempt before, whose "
            "ranks would be taken for today's; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where it "
            "is started, or run it again instead of --max-restarts"
        )
    device, fault = None, ""
    try:
        device = local_device(local_rank)
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
    raise met_by_all(TopologyError(_device_fault(told)))


def _device_fault(told: list[dict[str, str]]) -> str:
    for rank in told:
        if rank["fault"]:
            return f"{rank['where']}: {rank['fault']}"
    gpu = next(rank["where"] for rank in told if rank["kind"] == "cuda")
    none = next(rank["where"] for rank in told if rank["kind"] != "cuda")
    return (
        f"{none} sees no GPU, {gpu} has one; mend its driver, or set CUDA_VISIBLE_DEVICES= "
        "(empty) on all nodes to train on their CPUs"
    )


def _wait_until_all_know(store: dist.Store, rank: int, world_size: int) -> None:
    """Returns on rank 0, which may be the store's host, when all the others have read from it."""
    if store.add("know", 1) == world_size:
        store.set("all know", "")
    if rank == 0:
        store.wait(["all know"])


def place_of(number: int) -> str:
    """Returns how messages name a rank: with the machine it is on."""
    return f"rank {number} ({platform.node()})"
