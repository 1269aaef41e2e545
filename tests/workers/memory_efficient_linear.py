"""Measures the error of gradients under DeepSpeed's stage 3 when products are kept.

Usage: memory_efficient_linear.py FILE. Writes the largest relative distance of any weight's
gradient from the plain one, with `memory_efficient_linear` off and then on; in this order, because
"on" replaces torch's linear map for the rest of the process.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from builders import distance
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from srepa_ds.distributed import ranks
from srepa_ds.model.activation_checkpointing import run_block
from srepa_ds.zero import fixes

WIDTH, DEPTH = 6, 3


class Block(nn.Module):
    """Two linear maps with biases: the part of a transformer block that shows the fault."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, residual_stream: Tensor, conditioning: Tensor) -> Tensor:
        hidden = torch.tanh(self.fc1(residual_stream * conditioning[:, None]))
        return residual_stream + self.fc2(hidden)


class Model(nn.Module):
    """Blocks that keep their matrix products, or everything."""

    def __init__(self, kept: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.kept = kept
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, stream: Tensor) -> Tensor:
        for block in self.blocks:
            stream = run_block(block, stream, stream.mean(1), kept=self.kept)
        return stream.square().mean()


def distance_under_deepspeed(inputs: Tensor, *, efficient: bool) -> float:
    """Returns the largest distance of a weight's gradient from that of plain PyTorch."""
    plain = Model("everything")
    plain(inputs).backward()
    expected = [weight.grad for weight in plain.parameters()]
    document = {
        "train_micro_batch_size_per_gpu": len(inputs),
        "zero_optimization": {"stage": 3, "memory_efficient_linear": efficient},
    }
    model = Model("products")
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=document, dist_init_required=False
    )
    engine.backward(engine(inputs))
    found = [safe_get_full_grad(weight).clone() for weight in engine.module.parameters()]
    engine.destroy()
    pairs = zip(found, expected, strict=True)
    return max(distance(one, other) for one, other in pairs)


def main(file: Path) -> None:
    torch.set_num_threads(1)
    fixes.prepare(ranks.initialize())
    inputs = torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    distances = [distance_under_deepspeed(inputs, efficient=choice) for choice in (False, True)]
    file.write_text(json.dumps(distances))
    ranks.leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
