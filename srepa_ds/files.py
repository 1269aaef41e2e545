"""Files written whole or not at all; folders, locks, and files shipped with the package."""

import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path

from safetensors import SafetensorError

import srepa_ds
from srepa_ds.errors import OutputError

PARTIAL = ".partial"

_MOST_DOCUMENT_BYTES = 64 << 20
_UNKNOWN_HOLDER = "which has just ended, or is on another machine or in another container"

log = logging.getLogger("srepa_ds")


def write_aside(path: Path, write: Callable[[Path], object], *, concurrent: bool = False) -> None:
    """Writes `path` as a whole: `write` fills the file it is given, which then takes the name.

    That file is `<path>.partial`; it is flushed to disk before it is renamed, and removed if
    `write` raises. With `concurrent`, it is `own_aside(path)`, and several processes may write the
    same path at once. Raises what `write` raises, and OSError.
    """
    aside = own_aside(path) if concurrent else path.with_name(path.name + PARTIAL)
    try:
        _fill(aside, write)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_all_aside(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Writes files as `write_aside` does, all of them before the first takes its name.

    They are written and take their names in the given order. Raises what a writer raises, and
    OSError; nothing is left of the attempt then, unless it fails between two names.
    """
    asides = {path: path.with_name(path.name + PARTIAL) for path in writers}
    named: list[Path] = []
    try:
        for path, write in writers.items():
            _fill(asides[path], write)
        for path, aside in asides.items():
            os.replace(aside, path)
            named.append(path)
    except BaseException:
        for aside in () if named else asides.values():
            aside.unlink(missing_ok=True)
        raise


def _fill(aside: Path, write: Callable[[Path], object]) -> None:
    # A new file: what lies there may be a link that leads elsewhere.
    aside.unlink(missing_ok=True)
    aside.touch(exist_ok=False)
    # safetensors makes its files private; ours get the usual permissions.
    mode = stat.S_IMODE(aside.stat().st_mode)
    write(aside)
    aside.chmod(mode)
    flush_to_disk(aside)


def own_aside(path: Path) -> Path:
    """Returns a name beside `path` that nobody else takes; it ends with `process_mark()`."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.{process_mark()}{PARTIAL}")


def process_mark() -> str:
    """Returns a name of this process among those of all machines and containers."""
    space = hashlib.sha256(process_space().encode()).hexdigest()[:8]
    return f"{socket.gethostname()}-{space}-{os.getpid()}"


def process_space() -> str:
    """Returns where process numbers have a meaning: the machine's start and the container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def expanded(path: Path) -> Path:
    """Returns `path` with `~`, `~user`, `$NAME` and `${NAME}` replaced by what they stand for.

    `$$` stands for a dollar sign.
    Raises ValueError if they stand for nothing, or no file system has such a path.
    """
    text = os.path.expanduser(_VARIABLE.sub(_value_of, str(path)))
    if text.startswith("~"):
        raise ValueError(f"the home folder of {text.split('/')[0]} is not known; write it out")
    if "\0" in text:
        raise ValueError("a path cannot hold the character NUL")
    parts = text.split("/")
    if longest := next((part for part in parts if len(os.fsencode(part)) > _LONGEST_NAME), None):
        raise ValueError(
            f"the name {longest[:20]}... is too long: it has {len(os.fsencode(longest))} bytes, a "
            f"file's may have {_LONGEST_NAME}"
        )
    if len(os.fsencode(text)) > _LONGEST_PATH:
        raise ValueError(f"the path is longer than {_LONGEST_PATH} bytes")
    return Path(text)


_VARIABLE = re.compile(r"\$(?:([$])|([A-Za-z_][A-Za-z0-9_]*)|\{([^}]*)\})")
# Linux's limits; that of a path less the names that are added to what a user gives.
_LONGEST_NAME = 255
_LONGEST_PATH = 3800


def _value_of(variable: re.Match[str]) -> str:
    if variable[1]:
        return "$"
    name = variable[2] or variable[3]
    if not name:
        raise ValueError(f"{variable[0]} names no environment variable; write $$ for a dollar sign")
    value = os.environ.get(name)
    if not value:
        raise ValueError(
            f"the environment variable '{name}' is not set; set it, or write $$ for a dollar sign"
        )
    return value


def unexpanded(path: Path) -> str:
    """Returns the text of which `expanded` makes `path`, which it has made before."""
    return str(path).replace("$", "$$")


def is_of_the_system(name: str) -> bool:
    """Returns whether a name in a folder is one that systems put there: `.DS_Store`, `.nfs...`."""
    return name.startswith(".") or name == "lost+found"


def looked_for(named: Path, found: Path | None = None) -> str:
    """Returns where a relative path was looked for, as a part of a message; "" for another one."""
    return "" if named.is_absolute() else f" (looked for at {os.path.abspath(found or named)})"


def reason_of(error: Exception) -> str:
    """Returns why a file cannot be read or written, without its name."""
    return getattr(error, "strerror", None) or str(error)


def shipped(path: Path) -> Path:
    """Returns `path` if it exists, else the file of that name shipped with the package."""
    if os.path.exists(path) or path.is_absolute():
        return path
    return shipped_with_package(path) or path


def shipped_with_package(path: Path) -> Path | None:
    """Returns the file of that name shipped with the package, if there is one."""
    places = (root / path for root in _shipping_roots())
    # Unlike Path.exists, this is False for whatever cannot be looked at.
    return next((place for place in places if os.path.exists(place)), None)


def _shipping_roots() -> Iterator[Path]:
    """Yields the folders to look in: the checkout, then where pip put data files."""
    beside_package = Path(srepa_ds.__file__).parents[1]
    yield beside_package
    try:
        installed = metadata.files("srepa_ds") or ()
    except metadata.PackageNotFoundError:
        installed = ()
    for file in installed:
        if file.parts[-4:] == ("share", "srepa_ds", "constraints", "tested.txt"):
            yield Path(str(file.locate())).resolve().parents[1]
    # `pip install --target` moves files after it has recorded their places.
    yield beside_package / "share" / "srepa_ds"


def flush_to_disk(path: Path) -> None:
    """Waits until the contents of `path` are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_document(path: Path) -> str:
    """Returns the text of a YAML or JSON file, which is opened once: it may be a pipe.

    Raises OSError, and ValueError if it is not UTF-8 or has more than 64 MiB.
    """
    with path.open("rb") as file:
        content = file.read(_MOST_DOCUMENT_BYTES + 1)
    if len(content) > _MOST_DOCUMENT_BYTES:
        raise ValueError(f"it has more than {_MOST_DOCUMENT_BYTES >> 20} MiB")
    return content.decode("utf-8")


def is_plain_name(name: str) -> bool:
    """Returns whether `name` can only be a file in the folder that it is joined to."""
    return name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


def sha256_of(path: Path) -> str:
    """Returns the sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(folder: Path, *, is_shared: bool = False) -> Iterator[None]:
    """Holds a lock on `folder` while the block runs; others may hold a shared one beside it.

    The lock is on the folder itself: no file is left behind, and it is released however the
    process ends. Raises BlockingIOError if another process holds it, OSError if the folder is
    missing.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            # Some network file systems have no locks. Then only this protection is lost.
            pass
        yield
    finally:
        os.close(descriptor)


@contextmanager
def claimed(
    folder: Path, *, doing: str, cure: str, otherwise: str = "", is_shared: bool = False
) -> Iterator[None]:
    """Makes `folder`, keeps other processes out while the block runs, removes it if it stays empty.

    With `is_shared`, other shared claims are let in.
    Raises OutputError if it cannot be written to (with `cure`), or if another process holds it; the
    message says which one and that it is `doing` the folder ("training in"), and ends with
    `otherwise`.
    """
    with ExitStack() as lock:
        with writing(folder, cure=cure):
            made = make_folder(folder)
            try:
                lock.enter_context(locked(folder, is_shared=is_shared))
            except BlockingIOError as error:
                holder = holder_of(folder) or _UNKNOWN_HOLDER
                raise OutputError(
                    f"another process ({holder}) is {doing} {folder}; wait for it or end "
                    f"it{otherwise}"
                ) from error
            except OSError:
                remove_empty(made)
                raise
        try:
            yield
        finally:
            remove_empty(made)


def holder_of(folder: Path) -> str | None:
    """Returns the process that holds the lock on `folder`: its number and command line.

    None if there is none that this machine knows of. Raises OSError if the folder is missing.
    """
    number = folder.stat().st_ino
    try:
        locks = Path("/proc/locks").read_text().split("\n")
        found = (line.split() for line in locks if " FLOCK " in line and f":{number} " in line)
        process = next(fields[4] for fields in found if fields[1] == "FLOCK")
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (OSError, StopIteration):
        return None
    return f"{process}: {' '.join(words).strip()}"


def make_folder(folder: Path) -> list[Path]:
    """Creates `folder` and returns the folders that were missing, innermost first.

    Raises OSError, after removing what it created.
    """
    made: list[Path] = []
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        for path in reversed(missing):
            if path.is_symlink():
                reason = f"{path} is a link to {os.readlink(path)}, which does not exist"
                raise FileNotFoundError(errno.ENOENT, reason)
            path.mkdir(exist_ok=True)
            made.insert(0, path)
    except OSError:
        remove_empty(made)
        raise
    return made


def remove_empty(folders: list[Path]) -> None:
    """Removes `folders` in order, up to the first that is not empty."""
    for path in folders:
        try:
            path.rmdir()
        except OSError:
            # Another process has put something there in the meantime.
            return


def try_writing(path: Path) -> None:
    """Checks that a file `path` could be written, and leaves no trace; raises OSError."""
    made = make_folder(path.parent)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        process = f".{socket.gethostname()}-{os.getpid()}"
        aside = path.with_name(path.name + process + PARTIAL)
        aside.touch()
        aside.unlink()
    finally:
        remove_empty(made)


@contextmanager
def writing(place: Path | str, *, cure: str) -> Iterator[None]:
    """Turns an OSError or SafetensorError in the block into an OutputError.

    Its message is "cannot write PLACE: REASON; CURE".
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {place}: {_reason_not_written(error)}; {cure}") from error


def _reason_not_written(error: Exception) -> str:
    if isinstance(error, FileExistsError) and error.filename and os.path.islink(error.filename):
        return f"{error.filename} is a link to {os.readlink(error.filename)}, which does not exist"
    return reason_of(error)


@contextmanager
def despite_full_disk(name: str) -> Iterator[None]:
    """Turns an OSError in the block into a warning that names the file.

    A run is worth more than its record, and the next checkpoint reports a full disk more clearly.
    """
    try:
        yield
    except OSError as error:
        log.warning("cannot write %s: %s", name, error.strerror or error)
