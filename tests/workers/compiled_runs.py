"""Trains one run after another and records how many graphs torch.compile made of each.

Usage: compiled_runs.py CONFIG OUTPUT.json [OVERRIDES_OF_RUN_1 [OVERRIDES_OF_RUN_2 ...]], overrides
joined by ';'.
"""

import json
import sys
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from srepa_ds.commands.train import train
from srepa_ds.config.experiment import load_config
from srepa_ds.distributed import ranks

graphs = []
for overrides in sys.argv[3:]:
    torch._dynamo.reset()
    counters.clear()
    assert train(load_config(Path(sys.argv[1]), overrides.split(";")))
    graphs.append(counters["stats"]["unique_graphs"])
Path(sys.argv[2]).write_text(json.dumps(graphs))
ranks.leave(0)
