"""Takes three steps with every engine of one precision, and with a plain loop, for a test to judge.

Usage: conformance.py FOLDER PRECISION ARRANGEMENT.ACCUMULATION.CHECKPOINTING...
An arrangement is the name of a file in ds_configs without `zero`. Writes
FOLDER/PRECISION.safetensors: for each case and each plain loop the losses and the gradients before
clipping of each step, and the weights after the last, flat; also the initial weights and the size
of each.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad
from engine_facts import (
    BATCH,
    CLIPPING,
    EPSILON,
    LEARNING_RATE,
    WEIGHT_DECAY,
    experiment,
    global_batch,
    random_objective,
    report_facts,
    run_step,
    share_of,
    stacked,
    state_facts,
)
from safetensors.torch import save_file
from torch import Tensor

from srepa_ds.config.experiment import Config
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.engine import Engine
from srepa_ds.model.activation_checkpointing import ActivationCheckpointingConfig
from srepa_ds.model.precision import PRECISIONS

STEPS = (1, 2, 3)
# "products" keeps matrix products, which DeepSpeed's own linear map would spoil under stage 3.
CHECKPOINTING = {
    "none": ActivationCheckpointingConfig(),
    "products": ActivationCheckpointingConfig(policy="selective", keep="products"),
    "full": ActivationCheckpointingConfig(policy="full"),
    "attention": ActivationCheckpointingConfig(policy="selective", keep="attention"),
    # The second of the three blocks is recomputed.
    "every_k_offload": ActivationCheckpointingConfig(policy="every_k", k=2, offload=True),
}

Facts = dict[str, Tensor]


def flat(tensors: list[Tensor]) -> Tensor:
    """Returns all values as one vector in float32."""
    return torch.cat([tensor.detach().float().flatten() for tensor in tensors])


def plain_loop(config: Config, precision: str, parts: int) -> Facts:
    """Trains in one process without DeepSpeed; sums gradients of `parts` equal shares in fp32."""
    model = random_objective(config)
    weights = list(model.parameters())
    masters = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(
        masters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, eps=EPSILON, foreach=False
    )
    row = PRECISIONS[precision]
    autocast = torch.autocast("cpu", torch.bfloat16)
    facts: Facts = {}
    for step in STEPS:
        for weight, master in zip(weights, masters, strict=True):
            weight.data, master.grad = master.to(row.weights), torch.zeros_like(master)
        shares = []
        for number in range(parts):
            model.zero_grad()
            with autocast if row.is_autocast else nullcontext():
                losses = model(share_of(global_batch(step), number, parts))
            (losses.total / parts).backward()
            for weight, master in zip(weights, masters, strict=True):
                master.grad += weight.grad
            shares.append(stacked(losses))
        facts[f"{step}.losses"] = torch.stack(shares).mean(0)
        facts[f"{step}.gradient"] = flat([master.grad for master in masters])
        torch.nn.utils.clip_grad_norm_(masters, CLIPPING)
        optimizer.step()
    return facts | {"master": flat(masters)}


def engine_facts(config: Config, checkpointing: str, rank: Rank) -> Facts:
    """Takes the same steps with the engine."""
    objective = random_objective(config)
    objective.sit.set_activation_checkpointing(CHECKPOINTING[checkpointing])
    shapes = {name: weight.shape for name, weight in objective.named_parameters()}
    engine = Engine(objective, config, rank)
    gradients = watched(engine)
    facts: Facts = {}
    for step in STEPS:
        report = run_step(engine, rank, step, accumulation=config.train.accumulation_steps)
        facts[f"{step}.losses"] = report_facts(f"{step}", report)[f"{step}.losses"]
        facts[f"{step}.gradient"] = gradients.pop()
        assert not gradients
    facts["master"] = state_facts("last", engine, shapes)["last.master"]
    engine.close()
    return facts


def watched(engine: Engine) -> list[Tensor]:
    """Returns a list to which each optimizer step appends its whole gradient."""
    inner, found = engine._deepspeed, []
    take: Callable[[], None] = inner.step

    def step() -> None:
        if inner.is_gradient_accumulation_boundary():
            found.append(flat([safe_get_full_grad(p).clone() for p in inner.module.parameters()]))
        take()

    inner.step = step
    return found


def main(folder: Path, precision: str, cases: list[str]) -> None:
    torch.set_num_threads(1)
    rank = ranks.initialize()
    facts: Facts = {}
    config = experiment(folder, "0", "fp32", 1)
    weights = list(random_objective(config).parameters())
    facts["sizes"] = torch.tensor([weight.numel() for weight in weights])
    facts["initial"] = flat(weights)
    for parts in (1, rank.world_size, 2 * rank.world_size):
        assert BATCH % parts == 0
        found = plain_loop(config, precision, parts)
        facts |= {f"plain.{parts}.{name}": value for name, value in found.items()}
    for case in cases:
        arrangement, accumulation, checkpointing = case.split(".")
        config = experiment(folder, arrangement, precision, int(accumulation))
        found = engine_facts(config, checkpointing, rank)
        facts |= {f"{case}.{name}": value for name, value in found.items()}
    if rank.is_main:
        save_file(facts, folder / f"{precision}.safetensors")
    ranks.leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
