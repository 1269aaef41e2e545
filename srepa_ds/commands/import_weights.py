"""`srepa-ds import`: weights of another program as a run of this one."""

import os
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from srepa_ds.alignment.alignment import TeacherShape
from srepa_ds.config.cross_checks import CROSS_CHECKS
from srepa_ds.config.experiment import Config
from srepa_ds.config.yaml_text import to_yaml
from srepa_ds.encoders.published import local_model
from srepa_ds.errors import CheckpointError, ConfigError, Fault, OutputError, listed, nearest
from srepa_ds.files import claimed, expanded, flush_to_disk, unexpanded, write_aside, writing
from srepa_ds.objective import Objective
from srepa_ds.run_folder import RunFolder
from srepa_ds.schema import section_of, to_tree
from srepa_ds.trees import Tree, apply_overrides, merged
from srepa_ds.weights.foreign.latent_statistics import read_latent_statistics
from srepa_ds.weights.foreign.layouts import LAYOUTS
from srepa_ds.weights.foreign.model import ForeignModel
from srepa_ds.weights.foreign.opening import open_foreign
from srepa_ds.weights.foreign.settings import Described, LatentStatistics, described
from srepa_ds.weights.imported import (
    check_positions,
    lacking,
    save_as_checkpoint,
    save_as_export,
)
from srepa_ds.weights.initial import WeightsKind

_CURE = "choose a folder you may write to, with free space"
_INITIAL = "train.init_from"


def import_weights(
    source: Path,
    folder: Path,
    overrides: Iterable[str] = (),
    *,
    layout: str | None = None,
    latent_statistics: Path | None = None,
) -> str:
    """Makes the run `folder` of foreign weights, and returns what was made, for the user to read.

    It gets `config.yaml` with all that the file tells of its training, and `overrides`; and a
    checkpoint to continue from, if the file has the optimizer's state and no override names
    `train.init_from`, else an exported model that training starts from. Raises OutputError if
    `folder` holds anything or cannot be written to, CheckpointError for weights that cannot be read
    or do not fit, DataError for a repository that was not fetched, and ConfigError with all faults
    of the settings; nothing is left then.
    """
    folder, overrides = _place("FOLDER", folder), [*overrides]
    source = local_model(_place("SOURCE", source), setting="SOURCE")
    _check_layout(layout)
    _refuse_filled(folder)
    wants_weights = any(override.startswith(_INITIAL) for override in overrides)
    model = open_foreign(source, layout=layout, with_optimizer=not wants_weights, setting="SOURCE")
    statistics = _statistics(latent_statistics)
    found = described(model, statistics)
    given = {override.partition("=")[0] for override in overrides}
    _check_heads(model, found, overrides)
    continues = not lacking(model)
    tree = merged(found.tree, _of_run(folder, model, continues=continues))
    config = section_of(Config, [tree], overrides, source=str(source), cross_checks=CROSS_CHECKS)
    _check_places(config, folder, source, continues=continues)
    _check_latents(model, found, config, statistics)
    notes = [*model.notes, *found.notes_beside(given), *check_positions(model, config.model)]
    if model.optimizer is not None and not continues:
        absent = listed(lacking(model))
        notes.append(f"Adam's state is not taken over: there is no {absent} to go on with")
    with _new_folder(folder) as making:
        notes += _write(making, model, config, continues=continues)
    return _report(model, config, notes, continues=continues)


def _place(name: str, path: Path) -> Path:
    try:
        return expanded(path)
    except ValueError as error:
        raise OutputError(f"{name} {path}: {error}") from error


def _check_layout(layout: str | None) -> None:
    if layout is not None and layout not in LAYOUTS:
        reason = f"unknown layout '{layout}'; {nearest(layout, LAYOUTS)}"
        raise ConfigError("import", [Fault("--layout", reason)])


def _statistics(path: Path | None) -> LatentStatistics | None:
    return None if path is None else read_latent_statistics(_place("--latent-statistics", path))


def _refuse_filled(folder: Path) -> None:
    if folder.is_symlink() and not folder.exists():
        raise OutputError(f"{folder} is a link to a folder that does not exist; make that folder")
    with writing(folder, cure=_CURE):
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if folder.exists() and Path.cwd().is_relative_to(folder.resolve()):
        raise OutputError(f"{folder} is where this command runs; choose another FOLDER")
    if names:
        raise OutputError(
            f"{folder} is not empty ({listed(names, most=3)}); choose another FOLDER, in which the "
            "run is made"
        )


def _check_heads(model: ForeignModel, found: Described, overrides: Iterable[str]) -> None:
    """Raises ConfigError for heads that no shape shows and neither file nor override tells."""
    of_model = [o for o in overrides if o.partition("=")[0].partition(".")[0] == "model"]
    sizes = apply_overrides({}, of_model).get("model") or {}
    if found.lacks_heads and isinstance(sizes, Mapping) and sizes.get("num_heads") is None:
        reason = "sizes of no variant, and the number of heads changes no shape; give it"
        raise ConfigError(str(model.path), [Fault("model.num_heads", reason)])


def _check_latents(
    model: ForeignModel, found: Described, config: Config, statistics: LatentStatistics | None
) -> None:
    """Raises ConfigError for a scale of latents that is not known, or is of another model."""
    codec, faults = config.codec, []
    of_vae = {"codec.scale": codec.scale, "codec.shift": codec.shift}
    missing = [name for name, value in of_vae.items() if value is None]
    if found.lacks_latent_statistics and codec.kind == "vae" and missing:
        reason = (
            "iREPA scales each channel of its latents by statistics that the file does not hold; "
            "give --latent-statistics with its sdvae-ft-mse-f8d4-latents-stats.pt, or codec.scale "
            "and codec.shift"
        )
        faults.append(Fault(missing[0], reason))
    if statistics is not None and codec.kind == "identity":
        reason = "codec.kind is identity, which scales nothing; leave it out"
        faults.append(Fault("--latent-statistics", reason))
    elif statistics is not None and len(statistics[0]) != config.model.in_channels:
        reason = (
            f"is of {len(statistics[0])} channels, and the model's latents have "
            f"{config.model.in_channels}; give the file of its own latents"
        )
        faults.append(Fault("--latent-statistics", reason))
    if faults:
        raise ConfigError(str(model.path), faults)


def _of_run(folder: Path, model: ForeignModel, *, continues: bool) -> Tree:
    run: Tree = {"run": {"folder": unexpanded(folder)}}
    if continues:
        return {**run, "sample": {"source": "checkpoint"}}
    kind: WeightsKind = "ema" if "ema" in model.weights else "model"
    path = unexpanded(RunFolder(folder).export())
    return {**run, "train": {"init_from": {"path": path, "weights": kind}}}


def _check_places(config: Config, folder: Path, source: Path, *, continues: bool) -> None:
    """Raises ConfigError if an override leads away from the folder that is made."""
    initial = config.train.init_from
    faults = []
    if config.run.folder != folder:
        faults.append(Fault("run.folder", f"is FOLDER, {folder}; leave it out"))
    if initial is None and not continues:
        reason = (
            "is the model that is made of SOURCE; do not set it to null, nor the whole section "
            "train: give single fields, as in train.steps=100"
        )
        faults.append(Fault(_INITIAL, reason))
    if initial is not None and initial.path != RunFolder(folder).export():
        faults.append(
            Fault(f"{_INITIAL}.path", "is the model that is made of SOURCE; leave it out")
        )
    if faults:
        raise ConfigError(str(source), faults)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder that takes the name `folder` when the block ends; after an error none is left.

    What a kill leaves is in the hidden folder beside it, which the next attempt clears.
    """
    # An empty folder behind a link is replaced, not the link.
    place = Path(os.path.realpath(folder)) if folder.exists() else folder
    aside = place.with_name(f".{place.name}.importing")
    with claimed(aside, doing="importing into", cure=_CURE, otherwise=", or choose another FOLDER"):
        with writing(folder, cure=_CURE):
            _empty(aside)
        try:
            yield aside
            with writing(folder, cure=_CURE):
                flush_to_disk(aside)
                aside.rename(place)
                flush_to_disk(place.parent)
        except BaseException:
            if aside.exists():
                _empty(aside)
            raise


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _write(
    folder: Path, model: ForeignModel, config: Config, *, continues: bool
) -> tuple[str, ...]:
    """Writes the weights and then `config.yaml` into `folder`, and returns notes."""
    run, objective = RunFolder(folder), _objective(config)
    if continues:
        notes = save_as_checkpoint(
            run.checkpoints,
            model,
            objective,
            batch_size=config.train.batch_size,
            config=to_tree(config),
        )
    else:
        kind = _kind(model, config)
        notes = save_as_export(run.export(), model, objective, kind=kind, config=to_tree(config))
    with writing(folder, cure=_CURE):
        write_aside(run.config, lambda aside: aside.write_text(to_yaml(config), encoding="utf-8"))
    return notes


def _objective(config: Config) -> Objective:
    """Returns the module to be trained without its values: its names and shapes are looked at."""
    teachers = tuple(
        TeacherShape(alignment.teacher.resolved.width, config.model.grid)
        for alignment in config.alignments
    )
    with torch.device("meta"):
        return Objective(config.model, config.objective, config.alignments, teachers=teachers)


def _kind(model: ForeignModel, config: Config) -> WeightsKind:
    initial = config.train.init_from
    kind: WeightsKind = "ema" if "ema" in model.weights else "model"
    if initial is not None:
        kind = initial.weights
    if kind not in model.weights:
        raise CheckpointError(
            f"{model.path} does not hold '{kind}', but {listed(model.weights)}; set "
            f"{_INITIAL}.weights to match"
        )
    return kind


def _report(model: ForeignModel, config: Config, notes: Iterable[str], *, continues: bool) -> str:
    """Returns what was found and made, what was assumed, and what to do next."""
    run = config.run_folder
    step = "no step is told" if model.step is None else f"step {model.step:,}"
    moments = "Adam's state" if continues else "no state of an optimizer"
    made = f"checkpoints/step-{model.step:07d}" if continues else run.export().name
    file = shlex.quote(str(run.config))
    train = "goes on" if continues else "starts from these weights"
    return "\n".join(
        (
            f"{model.path}: layout {model.layout}; {step}; {listed(model.weights)}; {moments} "
            "is taken over",
            f"{config.run.folder} holds {made} and config.yaml",
            *(f"  note: {note}" for note in dict.fromkeys(notes)),
            "next:",
            f"  srepa-ds config {file}    # read what was made of the file's settings",
            f"  srepa-ds train {file}     # {train}, once {config.data.folder} is prepared",
            f"  srepa-ds sample {file}    # draws images",
        )
    )
