"""What an export is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from srepa_ds.weights.export_config import ExportConfig
from srepa_ds.weights.from_checkpoint import CheckpointWeights


@dataclass(frozen=True)
class ExportRequest:
    """What is to be written, and how."""

    source: CheckpointWeights
    config: ExportConfig
    replace: bool = False
    """Whether a model of another run may be replaced."""
    vae: Path | None = None
    """The folder of the VAE that decodes, where the model has one and it is on this machine."""
    solver: str = "euler_maruyama"
    """The solver to draw with, where the format has one."""
    class_names: Mapping[int, str] = field(default_factory=dict)
    """The names of classes, as far as they are known."""
