"""From the settings of REPA's, REG's and iREPA's trainers to the alignments of an experiment."""

from typing import Any

from srepa_ds.encoders.table import TEACHERS
from srepa_ds.trees import Tree
from srepa_ds.weights.foreign.sizes import Sizes
from srepa_ds.weights.foreign.told import Told

# Names of iREPA's trainer; the others are those of `TEACHERS`, in other cases of letters.
_TEACHERS = {
    "dino-vit-b": "dinov1-vit-b",
    **{f"dinov3-vit-{s}16": f"dinov3-vit-{s}" for s in "sbl"},
}
# The default of iREPA's trainer of latents.
_GAMMA = 0.6


def alignments_of(told: Told, sizes: Sizes) -> list[Tree]:
    """Returns the experiment's alignments, one for each encoder that the trainer names.

    There are none, and a note if there are projectors, where it names no encoder.
    """
    named, depth = told.take("enc_type"), told.number("encoder_depth")
    factors, losses = told.take("proj_coeff"), told.take("projection_loss_type")
    is_off = told.take("repa_loss") is False
    told.take("projection_layer_type", "proj_kwargs_kernel_size")
    norm, gamma = told.take("spnorm_method"), told.number("zscore_alpha")
    if is_off or not isinstance(named, str) or named.lower() in ("", "none"):
        if sizes.projectors:
            told.note(
                "there are projectors, but no alignment is told that they belong to: alignments is "
                "empty",
                "alignments",
            )
        return []
    spatial_norm: Tree = {}
    if norm == "zscore":
        spatial_norm = {"spatial_norm": {"gamma": _GAMMA if gamma is None else gamma}}
        if gamma is None:
            told.note(
                f"zscore_alpha is not told: {_GAMMA}, as in iREPA's trainer of latents",
                "alignments.0.spatial_norm.gamma",
            )
    elif norm not in (None, "none"):
        told.note(f"spnorm_method '{norm}' is not here: tokens are not normalised")
    if losses is not None and {*str(losses).split(",")} != {"cosine"}:
        told.note(f"projection_loss_type '{losses}' is not here: the cosine takes its place")
    pointwise = {
        "weight": _pointwise_weight(factors, told),
        **({"include_cls": True} if sizes.class_token_width is not None else {}),
    }
    rest = {"pointwise": pointwise, **({} if depth is None else {"depth": depth}), **spatial_norm}
    teachers = [_teacher(name.strip(), told) for name in named.split(",")]
    projectors = [{"projector": dict(p.settings)} for p in sizes.projectors]
    projectors += [{}] * (len(teachers) - len(projectors))
    return [
        {"teacher": {"name": name}, **own, **rest}
        for name, own in zip(teachers, projectors, strict=False)
    ]


def _teacher(name: str, told: Told) -> str:
    """Returns a name of `TEACHERS`; what is none of them will be refused where it is validated."""
    found = _TEACHERS.get(name.lower(), name.lower())
    if found in TEACHERS and found != name:
        told.note(f"the teacher {name} is {found} here")
    return found


def _pointwise_weight(given: Any, told: Told) -> float:
    """Returns the factor of the cosine; iREPA lists one for each of its losses."""
    parts = given.split(",") if isinstance(given, str) else [given]
    try:
        factors = [float(part) for part in parts]
    except (TypeError, ValueError, OverflowError):
        told.note(
            "the factor of the alignment (proj_coeff) is not told: 0.5, as in REPA",
            "alignments.0.pointwise.weight",
        )
        return 0.5
    if len(factors) > 1:
        told.note(f"proj_coeff {given} is of several losses, all cosines: their sum")
    return sum(factors)
