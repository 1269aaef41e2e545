"""The training inputs as functions of the position, and the loss against a sum written out."""

import json
import math

import pytest
import torch
from builders import randomised
from places import GOLDEN
from torch import nn
from torch.nn.functional import cosine_similarity

from srepa_ds import noise
from srepa_ds.alignment.alignment import AlignmentConfig, TeacherShape
from srepa_ds.interpolant import InterpolantConfig
from srepa_ds.model.variants import SiTConfig
from srepa_ds.noise import NoiseStream
from srepa_ds.objective import (
    TIME_BINS,
    Losses,
    Objective,
    ObjectiveConfig,
    TrainingInputs,
    draw_inputs,
    official_name,
)

SEED, NULL = 11, 7
# One token grid of 3 x 2: odd enough to notice a swap.
MODEL = SiTConfig(
    variant="SiT-S/2",
    input_size=(6, 4),
    in_channels=4,
    num_classes=NULL,
    depth=4,
    hidden_size=32,
    num_heads=4,
)
# Teachers run before the objective: here only their tokens count.
SPEC = {"architecture": "vit_tiny_patch16_224", "width": 1, "patch_size": 2, "input_size": 6}
DEEP = {
    "depth": 3,
    "pointwise": {"weight": 0.5},
    "structural": {"kind": "mse", "weight": 3.0},
}
SHALLOW = {
    "depth": 1,
    "structural": {"kind": "kl", "weight": 0.25, "tau_student": 0.3, "tau_teacher": 0.1},
}
POINTWISE = {"depth": 2, "pointwise": {"weight": 2.0}}
# Rows: the alignments in the order of the configuration, and each teacher's width.
ALIGNMENTS = {
    "none": ((), ()),
    "one": ((DEEP,), (24,)),
    "two": ((DEEP, SHALLOW), (24, 10)),
    "two_at_one_depth": ((POINTWISE, {**SHALLOW, "depth": 2}), (10, 24)),
    "three": ((POINTWISE, DEEP, SHALLOW), (10, 24, 6)),
}


def alignment(settings: dict, hidden_width: int = 20) -> AlignmentConfig:
    projector = {"hidden_width": hidden_width}
    return AlignmentConfig(teacher={"spec": SPEC}, projector=projector, **settings)


def objective_of(case: str, path: str = "linear") -> Objective:
    """An objective whose weights are all random, also those a training run starts from zero."""
    settings, widths = ALIGNMENTS[case]
    config = ObjectiveConfig(interpolant=InterpolantConfig(path=path))
    alignments = tuple(map(alignment, settings))
    teachers = tuple(TeacherShape(width, MODEL.grid) for width in widths)
    return randomised(Objective(MODEL, config, alignments, teachers=teachers), seed=1)


def inputs_of(case: str, batch: int = 3) -> TrainingInputs:
    generator = torch.Generator().manual_seed(2)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    _, widths = ALIGNMENTS[case]
    return TrainingInputs(
        latents=randn(batch, *MODEL.latent_shape),
        labels=torch.arange(batch) * 3 % (NULL + 1),
        t=torch.linspace(0.1, 0.8, batch),
        noise=randn(batch, *MODEL.latent_shape),
        teacher_patches=tuple(randn(batch, MODEL.num_tokens, width) for width in widths),
    )


def drawn(config: ObjectiveConfig, positions: torch.Tensor, **changes) -> TrainingInputs:
    """The inputs of samples whose latents and labels are functions of their position."""
    latents = positions.float()[:, None, None, None] * torch.ones(2, 3, 3)
    settings = {"positions": positions, "seed": SEED, **changes}
    return draw_inputs(config, MODEL, latents, positions % NULL, **settings)


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("weighting", ["uniform", "lognormal"])
def test_inputs_come_from_their_own_streams(path, weighting):
    interpolant = InterpolantConfig(path=path, time_weighting=weighting)
    config = ObjectiveConfig(interpolant=interpolant, label_dropout=0.4)
    positions = torch.tensor([0, 5, 17, 2**31 + 3, 2**40])
    inputs = drawn(config, positions)
    if weighting == "uniform":
        t = noise.uniform(SEED, NoiseStream.TIME, positions)
    else:
        ratio = noise.normal(SEED, NoiseStream.TIME, positions).double().exp()
        t = ratio / (1 + ratio) if path == "linear" else torch.atan(ratio) * 2 / math.pi
    torch.testing.assert_close(inputs.t, t.float())
    assert torch.equal(inputs.noise, noise.normal(SEED, NoiseStream.NOISE, positions, (2, 3, 3)))
    dropped = noise.uniform(SEED, NoiseStream.LABEL_DROP, positions) < 0.4
    assert torch.equal(inputs.labels, torch.where(dropped, NULL, positions % NULL))
    assert torch.equal(inputs.latents[:, 1, 2, 0], positions.float())
    assert inputs.cls_noise is None
    assert inputs.teacher_patches == ()


def test_noise_takes_the_dtype_of_the_latents():
    positions = torch.arange(4)
    latents = torch.zeros(4, 1, 2, 2, dtype=torch.bfloat16)
    inputs = draw_inputs(
        ObjectiveConfig(), MODEL, latents, positions, positions=positions, seed=SEED
    )
    wide = noise.normal(SEED, NoiseStream.NOISE, positions, (1, 2, 2))
    assert torch.equal(inputs.noise, wide.bfloat16())
    assert inputs.t.dtype == torch.float32


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_the_share_of_null_labels(probability):
    config = ObjectiveConfig(label_dropout=probability)
    count = 20_000
    positions = torch.arange(count)
    latents = torch.zeros(count, 1, 1, 1)
    inputs = draw_inputs(config, MODEL, latents, positions % NULL, positions=positions, seed=SEED)
    labels = inputs.labels
    found = (labels == NULL).float().mean().item()
    deviation = math.sqrt(probability * (1 - probability) / count)
    assert abs(found - probability) <= 4 * deviation
    kept = labels != NULL
    assert torch.equal(labels[kept], (positions % NULL)[kept])


@pytest.mark.parametrize("weighting", ["uniform", "lognormal"])
def test_neither_order_nor_split_changes_a_draw(weighting):
    config = ObjectiveConfig(
        interpolant=InterpolantConfig(time_weighting=weighting), label_dropout=0.5
    )
    positions = torch.arange(100, 123)
    whole = drawn(config, positions)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    parts = [drawn(config, part) for part in positions[order].split([1, 4, 11, 7])]
    for name in ("latents", "labels", "t", "noise"):
        found = torch.cat([getattr(part, name) for part in parts])
        expected = getattr(whole, name)[order]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for other in (drawn(config, positions + 23), drawn(config, positions, seed=SEED + 1)):
        assert not torch.isclose(whole.t, other.t).any()
        assert not torch.isclose(whole.noise, other.noise).all(dim=(1, 2, 3)).any()
        assert not torch.equal(whole.labels == NULL, other.labels == NULL)


def plain_terms(
    settings: dict, student: torch.Tensor, teacher: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The point-wise and the structural term in float64, written out."""
    pointwise = structural = torch.zeros((), dtype=torch.float64)
    if "pointwise" in settings:
        pointwise = -cosine_similarity(student, teacher, dim=-1).mean()
    if "structural" in settings:
        grams = []
        for tokens in (student, teacher):
            unit = tokens / tokens.norm(dim=-1, keepdim=True)
            grams.append(unit @ unit.mT)
        num_tokens = student.shape[1]
        others = ~torch.eye(num_tokens, dtype=torch.bool)
        rows = [gram[:, others].reshape(-1, num_tokens, num_tokens - 1) for gram in grams]
        if settings["structural"]["kind"] == "mse":
            structural = (rows[0] - rows[1]).square().mean()
        else:
            log_q = (rows[0] / settings["structural"]["tau_student"]).log_softmax(-1)
            log_p = (rows[1] / settings["structural"]["tau_teacher"]).log_softmax(-1)
            structural = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return pointwise, structural


def plain_losses(objective: Objective, case: str, path: str, inputs: TrainingInputs) -> Losses:
    """The losses of `inputs` from the model's outputs, as the paper's Eq. 9 reads."""
    angle = (inputs.t * math.pi / 2)[:, None, None, None]
    t = inputs.t[:, None, None, None]
    if path == "linear":
        x_t = (1 - t) * inputs.latents + t * inputs.noise
        velocity = inputs.noise - inputs.latents
    else:
        x_t = angle.cos() * inputs.latents + angle.sin() * inputs.noise
        turned = angle.cos() * inputs.noise - angle.sin() * inputs.latents
        velocity = math.pi / 2 * turned
    output = objective.sit(x_t, inputs.t, inputs.labels, depths=(1, 2, 3, 4))
    flow = (output.velocity - velocity).double().square().mean()
    total, pointwise, structural = flow, torch.zeros(()).double(), torch.zeros(()).double()
    settings, _ = ALIGNMENTS[case]
    for number, row in enumerate(settings):
        hidden = output.hidden[row["depth"] - 1]
        student = objective.projectors[number](hidden).double()
        terms = plain_terms(row, student, inputs.teacher_patches[number].double())
        weights = [row.get(kind, {}).get("weight", 0.0) for kind in ("pointwise", "structural")]
        total = total + (weights[0] * terms[0] + weights[1] * terms[1]) / len(settings)
        pointwise = pointwise + terms[0] / len(settings)
        structural = structural + terms[1] / len(settings)
    by_time = torch.zeros(2, TIME_BINS, dtype=torch.float64)
    squares = (output.velocity - velocity).double().square().flatten(1).mean(1)
    for time, value in zip(inputs.t.tolist(), squares, strict=True):
        by_time[:, int(time * TIME_BINS)] += torch.tensor([value.item(), 1.0])
    return Losses(total, flow, pointwise, structural, torch.zeros(()).double(), by_time)


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("case", list(ALIGNMENTS))
def test_the_losses_are_the_sum_written_out(case, path):
    objective, inputs = objective_of(case, path), inputs_of(case)
    losses = objective(inputs)
    expected = plain_losses(objective, case, path, inputs)
    for found, wanted in zip(losses, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=1e-6)
    assert [value.requires_grad for value in losses] == [True, True, *[False] * 4]
    if case == "none":
        assert losses.total.item() == losses.flow.item()
    else:
        assert abs(losses.total - losses.flow) > 1e-3
    parameters = list(objective.parameters())
    gradients = torch.autograd.grad(losses.total, parameters)
    references = torch.autograd.grad(expected.total, parameters)
    for (name, _), found, wanted in zip(
        objective.named_parameters(), gradients, references, strict=True
    ):
        difference = (found - wanted).norm() / wanted.norm().clamp_min(1e-6)
        assert difference < 1e-4, f"{name}: {difference:.2e}"


@pytest.mark.parametrize("case", ["one", "two", "two_at_one_depth"])
def test_bf16_weights_give_float32_losses_and_near_gradients(case):
    objective, inputs = objective_of(case), inputs_of(case, batch=8)
    # The same rounded weights on both sides: what is compared is the arithmetic.
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.copy_(parameter.bfloat16())
    expected = objective(inputs)
    references = torch.autograd.grad(expected.total, list(objective.parameters()))
    objective.bfloat16()
    losses = objective(inputs)
    for found, wanted in zip(losses, expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    gradients = torch.autograd.grad(losses.total, list(objective.parameters()))
    flat = torch.cat([gradient.float().flatten() for gradient in gradients])
    reference = torch.cat([gradient.flatten() for gradient in references])
    assert flat.isfinite().all()
    assert (flat - reference).norm() / reference.norm() < 0.03
    projected = [
        (found.float() - wanted).norm() / wanted.norm()
        for (name, _), found, wanted in zip(
            objective.named_parameters(), gradients, references, strict=True
        )
        if name.startswith("projectors.") and name.endswith(".weight")
    ]
    assert len(projected) == 3 * len(ALIGNMENTS[case][1])
    assert max(projected) < 0.1


@pytest.mark.parametrize("variant", ["SiT-B/2", "SiT-L/2", "SiT-XL/4"])
def test_weights_have_the_names_and_shapes_of_repa(variant):
    shapes = json.loads((GOLDEN / "sit_shapes.json").read_text())[variant]
    official = {name: tuple(shape) for name, shape in shapes["state_dict"].items()}
    width = official["projectors.0.4.weight"][0]
    model = SiTConfig(variant=variant, input_size=32, in_channels=4, num_classes=1000)
    config = alignment(POINTWISE, hidden_width=2048)
    with torch.device("meta"):
        teacher = TeacherShape(width, model.grid)
        objective = Objective(model, ObjectiveConfig(), (config,), teachers=(teacher,))
    ours = {official_name(name): tuple(p.shape) for name, p in objective.named_parameters()}
    assert len(ours) == len(list(objective.parameters()))
    assert (
        sum(map(math.prod, ours.values())) + math.prod(official["pos_embed"])
        == (shapes["params_total"])
    )
    listed = {
        name: shape
        for name, shape in ours.items()
        if not name.startswith("blocks.") or name.startswith("blocks.0.")
    }
    # REPA's projectors stand before its final layer, ours after: names are the file's key.
    trained = [name for name in official if name != "pos_embed"]
    trained.sort(key=lambda name: name.startswith("projectors."))
    assert list(listed) == trained
    assert listed == {name: official[name] for name in trained}


def test_several_projectors_are_numbered_as_the_alignments():
    objective = objective_of("three")
    shapes = {official_name(name): tuple(p.shape) for name, p in objective.named_parameters()}
    _, widths = ALIGNMENTS["three"]
    assert [shapes[f"projectors.{i}.4.weight"] for i in range(3)] == [(w, 20) for w in widths]
    assert all(shapes[f"projectors.{i}.0.weight"] == (20, 32) for i in range(3))


def reaches(gradients: dict[str, torch.Tensor], prefix: str) -> list[bool]:
    return [bool(g.abs().sum() > 0) for name, g in gradients.items() if name.startswith(prefix)]


def test_alignment_trains_its_projector_and_the_blocks_up_to_its_tap():
    objective, inputs = objective_of("two"), inputs_of("two")
    losses = objective(inputs)
    # Both terms are subtracted exactly: what is left is the alignment's share.
    share = losses.total - losses.flow
    parameters = dict(objective.named_parameters())
    gradients = torch.autograd.grad(
        share, list(parameters.values()), retain_graph=True, materialize_grads=True
    )
    found = dict(zip(parameters, gradients, strict=True))
    after = ("sit.blocks.3.", "sit.final_layer.")
    for name, gradient in found.items():
        if name.startswith(after):
            assert gradient.abs().max() < 1e-7, name
    for prefix in ("projectors.0.", "projectors.1.", "sit.x_embedder.", "sit.t_embedder."):
        assert all(reaches(found, prefix)), prefix
    for number in range(3):
        assert any(reaches(found, f"sit.blocks.{number}.")), number
    flow = torch.autograd.grad(losses.flow, list(parameters.values()), materialize_grads=True)
    found = dict(zip(parameters, flow, strict=True))
    assert not any(reaches(found, "projectors."))
    assert all(any(reaches(found, prefix)) for prefix in (*after, "sit.blocks.0."))


@pytest.mark.parametrize("case", ["one", "two_at_one_depth"])
def test_without_flow_later_blocks_have_no_gradient_at_all(case):
    objective, inputs = objective_of(case), inputs_of(case)
    # A final layer cut off from its input: the flow loss then depends on its bias alone.
    for parameter in objective.sit.final_layer.parameters():
        nn.init.zeros_(parameter)
    objective(inputs).total.backward()
    deepest = max(row["depth"] for row in ALIGNMENTS[case][0])
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith("sit.blocks."):
            later = int(name.split(".")[2]) >= deepest
            assert bool(parameter.grad.abs().max() == 0) == later or not later, name
    for number in range(deepest):
        grown = [
            bool((p.grad != 0).any())
            for name, p in objective.named_parameters()
            if name.startswith(f"sit.blocks.{number}.") and p.grad is not None
        ]
        assert any(grown)


def test_teachers_get_no_gradient_and_must_be_as_many_as_alignments():
    objective, inputs = objective_of("two"), inputs_of("two")
    patches = tuple(patch.requires_grad_() for patch in inputs.teacher_patches)
    objective(inputs).total.backward()
    assert all(patch.grad is None for patch in patches)
    with pytest.raises(ValueError, match="zip"):
        objective(inputs._replace(teacher_patches=patches[:1]))
