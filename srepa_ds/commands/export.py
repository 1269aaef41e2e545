"""`srepa-ds export`: a checkpoint's weights in a format that other programs read."""

import logging
from collections.abc import Mapping
from pathlib import Path

from srepa_ds.codec.config import CodecConfig
from srepa_ds.config.experiment import Config
from srepa_ds.data.shard_index import read_index
from srepa_ds.encoders.published import local_folder
from srepa_ds.errors import DataError
from srepa_ds.report.model_card import CARD_FORMATS, write_card
from srepa_ds.schema import validated
from srepa_ds.weights.formats import EXPORT_FORMATS, ExportRequest
from srepa_ds.weights.from_checkpoint import (
    CheckpointWeights,
    chosen_checkpoint,
    read_checkpoint_weights,
)
from srepa_ds.weights.pushing import Push, push_model

log = logging.getLogger("srepa_ds")


def export(config: Config, *, replace: bool = False, push: Push | None = None) -> Path:
    """Writes the weights and returns their folder or file; needs neither GPU nor process group.

    With `push`, uploads the folder afterwards. A model of another run is replaced, here as there,
    only if `replace` says so. Raises CheckpointError without a valid checkpoint, or for a model
    that the format cannot hold, and OutputError if the folder cannot be written or uploaded.
    """
    settings = config.export
    if push is not None:
        push.check(settings.format)
    source = read_checkpoint_weights(
        chosen_checkpoint(config.run_folder.checkpoints, settings.step),
        weights=settings.weights,
        power_sigma=settings.power_sigma,
        schema=Config,
    )
    if settings.format == "diffusers":
        vae, class_names = _vae(config, source), _class_names(config, source)
        solver = config.sample.solver
        request = ExportRequest(source, settings, replace, vae, solver, class_names)
    else:
        request = ExportRequest(source, settings, replace)
    written = EXPORT_FORMATS[settings.format](config.export_folder, request)
    facts = source.provenance
    log.info("exported %s of step %d to %s", facts["weights"], facts["step"], written)
    if settings.format in CARD_FORMATS:
        write_card(config, source, name=None if push is None else push.name)
    if push is not None:
        message = f"step {facts['step']} of {config.run.folder.absolute().name}"
        pushed = push_model(config.export_folder, push, message=message, replace=replace)
        log.info("pushed to %s, commit %s", pushed.address, pushed.commit)
    return written


def _vae(config: Config, source: CheckpointWeights) -> Path | None:
    """Returns the folder of the VAE that `sample` would decode with, or None.

    Warns if the model has one that is not on this machine.
    """
    tree = source.config.get("codec", {})
    codec = validated(CodecConfig, tree, source="the checkpoint: codec")
    if codec.kind != "vae":
        return None
    weights = config.sample.decoder or codec.as_used_here(config.codec).weights
    assert weights is not None
    setting = "sample.decoder" if config.sample.decoder else "codec.weights"
    try:
        return local_folder(weights, setting=setting)
    except DataError as error:
        log.warning(
            "the exported folder is without its VAE: %s; then export again, or copy the VAE's "
            "folder to %s",
            error,
            config.export_folder / "vae",
        )
        return None


def _class_names(config: Config, source: CheckpointWeights) -> Mapping[int, str]:
    """Returns the names of classes that the data set's index has; none without the data set."""
    try:
        names = read_index(config.data.folder).class_names
    except DataError as error:
        log.info("the exported folder is without names of classes: %s", error)
        return {}
    if len(names) != source.config["model"]["num_classes"]:
        return {}
    return dict(enumerate(names))
