"""Runs small engines one after the other and writes down what they did, for tests to judge.

Usage: engine_facts.py FOLDER ARRANGEMENT-PRECISION... The arrangement is the name of a file in
ds_configs without `zero`. Case 3-offload-bf16 on 2 ranks is written to
FOLDER/2-3-offload-bf16.safetensors. Two ranks' stage 2 leaves a checkpoint, which every later case
of its precision restores.
"""

import json
import sys
from datetime import timedelta
from itertools import chain
from pathlib import Path

import torch
from places import ROOT
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from srepa_ds.alignment.alignment import TeacherShape
from srepa_ds.checkpoint.folder import step_folder
from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.checkpoint.saving import save
from srepa_ds.config.experiment import Config, config_from
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.engine import Engine, StepReport
from srepa_ds.objective import Losses, Objective, TrainingInputs

BATCH, NUM_TOKENS, TEACHER_WIDTH = 8, 4, 10
TEACHER = TeacherShape(TEACHER_WIDTH, (2, 2))
LEARNING_RATE, WEIGHT_DECAY, EPSILON, CLIPPING = 1e-2, 0.1, 1e-3, 0.5
TIMEOUT = timedelta(minutes=7)
GOOD_STEPS = 4
SAVED_STEP = 3
KINDS = ("master", "ema", "exp_avg", "exp_avg_sq")

Facts = dict[str, Tensor]


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


def experiment(
    folder: Path, arrangement: str, precision: str, accumulation: int, **optimizer: str
) -> Config:
    """A model whose odd sizes make ranks' shares begin and end inside weights."""
    document = json.loads((ROOT / f"ds_configs/zero{arrangement}.json").read_text())
    settings = document["zero_optimization"]
    stage = settings["stage"]
    if stage > 0:
        # Several buckets, as a large model has.
        settings["reduce_bucket_size"] = 5_000
    if stage == 3:
        # As in a large model: some weights stay gathered, others are fetched little by little and
        # released after the forward pass.
        settings["stage3_param_persistence_threshold"] = 500
        settings["stage3_prefetch_bucket_size"] = 2_000
        settings["stage3_max_reuse_distance"] = 1_000
    deepspeed = folder / f"zero{arrangement}.json"
    ranks.together(
        lambda: deepspeed.write_text(json.dumps(document)) if ranks.rank() == 0 else None
    )
    spec = {"architecture": "vit_tiny_patch16_224", "width": TEACHER_WIDTH}
    spec |= {"patch_size": 2, "input_size": 4}
    alignment = {
        "teacher": {"spec": spec, "weights": "unused.safetensors"},
        "depth": 2,
        "projector": {"hidden_width": 13},
        "pointwise": {"weight": 1.0},
        "structural": {"kind": "mse", "weight": 2.0},
    }
    model = {"variant": "SiT-S/2", "input_size": 4, "in_channels": 3, "num_classes": 6}
    return config_from(
        {
            "run": {"folder": "unused"},
            "data": {"folder": "unused"},
            "model": {**model, "depth": 3, "hidden_size": 20, "num_heads": 5},
            "alignments": [alignment],
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


def objective_of(config: Config) -> Objective:
    """All weights random, also those a run starts from zero; bf16 holds hardly one of them."""
    objective = Objective(config.model, config.objective, config.alignments, teachers=(TEACHER,))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return objective


def global_batch(step: int) -> TrainingInputs:
    """The inputs of step `step` (from 1), of all ranks and micro steps."""
    generator = torch.Generator().manual_seed(step)
    latents, noise = torch.randn(2, BATCH, 3, 4, 4, generator=generator)
    labels = torch.randint(0, 7, (BATCH,), generator=generator)
    t = torch.rand(BATCH, generator=generator)
    patches = torch.randn(BATCH, NUM_TOKENS, TEACHER_WIDTH, generator=generator)
    return TrainingInputs(latents, labels, t, noise, (patches,))


def stacked(losses: Losses) -> torch.Tensor:
    """The terms as one vector."""
    return torch.stack([value.detach() for value in losses if value.ndim == 0])


def share_of(batch: TrainingInputs, number: int, parts: int) -> TrainingInputs:
    """Part `number` of `parts` equal ones."""
    size = BATCH // parts
    rows = slice(number * size, (number + 1) * size)
    latents, labels, t, noise, patches, *_ = batch
    cut = (latents[rows], labels[rows], t[rows], noise[rows])
    return TrainingInputs(*cut, tuple(patch[rows] for patch in patches))


def run_step(
    engine: Engine, rank: Rank, step: int, *, accumulation: int = 1, bad_micro_step: int = -1
) -> StepReport:
    """Takes step `step`; the last rank's `bad_micro_step` has a sample that is not a number."""
    micro_batches = []
    for micro_step in range(accumulation):
        number = micro_step * rank.world_size + rank.number
        inputs = share_of(global_batch(step), number, accumulation * rank.world_size)
        if micro_step == bad_micro_step and rank.number == rank.world_size - 1:
            inputs.latents[0, 0, 0, 0] = torch.nan
        micro_batches.append(inputs)
    return engine.step(micro_batches, learning_rate=LEARNING_RATE)


def report_facts(prefix: str, report: StepReport) -> Facts:
    """The report, losses averaged over ranks; what each rank says of the norm and of skipping."""
    losses = ranks.averaged(stacked(report.losses))
    said = ranks.gather((report.gradient_norm.item(), report.applied))
    return {
        f"{prefix}.losses": losses,
        f"{prefix}.flow_by_time": ranks.averaged(report.losses.flow_by_time),
        f"{prefix}.norms": torch.tensor([norm for norm, _ in said]),
        f"{prefix}.applied": torch.tensor([applied for _, applied in said]),
    }


def state_facts(prefix: str, engine: Engine, shapes: dict[str, torch.Size]) -> Facts:
    """All ranks' fragments put together: a flat vector of each kind, and how often each is there.

    Elements nobody owns are not numbers.
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
    """The weights every rank computes with, one row per rank; under stage 3 none has them all."""
    if arrangement.startswith("3"):
        return {}
    module = engine._deepspeed.module
    mine = torch.cat([p.detach().float().flatten() for p in module.parameters()])
    return {f"{prefix}.copies": torch.stack(ranks.gather(mine))}


def plain_loop(config: Config) -> Facts:
    """The same training in fp32 without DeepSpeed: one process, whole batches, torch's AdamW."""
    objective = objective_of(config)
    parameters = list(objective.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, eps=EPSILON
    )

    def flat() -> Tensor:
        return torch.cat([p.detach().flatten() for p in parameters])

    facts = {"plain.0.master": flat()}
    for step in range(1, GOOD_STEPS + 1):
        optimizer.zero_grad()
        losses = objective(*global_batch(step))
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
    """An engine built with other weights that has taken over a checkpoint."""
    objective = objective_of(config)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(1.0)
    engine = Engine(objective, config, rank)
    reader = CheckpointReader(step_folder(folder, step))
    engine.check(reader)
    engine.restore(reader)
    return engine


def train(folder: Path, arrangement: str, precision: str, rank: Rank) -> Facts:
    """Three good steps, a checkpoint, a bad step, a good one; each step's state."""
    config = experiment(folder, arrangement, precision, accumulation=1)
    facts = plain_loop(config)
    objective = objective_of(config)
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
    with Reads() as reads:
        report = run_step(engine, rank, GOOD_STEPS)
    facts["reads"] = torch.tensor(ranks.gather(reads.count))
    facts |= report_facts(f"{GOOD_STEPS}", report)
    facts |= state_facts(f"{GOOD_STEPS}", engine, shapes)
    facts |= copies_facts(f"{GOOD_STEPS}", engine, arrangement)
    engine.close()
    return facts


def timeout_of(engine: Engine) -> float:
    """The seconds for which DeepSpeed's collectives wait for other ranks."""
    group = engine._deepspeed.seq_data_parallel_group
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def accumulate(folder: Path, arrangement: str, precision: str, rank: Rank) -> Facts:
    """The same steps in two micro steps each, with a checkpoint after two; then one step whose
    first micro step alone is bad, and a good one, which a resumed engine takes as well."""
    config = experiment(folder, arrangement, precision, accumulation=2)
    objective = objective_of(config)
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
    """The checkpoint of two ranks' stage 2 taken over, and the step after it."""
    config = experiment(folder, arrangement, precision, accumulation=1)
    shapes = {name: value.shape for name, value in objective_of(config).named_parameters()}
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
