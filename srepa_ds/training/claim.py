"""Claims the folder of a run: one training at a time, in a folder that all ranks see."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from srepa_ds import files
from srepa_ds.distributed import ranks
from srepa_ds.errors import OutputError, raised_on_all_ranks
from srepa_ds.run_folder import RunFolder

# NFS caches negative lookups for up to this long.
_NEWS_SECONDS = 90.0
_POLL_SECONDS = 0.1


class Claim:
    """The folder of a run while it is trained in; on the main rank, the folder itself is open."""

    def __init__(self, run: RunFolder, descriptor: int | None):
        self._run = run
        self._descriptor = descriptor

    def check(self) -> None:
        """Checks that the run's folder is still the one that was claimed. Collective.

        Raises OutputError on all ranks if it was removed, or another is in its place: what is
        written from now on would be lost, or lie in a folder that lacks the rest.
        """
        if ranks.any_rank(self._descriptor is not None and self._is_gone(self._descriptor)):
            raise raised_on_all_ranks(
                OutputError(
                    f"the run's folder {self._run.path.absolute()} was removed, moved or replaced "
                    "during training; move it back, if you can, and run the command again"
                )
            )

    def _is_gone(self, descriptor: int) -> bool:
        try:
            return not os.path.samestat(os.stat(self._run.path), os.fstat(descriptor))
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            # A network file system out of reach for a while is no reason to give up.
            return False


@contextmanager
def claimed(run: RunFolder, *, is_main: bool) -> Iterator[Claim]:
    """Keeps other trainings out of the run's folder while the block runs, on the main rank.

    Makes the folder, and removes it if the block leaves it empty. Raises OutputError if another
    process is training there, or the folder cannot be written to.
    """
    if not is_main:
        yield Claim(run, None)
        return
    with files.claimed(
        run.path,
        doing="training in",
        cure="choose another run.folder or fix its permissions",
        otherwise=", or choose another run.folder",
    ):
        with run.writing():
            descriptor = os.open(run.path, os.O_RDONLY)
        try:
            yield Claim(run, descriptor)
        finally:
            os.close(descriptor)


def check_shared(run: RunFolder) -> None:
    """Checks that every rank sees the files that the main rank writes to the folder. Collective.

    Raises OutputError on all ranks, naming the first rank that does not.
    """
    token = run.path / ranks.broadcast(f".seen-by-all-{uuid.uuid4().hex}")
    try:
        ranks.on_main(_touch, run, token)
        ranks.together(_find, token)
    finally:
        if ranks.rank() == 0:
            with suppress(OSError):
                token.unlink(missing_ok=True)


def _touch(run: RunFolder, token: Path) -> None:
    with run.writing():
        token.touch()


def _find(token: Path) -> None:
    deadline = time.monotonic() + _NEWS_SECONDS
    while not token.exists():
        if time.monotonic() > deadline:
            raise OutputError(
                f"this rank does not see the run's folder {token.parent.absolute()} that the main "
                "rank writes to; choose a run.folder that all nodes share"
            )
        time.sleep(_POLL_SECONDS)
