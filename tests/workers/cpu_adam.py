"""Trains with weights offloaded to the CPU and either AdamW, and resumes DeepSpeed's.

Usage: cpu_adam.py FOLDER. Writes FOLDER/ARRANGEMENT.safetensors: the state after each step.
"""

import sys
from pathlib import Path

import torch
from engine_facts import experiment, keep, random_objective, resumed, run_step, state_facts
from safetensors.torch import save_file

from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.engine import Engine

SAVED_STEP, STEPS = 2, 5


def compare(folder: Path, arrangement: str, rank: Rank) -> None:
    """Takes five steps with each AdamW, and DeepSpeed's last three again after a resume."""
    facts = {}
    for adam in ("torch", "deepspeed"):
        config = experiment(folder, arrangement, "fp32", 1, cpu_adam=adam)
        objective = random_objective(config)
        shapes = {name: weight.shape for name, weight in objective.named_parameters()}
        engine = Engine(objective, config, rank)
        facts |= state_facts(f"{adam}.0", engine, shapes)
        for step in range(1, STEPS + 1):
            run_step(engine, rank, step)
            facts |= state_facts(f"{adam}.{step}", engine, shapes)
            if step == SAVED_STEP:
                keep(engine, folder / f"{arrangement}-{adam}", step=step, rank=rank)
        engine.close()
    engine = resumed(config, folder / f"{arrangement}-deepspeed", step=SAVED_STEP, rank=rank)
    facts |= state_facts(f"resumed.{SAVED_STEP}", engine, shapes)
    for step in range(SAVED_STEP + 1, STEPS + 1):
        run_step(engine, rank, step)
        facts |= state_facts(f"resumed.{step}", engine, shapes)
    engine.close()
    if rank.is_main:
        save_file(facts, folder / f"{arrangement}.safetensors")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = ranks.initialize()
    for arrangement in ("2-offload", "3-offload"):
        compare(folder, arrangement, rank)
    ranks.leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
