"""Rows that fail for now: their names, and what happens instead of one message."""

_PATHS = "an exception that is no SRepaError: the path cannot exist"

KNOWN = {
    "prepare --teacher, a configuration that is a link to itself": "RuntimeError of Path.resolve",
    "export, run.folder of a long name": _PATHS,
    "evaluate, evaluate.reference of a long name": _PATHS,
    "teacher, train of a long name": _PATHS,
    "teacher, heldout of a long name": _PATHS,
    "train, run.folder with a NUL byte": _PATHS,
    "export, export.folder with a NUL byte": _PATHS,
    "sample, sample.folder with a NUL byte": _PATHS,
    "evaluate, run.folder with a NUL byte": _PATHS,
    "prepare, output with a NUL byte": _PATHS,
    "prepare, output of a long name": _PATHS,
    "teacher, output with a NUL byte": _PATHS,
    "teacher, output of a long name": _PATHS,
}
