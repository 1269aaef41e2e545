"""Headers and indices that anybody may have written: each is read, or refused with one message."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_data import prepare, store

from srepa_ds.data.headers import metadata_of
from srepa_ds.data.index_document import INDEX_NAME
from srepa_ds.data.shard_file import shard_facts, shard_name
from srepa_ds.data.shards import ShardDataset
from srepa_ds.data.token_index import token_file_name
from srepa_ds.data.token_store import TokenStore
from srepa_ds.errors import DataError

OPENERS = {"data": ShardDataset, "store": TokenStore}
FILES = {"data": shard_name(0), "store": token_file_name(0)}

numbers = st.integers(-3, 300) | st.sampled_from([1 << 31, 1 << 63, 1 << 64, 10**30, -(1 << 63)])
texts = st.sampled_from(["I64", "F32", "U8", "F4", "BOOL", "", "\x00", "images", "../x", "é"])
scalars = st.none() | st.booleans() | numbers | st.floats() | texts
values = st.recursive(
    scalars, lambda part: st.lists(part, max_size=4) | st.dictionaries(texts, part, max_size=3)
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    prepare(folder / "data")
    store(folder / "data", folder / "store")
    return folder


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def places(node, path=()):
    """Yields the path of every value of a tree."""
    yield path
    items = enumerate(node) if isinstance(node, list) else ()
    for key, value in node.items() if isinstance(node, dict) else items:
        yield from places(value, (*path, key))


def edited(tree, path, value):
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = edited(tree[path[0]], path[1:], value)
    return copy


def opens_or_refuses(kind: str, folder: Path) -> None:
    began, message = time.perf_counter(), str(folder)
    try:
        opened = OPENERS[kind](folder)
        opened.read(torch.arange(3))
        opened.verify()
    except DataError as error:
        message = str(error)
    assert str(folder) in message
    assert time.perf_counter() - began < 5


loose = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("kind", OPENERS)
@loose
@given(data=st.data())
def test_any_value_anywhere_in_an_index(kind, folder, data):
    path = folder / kind / INDEX_NAME
    before = path.read_text()
    tree = json.loads(before)
    place = data.draw(st.sampled_from(list(places(tree))))
    path.write_text(json.dumps(edited(tree, place, data.draw(values))))
    try:
        opens_or_refuses(kind, folder / kind)
    finally:
        path.write_text(before)


@pytest.mark.parametrize("kind", OPENERS)
@loose
@given(data=st.data())
def test_any_value_anywhere_in_a_header(kind, folder, data):
    path = folder / kind / FILES[kind]
    before = path.read_bytes()
    length = int.from_bytes(before[:8], "little")
    tree = json.loads(before[8 : 8 + length])
    place = data.draw(st.sampled_from(list(places(tree))))
    header = json.dumps(edited(tree, place, data.draw(values))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + before[8 + length :])
    try:
        opens_or_refuses(kind, folder / kind)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("kind", OPENERS)
@loose
@given(data=st.data())
def test_any_bytes_anywhere_in_a_file(kind, folder, data):
    path = folder / kind / FILES[kind]
    before = path.read_bytes()
    content = bytearray(before)
    start = data.draw(st.integers(0, len(before)))
    content[start : start + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    path.write_bytes(content)
    try:
        opens_or_refuses(kind, folder / kind)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("labels", torch.tensor(1)),
        ("labels", torch.zeros(2, 1, dtype=torch.int64)),
        ("labels", None),
        ("images", torch.tensor(1, dtype=torch.uint8)),
        ("images", torch.zeros(2, 12, dtype=torch.uint8)),
        ("images", None),
    ],
)
def test_tensors_of_another_rank_are_refused(folder, name, tensor):
    path = folder / "data" / shard_name(0)
    tensors = load_file(path) | {name: tensor}
    facts = shard_facts(2, (3, 2, 2), ShardDataset(folder / "data").index.dataset_id)
    kept = {key: value for key, value in tensors.items() if value is not None}
    save_file(kept, path, metadata=metadata_of(facts))
    with pytest.raises(DataError, match=rf"{shard_name(0)}: .*(tensors|size).* disagree about"):
        ShardDataset(folder / "data")


@pytest.mark.parametrize("kind", OPENERS)
@pytest.mark.parametrize("name", ["", ".", "..", "/etc/passwd", "../data/x", "a/b", "a\\b", "a\0b"])
def test_an_index_names_files_of_its_own_folder(kind, folder, name):
    path = folder / kind / INDEX_NAME
    tree = json.loads(path.read_text())
    entries = "shards" if kind == "data" else "files"
    tree[entries][1]["file"] = name
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=rf"{entries}\.1\.file: .* is not the name of a file in"):
        OPENERS[kind](folder / kind)


@pytest.mark.parametrize("kind", OPENERS)
def test_an_index_names_each_file_once(kind, folder):
    path = folder / kind / INDEX_NAME
    tree = json.loads(path.read_text())
    entries = "shards" if kind == "data" else "files"
    tree[entries][1]["file"] = tree[entries][0]["file"]
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=f"names {FILES[kind]} more than once; delete"):
        OPENERS[kind](folder / kind)
