"""Mirrored samples: which ones, and where they cannot be had."""

import pytest
import torch
from latent_data import write_data

from srepa_ds.data.loader import DataConfig
from srepa_ds.data.mirror import check_mirror, is_mirrored
from srepa_ds.data.shards import ShardDataset
from srepa_ds.errors import DataError


def test_nothing_is_mirrored_by_default(tmp_path):
    assert DataConfig(folder=tmp_path).mirror is False


def test_the_coin_is_fair_and_one_of_seed_and_position():
    positions = torch.arange(20_000)
    first, second = is_mirrored(1, positions), is_mirrored(2, positions)
    # Four standard deviations of 20,000 fair coins are 283.
    assert abs(int(first.sum()) - 10_000) < 283
    assert abs(int((first ^ second).sum()) - 10_000) < 283
    assert torch.equal(is_mirrored(1, positions[777:779]), first[777:779])
    # A sample's coin in the next epoch is another one.
    assert abs(int((first[:10_000] ^ first[10_000:]).sum()) - 5_000) < 200


def test_the_coins_do_not_change_between_versions():
    assert is_mirrored(3, torch.arange(12)).int().tolist() == [0, 0, 1, 1, 0, 0, 1, 0, 0, 1, 0, 1]


def test_latents_must_hold_those_of_the_mirrored_images(tmp_path):
    check_mirror(ShardDataset(write_data(tmp_path / "both")))
    check_mirror(ShardDataset(write_data(tmp_path / "images", has_latents=False)))
    dataset = ShardDataset(write_data(tmp_path / "plain", mirrored=False))
    with pytest.raises(DataError, match=r"plain: data\.mirror needs .* latents\.mirrored=true"):
        check_mirror(dataset)
