import math

import pytest
import torch
from pydantic import ValidationError

from srepa_ds.alignment.losses import (
    AlignmentConfig,
    PointwiseConfig,
    StructuralConfig,
    alignment_losses,
    pointwise_cosine,
    structural_loss,
)
from srepa_ds.alignment.teachers import TeacherConfig
from srepa_ds.errors import ConfigError
from srepa_ds.schema import to_tree, validated

TEACHER = {"name": "dinov2-vit-b"}


def waves():
    """The tokens of the contract's closed-form values: student and teacher, (2, 9, 6)."""
    k = torch.arange(108, dtype=torch.float64).reshape(2, 9, 6)
    return torch.sin(0.53 * k + 1.1) + 0.1, torch.sin(0.71 * k + 0.2) + 0.3


def config(**terms):
    tree = {"teacher": TEACHER, "depth": 4, **terms}
    return validated(AlignmentConfig, tree, source="test")


@pytest.mark.parametrize(
    ("structural", "expected"),
    [
        ({"kind": "mse"}, 1.467828516147),
        ({"kind": "kl"}, 7.568257187520),
        ({"kind": "kl", "reduction": "batch_mean"}, 68.114314687678),
        ({"kind": "kl", "tau_teacher": 0.2, "tau_student": 0.4}, 4.044422334896),
        ({"kind": "kl", "tau_student": 0.4, "reduction": "batch_mean"}, 36.399801014060),
        ({"kind": "kl", "tau_teacher": 0.1, "tau_student": 0.1}, 15.769186570398),
    ],
)
def test_closed_form_values(structural, expected):
    student, teacher = waves()
    both = config(pointwise={"weight": 1.0}, structural={"weight": 2.0, **structural})
    losses = alignment_losses(both, student, teacher)
    assert math.isclose(losses.pointwise.item(), -0.075522694896, abs_tol=1e-11)
    assert math.isclose(losses.structural.item(), expected, rel_tol=1e-11)


def test_absent_terms_are_exact_zeros():
    student, teacher = (tokens.float() for tokens in waves())
    only_pointwise = config(pointwise={"weight": 0.5})
    losses = alignment_losses(only_pointwise, student, teacher)
    assert losses.structural == 0
    assert losses.structural.dtype == losses.pointwise.dtype == torch.float32
    assert (only_pointwise.pointwise_weight, only_pointwise.structural_weight) == (0.5, 0)
    only_structural = config(structural={"kind": "mse", "weight": 2.0})
    assert alignment_losses(only_structural, student, teacher).pointwise == 0
    assert (only_structural.pointwise_weight, only_structural.structural_weight) == (0, 2.0)


def test_a_structural_term_alone_takes_any_student_width():
    _, teacher = waves()
    student = torch.sin(torch.arange(2 * 9 * 4, dtype=torch.float64)).reshape(2, 9, 4)
    losses = alignment_losses(config(structural={"kind": "kl", "weight": 1.0}), student, teacher)
    assert losses.structural > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pointwise_cosine_is_the_mean_over_images_and_tokens(dtype):
    student, teacher = (tokens.to(dtype) for tokens in waves())
    student[0, 3] = 0
    student.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = pointwise_cosine(student, teacher)
    cosines = [
        torch.dot(s, t) / max(s.norm() * t.norm(), 1e-12)
        for s, t in zip(
            student.detach().double().flatten(0, 1), teacher.double().flatten(0, 1), strict=True
        )
    ]
    expected = -sum(cosines) / len(cosines)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-6)
    loss.backward()
    assert torch.isfinite(student.grad).all()


def test_pointwise_gradient_leaves_the_teacher_alone():
    student, teacher = (tokens.requires_grad_() for tokens in waves())
    assert torch.autograd.gradcheck(lambda s: pointwise_cosine(s, teacher.detach()), student)
    pointwise_cosine(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("tiles", [1, 4, 100])
def test_algorithm_and_tile_reach_the_loss(tiles):
    student, teacher = waves()
    for kind, algorithms in (("mse", ("dense", "tiled", "feature")), ("kl", ("dense", "tiled"))):
        values = [
            structural_loss(
                StructuralConfig(kind=kind, weight=1.0, algorithm=algorithm, tile=tiles),
                student,
                teacher,
            )
            for algorithm in ("auto", *algorithms)
        ]
        assert max(values) - min(values) < 1e-12


@pytest.mark.usefixtures("unchecked_shapes")
def test_another_grid_or_width_is_refused():
    student, teacher = waves()
    with pytest.raises(ValueError, match="9 tokens of 2 images, the teacher 4 of 2"):
        pointwise_cosine(student, teacher[:, :4])
    with pytest.raises(ValueError, match="teacher's width 5"):
        pointwise_cosine(student, teacher[..., :5])
    with pytest.raises(ValueError, match="give the same grid"):
        alignment_losses(config(structural={"kind": "mse", "weight": 1.0}), student, teacher[:, :4])


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
    ],
)
def test_faults_of_the_configuration(terms, path, message):
    with pytest.raises(ConfigError) as caught:
        config(**terms)
    (fault,) = caught.value.faults
    assert fault.path == path
    assert message in fault.message


def test_configuration_survives_its_own_tree():
    original = config(pointwise={"weight": 1}, structural={"kind": "kl", "weight": 0.5})
    assert validated(AlignmentConfig, to_tree(original), source="again") == original
    assert original.teacher == TeacherConfig(name="dinov2-vit-b")
    with pytest.raises(ValidationError, match="frozen"):
        original.depth = 5
    assert PointwiseConfig(weight=0.0).weight == 0
