import math

import pytest
import torch

from srepa_ds.alignment.losses import StructuralConfig, pointwise_cosine, structural_loss


def waves():
    """The tokens of the contract's closed-form values: student and teacher, (2, 9, 6)."""
    k = torch.arange(108, dtype=torch.float64).reshape(2, 9, 6)
    return torch.sin(0.53 * k + 1.1) + 0.1, torch.sin(0.71 * k + 0.2) + 0.3


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
    config = StructuralConfig(weight=2.0, **structural)
    assert math.isclose(pointwise_cosine(student, teacher).item(), -0.075522694896, abs_tol=1e-11)
    value = structural_loss(config, student, teacher).item()
    assert math.isclose(value, expected, rel_tol=1e-11)


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
        structural_loss(StructuralConfig(kind="mse", weight=1.0), student, teacher[:, :4])
