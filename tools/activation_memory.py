"""Prints the memory and recomputation of each checkpointing policy, counted and by formula.

Usage: python tools/activation_memory.py [--precision bf16_autocast] [--device cuda] [--batch 1]
Runs on fake tensors: without a GPU or memory, with the kernels that --device would use.
"""

import argparse
from collections.abc import Iterable

from srepa_ds.model.activation_checkpointing import ActivationCheckpointingConfig
from srepa_ds.model.precision import PRECISIONS
from srepa_ds.model.variants import SiTConfig
from srepa_ds.plan.activations import activation_bytes, recompute_flops
from srepa_ds.plan.counted import counted_bytes, counted_flops

POLICIES = {
    "none": ActivationCheckpointingConfig(),
    "every_k, k 2": ActivationCheckpointingConfig(policy="every_k", k=2),
    "selective, products": ActivationCheckpointingConfig(policy="selective", keep="products"),
    "selective, attention": ActivationCheckpointingConfig(policy="selective"),
    "full": ActivationCheckpointingConfig(policy="full"),
}


def rows(variant: str, pixels: int, *, batch: int, precision: str, device: str) -> Iterable[str]:
    config = SiTConfig(variant=variant, input_size=pixels // 8, in_channels=4, num_classes=1000)
    settings = {"batch": batch, "precision": precision}
    once = counted_flops(config, checkpointing=POLICIES["none"], **settings)
    for name, checkpointing in POLICIES.items():
        counted = counted_bytes(config, checkpointing=checkpointing, device_type=device, **settings)
        formula = activation_bytes(
            config, checkpointing=checkpointing, device_type=device, **settings
        ).device
        repeated = counted_flops(config, checkpointing=checkpointing, **settings) - once
        computed = recompute_flops(config, batch=batch, checkpointing=checkpointing)
        yield (
            f"| {variant} | {pixels} | {name} | {counted / 2**20:,.1f} | {formula / 2**20:,.1f} "
            f"| {formula / counted - 1:+.2%} | {repeated / 1e9:,.1f} | {computed / 1e9:,.1f} "
            f"| {repeated / once:.1%} |"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=["SiT-S/2", "SiT-B/2", "SiT-XL/2"])
    parser.add_argument("--pixels", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", default="bf16_autocast", choices=PRECISIONS)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    given = parser.parse_args(arguments)
    print(
        "| model | px | policy | MiB counted | MiB by formula | off by | GFLOP counted "
        "| GFLOP by formula | of the backward pass |"
    )
    print("|" + "---|" * 9)
    for variant in given.variants:
        for pixels in given.pixels:
            settings = {"batch": given.batch, "precision": given.precision}
            for row in rows(variant, pixels, device=given.device, **settings):
                print(row, flush=True)


if __name__ == "__main__":
    main()
