"""Compares a run's student, which sees noised real images, with its teachers, which see clean ones.

As in the paper's Figure 2, it compares the similarities between the tokens of an image.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, UInt8
from safetensors import safe_open
from torch import Tensor

from srepa_ds import noise
from srepa_ds.alignment.alignment import Alignment, AlignmentConfig, TeacherShape
from srepa_ds.alignment.projector import build_projector
from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.codec.table import build_codec
from srepa_ds.config.experiment import Config
from srepa_ds.data.batch import Batch
from srepa_ds.data.shards import ShardDataset
from srepa_ds.encoders.teacher import TeacherConfig, TeacherTokens, load_teacher
from srepa_ds.errors import CheckpointError, DataError
from srepa_ds.interpolant import INTERPOLANTS
from srepa_ds.noise import NoiseStream
from srepa_ds.report.similarity import gram_correlation, similarity_to, spread_queries
from srepa_ds.schema import validated
from srepa_ds.training.latent_fit import fitting_latent_shape
from srepa_ds.weights.exported import WEIGHTS, ExportedModel

NUM_IMAGES = 32
NUM_SHOWN = 3
NUM_QUERIES = 4
# Training draws noise with draw 0, by sample counters that run through the same numbers.
_NOISE_DRAW = 1


@dataclass(frozen=True)
class Space:
    """The similarities between tokens of one kind: the teacher's, a block's, or projected ones."""

    name: str
    similarities: Float[Tensor, "shown queries tokens"]
    correlations: Float[Tensor, " images"] | None
    """Of each image's Gram matrix with the teacher's; None for the teacher itself."""


@dataclass(frozen=True)
class Probe:
    """Real images, the same noised at time `t`, and the places of those shown."""

    batch: Batch
    x_t: Float[Tensor, "images channels height width"]
    t: float
    noised: UInt8[Tensor, "images height width 3"]
    """`x_t` decoded to pictures."""
    shown: Int64[Tensor, " shown"]


@dataclass(frozen=True)
class Comparison:
    """One teacher compared with one block of the student."""

    teacher: str
    is_aligned: bool
    """Whether the student was aligned with this teacher."""
    grid: tuple[int, int]
    queries: Int64[Tensor, "shown queries"]
    spaces: tuple[Space, ...]
    """The teacher's first, then the student's."""


@dataclass(frozen=True)
class _Pairing:
    teacher: TeacherConfig
    depth: int
    alignment: AlignmentConfig | None
    number: int


def probe(
    config: Config,
    exported: ExportedModel,
    real: ShardDataset,
    *,
    t: float,
    device: torch.device,
) -> Probe:
    """Returns images spread over the classes of `real`, with noise keyed by their index there.

    Raises DataError if they do not fit the model.
    """
    experiment = _experiment(config, exported)
    codec = build_codec(experiment.codec.as_used_here(config.codec), device=device)
    _check_fit(experiment, codec, real)
    batch = real.read(_spread_over_classes(real.labels, NUM_IMAGES)).to(device)
    clean = codec.encode(batch, seed=experiment.run.seed)
    gaussian = noise.normal(
        experiment.run.seed,
        NoiseStream.NOISE,
        batch.sample_ids,
        tuple(clean.shape[1:]),
        draw=_NOISE_DRAW,
    )
    path = INTERPOLANTS[experiment.objective.interpolant.path]
    x_t = path.noised(clean, gaussian, torch.full((len(batch),), t, device=device)).x_t
    shown = _spread(len(batch), min(NUM_SHOWN, len(batch)))
    return Probe(batch, x_t, t, codec.decode(x_t), shown)


def _experiment(config: Config, exported: ExportedModel) -> Config:
    # Without cross-checks: the files that training used may not be here.
    return validated(Config, exported.config, source=str(config.weights_folder))


def _check_fit(experiment: Config, codec: LatentCodec, real: ShardDataset) -> None:
    found = (fitting_latent_shape(real, codec), real.num_classes)
    expected = (experiment.model.latent_shape, experiment.model.num_classes)
    if found != expected:
        raise DataError(
            f"{real.folder} gives latents of shape {found[0]} in {found[1]} classes, but the model "
            f"takes {expected[0]} in {expected[1]}; set evaluate.reference to data that fits it"
        )


def _spread_over_classes(labels: Int64[Tensor, " samples"], count: int) -> Tensor:
    by_class = labels.argsort(stable=True)
    return by_class[_spread(len(labels), min(count, len(labels)))]


def _spread(length: int, count: int) -> Tensor:
    """Returns the middles of `count` equal parts of range(length)."""
    return ((2 * torch.arange(count) + 1) * length) // (2 * count)


@torch.no_grad()
def compare(config: Config, exported: ExportedModel, seen: Probe) -> tuple[Comparison, ...]:
    """Returns a comparison for each teacher the model was aligned with.

    A model without teachers is compared, at its middle block, with the extractor of `evaluate`.
    Raises ConfigError or DataError for a teacher that cannot be loaded or has another token grid.
    """
    experiment = _experiment(config, exported)
    pairings = _pairings(experiment, config)
    targets = tuple(_target(pairing, experiment, seen) for pairing in pairings)
    model = exported.model.to(seen.x_t.device)
    times = torch.full((len(seen.batch),), seen.t, device=seen.x_t.device)
    hidden = model(
        seen.x_t,
        times,
        seen.batch.labels,
        cls_t=_noised_cls(experiment, targets[0], seen, times),
        depths=tuple(pairing.depth for pairing in pairings),
    ).hidden
    return tuple(
        _compared(pairing, target, tokens, config, experiment, seen)
        for pairing, target, tokens in zip(pairings, targets, hidden, strict=True)
    )


@dataclass(frozen=True)
class _Target:
    """A teacher's tokens, and the grid on which student and teacher are compared."""

    tokens: TeacherTokens
    teacher_grid: tuple[int, int]
    width: int
    grid: tuple[int, int]


def _target(pairing: _Pairing, experiment: Config, seen: Probe) -> _Target:
    images = seen.batch.images
    if images is None:
        raise DataError("teachers need pixels, but the real images are stored without any")
    resolution = (images.shape[-2], images.shape[-1])
    teacher = load_teacher(pairing.teacher, resolution=resolution, device=images.device)
    grid = experiment.model.grid
    resampling = pairing.alignment.resampling if pairing.alignment else None
    if resampling is not None and resampling.direction == "student_to_teacher":
        grid = teacher.grid
    elif resampling is None and teacher.grid != grid:
        raise DataError(
            f"the teacher gives a grid of {teacher.grid} tokens, but the model has {grid}; "
            "there is nothing to compare"
        )
    return _Target(teacher.tokens(images), teacher.grid, teacher.width, grid)


def _noised_cls(experiment: Config, target: _Target, seen: Probe, times: Tensor) -> Tensor | None:
    """Returns the noised class token for the model; None if it has none."""
    width = experiment.model.class_token_width
    if width is None:
        return None
    if target.tokens.cls is None:
        raise DataError("the model has a class token, but its first teacher has none")
    ids = seen.batch.sample_ids
    gaussian = noise.normal(
        experiment.run.seed, NoiseStream.CLS_NOISE, ids, (width,), draw=_NOISE_DRAW
    )
    path = INTERPOLANTS[experiment.objective.interpolant.path]
    return path.noised(target.tokens.cls, gaussian, times).x_t


def _pairings(experiment: Config, config: Config) -> tuple[_Pairing, ...]:
    if experiment.alignments:
        return tuple(
            _Pairing(alignment.teacher, alignment.depth, alignment, number)
            for number, alignment in enumerate(experiment.alignments)
        )
    if config.evaluate is None:
        raise DataError(
            "the model was trained without a teacher, and there is no section `evaluate` whose "
            "extractor could replace it"
        )
    middle = (experiment.model.shape.depth + 1) // 2
    teacher = config.evaluate.extractor.teacher
    return () if teacher is None else (_Pairing(teacher, middle, None, 0),)


def _compared(
    pairing: _Pairing,
    target: _Target,
    hidden: Tensor,
    config: Config,
    experiment: Config,
    seen: Probe,
) -> Comparison:
    own, alignment = experiment.model.grid, pairing.alignment
    teacher = target.tokens
    student = {f"block {pairing.depth}": hidden.float()}
    projected = _projected(pairing, hidden.float(), config, target, own)
    student |= {} if projected is None else {"projected": projected}
    # A class token comes before the patches.
    student = {name: tokens[:, -own[0] * own[1] :] for name, tokens in student.items()}
    if alignment is not None:
        common = Alignment(alignment, own, TeacherShape(target.width, target.teacher_grid))
        teacher = common.target(teacher)
        student = {name: common.student_patches(tokens) for name, tokens in student.items()}
    return _comparison(pairing, teacher.patches, student, target.grid, seen)


def _comparison(
    pairing: _Pairing,
    target: Tensor,
    student: Mapping[str, Tensor],
    grid: tuple[int, int],
    seen: Probe,
) -> Comparison:
    shown = seen.shown.to(target.device)
    first = (grid[0] // 2) * grid[1] + grid[1] // 2
    count = min(NUM_QUERIES, target.shape[1])
    queries = spread_queries(target[shown], first=first, count=count)
    spaces = [Space("teacher", similarity_to(target[shown], queries), None)]
    spaces += [
        Space(name, similarity_to(tokens[shown], queries), gram_correlation(tokens, target))
        for name, tokens in student.items()
    ]
    name = pairing.teacher.name or pairing.teacher.resolved.architecture
    return Comparison(name, pairing.alignment is not None, grid, queries, tuple(spaces))


def _projected(
    pairing: _Pairing, hidden: Tensor, config: Config, target: _Target, grid: tuple[int, int]
) -> Tensor | None:
    """Returns the tokens the loss matches, or None without a stored projector."""
    path, alignment = config.weights_folder / WEIGHTS, pairing.alignment
    state = _tensors_below(f"projectors.{pairing.number}.", config)
    if not state or alignment is None:
        return None
    if not alignment.projects_cls:
        hidden = hidden[:, -grid[0] * grid[1] :]
    projector = build_projector(
        alignment.projector, hidden.shape[-1], target.width, generator=None, grid=grid
    )
    try:
        projector.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: the projector does not fit its config: {error}") from error
    return projector.to(hidden.device)(hidden)


def _tensors_below(prefix: str, config: Config) -> Mapping[str, Tensor]:
    with safe_open(config.weights_folder / WEIGHTS, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]
        return {name.removeprefix(prefix): file.get_tensor(name).float() for name in names}
