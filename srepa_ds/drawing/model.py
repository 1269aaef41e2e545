"""The weights a set is drawn with, the model's and the guide's, and the settings they allow."""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from srepa_ds.checkpoint.folder import STATE, fault_of
from srepa_ds.codec.config import CodecConfig
from srepa_ds.config.experiment import Config
from srepa_ds.config.sections import SampleConfig
from srepa_ds.distributed import ranks
from srepa_ds.encoders.published import local_model
from srepa_ds.errors import CheckpointError, ConfigError, Fault, listed
from srepa_ds.objective import ObjectiveConfig
from srepa_ds.optim.ema import MAIN_EMA
from srepa_ds.sampling.state import StateLayout
from srepa_ds.schema import to_tree
from srepa_ds.weights.exported import DOCUMENT, ExportedModel, read_model
from srepa_ds.weights.foreign.folders import is_foreign_folder
from srepa_ds.weights.from_checkpoint import chosen_checkpoint, read_model_of_checkpoint
from srepa_ds.weights.from_file import KINDS, read_model_of_file

log = logging.getLogger("srepa_ds")


@dataclass(frozen=True)
class Models:
    """The model of a set, and the guide of autoguidance if there is one; on the CPU."""

    place: Path
    """The folder or file that holds the model."""

    model: ExportedModel
    guide: ExportedModel | None

    @property
    def step(self) -> int | None:
        """The training step of the model, if that is known."""
        return self.model.provenance["step"]


def open_models(config: Config) -> Models:
    """Returns the models that the section `sample` names. Collective.

    Raises SRepaError on all ranks alike: for weights that are missing, damaged or not finite, for
    settings that do not suit them, and for ranks that read different weights.
    """
    # One rank chooses: a training that goes on may write another checkpoint meanwhile.
    place = ranks.on_main(_place_of, config)
    models = ranks.together(_read, config, place)
    hashes = {"model": models.model.sha256}
    if models.guide is not None:
        hashes["guide"] = models.guide.sha256
    ranks.check_same(hashes, what="ranks read different weights; give all of them the same files")
    return models


def _place_of(config: Config) -> Path:
    """Returns the folder or file of the model.

    Raises CheckpointError without a checkpoint, DataError for a repository that was not fetched.
    """
    if config.sample.source == "checkpoint":
        return chosen_checkpoint(config.run_folder.checkpoints, config.export.step)
    if config.sample.weights is not None:
        return local_model(config.sample.weights, setting="sample.weights")
    return config.weights_folder


def _read(config: Config, place: Path) -> Models:
    """Returns the models; raises SRepaError as `open_models` does."""
    model = _READERS[_form_of(config, place)](config, place)
    for schema, name in ((ObjectiveConfig, "objective"), (CodecConfig, "codec")):
        # Only these two: others name files that may be absent where the model is used.
        model.document.section(schema, name)
    _refuse_broken(model, place)
    guide = _guide(config)
    if guide is not None:
        assert config.sample.guide is not None
        _refuse_broken(guide, config.sample.guide)
        _check_guide(config.sample.guide, guide, model)
    _check_settings(config.sample, place, model, has_guide=guide is not None)
    return Models(place, model, guide)


def _form_of(config: Config, place: Path) -> str:
    if config.sample.source == "checkpoint":
        return "checkpoint"
    return "file" if place.is_file() or is_foreign_folder(place) else "export"


def _of_checkpoint(config: Config, place: Path) -> ExportedModel:
    export = config.export
    return read_model_of_checkpoint(
        place, weights=export.weights, power_sigma=export.power_sigma, schema=Config
    )


def _of_file(config: Config, place: Path) -> ExportedModel:
    weights = config.export.weights
    if config.export.power_sigma is not None:
        reason = "is made of a run's checkpoints, which a file of weights has none of; set null"
        raise ConfigError("configuration", [Fault("export.power_sigma", reason)])
    if weights not in KINDS:
        reason = f"'{weights}': of a file of weights, choose {' or '.join(KINDS)}"
        raise ConfigError("configuration", [Fault("export.weights", reason)])
    return read_model_of_file(place, weights=weights, config=to_tree(config))


_READERS: Mapping[str, Callable[[Config, Path], ExportedModel]] = {
    "export": lambda config, place: read_model(place),
    "checkpoint": _of_checkpoint,
    "file": _of_file,
}


def _guide(config: Config) -> ExportedModel | None:
    """Returns the guide, if one is given and used; raises CheckpointError."""
    place = config.sample.guide
    if place is None:
        return None
    if config.sample.cfg_scale <= 1:
        log.warning("sample.guide has no effect with cfg_scale 1; set cfg_scale above 1")
        return None
    place = local_model(place, setting="sample.guide")
    # Unlike the methods of Path, these are False for whatever cannot be looked at.
    if os.path.isfile(place) or is_foreign_folder(place):
        # Not `export.weights`: that chooses the model's, and a plain file holds but one kind.
        return read_model_of_file(
            place, weights=MAIN_EMA, config=to_tree(config), setting="sample.guide"
        )
    if os.path.isfile(place / STATE):
        if fault := fault_of(place):
            raise CheckpointError(f"sample.guide: {place} is not valid: {fault}; choose another")
        return read_model_of_checkpoint(place, weights=MAIN_EMA, power_sigma=None, schema=Config)
    return _exported_guide(place)


def _exported_guide(place: Path) -> ExportedModel:
    try:
        return read_model(place)
    except CheckpointError as error:
        if os.path.exists(place / DOCUMENT):
            raise
        raise CheckpointError(
            f"sample.guide: {error}, or give a checkpoint (`.../checkpoints/step-0050000`) or a "
            "file of weights"
        ) from error


def _refuse_broken(found: ExportedModel, place: Path) -> None:
    """Raises CheckpointError if weights are NaN or infinite."""
    weights = found.model.named_parameters()
    broken = [name for name, weight in weights if not weight.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{place}: not finite: {listed(broken)}; choose weights from before the run diverged"
        )


def _check_guide(place: Path, guide: ExportedModel, model: ExportedModel) -> None:
    """Raises ConfigError unless the guide's velocity can stand beside the model's."""
    there, here = _space_of(guide), _space_of(model)
    differing = [
        f"{name} {there[name]}, not {here[name]}" for name in here if there[name] != here[name]
    ]
    if differing:
        reason = (
            f"{place} has {listed(differing, '; ')}; give a guide that was trained on the "
            "latents, classes and path of the model"
        )
        raise ConfigError("configuration", [Fault("sample.guide", reason)])


def _space_of(found: ExportedModel) -> dict[str, object]:
    """Returns what two models must share to guide each other."""
    sizes = found.model.config
    return {
        "latents of": sizes.latent_shape,
        "number of classes": sizes.num_classes,
        "class_token_width": sizes.class_token_width,
        "path": found.document.section(ObjectiveConfig, "objective").interpolant.path,
        "codec": found.document.section(CodecConfig, "codec").kind,
    }


def _check_settings(
    config: SampleConfig, place: Path, model: ExportedModel, *, has_guide: bool
) -> None:
    """Raises ConfigError for settings that the model cannot follow."""
    sizes = model.model.config
    if config.cls_cfg_scale and sizes.class_token_width is None:
        reason = f"guides a class token, but the model in {place} has none; set 0"
        raise ConfigError("configuration", [Fault("sample.cls_cfg_scale", reason)])
    unknown = sorted({label for label in config.labels or () if label >= sizes.num_classes})
    if unknown:
        reason = (
            f"{listed(map(str, unknown))}: the model in {place} has {sizes.num_classes} "
            f"classes, 0 to {sizes.num_classes - 1}"
        )
        raise ConfigError("configuration", [Fault("sample.labels", reason)])
    # Refuses more channels than there are.
    StateLayout.of(sizes).guidance_scales(config.guidance)
    dropout = model.document.section(ObjectiveConfig, "objective").label_dropout
    if config.cfg_scale > 1 and dropout == 0 and not has_guide:
        reason = (
            f"guides by the velocity without a class, which the model in {place} was not trained "
            "for (its objective.label_dropout is 0); set 1, or give a weaker model as sample.guide"
        )
        raise ConfigError("configuration", [Fault("sample.cfg_scale", reason)])
