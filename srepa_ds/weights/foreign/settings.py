"""From what a file tells of its training to the tree of an experiment.

A setting that is not told, or has no counterpart here, is a note for the user; none is guessed in
silence.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from srepa_ds.encoders.table import TEACHERS
from srepa_ds.errors import CheckpointError, listed
from srepa_ds.sampling.presets import PRESETS
from srepa_ds.trees import Tree
from srepa_ds.weights.foreign.model import ForeignModel
from srepa_ds.weights.foreign.sizes import Sizes, sizes_of
from srepa_ds.weights.lazy import shapes_of

VAE = "stabilityai/sd-vae-ft-mse"
_PIXELS_PER_LATENT = 8
_STEPS, _BATCH_SIZE = 400_000, 256
_LABEL_DROPOUT = 0.1
# Names of iREPA's trainer; the others are those of `TEACHERS`, in other cases of letters.
_TEACHERS = {
    "dino-vit-b": "dinov1-vit-b",
    **{f"dinov3-vit-{s}16": f"dinov3-vit-{s}" for s in "sbl"},
}
_VELOCITIES = ("v", "velocity")
_PRECISIONS = {"no": "fp32", "fp16": "bf16_autocast", "bf16": "bf16_autocast"}

LatentStatistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Scale and shift of each channel of the latents."""


@dataclass(frozen=True)
class Described:
    """An experiment, as far as a file describes it."""

    tree: Tree
    """Without `run` and without initial weights."""

    notes: tuple[str, ...]
    """What was assumed or left out, for the user to read."""

    lacks_heads: bool
    """Whether the number of heads is not known, which changes no shape."""

    lacks_latent_statistics: bool
    """Whether the latents were scaled by numbers that the file does not hold (iREPA)."""


@dataclass
class _Told:
    """The settings of a trainer, and which of them were used."""

    values: Mapping[str, Any]
    used: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def take(self, *names: str) -> Any:
        """Returns the first of the settings that is there, as a plain value, or None."""
        self.used |= {*names}
        found = next((self.values[name] for name in names if name in self.values), None)
        return found.item() if isinstance(found, Tensor) and found.numel() == 1 else found

    def number(self, *names: str) -> Any:
        """Returns a setting that is a number; None, and a note, for anything else."""
        found = self.take(*names)
        if found is None or (isinstance(found, int | float) and not isinstance(found, bool)):
            return found
        self.notes.append(f"{names[0]} {str(found)[:80]!r} is no number: not taken over")
        return None

    def rest(self) -> list[str]:
        """Returns the names of settings that were not used."""
        return [name for name in self.values if name not in self.used and not name.startswith("_")]


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
    told = _Told(model.settings)
    _check_prediction(told, model)
    input_size, resolution = _sides(told, model, sizes)
    family = _family(model, sizes)
    tree: Tree = {
        "data": _data(told, resolution),
        "codec": _codec(told, sizes, statistics),
        "model": _model(told, sizes, input_size),
        "objective": _objective(told),
        "alignments": _alignments(told, sizes, family),
        "optimizer": _optimizer(told, model, family),
        "ema": _ema(told),
        "train": _train(told, model),
        "engine": _engine(told),
    }
    tree["sample"] = _sample(family, tree["codec"])
    tree["run"] = {} if (seed := told.number("seed", "global_seed")) is None else {"seed": seed}
    if rest := told.rest():
        told.notes.append(f"not taken over: {listed(rest, most=60)}")
    scaled = family == "irepa" and tree["codec"]["kind"] == "vae" and statistics is None
    return Described(
        tree,
        tuple(told.notes),
        lacks_heads=sizes.variant is None and "num_heads" not in tree["model"],
        lacks_latent_statistics=scaled and bool(model.settings),
    )


def _family(model: ForeignModel, sizes: Sizes) -> str:
    """Returns the row of `PRESETS` that its authors draw with."""
    if sizes.class_token_width is not None:
        return "reg"
    kinds = {projector.settings["kind"] for projector in sizes.projectors}
    if "projection_layer_type" in model.settings or kinds & {"conv", "linear"}:
        return "irepa"
    return "sit" if model.layout != "repa" else "repa"


def _check_prediction(told: _Told, model: ForeignModel) -> None:
    prediction = told.take("prediction")
    if prediction is not None and prediction not in _VELOCITIES:
        raise CheckpointError(
            f"{model.path} predicts '{prediction}'; only a model of the velocity can go on here"
        )


def _sides(told: _Told, model: ForeignModel, sizes: Sizes) -> tuple[int | None, int | None]:
    """Returns the sides of latents and of images."""
    factor = 1 if sizes.in_channels == 3 else _PIXELS_PER_LATENT
    resolution, input_size = told.number("resolution", "image_size"), told.number("input_size")
    if input_size is None and model.num_positions is not None:
        input_size = sizes.input_size(model.num_positions)
    if input_size is None and resolution is not None:
        input_size = int(resolution) // factor
    if input_size is None:
        told.notes.append("the size of its latents is not known: give model.input_size")
        return None, resolution
    return input_size, resolution or input_size * factor


def _data(told: _Told, resolution: int | None) -> Tree:
    folder = f"data/imagenet{resolution or 256}/train"
    told.notes.append(f"data.folder is not in it: taken to be {folder}")
    workers = told.number("num_workers")
    return {"folder": folder, **({} if workers is None else {"num_workers": workers})}


def _codec(told: _Told, sizes: Sizes, statistics: LatentStatistics | None) -> Tree:
    told.take("vae")
    if sizes.in_channels == 3:
        told.notes.append("3 channels are taken to be pixels (codec.kind: identity)")
        return {"kind": "identity"}
    if sizes.in_channels != 4:
        told.notes.append(
            f"latents of {sizes.in_channels} channels are of no VAE that is known here: "
            "codec.kind is stored, which cannot decode them"
        )
        return {"kind": "stored", **_scaled(statistics)}
    return {"kind": "vae", "weights": VAE, **_scaled(statistics)}


def _scaled(statistics: LatentStatistics | None) -> Tree:
    return {} if statistics is None else {"scale": [*statistics[0]], "shift": [*statistics[1]]}


def _model(told: _Told, sizes: Sizes, input_size: int | None) -> Tree:
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


def _objective(told: _Told) -> Tree:
    path, weighting = told.take("path_type"), told.take("weighting")
    beta, dropout = told.number("cls"), told.number("class_dropout_prob")
    second, is_used_twice = told.number("cfg_prob"), told.take("legacy")
    if is_used_twice and second is not None:
        # Once by the trainer and once more by the model.
        dropout = round(1 - (1 - _LABEL_DROPOUT) * (1 - second), 12)
        told.notes.append(f"legacy: labels were dropped twice, which is one dropout of {dropout:g}")
    elif second not in (None, _LABEL_DROPOUT):
        told.notes.append(
            f"cfg_prob {second:g} never reached the model, which dropped {_LABEL_DROPOUT:g} of the "
            "labels"
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


def _alignments(told: _Told, sizes: Sizes, family: str) -> list[Tree]:
    named, depth = told.take("enc_type"), told.number("encoder_depth")
    weight = _pointwise_weight(told)
    is_off = told.take("repa_loss") is False
    told.take("projection_layer_type", "projector_embed_dims")
    norm, gamma = told.take("spnorm_method"), told.number("zscore_alpha")
    if is_off or not isinstance(named, str) or named.lower() in ("", "none"):
        if sizes.projectors:
            told.notes.append(
                "there are projectors, but no alignment that they belong to is told: alignments is "
                "empty"
            )
        return []
    spatial_norm: Tree = {}
    if norm == "zscore":
        spatial_norm = {"spatial_norm": {"gamma": 1.0 if gamma is None else gamma}}
    elif norm not in (None, "none"):
        told.notes.append(f"spnorm_method '{norm}' is not here: tokens are not normalised")
    pointwise = {"weight": weight, **({"include_cls": True} if family == "reg" else {})}
    rest = {"pointwise": pointwise, **({} if depth is None else {"depth": depth}), **spatial_norm}
    teachers = [_teacher(name.strip(), told) for name in named.split(",")]
    projectors = [{"projector": dict(p.settings)} for p in sizes.projectors]
    projectors += [{}] * (len(teachers) - len(projectors))
    return [
        {"teacher": {"name": name}, **own, **rest}
        for name, own in zip(teachers, projectors, strict=False)
    ]


def _teacher(name: str, told: _Told) -> str:
    """Returns a name of `TEACHERS`; what is none of them will be refused where it is validated."""
    found = _TEACHERS.get(name.lower(), name.lower())
    if found in TEACHERS and found != name:
        told.notes.append(f"the teacher {name} is {found} here")
    return found


def _pointwise_weight(told: _Told) -> float:
    """Returns the factor of the cosine; iREPA lists one for each of its losses."""
    told.take("projection_loss_type")
    given = told.take("proj_coeff")
    parts = given.split(",") if isinstance(given, str) else [given]
    try:
        factors = [float(part) for part in parts]
    except (TypeError, ValueError):
        told.notes.append("the factor of the alignment (proj_coeff) is not told: 0.5, as in REPA")
        return 0.5
    if len(factors) > 1:
        told.notes.append(f"proj_coeff {given} is of several losses, all cosines: their sum")
    return sum(factors)


def _optimizer(told: _Told, model: ForeignModel, family: str) -> Tree:
    """Returns the section `optimizer`; the state of AdamW tells more than the arguments."""
    kept = _Told(model.optimizer.settings if model.optimizer else {})
    betas = kept.take("betas") or (told.number("adam_beta1"), told.number("adam_beta2"))
    told.take("adam_beta1", "adam_beta2")
    clipping = told.number("max_grad_norm")
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


def _ema(told: _Told) -> Tree:
    decay, every = told.number("ema_decay"), told.number("ema_update_freq")
    if every not in (None, 1):
        told.notes.append(f"the average moved every {every} steps there, here it does at each step")
    return {} if decay is None else {"decay": decay}


def _train(told: _Told, model: ForeignModel) -> Tree:
    steps = told.number("max_train_steps")
    batch_size = told.number("batch_size", "global_batch_size")
    accumulation = told.number("gradient_accumulation_steps") or 1
    assumed = {"train.steps": (steps, _STEPS), "train.batch_size": (batch_size, _BATCH_SIZE)}
    for name, (value, default) in assumed.items():
        if value is None:
            told.notes.append(f"{name} is not in it: {default:,}")
    steps, batch_size = steps or _STEPS, (batch_size or _BATCH_SIZE) * accumulation
    if model.step is not None and model.step >= steps:
        told.notes.append(f"it has taken all of its {steps:,} steps: raise train.steps to go on")
    return {
        "steps": steps,
        "batch_size": batch_size,
        **({"accumulation_steps": accumulation} if accumulation != 1 else {}),
    }


def _engine(told: _Told) -> Tree:
    told.take("allow_tf32", "compile")
    given = told.take("mixed_precision")
    precision = _PRECISIONS.get(str(given), "bf16_autocast")
    origin = "its precision is not told" if given is None else f"mixed_precision was {given}"
    told.notes.append(f"engine.precision: {precision} ({origin})")
    return {"precision": precision}


def _sample(family: str, codec: Tree) -> Tree:
    decoder = PRESETS[family].decoder
    own = {"decoder": decoder} if codec["kind"] == "vae" and decoder != VAE else {}
    return {"preset": family, **own}
