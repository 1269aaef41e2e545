import pytest
import torch
from golden_sit import golden_original_sit
from places import GOLDEN
from safetensors.torch import load_file

from srepa_ds.errors import ConfigError
from srepa_ds.sampling.guidance import (
    Guidance,
    GuidedModel,
    autoguided_velocity,
    guided_velocity,
)
from srepa_ds.sampling.state import StateLayout, state_velocity

NULL = 5


class Recorder:
    """A linear model that records its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x_t, t, labels):
        self.calls.append((x_t, t, labels))
        return x_t * (labels + 1).to(x_t)[:, None, None, None] + t[:, None, None, None]


@pytest.fixture
def x_t():
    return torch.linspace(-1, 1, 3 * 4 * 2 * 3).reshape(3, 4, 2, 3).double()


LABELS = torch.tensor([0, 4, 2])


def test_extrapolates_from_null_to_class_in_every_channel(x_t):
    t = torch.full((3,), 0.25)
    guided = guided_velocity(Recorder(), x_t, t, LABELS, null_label=NULL, scale=2.5)
    model = Recorder()
    conditional, unconditional = model(x_t, t, LABELS), model(x_t, t, torch.full((3,), NULL))
    expected = unconditional + 2.5 * (conditional - unconditional)
    assert guided.dtype == torch.float64
    torch.testing.assert_close(guided, expected)
    assert not torch.allclose(guided[:, 3], conditional[:, 3])


@pytest.mark.parametrize(
    ("guidance_t", "active"), [(0.19, False), (0.2, True), (0.5, True), (0.7, True), (0.71, False)]
)
def test_doubles_the_batch_only_inside_the_closed_interval(x_t, guidance_t, active):
    model = Recorder()
    guided = GuidedModel(model, LABELS, NULL, Guidance(1.5, 0.2, 0.7))
    guided(x_t, 0.5, guidance_t)
    [(seen, times, labels)] = model.calls
    assert len(seen) == len(times) == (6 if active else 3)
    assert labels.tolist() == [0, 4, 2] + [NULL] * (3 if active else 0)


def test_scale_one_is_never_doubled(x_t):
    model = Recorder()
    GuidedModel(model, LABELS, NULL, Guidance())(x_t, 0.5, 0.5)
    assert len(model.calls[0][0]) == 3


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_sees_its_dtype_and_the_solver_float64(x_t, dtype, scale):
    model = Recorder()
    velocity = GuidedModel(model, LABELS, NULL, Guidance(scale), dtype)(x_t, 1 / 3, 1 / 3)
    seen, times, _ = model.calls[0]
    assert seen.dtype == times.dtype == dtype
    assert times[0] == torch.tensor(1 / 3, dtype=torch.float64).to(dtype)
    assert velocity.dtype == torch.float64
    assert velocity.shape == x_t.shape


@torch.no_grad()
def test_three_guided_channels_are_those_of_the_first_sit():
    golden, model = load_file(GOLDEN / "sit_original.safetensors"), golden_original_sit()
    layout, guidance = StateLayout.of(model.config), Guidance(2.5, channels=3)
    x_t, t, labels = golden["in.x"], golden["in.t"], golden["in.y"]
    torch.testing.assert_close(model(x_t, t, labels).velocity, golden["out.v"])
    found = guided_velocity(
        state_velocity(model),
        layout.pack(x_t),
        t,
        labels,
        null_label=model.config.null_label,
        scale=layout.guidance_scales(guidance),
    )
    latents, _ = layout.unpack(found)
    expected = golden["out.cfg"][: len(x_t)].double()
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    # Written out: the fourth channel is the conditional branch's own.
    nulls = torch.full_like(labels, model.config.null_label)
    of_class, of_none = (model(x_t, t, y).velocity.double() for y in (labels, nulls))
    plain = of_none + 2.5 * (of_class - of_none)
    plain[:, 3] = of_class[:, 3]
    torch.testing.assert_close(latents, plain, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(of_none[:, 3], of_class[:, 3], rtol=1e-2)


def test_channels_are_the_first_ones_and_a_class_token_keeps_its_scale():
    layout = StateLayout((4, 1, 2), 3)
    scales = layout.guidance_scales(Guidance(2.5, channels=3, cls_scale=1.5))
    assert scales.tolist() == [2.5] * 6 + [1.0] * 2 + [1.5] * 3
    assert layout.guidance_scales(Guidance(2.5)).tolist() == [2.5] * 8 + [1.0] * 3
    with pytest.raises(ConfigError, match=r"sample\.guided_channels: 5 exceeds the 4 channels"):
        layout.guidance_scales(Guidance(2.5, channels=5))


def test_a_guide_takes_the_place_of_no_class(x_t):
    model, guide, t = Recorder(), Recorder(), torch.full((3,), 0.25)
    scale = torch.tensor([2.5, 1.0, 0.5]).double().expand(4, 2, 3)

    def weaker(x_t, t, labels):
        return 0.5 * guide(x_t, t, labels) - 1

    found = autoguided_velocity(model, weaker, x_t, t, LABELS, scale=scale)
    for recorder in (model, guide):
        [(_, _, labels)] = recorder.calls
        assert labels.tolist() == LABELS.tolist()
    strong = Recorder()(x_t, t, LABELS)
    weak = 0.5 * strong - 1
    torch.testing.assert_close(found, weak + scale * (strong - weak))
    assert found.dtype == torch.float64
    # At scale 1 the guide has no say.
    torch.testing.assert_close(found[..., 1], strong[..., 1])


@pytest.mark.parametrize(("guidance_t", "calls"), [(0.1, 0), (0.2, 1), (0.7, 1), (0.8, 0)])
def test_a_guide_is_asked_inside_the_interval_only(x_t, guidance_t, calls):
    model, guide = Recorder(), Recorder()
    guided = GuidedModel(model, LABELS, NULL, Guidance(1.5, 0.2, 0.7), guide=guide)
    guided(x_t, 0.5, guidance_t)
    assert [len(seen) for seen, _, _ in model.calls] == [3]
    assert [len(seen) for seen, _, _ in guide.calls] == [3] * calls


def test_a_guide_is_not_asked_at_scale_one(x_t):
    guide = Recorder()
    GuidedModel(Recorder(), LABELS, NULL, Guidance(1.0), guide=guide)(x_t, 0.5, 0.5)
    assert guide.calls == []
