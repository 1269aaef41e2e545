"""A checkpoint of whole tensors, written one at a time."""

import weakref
from pathlib import Path

import pytest
import torch
from builders import contents, largest_file
from torch import Tensor

from srepa_ds.checkpoint.folder import fault_of, newest_valid
from srepa_ds.checkpoint.fragment_file import Piece
from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.checkpoint.saving import save, save_whole
from srepa_ds.errors import OutputError

KINDS = ("master", "ema", "exp_avg", "exp_avg_sq")
SHAPES = {"b.weight": (3, 5), "a.bias": (4,), "scalar": ()}
STATE = {"samples_seen": 70, "adam_step": 6, "config": {"run": {}}, "identity": {}}


def value(kind: str, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(len(kind) + 10 * len(name))
    return torch.randn(SHAPES[name], generator=generator)


def saved(root: Path, **changes) -> Path:
    kinds = {kind: lambda name, kind=kind: value(kind, name) for kind in KINDS}
    settings = {"step": 7, "shapes": SHAPES, "kinds": kinds, "state": STATE, **changes}
    return save_whole(root, **settings)


def test_it_is_byte_for_byte_that_of_a_run(tmp_path):
    pieces = [
        Piece(kind, name, shape, 0, value(kind, name).reshape(-1))
        for name, shape in SHAPES.items()
        for kind in KINDS
    ]
    expected = save(tmp_path / "run", step=7, pieces=pieces, state=STATE, rank=0)
    found = saved(tmp_path / "whole")
    assert found.name == expected.name
    assert contents(found.parent) == contents(expected.parent)


def test_it_reads_back(tmp_path):
    folder = saved(tmp_path)
    assert newest_valid(tmp_path) == folder
    assert fault_of(folder) is None
    reader = CheckpointReader(folder)
    assert reader.names("ema") == [*SHAPES]
    for kind in KINDS:
        for name in SHAPES:
            assert torch.equal(reader.tensor(kind, name), value(kind, name))
    assert {key: reader.state[key] for key in STATE} == STATE
    assert reader.state["step"] == 7


def test_no_tensor_is_kept_while_the_next_is_read(tmp_path):
    given: list[weakref.ref[Tensor]] = []

    def read(name: str) -> Tensor:
        # The last one may still be held by the loop.
        assert sum(tensor() is not None for tensor in given) <= 1
        result = value("master", name)
        given.append(weakref.ref(result))
        return result

    saved(tmp_path, kinds={"master": read})
    assert len(given) == len(SHAPES)


def test_nothing_is_left_of_an_attempt_that_fails(tmp_path):
    def failing(name: str) -> Tensor:
        if name == "a.bias":
            raise ValueError("damaged")
        return value("master", name)

    with pytest.raises(ValueError, match="damaged"):
        saved(tmp_path, kinds={"master": failing})
    assert list(tmp_path.iterdir()) == []
    with largest_file(64), pytest.raises(OutputError, match="cannot write the checkpoint under"):
        saved(tmp_path)
    assert list(tmp_path.iterdir()) == []
