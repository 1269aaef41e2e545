"""Readers of JSON files: any damage ends in the error that users see, and in no other."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from generated import QUICK, bounded, damaged, trees
from hypothesis import given, settings
from hypothesis import strategies as st
from places import GOLDEN, ROOT

from srepa_ds.checkpoint.folder import fault_of
from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.commands.demo import _read_timings
from srepa_ds.data.headers import header_facts
from srepa_ds.data.shard_index import read_index
from srepa_ds.data.token_index import read_token_index
from srepa_ds.encoders.teacher_folder import finished_accuracy
from srepa_ds.errors import CheckpointError, ConfigError, DataError, OutputError
from srepa_ds.metrics.scores import Scores
from srepa_ds.report.record import read_document
from srepa_ds.sampling.sample_set import read_provenance
from srepa_ds.zero.json_file import load_deepspeed_json

FORMAT_1 = GOLDEN / "format-1"
CHECKPOINT = FORMAT_1 / "run" / "checkpoints" / "step-0000004"
(STORE,) = (FORMAT_1 / "shards" / "teachers").iterdir()
IDENTITY = {"steps": 350, "encoder": {"name": "digits-vit"}}


class Reader(NamedTuple):
    """A reader, a sound document for it, and the name of its file."""

    read: Callable[[Path], Any]
    document: Any
    name: str = "document.json"


def stored(path: Path) -> Any:
    return json.loads(path.read_text())


READERS = {
    "deepspeed": Reader(load_deepspeed_json, stored(ROOT / "ds_configs/zero3-offload.json")),
    "index of shards": Reader(
        lambda path: read_index(path.parent), stored(FORMAT_1 / "shards/index.json"), "index.json"
    ),
    "index of tokens": Reader(
        lambda path: read_token_index(path.parent), stored(STORE / "index.json"), "index.json"
    ),
    "manifest": Reader(
        lambda path: fault_of(path.parent), stored(CHECKPOINT / "manifest.json"), "manifest.json"
    ),
    "state": Reader(
        lambda path: CheckpointReader(path.parent), stored(CHECKPOINT / "state.json"), "state.json"
    ),
    "teacher": Reader(
        lambda path: finished_accuracy(path.parent, IDENTITY),
        {"identity": IDENTITY, "heldout_accuracy": 0.5, "sha256": "00"},
        "teacher.json",
    ),
    "provenance": Reader(
        lambda path: read_provenance(path.parent), {"sampler": {"seed": 0}}, "provenance.json"
    ),
    "document of a report": Reader(read_document, {"scores": {"precision": 0.5}}),
    "timings of the demo": Reader(_read_timings, {"train": 12.5, "sample": 3}),
    "header": Reader(lambda path: header_facts({"srepa_ds": path.read_text()}), {"num_samples": 4}),
    "scores": Reader(lambda path: Scores.from_json(path.read_text()), {"precision": 0.5}),
}
OF_USERS = (ConfigError, DataError, CheckpointError, OutputError)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp("reader") for name in READERS}


@pytest.mark.parametrize("name", READERS)
def test_the_sound_document_is_read(folders, name):
    reader = READERS[name]
    path = folders[name] / reader.name
    path.write_text(json.dumps(reader.document))
    with bounded():
        reader.read(path)


@pytest.mark.parametrize("name", READERS)
@settings(QUICK, max_examples=60)
@given(data=st.data())
def test_a_damaged_document_is_read_or_refused(folders, name, data):
    reader = READERS[name]
    path = folders[name] / reader.name
    document = data.draw(damaged(reader.document) | trees())
    path.write_text(json.dumps(document))
    with suppress(*OF_USERS):
        reader.read(path)


HOSTILE = {
    "nothing": b"",
    "no UTF-8": b'{"a": "\xff"}',
    "depth": b"[" * 200_000,
    "depth of objects": b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    "digits": b'{"format": ' + b"9" * 5_000 + b"}",
    "twins": b'{"a": 1, "a": 2}',
    "half a character": rb'{"format": "\ud800"}',
    "a NUL": b'{"a": "\0"}',
    "text after it": b"{} {}",
    "a number beyond all": b'{"version": 1e999, "step": -1e999}',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("name", [name for name in READERS if name not in ("header", "scores")])
def test_a_hostile_document_is_read_or_refused(folders, name, content):
    reader = READERS[name]
    path = folders[name] / reader.name
    path.write_bytes(content)
    with bounded(), suppress(*OF_USERS):
        reader.read(path)
