"""Checkpoints: whole or absent, whatever was written and however it was damaged."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from builders import contents, largest_file, pieces_of
from ranks import run_worker
from safetensors.torch import save_file

from srepa_ds.checkpoint.folder import (
    fault_of,
    newest_valid,
    remove_leftovers,
    restore_names,
    step_folder,
    steps_in,
)
from srepa_ds.checkpoint.fragment_file import Piece
from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.checkpoint.saving import save
from srepa_ds.errors import CheckpointError, OutputError

FRAGMENTS = "fragments-00000.safetensors"


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"sit.a.weight": (5, 7), "sit.b": (), "projectors.0.bias": (11,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(root: Path, step: int, **state) -> Path:
    return save(root, step=step, pieces=pieces_of(weights(step)), state={**state}, rank=0)


@pytest.mark.parametrize("run", [1, 3, 10, 1000])
def test_any_run_reads_back_however_it_was_cut(tmp_path, run):
    tensors, averages = weights(1), weights(2)
    pieces = [*pieces_of(tensors, run=run), *pieces_of(averages, run=4, kind="ema")]
    folder = save(tmp_path, step=12, pieces=pieces[::-1], state={"note": [1, None]}, rank=0)
    assert folder == step_folder(tmp_path, 12)
    reader = CheckpointReader(folder)
    assert sorted(reader.names("master")) == sorted(tensors)
    assert reader.names("exp_avg") == []
    for name, tensor in tensors.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert torch.equal(reader.tensor("master", name), tensor)
        assert torch.equal(reader.tensor("ema", name), averages[name])
    flat = tensors["sit.a.weight"].reshape(-1)
    for start, numel in [(0, 35), (2, 5), (34, 1), (9, 12), (5, 0)]:
        found = reader.run("master", "sit.a.weight", start=start, numel=numel)
        assert torch.equal(found, flat[start : start + numel])
    assert reader.state["step"] == 12
    assert reader.state["note"] == [1, None]


def test_names_keep_the_models_order(tmp_path):
    reader = CheckpointReader(write(tmp_path, 1))
    assert reader.names("master") == list(weights())


def test_what_is_stored_is_a_copy_without_the_rest_of_its_storage(tmp_path):
    big = torch.zeros(100_000)
    save(tmp_path, step=1, pieces=[Piece("ema", "w", (4,), 0, big[:4])], state={}, rank=0)
    assert (step_folder(tmp_path, 1) / FRAGMENTS).stat().st_size < 1000


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_incomplete_pieces_are_an_error(tmp_path, missing):
    pieces = list(pieces_of({"w": torch.arange(30.0)}, run=10))
    # A piece stored twice must not stand in for one that is absent.
    repeated = Piece("master", "w", (30,), 4, torch.zeros(10))
    stored = [*pieces[:missing], *pieces[missing + 1 :], repeated]
    reader = CheckpointReader(save(tmp_path, step=1, pieces=stored, state={}, rank=0))
    with pytest.raises(CheckpointError, match=r"of 'w' is missing elements \d+ to"):
        reader.tensor("master", "w")
    with pytest.raises(CheckpointError, match="exp_avg of 'w' is missing elements 0 to"):
        reader.run("exp_avg", "w", start=0, numel=1)


def test_the_folder_holds_no_pickle_and_names_every_file(tmp_path):
    folder = write(tmp_path, 3)
    names = {path.name for path in folder.iterdir()}
    assert names == {FRAGMENTS, "state.json", "manifest.json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {FRAGMENTS, "state.json"}
    assert (tmp_path / "latest").read_text() == "step-0000003\n"
    assert {path.name for path in tmp_path.iterdir()} == {"step-0000003", "latest"}


def test_the_fingerprint_tells_checkpoints_apart(tmp_path):
    prints = [CheckpointReader(write(tmp_path / str(k), k)).fingerprint() for k in (1, 2, 1)]
    assert len(set(prints)) == 2
    again = save(tmp_path / "x", step=1, pieces=pieces_of(weights(1)), state={}, rank=0)
    assert CheckpointReader(again).fingerprint() == prints[0]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def edit_manifest(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES = {
    "missing fragments": (lambda f: (f / FRAGMENTS).unlink(), f"{FRAGMENTS} is missing"),
    "missing state": (lambda f: (f / "state.json").unlink(), "state.json is missing"),
    "missing manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "truncated": (
        lambda f: (f / FRAGMENTS).write_bytes((f / FRAGMENTS).read_bytes()[:-5]),
        f"{FRAGMENTS} has .* bytes, not",
    ),
    "one bit": (lambda f: flip_a_byte(f / FRAGMENTS), f"{FRAGMENTS} does not match its checksum"),
    "one bit of the state": (lambda f: flip_a_byte(f / "state.json"), "state.json does not match"),
    "torn manifest": (
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text()[:60]),
        "manifest cannot be read",
    ),
    "manifest is a list": (lambda f: (f / "manifest.json").write_text("[]"), "cannot be read"),
    "files is a list": (lambda f: edit_manifest(f, files=["state.json"]), "cannot be read"),
    "files is empty": (lambda f: edit_manifest(f, files={}), "does not name state.json"),
    "a folder as a file": (
        lambda f: ((f / FRAGMENTS).unlink(), (f / FRAGMENTS).mkdir()),
        f"{FRAGMENTS} is missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_passed_over(tmp_path, caplog, damage):
    act, words = DAMAGES[damage]
    good, bad = write(tmp_path, 5), write(tmp_path, 10)
    assert newest_valid(tmp_path) == bad
    act(bad)
    fault = fault_of(bad)
    assert re.search(words, fault), fault
    assert fault_of(good) is None
    with caplog.at_level(logging.WARNING, logger="srepa_ds"):
        assert newest_valid(tmp_path) == good
    assert f"skipping checkpoint {bad}: {fault}" in caplog.text
    act(good)
    with pytest.raises(CheckpointError, match="holds no valid checkpoint") as caught:
        newest_valid(tmp_path)
    assert "step-0000005" in str(caught.value)
    assert "step-0000010" in str(caught.value)


@pytest.mark.parametrize("change", [{"version": 2}, {"format": "other"}])
def test_another_format_is_no_damage_to_go_back_before(tmp_path, change):
    good, foreign = write(tmp_path, 5), write(tmp_path, 10)
    edit_manifest(foreign, **change)
    mark = f"{change.get('format', 'srepa_ds.checkpoint')} {change.get('version', 1)}"
    words = (
        f"step-0000010 is of format {mark}, not srepa_ds.checkpoint 1; continue with the srepa_ds"
    )
    with pytest.raises(CheckpointError, match=words):
        newest_valid(tmp_path)
    write(tmp_path, 15)
    assert newest_valid(tmp_path) == step_folder(tmp_path, 15)
    foreign.rename(tmp_path / "of-another-version")
    assert newest_valid(tmp_path) == step_folder(tmp_path, 15)
    assert fault_of(good) is None


def test_no_checkpoint_at_all_is_none(tmp_path):
    assert newest_valid(tmp_path / "never") is None
    (tmp_path / "step-later").mkdir()
    (tmp_path / "step-0000001").write_text("a file")
    assert newest_valid(tmp_path) is None
    assert fault_of(tmp_path / "never") == "there is no such folder"


def test_newest_is_by_number_not_by_name(tmp_path):
    for step in (9_999_999, 10_000_000, 2):
        write(tmp_path, step)
    assert newest_valid(tmp_path) == step_folder(tmp_path, 10_000_000)


@pytest.mark.parametrize("name", ["step-²", "step-①", "step-٣", "step-", "step--1", "step-0x5"])
def test_folders_that_are_not_named_by_a_step_are_left_alone(tmp_path, name):
    write(tmp_path, 5)
    for beginning in ("", ".writing-replaced-", "failed-"):
        (tmp_path / f"{beginning}{name}").mkdir()
    assert steps_in(tmp_path) == [step_folder(tmp_path, 5)]
    assert newest_valid(tmp_path) == step_folder(tmp_path, 5)
    restore_names(tmp_path)
    assert (tmp_path / name).is_dir()


@pytest.mark.parametrize("stage", ["fragments", "state", "manifest"])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, stage):
    previous = write(tmp_path, 5)
    before = contents(tmp_path)
    tiny = [Piece("ema", "w", (1,), 0, torch.zeros(1))]
    pieces = {"fragments": pieces_of({"w": torch.zeros(9000)}), "state": tiny, "manifest": tiny}
    state = {"note": "x" * 9000} if stage == "state" else {}
    limit = 3000
    if stage == "manifest":
        sizes = {
            path.name: path.stat().st_size
            for path in save(tmp_path / "x", step=1, pieces=tiny, state={}, rank=0).iterdir()
        }
        assert max(sizes, key=sizes.__getitem__) == "manifest.json"
        limit = sizes["manifest.json"] - 1
        before = contents(tmp_path)
    with largest_file(limit), pytest.raises(OutputError, match="cannot write the checkpoint") as e:
        save(tmp_path, step=6, pieces=pieces[stage], state=state, rank=0)
    assert "File too large" in str(e.value)
    assert contents(tmp_path) == before
    assert newest_valid(tmp_path) == previous
    assert newest_valid(write(tmp_path, 6).parent) == step_folder(tmp_path, 6)


def test_a_file_where_the_folder_should_be(tmp_path):
    previous = write(tmp_path, 5)
    step_folder(tmp_path, 6).write_text("mine")
    with pytest.raises(OutputError, match="cannot write"):
        write(tmp_path, 6)
    assert newest_valid(tmp_path) == previous
    assert not list(tmp_path.glob(".writing-*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write the checkpoint under .*file"):
        write(tmp_path / "file" / "checkpoints", 1)


def test_a_damaged_checkpoint_is_replaced_by_saving_its_step_again(tmp_path):
    folder = write(tmp_path, 5)
    flip_a_byte(folder / FRAGMENTS)
    (folder / "fragments-00001.safetensors").write_bytes(b"of another world size")
    assert write(tmp_path, 5) == folder
    assert fault_of(folder) is None
    assert not (folder / "fragments-00001.safetensors").exists()


def test_what_interrupted_saves_left_is_removed(tmp_path):
    write(tmp_path, 2)
    stale = tmp_path / ".writing-step-0000003"
    stale.mkdir()
    save_file({"x": torch.zeros(3)}, stale / FRAGMENTS)
    assert newest_valid(tmp_path) == step_folder(tmp_path, 2)
    remove_leftovers(tmp_path)
    assert not stale.exists()


def test_a_kill_while_a_step_is_saved_again_leaves_the_former_one(tmp_path):
    former = write(tmp_path, 5)
    aside = tmp_path / ".writing-replaced-step-0000005"
    # Between the two renames: the new one has no name yet, the former no longer.
    former.rename(aside)
    assert newest_valid(tmp_path) == aside
    assert CheckpointReader(aside).state["step"] == 5
    # Both are there if the kill comes a moment later, and then the step is saved once more.
    write(tmp_path, 5)
    assert newest_valid(tmp_path) == former
    write(tmp_path, 4).rename(aside)
    write(tmp_path, 5)
    assert newest_valid(tmp_path) == former
    assert CheckpointReader(former).state["step"] == 5
    assert not aside.exists()


def test_what_a_kill_left_aside_gets_its_name_back_unless_another_has_it(tmp_path):
    write(tmp_path, 4).rename(tmp_path / ".writing-replaced-step-0000004")
    newer = write(tmp_path, 5)
    before = contents(newer)
    shutil.copytree(write(tmp_path / "other", 6), tmp_path / ".writing-replaced-step-0000005")
    restore_names(tmp_path)
    assert steps_in(tmp_path) == [step_folder(tmp_path, 4), newer]
    assert fault_of(step_folder(tmp_path, 4)) is None
    assert contents(newer) == before


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_a_kill_at_any_moment_leaves_a_readable_newest(tmp_path, mode):
    run_worker("killed_saves", 1, tmp_path, "10", mode)
