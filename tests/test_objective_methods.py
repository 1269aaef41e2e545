"""The objective beyond REPA: the class token's flow (REG), schedules, teachers that are over."""

import pytest
import torch
from builders import randomised
from torch.nn.functional import cosine_similarity

from srepa_ds import noise
from srepa_ds.alignment.alignment import AlignmentConfig, TeacherShape, TermWeights
from srepa_ds.interpolant import InterpolantConfig
from srepa_ds.model.variants import SiTConfig
from srepa_ds.noise import NoiseStream
from srepa_ds.objective import (
    Objective,
    ObjectiveConfig,
    SamplingInputs,
    TrainingInputs,
    draw_inputs,
)

WIDTH, BATCH, NUM_TOKENS = 10, 3, 6
MODEL = SiTConfig(
    variant="SiT-S/2",
    input_size=(6, 4),
    in_channels=4,
    num_classes=7,
    depth=3,
    hidden_size=32,
    num_heads=4,
    class_token_width=WIDTH,
)
SPEC = {"architecture": "vit_tiny_patch16_224", "width": WIDTH, "patch_size": 2, "input_size": 6}
REG = {"depth": 2, "pointwise": {"weight": 0.5, "include_cls": True}}
OVER = TermWeights(None, None)


def alignment(**terms) -> AlignmentConfig:
    return AlignmentConfig(teacher={"spec": SPEC}, projector={"hidden_width": 20}, **terms)


def objective_of(*alignments: AlignmentConfig, model=MODEL, **settings) -> Objective:
    teachers = (TeacherShape(WIDTH, model.grid),) * len(alignments)
    objective = Objective(model, ObjectiveConfig(**settings), alignments, teachers=teachers)
    return randomised(objective, seed=1).double()


def inputs_of(count: int = 1, **changes) -> TrainingInputs:
    generator = torch.Generator().manual_seed(2)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = TrainingInputs(
        latents=randn(BATCH, *MODEL.latent_shape),
        labels=torch.arange(BATCH),
        t=torch.linspace(0.1, 0.8, BATCH, dtype=torch.float64),
        noise=randn(BATCH, *MODEL.latent_shape),
        teacher_patches=tuple(randn(BATCH, NUM_TOKENS, WIDTH) for _ in range(count)),
        teacher_cls=tuple(randn(BATCH, WIDTH) for _ in range(count)),
        cls_noise=randn(BATCH, WIDTH),
    )
    return inputs._replace(**changes)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_regs_loss_is_the_sum_written_out(path):
    objective = objective_of(alignment(**REG), interpolant=InterpolantConfig(path=path))
    inputs = inputs_of()
    losses = objective(inputs)
    t = inputs.t
    angle = t * torch.pi / 2
    alpha, sigma = (1 - t, t) if path == "linear" else (angle.cos(), angle.sin())
    d_alpha, d_sigma = (
        (-torch.ones_like(t), torch.ones_like(t))
        if path == "linear"
        else (-torch.pi / 2 * angle.sin(), torch.pi / 2 * angle.cos())
    )

    def over(values, x):
        return values.reshape(-1, *(1,) * (x.ndim - 1)) * x

    def noised(x, eps):
        return over(alpha, x) + over(sigma, eps), over(d_alpha, x) + over(d_sigma, eps)

    x_t, velocity = noised(inputs.latents, inputs.noise)
    cls = inputs.teacher_cls[0]
    cls_t, cls_velocity = noised(cls, inputs.cls_noise)
    output = objective.sit(x_t, t, inputs.labels, cls_t=cls_t, depths=(2,))
    flow = (output.velocity - velocity).square().mean()
    cls_flow = (output.cls_velocity - cls_velocity).square().mean()
    student = objective.projectors[0](output.hidden[0])
    teacher = torch.cat((cls[:, None], inputs.teacher_patches[0]), dim=1)
    pointwise = -cosine_similarity(student, teacher, dim=-1).mean()
    expected = flow + 0.5 * pointwise + 0.03 * cls_flow
    torch.testing.assert_close(losses.flow, flow)
    torch.testing.assert_close(losses.cls, cls_flow)
    torch.testing.assert_close(losses.pointwise, pointwise)
    torch.testing.assert_close(losses.total, expected)
    parameters = list(objective.parameters())
    found = torch.autograd.grad(losses.total, parameters)
    for one, other in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(one, other)


def test_the_class_tokens_weight_is_the_configured_one():
    inputs = inputs_of()
    heavy, none = (
        objective_of(alignment(**REG), cls_weight=weight)(inputs) for weight in (2.0, 0.0)
    )
    torch.testing.assert_close(heavy.total - none.total, 2.0 * heavy.cls)
    assert heavy.cls == none.cls > 0


def test_the_class_tokens_noise_has_a_stream_of_its_own():
    positions = torch.tensor([3, 2**40, 5])
    latents = torch.zeros(BATCH, *MODEL.latent_shape)
    labels = torch.zeros(BATCH, dtype=torch.int64)
    settings = {"positions": positions, "seed": 4}
    drawn = draw_inputs(ObjectiveConfig(), MODEL, latents, labels, **settings)
    expected = noise.normal(4, NoiseStream.CLS_NOISE, positions, (WIDTH,))
    assert torch.equal(drawn.cls_noise, expected)
    plain = MODEL.model_copy(update={"class_token_width": None})
    without = draw_inputs(ObjectiveConfig(), plain, latents, labels, **settings)
    assert without.cls_noise is None
    assert torch.equal(without.noise, drawn.noise)
    assert torch.equal(without.t, drawn.t)


def test_weights_scale_the_terms_of_each_alignment():
    both = {"pointwise": {"weight": 2.0}, "structural": {"kind": "mse", "weight": 3.0}}
    weights = (2.0, 3.0)
    objective = objective_of(alignment(depth=1, **both), alignment(depth=2, **both))
    inputs = inputs_of(2)
    whole = objective(inputs)
    given = objective(inputs._replace(term_weights=(TermWeights(*weights), TermWeights(*weights))))
    assert given.total == whole.total
    alone = {}
    for number, term in ((0, 0), (0, 1), (1, 0), (1, 1)):
        one = [OVER, OVER]
        one[number] = TermWeights(*(weights[k] if k == term else None for k in (0, 1)))
        alone[number, term] = objective(inputs._replace(term_weights=tuple(one)))
    scaled = objective(
        inputs._replace(term_weights=(TermWeights(1.0, None), TermWeights(2.0, 0.75)))
    )
    shares = {(0, 0): 0.5, (1, 0): 1.0, (1, 1): 0.25}
    rest = scaled.flow + 0.03 * scaled.cls
    expected = rest + sum(f * (alone[place].total - rest) for place, f in shares.items())
    torch.testing.assert_close(scaled.total, expected)
    # The record keeps the terms themselves; one that is over is not computed any more.
    torch.testing.assert_close(scaled.pointwise, whole.pointwise)
    torch.testing.assert_close(scaled.structural, alone[1, 1].structural)


def test_a_projector_whose_last_term_is_over_still_takes_part():
    terms = {
        "pointwise": {"weight": 1.0},
        "structural": {"kind": "mse", "weight": 1.0, "tokens": "hidden"},
    }
    objective = objective_of(alignment(depth=1, **terms))
    inputs = inputs_of()
    losses = objective(inputs._replace(term_weights=(TermWeights(None, 1.0),)))
    assert losses.pointwise == 0 < losses.structural
    losses.total.backward()
    for parameter in objective.projectors.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() == 0


def test_a_teacher_that_is_over_leaves_zeros_and_whole_gradients():
    objective = objective_of(
        alignment(**REG), alignment(depth=3, structural={"kind": "kl", "weight": 1.0})
    )
    inputs = inputs_of(2)
    over = inputs._replace(
        teacher_patches=(None, None),
        teacher_cls=(inputs.teacher_cls[0], None),
        term_weights=(OVER, OVER),
    )
    losses = objective(over)
    assert (losses.pointwise, losses.structural) == (0, 0)
    torch.testing.assert_close(losses.total, losses.flow + 0.03 * losses.cls)
    losses.total.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().max() > 0) != name.startswith("projectors."), name


@pytest.mark.parametrize("carries_cls", [True, False])
def test_a_sampling_request_gives_the_output_of_the_model(carries_cls):
    model = MODEL if carries_cls else MODEL.model_copy(update={"class_token_width": None})
    objective = objective_of(alignment(depth=1, pointwise={"weight": 1.0}), model=model)
    inputs = inputs_of()
    cls_t = inputs.cls_noise if carries_cls else None
    found = objective(SamplingInputs(inputs.latents, inputs.t, inputs.labels, cls_t))
    expected = objective.sit(inputs.latents, inputs.t, inputs.labels, cls_t=cls_t)
    assert torch.equal(found.velocity, expected.velocity)
    assert found.hidden == ()
    assert (found.cls_velocity is not None) == carries_cls
