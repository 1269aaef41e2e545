"""The tokens of a run's student, which sees noised images, beside those of its teachers."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn

from srepa_ds import noise
from srepa_ds.alignment.alignment import Alignment, AlignmentConfig, TeacherShape
from srepa_ds.alignment.projector import build_projector
from srepa_ds.config.experiment import Config
from srepa_ds.encoders.spec import Resolution
from srepa_ds.encoders.teacher import Teacher, TeacherConfig, TeacherTokens, load_teacher
from srepa_ds.errors import CheckpointError, DataError
from srepa_ds.interpolant import INTERPOLANTS
from srepa_ds.noise import NoiseStream
from srepa_ds.report.probe import NOISE_DRAW, Probe, experiment_of
from srepa_ds.weights.exported import ExportedModel, read_document, weight_files


@dataclass(frozen=True)
class Tokens:
    """The tokens of the same images in one teacher and in one block of the student."""

    teacher: Float[Tensor, "images teacher_tokens width"]
    """The patch tokens as the teacher gives them."""
    target: Float[Tensor, "images tokens width"]
    """The same as the losses see them: perhaps normalised, and brought to the common grid."""
    student: Mapping[str, Float[Tensor, "images tokens _"]]
    """The block's patch tokens and, if the model has a projector, the projected ones."""


@dataclass(frozen=True)
class Pair:
    """One teacher and the block of the student that was aligned with it."""

    encoder: Teacher
    depth: int
    alignment: AlignmentConfig | None
    """None for a teacher that the student was not aligned with."""
    number: int
    grid: tuple[int, int]
    """On which their tokens are compared."""
    name: str


class Pairs:
    """The teachers of an exported model and its blocks, ready to give the tokens of images."""

    def __init__(
        self,
        config: Config,
        exported: ExportedModel,
        *,
        resolution: Resolution,
        device: torch.device,
    ):
        """Loads the teachers that the model was aligned with.

        A model without teachers is paired, at its middle block, with the extractor of `evaluate`.
        Raises ConfigError or DataError for a teacher that cannot be loaded or has another token
        grid.
        """
        self._config = config
        self._experiment = experiment_of(config, exported)
        self._model = exported.model.to(device)
        self.all = tuple(
            _paired(*pairing, self._experiment, resolution, device)
            for pairing in _pairings(self._experiment, config)
        )

    @torch.no_grad()
    def tokens(self, seen: Probe) -> tuple[Tokens, ...]:
        """Returns the tokens of each pair; raises DataError without pixels."""
        images = seen.batch.images
        if images is None:
            raise DataError("teachers need pixels, but the real images are stored without any")
        if not self.all:
            return ()
        teachers = [pair.encoder.tokens(images) for pair in self.all]
        times = torch.full((len(seen.batch),), seen.t, device=seen.x_t.device)
        hidden = self._model(
            seen.x_t,
            times,
            seen.batch.labels,
            cls_t=_noised_cls(self._experiment, teachers[0], seen, times),
            depths=tuple(pair.depth for pair in self.all),
        ).hidden
        each = zip(self.all, teachers, hidden, self._projectors, strict=True)
        return tuple(self._of_one(*one) for one in each)

    def _of_one(
        self, pair: Pair, teacher: TeacherTokens, hidden: Tensor, projector: nn.Module | None
    ) -> Tokens:
        own, hidden = self._experiment.model.grid, hidden.float()
        student = {f"block {pair.depth}": hidden}
        if projector is not None and pair.alignment is not None:
            # A class token comes before the patches.
            patches = hidden if pair.alignment.projects_cls else hidden[:, -own[0] * own[1] :]
            student["projected"] = projector(patches)
        student = {name: tokens[:, -own[0] * own[1] :] for name, tokens in student.items()}
        target = teacher
        if pair.alignment is not None:
            shape = TeacherShape(pair.encoder.width, pair.encoder.grid)
            common = Alignment(pair.alignment, own, shape)
            target = common.target(teacher)
            student = {name: common.student_patches(tokens) for name, tokens in student.items()}
        return Tokens(teacher.patches, target.patches, student)

    @cached_property
    def _projectors(self) -> tuple[nn.Module | None, ...]:
        return tuple(_projector(pair, self._experiment, self._config) for pair in self.all)


def _pairings(
    experiment: Config, config: Config
) -> tuple[tuple[TeacherConfig, int, AlignmentConfig | None, int], ...]:
    if experiment.alignments:
        return tuple(
            (alignment.teacher, alignment.depth, alignment, number)
            for number, alignment in enumerate(experiment.alignments)
        )
    if config.evaluate is None:
        raise DataError(
            "the model was trained without a teacher, and there is no section `evaluate` whose "
            "extractor could replace it"
        )
    middle = (experiment.model.shape.depth + 1) // 2
    teacher = config.evaluate.extractor.teacher
    return () if teacher is None else ((teacher, middle, None, 0),)


def _paired(
    teacher: TeacherConfig,
    depth: int,
    alignment: AlignmentConfig | None,
    number: int,
    experiment: Config,
    resolution: Resolution,
    device: torch.device,
) -> Pair:
    encoder = load_teacher(teacher, resolution=resolution, device=device)
    grid = experiment.model.grid
    resampling = alignment.resampling if alignment else None
    if resampling is not None and resampling.direction == "student_to_teacher":
        grid = encoder.grid
    elif resampling is None and encoder.grid != grid:
        raise DataError(
            f"the teacher gives a grid of {encoder.grid} tokens, but the model has {grid}; "
            "there is nothing to compare"
        )
    return Pair(encoder, depth, alignment, number, grid, name_of(teacher))


def name_of(teacher: TeacherConfig) -> str:
    """Returns the name of a teacher in tables."""
    return teacher.name or teacher.resolved.architecture


def _noised_cls(
    experiment: Config, teacher: TeacherTokens, seen: Probe, times: Tensor
) -> Tensor | None:
    """Returns the noised class token for the model; None if it has none."""
    width = experiment.model.class_token_width
    if width is None:
        return None
    if teacher.cls is None:
        raise DataError("the model has a class token, but its first teacher has none")
    ids = seen.batch.sample_ids
    gaussian = noise.normal(
        experiment.run.seed, NoiseStream.CLS_NOISE, ids, (width,), draw=NOISE_DRAW
    )
    path = INTERPOLANTS[experiment.objective.interpolant.path]
    return path.noised(teacher.cls, gaussian, times).x_t


def _projector(pair: Pair, experiment: Config, config: Config) -> nn.Module | None:
    """Returns the trained projector, or None if none is stored."""
    alignment = pair.alignment
    state = _tensors_below(f"projectors.{pair.number}.", config)
    if not state or alignment is None:
        return None
    projector = build_projector(
        alignment.projector,
        experiment.model.shape.hidden_size,
        pair.encoder.width,
        generator=None,
        grid=experiment.model.grid,
    )
    try:
        projector.load_state_dict(state)
    except RuntimeError as error:
        place = config.weights_folder
        raise CheckpointError(f"{place}: the projector does not fit its config: {error}") from error
    return projector.to(next(pair.encoder.parameters()).device)


def _tensors_below(prefix: str, config: Config) -> Mapping[str, Tensor]:
    found = {}
    for path in weight_files(read_document(config.weights_folder)):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]
            found |= {name.removeprefix(prefix): file.get_tensor(name).float() for name in names}
    return found
