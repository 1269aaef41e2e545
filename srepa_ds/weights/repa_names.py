"""The names that REPA, REG and iREPA give the weights of a run, in the order of their models."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from srepa_ds.alignment.alignment import AlignmentConfig
from srepa_ds.errors import CheckpointError
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig
from srepa_ds.schema import validated

_PROJECTORS = "projectors."
_AFTER_PROJECTORS = ("final_layer.", "cls_projectors2.", "wg_norm.")
_WITHOUT = "export without them: export.projectors=false"


@dataclass(frozen=True)
class TrainedModel:
    """A model and the alignments it was trained with."""

    sizes: SiTConfig
    alignments: tuple[AlignmentConfig, ...]

    @property
    def is_of_irepa(self) -> bool:
        """Whether iREPA's trainer alone has such projectors or such teachers."""
        return any(a.spatial_norm or a.projector.kind != "mlp" for a in self.alignments)


def trained_model(config: Mapping[str, Any], *, source: Path) -> TrainedModel:
    """Returns the model and alignments of an experiment's tree; raises ConfigError about `source`.

    Nothing else of the tree is looked at.
    """
    sizes = validated(SiTConfig, config["model"], source=f"{source}: model")
    alignments = tuple(
        validated(AlignmentConfig, tree, source=f"{source}: alignments.{number}")
        for number, tree in enumerate(config["alignments"])
    )
    return TrainedModel(sizes, alignments)


def check_fit(model: TrainedModel, *, projectors: bool, source: Path) -> None:
    """Raises CheckpointError about `source` if no model class of REPA, REG or iREPA can hold it.

    They build square models with a projector for each teacher, all of one kind, behind one block.
    """
    _, height, width = model.sizes.latent_shape
    if height != width:
        raise CheckpointError(
            f"{source}: REPA's models take square latents, not {height} x {width}; export it in "
            "another format (export.format)"
        )
    if projectors and (fault := _fault_of_projectors(model)):
        raise CheckpointError(f"{source}: REPA's models cannot hold its projectors: {fault}")


def _fault_of_projectors(model: TrainedModel) -> str | None:
    with_projector = [a for a in model.alignments if a.has_projector]
    carries_cls = model.sizes.class_token_width is not None
    if not with_projector:
        return f"REG's have at least one, this run has none; {_WITHOUT}" if carries_cls else None
    if len(with_projector) < len(model.alignments):
        return f"they have one for each teacher, this run has teachers without; {_WITHOUT}"
    for what, values in (
        ("behind one block", {a.depth for a in with_projector}),
        ("of one kind and size", {a.projector for a in with_projector}),
    ):
        if len(values) > 1:
            return f"theirs are {what}, those of this run are not; {_WITHOUT}"
    if carries_cls and model.is_of_irepa:
        return f"REG's are plain MLPs, those of this run are iREPA's; {_WITHOUT}"
    first = with_projector[0].teacher.resolved.width
    if carries_cls and first != model.sizes.class_token_width:
        return (
            f"REG's class token is as wide as its first teacher's tokens ({first}), this one has "
            f"{model.sizes.class_token_width}; {_WITHOUT}"
        )
    return None


def names_in_order(model: TrainedModel, projectors: Iterable[str]) -> list[str]:
    """Returns the names of all weights in the order of REPA's parameters, `pos_embed` first.

    `projectors` are those of the projectors' weights, which stand before the final layer.
    """
    with torch.device("meta"):
        names = list(SiT(model.sizes).state_dict())
    last = [name for name in names if name.startswith(_AFTER_PROJECTORS)]
    before = [name for name in names if name not in last]
    return [*before, *sorted(projectors, key=_place_of_projector), *last]


def _place_of_projector(name: str) -> tuple[Sequence[int], bool]:
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    return numbers, name.endswith(".bias")


def name_in_file(name: str, model: TrainedModel) -> str:
    """Returns the name that REPA's state_dict has for a weight under its official name here.

    iREPA keeps the layers of a projector in a module of their own.
    """
    if not (model.is_of_irepa and name.startswith(_PROJECTORS)):
        return name
    number, _, rest = name.removeprefix(_PROJECTORS).partition(".")
    layers = rest.removeprefix("projection_layer.")
    return f"{_PROJECTORS}{number}.projection_layer.{layers}"
