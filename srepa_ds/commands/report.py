"""`srepa-ds report`: one self-contained page about a run."""

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from srepa_ds.config.experiment import Config, samples_folder
from srepa_ds.distributed import devices
from srepa_ds.files import write_aside, writing
from srepa_ds.report import tables
from srepa_ds.report.markup import Markup, element, joined, note, or_note, section
from srepa_ds.report.page import page, require_matplotlib
from srepa_ds.report.pictures import samples_section
from srepa_ds.report.probe import probe
from srepa_ds.report.record import mode_of, objective_of, read_document
from srepa_ds.report.run import Run, doubts, read_run
from srepa_ds.report.scores import score_table, scores_section
from srepa_ds.report.student_vs_teacher import compare

log = logging.getLogger("srepa_ds")

SIMILARITY_TIME = 0.3
"""The time to which images are noised for comparing the student's tokens with the teacher's."""


def report(config: Config) -> Path:
    """Writes `<run.folder>/report.html`, a page that needs no other file, and returns its path.

    A note replaces each part the run does not have yet. Raises DataError without metrics of a
    training, SRepaError without matplotlib, and OutputError if the page cannot be written.
    """
    require_matplotlib()
    run = read_run(config)
    title = f"{run.folder.name}: {mode_of(run.trained)}"
    text = page(title, header=_header(run), sections=_sections(run))
    path = config.run_folder.report
    with writing(path, cure="fix its permissions"):
        # A file's name may be no Unicode.
        content = text.encode("utf-8", errors="replace")
        write_aside(path, lambda aside: aside.write_bytes(content), concurrent=True)
    log.info("wrote %s", path)
    return path


def _header(run: Run) -> Markup:
    mode, objective = mode_of(run.trained), objective_of(run.trained)
    model = run.exported.model if run.exported else None
    parameters = sum(weight.numel() for weight in model.parameters()) if model else None
    return joined(
        element("h1", run.folder.name),
        element("p", element("strong", mode), f": {objective}", class_="mode"),
        score_table(run.results) if run.results else Markup(),
        tables.facts(run.trained, run.lines, parameters=parameters),
        *map(note, doubts(run)),
    )


def _sections(run: Run) -> Iterator[Markup]:
    given, files = run.given, run.given.run_folder
    yield _curves(run)
    yield or_note("samples", samples_section, samples_folder(given), run.reference)
    yield or_note("token similarities", _similarities, run)
    for name, path, hint, build in (
        (
            "scores",
            files.results,
            "score the samples with `srepa-ds evaluate CONFIG`",
            partial(scores_section, class_names=_class_names(run)),
        ),
        ("environment", files.environment, "training writes it", tables.environment_section),
        ("timings", files.timings, "`srepa-ds demo` writes it", tables.timings_section),
    ):
        yield or_note(name, _document_section, path, hint, build)
    yield tables.config_section(run.trained, given)
    yield tables.files_section(run.folder, without=files.report)


def _class_names(run: Run) -> tuple[str, ...]:
    return run.real.index.class_names if run.real else ()


def _document_section(
    path: Path, hint: str, build: Callable[[Mapping[str, Any]], Markup]
) -> Markup:
    return build(read_document(path, hint=hint))


def _curves(run: Run) -> Markup:
    from srepa_ds.report.curves import curves_of, panel

    panels = [panel(curve) for curve in curves_of(run.lines)]
    every = run.trained.train.log_every_steps
    text = f"Each point is the mean over {every} optimizer steps; the number is the last point."
    body = element("div", *panels, class_="panels")
    return section("curves", "Training", body, element("p", text, class_="soft"))


def _similarities(run: Run) -> Markup:
    from srepa_ds.report.heatmaps import similarity_section

    exported, real = run.model(), run.real_images()
    devices.use_exact_float32()
    device = devices.take_device()
    seen = probe(run.given, exported, real, t=SIMILARITY_TIME, device=device)
    weights = str(exported.provenance.get("weights", "exported"))
    return similarity_section(compare(run.given, exported, seen), seen, weights=weights)
