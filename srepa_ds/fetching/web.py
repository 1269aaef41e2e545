"""Fetches a file at an address; a download that broke off goes on where it ended."""

import http.client
import shutil
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from srepa_ds.encoders.fetched import Fetched
from srepa_ds.encoders.publications import WebFile
from srepa_ds.errors import DataError
from srepa_ds.fetching.received import received, received_files
from srepa_ds.files import PARTIAL, flush_to_disk, reason_of

_TRIES = 3
_SECONDS = 60
_CHUNK = 1 << 20

_LOST = (http.client.HTTPException, TimeoutError, ConnectionError)


@dataclass(frozen=True)
class WebPlan:
    """A file to fetch from an address."""

    published: WebFile

    @property
    def num_bytes(self) -> int:
        """The size of the file."""
        return self.published.num_bytes

    @property
    def source(self) -> str:
        """The address."""
        return self.published.url

    def fetch(self, folder: Path) -> Fetched:
        """Downloads the file into `folder` and returns what it is.

        Raises DataError if the address cannot be read or its contents are others than expected,
        OSError if `folder` cannot be written.
        """
        wanted = self.published
        path = folder / wanted.name
        if not path.exists():
            _complete(wanted, path.with_name(path.name + PARTIAL))
            path.with_name(path.name + PARTIAL).replace(path)
        expected = {wanted.name: wanted.sha256}
        files = received_files(folder, expected, sizes=[wanted.num_bytes])
        return received(wanted.url, files)


def _complete(wanted: WebFile, partial: Path) -> None:
    """Fills `partial` up to the size of the file; raises DataError, and OSError of the disk."""
    for attempt in range(_TRIES):
        try:
            _append(wanted, partial)
        except _LOST as error:
            if attempt == _TRIES - 1:
                raise _failed(wanted, str(error) or type(error).__name__) from error
        if partial.exists() and partial.stat().st_size >= wanted.num_bytes:
            flush_to_disk(partial)
            return
    raise _failed(wanted, "the answer ends too early")


def _append(wanted: WebFile, partial: Path) -> None:
    """Appends to `partial` what it lacks, or as much as arrives."""
    begun = partial.stat().st_size if partial.exists() else 0
    if begun >= wanted.num_bytes:
        return
    request = urllib.request.Request(wanted.url, headers={"Range": f"bytes={begun}-"})
    try:
        answer = urllib.request.urlopen(request, timeout=_SECONDS)
    except urllib.error.HTTPError as error:
        raise _failed(wanted, f"the server answers with {error.code}") from error
    except urllib.error.URLError as error:
        reason = error.reason
        text = reason_of(reason) if isinstance(reason, Exception) else str(reason)
        raise _failed(wanted, text) from error
    # A server that ignores the range sends everything again.
    mode = "ab" if answer.status == http.client.PARTIAL_CONTENT else "wb"
    with answer, partial.open(mode) as file:
        shutil.copyfileobj(answer, file, _CHUNK)


def _failed(wanted: WebFile, reason: str) -> DataError:
    return DataError(
        f"cannot fetch {wanted.url}: {reason}; run this where there is a network, the same command "
        "goes on"
    )
