"""Takes two steps with eager blocks and with compiled, checkpointed ones, for a test to judge.

Usage: compiled_engine.py FOLDER. Writes FOLDER/facts.safetensors: the losses of each step and the
weights after both, of eager blocks, of compiled ones, and of eager ones resumed from the checkpoint
of the compiled ones' first step; and the number of graphs. AOTAutograd runs the graphs without a
compiler behind it.
"""

import sys
from pathlib import Path

import torch
from engine_facts import (
    Facts,
    experiment,
    keep,
    random_objective,
    resumed,
    run_step,
    stacked,
    state_facts,
)
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounterWithBackend

from srepa_ds.config.experiment import Config
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.engine import Engine
from srepa_ds.model.activation_checkpointing import ActivationCheckpointingConfig


def eager(config: Config, rank: Rank) -> Facts:
    """Takes both steps without compiling or checkpointing."""
    objective = random_objective(config)
    engine = Engine(objective, config, rank)
    facts = {f"eager.{step}.losses": losses(engine, rank, step) for step in (1, 2)}
    return facts | last_facts("eager", engine, config)


def compiled(config: Config, folder: Path, rank: Rank) -> Facts:
    """Takes both steps compiled, saves between them, and resumes the second one eager."""
    objective = random_objective(config)
    objective.sit.set_activation_checkpointing(ActivationCheckpointingConfig(policy="selective"))
    counter = CompileCounterWithBackend("aot_eager")
    objective.sit.compile_blocks(backend=counter)
    engine = Engine(objective, config, rank)
    facts = {"compiled.1.losses": losses(engine, rank, 1)}
    keep(engine, folder, step=1, rank=rank)
    facts["compiled.2.losses"] = losses(engine, rank, 2)
    facts["graphs"] = torch.tensor(counter.frame_count)
    facts |= last_facts("compiled", engine, config)
    engine = resumed(config, folder, step=1, rank=rank)
    facts["resumed.2.losses"] = losses(engine, rank, 2)
    return facts | last_facts("resumed", engine, config)


def losses(engine: Engine, rank: Rank, step: int) -> torch.Tensor:
    """Takes one step and returns its terms."""
    return stacked(run_step(engine, rank, step).losses)


def last_facts(prefix: str, engine: Engine, config: Config) -> Facts:
    """Returns the weights in the order of the objective's names; closes the engine."""
    shapes = {name: weight.shape for name, weight in random_objective(config).named_parameters()}
    facts = state_facts(prefix, engine, shapes)
    engine.close()
    return {f"{prefix}.master": facts[f"{prefix}.master"]}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = ranks.initialize()
    config = experiment(folder, "2", "fp32", 1)
    facts = eager(config, rank) | compiled(config, folder, rank)
    save_file(facts, folder / "facts.safetensors")
    ranks.leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
