"""The parts of a run, read for its report, and the doubts about how they fit together."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from srepa_ds.config.experiment import Config, samples_folder
from srepa_ds.config.sections import EvaluateConfig
from srepa_ds.data.index_document import INDEX_NAME
from srepa_ds.data.shards import ShardDataset
from srepa_ds.errors import DataError, SRepaError
from srepa_ds.evaluation.image_sets import ShardImages
from srepa_ds.evaluation.images import ImageSet
from srepa_ds.evaluation.reference import open_reference
from srepa_ds.files import sha256_of
from srepa_ds.report.record import Line, read_document, read_metrics, trained_config
from srepa_ds.sampling.sample_set import read_provenance
from srepa_ds.weights.exported import ExportedModel, read_model

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """The parts of a run; None for those it does not have yet."""

    given: Config
    """The configuration the report was asked for with."""

    trained: Config
    """The configuration the run was trained with."""

    lines: tuple[Line, ...]
    exported: ExportedModel | None
    real: ShardDataset | None
    results: dict[str, Any] | None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.given.run.folder

    def real_images(self) -> ShardDataset:
        """Returns real images as data; raises DataError if there are none."""
        return self.real or _open_real_images(self.given, self.trained)

    def reference(self) -> ImageSet:
        """Returns what scores are measured against, or else the training data; raises DataError."""
        if self.given.evaluate is None:
            return ShardImages(self.trained.data.folder)
        place = self.given.evaluate.reference
        images = open_reference(place, setting="evaluate.reference").images
        if images is None:
            raise DataError(f"{place} holds statistics, and no images")
        return images

    def model(self) -> ExportedModel:
        """Returns the exported model; raises CheckpointError if there is none."""
        return self.exported or read_model(self.given.weights_folder)


def read_run(config: Config) -> Run:
    """Returns the parts of the run that `config` names.

    Raises DataError without metrics of a training; any other part may be missing.
    """
    lines = read_metrics(config.run_folder.metrics)
    trained = trained_config(config)
    return Run(
        given=config,
        trained=trained,
        lines=lines,
        exported=_or_none(read_model, config.weights_folder),
        real=_or_none(_open_real_images, config, trained),
        results=_or_none(read_document, config.run_folder.results),
    )


def _or_none(read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """Returns `read(...)`, or None; the section that needs it reads again and says why."""
    try:
        return read(*args, **kwargs)
    except SRepaError:
        return None


def _open_real_images(given: Config, trained: Config) -> ShardDataset:
    """Returns the reference, or the training data if the reference is no data set of shards."""
    return ShardDataset(_reference_shards(given) or trained.data.folder)


def _reference_shards(config: Config) -> Path | None:
    """Returns `evaluate.reference` if it is a data set of shards."""
    reference = config.evaluate.reference if config.evaluate else None
    return reference if reference and (reference / INDEX_NAME).is_file() else None


def doubts(run: Run) -> Iterator[str]:
    """Yields a sentence for each pair of parts that do not belong together."""
    last = int(run.lines[-1]["step"])
    if run.exported and run.exported.provenance.get("step") != last:
        yield (
            f"The exported model is of step {run.exported.provenance.get('step')}, but training is "
            f"recorded up to step {last}: export again."
        )
    try:
        provenance = read_provenance(samples_folder(run.given))
    except DataError as error:
        yield str(error)
    else:
        drawn_with = provenance.get("checkpoint_sha256")
        if run.exported and provenance and drawn_with != run.exported.sha256:
            yield "The samples were drawn with other weights than the exported ones: sample again."
        if run.results and run.results.get("samples") != provenance:
            yield "The scores belong to another sample set than the one shown: evaluate again."
    if run.results and run.given.evaluate:
        reference = run.real if _reference_shards(run.given) else None
        yield from _doubts_about_scores(run.results, run.given.evaluate, reference)


def _doubts_about_scores(
    results: Mapping[str, Any], settings: EvaluateConfig, reference: ShardDataset | None
) -> Iterator[str]:
    """Yields a sentence if the extractor's weights or the reference have changed since then."""
    measured_with, weights = results.get("extractor_sha256"), settings.extractor.weights
    found = _hash(weights) if weights else None
    if measured_with and found and found != measured_with:
        yield (
            f"The scores were measured with other weights than those in {weights}: evaluate again."
        )
    measured_against = results.get("reference_id")
    if measured_against and reference and reference.index.dataset_id != measured_against:
        yield (
            f"The scores were measured against other images than those in {reference.folder}: "
            "evaluate again."
        )


def _hash(path: Path) -> str | None:
    """Returns the sha256 of a file, or None if it cannot be read."""
    try:
        return sha256_of(path)
    except OSError:
        return None
