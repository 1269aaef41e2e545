"""Stored tokens: bounds of the rounding, unusual tokens, and moving between devices."""

import pickle

import pytest
import torch

from srepa_ds.data.stored_tokens import StoredTokens, as_stored


def tokens(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    # Sizes of tokens differ by orders of magnitude, as in real teachers with outliers.
    sizes = torch.rand(*shape[:-1], 1, generator=generator) * 6 - 3
    return (torch.randn(*shape, generator=generator) * 10**sizes).to(dtype)


@pytest.mark.parametrize("width", [1, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_int8_is_off_by_at_most_half_a_step(width, dtype):
    patches = tokens(3, 7, width, dtype=dtype)
    stored = as_stored(patches, None, storage="int8")
    assert (stored.patches.dtype, stored.patches_scale.dtype) == (torch.int8, torch.float32)
    expected_scale = patches.float().abs().amax(-1) / 127
    assert torch.equal(stored.patches_scale, expected_scale)
    error = (patches.double() - stored.patches_float32().double()).abs()
    assert bool((error <= 0.5 * expected_scale.double()[..., None] * (1 + 1e-4)).all())
    # The largest channel of each token is exact in int8.
    assert bool((stored.patches.abs().amax(-1) == 127).all())


def test_bf16_is_torch_s_own_rounding():
    patches = tokens(2, 5, 9)
    stored = as_stored(patches, None, storage="bf16")
    assert stored.patches_scale is None
    assert torch.equal(stored.patches, patches.to(torch.bfloat16))
    error = (patches - stored.patches_float32()).abs()
    assert bool((error <= patches.abs() * 2**-8).all())
    assert error.max() > 0


@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_zero_and_tiny_tokens_stay_finite(storage):
    patches = tokens(1, 4, 8)
    patches[0, 1] = 0
    patches[0, 2] = 1e-44
    stored = as_stored(patches, torch.zeros(1, 8), storage=storage)
    assert torch.equal(stored.patches_float32()[0, 1], torch.zeros(8))
    assert (stored.patches_float32()[0, 2] - patches[0, 2]).abs().max() <= 1e-44
    if storage == "int8":
        assert stored.patches_scale[0, 1] == 0
    assert bool(stored.patches_float32().isfinite().all())


@pytest.mark.parametrize("storage", ["bf16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(storage, value):
    patches = tokens(2, 3, 4)
    patches[1, 2, 0] = value
    stored = as_stored(patches, None, storage=storage)
    finite = stored.patches_float32().isfinite().all(-1)
    assert finite.tolist() == [[True] * 3, [True, True, False]]
    assert stored.finite().tolist() == [True, False]
    cls = torch.tensor([[value, 0, 0, 0], [0.0] * 4])
    assert as_stored(patches, cls, storage=storage).finite().tolist() == [False, False]


def test_class_tokens_are_kept_whole():
    cls = tokens(3, 8)
    for storage in ("bf16", "int8"):
        assert torch.equal(as_stored(tokens(3, 2, 8), cls, storage=storage).cls, cls)


@pytest.mark.parametrize("storage", ["bf16", "int8"])
@pytest.mark.parametrize("has_cls", [True, False])
def test_moving_keeps_every_tensor(storage, has_cls):
    stored = as_stored(tokens(2, 3, 4), tokens(2, 4) if has_cls else None, storage=storage)
    moved = stored.to("meta", non_blocking=True)
    assert (len(moved), set(moved.named_tensors())) == (2, set(stored.named_tensors()))
    for name, tensor in stored.named_tensors().items():
        other = getattr(moved, name)
        expected = ("meta", tensor.shape, tensor.dtype)
        assert (other.device.type, other.shape, other.dtype) == expected
    again = pickle.loads(pickle.dumps(stored))
    assert isinstance(again, StoredTokens)
    assert torch.equal(again.patches_float32(), stored.patches_float32())
