"""The whole experiment in one tree: the sections of every module, and how it is read."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from srepa_ds.alignment.alignment import AlignmentConfig
from srepa_ds.checkpoint.retention import CheckpointConfig
from srepa_ds.codec.table import CodecConfig
from srepa_ds.config.cross_checks import CROSS_CHECKS
from srepa_ds.config.sections import (
    EngineConfig,
    EvaluateConfig,
    ExportConfig,
    MonitorConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from srepa_ds.data.loader import DataConfig
from srepa_ds.model.variants import SiTConfig
from srepa_ds.objective import ObjectiveConfig
from srepa_ds.optim.adamw import OptimizerConfig
from srepa_ds.optim.ema import EmaConfig
from srepa_ds.schema import Section, validated
from srepa_ds.telemetry.metrics_log import RECORD
from srepa_ds.trees import Tree, apply_overrides, load_tree
from srepa_ds.weights.exported import exported_step


class Config(Section):
    """One experiment, from data to scores."""

    kind: Literal["experiment"] = "experiment"
    """What this file configures."""

    run: RunConfig
    """The run's identity."""

    data: DataConfig
    """Where training images come from."""

    codec: CodecConfig = CodecConfig()
    """The space the diffusion model works in."""

    model: SiTConfig
    """The diffusion transformer."""

    objective: ObjectiveConfig = ObjectiveConfig()
    """The flow-matching part of the loss."""

    alignments: tuple[AlignmentConfig, ...] = ()
    """One entry per teacher: which, at which depth, and with which losses. Empty: plain SiT."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its learning rate schedule."""

    ema: EmaConfig = EmaConfig()
    """How the exponential moving average of the weights is kept."""

    train: TrainConfig
    """How long and in what portions to train."""

    engine: EngineConfig = EngineConfig()
    """How DeepSpeed arranges memory and arithmetic."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written and which are kept."""

    monitor: MonitorConfig = MonitorConfig()
    """What is looked at while training."""

    export: ExportConfig = ExportConfig()
    """What `srepa-ds export` writes."""

    sample: SampleConfig = SampleConfig()
    """What `srepa-ds sample` draws."""

    evaluate: EvaluateConfig | None = None
    """What `srepa-ds evaluate` compares."""

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints lie."""
        return self.run.folder / "checkpoints"

    @property
    def record(self) -> Path:
        """Where training writes its losses, line by line."""
        return self.run.folder / RECORD

    @property
    def resolved(self) -> Path:
        """Where training keeps the configuration it ran with."""
        return self.run.folder / "config.yaml"

    @property
    def environment(self) -> Path:
        """Where training says what it ran on."""
        return self.run.folder / "environment.json"

    @property
    def results(self) -> Path:
        """Where the scores lie."""
        return self.run.folder / "results.json"

    @property
    def timings(self) -> Path:
        """Where the demo says how long each command took."""
        return self.run.folder / "timings.json"

    @property
    def report(self) -> Path:
        """Where the report lies."""
        return self.run.folder / "report.html"

    @property
    def export_folder(self) -> Path:
        """Where the exported model lies."""
        return self.export.folder or self.run.folder / "export"

    @property
    def weights_folder(self) -> Path:
        """Where `sample` finds the model."""
        return self.sample.weights or self.export_folder

    @property
    def samples_folder(self) -> Path:
        """Where `sample` writes: a folder for each exported step, so that no two sets collide."""
        if self.sample.folder is not None:
            return self.sample.folder
        step = exported_step(self.weights_folder)
        samples = self.run.folder / "samples"
        return samples if step is None else samples / f"step-{step:07d}"


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Returns the experiment of a YAML file with overrides; raises ConfigError with all faults."""
    return config_from(apply_overrides(load_tree(path), overrides), source=str(path))


def config_from(tree: Tree, *, source: str) -> Config:
    """Returns the experiment of a tree; raises ConfigError with all faults."""
    return validated(Config, tree, source=source, cross_checks=CROSS_CHECKS)
