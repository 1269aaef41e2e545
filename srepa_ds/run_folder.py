"""The folder of a run: the names of the files and folders in it.

The contents of a checkpoint, an exported model or a sample set are named where they are written.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from srepa_ds.files import writing


@dataclass(frozen=True)
class RunFolder:
    """The folder at `path`; the properties are places in it, whether they exist or not."""

    path: Path

    @property
    def config(self) -> Path:
        """The configuration of the last training."""
        return self.path / "config.yaml"

    @property
    def deepspeed_config(self) -> Path:
        """The settings that DeepSpeed got, derived from the configuration."""
        return self.path / "ds_config.json"

    @property
    def environment(self) -> Path:
        """The versions and the machine of the last training."""
        return self.path / "environment.json"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints, a folder per step."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The record: losses, norms and speed, line by line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The record as TensorBoard reads it."""
        return self.path / "tensorboard"

    @property
    def pictures(self) -> Path:
        """The contact sheets drawn during training."""
        return self.path / "pictures"

    @property
    def skipped(self) -> Path:
        """The history of skipped steps and rollbacks."""
        return self.path / "skipped.jsonl"

    def export(self, format: str = "srepa_ds") -> Path:
        """Returns the place of the exported model, unless `export.folder` names another one."""
        return self.path / ("export" if format == "srepa_ds" else f"export-{format}")

    def samples(self, step: int | None) -> Path:
        """Returns the place of the samples of an exported `step`, so that no two sets collide."""
        folder = self.path / "samples"
        return folder if step is None else folder / f"step-{step:07d}"

    @property
    def results(self) -> Path:
        """The scores."""
        return self.path / "results.json"

    @property
    def structure(self) -> Path:
        """The measures of the tokens' spatial structure."""
        return self.path / "structure.json"

    @property
    def structure_page(self) -> Path:
        """The page about the tokens' spatial structure."""
        return self.path / "structure.html"

    @property
    def sweep(self) -> Path:
        """The scores over settings of the sampler, unless `sweep.folder` names another place."""
        return self.path / "sweep"

    @property
    def timings(self) -> Path:
        """The seconds that each command of the demo took."""
        return self.path / "timings.json"

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.path / "report.html"

    def writing(self) -> AbstractContextManager[None]:
        """Turns an OSError in the block into an OutputError that names the folder."""
        cure = "choose another run.folder or fix its permissions"
        return writing(f"to the run's folder {self.path}", cure=cure)
