"""Paths that cannot be read or written, in every field that names a file or folder."""

import re
from collections.abc import Callable, Iterator

from bad_input.arrangements import exported, nothing, sampled, trained
from bad_input.case import CONFIGS, TEACHER, Case, Place

_PREPARE = f"prepare {CONFIGS}/digits-prepare.yaml output={{folder}}/out"
_PARITY = f"parity {CONFIGS}/parity.yaml"
_TEACHER_CONFIG = f"{CONFIGS}/digits-teacher.yaml train={{folder}}/shards heldout={{folder}}/shards"

# What the command needs before it reads the path, the command, and the field.
READ: tuple[tuple[Callable[[Place], object], str, str], ...] = (
    (nothing, "train CONFIG", "data.folder"),
    (nothing, "prepare --teacher CONFIG alignments.0.stored_tokens=bf16", "data.folder"),
    (nothing, "train CONFIG", f"{TEACHER}.weights"),
    (nothing, "train CONFIG", "train.init_from.path"),
    (nothing, "train CONFIG", "engine.deepspeed"),
    (nothing, "export CONFIG", "run.folder"),
    (nothing, "report CONFIG", "run.folder"),
    (nothing, "sample CONFIG", "sample.weights"),
    (exported, "sample CONFIG", "sample.guide"),
    (exported, "sample CONFIG", "sample.label_file"),
    (nothing, "evaluate CONFIG", "evaluate.samples"),
    (sampled, "evaluate CONFIG", "evaluate.reference"),
    (sampled, "evaluate CONFIG", "evaluate.extractor.weights"),
    (nothing, "structure CONFIG", "structure.images"),
    (nothing, "structure CONFIG", "structure.masks"),
    (nothing, _PARITY, "evaluate.samples"),
    (sampled, f"{_PARITY} evaluate.samples={{folder}}/run/samples", "evaluate.reference"),
    (exported, "sweep CONFIG sweep.num_steps=[1]", "evaluate.reference"),
    (nothing, f"{_PREPARE} source.kind=image_folder", "source.path"),
    (nothing, f"{_PREPARE} source.kind=archive", "source.path"),
    (nothing, f"{_PREPARE} source.kind=web_dataset", "source.path"),
    (nothing, f"{_PREPARE} source.kind=file_list", "source.path"),
    (nothing, f"{_PREPARE} source.kind=parquet", "source.path"),
    (nothing, f"{_PREPARE} source.kind=repa", "source.path"),
    (nothing, f"{_PREPARE} source.kind=lightningdit pixels=null", "source.path"),
    (nothing, f"teacher {_TEACHER_CONFIG}", "train"),
    (nothing, f"teacher {_TEACHER_CONFIG}", "heldout"),
)
WRITTEN: tuple[tuple[Callable[[Place], object], str, str], ...] = (
    (nothing, "train CONFIG", "run.folder"),
    (trained, "export CONFIG", "export.folder"),
    (exported, "sample CONFIG", "sample.folder"),
    (sampled, "evaluate CONFIG evaluate.samples={folder}/run/samples", "run.folder"),
    (nothing, "structure CONFIG structure.num_images=1", "run.folder"),
    (exported, "sweep CONFIG sweep.num_steps=[1]", "sweep.folder"),
    (nothing, _PREPARE, "output"),
    (nothing, f"teacher {_TEACHER_CONFIG} steps=1 required_accuracy=0", "output"),
)

_LONG = "long" * 1200


def _file(place: Place) -> None:
    (place.folder / "file").write_text("a file, where a folder is wanted")


def _loop(place: Place) -> None:
    (place.folder / "loop").symlink_to("loop")


def _dangling(place: Place) -> None:
    (place.folder / "dangling").symlink_to("nowhere/at/all")


# The name of the kind, how it comes about, the value as YAML, and words of the message.
UNREADABLE = (
    ("with a NUL byte", nothing, r'"a\0b"', ("cannot hold the character NUL",)),
    ("of a long name", nothing, _LONG, ("is too long",)),
    ("below a file", _file, "{folder}/file/below", ("file/below",)),
    ("a link to itself", _loop, "{folder}/loop", ("loop",)),
    ("a dangling link", _dangling, "{folder}/dangling", ("dangling",)),
)
UNWRITABLE = (
    *UNREADABLE,
    ("a file", _file, "{folder}/file", ("file",)),
    ("below a dangling link", _dangling, "{folder}/dangling/below", ("dangling",)),
)


def _cases(table, kinds) -> Iterator[Case]:
    for needs, command, field in table:
        for kind, arrange, value, words in kinds:

            def both(place: Place, needs=needs, arrange=arrange) -> None:
                needs(place)
                arrange(place)

            of = "".join(re.findall(r" source\.kind=(\w+)", command))
            name = f"{command.split()[0]}{' ' * bool(of)}{of}, {field} {kind}"
            yield Case(name, both, f"{command} {field}={value}", words)


CASES = [*_cases(READ, UNREADABLE), *_cases(WRITTEN, UNWRITABLE)]
