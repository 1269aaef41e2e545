"""Draws one sample set after another. Usage as train_runs.py."""

import sys
from pathlib import Path

from srepa_ds import distributed
from srepa_ds.config import load_config
from srepa_ds.sample import sample

for overrides in sys.argv[2:]:
    sample(load_config(Path(sys.argv[1]), overrides.split(";")))
distributed.leave(0)
