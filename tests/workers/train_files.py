"""Trains one experiment after another, each as its file says, on the ranks of the launcher.

Usage: train_files.py CONFIG [CONFIG ...]
"""

import sys
from pathlib import Path

from srepa_ds.commands.train import train
from srepa_ds.config.experiment import load_config
from srepa_ds.distributed import ranks

for path in sys.argv[1:]:
    assert train(load_config(Path(path)))
ranks.leave(0)
