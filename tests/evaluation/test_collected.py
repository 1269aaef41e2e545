"""Features come in any order and from any rank, and give the same sums and rows."""

import pytest
import torch
from ranks import run_function

from srepa_ds.distributed import ranks
from srepa_ds.encoders.features import Features
from srepa_ds.errors import DataError
from srepa_ds.evaluation.collected import Collector, Kept

COUNT, WIDTH = 1500, 5


def features(ids):
    """Returns features of images that are functions of their numbers."""
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(COUNT, WIDTH, generator=generator) + 40
    logits = torch.randn(COUNT, 4, generator=generator)
    return Features(table[ids], logits[ids], table[ids].square())


def seen(order, *, rank, wanted=None):
    """Returns what a collector has seen of the batches in `order`."""
    everything = torch.arange(COUNT)
    kept = Kept(
        spatial=True, pooled_rows=everything if wanted is None else wanted, logit_rows=everything
    )
    collector = Collector(
        kept, width=WIDTH, spatial=WIDTH, classes=4, compares_labels=True, rank=rank
    )
    for ids in order:
        collector.add(features(ids), ids, ids % 4)
    return collector.seen(COUNT)


@pytest.fixture
def alone():
    yield ranks.initialize()
    ranks.close()


def check(found):
    whole = features(torch.arange(COUNT))
    assert torch.equal(found.features["pooled"].rows, whole.pooled)
    assert torch.equal(found.features["logits"].rows, whole.logits)
    for kind, rows in (("pooled", whole.pooled), ("spatial", whole.spatial)):
        statistics = found.features[kind].statistics
        torch.testing.assert_close(statistics.mean, rows.double().mean(0), rtol=1e-12, atol=0)
        expected = torch.cov(rows.double().T)
        torch.testing.assert_close(statistics.covariance(), expected, rtol=1e-9, atol=1e-12)
    hits = (whole.logits.argmax(1) == torch.arange(COUNT) % 4).double().mean()
    assert found.recognised == pytest.approx(hits.item())


@pytest.mark.parametrize("size", [1, 7, 256, COUNT])
def test_the_order_of_batches_does_not_matter(alone, size):
    batches = torch.arange(COUNT).split(size)
    shuffled = [batches[i] for i in torch.randperm(len(batches))]
    check(seen(shuffled, rank=alone))


def test_some_rows_are_kept_and_all_images_summed(alone):
    wanted = torch.tensor([0, 3, 700, COUNT - 1])
    found = seen(torch.arange(COUNT).split(100), rank=alone, wanted=wanted)
    assert torch.equal(found.features["pooled"].rows, features(wanted).pooled)
    assert found.features["pooled"].statistics.count == COUNT


def test_images_that_were_not_seen_are_counted(alone):
    with pytest.raises(DataError, match="10 of 1500 images were not seen"):
        seen([torch.arange(10, COUNT)], rank=alone)


@pytest.mark.parametrize(
    ("seen_of_1500", "message"),
    [
        (1490, "10 of 1500 images were not seen"),
        (1501, "1501 images were seen, and the set has 1500"),
    ],
)
def test_sums_alone_are_counted_too(alone, seen_of_1500, message):
    collector = Collector(
        Kept(), width=WIDTH, spatial=None, classes=0, compares_labels=False, rank=alone
    )
    for ids in torch.arange(seen_of_1500).split(64):
        collector.add(Features(features(ids % COUNT).pooled, None), ids, None)
    with pytest.raises(DataError, match=message):
        collector.seen(COUNT)


def on_ranks(shares: list[list[int]]) -> None:
    """Checks what two ranks have seen together, of which one may have seen nothing."""
    rank = ranks.initialize()
    own = torch.arange(COUNT)[shares[rank.number][0] : shares[rank.number][1]].split(64)
    found = seen(own, rank=rank)
    if rank.is_main:
        check(found)
    else:
        assert found.features["pooled"].rows is None
        assert found.features["pooled"].statistics.count == COUNT


@pytest.mark.slow
@pytest.mark.parametrize("shares", [[[0, 700], [700, COUNT]], [[0, 0], [0, COUNT]]])
def test_two_ranks_see_what_one_does(shares):
    run_function(on_ranks, 2, shares)
