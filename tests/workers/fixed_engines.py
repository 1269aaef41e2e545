"""Builds engines and writes down which fixes applied to each, for a test to judge.

Usage: fixed_engines.py FOLDER. Writes FOLDER/applied.json: the names by arrangement and precision.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from engine_facts import experiment, random_objective

from srepa_ds.distributed import ranks
from srepa_ds.engine import Engine
from srepa_ds.errors import SRepaError
from srepa_ds.zero.fixes import FIXES

CASES = (("0", "fp32"), ("0", "bf16"), ("2-offload", "bf16"), ("3", "fp32"))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = ranks.initialize()
    applied = {}
    for arrangement, precision in CASES:
        config = experiment(folder, arrangement, precision, 1)
        engine = Engine(random_objective(config), config, rank)
        inner = engine._deepspeed
        applied[f"{arrangement}-{precision}"] = [
            fix.name for fix in FIXES if fix.applies(rank if fix.phase == "before" else inner)
        ]
        engine.close()
    refuses_a_version_without_masters(folder, rank)
    (folder / "applied.json").write_text(json.dumps(applied))
    ranks.leave(0)


def refuses_a_version_without_masters(folder: Path, rank: ranks.Rank) -> None:
    """Checks that stages 1 and 2 are not taken for stage 0 if weights do not name their masters."""
    config = experiment(folder, "2", "fp32", 1)
    engine = Engine(random_objective(config), config, rank)
    for parameter in engine._deepspeed.module.parameters():
        del parameter._hp_mapping
    with pytest.raises(SRepaError, match=r"has no Parameter\._hp_mapping"):
        list(engine.pieces())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
