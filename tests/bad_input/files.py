"""Configurations that cannot be read, given to every command that takes one."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from bad_input.case import Case, Place

COMMANDS = (
    *("config", "fetch", "prepare", "prepare --teacher", "teacher"),
    *("train", "export", "sample", "evaluate", "sweep", "structure", "report", "parity"),
)


@dataclass(frozen=True)
class Broken:
    """A file or folder in the place of a configuration, and words of the message."""

    make: Callable[[Path], object]
    words: tuple[str, ...]
    name: str = "broken.yaml"


def _text(content: str | bytes, *words: str) -> Broken:
    encoded = content.encode() if isinstance(content, str) else content
    return Broken(lambda path: path.write_bytes(encoded), words)


def _nothing(_: Path) -> None:
    """The name alone is the fault."""


FOR_EVERY_COMMAND = {
    "missing": Broken(_nothing, ("broken.yaml", "No such file or directory", "YAML file")),
    "a folder": Broken(lambda path: path.mkdir(), ("Is a directory", "YAML file")),
    "below a file": Broken(
        lambda path: path.parent.write_text("a file"), ("Not a directory",), "file/broken.yaml"
    ),
    "empty": _text("", "must be a mapping of sections"),
    "a picture": _text(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "broken.yaml", "not"),
    "no YAML": _text("run: {folder: [unclosed\n", "not valid YAML"),
    "of an unknown kind": _text("kind: traning\n", "kind"),
}

# They are read by the same function, so each is given to one command.
FOR_SOME_COMMAND = {
    "of a long name": Broken(_nothing, ("is too long",), "long" * 100 + ".yaml"),
    "a dangling link": Broken(lambda path: path.symlink_to("nowhere"), ("No such file",)),
    "a link to itself": Broken(lambda path: path.symlink_to(path), ("symbolic links",)),
    "a comment": _text("# nothing yet\n", "must be a mapping of sections"),
    "a list": _text("- run\n- data\n", "must be a mapping of sections"),
    "a sentence": _text("train the model", "must be a mapping of sections"),
    "a number": _text("12", "must be a mapping of sections"),
    "in Latin-1": _text("run: {folder: M\xfcnchen}".encode("latin-1"), "broken.yaml", "not"),
    "of NUL bytes": _text("\0" * 512, "not valid YAML"),
    "indented by tabs": _text("run:\n\tfolder: runs/a\n", "not valid YAML"),
    "with a key given twice": _text("run: {seed: 1, seed: 2}", "key 'seed' is given twice"),
    "of Python objects": _text("!!python/object/apply:os.getcwd []", "not valid YAML"),
    "with an unknown alias": _text("run: *nobody", "not valid YAML"),
    "two documents": _text("run: 1\n---\nrun: 2\n", "not valid YAML"),
    "over no base": _text("base: nowhere.yaml", "nowhere.yaml", "No such file"),
    "over itself": _text("base: broken.yaml", "base", "circle"),
    "over a folder": _text("base: .", "Is a directory"),
    "of sections that are none": _text("kind: 3\nrun: 3\n", "kind"),
}


def _case(command: str, name: str, broken: Broken) -> Case:
    def arrange(place: Place) -> None:
        broken.make(place.folder / broken.name)

    line = f"{command} {{folder}}/{broken.name}"
    return Case(f"{command}, a configuration that is {name}", arrange, line, broken.words)


CASES = [
    *(_case(command, *item) for command in COMMANDS for item in FOR_EVERY_COMMAND.items()),
    *map(_case, cycle(COMMANDS), FOR_SOME_COMMAND, FOR_SOME_COMMAND.values()),
]
