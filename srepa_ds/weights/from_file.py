"""A model to draw from in weights of another program, such as REPA's, described by a config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srepa_ds.errors import CheckpointError
from srepa_ds.files import sha256_of
from srepa_ds.model.sit import fixed_position_embedding
from srepa_ds.model.variants import SiTConfig
from srepa_ds.weights.exported import ExportDocument, ExportedModel
from srepa_ds.weights.fit import misfit_of, model_of
from srepa_ds.weights.foreign.folders import sha256_of_weights
from srepa_ds.weights.heads import heads_in
from srepa_ds.weights.initial import WeightsKind, read_initial_weights

_CURE = "set the section `model` to the one these weights were trained with"
KINDS: Mapping[str, WeightsKind] = {"ema": "ema", "master": "model"}
"""The kinds of weights in such a file, as the section `export` and as REPA call them."""
_CHOICES = {
    "sample.weights": "export.weights (ema, or master for `model`)",
    "sample.guide": "sample.guide to a file with one kind of weights,",
}


def read_model_of_file(
    path: Path, *, weights: str, config: Mapping[str, Any], setting: str = "sample.weights"
) -> ExportedModel:
    """Returns the model in a file, or in a folder of another program, on the CPU.

    `weights` is one of `KINDS`, if the file holds both. `config` is the experiment's tree, which
    describes the model. `setting` names the file. Layouts, names, wrappers and pickles are treated
    as in training from such a file; projectors are left out. Raises CheckpointError if the file
    cannot be read, holds NaN, or is of another model.
    """
    tensors = read_initial_weights(
        path,
        which=KINDS[weights],
        setting=setting,
        choice=_CHOICES[setting],
    )
    provenance = {"checkpoint": path.name, "step": None, "weights": weights}
    sha256 = sha256_of_weights(path, setting=setting) if path.is_dir() else sha256_of(path)
    document = ExportDocument(path, config, provenance, sha256, cure=_CURE)
    sizes = document.section(SiTConfig, "model")
    if (heads := heads_in(path)) not in (None, sizes.shape.num_heads):
        raise CheckpointError(
            f"{path} does not fit the model: it has {heads} attention heads, not "
            f"{sizes.shape.num_heads}; {_CURE}"
        )
    tensors["pos_embed"] = fixed_position_embedding(sizes)
    if fault := misfit_of(sizes, tensors):
        raise CheckpointError(f"{path} does not fit the model: {fault}; {_CURE}")
    model = model_of(sizes, tensors, path, cure=_CURE)
    return ExportedModel(model, document, sha256, _described(sizes))


def _described(sizes: SiTConfig) -> dict[str, Any]:
    """Returns the sizes of the model, as they are used: the number of heads changes no shape."""
    latents = {"latent_shape": sizes.latent_shape, "num_classes": sizes.num_classes}
    further = {"class_token_width": sizes.class_token_width, "qk_norm": sizes.qk_norm}
    return {**sizes.shape._asdict(), **latents, **further}
