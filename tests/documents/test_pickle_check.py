"""What is found in pickles of weights without opening them; hostile ones are in `tests/weights`."""

import argparse
import io
import zipfile

import pytest
import torch

from srepa_ds.documents.pickle_check import check_pickle

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def pickled(content: object) -> tuple[bytes, dict[str, int]]:
    """The pickle of a file of torch.save, and the sizes of its storages by key."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as archive:
        sizes = {
            entry.filename.partition("/data/")[2]: entry.file_size for entry in archive.infolist()
        }
        return archive.read("archive/data.pkl"), {k: v for k, v in sizes.items() if k.isdigit()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_storages_have_the_sizes_of_their_records(dtype):
    whole = torch.ones(3, 5).to(dtype)
    found, sizes = pickled({"whole": whole, "view": whole[1:].T, "other": torch.ones(2).to(dtype)})
    assert check_pickle(io.BytesIO(found)) == sizes
    assert len(sizes) == 2


def test_everything_that_a_trainer_keeps_passes():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(
        model="SiT-XL/2", lr=1e-4, dims=[768], flags=(True, None), names={"a"}
    )
    parts = {"model": model.state_dict(), "ema": dict(model.named_parameters()), "args": args}
    content = {**parts, "opt": optimizer.state_dict(), "steps": 3, "dtype": torch.float32}
    found, sizes = pickled(content)
    assert check_pickle(io.BytesIO(found)) == sizes
