"""One alignment: which tokens its terms compare, on which grid, and with which weight."""

from itertools import product

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import interpolate

from srepa_ds.alignment.alignment import (
    Alignment,
    AlignmentConfig,
    AlignmentLosses,
    TeacherShape,
    TermWeights,
)
from srepa_ds.alignment.losses import PointwiseConfig
from srepa_ds.encoders.teacher import TeacherConfig, TeacherTokens
from srepa_ds.errors import ConfigError
from srepa_ds.schema import to_tree, validated

TEACHER = {"name": "dinov2-vit-b"}
GRID, TEACHER_GRID = (3, 4), (5, 2)
HIDDEN, WIDTH = 8, 6
POINTWISE = {"weight": 1.0}
MSE, KL = {"kind": "mse", "weight": 2.0}, {"kind": "kl", "weight": 0.5, "tau_student": 0.3}


def config(**terms):
    tree = {"teacher": TEACHER, "depth": 4, "projector": {"hidden_width": 10}, **terms}
    return validated(AlignmentConfig, tree, source="test")


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def aligned(config, teacher_grid=GRID):
    return Alignment(config, GRID, TeacherShape(WIDTH, teacher_grid))


def projector_for(config):
    generator = torch.Generator().manual_seed(3)
    return aligned(config).new_projector(HIDDEN, generator).double()


def losses_of(config, hidden, patches, cls=None, teacher_grid=GRID):
    projector = projector_for(config).to(hidden.dtype)
    tokens = TeacherTokens(patches, cls)
    return aligned(config, teacher_grid)(projector, hidden, tokens, config.weights_at(0))


def cosine(student, teacher):
    """-cos averaged over images and tokens, one by one."""
    pairs = zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True)
    values = [-torch.dot(s, t) / (s.norm() * t.norm()) for s, t in pairs]
    return sum(values) / len(values)


def mse(student, teacher):
    """Eq. 6, pair by pair."""
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for s, t in zip(student, teacher, strict=True):
        for i, j in product(range(len(s)), repeat=2):
            if i != j:
                similar = torch.dot(s[i], s[j]) / (s[i].norm() * s[j].norm())
                target = torch.dot(t[i], t[j]) / (t[i].norm() * t[j].norm())
                total = total + (similar - target) ** 2
                count += 1
    return total / count


def test_both_terms_see_the_projected_tokens():
    alignment = config(pointwise=POINTWISE, structural=MSE)
    hidden, patches = randn(2, 12, HIDDEN), randn(2, 12, WIDTH, seed=1)
    losses = losses_of(alignment, hidden, patches)
    projected = projector_for(alignment)(hidden)
    torch.testing.assert_close(losses.pointwise, cosine(projected, patches))
    torch.testing.assert_close(losses.structural, mse(projected, patches))


def test_the_structural_term_can_see_the_states_themselves():
    alone = config(structural={**MSE, "tokens": "hidden"})
    hidden, patches = randn(2, 12, HIDDEN), randn(2, 12, WIDTH, seed=1)
    assert not alone.has_projector
    projector = projector_for(alone)
    assert list(projector.parameters()) == []
    torch.testing.assert_close(losses_of(alone, hidden, patches).structural, mse(hidden, patches))
    both = config(pointwise=POINTWISE, structural={**MSE, "tokens": "hidden"})
    losses = losses_of(both, hidden, patches)
    torch.testing.assert_close(losses.structural, mse(hidden, patches))
    torch.testing.assert_close(losses.pointwise, cosine(projector_for(both)(hidden), patches))


@pytest.mark.parametrize("pointwise_cls", [False, True])
@pytest.mark.parametrize("structural_cls", [False, True])
@pytest.mark.parametrize("tokens", ["projected", "hidden"])
def test_the_class_token_takes_part_only_where_it_is_asked_for(
    pointwise_cls, structural_cls, tokens
):
    alignment = config(
        pointwise={**POINTWISE, "include_cls": pointwise_cls},
        structural={**MSE, "include_cls": structural_cls, "tokens": tokens},
    )
    hidden, patches, cls = (
        randn(2, 13, HIDDEN),
        randn(2, 12, WIDTH, seed=1),
        randn(2, WIDTH, seed=2),
    )
    losses = losses_of(alignment, hidden, patches, cls)
    projected = projector_for(alignment)(hidden)
    compared = projected if tokens == "projected" else hidden
    whole = torch.cat((cls[:, None], patches), dim=1)
    pointwise = cosine(projected, whole) if pointwise_cls else cosine(projected[:, 1:], patches)
    structural = mse(compared, whole) if structural_cls else mse(compared[:, 1:], patches)
    torch.testing.assert_close(losses.pointwise, pointwise)
    torch.testing.assert_close(losses.structural, structural)


@pytest.mark.parametrize("kind", ["mlp", "linear", "conv"])
@pytest.mark.parametrize("direction", ["teacher_to_student", "student_to_teacher"])
def test_grids_are_brought_together_in_either_direction(kind, direction):
    alignment = config(
        projector={"kind": kind},
        resampling={"direction": direction, "mode": "bilinear"},
        pointwise=POINTWISE,
        structural=MSE,
    )
    hidden, patches = randn(2, 12, HIDDEN).requires_grad_(), randn(2, 10, WIDTH, seed=1)
    losses = losses_of(alignment, hidden, patches, teacher_grid=TEACHER_GRID)
    student = projector_for(alignment)(hidden)

    def moved(tokens, source, target):
        image = tokens.mT.unflatten(2, source)
        return interpolate(image, target, mode="bilinear", antialias=True).flatten(2).mT

    if direction == "teacher_to_student":
        patches = moved(patches, TEACHER_GRID, GRID)
    else:
        student = moved(student, GRID, TEACHER_GRID)
    torch.testing.assert_close(losses.pointwise, cosine(student, patches))
    torch.testing.assert_close(losses.structural, mse(student, patches))
    (found,) = torch.autograd.grad(losses.structural, hidden, retain_graph=True)
    (expected,) = torch.autograd.grad(mse(student, patches), hidden)
    torch.testing.assert_close(found, expected)


def test_irepas_target_is_normalised_before_it_is_resampled_and_before_its_gram():
    alignment = config(
        projector={"kind": "conv", "kernel": 3},
        spatial_norm={"gamma": 0.6},
        resampling={"direction": "teacher_to_student", "mode": "area"},
        pointwise=POINTWISE,
        structural=MSE,
    )
    hidden, patches = randn(2, 12, HIDDEN), randn(2, 10, WIDTH, seed=1) + 3
    losses = losses_of(alignment, hidden, patches, teacher_grid=TEACHER_GRID)
    mean, std = patches.mean(1, keepdim=True), patches.std(1, keepdim=True)
    normalised = ((patches - 0.6 * mean) / (std + 1e-6)).mT.unflatten(2, TEACHER_GRID)
    target = interpolate(normalised, GRID, mode="area").flatten(2).mT
    student = projector_for(alignment)(hidden)
    torch.testing.assert_close(losses.pointwise, cosine(student, target))
    torch.testing.assert_close(losses.structural, mse(student, target))


def test_absent_terms_are_exact_zeros():
    hidden, patches = randn(1, 12, HIDDEN).float(), randn(1, 12, WIDTH, seed=1).float()
    for terms, name in (
        ({"pointwise": POINTWISE}, "structural"),
        ({"structural": KL}, "pointwise"),
    ):
        alignment = config(**terms)
        losses = losses_of(alignment, hidden, patches)
        assert getattr(losses, name) == 0
        assert getattr(alignment.weights_at(0), name) is None
        assert all(value.dtype == torch.float32 for value in losses)


@pytest.mark.parametrize(
    "terms", [{"pointwise": POINTWISE}, {"structural": {**KL, "tokens": "hidden"}}]
)
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_an_alignment_that_is_over_still_touches_its_projector(terms, kind):
    alignment = config(projector={"kind": kind}, **terms)
    projector = projector_for(alignment)
    hidden = randn(3, 13, HIDDEN).requires_grad_()
    over = TermWeights(None, None)
    losses = aligned(alignment)(projector, hidden, None, over)
    assert tuple(losses) == (0, 0)
    assert over.total(losses) == 0
    if alignment.has_projector:
        over.total(losses).backward()
    assert all(weight.grad is not None for weight in projector.parameters())
    assert all(weight.grad.abs().max() == 0 for weight in projector.parameters())
    assert hidden.grad is None


def test_weights_follow_the_schedules_and_end():
    alignment = config(
        pointwise={**POINTWISE, "schedule": {"kind": "stop", "end_step": 10}},
        structural={**MSE, "schedule": {"kind": "linear", "end_step": 20}},
    )
    assert alignment.weights_at(0) == (1.0, 2.0)
    assert alignment.weights_at(15) == (None, 0.5)
    assert alignment.weights_at(20) == (None, None)
    assert [alignment.weights_at(step).are_over for step in (0, 15, 20)] == [False, False, True]
    # A weight of 0 asks for a measurement; it is not an end.
    assert config(pointwise={"weight": 0.0}).weights_at(7) == (0.0, None)


def test_the_total_is_the_weighted_sum():
    losses = AlignmentLosses(torch.tensor(3.0), torch.tensor(5.0))
    assert TermWeights(2.0, 0.5).total(losses) == 8.5
    assert TermWeights(None, 0.5).total(losses) == 2.5
    assert TermWeights(0.0, None).total(losses) == 0


@pytest.mark.usefixtures("unchecked_shapes")
def test_tokens_that_do_not_fit_are_named():
    alignment = config(pointwise=POINTWISE)
    hidden, patches = randn(2, 12, HIDDEN), randn(2, 10, WIDTH)
    with pytest.raises(ValueError, match="12 tokens of 2 images, the teacher 10 of 2"):
        losses_of(alignment, hidden, patches, teacher_grid=TEACHER_GRID)
    with pytest.raises(ValueError, match=r"11 tokens do not fill the grid \(3, 4\)"):
        losses_of(alignment, hidden[:, 1:], patches)
    with_cls = config(pointwise={**POINTWISE, "include_cls": True})
    with pytest.raises(ValueError, match="a model that carries a class token"):
        losses_of(with_cls, hidden, randn(2, 12, WIDTH), randn(2, WIDTH))
    with pytest.raises(ValueError, match="of the model and of the teacher"):
        losses_of(with_cls, randn(2, 13, HIDDEN), randn(2, 12, WIDTH))


@pytest.mark.parametrize(
    ("terms", "path", "message"),
    [
        ({}, "", "a pointwise or a structural term"),
        ({"pointwise": {"weight": -1.0}}, "pointwise.weight", "greater than or equal to 0"),
        ({"structural": {"kind": "mse"}}, "structural.weight", "is required"),
        ({"structural": {"kind": "cosine", "weight": 1.0}}, "structural.kind", "'mse' or 'kl'"),
        (
            {"structural": {"kind": "kl", "weight": 1.0, "algorithm": "feature"}},
            "structural",
            "cannot compute kl; choose one of auto, dense, tiled",
        ),
        (
            {"structural": {"kind": "mse", "weight": 1.0, "algorithm": "tilde"}},
            "structural",
            "did you mean 'tiled'",
        ),
        (
            {"structural": {"kind": "kl", "weight": 1.0, "tau_student": 0.0}},
            "structural.tau_student",
            "greater than 0",
        ),
        (
            {"structural": {"kind": "kl", "weight": 1.0, "tau_teacher": -0.2}},
            "structural.tau_teacher",
            "greater than 0",
        ),
        ({"structural": {"kind": "kl", "weight": 1.0, "tile": 0}}, "structural.tile", "equal to 1"),
        ({"pointwise": {"weight": 1.0}, "depth": 0}, "depth", "equal to 1"),
        (
            {"projector": {"kind": "conv"}, "pointwise": {"weight": 1.0, "include_cls": True}},
            "",
            "class token has no place",
        ),
    ],
)
def test_faults_of_the_configuration(terms, path, message):
    with pytest.raises(ConfigError) as caught:
        config(**terms)
    (fault,) = caught.value.faults
    assert fault.path == path
    assert message in fault.message


def test_configuration_survives_its_own_tree():
    original = config(
        pointwise={"weight": 1},
        structural={"kind": "kl", "weight": 0.5},
        spatial_norm={"gamma": 0.6},
        resampling={"direction": "teacher_to_student", "mode": "area"},
    )
    assert validated(AlignmentConfig, to_tree(original), source="again") == original
    assert original.teacher == TeacherConfig(name="dinov2-vit-b")
    with pytest.raises(ValidationError, match="frozen"):
        original.depth = 5
    assert PointwiseConfig(weight=0.0).weight == 0
