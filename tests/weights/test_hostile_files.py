"""Files of `hostile_files.HOSTILE`: what is said of them, that no code runs, and memory."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from weights.hostile_files import CODE, HOSTILE, STATE

from srepa_ds.errors import CheckpointError
from srepa_ds.weights.exported import read_model, write_model

_OPEN_UNSAFELY = """
import sys, torch
for path in sys.argv[1:]:
    try:
        torch.load(path, weights_only=False)
    except Exception:
        pass
"""
_OPEN_SAFELY = """
import json, resource, sys
from pathlib import Path
from srepa_ds.errors import CheckpointError
from srepa_ds.weights.foreign.opening import open_foreign

pages = int(Path("/proc/self/statm").read_text().split()[0])
most = pages * resource.getpagesize() + (400 << 20)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
messages = {}
for path in map(Path, sys.argv[1:]):
    try:
        open_foreign(path)
    except CheckpointError as error:
        messages[path.name] = str(error)
print(json.dumps(messages))
"""


def written(folder: Path, names) -> list[str]:
    for name in names:
        (folder / f"{name}.pt").write_bytes(HOSTILE[name].content(folder / f"{name}.trace"))
    return [str(folder / f"{name}.pt") for name in names]


def run(code: str, paths: list[str]) -> str:
    command = [sys.executable, "-c", code, *paths]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def traces(tmp_path_factory) -> set[str]:
    """The traces of files that were opened without precautions."""
    folder = tmp_path_factory.mktemp("unsafe")
    run(_OPEN_UNSAFELY, written(folder, CODE))
    return {path.stem for path in folder.glob("*.trace")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("safe")


@pytest.fixture(scope="module")
def messages(folder) -> dict[str, str]:
    """What is said of each file by a process that may take 400 MiB more than its programs do."""
    return json.loads(run(_OPEN_SAFELY, written(folder, HOSTILE)))


@pytest.mark.parametrize("name", [name for name, row in HOSTILE.items() if row.runs])
def test_code_that_would_run_does_not(name, traces, messages, folder):
    assert name in traces
    assert f"{name}.pt" in messages
    assert not (folder / f"{name}.trace").exists()


@pytest.mark.parametrize("name", HOSTILE)
def test_each_is_called_what_it_is(name, messages, folder):
    message = messages[f"{name}.pt"]
    assert message.startswith(f"{folder / name}.pt: ") or message.startswith(f"{folder / name}.pt ")
    assert re.search(HOSTILE[name].words, message), message
    assert "\n" not in message
    assert "weights_only" not in message
    assert "add_safe_globals" not in message


def test_a_flipped_bit_of_an_exported_model_is_found_by_its_hash(tmp_path):
    write_model(tmp_path, STATE, config={}, provenance={"weights": "ema", "step": 1})
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has changed since it was expor"):
        read_model(tmp_path)


def test_checksums_may_be_left_out(tmp_path):
    """As `torch.serialization.set_crc32_options(False)` does."""
    from srepa_ds.weights.foreign.opening import open_foreign

    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "weights.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    found = open_foreign(tmp_path / "weights.pt").weights["model"]
    assert all(torch.equal(found[name], value) for name, value in STATE.items())
