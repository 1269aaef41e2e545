"""Draws one sample set after another. Usage as train_runs.py."""

import sys
from pathlib import Path

from srepa_ds.commands.sample import sample
from srepa_ds.config.experiment import load_config
from srepa_ds.distributed import ranks

for overrides in sys.argv[2:]:
    sample(load_config(Path(sys.argv[1]), overrides.split(";")))
ranks.leave(0)
