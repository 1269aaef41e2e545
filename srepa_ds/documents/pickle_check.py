"""Looks through a pickle of weights before anything is made of it.

torch's own reader with `weights_only=True` runs no foreign code, but some of what it allows takes
memory without end (`bytearray(2**40)`, `torch.Tensor(2**40)`), and tuples within tuples, hundreds
of thousands deep, overflow the stack of the interpreter when they become keys. So all operations
are followed here as far as that shows; none is carried out.
"""

import io
import mmap
import pickletools
import re
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, cast

# What torch.save writes for tensors, parameters, dtypes, plain values and a trainer's arguments.
_KNOWN = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\.(storage\.)?\w+Storage|torch\.[a-z]\w*"
    r"|torch\.(Size|nn\.parameter\.Parameter|serialization\._get_layout)"
    r"|collections\.OrderedDict|builtins\.(set|complex)|argparse\.Namespace"
)
_STORAGE = re.compile(r"torch\.(storage\.)?(\w+)Storage")
_BYTES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1,
    "Byte": 1, "Bool": 1, "ComplexDouble": 16, "ComplexFloat": 8, "Untyped": 1,
}  # fmt: skip
_CALLS = frozenset({"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"})
_MOST_LEVELS = 32
# That of SiT-XL/2 with its moments has 0.2 MB. Lists of lists take 60 times their bytes.
_MOST_BYTES = 4 << 20


class NoWeightsError(Exception):
    """A file is something else than weights; the message says what."""


class _Global(NamedTuple):
    name: str


class _Node(NamedTuple):
    """Something on the stack: a text, a number, a global or a tuple of such; else None."""

    value: Any = None
    depth: int = 0
    """Tuples within it."""


_MARK, _PLAIN = _Node(), _Node()
"""A mark, and whatever does not matter: one node of each, so that many take little memory."""


def check_pickle(file: io.BytesIO | mmap.mmap) -> dict[str, int]:
    """Returns the bytes of each storage that a pickle refers to, by key; reads up to its end.

    `file` must not take memory for more bytes than it has. Raises NoWeightsError for anything
    that no file of weights has, and ValueError or LookupError if the pickle is damaged.
    """
    stack: list[_Node] = []
    memo: dict[Any, _Node] = {}
    storages: dict[str, int] = {}
    for opcode, argument, position in pickletools.genops(cast("IO[bytes]", file)):
        name = opcode.name
        check_length(position or 0)
        if name == "MARK":
            stack.append(_MARK)
        elif name.endswith("PUT"):
            memo[argument] = stack[-1]
        elif name.endswith("GET"):
            stack.append(memo[argument])
        else:
            value = _known(str(argument)) if name in ("GLOBAL", "INST") else argument
            popped = list(_popped(stack, opcode))
            if name in _CALLS:
                _check_call(popped)
            if name == "BINPERSID":
                for key, count in _storage(popped[0].value):
                    storages[key] = max(count, storages.get(key, 0))
            stack += _pushed(opcode, value, popped)
    return storages


def check_length(num_bytes: int) -> None:
    """Raises NoWeightsError for a pickle of more bytes than one of weights has."""
    if num_bytes > _MOST_BYTES:
        raise NoWeightsError(f"its pickle has more than {_MOST_BYTES >> 20} MiB")


def objects_refused(name: str) -> str:
    """Returns what is said of a file that makes Python objects of a class, or calls a function."""
    return (
        f"it holds Python objects ({name[:80]}), which are never opened; save its state_dict alone"
    )


def _known(argument: str) -> _Global:
    """Returns the global of a module and a name with a space between; raises if it is foreign."""
    name = argument.replace(" ", ".").replace("__builtin__.", "builtins.")
    if not _KNOWN.fullmatch(name):
        raise NoWeightsError(objects_refused(name))
    return _Global(name)


def _popped(stack: list[_Node], opcode: pickletools.OpcodeInfo) -> Iterator[_Node]:
    """Takes from the stack what the operation takes, the uppermost first."""
    before = opcode.stack_before
    if pickletools.markobject in before:
        while (node := stack.pop()) is not _MARK:
            yield node
        before = before[: before.index(pickletools.markobject)]
    for _ in before:
        yield stack.pop()


def _check_call(popped: list[_Node]) -> None:
    """Raises NoWeightsError for a call of a storage's class, which would allocate one."""
    for node in popped:
        if isinstance(node.value, _Global) and _STORAGE.fullmatch(node.value.name):
            raise NoWeightsError(objects_refused(node.value.name))


def _pushed(opcode: pickletools.OpcodeInfo, argument: Any, popped: list[_Node]) -> Iterator[_Node]:
    if opcode.name.startswith("TUPLE"):
        depth = 1 + max((node.depth for node in popped), default=0)
        if depth > _MOST_LEVELS:
            raise NoWeightsError("its tuples are nested too deeply for weights")
        yield _Node(tuple(node.value for node in reversed(popped)), depth)
    else:
        node = _PLAIN if argument is None else _Node(argument)
        yield from (node for _ in opcode.stack_after)


def _storage(reference: Any) -> Iterator[tuple[str, int]]:
    """Yields key and bytes of the storage that a persistent id of torch refers to."""
    match reference:
        case ("storage", _Global(name), str(key), str(), int(count)) if count >= 0:
            kind = _STORAGE.fullmatch(name)
            if kind and kind[2] in _BYTES:
                yield key, count * _BYTES[kind[2]]
