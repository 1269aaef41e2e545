"""The configured AdamW against its formula, and the learning rate at each step."""

import pytest
import torch
from torch.nn import Parameter

from srepa_ds.optim.adamw import OptimizerConfig, build_optimizer
from srepa_ds.optim.learning_rate import learning_rate


def test_it_is_adamw():
    config = OptimizerConfig(
        learning_rate=0.1, betas=(0.8, 0.95), epsilon=1e-3, weight_decay=0.01, warmup_steps=2
    )
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, generator=generator, dtype=torch.float64)
    parameter = Parameter(start.clone())
    optimizer = build_optimizer(config, iter([parameter]))
    (group,) = optimizer.param_groups
    weights, first, second = start.clone(), torch.zeros(5), torch.zeros(5)
    for step in range(6):
        gradient = torch.randn(5, generator=generator, dtype=torch.float64)
        parameter.grad = gradient.clone()
        group["lr"] = learning_rate(config, step)
        optimizer.step()
        rate = 0.1 * min(1.0, (step + 1) / 2)
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        unbiased = first / (1 - 0.8 ** (step + 1))
        scale = (second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-3
        weights = weights * (1 - rate * 0.01) - rate * unbiased / scale
    torch.testing.assert_close(parameter.detach(), weights)


def test_all_weights_are_one_group():
    parameters = [Parameter(torch.zeros(n)) for n in (1, 2, 3)]
    (group,) = build_optimizer(OptimizerConfig(), parameters).param_groups
    assert group["params"] == parameters
    assert group["weight_decay"] == 0


def test_the_learning_rate_grows_to_its_value_and_stays():
    config = OptimizerConfig(learning_rate=0.4, warmup_steps=4)
    rates = [learning_rate(config, step) for step in range(7)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4])
    assert learning_rate(OptimizerConfig(learning_rate=0.4), 0) == 0.4


def test_the_learning_rate_falls_along_half_a_cosine():
    config = OptimizerConfig(
        learning_rate=0.4,
        schedule="cosine",
        warmup_steps=2,
        decay_steps=6,
        minimum_learning_rate=0.1,
    )
    rates = [learning_rate(config, step) for step in range(9)]
    half = 0.3 * (1 - 0.5**0.5) / 2
    falling = [0.4, 0.4 - half, 0.25, 0.1 + half, 0.1]
    assert rates == pytest.approx([0.2, 0.4, *falling, 0.1, 0.1])
    assert rates[6] == 0.1
    whole = OptimizerConfig(learning_rate=0.4, schedule="cosine", decay_steps=4)
    assert [learning_rate(whole, step) for step in (0, 2, 4)] == pytest.approx([0.4, 0.2, 0.0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"decay_steps": 5}, "decay_steps belongs to schedule 'cosine'"),
        ({"minimum_learning_rate": 1e-5}, "belongs to schedule 'cosine'"),
        ({"schedule": "cosine"}, "needs decay_steps beyond warmup_steps 0"),
        ({"schedule": "cosine", "warmup_steps": 5, "decay_steps": 5}, "beyond warmup_steps 5"),
        (
            {"schedule": "cosine", "decay_steps": 5, "minimum_learning_rate": 1e-3},
            "minimum_learning_rate 0.001 is above learning_rate 0.0001",
        ),
        ({"cpu_adam": "numpy"}, "'torch' or 'deepspeed'"),
    ],
)
def test_a_schedule_that_is_none_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        OptimizerConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [{"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.9)}, {"epsilon": 0.0}, {"learning_rate": 0.0},
     {"weight_decay": -1.0}, {"gradient_clipping": -1.0}, {"warmup_steps": -1}],
)  # fmt: skip
def test_what_adamw_cannot_take_is_refused(settings):
    with pytest.raises(ValueError, match="validation error"):
        OptimizerConfig(**settings)
