"""Trains one experiment after another, each as its file says, on the ranks of the launcher.

Usage: train_files.py CONFIG [CONFIG ...]
"""

import sys
from pathlib import Path

from srepa_ds import distributed
from srepa_ds.config import load_config
from srepa_ds.train import train

for path in sys.argv[1:]:
    assert train(load_config(Path(path)))
distributed.leave(0)
