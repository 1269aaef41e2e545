"""Runs small engines one after the other and records what they do, for tests to judge.

Usage: engine_facts.py FOLDER ARRANGEMENT-PRECISION... The arrangement is the name of a file in
ds_configs without `zero`. Case 3-offload-bf16 on 2 ranks is written to
FOLDER/2-3-offload-bf16.safetensors. Stage 2 on two ranks leaves a checkpoint, which every later
case of its precision restores.
"""

import sys
from datetime import timedelta
from itertools import chain
from pathlib import Path

import torch
from builders import DeviceReads, objective_of, odd_sizes, randomised, write_deepspeed_json
from safetensors.torch import save_file
from torch import Tensor

from srepa_ds.checkpoint.folder import step_folder
from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.checkpoint.saving import save
from srepa_ds.config.experiment import Config, config_from
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.engine import Engine, StepReport
from srepa_ds.objective import Losses, Objective, TrainingInputs

BATCH, NUM_TOKENS, TEACHER_WIDTH = 8, 4, 10
LEARNING_RATE, WEIGHT_DECAY, EPSILON, CLIPPING = 1e-2, 0.1, 1e-3, 0.5
TIMEOUT = timedelta(minutes=7)
GOOD_STEPS = 4
SAVED_STEP = 3
KINDS = ("master", "ema", "exp_avg", "exp_avg_sq")

Facts = dict[str, Tensor]


def experiment(
    folder: Path, arrangement: str, precision: str, accumulation: int, **optimizer: str
) -> Config:
    """Returns the experiment of an arrangement, with the tests' odd sizes."""
    deepspeed = ranks.on_main(write_deepspeed_json, folder, arrangement)
    return config_from(
        {
            "run": {"folder": "unused"},
            "data": {"folder": "unused"},
            **odd_sizes(),
            "optimizer": {
                "learning_rate": LEARNING_RATE,
                "weight_decay": WEIGHT_DECAY,
                "epsilon": EPSILON,
                "gradient_clipping": CLIPPING,
                **optimizer,
            },
            "ema": {"decay": 0.7},
            "train": {"steps": 6, "batch_size": BATCH, "accumulation_steps": accumulation},
            "engine": {"precision": precision, "deepspeed": str(deepspeed)},
        },
        source="facts",
    )


def random_objective(config: Config) -> Objective:
    """Returns the objective with random weights, hardly one of which bf16 can hold."""
    return randomised(objective_of(config))


def global_batch(step: int) -> TrainingInputs:
    """Returns the inputs of step `step` (from 1), of all ranks and micro steps."""
    generator = torch.Generator().manual_seed(step)
    latents, noise = torch.randn(2, BATCH, 3, 4, 4, generator=generator)
    labels = torch.randint(0, 7, (BATCH,), generator=generator)
    t = torch.rand(BATCH, generator=generator)
    patches = torch.randn(BATCH, NUM_TOKENS, TEACHER_WIDTH, generator=generator)
    return TrainingInputs(latents, labels, t, noise, (patches,))


def stacked(losses: Losses) -> torch.Tensor:
    """Returns the scalar terms as one vector."""
    return torch.stack([value.detach() for value in losses if value.ndim == 0])


def share_of(batch: TrainingInputs, number: int, parts: int) -> TrainingInputs:
    """Returns part `number` of `parts` equal parts."""
    size = BATCH // parts
    rows = slice(number * size, (number + 1) * size)
    latents, labels, t, noise, patches, *_ = batch
    cut = (latents[rows], labels[rows], t[rows], noise[rows])
    return TrainingInputs(*cut, tuple(patch[rows] for patch in patches))


def run_step(
    engine: Engine, rank: Rank, step: int, *, accumulation: int = 1, bad_micro_step: int = -1
) -> StepReport:
    """Takes step `step`; the last rank's `bad_micro_step` has a NaN in one sample."""
    micro_batches = []
    for micro_step in range(accumulation):
        number = micro_step * rank.world_size + rank.number
        inputs = share_of(global_batch(step), number, accumulation * rank.world_size)
        if micro_step == bad_micro_step and rank.number == rank.world_size - 1:
            inputs.latents[0, 0, 0, 0] = torch.nan
        micro_batches.append(inputs)
    return engine.step(micro_batches, learning_rate=LEARNING_RATE)


def report_facts(prefix: str, report: StepReport) -> Facts:
    """Returns a report: losses averaged over ranks, and each rank's norm and whether it stepped."""
    losses = ranks.averaged(stacked(report.losses))
    said = ranks.gather((report.gradient_norm.item(), report.applied))
    return {
        f"{prefix}.losses": losses,
        f"{prefix}.flow_by_time": ranks.averaged(report.losses.flow_by_time),
        f"{prefix}.norms": torch.tensor([norm for norm, _ in said]),
        f"{prefix}.applied": torch.tensor([applied for _, applied in said]),
    }


def state_facts(prefix: str, engine: Engine, shapes: dict[str, torch.Size]) -> Facts:
    """Returns all ranks' fragments joined: a flat vector per kind, and how often elements occur.

    Elements that no rank owns are NaN.
    """
    pieces = [(p.kind, p.name, p.start, p.values.detach().clone()) for p in engine.pieces()]
    facts: Facts = {}
    starts, total = {}, 0
    for name, shape in shapes.items():
        starts[name] = total
        total += shape.numel()
    for kind in KINDS:
        facts[f"{prefix}.{kind}"] = torch.full((total,), torch.nan)
        facts[f"{prefix}.{kind}.times"] = torch.zeros(total, dtype=torch.uint8)
    for kind, name, start, values in chain.from_iterable(ranks.gather(pieces)):
        run = slice(starts[name] + start, starts[name] + start + len(values))
        facts[f"{prefix}.{kind}"][run] = values
        facts[f"{prefix}.{kind}.times"][run] += 1
    state = engine.state()
    facts[f"{prefix}.counts"] = torch.tensor([state["step"], state["adam_step"]])
    return facts


def copies_facts(prefix: str, engine: Engine, arrangement: str) -> Facts:
    """Returns the weights each rank computes with, a row per rank; nothing under stage 3."""
    if arrangement.startswith("3"):
        return {}
    module = engine._deepspeed.module
    mine = torch.cat([p.detach().float().flatten() for p in module.parameters()])
    return {f"{prefix}.copies": torch.stack(ranks.gather(mine))}


def plain_loop(config: Config) -> Facts:
    """Trains in fp32 without DeepSpeed: one process, whole batches, torch's AdamW."""
    objective = random_objective(config)
    parameters = list(objective.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, eps=EPSILON
    )

    def flat() -> Tensor:
        return torch.cat([p.detach().flatten() for p in parameters])

    facts = {"plain.0.master": flat()}
    for step in range(1, GOOD_STEPS + 1):
        optimizer.zero_grad()
        losses = objective(global_batch(step))
        losses.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIPPING)
        optimizer.step()
        facts[f"plain.{step}.losses"] = stacked(losses)
        facts[f"plain.{step}.norm"] = norm.detach()
        facts[f"plain.{step}.master"] = flat()
    return facts


def keep(engine: Engine, folder: Path, *, step: int, rank: Rank) -> None:
    """Writes a checkpoint."""
    save(folder, step=step, pieces=engine.pieces(), state=engine.state(), rank=rank.number)


def resumed(config: Config, folder: Path, *, step: int, rank: Rank) -> Engine:
    """Returns an engine built with other weights that has restored a checkpoint."""
    objective = random_objective(config)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(1.0)
    engine = Engine(objective, config, rank)
    reader = CheckpointReader(step_folder(folder, step))
    engine.check(reader)
    engine.restore(reader)
    return engine


def train(folder: Path, arrangement: str, precision: str, rank: Rank) -> Facts:
    """Takes three good steps, saves, takes a bad step and a good one; returns each state."""
    config = experiment(folder, arrangement, precision, accumulation=1)
    facts = plain_loop(config)
    objective = random_objective(config)
    shapes = {name: parameter.shape for name, parameter in objective.named_parameters()}
    engine = Engine(objective, config, rank)
    facts["timeout"] = torch.tensor(timeout_of(engine))
    facts["adam_step_at_build"] = torch.tensor(engine.state()["adam_step"])
    (averages,) = engine.ema.averages.values()
    mine = sum(average.numel() * average.element_size() for average in averages)
    facts["ema_bytes"] = torch.tensor(ranks.gather(mine))
    facts |= state_facts("0", engine, shapes) | copies_facts("0", engine, arrangement)
    for step in range(1, SAVED_STEP + 1):
        facts |= report_facts(f"{step}", run_step(engine, rank, step))
        facts |= state_facts(f"{step}", engine, shapes)
    if (rank.world_size, arrangement) == (2, "2"):
        keep(engine, folder / f"saved-{precision}", step=SAVED_STEP, rank=rank)
    facts |= report_facts("bad", run_step(engine, rank, GOOD_STEPS, bad_micro_step=0))
    facts |= state_facts("bad", engine, shapes) | copies_facts("bad", engine, arrangement)
    with DeviceReads() as reads:
        report = run_step(engine, rank, GOOD_STEPS)
    facts["reads"] = torch.tensor(ranks.gather(reads.count))
    facts |= report_facts(f"{GOOD_STEPS}", report)
    facts |= state_facts(f"{GOOD_STEPS}", engine, shapes)
    facts |= copies_facts(f"{GOOD_STEPS}", engine, arrangement)
    engine.close()
    return facts


def timeout_of(engine: Engine) -> float:
    """Returns the seconds that DeepSpeed's collectives wait for other ranks."""
    group = engine._deepspeed.seq_data_parallel_group
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def accumulate(folder: Path, arrangement: str, precision: str, rank: Rank) -> Facts:
    """Takes two steps of two micro steps each and saves, then takes two more.

    Of the first of these, only the first micro step is bad; a resumed engine takes the second too.
    """
    config = experiment(folder, arrangement, precision, accumulation=2)
    objective = random_objective(config)
    shapes = {name: parameter.shape for name, parameter in objective.named_parameters()}
    engine = Engine(objective, config, rank)
    facts: Facts = {}
    for step in (1, 2):
        facts |= report_facts(f"split.{step}", run_step(engine, rank, step, accumulation=2))
    facts |= state_facts("split.2", engine, shapes)
    saved = folder / f"split-{rank.world_size}-{arrangement}-{precision}"
    keep(engine, saved, step=2, rank=rank)
    report = run_step(engine, rank, 3, accumulation=2, bad_micro_step=0)
    facts |= report_facts("split.bad", report) | state_facts("split.bad", engine, shapes)
    facts |= report_facts("split.3", run_step(engine, rank, 3, accumulation=2))
    facts |= state_facts("split.3", engine, shapes)
    engine.close()
    engine = resumed(config, saved, step=2, rank=rank)
    facts |= report_facts("resumed.3", run_step(engine, rank, 3, accumulation=2))
    facts |= state_facts("resumed.3", engine, shapes)
    engine.close()
    return facts


def restore(folder: Path, arrangement: str, precision: str, rank: Rank) -> Facts:
    """Restores the checkpoint of stage 2 on two ranks and takes the next step."""
    config = experiment(folder, arrangement, precision, accumulation=1)
    shapes = {name: value.shape for name, value in random_objective(config).named_parameters()}
    engine = resumed(config, folder / f"saved-{precision}", step=SAVED_STEP, rank=rank)
    facts = state_facts("restored", engine, shapes) | copies_facts("restored", engine, arrangement)
    facts |= report_facts("restored.next", run_step(engine, rank, GOOD_STEPS))
    facts |= state_facts("restored.next", engine, shapes)
    engine.close()
    return facts


def main(folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    rank = ranks.initialize(TIMEOUT)
    for case in cases:
        arrangement, precision = case.rsplit("-", 1)
        facts: Facts = {}
        for part in (train, accumulate, restore):
            facts |= part(folder, arrangement, precision, rank)
        if rank.is_main:
            whole = {name: value.contiguous() for name, value in facts.items()}
            save_file(whole, folder / f"{rank.world_size}-{case}.safetensors")
    ranks.leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
