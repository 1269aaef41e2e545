"""Ranks that cannot all have the device they should. Usage: rank_without_gpu.py none|other.

Rank 1 sees GPUs: `none` that is its own, or one where rank 0 has none.
"""

import os
import sys

import torch

from srepa_ds.cli import main

if os.environ["RANK"] == "1":
    seen = 1 if sys.argv[1] == "none" else 2
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: seen
    torch.cuda.set_device = lambda _: None
else:
    torch.cuda.is_available = lambda: False
sys.argv[1:] = ["train", "nowhere.yaml"]
main()
