"""Fetches a file at an address; a download that broke off goes on where it ended."""

import http.client
import shutil
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srepa_ds.encoders.fetched import (
    DOCUMENT_NAME,
    Fetched,
    FetchedFile,
    fetched_folder,
    read_fetched,
)
from srepa_ds.encoders.publications import WebFile
from srepa_ds.errors import DataError
from srepa_ds.fetching.received import received, received_files
from srepa_ds.files import PARTIAL, flush_to_disk, reason_of

_TRIES = 3
_SECONDS = 60
_CHUNK = 1 << 20

_LOST = (http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError)


@dataclass(frozen=True)
class WebPlan:
    """A file to fetch from an address, with its size, and its hash if that is known."""

    published: WebFile
    num_bytes: int
    sha256: str | None
    """That which is published, or that of the first download; None before the first."""

    @property
    def source(self) -> str:
        """The address."""
        return self.published.url

    def fetch(self, folder: Path) -> Fetched:
        """Downloads the file into `folder` and returns what it is.

        Raises DataError if the address cannot be read or its contents are others than expected,
        OSError if `folder` cannot be written.
        """
        path = folder / self.published.name
        if not path.exists():
            partial = path.with_name(path.name + PARTIAL)
            self._complete(partial)
            partial.replace(path)
            path.with_name(f"{path.name}.version").unlink(missing_ok=True)
        expected = {path.name: self.sha256}
        files = received_files(folder, expected, sizes=[self.num_bytes], advice=self._advice)
        return received(self.source, files)

    @property
    def _advice(self) -> str:
        again = "run the same command again"
        if self.published.sha256 is not None or self.sha256 is None:
            return again
        document = fetched_folder() / DOCUMENT_NAME
        return (
            f"{again}, or, if its publisher has replaced the file since it was first fetched, "
            f"remove '{self.published.folder_name}' from {document}"
        )

    def _complete(self, partial: Path) -> None:
        """Fills `partial` up to the size of the file; raises DataError, and OSError of the disk."""
        for attempt in range(_TRIES):
            try:
                self._append(partial)
            except _LOST as error:
                if attempt == _TRIES - 1:
                    raise _failed(self.published, str(error) or type(error).__name__) from error
            if partial.exists() and partial.stat().st_size >= self.num_bytes:
                flush_to_disk(partial)
                return
        raise _failed(self.published, "the answer ends too early")

    def _append(self, partial: Path) -> None:
        """Appends to `partial` what it lacks, or as much as arrives."""
        begun = partial.stat().st_size if partial.exists() else 0
        if begun >= self.num_bytes:
            return
        version = partial.with_name(f"{self.published.name}.version")
        # The server then sends the whole file if it is not the one that was begun.
        same = version.read_text() if begun and version.exists() else None
        if begun and same is None and self.sha256 is None:
            partial.unlink()
            begun = 0
        with _answer(self.published, f"bytes={begun}-", same_as=same) as answer:
            # Known before anything is written: parts of two files would make neither.
            if _size_of(answer) not in (None, self.num_bytes):
                raise DataError(
                    f"{self.source}: the file there has {_size_of(answer):,} bytes, and "
                    f"{self.num_bytes:,} are expected; {self._advice}"
                )
            # A server that ignores the range sends everything again.
            mode = "ab" if answer.status == http.client.PARTIAL_CONTENT else "wb"
            if mark := answer.headers.get("ETag") or answer.headers.get("Last-Modified"):
                version.write_text(mark)
            with partial.open(mode) as file:
                shutil.copyfileobj(answer, file, _CHUNK)


def web_plan_of(published: WebFile) -> WebPlan:
    """Returns the plan of a file, whose size the server is asked for if it is not known.

    Raises DataError if the server cannot be reached or does not state the size.
    """
    noted = _noted(published)
    sha256 = published.sha256 or (noted.sha256 if noted else None)
    num_bytes = published.num_bytes or (noted.num_bytes if noted else None)
    if num_bytes is None:
        try:
            with _answer(published, "bytes=0-0") as answer:
                num_bytes = _size_of(answer)
        except _LOST as error:
            raise _failed(published, str(error) or type(error).__name__) from error
    if num_bytes is None:
        raise DataError(
            f"cannot fetch {published.url}: the server does not state the size, without which an "
            "answer that breaks off would be taken for the file; download it yourself, and give "
            "its path"
        )
    return WebPlan(published, num_bytes, sha256)


def _noted(published: WebFile) -> FetchedFile | None:
    """Returns what `fetched.json` says of an earlier download; raises DataError."""
    entry = read_fetched(fetched_folder()).fetched.get(published.folder_name)
    return entry.files.get(published.name) if entry else None


def _answer(wanted: WebFile, span: str, *, same_as: str | None = None) -> Any:
    """Returns the server's answer for a range of the file; raises DataError and `_LOST`.

    With `same_as`, the answer is the whole file if its version is another.
    """
    headers = {"Range": span, **({"If-Range": same_as} if same_as else {})}
    request = urllib.request.Request(wanted.url, headers=headers)
    try:
        return urllib.request.urlopen(request, timeout=_SECONDS)
    except urllib.error.HTTPError as error:
        raise _failed(wanted, f"the server answers with {error.code}") from error
    except urllib.error.URLError as error:
        reason = error.reason
        if isinstance(reason, _LOST):
            raise reason from error
        text = reason_of(reason) if isinstance(reason, Exception) else str(reason)
        raise _failed(wanted, text) from error


def _size_of(answer: Any) -> int | None:
    """Returns the size of the whole file, None if the answer does not state it."""
    if answer.status == http.client.PARTIAL_CONTENT:
        stated = answer.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        stated = answer.headers.get("Content-Length", "")
    return int(stated) if stated.isascii() and stated.isdecimal() else None


def _failed(wanted: WebFile, reason: str) -> DataError:
    return DataError(
        f"cannot fetch {wanted.url}: {reason}; run this where there is a network, the same command "
        "goes on"
    )
