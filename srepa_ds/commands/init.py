"""`srepa-ds init`: the configurations that the package ships, copied to be changed."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from srepa_ds.errors import DataError, OutputError, listed
from srepa_ds.files import (
    expanded,
    make_folder,
    remove_empty,
    shipped_with_package,
    write_aside,
    writing,
)

SHIPPED = (Path("configs/digits-sit.yaml"), Path("ds_configs/zero2.json"))
"""One of the files of each folder: a folder of that name could be another package's."""

_CURE = "choose a folder you may write to, with free space"


def init(folder: Path) -> str:
    """Copies `configs/` and `ds_configs/` into `folder` and returns what to do next.

    Files that are there already with the same contents are left alone. Raises OutputError, and
    writes nothing, if one has other contents; and if the folder cannot be written to.
    """
    try:
        folder = expanded(folder)
    except ValueError as error:
        raise OutputError(f"FOLDER {folder}: {error}") from error
    wanted = dict(_shipped_files())
    with writing(folder, cure=_CURE):
        present = {name for name in wanted if (folder / name).exists()}
        changed = [name for name in present if (folder / name).read_bytes() != wanted[name]]
    if changed:
        raise OutputError(
            f"{folder} already holds other versions of {listed(sorted(changed))}; nothing was "
            "copied: move them away, or choose another folder"
        )
    new = {name: content for name, content in wanted.items() if name not in present}
    _write(folder, new)
    return _next_steps(folder, len(new), len(present))


def _shipped_files() -> Iterator[tuple[str, bytes]]:
    """Yields the name of each shipped file below the folder, and its contents."""
    for name in SHIPPED:
        source = shipped_with_package(name)
        if source is None:
            raise DataError(f"{name} is missing from the installation; install srepa_ds again")
        for path in sorted(source.parent.rglob(f"*{name.suffix}")):
            yield str(name.parent / path.relative_to(source.parent)), path.read_bytes()


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Writes all of `files` below `folder`, or none of them; raises OutputError."""
    made: list[Path] = []
    written: list[Path] = []
    try:
        with writing(folder, cure=_CURE):
            for name, content in files.items():
                path = folder / name
                made = make_folder(path.parent) + made
                write_aside(path, lambda aside, content=content: aside.write_bytes(content))
                written.append(path)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        remove_empty(made)
        raise


def _next_steps(folder: Path, num_copied: int, num_present: int) -> str:
    there = f"; {num_present} were there already" if num_present else ""
    enter = "" if folder == Path() else f"  cd {shlex.quote(str(folder))}\n"
    return (
        f"copied {num_copied} files to {folder.absolute()}{there}. On handwritten digits, run next:"
        f"\n{enter}"
        "  srepa-ds prepare configs/digits-prepare.yaml\n"
        "  srepa-ds teacher configs/digits-teacher.yaml\n"
        "  srepa-ds train configs/digits-srepa-mse.yaml\n"
        "or all of it at once: srepa-ds demo"
    )
