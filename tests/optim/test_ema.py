"""The moving average of the weights against its definition, in any partition."""

import pytest
import torch

from srepa_ds.optim.ema import MAIN_EMA, EmaConfig, ShardedEma, decays_of, power_kind
from srepa_ds.optim.power_ema import gamma_of


def trajectory(steps: int) -> torch.Tensor:
    return torch.randn(steps + 1, 37, generator=torch.Generator().manual_seed(0))


def averaged(
    config: EmaConfig, path: torch.Tensor, cuts: list[int], kind: str = MAIN_EMA
) -> torch.Tensor:
    """Returns the average of a trajectory whose weights are cut at `cuts`."""
    masters = list(path[0].clone().tensor_split(cuts))
    ema = ShardedEma(config, masters)
    for step, values in enumerate(path[1:], start=1):
        for master, new in zip(masters, values.tensor_split(cuts), strict=True):
            master.copy_(new)
        ema.update(masters, step=step)
    return torch.cat(ema.averages[kind])


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999])
def test_it_is_the_recursion_in_float64(decay, warmup):
    config = EmaConfig(decay=decay, warmup=warmup)
    path = trajectory(30)
    expected = path[0].double()
    for step, values in enumerate(path[1:].double(), start=1):
        kept = min(decay, 1 - 1 / (step + 1)) if warmup else decay
        expected = kept * expected + (1 - kept) * values
    found = averaged(config, path, [])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_partition_does_not_change_a_bit():
    config, path = EmaConfig(decay=0.99), trajectory(20)
    whole = averaged(config, path, [])
    assert torch.equal(averaged(config, path, [1, 5, 30]), whole)
    assert torch.equal(averaged(config, path, [20, 36]), whole)


def test_warmup_begins_as_a_running_mean():
    config, path = EmaConfig(decay=0.9999, warmup=True), trajectory(10)
    torch.testing.assert_close(averaged(config, path, []), path.mean(0), rtol=1e-5, atol=1e-6)
    decay = decays_of(config)[MAIN_EMA]
    assert [decay(step) for step in (1, 2, 3)] == pytest.approx([1 / 2, 2 / 3, 3 / 4])
    assert decay(10**6) == 0.9999


def test_it_neither_follows_the_masters_storage_nor_wants_gradients():
    master = torch.ones(3, requires_grad=True)
    ema = ShardedEma(EmaConfig(decay=0.5), [master])
    with torch.no_grad():
        master.fill_(3.0)
    assert ema.averages[MAIN_EMA][0].tolist() == [1, 1, 1]
    ema.update([master], step=1)
    assert ema.averages[MAIN_EMA][0].tolist() == [2, 2, 2]
    assert not ema.averages[MAIN_EMA][0].requires_grad


def test_a_rank_without_weights_has_nothing_to_do():
    ema = ShardedEma(EmaConfig(), [])
    ema.update([], step=1)
    assert ema.averages == {MAIN_EMA: []}


def test_several_averages_are_kept_at_once_and_each_for_itself():
    config = EmaConfig(decay=0.9, more_decays=(0.5, 0.999), power_sigmas=(0.05, 0.1))
    kinds = ["ema", "ema-0.5", "ema-0.999", "ema-power-0.05", "ema-power-0.1"]
    assert list(decays_of(config)) == kinds
    path = trajectory(25)
    for decay, kind in ((0.9, "ema"), (0.5, "ema-0.5"), (0.999, "ema-0.999")):
        alone = averaged(EmaConfig(decay=decay), path, [])
        assert torch.equal(averaged(config, path, [7], kind), alone)


@pytest.mark.parametrize("sigma", [0.03, 0.1, 0.25])
def test_a_power_average_weighs_the_past_by_a_power_of_time(sigma):
    steps = 400
    path = trajectory(steps)
    found = averaged(EmaConfig(power_sigmas=(sigma,)), path, [], power_kind(sigma))
    gamma = gamma_of(sigma)
    # The recursion's weights in closed form: products of decays.
    weights = torch.zeros(steps, dtype=torch.float64)
    for step in range(1, steps + 1):
        kept = (1 - 1 / step) ** (gamma + 1)
        weights *= kept
        weights[step - 1] = 1 - kept
    expected = (weights[:, None] * path[1:].double()).sum(0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert weights.sum().item() == pytest.approx(1)
    times = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    mean = (weights * times).sum()
    spread = (weights * (times - mean) ** 2).sum().sqrt()
    assert spread.item() == pytest.approx(sigma, abs=0.004)


def test_the_same_average_twice_is_refused():
    with pytest.raises(ValueError, match="more_decays contains a value twice"):
        EmaConfig(more_decays=(0.9, 0.9))
