"""Random numbers addressed by sample: Philox 4x32-10 in tensor integer arithmetic.

A draw depends on (seed, noise stream, sample id, draw number) and on no earlier draw. So it is the
same on CPU and GPU, for any batch split, rank count or order, and a resumed run needs no generator
state. Generator: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11).
"""

import math
from enum import IntEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_DRAW_BITS = 24

Words = tuple[Tensor, Tensor, Tensor, Tensor]


class NoiseStream(IntEnum):
    """The purpose of a draw; two noise streams never share numbers.

    The values are part of a run's identity.
    """

    TIME = 1
    NOISE = 2
    POSTERIOR = 3
    LABEL_DROP = 4
    CLS_NOISE = 5
    SAMPLE_START = 6
    SAMPLE_LABEL = 7
    SAMPLE_STEP = 8
    SAMPLE_CLS_START = 9
    SAMPLE_CLS_STEP = 10
    DATA_ORDER = 11
    AUGMENTATION = 12
    MIRROR = 13


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Returns the four 32-bit words (as int64 tensors) of Philox 4x32-10 at `counter`.

    `counter` holds four broadcastable int64 tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64, so both halves of the true 64-bit product survive.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def bits(
    seed: int, noise_stream: NoiseStream, ids: Int[Tensor, " batch"], num_words: int, draw: int = 0
) -> Int[Tensor, "batch num_words"]:
    """Returns `num_words` random 32-bit words (int64) for each sample id, on the device of `ids`.

    Raises ValueError if `draw` does not fit in 24 bits or `seed` is negative.
    """
    if not 0 <= draw < 1 << _DRAW_BITS:
        raise ValueError(f"draw must be in [0, 2**{_DRAW_BITS}), got {draw}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    num_blocks = -(-num_words // 4)
    block = torch.arange(num_blocks, dtype=torch.int64, device=ids.device)[None, :]
    ids = ids.to(torch.int64)[:, None]
    address = torch.full_like(block, (int(noise_stream) << _DRAW_BITS) | draw)
    words = philox((block, address, ids & _WORD, (ids >> 32) & _WORD), (seed & _WORD, seed >> 32))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :num_words]


def uniform(
    seed: int,
    noise_stream: NoiseStream,
    ids: Int[Tensor, " batch"],
    shape: tuple[int, ...] = (),
    *,
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "batch ..."]:
    """Returns uniform numbers in the open interval (0, 1), shape (batch, *shape).

    float32 uses 23 bits of one word, float64 52 bits of two; every value is exact in its dtype.
    """
    numel = math.prod(shape)
    return _open_unit(seed, noise_stream, ids, numel, draw, dtype).reshape(len(ids), *shape)


def normal(
    seed: int,
    noise_stream: NoiseStream,
    ids: Int[Tensor, " batch"],
    shape: tuple[int, ...] = (),
    *,
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "batch ..."]:
    """Returns standard normal numbers by Box-Muller, shape (batch, *shape).

    The underlying integers are equal on every device; the normals agree up to the last bit or two,
    where devices' log and cos differ.
    """
    numel = math.prod(shape)
    pairs = _open_unit(seed, noise_stream, ids, numel + numel % 2, draw, dtype)
    radius_uniform, angle_uniform = pairs[:, 0::2], pairs[:, 1::2]
    radius = torch.sqrt(-2.0 * torch.log(radius_uniform))
    angle = (2.0 * math.pi) * angle_uniform
    numbers = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return numbers.flatten(1)[:, :numel].reshape(len(ids), *shape)


def integers(
    seed: int, noise_stream: NoiseStream, ids: Int[Tensor, " batch"], high: int, *, draw: int = 0
) -> Int[Tensor, " batch"]:
    """Returns one integer in [0, high) per sample id.

    The bias of the multiply-shift map is below high / 2**31, too small to show in any sample set
    here.
    """
    return (bits(seed, noise_stream, ids, 1, draw)[:, 0] >> 1) * high >> 31


def _open_unit(
    seed: int, noise_stream: NoiseStream, ids: Tensor, count: int, draw: int, dtype: torch.dtype
) -> Tensor:
    if dtype == torch.float32:
        words = bits(seed, noise_stream, ids, count, draw)
        return ((words >> 9).to(dtype) + 0.5) * 2.0**-23
    if dtype == torch.float64:
        words = bits(seed, noise_stream, ids, 2 * count, draw)
        wide = ((words[:, 0::2] << 20) | (words[:, 1::2] >> 12)).to(dtype)
        return (wide + 0.5) * 2.0**-52
    raise ValueError(f"dtype must be float32 or float64, got {dtype}")
