"""One wrong use: what it has before it goes wrong, its command line, words of the message."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from places import ROOT

from srepa_ds.config.experiment import Config, load_config

CONFIGS = ROOT / "configs"
TEACHER = "alignments.0.teacher"


@dataclass(frozen=True)
class Place:
    """What one case has before it goes wrong: its own copy of the small world."""

    folder: Path

    @property
    def config(self) -> Config:
        return load_config(self.folder / "experiment.yaml")

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def edit(self, **sections) -> None:
        path = self.folder / "experiment.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | sections))


@dataclass(frozen=True)
class Case:
    """One fault: how it comes about, the command line, and words of the message."""

    name: str
    arrange: Callable[[Place], None]
    command: str
    """Words, with {folder} for the case's folder; CONFIG is its experiment."""

    words: tuple[str, ...]

    def __str__(self) -> str:
        return self.name.replace(" ", "-")
