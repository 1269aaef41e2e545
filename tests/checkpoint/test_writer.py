"""Saving in the background: the same guarantee, on real ranks."""

import signal

import pytest
import torch
from ranks import WORKERS, run_worker, start_ranks
from safetensors import safe_open

from srepa_ds.checkpoint.fragment_file import Piece, room_for, snapshot_of, write_snapshot


def test_two_ranks_save_beside_training(tmp_path):
    run_worker("concurrent_saves", 2, tmp_path)


def test_a_rank_killed_while_it_saves_leaves_the_previous_one(tmp_path):
    command = [str(WORKERS / "concurrent_saves.py"), str(tmp_path), "killed"]
    ranks = start_ranks(command, 2)
    outputs = [process.output(seconds=120) for process in ranks]
    assert ranks[1].returncode == -signal.SIGKILL
    assert ranks[0].returncode == 0, outputs[0]


def pieces() -> list[Piece]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(n, generator=generator) for n in (7, 0, 1, 30, 13)]
    return [Piece("master", f"wëight.{i}", (len(v),), 3 * i, v) for i, v in enumerate(values)]


@pytest.mark.parametrize("chunk_numel", [1, 7, 8, 50, 51, 52, 1 << 24])
def test_chunks_do_not_show(tmp_path, chunk_numel):
    stored = pieces()
    path = tmp_path / "fragments.safetensors"
    snapshot = snapshot_of(stored, label="a label", chunk_numel=chunk_numel)
    assert all(len(chunk) <= chunk_numel for chunk in snapshot.chunks)
    entry = write_snapshot(path, snapshot)
    assert entry["bytes"] == path.stat().st_size
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "a label"}
        assert set(file.keys()) == {piece.key for piece in stored}
        for piece in stored:
            assert torch.equal(file.get_tensor(piece.key), piece.values)


def test_a_snapshot_is_of_its_moment_and_in_float32():
    weights = torch.arange(6.0, dtype=torch.bfloat16).reshape(2, 3)
    snapshot = snapshot_of([Piece("ema", "w", (2, 3), 0, weights.T.reshape(-1))], label="x")
    plain = snapshot_of([Piece("ema", "w", (6,), 0, weights.view(-1))], label="x")
    weights.zero_()
    assert torch.cat(snapshot.chunks).tolist() == [0, 3, 1, 4, 2, 5]
    assert torch.cat(plain.chunks).tolist() == [0, 1, 2, 3, 4, 5]
    assert plain.chunks[0].dtype == torch.float32
    assert snapshot.shapes == {"w": (2, 3)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="page-locked memory is available")
def test_without_page_locked_memory_ordinary_memory_serves(caplog):
    assert [len(room) for room in room_for([5, 5, 2], pinned=True)] == [5, 5, 2]
    assert caplog.text.count("no page-locked memory for the checkpoint") == 1
    caplog.clear()
    assert [len(room) for room in room_for([5], pinned=False)] == [5]
    assert not caplog.text


def test_a_rank_without_pieces_writes_an_empty_file(tmp_path):
    write_snapshot(tmp_path / "none.safetensors", snapshot_of([], label="x"))
    with safe_open(tmp_path / "none.safetensors", framework="pt") as file:
        assert list(file.keys()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_values_are_those_of_the_moment(tmp_path):
    weight = torch.zeros(1 << 22, device="cuda")
    snapshot = snapshot_of([Piece("ema", "w", (1 << 22,), 0, weight)], label="x")
    for _ in range(100):
        weight.add_(1)
    assert snapshot.chunks[0].is_pinned()
    write_snapshot(tmp_path / "gpu.safetensors", snapshot)
    with safe_open(tmp_path / "gpu.safetensors", framework="pt") as file:
        assert not file.get_tensor("ema/w@0").any()
