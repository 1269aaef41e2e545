"""The whole experiment in one tree: the sections of all components, and how to read it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from srepa_ds.alignment.alignment import AlignmentConfig
from srepa_ds.checkpoint.folder import step_of
from srepa_ds.checkpoint.retention import CheckpointConfig
from srepa_ds.codec.config import CodecConfig
from srepa_ds.config.cross_checks import CROSS_CHECKS
from srepa_ds.config.sections import (
    EngineConfig,
    EvaluateConfig,
    MonitorConfig,
    RunConfig,
    SampleConfig,
    StructureConfig,
    TrainConfig,
)
from srepa_ds.config.sweep_config import SweepConfig
from srepa_ds.data.loader import DataConfig
from srepa_ds.encoders.published import path_of_model
from srepa_ds.model.variants import SiTConfig
from srepa_ds.objective import ObjectiveConfig
from srepa_ds.optim.adamw import OptimizerConfig
from srepa_ds.optim.ema import EmaConfig
from srepa_ds.run_folder import RunFolder
from srepa_ds.schema import MayChange, Section, load_section, section_of, validated
from srepa_ds.trees import Tree
from srepa_ds.weights.export_config import ExportConfig
from srepa_ds.weights.exported import exported_step
from srepa_ds.weights.from_checkpoint import chosen_checkpoint


class Config(Section):
    """One experiment, from data to scores."""

    kind: Literal["experiment"] = "experiment"
    """The kind of this file."""

    run: RunConfig
    """The run's identity."""

    data: DataConfig
    """The training images."""

    codec: CodecConfig = CodecConfig()
    """The frozen map between images and latents."""

    model: SiTConfig
    """The diffusion transformer."""

    objective: ObjectiveConfig = ObjectiveConfig()
    """The flow-matching part of the loss."""

    alignments: tuple[AlignmentConfig, ...] = ()
    """One entry per teacher, with its depth and losses. Empty: plain SiT."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its learning rate schedule."""

    ema: EmaConfig = EmaConfig()
    """The moving averages of the weights."""

    train: TrainConfig
    """The length of training, its batches, and what happens to steps that are not finite."""

    engine: Annotated[EngineConfig, MayChange] = EngineConfig()
    """How DeepSpeed arranges memory and arithmetic."""

    checkpoint: Annotated[CheckpointConfig, MayChange] = CheckpointConfig()
    """When checkpoints are written, and which of them are kept."""

    monitor: Annotated[MonitorConfig, MayChange] = MonitorConfig()
    """Images and distances during training."""

    export: Annotated[ExportConfig, MayChange] = ExportConfig()
    """The weights that `srepa-ds export` writes."""

    sample: Annotated[SampleConfig, MayChange] = SampleConfig()
    """The images that `srepa-ds sample` draws."""

    evaluate: Annotated[EvaluateConfig | None, MayChange] = None
    """The images that `srepa-ds evaluate` compares, and the feature space."""

    structure: Annotated[StructureConfig, MayChange] = StructureConfig()
    """The tokens whose spatial structure `srepa-ds structure` measures."""

    sweep: Annotated[SweepConfig | None, MayChange] = None
    """The settings of the sampler that `srepa-ds sweep` compares."""

    @property
    def run_folder(self) -> RunFolder:
        """The files of the run."""
        return RunFolder(self.run.folder)

    @property
    def export_folder(self) -> Path:
        """The folder that `export` writes the model to."""
        return self.export.folder or self.run_folder.export(self.export.format)

    @property
    def weights_folder(self) -> Path:
        """The folder that `sample` reads the model from; raises DataError for changed files."""
        if self.sample.weights is not None:
            return path_of_model(self.sample.weights)
        own = self.export.folder if self.export.format == "srepa_ds" else None
        return own or self.run_folder.export()


def samples_folder(config: Config) -> Path:
    """Returns the folder that `sample` writes to; by default it is named after the model's step.

    Reads that step from the exported model or looks for the checkpoint; a file of weights has none.
    Raises CheckpointError without a valid checkpoint.
    """
    if config.sample.folder is not None:
        return config.sample.folder
    if config.sample.source == "checkpoint":
        root = config.run_folder.checkpoints
        return config.run_folder.samples(step_of(chosen_checkpoint(root, config.export.step)))
    return config.run_folder.samples(exported_step(config.weights_folder))


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Returns the experiment of a YAML file with overrides; raises ConfigError with all faults."""
    return load_section(Config, path, overrides, cross_checks=CROSS_CHECKS)


def config_of(files: Iterable[Tree], overrides: Iterable[str] = (), *, source: str) -> Config:
    """Returns the experiment of the trees that `load_files` returned, as `load_config` does."""
    return section_of(Config, files, overrides, source=source, cross_checks=CROSS_CHECKS)


def config_from(tree: Tree, *, source: str) -> Config:
    """Returns the experiment of a tree; raises ConfigError with all faults."""
    return validated(Config, tree, source=source, cross_checks=CROSS_CHECKS)
