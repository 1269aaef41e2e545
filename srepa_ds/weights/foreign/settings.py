"""From what a file tells of its training to the tree of an experiment.

A setting that is not told, or has no counterpart here, is a note for the user; none is guessed in
silence.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from srepa_ds.errors import CheckpointError, listed, printable
from srepa_ds.sampling.presets import PRESETS
from srepa_ds.trees import Tree
from srepa_ds.weights.foreign.alignments import alignments_of
from srepa_ds.weights.foreign.layouts import UNSCALED
from srepa_ds.weights.foreign.model import ForeignModel
from srepa_ds.weights.foreign.sizes import Sizes, sizes_of
from srepa_ds.weights.foreign.told import Note, Told
from srepa_ds.weights.lazy import shapes_of

VAE = "stabilityai/sd-vae-ft-mse"
_PIXELS_PER_LATENT = 8
_STEPS, _BATCH_SIZE = 400_000, 256
_LABEL_DROPOUT = 0.1
_VELOCITIES = ("v", "velocity")
_PRECISIONS = {"no": "fp32", "fp16": "bf16_autocast", "bf16": "bf16_autocast"}

LatentStatistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Scale and shift of each channel of the latents."""


@dataclass(frozen=True)
class Described:
    """An experiment, as far as a file describes it."""

    tree: Tree
    """Without `run` and without initial weights."""

    notes: tuple[Note, ...]

    lacks_heads: bool
    """Whether the number of heads is not known, which changes no shape."""

    lacks_latent_statistics: bool
    """Whether the latents were scaled by numbers that the file does not hold (iREPA)."""

    def notes_beside(self, given: Iterable[str]) -> list[str]:
        """Returns the notes, but for those about settings at or below the paths `given`."""
        inside = tuple(f"{path}." for path in given)
        return [note.text for note in self.notes if not f"{note.place}.".startswith(inside)]


def described(model: ForeignModel, statistics: LatentStatistics | None = None) -> Described:
    """Returns the experiment of a model; `statistics` are those of its latents, if they are known.

    Raises CheckpointError if its shapes are of no SiT, or if it does not predict a velocity.
    """
    weights = next(iter(model.weights.values()))
    try:
        sizes = sizes_of(shapes_of(weights))
    except LookupError as error:
        raise CheckpointError(
            f"{model.path} is of no SiT: '{error.args[0]}' is missing, or of another shape"
        ) from error
    told = Told(model.settings)
    _check_prediction(told, model)
    input_size, resolution = _sides(told, model, sizes)
    family = _family(model, sizes)
    tree: Tree = {
        "data": _data(told, resolution),
        "codec": _codec(told, sizes, statistics, family),
        "model": _model(told, sizes, input_size),
        "objective": _objective(told),
        "alignments": alignments_of(told, sizes),
        "optimizer": _optimizer(told, model, family),
        "ema": _ema(told),
        "train": _train(told, model),
        "engine": _engine(told),
    }
    tree["sample"] = _sample(told, family, tree["codec"])
    tree["run"] = {} if (seed := told.number("seed", "global_seed")) is None else {"seed": seed}
    # Written by this package, beside the trainer's own.
    told.take("run_id", "ema_decay")
    if rest := told.rest():
        told.note(f"not taken over: {listed(rest, most=60)}")
    scaled = family == "irepa" and tree["codec"]["kind"] == "vae" and statistics is None
    return Described(
        tree,
        tuple(told.notes),
        lacks_heads=sizes.variant is None and "num_heads" not in tree["model"],
        lacks_latent_statistics=scaled,
    )


def _family(model: ForeignModel, sizes: Sizes) -> str | None:
    """Returns the row of `PRESETS` that its authors draw with; None if nothing tells the trainer.

    A folder of diffusers may be of any trainer.
    """
    if model.layout == "diffusers":
        return None
    if sizes.class_token_width is not None:
        return "reg"
    kinds = {projector.settings["kind"] for projector in sizes.projectors}
    is_irepa = "projection_layer_type" in model.settings or UNSCALED in model.notes
    if is_irepa or kinds & {"conv", "linear"}:
        return "irepa"
    return "sit" if model.layout != "repa" else "repa"


def _check_prediction(told: Told, model: ForeignModel) -> None:
    prediction = told.take("prediction")
    if prediction is not None and prediction not in _VELOCITIES:
        shown = printable(str(prediction)[:80])
        raise CheckpointError(
            f"{model.path} predicts '{shown}'; only a model of the velocity can go on here"
        )


def _sides(told: Told, model: ForeignModel, sizes: Sizes) -> tuple[int | None, int | None]:
    """Returns the sides of latents and of images."""
    factor = 1 if sizes.in_channels == 3 else _PIXELS_PER_LATENT
    resolution, input_size = told.number("resolution", "image_size"), told.number("input_size")
    if input_size is None and model.positions is not None:
        input_size = sizes.input_size(model.positions.shape[1])
    if input_size is None and resolution is not None:
        input_size = int(resolution) // factor
    if input_size is None:
        told.note("the size of its latents is not told", "model.input_size")
        return None, resolution
    return input_size, input_size if factor == 1 else resolution or input_size * factor


def _data(told: Told, resolution: int | None) -> Tree:
    folder = f"data/imagenet{resolution or 256}/train"
    told.note(f"data.folder is not in it: {folder} is assumed", "data.folder")
    workers = told.number("num_workers")
    return {"folder": folder, **({} if workers is None else {"num_workers": workers})}


def _codec(
    told: Told, sizes: Sizes, statistics: LatentStatistics | None, family: str | None
) -> Tree:
    if sizes.in_channels == 3:
        told.note("3 channels are taken to be pixels (codec.kind: identity)", "codec.kind")
        return {"kind": "identity"}
    if sizes.in_channels != 4:
        told.note(
            f"latents of {sizes.in_channels} channels are of no VAE that is known here: "
            "codec.kind is stored, which cannot decode them",
            "codec.kind",
        )
        if statistics is None:
            told.note(
                "the scale of its latents is not in it, and none is assumed: --latent-statistics "
                "brings one",
                "codec.scale",
            )
        return {"kind": "stored", **_scaled(statistics)}
    if statistics is not None and family != "irepa":
        told.note(
            "nothing in it says that its latents were scaled by statistics, as iREPA's are: those "
            "that were given are taken",
            "codec.scale",
        )
    return {"kind": "vae", "weights": VAE, **_scaled(statistics)}


def _scaled(statistics: LatentStatistics | None) -> Tree:
    return {} if statistics is None else {"scale": [*statistics[0]], "shift": [*statistics[1]]}


def _model(told: Told, sizes: Sizes, input_size: int | None) -> Tree:
    """Returns the section `model`; where shapes and settings tell the same, the shapes count."""
    told.take("model", "num_classes", "qk_norm", "patch_size", "in_channels", "hidden_size")
    told.take("depth", "mlp_ratio", "learn_sigma", "fused_attn")
    heads = told.number("num_heads")
    tree: Tree = {
        "in_channels": sizes.in_channels,
        "num_classes": sizes.num_classes,
        "qk_norm": sizes.qk_norm,
        "class_token_width": sizes.class_token_width,
    }
    if input_size is not None:
        tree["input_size"] = input_size
    if sizes.variant is not None:
        return {"variant": sizes.variant, **tree, **({} if heads is None else {"num_heads": heads})}
    own = {name: getattr(sizes, name) for name in ("depth", "hidden_size", "patch_size")}
    # All of the variant's sizes are overridden.
    return {"variant": "SiT-B/2", **tree, **own, **({} if heads is None else {"num_heads": heads})}


def _objective(told: Told) -> Tree:
    path, weighting = told.take("path_type"), told.take("weighting")
    beta, dropout = told.number("cls"), told.number("class_dropout_prob")
    second, is_used_twice = told.number("cfg_prob"), told.take("legacy")
    if is_used_twice and second is not None:
        # Once by the trainer and once more by the model.
        dropout = round(1 - (1 - _LABEL_DROPOUT) * (1 - second), 12)
        told.note(
            f"legacy: labels were dropped twice, which is one dropout of {dropout:g}",
            "objective.label_dropout",
        )
    elif second not in (None, _LABEL_DROPOUT):
        told.note(
            f"cfg_prob {second:g} never reached the model, which dropped {_LABEL_DROPOUT:g} of the "
            "labels",
            "objective.label_dropout",
        )
    interpolant: Tree = {}
    if path is not None:
        interpolant["path"] = {"gvp": "cosine"}.get(str(path).lower(), str(path).lower())
    if weighting is not None:
        interpolant["time_weighting"] = weighting
    return {
        "interpolant": interpolant,
        "label_dropout": _LABEL_DROPOUT if dropout is None else dropout,
        **({} if beta is None else {"cls_weight": beta}),
    }


def _optimizer(told: Told, model: ForeignModel, family: str | None) -> Tree:
    """Returns the section `optimizer`; the state of AdamW tells more than the arguments."""
    kept = Told(model.optimizer.settings if model.optimizer else {})
    of_state, of_arguments = kept.take("betas"), (told.take("adam_beta1"), told.take("adam_beta2"))
    betas = of_state if isinstance(of_state, tuple | list) else of_arguments
    clipping = told.number("max_grad_norm")
    if clipping is None and family == "sit":
        told.note("SiT's trainer clips no gradient", "optimizer.gradient_clipping")
        told.note("SiT's trainer mirrors half of its images: data.mirror=true does", "data.mirror")
    found = {
        "learning_rate": _first(kept.number("lr"), told.number("learning_rate", "lr")),
        "epsilon": _first(kept.number("eps"), told.number("adam_epsilon")),
        "weight_decay": _first(kept.number("weight_decay"), told.number("adam_weight_decay")),
        "betas": None if None in betas else [*betas],
        "gradient_clipping": 0.0 if clipping is None and family == "sit" else clipping,
    }
    return {name: value for name, value in found.items() if value is not None}


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _ema(told: Told) -> Tree:
    decay, every = told.number("ema_decay"), told.number("ema_update_freq")
    if every not in (None, 1):
        told.note(f"the average moved every {every} steps there, here it does at each step")
    return {} if decay is None else {"decay": decay}


def _train(told: Told, model: ForeignModel) -> Tree:
    steps = told.number("max_train_steps")
    batch_size = told.number("batch_size", "global_batch_size")
    accumulation = _first(told.number("gradient_accumulation_steps"), 1)
    assumed = {"train.steps": (steps, _STEPS), "train.batch_size": (batch_size, _BATCH_SIZE)}
    for name, (value, default) in assumed.items():
        if value is None:
            told.note(f"{name} is not in it: {default:,} is assumed", name)
    steps, batch_size = _first(steps, _STEPS), _first(batch_size, _BATCH_SIZE) * accumulation
    if model.step is not None and model.step >= steps:
        told.note(
            f"it has taken all of its {steps:,} steps: raise train.steps to go on", "train.steps"
        )
    return {
        "steps": steps,
        "batch_size": batch_size,
        **({"accumulation_steps": accumulation} if accumulation != 1 else {}),
    }


def _engine(told: Told) -> Tree:
    given = told.take("mixed_precision")
    precision = _PRECISIONS.get(str(given), "bf16_autocast")
    origin = "its precision is not told" if given is None else f"mixed_precision was {given}"
    told.note(f"engine.precision: {precision} ({origin})", "engine.precision")
    return {"precision": precision}


def _sample(told: Told, family: str | None, codec: Tree) -> Tree:
    if family is None:
        told.note(
            "its trainer is not told: optimizer and sample have the defaults here",
            "sample.preset",
        )
        return {}
    told.note(f"sample.preset: {family}", "sample.preset")
    decoder = PRESETS[family].decoder
    own = {"decoder": decoder} if codec["kind"] == "vae" and decoder != VAE else {}
    return {"preset": family, **own}
