"""The layers of an experiment whose tokens have a spatial structure: teachers, and a student's."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from srepa_ds.config.experiment import Config
from srepa_ds.data.shards import ShardDataset
from srepa_ds.encoders.teacher import Teacher, load_teacher
from srepa_ds.errors import DataError
from srepa_ds.report.heatmaps import similarity_section
from srepa_ds.report.markup import Markup
from srepa_ds.report.probe import Pictures, Prober, places_shown
from srepa_ds.report.student_vs_teacher import alone, compared
from srepa_ds.report.tokens import Pairs, name_of
from srepa_ds.weights.exported import ExportedModel


class Named(NamedTuple):
    """The tokens of some images in one layer."""

    teacher: str
    """The teacher, or the one that the student's block was aligned with."""
    name: str
    grid: tuple[int, int]
    tokens: Tensor
    """(images, tokens, width)."""


class TeachersAlone:
    """The tokens of the teachers of an experiment whose model does not exist yet."""

    def __init__(self, config: Config, data: ShardDataset, device: torch.device):
        """Loads the teachers; raises ConfigError or DataError."""
        resolution = (data.image_shape[1], data.image_shape[2])
        self._teachers: list[tuple[str, Teacher]] = [
            (
                name_of(alignment.teacher),
                load_teacher(alignment.teacher, resolution=resolution, device=device),
            )
            for alignment in config.alignments
        ]
        self._data, self._device = data, device

    def tokens(self, indices: Int64[Tensor, " images"]) -> Iterator[Named]:
        """Yields each teacher's tokens of the images `indices`."""
        images = self._data.read(indices).to(self._device).pixels
        for name, teacher in self._teachers:
            yield Named(name, name, teacher.grid, teacher.tokens(images).patches)

    def maps(self, indices: Int64[Tensor, " images"]) -> Markup:
        """Returns a section with similarity maps of a few of the images `indices`."""
        batch = self._data.read(indices).to(self._device)
        seen = Pictures(batch, places_shown(len(batch)))
        comparisons = [
            alone(name, teacher.tokens(batch.pixels).patches, teacher.grid, seen.shown)
            for name, teacher in self._teachers
        ]
        return similarity_section(tuple(comparisons), seen)


class TeachersAndStudent:
    """The tokens of an exported model, and of the teachers that it was aligned with."""

    def __init__(
        self, config: Config, exported: ExportedModel, data: ShardDataset, device: torch.device
    ):
        """Loads the teachers; raises DataError for images that do not fit the model."""
        resolution = (data.image_shape[1], data.image_shape[2])
        self._pairs = Pairs(config, exported, resolution=resolution, device=device)
        if not self._pairs.all:
            raise DataError(
                "the model was trained without a teacher, and the extractor of `evaluate` has no "
                "tokens; there is nothing to compare"
            )
        self._prober = Prober(
            config,
            exported,
            data,
            t=config.structure.time,
            device=device,
            setting="structure.images",
        )
        self._weights = str(exported.provenance.get("weights", "exported"))

    def tokens(self, indices: Int64[Tensor, " images"]) -> Iterator[Named]:
        """Yields the tokens of the images `indices`: each teacher's, its block's, projected ones.

        And those that the losses see of a teacher, if they are not the teacher's own.
        """
        seen = self._prober(indices)
        for pair, tokens in zip(self._pairs.all, self._pairs.tokens(seen), strict=True):
            yield Named(pair.name, pair.name, pair.encoder.grid, tokens.teacher)
            if tokens.target is not tokens.teacher:
                yield Named(pair.name, "target of the losses", pair.grid, tokens.target)
            for name, own in tokens.student.items():
                yield Named(pair.name, name, pair.grid, own)

    def maps(self, indices: Int64[Tensor, " images"]) -> Markup:
        """Returns a section with similarity maps of a few of the images `indices`."""
        seen = self._prober(indices)
        each = zip(self._pairs.all, self._pairs.tokens(seen), strict=True)
        comparisons = tuple(compared(pair, tokens, seen) for pair, tokens in each)
        return similarity_section(comparisons, seen, weights=self._weights)
