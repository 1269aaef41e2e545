"""Foreign weights as own files: a checkpoint to resume from, or an exported model."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from srepa_ds.checkpoint.saving import save_whole
from srepa_ds.errors import CheckpointError, listed
from srepa_ds.model.sit import fixed_position_embedding
from srepa_ds.model.variants import SiTConfig
from srepa_ds.objective import Objective, official_name
from srepa_ds.optim.ema import MAIN_EMA
from srepa_ds.weights.exported import write_model
from srepa_ds.weights.foreign.model import ForeignModel
from srepa_ds.weights.foreign.positions import refuse_others
from srepa_ds.weights.initial import WeightsKind
from srepa_ds.weights.lazy import LazyTensors, shapes_of

_PROJECTOR = re.compile(r"projectors\.\d+\.")
_MOST_NAMED = 3
# What the trainer calls a kind, if not as a checkpoint does.
_KINDS = {"master": "model"}


def lacking(model: ForeignModel) -> list[str]:
    """Returns what a file lacks of a training that can go on exactly, by the trainer's names."""
    parts = {kind: kind in model.weights for kind in ("model", "ema")}
    parts |= {"opt": model.optimizer is not None, "steps": bool(model.step)}
    return [name for name, is_there in parts.items() if not is_there]


def check_positions(model: ForeignModel, sizes: SiTConfig) -> tuple[str, ...]:
    """Checks that the file's position embedding is the one that is computed here; returns notes.

    Raises CheckpointError if it is another one of the same size, such as a trained one.
    """
    own, there = fixed_position_embedding(sizes), model.positions
    if there is None:
        return ()
    if there.shape != own.shape:
        shapes = f"{tuple(there.shape)} there, {tuple(own.shape)} here"
        return (f"the position embedding is computed anew for another size: {shapes}",)
    refuse_others(there, own, model.path)
    return ()


def save_as_checkpoint(
    root: Path,
    model: ForeignModel,
    objective: Objective,
    *,
    batch_size: int,
    config: Mapping[str, Any],
) -> tuple[str, ...]:
    """Writes a whole training as the checkpoint of its step under `root`, and returns notes.

    Nothing may be `lacking`. `objective` is what will be trained, on any device. Raises
    CheckpointError, naming the weights, if the model is of another shape, and OutputError.
    """
    optimizer = model.optimizer
    assert optimizer is not None
    assert model.step
    kinds: dict[str, Mapping[str, Tensor]] = {
        "master": model.weights["model"],
        MAIN_EMA: model.weights["ema"],
        "exp_avg": optimizer.exp_avg,
        "exp_avg_sq": optimizer.exp_avg_sq,
    }
    wanted = {official_name(n): tuple(p.shape) for n, p in objective.named_parameters()}
    left = _left_over(objective, model.weights["model"])
    for kind, tensors in kinds.items():
        found = {name: shape for name, shape in shapes_of(tensors).items() if name not in left}
        _check(wanted, found, f"{model.path}: {_KINDS.get(kind, kind)}")
    shapes = {name: tuple(p.shape) for name, p in objective.named_parameters()}
    save_whole(
        root,
        step=model.step,
        shapes=shapes,
        kinds={k: lambda name, of=t: of[official_name(name)] for k, t in kinds.items()},
        state={
            "samples_seen": model.step * batch_size,
            "adam_step": optimizer.step,
            "config": config,
            # Unknown hashes of data and teachers are taken to be equal when it resumes.
            "identity": {},
        },
    )
    return _notes(left, "left out, with their moments: no alignment has a projector")


def save_as_export(
    folder: Path,
    model: ForeignModel,
    objective: Objective,
    *,
    kind: WeightsKind,
    config: Mapping[str, Any],
) -> tuple[str, ...]:
    """Writes the weights of one kind as an exported model, projectors included; returns notes.

    Raises CheckpointError, naming the weights, if the model is of another shape, and OutputError.
    """
    tensors = model.weights[kind]
    wanted = {official_name(n): tuple(p.shape) for n, p in objective.named_parameters()}
    left = _left_over(objective, tensors)
    random = [n for n in wanted if _PROJECTOR.match(n) and n not in tensors]
    needed = {name: shape for name, shape in wanted.items() if name not in random}
    found = {name: shape for name, shape in shapes_of(tensors).items() if name not in left}
    _check(needed, found, str(model.path))
    write_model(
        folder,
        _with_positions(tensors, objective.sit.config),
        config=config,
        provenance={
            "checkpoint": model.path.name,
            "step": model.step or 0,
            "weights": MAIN_EMA if kind == "ema" else "master",
            "imported_from": model.layout,
        },
    )
    return (
        *_notes(left, "kept, but no alignment has a projector"),
        *_notes(random, "not in it: they start at random"),
    )


def _with_positions(tensors: Mapping[str, Tensor], sizes: SiTConfig) -> LazyTensors:
    positions = fixed_position_embedding(sizes)
    shapes = {**shapes_of(tensors), "pos_embed": tuple(positions.shape)}
    return LazyTensors(shapes, lambda name: positions if name == "pos_embed" else tensors[name])


def _left_over(objective: Objective, tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of projectors where none is trained."""
    has_any = any(_PROJECTOR.match(official_name(n)) for n, _ in objective.named_parameters())
    return [] if has_any else [name for name in tensors if _PROJECTOR.match(name)]


def _notes(names: Iterable[str], what: str) -> tuple[str, ...]:
    numbers = sorted({name.split(".")[1] for name in names}, key=int)
    return (f"projectors {listed(numbers)}: {what}",) if numbers else ()


def _check(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], place: str
) -> None:
    """Raises CheckpointError about `place` unless names and shapes are those that are wanted."""
    if faults := list(_faults(wanted, found)):
        raise CheckpointError(
            f"{place} does not fit the experiment: {'; '.join(faults)}; correct the sections model "
            "and alignments by SECTION.FIELD=VALUE"
        )


def _faults(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    if missing := [name for name in wanted if name not in found]:
        yield f"it lacks {listed(missing, most=_MOST_NAMED)}"
    if unknown := [name for name in found if name not in wanted]:
        yield f"nothing here takes {listed(unknown, most=_MOST_NAMED)}"
    shapes = [
        f"{name} is {found[name]}, but {shape} here"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if shapes:
        yield listed(shapes, "; ", most=_MOST_NAMED)
