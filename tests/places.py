"""Where a checkout keeps what tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
WORKERS = ROOT / "tests" / "workers"
