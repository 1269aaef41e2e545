import tracemalloc

import numpy as np
import pytest

from srepa_ds.sampling.npz import NpzMember, write_npz


def rows_of(count, block_rows, row_shape, dtype):
    for start in range(0, count, block_rows):
        stop = min(start + block_rows, count)
        numbers = np.arange(start, stop).reshape(-1, *(1,) * len(row_shape))
        yield np.broadcast_to(numbers, (stop - start, *row_shape)).astype(dtype)


@pytest.mark.parametrize(("row_shape", "dtype"), [((), np.int64), ((3,), np.float32)])
def test_numpy_reads_what_was_written(tmp_path, row_shape, dtype):
    path = tmp_path / "arrays.npz"
    blocks = rows_of(11, 4, row_shape, dtype)
    write_npz(path, [NpzMember("rows", (11, *row_shape), np.dtype(dtype), blocks)])
    with np.load(path) as archive:
        found = archive["rows"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, next(rows_of(11, 11, row_shape, dtype)))


def test_memory_does_not_grow_with_the_set(tmp_path):
    block_bytes, num_blocks = 1 << 20, 48
    blocks = rows_of(num_blocks * 16, 16, (1 << 16,), np.uint8)
    shape = (num_blocks * 16, 1 << 16)
    tracemalloc.start()
    write_npz(tmp_path / "big.npz", [NpzMember("arr_0", shape, np.dtype(np.uint8), blocks)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "big.npz").stat().st_size > num_blocks * block_bytes
    assert peak < 8 * block_bytes


def test_blocks_must_add_up_to_the_array(tmp_path):
    short = NpzMember("rows", (12,), np.dtype(np.int64), rows_of(11, 4, (), np.int64))
    with pytest.raises(ValueError, match="got 11 rows, expected 12"):
        write_npz(tmp_path / "short.npz", [short])
    other = NpzMember("rows", (11, 2), np.dtype(np.int64), rows_of(11, 4, (3,), np.int64))
    with pytest.raises(ValueError, match=r"int64\[4, 3\].*int64\[11, 2\]"):
        write_npz(tmp_path / "other.npz", [other])
