"""Weight files from elsewhere: the contents that are read, and the messages about the rest."""

import argparse
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from srepa_ds.errors import CheckpointError, DataError
from srepa_ds.weight_file import read_weight_file

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.bfloat16)}


def read(path: Path, *, fault=DataError):
    return read_weight_file(path, named=f"weights {path}", setting="some.weights", fault=fault)


def assert_state(found) -> None:
    assert found.keys() == STATE.keys()
    for name, value in STATE.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", ["model", "ema", "state_dict", None])
def test_mappings_come_as_they_were_saved(tmp_path, zipped, key):
    content = STATE if key is None else {key: STATE, "args": argparse.Namespace(lr=1e-4), 7: [1]}
    path = tmp_path / "weights.pth.tar"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    found = read(path)
    assert_state(found if key is None else found[key])
    if key is not None:
        assert (found["args"].lr, found["7"]) == (1e-4, [1])


def test_safetensors_are_read(tmp_path):
    save_file(STATE, tmp_path / "weights.safetensors")
    assert_state(read(tmp_path / "weights.safetensors"))


class Malicious:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def torn(path: Path, *, at: int) -> None:
    (save_file if path.suffix == ".safetensors" else torch.save)(STATE, path)
    assert path.stat().st_size > at
    os.truncate(path, at)


def torch_script(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/constants.pkl", b"")


OBJECTS = r"it holds Python objects \({}\), which are never opened; save its state_dict alone"
TORN = "it is damaged, or neither a safetensors file nor in torch.save's default format"
FAULTS = {
    "absent.pt": (lambda path: None, "no such file; correct some.weights"),
    "absent.safetensors": (lambda path: None, "no such file; correct some.weights"),
    "folder.pt": (lambda path: path.mkdir(), "cannot be read: it is a folder; give a file in it"),
    "torn.safetensors": (lambda path: torn(path, at=90), "cannot be read: .*header"),
    "beheaded.safetensors": (lambda path: torn(path, at=4), TORN),
    "torn.pt": (lambda path: torn(path, at=500), "cannot be read: "),
    "empty.pt": (lambda path: path.write_bytes(b""), "cannot be read: it is empty"),
    "text.pt": (lambda path: path.write_text("hello world"), TORN),
    "protocol.pt": (lambda path: torch.save(STATE, path, pickle_protocol=4), TORN),
    "script.pt": (torch_script, "it is a TorchScript archive; load it with torch.jit.load"),
    "module.pt": (
        lambda path: torch.save(torch.nn.Linear(2, 2), path),
        OBJECTS.format(r"torch\.nn\.modules\.linear\.Linear"),
    ),
    "path.pt": (
        lambda path: torch.save({"model": STATE, "where": Path("x")}, path),
        OBJECTS.format(r"pathlib\S*PosixPath"),
    ),
    "list.pt": (lambda path: torch.save([1, 2], path), "holds a list, not a state_dict"),
    "tensor.pt": (lambda path: torch.save(torch.ones(3), path), "holds a Tensor, not a state_dict"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("fault", [DataError, CheckpointError])
def test_each_fault_has_one_message(tmp_path, name, fault):
    make, words = FAULTS[name]
    path = tmp_path / name
    make(path)
    with pytest.raises(fault, match=words) as caught:
        read(path, fault=fault)
    message = str(caught.value)
    assert message.startswith(f"weights {path}: ")
    # Torch's proposal would run any code in the file.
    assert "\n" not in message
    assert "weights_only" not in message


@pytest.mark.parametrize("form", ["zipped", "old", "bare"])
def test_a_malicious_pickle_does_not_run(tmp_path, form):
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    content = {"model": STATE, "args": Malicious(trace)}
    if form == "bare":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zipped")
    with pytest.raises(DataError, match="cannot be read: it"):
        read(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes()) if form == "bare" else torch.load(path, weights_only=False)
    assert trace.exists()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
