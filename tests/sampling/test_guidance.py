import pytest
import torch

from srepa_ds.sampling.guidance import Guidance, GuidedModel, guided_velocity

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
