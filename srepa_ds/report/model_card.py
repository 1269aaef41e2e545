"""The model card of an exported model: `README.md`, as the Hugging Face Hub shows it."""

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from srepa_ds import __version__
from srepa_ds.config.experiment import Config
from srepa_ds.errors import ConfigError
from srepa_ds.evaluation.comparable import comparable
from srepa_ds.files import write_aside, writing
from srepa_ds.metrics.scores import printed_names
from srepa_ds.report.card_facts import CardFacts
from srepa_ds.report.card_usage import usage
from srepa_ds.report.record import is_drawable, mode_of, objective_of, part
from srepa_ds.report.tables import number
from srepa_ds.schema import validated
from srepa_ds.weights.exported import CARD, PICTURE
from srepa_ds.weights.from_checkpoint import CheckpointWeights
from srepa_ds.weights.hub import LIBRARY, TAGS

log = logging.getLogger("srepa_ds")

CARD_FORMATS = ("srepa_ds", "diffusers")
"""The formats of an export that a card lies beside."""

_TASK = "unconditional-image-generation"
_PLACEHOLDER = "OWNER/NAME"
_LARGEST_SIDE = 1600
_CURE = "choose another export.folder, or fix its permissions and make room"


def write_card(config: Config, source: CheckpointWeights, *, name: str | None = None) -> None:
    """Writes the card of the model that was exported to `config.export_folder`, and its picture.

    `name` is the repository that it goes to. What the run lacks, the card says. Logs a warning, and
    writes none, for a run whose configuration is of another release. Raises OutputError.
    """
    try:
        # Without cross-checks: the files it names may have gone since, or be on another machine.
        trained = validated(Config, source.config, source="the run's configuration")
    except ConfigError as error:
        log.warning("no model card: %s", error)
        # An earlier one would be of other weights.
        for name in (CARD, PICTURE):
            (config.export_folder / name).unlink(missing_ok=True)
        return
    folder = config.export_folder
    facts = CardFacts(config, trained, source, name or _PLACEHOLDER)
    with writing(f"the model card to {folder}", cure=_CURE):
        _write_picture(folder / PICTURE, facts)
        text = f"---\n{_metadata(facts).to_yaml()}\n---\n\n{_body(facts)}"
        # A path may be no Unicode.
        content = text.encode("utf-8", errors="replace")
        write_aside(folder / CARD, lambda aside: aside.write_bytes(content))


def _write_picture(path: Path, facts: CardFacts) -> None:
    if facts.picture is None:
        path.unlink(missing_ok=True)
        return
    image = facts.picture[0]
    image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    write_aside(path, lambda aside: image.save(aside, format="PNG"))


def _metadata(facts: CardFacts) -> ModelCardData:
    conditional = ["class-conditional"] if facts.trained.model.num_classes > 1 else []
    scores = list(_eval_results(facts.results))
    return ModelCardData(
        license=facts.given.export.license or "other",
        library_name="diffusers" if facts.given.export.format == "diffusers" else LIBRARY,
        pipeline_tag=_TASK,
        tags=[*TAGS, *conditional],
        model_name=facts.run if scores else None,
        eval_results=scores or None,
    )


def _eval_results(results: Mapping[str, Any]) -> Iterator[EvalResult]:
    reference = _reference(results)
    names = printed_names(_extractor(results))
    for key, value in part(results, "scores").items():
        if is_drawable(value):
            shown = names.get(key, key)
            yield EvalResult(
                task_type=_TASK,
                dataset_type=re.sub(r"[^\w.-]+", "-", reference).lower(),
                dataset_name=reference,
                metric_type=re.sub(r"[^\w-]+", "_", shown).lower(),
                metric_name=shown,
                metric_value=value,
            )


def _body(facts: CardFacts) -> str:
    sections = {
        "": _summary(facts),
        "Recipe": table(_recipe(facts)),
        "Scores": _scores(facts),
        "How to use it": usage(facts),
        "Limits": _limits(facts),
        "Provenance": table(_provenance(facts)),
    }
    return "\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections.items())


def _summary(facts: CardFacts) -> str:
    model = facts.trained.model
    channels, height, width = model.latent_shape
    kind = "pixels" if facts.trained.codec.kind == "identity" else "latents"
    lines = [
        f"# {escaped(facts.run)}\n",
        f"{escaped(model.variant)}, a diffusion transformer trained with "
        f"{escaped(mode_of(facts.trained))} for {facts.step:,} steps. It draws images of "
        f"{model.num_classes:,} classes, as {kind} of {channels} x {height} x {width}.\n",
    ]
    if facts.picture is None:
        lines.append("The run has no picture of samples yet: `srepa-ds sample` draws some.\n")
    else:
        lines.append(f"![samples]({PICTURE})\n\n{facts.picture[1]}\n")
    return "\n".join(lines)


def _recipe(facts: CardFacts) -> Iterator[tuple[str, str]]:
    trained = facts.trained
    weights = [n for n in facts.source.tensors.shapes.items() if not n[0].startswith("projectors.")]
    yield "model", f"{trained.model.variant}, {sum(math.prod(s) for _, s in weights):,} parameters"
    yield "objective", f"{mode_of(trained)}: {objective_of(trained)}"
    for alignment in trained.alignments:
        teacher = alignment.teacher
        yield (
            "teacher",
            f"{teacher.name or teacher.resolved.architecture} at block {alignment.depth}",
        )
    yield "path", trained.objective.interpolant.path
    yield "latents", _codec(trained)
    yield "data", _data_name(trained)
    yield "images per step", f"{trained.train.batch_size:,}"
    yield "steps", f"{facts.step:,} of {trained.train.steps:,}"
    yield "learning rate", f"{trained.optimizer.learning_rate:g}, {trained.optimizer.schedule}"
    yield "average (EMA)", f"decay {trained.ema.decay:g}"
    yield "label dropout", f"{trained.objective.label_dropout:g}"
    yield "precision", trained.engine.precision


def _codec(trained: Config) -> str:
    weights = trained.codec.weights
    # A repository's name, and no folder of this machine.
    named = f" {weights}" if weights is not None and not weights.is_absolute() else ""
    return f"{trained.codec.kind}{named}"


def _scores(facts: CardFacts) -> str:
    results = facts.results
    if not results:
        others = "scores of other weights of this run, but " if facts.has_other_results else ""
        return (
            f"There are {others}none of these weights yet: `srepa-ds sample` and `srepa-ds "
            "evaluate` measure them.\n"
        )
    further = part(results, "further_scores")
    scores = {_extractor(results): part(results, "scores")}
    scores |= {label: part(further, label) for label in further}
    rows = [
        (printed_names(label).get(key, key), number(value))
        for label, values in scores.items()
        for key, value in values.items()
        if is_drawable(value)
    ]
    return f"{table(rows)}\n{table(_measured(results))}"


def _measured(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    verdict = comparable(results)
    reasons = f"because {'; '.join(verdict['because'])}"
    yield "comparable", f"no, {reasons}" if verdict["because"] else f"yes, with {verdict['with']}"
    yield "reference", _reference(results)
    yield "feature space", _extractor(results)
    if (count := results.get("num_images")) is not None:
        yield "images", number(count)
    for name, value in part(part(results, "samples"), "sampler").items():
        if value is not None:
            yield name.replace("_", " "), number(value)


def _reference(results: Mapping[str, Any]) -> str:
    """Returns the name of the real images, without the folders of this machine."""
    return Path(str(part(results, "settings").get("reference"))).name


def _extractor(results: Mapping[str, Any]) -> str:
    extractor = part(part(results, "settings"), "extractor")
    known = [*part(results, "extractors"), extractor.get("name")]
    return str(next(filter(None, known), part(extractor, "spec").get("architecture")))


def _data_name(trained: Config) -> str:
    """Returns the name of the data set, whose folder has a part for training."""
    folder = trained.data.folder
    return folder.parent.name if folder.name == "train" and folder.parent.name else folder.name


def _limits(facts: CardFacts) -> str:
    lines = [
        f"- It draws what its training data ({escaped(_data_name(facts.trained))}) show, with "
        "their biases and faults. There is no filter for unsafe images.",
        "- Images come from a class, not from a text.",
    ]
    if facts.trained.alignments:
        lines.append(
            "- It was trained towards the tokens of a teacher, whose weights have a licence of "
            "their own: see its publisher's page."
        )
    if facts.trained.codec.kind == "vae":
        lines.append("- The VAE that decodes its latents has a licence of its own.")
    if facts.given.export.license is None:
        lines.append(
            "- Its licence is not stated. Set `export.license` and export again, or correct the "
            "line `license: other` at the top of this file."
        )
    return "\n".join(lines) + "\n"


def _provenance(facts: CardFacts) -> Iterator[tuple[str, str]]:
    source = facts.source.provenance
    yield "run", facts.run
    yield "step", f"{facts.step:,}"
    yield "weights", str(source["weights"])
    yield "numbers", facts.given.export.dtype
    yield "checkpoint", str(source["checkpoint"])
    yield "sha256 of the configuration", facts.source.provenance["config_sha256"]
    yield "exported by", f"srepa_ds {__version__}"
    known = facts.environment()
    versions = [
        f"{name} {known[name]}" for name in ("srepa_ds", "torch", "deepspeed") if name in known
    ]
    yield "trained by", ", ".join(versions) or "not recorded"


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Returns a table of Markdown; cells are shown as they are, whatever they hold."""
    lines = [f"| {escaped(name)} | {escaped(value)} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n"


def escaped(text: str) -> str:
    """Returns Markdown that shows `text` in one line, with neither markup nor HTML of its own."""
    line = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", line)
