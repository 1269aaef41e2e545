"""Trains one experiment after another with the given overrides, on the ranks of the launcher.

Usage: train_runs.py CONFIG [OVERRIDES_OF_RUN_1 [OVERRIDES_OF_RUN_2 ...]], overrides joined by ';'.
"""

import sys
from pathlib import Path

from srepa_ds.commands.train import train
from srepa_ds.config.experiment import load_config
from srepa_ds.distributed import ranks

for overrides in sys.argv[2:]:
    assert train(load_config(Path(sys.argv[1]), overrides.split(";")))
ranks.leave(0)
