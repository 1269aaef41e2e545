"""Files that would run code, take all memory, or lie about what they hold.

A row of `HOSTILE` is tested at once: its file is refused with `words`, within bounded memory.
"""

import io
import json
import os
import pickle
import shlex
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

STATE = {"x_embedder.proj.bias": torch.arange(6.0)}
_NAME = next(iter(STATE))
_BIG = 2**31 - 1


@dataclass(frozen=True)
class Hostile:
    """A file, made of the path of a trace that its code would leave."""

    content: Callable[[Path], bytes]
    words: str
    """What is said of it."""
    runs: bool = False
    """Whether it leaves the trace when it is opened without precautions."""


def text(value: str) -> bytes:
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def archive(
    pickled: bytes | None = None,
    extra: tuple[tuple[str | zipfile.ZipInfo, bytes], ...] = (),
) -> bytes:
    """A file of torch.save with another pickle, and with further entries."""
    original, changed = io.BytesIO(), io.BytesIO()
    torch.save(STATE, original)
    with zipfile.ZipFile(original) as source, zipfile.ZipFile(changed, "w") as target:
        for name in source.namelist():
            is_pickle = pickled is not None and name.endswith("data.pkl")
            target.writestr(name, pickled if is_pickle else source.read(name))
        for entry, content in extra:
            if entry == "twice":
                # Written as usual it would only bring a warning.
                target.filelist.append(target.filelist[0])
            else:
                target.writestr(entry, content)
    return changed.getvalue()


def called(function: str, arguments: bytes) -> bytes:
    """A pickle that calls a function by REDUCE; `arguments` leave a tuple."""
    module, _, name = function.rpartition(".")
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + arguments + b"R."


def made(trace: Path) -> bytes:
    return text(str(trace))


def of_command(trace: Path) -> bytes:
    return text(f"touch {shlex.quote(str(trace))}")


def of_code(trace: Path) -> bytes:
    return text(f"open({str(trace)!r}, 'w')")


class Reduced:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def saved(trace: Path, *, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    content = {"ema": STATE, "args": Reduced(trace)}
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def built(trace: Path) -> bytes:
    """BUILD calls `__setstate__` of a partial, which then holds another function."""
    state = b"(cos\nsystem\n" + of_command(trace) + b"\x85}Nt"
    return b"\x80\x02cfunctools\npartial\nc__builtin__\nprint\n\x85R" + state + b"b)R."


def nested(trace: Path) -> bytes:
    """torch's own function that opens bytes without precautions."""
    inner = saved(trace, zipped=True)
    argument = b"B" + struct.pack("<I", len(inner)) + inner
    return called("torch.storage._load_from_bytes", argument + b"\x85")


def mapped(trace: Path) -> bytes:
    arguments = b"(" + made(trace) + text("uint8") + text("w+") + b"K\x00K\x01t"
    return called("numpy.memmap", arguments)


def claiming(
    count: int, *, kind: str = "FloatStorage", key: str = "0", shape: int = 6, stride: int = 1
) -> bytes:
    """A tensor that says other things of its storage than the archive."""
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu")
    storage += number(count) + b"tQ"
    arguments = b"(" + storage + b"K\x00" + number(shape) + b"\x85" + number(stride) + b"\x85\x89"
    rebuilt = (
        b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"ccollections\nOrderedDict\n)RtR"
    )
    return archive(b"\x80\x02}" + text(_NAME) + rebuilt + b"s.")


def link() -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo("archive/data/9")
    entry.create_system, entry.external_attr = 3, 0o120777 << 16
    return entry


def tensors(header: object, num_bytes: int = 24) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + bytes(num_bytes)


def entry(begin: int = 0, end: int = 24, *, dtype: str = "F32", shape: tuple[int, ...] = (6,)):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def packed(pickled: bytes) -> Callable[[Path], bytes]:
    return lambda trace: archive(pickled)


_OBJECTS = r"it holds Python objects \({}\), which are never opened"
_DAMAGED = "it is damaged, or neither a safetensors file nor in torch.save's default format"
_NEVER = "its archive has {}, which torch.save never writes"
_CLAIM = r"it is damaged or malicious: its tensors claim .* bytes of the storage '0', which has 24"
_HEADER = r"it is damaged: its header is none of safetensors \(.*{}"

CODE: dict[str, Hostile] = {
    "reduce": Hostile(lambda t: saved(t, zipped=True), _OBJECTS.format(r"\w+\.mkdir"), True),
    "reduce, old": Hostile(lambda t: saved(t, zipped=False), _OBJECTS.format(r"\w+\.mkdir"), True),
    "reduce, bare": Hostile(
        lambda t: pickle.dumps(Reduced(t), protocol=2), _OBJECTS.format(r"\w+\.mkdir"), True
    ),
    "build": Hostile(lambda t: archive(built(t)), _OBJECTS.format(r"functools\.partial"), True),
    "os.system": Hostile(
        lambda t: archive(called("os.system", of_command(t) + b"\x85")),
        _OBJECTS.format(r"os\.system"),
        True,
    ),
    "eval": Hostile(
        lambda t: archive(called("__builtin__.eval", of_code(t) + b"\x85")),
        _OBJECTS.format(r"builtins\.eval"),
        True,
    ),
    "exec": Hostile(
        lambda t: archive(called("builtins.exec", of_code(t) + b"\x85")),
        _OBJECTS.format(r"builtins\.exec"),
        True,
    ),
    "numpy": Hostile(lambda t: archive(mapped(t)), _OBJECTS.format(r"numpy\.memmap"), True),
    "torch": Hostile(
        lambda t: archive(nested(t)), _OBJECTS.format(r"torch\.storage\._load_from_bytes"), True
    ),
    "inst": Hostile(
        lambda t: archive(b"\x80\x02(" + of_command(t) + b"ios\nsystem\n."),
        _OBJECTS.format(r"os\.system"),
        True,
    ),
    "obj": Hostile(
        lambda t: archive(b"\x80\x02(cos\nsystem\n" + of_command(t) + b"o."),
        _OBJECTS.format(r"os\.system"),
        True,
    ),
    "stack global": Hostile(
        lambda t: archive(b"\x80\x04\x8c\x02os\x8c\x06system\x93" + of_command(t) + b"\x85R."),
        _DAMAGED,
        True,
    ),
}


def with_two_lists() -> bytes:
    """An archive of which zipfile reads one list of entries, and torch another."""
    content = archive()
    end = content.rfind(b"PK\5\6")
    (begin,) = struct.unpack_from("<L", content, end + 16)
    return content[:end] + content[begin:end] + content[end:]


ARCHIVES: dict[str, Hostile] = {
    "two lists of entries": Hostile(
        lambda t: with_two_lists(), "its archive has two lists of entries"
    ),
    "archive in an archive": Hostile(
        lambda t: archive(extra=(("data.pkl/inner.pt", saved(t, zipped=True)),)),
        _NEVER.format(r"several folders \(archive, data.pkl\)"),
    ),
    "two pickles": Hostile(
        lambda t: archive(extra=(("other/data.pkl", b"\x80\x02}."),)),
        _NEVER.format(r"several folders \(archive, other\)"),
    ),
    "a pickle twice": Hostile(
        lambda t: archive(extra=(("twice", b""),)),
        _NEVER.format("the entry 'archive/data.pkl' twice"),
    ),
    "a pickle in capitals": Hostile(
        lambda t: archive(extra=(("archive/DATA.pkl", b"\x80\x02}."),)),
        _NEVER.format("the entry 'archive/data.pkl' twice"),
    ),
    "a path that leads out": Hostile(
        lambda t: archive(extra=(("archive/../../evil", b"x"),)),
        _NEVER.format(r"an entry that leads out of it \('archive/\.\./\.\./evil'\)"),
    ),
    "an absolute path": Hostile(
        lambda t: archive(extra=(("/evil", b"x"),)),
        _NEVER.format(r"an entry that leads out of it \('/evil'\)"),
    ),
    "a link": Hostile(
        lambda t: archive(extra=((link(), b"/etc/passwd"),)),
        _NEVER.format(r"a link \('archive/data/9'\)"),
    ),
    "larger storage": Hostile(lambda t: claiming(40), _CLAIM),
    "gigantic storage": Hostile(lambda t: claiming(_BIG), _CLAIM),
    "wider dtype": Hostile(lambda t: claiming(6, kind="DoubleStorage"), _CLAIM),
    "gigantic tensor": Hostile(lambda t: claiming(6, shape=_BIG), "cannot be read: "),
    "gigantic repetition": Hostile(
        lambda t: claiming(6, shape=_BIG, stride=0),
        "its tensors would take 8,191 MiB, but the file has 0 MiB: they repeat a few values",
    ),
    "storage that leads out": Hostile(lambda t: claiming(6, key="../0"), "cannot be read: "),
    "negative storage": Hostile(lambda t: claiming(-5), "cannot be read: "),
}

BOMBS: dict[str, Hostile] = {
    "bytearray": Hostile(
        packed(called("__builtin__.bytearray", number(_BIG) + b"\x85")),
        _OBJECTS.format(r"builtins\.bytearray"),
    ),
    "tensor": Hostile(
        packed(called("torch.Tensor", number(_BIG) + b"\x85")), _OBJECTS.format(r"torch\.Tensor")
    ),
    "storage": Hostile(
        packed(called("torch.storage.UntypedStorage", number(_BIG) + b"\x85")),
        _OBJECTS.format(r"torch\.storage\.UntypedStorage"),
    ),
    "encoded again and again": Hostile(
        packed(called("_codecs.encode", text("a") + text("hex") + b"\x86")),
        _OBJECTS.format(r"_codecs\.encode"),
    ),
    "tuples in tuples as a key": Hostile(
        packed(b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s."),
        "its tuples are nested too deeply for weights",
    ),
    "tuples in tuples by the memo": Hostile(
        packed(b"\x80\x02})" + b"\x85q\x00h\x00\x86" * 100_000 + b"K\x01s."),
        "its tuples are nested too deeply for weights",
    ),
    "lists in lists": Hostile(
        packed(b"\x80\x02}" + text(_NAME) + b"]" * 200_000 + b"a" * 199_999 + b"s."),
        "are not tensors",
    ),
    "huge memo": Hostile(packed(b"\x80\x02}r\xff\xff\xff\x7f."), "it is empty"),
    "huge pickle": Hostile(packed(b"\x80\x02" + b"N" * (5 << 20) + b"."), "more than 4 MiB"),
    "huge text": Hostile(packed(b"\x80\x02X\xff\xff\xff\x7fa."), _DAMAGED),
    "huge bytes": Hostile(packed(b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"a."), _DAMAGED),
    "huge bytes, old": Hostile(lambda t: b"\x80\x02T\xff\xff\xff\x7fa.", _DAMAGED),
    "huge number": Hostile(packed(b"\x80\x02\x8b\xff\xff\xff\x7fa."), _DAMAGED),
}

SAFETENSORS: dict[str, Hostile] = {
    "truncated": Hostile(
        lambda t: save(STATE)[:-7],
        "it is truncated, or its header damaged: it should have 112 bytes, and has 105",
    ),
    "truncated header": Hostile(lambda t: save(STATE)[:40], "it is truncated: its header has"),
    "longer": Hostile(lambda t: save(STATE) + b"more", "4 of its 116 bytes are of no tensor"),
    "flipped brace": Hostile(lambda t: flipped(save(STATE), 8), _DAMAGED),
    "flipped quote": Hostile(lambda t: flipped(save(STATE), 9), _HEADER.format("")),
    "flipped length": Hostile(lambda t: flipped(save(STATE), 0), "it is (damaged|truncated)"),
    "flipped dtype": Hostile(
        lambda t: save(STATE).replace(b'"F32"', b'"F3v"'), "cannot be read: .*header"
    ),
    "overlapping": Hostile(
        lambda t: tensors({"a": entry(), "b": entry(12, 36)}, 36), "cannot be read: .*[Oo]ffset"
    ),
    "beyond the end": Hostile(
        lambda t: tensors({"a": entry(0, 2**40, shape=(2**38,))}), "it is truncated, or its header"
    ),
    "a hole": Hostile(
        lambda t: tensors({"a": entry(), "b": entry(48, 72)}, 72), "cannot be read: .*[Oo]ffset"
    ),
    "backwards": Hostile(lambda t: tensors({"a": entry(24, 0)}), _HEADER.format("bytes 24 to 0")),
    "negative": Hostile(lambda t: tensors({"a": entry(-24, 0)}), _HEADER.format("bytes -24 to 0")),
    "a name twice": Hostile(
        lambda t: tensors(
            f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry(24, 48))}}}'.encode(), 48
        ),
        _HEADER.format("the key 'a' is given twice"),
    ),
    "gigantic header": Hostile(
        lambda t: struct.pack("<Q", 2**40) + b"{}", "its header would have 1,099,511,627,776 bytes"
    ),
    "larger dtype": Hostile(lambda t: tensors({"a": entry(dtype="F64")}), "cannot be read: "),
    "larger shape": Hostile(lambda t: tensors({"a": entry(shape=(2**40,))}), "cannot be read: "),
    "overflowing shape": Hostile(
        lambda t: tensors({"a": entry(shape=(2**32, 2**32))}), "cannot be read: "
    ),
    "deep header": Hostile(lambda t: tensors(b'{"a":' + b"[" * 200_000), _HEADER.format("")),
    "no object": Hostile(lambda t: tensors({"a": 3}), _HEADER.format("")),
    "NaN": Hostile(
        lambda t: save({_NAME: torch.full((6,), torch.nan)}), f"not finite: {_NAME}; choose weights"
    ),
}

HOSTILE = CODE | ARCHIVES | BOMBS | SAFETENSORS
