"""Paths of a checkout that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
WORKERS = ROOT / "tests" / "workers"
