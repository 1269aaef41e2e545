"""Exported models on disk: read back exactly, replaced atomically, never over other files."""

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from builders import largest_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from srepa_ds import files
from srepa_ds.errors import CheckpointError, OutputError
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig
from srepa_ds.schema import to_tree
from srepa_ds.weights.exported import (
    DOCUMENT,
    WEIGHTS,
    check_export,
    exported_step,
    read_model,
    write_model,
)

CONFIG = SiTConfig(
    variant="SiT-Ti/2", input_size=8, in_channels=3, num_classes=4, depth=1, hidden_size=24,
    num_heads=2,
)  # fmt: skip
PROVENANCE = {"checkpoint": "abc", "step": 5, "weights": "ema"}


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    model = SiT(CONFIG, torch.Generator().manual_seed(seed))
    return {**model.state_dict(), "projectors.0.weight": torch.full((2, 2), float(seed))}


def write(folder, seed: int = 0) -> None:
    write_model(folder, state(seed), config={"model": to_tree(CONFIG)}, provenance=PROVENANCE)


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_was_written_is_read(tmp_path):
    write(tmp_path / "deep" / "model")
    found = read_model(tmp_path / "deep" / "model")
    expected = state()
    weights = found.model.state_dict()
    assert weights.keys() == expected.keys() - {"projectors.0.weight"}
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert not found.model.training
    assert not any(parameter.requires_grad for parameter in found.model.parameters())
    assert dict(found.provenance) == PROVENANCE
    assert found.config["model"] == to_tree(CONFIG)
    assert names(tmp_path / "deep") == {"model"}
    assert names(tmp_path / "deep" / "model") == {WEIGHTS, DOCUMENT}


def test_the_same_weights_make_the_same_bytes_and_hash(tmp_path):
    for name in "ab":
        write(tmp_path / name)
    write(tmp_path / "c", seed=1)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    hashes = [read_model(tmp_path / name).sha256 for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]


def test_others_may_read_it_as_they_may_its_document(tmp_path):
    write(tmp_path / "model")
    modes = [stat.S_IMODE((tmp_path / "model" / n).stat().st_mode) for n in (WEIGHTS, DOCUMENT)]
    assert modes[0] == modes[1]


def test_an_earlier_model_is_replaced(tmp_path):
    write(tmp_path / "model", seed=1)
    write(tmp_path / "model", seed=2)
    assert load_file(tmp_path / "model" / WEIGHTS)["projectors.0.weight"].unique() == 2
    assert names(tmp_path) == {"model"}


@pytest.mark.parametrize("first", [False, True])
def test_a_full_disk_leaves_the_earlier_model(tmp_path, first):
    if not first:
        write(tmp_path / "model", seed=1)
    with largest_file(5000), pytest.raises(OutputError, match="cannot write the model"):
        write(tmp_path / "model", seed=2)
    assert names(tmp_path) == (set() if first else {"model"})
    if not first:
        assert load_file(tmp_path / "model" / WEIGHTS)["projectors.0.weight"].unique() == 1


def hub_model(folder):
    """Writes the files of another library's model."""
    (folder / DOCUMENT).write_text('{"architectures": ["ViT"]}')
    save_file({"x": torch.zeros(1)}, folder / WEIGHTS)


def notes_beside_ours(folder):
    folder.rmdir()
    write(folder)
    (folder / "notes.txt").write_text("keep me")


FOREIGN = {
    "a file": lambda folder: (folder / "thesis.txt").write_text("years of work"),
    "a model of another library": hub_model,
    "weights alone": lambda folder: save_file({"x": torch.zeros(1)}, folder / WEIGHTS),
    "a torn document": lambda folder: (folder / DOCUMENT).write_text("{"),
    "something beside a model of ours": notes_beside_ours,
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_folder_is_left_alone(tmp_path, case):
    folder = tmp_path / "model"
    folder.mkdir()
    FOREIGN[case](folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OutputError, match="holds files other than an exported model"):
        write(folder, seed=2)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert names(tmp_path) == {"model"}


def test_an_empty_folder_is_taken_and_a_file_is_not(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(OutputError, match="Not a directory"):
            write(folder)
    assert (tmp_path / "file").read_text() == "mine"


def edit(folder, **changes):
    document = json.loads((folder / DOCUMENT).read_text()) | changes
    (folder / DOCUMENT).write_text(json.dumps(document))


def drop(folder, key):
    document = json.loads((folder / DOCUMENT).read_text())
    del document[key]
    (folder / DOCUMENT).write_text(json.dumps(document))


def keep_weights(folder, **changes):
    drop(folder, "sha256")
    tensors = {**state(), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / WEIGHTS)


DAMAGES = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "does not hold an exported model"),
    "no document": (lambda f: (f / DOCUMENT).unlink(), "does not hold an exported model"),
    "torn weights": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]),
        "has changed since it was exported",
    ),
    "torn weights without a hash": (
        lambda f: (
            drop(f, "sha256"),
            (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]),
        ),
        "does not hold an exported model",
    ),
    "a pointer": (
        lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1"),
        "it is a Git LFS pointer, not the weights; run `git lfs pull`",
    ),
    "a pointer without a hash": (
        lambda f: (drop(f, "sha256"), (f / WEIGHTS).write_text("version https://git-lfs.")),
        "it is a Git LFS pointer, not the weights; run `git lfs pull`",
    ),
    "torn document": (lambda f: (f / DOCUMENT).write_text("{"), "does not hold an exported model"),
    "a list": (lambda f: (f / DOCUMENT).write_text("[]"), "does not describe a model"),
    "another format": (lambda f: edit(f, format="other"), "is of format"),
    "another version": (lambda f: edit(f, version=9), "is of format"),
    "no config": (lambda f: drop(f, "config"), "lacks 'config'"),
    "no provenance": (lambda f: drop(f, "provenance"), "lacks 'provenance'"),
    "a faulty config": (
        lambda f: edit(f, config={"model": {**to_tree(CONFIG), "depth": 0}}),
        "depth: Input should be greater than 0",
    ),
    "another size": (
        lambda f: edit(f, config={"model": {**to_tree(CONFIG), "depth": 2}}),
        "does not fit its config",
    ),
    "a weight too few": (lambda f: keep_weights(f, pos_embed=None), "pos_embed"),
    "a weight too many": (lambda f: keep_weights(f, extra=torch.zeros(1)), "extra"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(tmp_path, damage):
    act, words = DAMAGES[damage]
    write(tmp_path / "model")
    act(tmp_path / "model")
    with pytest.raises(CheckpointError, match=words):
        read_model(tmp_path / "model")


def test_without_a_model_it_says_how_to_make_one(tmp_path):
    with pytest.raises(CheckpointError, match="make one with `srepa-ds export CONFIG`"):
        read_model(tmp_path / "never")


def test_its_document_holds_the_hash_of_its_weights(tmp_path):
    write(tmp_path)
    document = json.loads((tmp_path / DOCUMENT).read_text())
    assert document["sha256"] == files.sha256_of(tmp_path / WEIGHTS) == read_model(tmp_path).sha256
    check_export(tmp_path)


@pytest.mark.parametrize("position", [9, 200, -1])
def test_a_changed_byte_is_noticed(tmp_path, position):
    write(tmp_path)
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    content[position] ^= 1
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match="has changed since it was exported"):
        check_export(tmp_path)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("replacements", [0, 1])
def test_a_kill_at_any_rename_leaves_a_model_or_is_recognised(
    tmp_path, monkeypatch, first, replacements
):
    folder = tmp_path / "model"
    if not first:
        write(folder, seed=1)
    replace, done = os.replace, []

    def until(source, target):
        if len(done) == replacements:
            raise Killed
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", until)
    # After a kill nothing is removed any more.
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    with pytest.raises(Killed):
        write(folder, seed=2)
    monkeypatch.undo()
    if replacements == 0 and not first:
        assert torch.equal(read_model(folder).model.state_dict()["pos_embed"], state()["pos_embed"])
        assert load_file(folder / WEIGHTS)["projectors.0.weight"].unique() == 1
    else:
        with pytest.raises(CheckpointError, match=r"holds an interrupted export, .*make it again"):
            read_model(folder)
    write(folder, seed=3)
    assert names(folder) == {WEIGHTS, DOCUMENT}
    assert load_file(folder / WEIGHTS)["projectors.0.weight"].unique() == 3


def test_leftovers_of_kills_are_removed(tmp_path):
    for first in (True, False):
        for name in (".tmpEltVq6", f"{WEIGHTS}.partial", f"{DOCUMENT}.partial"):
            (tmp_path / name).write_text("half")
        write(tmp_path)
        assert names(tmp_path) == {WEIGHTS, DOCUMENT}, first


def test_leftovers_of_the_first_release_are_removed_and_others_are_not(tmp_path):
    for ending in ("writing", "replaced"):
        write(tmp_path / f".model.{ending}")
    (tmp_path / ".other.writing").mkdir()
    write(tmp_path / "model")
    assert names(tmp_path) == {"model", ".other.writing"}
    (tmp_path / ".model.replaced").mkdir()
    (tmp_path / ".model.replaced" / "mine.txt").write_text("mine")
    write(tmp_path / "model")
    assert names(tmp_path) == {"model", ".other.writing", ".model.replaced"}


def test_a_link_to_another_disk_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "model"
    link.symlink_to("disk")
    for seed in (1, 2):
        write(link, seed=seed)
        assert link.is_symlink()
        assert load_file(tmp_path / "disk" / WEIGHTS)["projectors.0.weight"].unique() == seed
    assert names(tmp_path) == {"disk", "model"}


def test_a_link_to_nowhere_is_named(tmp_path):
    (tmp_path / "model").symlink_to("unmounted")
    for folder in (tmp_path / "model", tmp_path / "model" / "deep"):
        with pytest.raises(OutputError, match=r"is a link to unmounted, which does not"):
            write(folder)
    assert names(tmp_path) == {"model"}


def test_planted_links_are_not_followed(tmp_path):
    folder, victim = tmp_path / "model", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("precious")
    for name in (WEIGHTS, DOCUMENT):
        (folder / f"{name}.partial").symlink_to(victim)
    write(folder)
    assert victim.read_text() == "precious"
    assert names(folder) == {WEIGHTS, DOCUMENT}


@pytest.mark.parametrize("folder", ["/", ".", "~"])
def test_a_folder_of_other_files_is_refused_by_any_name(tmp_path, monkeypatch, folder):
    (tmp_path / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="holds files other than an exported model"):
        write(tmp_path if folder == "~" else Path(folder))
    assert names(tmp_path) == {"thesis.txt"}


def test_two_exports_at_once_say_who_was_first(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    with (
        files.locked(folder),
        pytest.raises(
            OutputError, match=rf"another process \({os.getpid()}: .*is exporting into .*/model"
        ),
    ):
        write(folder)
    assert names(folder) == set()
    write(folder)
    assert names(folder) == {WEIGHTS, DOCUMENT}


def test_of_pairs_of_exports_one_always_leaves_its_model(tmp_path):
    def attempt(place: tuple[Path, int]) -> str:
        try:
            write(*place)
        except OutputError as error:
            return str(error)
        return "written"

    with ThreadPoolExecutor(2) as pool:
        for number in range(15):
            folder = tmp_path / str(number)
            said = list(pool.map(attempt, [(folder, 1), (folder, 2)]))
            assert "written" in said
            assert all("is exporting into" in text for text in said if text != "written")
            check_export(folder)
            assert names(folder) == {WEIGHTS, DOCUMENT}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def places_in(node, path=()):
    """Yields the path of everything in a document."""
    yield path
    for key, value in node.items() if isinstance(node, dict) else ():
        yield from places_in(value, (*path, key))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "model"
    write(folder)
    return folder, json.loads((folder / DOCUMENT).read_text())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_document_gives_any_other_error(whole, data):
    folder, document = whole
    document = json.loads(json.dumps(document))
    *above, key = data.draw(st.sampled_from(sorted(places_in(document))[1:]))
    node = document
    for name in above:
        node = node[name]
    if data.draw(st.booleans()):
        node[key] = data.draw(JSON)
    else:
        del node[key]
    (folder / DOCUMENT).write_text(json.dumps(document))
    try:
        found = read_model(folder)
    except CheckpointError:
        exported_step(folder)
    else:
        assert isinstance(found.provenance["step"], int)
