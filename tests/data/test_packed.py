"""A batch passes from a worker to its rank whole, in one piece of memory."""

import pickle

import pytest
import torch

from srepa_ds.data.batch import Batch
from srepa_ds.data.packed import packed
from srepa_ds.data.stored_tokens import as_stored


def batch(*, images=True, moments=True, stores=(), values="moments"):
    ids = torch.arange(3)
    return Batch(
        images=torch.randint(0, 256, (3, 3, 5, 7), dtype=torch.uint8) if images else None,
        moments=torch.randn(3, 2, 3, 1, dtype=torch.float32) if moments else None,
        labels=ids,
        sample_ids=ids + 10,
        positions=ids + (1 << 40),
        latent_values=values,
        teacher_tokens=stores,
    )


def tokens(storage, *, has_cls):
    cls = torch.randn(3, 5) if has_cls else None
    return as_stored(torch.randn(3, 4, 5), cls, storage=storage)


STORES = (tokens("int8", has_cls=True), None, tokens("bf16", has_cls=False))
BATCHES = {
    "everything": batch(stores=STORES),
    "images alone": batch(moments=False),
    "latents alone": batch(images=False, values="samples"),
    "no teacher runs here": batch(stores=(None, None)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_nothing_is_lost(name):
    before = BATCHES[name]
    sent = packed(before)
    assert sent.buffer.is_shared()
    after = sent.unpacked()
    assert after.named_tensors().keys() == before.named_tensors().keys()
    pairs = [(before.named_tensors(), after.named_tensors())]
    assert len(before.teacher_tokens) == len(after.teacher_tokens)
    for first, second in zip(before.teacher_tokens, after.teacher_tokens, strict=True):
        assert (first is None) == (second is None)
        if first is not None:
            pairs.append((first.named_tensors(), second.named_tensors()))
    for first, second in pairs:
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            assert second[key].dtype == tensor.dtype
            assert torch.equal(second[key], tensor)
            assert second[key].is_contiguous()
    assert after.latent_values == before.latent_values


def test_all_tensors_share_one_memory():
    after = packed(BATCHES["everything"]).unpacked()
    found = [*after.named_tensors().values()]
    found += [t for s in after.teacher_tokens if s for t in s.named_tensors().values()]
    assert len(found) > 8
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == 1


def test_a_batch_that_is_not_contiguous_is_packed():
    before = batch(moments=False)
    turned = Batch(
        images=before.images.flip(3).transpose(2, 3),
        moments=None,
        labels=before.labels,
        sample_ids=before.sample_ids[::1],
        positions=before.positions,
    )
    assert torch.equal(packed(turned).unpacked().images, turned.images)


def test_it_survives_another_process_s_pickle():
    sent = pickle.loads(pickle.dumps(packed(BATCHES["everything"])))
    assert torch.equal(sent.unpacked().moments, BATCHES["everything"].moments)
