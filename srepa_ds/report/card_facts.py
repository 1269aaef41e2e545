"""What a model card says of a run: its scores and a picture, as far as they are of the model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from srepa_ds.config.experiment import Config
from srepa_ds.errors import CheckpointError, DataError
from srepa_ds.report.record import part, read_document
from srepa_ds.sampling.sample_set import CONTACT_SHEET, read_contact_sheet, read_provenance
from srepa_ds.weights import exported
from srepa_ds.weights.file_hash import hash_of_weight_file
from srepa_ds.weights.from_checkpoint import CheckpointWeights


@dataclass(frozen=True)
class CardFacts:
    """A run, and the weights of it that were exported."""

    given: Config
    """The configuration of the export, which names the run's files."""

    trained: Config
    """The configuration the model was trained with."""

    source: CheckpointWeights
    """The weights; their tensors are read only to tell them from others."""

    name: str
    """The repository on the Hub, or what stands for it."""

    @property
    def run(self) -> str:
        """The name of the run."""
        return self.given.run.folder.absolute().name

    @property
    def step(self) -> int:
        """The step of the weights."""
        return self.source.provenance["step"]

    @cached_property
    def results(self) -> dict[str, Any]:
        """The scores of exactly these weights; empty if there are none."""
        try:
            found = read_document(self.given.run_folder.results)
        except DataError:
            return {}
        return found if self._drew(part(found, "samples")) else {}

    @cached_property
    def has_other_results(self) -> bool:
        """Whether there are scores, but of other weights."""
        return self.given.run_folder.results.exists() and not self.results

    @cached_property
    def picture(self) -> tuple[Image.Image, str] | None:
        """A contact sheet and what it shows; None if the run has none that can be read."""
        folder = self.given.sample.folder or self.given.run_folder.samples(self.step)
        if (folder / CONTACT_SHEET).is_file():
            try:
                if self._drew(read_provenance(folder)):
                    return read_contact_sheet(folder), "Samples of these weights, a class per row."
            except DataError:
                pass
        return next(self._pictures_of_training(), None)

    def _pictures_of_training(self) -> Iterator[tuple[Image.Image, str]]:
        for path in sorted(self.given.run_folder.pictures.glob("step-*.png"), reverse=True):
            try:
                step = int(path.stem.removeprefix("step-"))
                if step > self.step:
                    continue
                with Image.open(path) as image:
                    yield image.convert("RGB"), f"Drawn in training, at step {step:,}."
            except (OSError, ValueError, SyntaxError):
                continue

    def environment(self) -> Mapping[str, Any]:
        """Returns the versions that trained the run, empty if they were not recorded."""
        try:
            return read_document(self.given.run_folder.environment)
        except DataError:
            return {}

    def _drew(self, samples: Mapping[str, Any]) -> bool:
        """Returns whether a sample set's provenance names these weights."""
        drawn_with = samples.get("checkpoint_sha256")
        if drawn_with is None:
            return False
        # The second takes reading all weights.
        is_whole = self.given.export.dtype == "fp32"
        return drawn_with == self._written or (is_whole and drawn_with == self._whole)

    @cached_property
    def _written(self) -> str | None:
        """The hash that the export states of its own file."""
        try:
            return exported.read_document(Path(self.given.export_folder)).sha256
        except CheckpointError:
            return None

    @cached_property
    def _whole(self) -> str:
        """The hash of an export in float32, with projectors: that of the checkpoint itself."""
        return hash_of_weight_file(self.source.tensors, exported.METADATA)
