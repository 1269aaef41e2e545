import numpy as np
import pytest
import torch

from srepa_ds import noise
from srepa_ds.noise import NoiseStream

ALL_ONES = 0xFFFFFFFF
# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, answer.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (ALL_ONES,) * 4,
        (ALL_ONES,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
IDS = torch.tensor([0, 1, 2, 77, 2**31, 2**32, 2**32 + 1, 2**40 + 5, 12345])


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, answer):
    words = noise.philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == answer


def test_bits_are_philox_at_the_documented_address():
    seed, draw, sample = 2**40 + 9, 3, 2**33 + 6
    words = noise.bits(seed, NoiseStream.NOISE, torch.tensor([sample]), 6, draw)[0]
    key = (seed & ALL_ONES, seed >> 32)
    for block in range(2):
        counter = (block, (int(NoiseStream.NOISE) << 24) | draw, sample & ALL_ONES, sample >> 32)
        expected = noise.philox(tuple(torch.tensor([word]) for word in counter), key)
        for lane in range(min(4, 6 - 4 * block)):
            assert int(words[4 * block + lane]) == int(expected[lane])


DRAWS = [noise.normal, noise.uniform]


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 5, 7), (4, 2)])
def test_a_sample_draws_the_same_in_any_batch(draw, dtype, shape):
    whole = draw(11, NoiseStream.NOISE, IDS, shape, dtype=dtype)
    assert whole.shape == (len(IDS), *shape)
    assert whole.dtype == dtype
    one_by_one = torch.cat([draw(11, NoiseStream.NOISE, i[None], shape, dtype=dtype) for i in IDS])
    # Vectorised and scalar tails of log and cos may differ in the last bit.
    torch.testing.assert_close(one_by_one, whole, rtol=1e-6, atol=1e-7)
    order = torch.tensor([8, 3, 0, 5, 1, 7, 2, 6, 4])
    shuffled = draw(11, NoiseStream.NOISE, IDS[order], shape, dtype=dtype)
    torch.testing.assert_close(shuffled, whole[order], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_stripes_of_ranks_join_to_the_whole(num_ranks):
    ids = torch.arange(100, 124)
    whole = noise.bits(5, NoiseStream.TIME, ids, 9)
    joined = torch.empty_like(whole)
    for rank in range(num_ranks):
        joined[rank::num_ranks] = noise.bits(5, NoiseStream.TIME, ids[rank::num_ranks], 9)
    assert torch.equal(joined, whole)


@pytest.mark.parametrize("draw", DRAWS)
def test_samples_streams_seeds_and_draws_share_no_numbers(draw):
    ids = torch.arange(4)
    sets = [
        draw(seed, stream, ids, (64,), draw=number, dtype=torch.float64)
        for seed in (0, 1, 2**32)
        for stream in NoiseStream
        for number in (0, 1, 249)
    ]
    numbers = torch.stack(sets).flatten()
    assert numbers.unique().numel() == numbers.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normals_are_standard_and_uncorrelated(dtype):
    numbers = noise.normal(3, NoiseStream.NOISE, torch.arange(64), (4096,), dtype=dtype).double()
    count = numbers.numel()
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        deviation = (numbers**power).mean() - moment
        assert abs(deviation) < 4 * (variance / count) ** 0.5
    correlation = torch.corrcoef(numbers) - torch.eye(64)
    assert correlation.abs().max() < 5.5 / 4096**0.5
    neighbours = (numbers[:, :-1] * numbers[:, 1:]).mean()
    assert abs(neighbours) < 4 / count**0.5
    assert numbers.abs().max() > 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniforms_fill_the_open_interval_evenly(dtype):
    numbers = noise.uniform(3, NoiseStream.TIME, torch.arange(1 << 16), dtype=dtype)
    assert 0 < numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1
    counts = np.histogram(numbers.numpy(), bins=64, range=(0, 1))[0]
    expected = len(numbers) / 64
    # 63 degrees of freedom: above 120 with a probability of 2e-5.
    assert ((counts - expected) ** 2 / expected).sum() < 120


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 24), (torch.float64, 53)])
def test_uniforms_are_odd_multiples_of_their_resolution(dtype, bits):
    # Odd multiples of 2**-bits are exact, and can be neither 0 nor 1.
    multiples = noise.uniform(4, NoiseStream.TIME, torch.arange(1 << 12), dtype=dtype) * 2.0**bits
    assert (multiples.to(torch.int64) % 2 == 1).all()
    assert torch.equal(multiples.to(torch.int64).to(dtype), multiples)


@pytest.mark.parametrize("high", [1, 2, 10, 1000, 1_281_167])
def test_integers_cover_their_range(high):
    numbers = noise.integers(7, NoiseStream.SAMPLE_LABEL, torch.arange(20_000), high)
    assert 0 <= numbers.min()
    assert numbers.max() < high
    assert numbers.dtype == torch.int64
    if high <= 10:
        counts = torch.bincount(numbers, minlength=high)
        assert ((counts - 20_000 / high).abs() < 5 * (20_000 / high) ** 0.5).all()
    mean = numbers.double().mean() / high
    assert abs(mean - (high - 1) / (2 * high)) < 5 * (1 / 12 / 20_000) ** 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"draw": 1 << 24}, "draw"),
        ({"draw": -1}, "draw"),
        ({"dtype": torch.bfloat16}, "dtype"),
    ],
)
def test_what_has_no_address_is_refused(arguments, message):
    arguments = {"seed": 0, "draw": 0, "dtype": torch.float32} | arguments
    with pytest.raises(ValueError, match=message):
        noise.uniform(
            arguments["seed"],
            NoiseStream.TIME,
            torch.tensor([1]),
            draw=arguments["draw"],
            dtype=arguments["dtype"],
        )


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    noise.normal(0, NoiseStream.NOISE, IDS, (8,))
    assert torch.equal(torch.get_rng_state(), state)
