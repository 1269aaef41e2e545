"""Trains one experiment after another with the given overrides, on the ranks of the launcher.

Usage: train_runs.py CONFIG [OVERRIDES_OF_RUN_1 [OVERRIDES_OF_RUN_2 ...]], overrides joined by ';'.
"""

import sys
from pathlib import Path

from srepa_ds import distributed
from srepa_ds.config import load_config
from srepa_ds.train import train

for overrides in sys.argv[2:]:
    assert train(load_config(Path(sys.argv[1]), overrides.split(";")))
distributed.leave(0)
