"""Weight files from elsewhere: the contents that are read, and the messages about the rest."""

import argparse
import gzip
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from generated import bounded
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from srepa_ds.errors import CheckpointError, DataError
from srepa_ds.weight_file import plain_tensors, read_weight_file, without_wrappers

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


@pytest.mark.parametrize("name", ["no_suffix", "named.pt", "named.bin", "named.npz", "a.tar"])
@pytest.mark.parametrize("form", ["safetensors", "zipped", "old"])
def test_the_content_decides_whatever_the_name(tmp_path, name, form):
    path = tmp_path / name
    if form == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=form == "zipped")
    assert_state(read(path))


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


def numpy_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def numpy_archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, np.zeros(3))


def other_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "x")


def tar_archive(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("weights"), io.BytesIO())


def compressed(path: Path, *, entry: str = "data.pkl", zeros: int = 0) -> None:
    """A file of torch.save that was packed again, with one entry enlarged by zeros."""
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    with (
        zipfile.ZipFile(buffer) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            with target.open(name, "w") as file:
                file.write(source.read(name))
                for _ in range(zeros >> 20 if name.endswith(entry) else 0):
                    file.write(bytes(1 << 20))


def folder_of_weights(path: Path) -> None:
    path.mkdir()
    (path / "model.safetensors").touch()


def circle(path: Path) -> None:
    state: dict = {}
    state["model"] = state
    torch.save({"list": [state]}["list"], path)


PAGE = "it is an HTML or XML page, not weights: the download failed"
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
    "pointer.safetensors": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "it is a Git LFS pointer, not the weights; run `git lfs pull`",
    ),
    "page.pt": (lambda path: path.write_text("\n <!DOCTYPE html><html>404</html>"), PAGE),
    "page.safetensors": (lambda path: path.write_text("<HTML><head>"), PAGE),
    "refusal.pt": (lambda path: path.write_text('<?xml version="1.0"?><Error>'), PAGE),
    "index.json": (
        lambda path: path.write_text('{"weight_map": {}}'),
        "it is a JSON document, not weights",
    ),
    "packed.pt": (lambda path: path.write_bytes(gzip.compress(b"x")), "compressed with gzip"),
    "archive.tar": (tar_archive, "it is a tar archive; unpack it first"),
    "array.npy": (numpy_array, "it is a NumPy array, not a state_dict"),
    "arrays.npz": (numpy_archive, "it is a NumPy archive, not a state_dict"),
    "model.onnx": (
        lambda path: path.write_bytes(b"\x08\x07\x12\x07pytorch\x1a\x05"),
        "it is a protocol buffer, as ONNX writes",
    ),
    "saved_model.pb": (lambda path: path.write_bytes(b"\x08\x01\x12\x05"), "of TensorFlow or ONNX"),
    "model.ckpt.index": (
        lambda path: path.write_bytes(bytes(50) + bytes.fromhex("57fb808b247547db")),
        "it is the index of a TensorFlow checkpoint",
    ),
    "model.h5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"), "it is an HDF5 file"),
    "bundle.zip": (
        other_archive,
        r"it is a zip archive of other files \(readme.txt\)",
    ),
    "packed again.pt": (compressed, "it is a compressed zip archive"),
    "folder of weights": (folder_of_weights, r"it is a folder; .* \(model.safetensors\)"),
    "pipe": (os.mkfifo, "it is no regular file"),
    "list of circles.pt": (circle, "holds a list, not a state_dict"),
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


@pytest.mark.parametrize("entry", ["data.pkl", "data/0"])
def test_a_zip_bomb_is_not_unpacked(tmp_path, entry):
    path = tmp_path / "bomb.pt"
    compressed(path, entry=entry, zeros=200 << 20)
    assert path.stat().st_size < 1 << 20
    with (
        bounded(megabytes=100),
        pytest.raises(DataError, match="it is a compressed zip archive, which"),
    ):
        read(path)


class Announced:
    """A tensor that claims to have more elements than its storage holds."""

    def __reduce__(self):
        storage = torch.storage.TypedStorage(
            wrap_storage=torch.ones(2).untyped_storage(), dtype=torch.float32, _internal=True
        )
        arguments = (storage, 0, (10**10,), (1,), False, {})
        return torch._utils._rebuild_tensor_v2, arguments


@pytest.mark.parametrize("zipped", [True, False])
def test_announced_sizes_take_no_memory(tmp_path, zipped):
    path = tmp_path / "weights.pt"
    torch.save({"a": Announced()}, path, _use_new_zipfile_serialization=zipped)
    with bounded(megabytes=100), pytest.raises(DataError, match="cannot be read: "):
        read(path)


def plain(path: Path) -> dict[str, torch.Tensor]:
    return plain_tensors(read(path), path, named="the weights", fault=DataError)


@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (lambda: torch.eye(3).to_sparse(), "'w' is a sparse tensor; save it as"),
        (lambda: torch.ones(2, device="meta"), "'w' is a tensor without values"),
        (lambda: torch.ones(2, dtype=torch.complex64), r"'w' is of the type torch\.complex64"),
        (lambda: torch.ones(2).to(torch.float8_e4m3fn), r"of the type torch\.float8_e4m3fn"),
        (lambda: torch.ones(1).expand(10**5, 10**5), "would take 38,146 MiB, but the file has 0"),
    ],
)
def test_tensors_that_are_no_plain_weights_are_named(tmp_path, tensor, words):
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.ones(2), "w": tensor()}, path)
    with pytest.raises(DataError, match=words):
        plain(path)


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="needs torch's float4")
def test_float4_is_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"w": torch.zeros(4, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, path)
    with pytest.raises(DataError, match=r"'w' is of the type torch\.float4"):
        plain(path)


def test_views_and_parameters_become_plain_tensors(tmp_path):
    rows = torch.arange(6.0).reshape(2, 3)
    state = {"t": rows.T, "e": torch.ones(1).expand(4), "p": torch.nn.Parameter(rows)}
    torch.save(state, tmp_path / "weights.pt")
    found = plain(tmp_path / "weights.pt")
    for name, value in state.items():
        assert torch.equal(found[name], value)
        assert found[name].is_contiguous()
        assert not found[name].requires_grad


def test_prefixes_go_only_if_more_names_are_known_without_them():
    own = {f"blocks.{n}.weight" for n in range(20)} | {"norm.weight"}

    def names(*given: str) -> list[str]:
        state = {name: torch.ones(1) for name in given}
        return list(without_wrappers(state, own.__contains__))

    for prefix in ("", "net.", "module.", "module.student.", "_orig_mod.model.backbone."):
        assert set(names(*(prefix + name for name in own))) == own, prefix
    # Nearly all: a head lies beside the backbone.
    assert set(names(*(f"backbone.{name}" for name in own), "fc.bias")) == own | {"fc.bias"}
    foreign = [f"layers.{n}.weight" for n in range(9)]
    assert names(*foreign) == foreign
    assert names("net.norm.weight", "norm.weight") == ["net.norm.weight", "norm.weight"]


def forms_of_a_file() -> dict[str, bytes]:
    forms = {"safetensors": save(STATE)}
    for name, zipped in (("zipped", True), ("old", False)):
        buffer = io.BytesIO()
        torch.save({"model": STATE, "epoch": 3}, buffer, _use_new_zipfile_serialization=zipped)
        forms[name] = buffer.getvalue()
    return forms


FORMS = forms_of_a_file()


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Returns content with some bytes changed, removed or repeated, often in its beginning."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(result)) | st.integers(0, min(200, len(result))))
        stop = start + draw(st.integers(0, 12))
        result[start:stop] = draw(st.binary(max_size=12) | st.just(bytes(result[start:stop] * 2)))
    return bytes(result)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=150, deadline=5000)
@given(data=st.data())
def test_no_damage_gives_any_other_error(tmp_path_factory, form, data):
    path = tmp_path_factory.getbasetemp() / f"damaged.{form}"
    path.write_bytes(data.draw(damaged(FORMS[form])))
    try:
        state = {k: v for k, v in read(path).items() if isinstance(v, torch.Tensor)}
        plain_tensors(state, path, named="the weights", fault=DataError)
    except DataError:
        pass
