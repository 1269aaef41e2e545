"""The average of the weights against its definition, in any partition."""

import pytest
import torch

from srepa_ds.ema import EmaConfig, ShardedEma, ema_decay


def trajectory(steps: int) -> torch.Tensor:
    return torch.randn(steps + 1, 37, generator=torch.Generator().manual_seed(0))


def averaged(config: EmaConfig, path: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """Averages a trajectory held in pieces cut at `cuts`."""
    masters = list(path[0].clone().tensor_split(cuts))
    ema = ShardedEma(config, masters)
    for step, values in enumerate(path[1:], start=1):
        for master, new in zip(masters, values.tensor_split(cuts), strict=True):
            master.copy_(new)
        ema.update(masters, step=step)
    return torch.cat(ema.averages)


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
    assert [ema_decay(config, step) for step in (1, 2, 3)] == pytest.approx([1 / 2, 2 / 3, 3 / 4])
    assert ema_decay(config, 10**6) == 0.9999


def test_it_neither_follows_the_masters_storage_nor_wants_gradients():
    master = torch.ones(3, requires_grad=True)
    ema = ShardedEma(EmaConfig(decay=0.5), [master])
    with torch.no_grad():
        master.fill_(3.0)
    assert ema.averages[0].tolist() == [1, 1, 1]
    ema.update([master], step=1)
    assert ema.averages[0].tolist() == [2, 2, 2]
    assert not ema.averages[0].requires_grad


def test_a_rank_without_weights_has_nothing_to_do():
    ema = ShardedEma(EmaConfig(), [])
    ema.update([], step=1)
    assert ema.averages == []
