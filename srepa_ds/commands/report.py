"""`srepa-ds report`: one self-contained page about a run."""

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from srepa_ds.config.experiment import Config
from srepa_ds.config.sections import EvaluateConfig
from srepa_ds.data.shards import ShardDataset
from srepa_ds.distributed import devices
from srepa_ds.errors import DataError, OutputError, SRepaError
from srepa_ds.files import sha256_of, write_aside
from srepa_ds.report import record, tables
from srepa_ds.report.markup import Markup, element, joined, note, or_note, section
from srepa_ds.report.page import page
from srepa_ds.report.pictures import samples_section
from srepa_ds.report.record import Line
from srepa_ds.report.student_vs_teacher import compare, probe
from srepa_ds.sampling.sample_set import read_provenance
from srepa_ds.weights.exported import ExportedModel, read_model

log = logging.getLogger("srepa_ds")
T = TypeVar("T")

SIMILARITY_TIME = 0.3
"""How noised the images are on which the student's tokens are compared with the teacher's."""

_NOT_EVALUATED = "score the samples with `srepa-ds evaluate CONFIG`"


@dataclass(frozen=True)
class _Run:
    """What there is of a run; None for what it does not have yet."""

    given: Config
    trained: Config
    lines: tuple[Line, ...]
    exported: ExportedModel | None
    real: ShardDataset | None
    results: dict[str, Any] | None

    @property
    def folder(self) -> Path:
        return self.given.run.folder


def report(config: Config) -> Path:
    """Returns the path of `<run.folder>/report.html`, a page that needs no other file.

    What a run does not have yet is named in a line instead of shown. Raises DataError without a
    record of training, SRepaError without matplotlib, OutputError if the page cannot be written.
    """
    _require_matplotlib()
    run = _read(config)
    title = f"{run.folder.name}: {record.mode_of(run.trained)}"
    text = page(title, header=_header(run), sections=_sections(run))
    path = config.report
    try:
        write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; mend its permissions") from error
    log.info("wrote %s", path)
    return path


def _require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise SRepaError(
            "the report draws with matplotlib, which is not installed; install the extra: "
            "pip install 'srepa_ds[demo]'"
        )


def _read(config: Config) -> _Run:
    lines = record.read_metrics(config.record)
    trained = record.trained_config(config)
    return _Run(
        given=config,
        trained=trained,
        lines=lines,
        exported=_there(lambda: read_model(config.weights_folder)),
        real=_there(lambda: _open_real(config, trained)),
        results=_there(lambda: record.read_document(config.results)),
    )


def _there(read: Callable[[], T]) -> T | None:
    """Returns what `read` finds; the section that misses it reads again and says why."""
    try:
        return read()
    except SRepaError:
        return None


def _open_real(config: Config, trained: Config) -> ShardDataset:
    return ShardDataset(config.evaluate.reference if config.evaluate else trained.data.folder)


def _real(run: _Run) -> ShardDataset:
    return run.real or _open_real(run.given, run.trained)


def _header(run: _Run) -> Markup:
    mode, objective = record.mode_of(run.trained), record.objective_of(run.trained)
    model = run.exported.model if run.exported else None
    parameters = sum(weight.numel() for weight in model.parameters()) if model else None
    return joined(
        element("h1", run.folder.name),
        element("p", element("strong", mode), f": {objective}", class_="mode"),
        tables.score_table(run.results) if run.results else Markup(),
        tables.facts(run.trained, run.lines, parameters=parameters),
        *map(note, _doubts(run)),
    )


def _doubts(run: _Run) -> Iterator[str]:
    """Yields what on the page does not belong together."""
    last = int(run.lines[-1]["step"])
    if run.exported and run.exported.provenance.get("step") != last:
        yield (
            f"The exported model is of step {run.exported.provenance.get('step')}, the record of "
            f"training goes to step {last}: export again."
        )
    try:
        provenance = read_provenance(run.given.samples_folder)
    except DataError as error:
        yield str(error)
    else:
        drawn_by = provenance.get("checkpoint_sha256")
        if run.exported and provenance and drawn_by != run.exported.sha256:
            yield "The samples were drawn by other weights than the exported ones: sample again."
        if run.results and run.results.get("samples") != provenance:
            yield ("The scores are those of another sample set than the one shown: evaluate again.")
    if run.results and run.given.evaluate:
        yield from _doubts_of_scores(run.results, run.given.evaluate, run.real)


def _doubts_of_scores(
    results: Mapping[str, Any], settings: EvaluateConfig, reference: ShardDataset | None
) -> Iterator[str]:
    """Yields what the scores were measured with and is not there any more."""
    measured_by, weights = results.get("extractor_sha256"), settings.extractor.weights
    found = _hash(weights) if weights else None
    if measured_by and found and found != measured_by:
        yield f"The scores were measured by other weights than those in {weights}: evaluate again."
    measured_against = results.get("reference_id")
    if measured_against and reference and reference.index.dataset_id != measured_against:
        yield (
            f"The scores were measured against other images than those in {reference.folder}: "
            "evaluate again."
        )


def _hash(path: Path) -> str | None:
    """Returns the sha256 of a file, or None where it is not there to be read."""
    try:
        return sha256_of(path)
    except OSError:
        return None


def _sections(run: _Run) -> Iterator[Markup]:
    given = run.given
    yield _curves(run)
    yield or_note("samples", lambda: samples_section(given.samples_folder, lambda: _real(run)))
    yield or_note("token similarities", lambda: _similarities(run))
    for name, path, hint, build in (
        ("scores", given.results, _NOT_EVALUATED, tables.scores_section),
        ("environment", given.environment, "training writes it", tables.environment_section),
        ("timings", given.timings, "`srepa-ds demo` writes it", tables.timings_section),
    ):
        yield or_note(
            name,
            lambda path=path, hint=hint, build=build: build(record.read_document(path, hint=hint)),
        )
    yield tables.config_section(run.trained, given)
    yield tables.files_section(run.folder, without=given.report)


def _curves(run: _Run) -> Markup:
    from srepa_ds.report.curves import curves_of, panel

    panels = [panel(curve) for curve in curves_of(run.lines)]
    every = run.trained.train.log_every_steps
    text = f"Each point is the mean over {every} optimizer steps; the last one is written out."
    body = element("div", *panels, class_="panels")
    return section("curves", "Training", body, element("p", text, class_="soft"))


def _similarities(run: _Run) -> Markup:
    from srepa_ds.report.heatmaps import similarity_section

    exported = run.exported or read_model(run.given.weights_folder)
    real = _real(run)
    device = devices.local_device()
    seen = probe(run.given, exported, real, t=SIMILARITY_TIME, device=device)
    weights = str(exported.provenance.get("weights", "exported"))
    return similarity_section(compare(run.given, exported, seen), seen, weights=weights)
