"""The throughput of a run, also as a share of the device's peak, and its memory."""

import resource
import sys

import torch

from srepa_ds.model.flops import training_flops
from srepa_ds.model.variants import SiTConfig

# Dense bf16 operations per second in units of 1e12, as the makers state them. The longest name that
# occurs in the device's name decides.
PEAK_TFLOPS = {
    "A100": 312.0,
    "H100": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "L40S": 362.0,
}


def peak_tflops(device_name: str) -> float | None:
    """Returns the device's dense bf16 peak in 1e12 operations per second, None if unknown."""
    known = [name for name in PEAK_TFLOPS if name.lower() in device_name.lower()]
    return PEAK_TFLOPS[max(known, key=len)] if known else None


def throughput(
    model: SiTConfig, *, images_per_second: float, world_size: int, device: torch.device
) -> dict[str, float]:
    """Returns images per second of all ranks and operations per second of each.

    `tflops_per_rank` counts the model's forward and backward products, without recomputation,
    projectors and teachers; `mfu` is its share of the device's bf16 peak, if that is known.
    """
    tflops = images_per_second * training_flops(model) / world_size / 1e12
    found = {"images_per_second": images_per_second, "tflops_per_rank": tflops}
    peak = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return found if peak is None else {**found, "mfu": tflops / peak}


def peak_memory_gb(device: torch.device) -> float:
    """Returns this process's peak memory in 1e9 bytes: of its GPU, or in total without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
