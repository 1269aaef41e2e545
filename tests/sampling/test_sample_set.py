import json

import numpy as np
import pytest
from PIL import Image

from srepa_ds.errors import DataError
from srepa_ds.sampling.provenance import Provenance
from srepa_ds.sampling.sample_set import (
    read_contact_sheet,
    read_provenance,
)
from srepa_ds.sampling.writer import ChunkWriter


def flipped(content: bytes) -> bytes:
    middle = len(content) // 3
    return content[:middle] + bytes(255 - byte for byte in content[middle : middle + 40]) + (
        content[middle + 40 :]
    )  # fmt: skip


def test_contact_sheets_are_whole_or_named(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))
    path = tmp_path / "contact_sheet.png"
    picture.save(path)
    np.testing.assert_array_equal(np.asarray(read_contact_sheet(tmp_path)), np.asarray(picture))
    whole = path.read_bytes()
    for content in (b"", whole[:30], whole[:2000], b"text", flipped(whole)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"contact_sheet\.png is not a finished sample set"):
            read_contact_sheet(tmp_path)


def test_provenance_is_an_object_or_nothing(tmp_path):
    assert read_provenance(tmp_path) == {}
    path = tmp_path / "provenance.json"
    path.write_text('{"ema": "0.9"}')
    assert read_provenance(tmp_path) == {"ema": "0.9"}
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"provenance\.json: Is a directory"):
        read_provenance(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", json.dumps("x").encode()])
def test_a_damaged_provenance_is_named_by_reader_and_writer(tmp_path, content):
    path = tmp_path / "provenance.json"
    path.write_bytes(content)
    for use in (
        lambda: read_provenance(tmp_path),
        lambda: ChunkWriter(tmp_path, Provenance({"ema": "0.9"})),
    ):
        with pytest.raises(DataError, match=r"provenance\.json: is not .*JSON.*another folder"):
            use()
    assert path.read_bytes() == content
