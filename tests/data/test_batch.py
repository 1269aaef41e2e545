import pytest
import torch

from srepa_ds.data.batch import Batch
from srepa_ds.data.stored_tokens import as_stored
from srepa_ds.errors import DataError


def batch(images=True, moments=False):
    ids = torch.arange(2)
    return Batch(
        images=torch.zeros(2, 3, 4, 5, dtype=torch.uint8) if images else None,
        moments=torch.zeros(2, 8, 2, 2) if moments else None,
        labels=ids,
        sample_ids=ids + 10,
        positions=ids + 20,
        teacher_tokens=(
            as_stored(torch.ones(2, 3, 4), None, storage="bf16"),
            as_stored(torch.ones(2, 3, 5), torch.ones(2, 5), storage="int8"),
        ),
    )


@pytest.mark.parametrize(("images", "moments"), [(True, False), (False, True), (True, True)])
def test_moving_keeps_every_field(images, moments):
    before = batch(images, moments)
    after = before.to("meta", non_blocking=True)
    for name in ("images", "moments", "labels", "sample_ids", "positions"):
        first, second = getattr(before, name), getattr(after, name)
        if first is None:
            assert second is None
        else:
            assert (second.device.type, second.shape) == ("meta", first.shape)
            assert second.dtype == first.dtype
    assert len(after) == 2
    for first, second in zip(before.teacher_tokens, after.teacher_tokens, strict=True):
        assert set(first.named_tensors()) == set(second.named_tensors())
        assert {t.device.type for t in second.named_tensors().values()} == {"meta"}


def test_missing_pixels_are_named():
    assert batch().pixels.shape == (2, 3, 4, 5)
    with pytest.raises(DataError, match="hold no images"):
        _ = batch(images=False, moments=True).pixels


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinning_pins_every_tensor():
    pinned = batch(moments=True).pin_memory()
    assert all(getattr(pinned, name).is_pinned() for name in ("images", "moments", "positions"))
    for tokens in pinned.teacher_tokens:
        assert all(tensor.is_pinned() for tensor in tokens.named_tensors().values())
