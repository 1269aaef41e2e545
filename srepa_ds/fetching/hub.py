"""Fetches files of a repository on the Hugging Face Hub, by the Hub's own client.

The client reads `HF_ENDPOINT`, `HF_TOKEN` and the login of `hf auth login`, and goes on after a
lost connection.
"""

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from srepa_ds.encoders.fetched import Fetched
from srepa_ds.encoders.publications import HubFiles
from srepa_ds.errors import DataError, OutputError
from srepa_ds.fetching.received import received, received_files

_PUBLIC_HUB = "https://huggingface.co"


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub describes it."""

    name: str
    num_bytes: int
    sha256: str | None
    """None for small files, which the Hub keeps in git."""


@dataclass(frozen=True)
class HubPlan:
    """The files to fetch of a repository, at one commit."""

    published: HubFiles
    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.num_bytes for file in self.files)

    @property
    def source(self) -> str:
        """The address of the repository."""
        return f"{_endpoint()}/{self.published.repository}"

    def fetch(self, folder: Path) -> Fetched:
        """Downloads the files into `folder` and returns what they are.

        Files that a broken off fetch has completed are kept. Raises DataError for a Hub that
        cannot be used or contents that differ from its own statement.
        """
        for file in self.files:
            self._download(file, folder)
        expected = {file.name: file.sha256 for file in self.files}
        files = received_files(folder, expected, sizes=[file.num_bytes for file in self.files])
        return received(self.source, files, revision=self.commit)

    def _download(self, file: RemoteFile, folder: Path) -> None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        with _explained(self.published):
            hf_hub_download(
                self.published.repository,
                file.name,
                revision=self.commit,
                local_dir=folder,
                # Otherwise a damaged file in the client's own cache would be copied from there.
                cache_dir=folder,
                endpoint=_endpoint(),
            )


def plan_of(published: HubFiles) -> HubPlan:
    """Returns what there is to fetch of `published`.

    Raises DataError for a Hub that cannot be used, and for a repository without the files.
    """
    from huggingface_hub import HfApi

    with _explained(published):
        info = HfApi(endpoint=_endpoint()).model_info(
            published.repository, revision=published.revision, files_metadata=True
        )
    present = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    chosen = published.chosen(present)
    if chosen is None or info.sha is None:
        raise DataError(_without_files(published, present))
    files = tuple(
        RemoteFile(name, size, lfs.sha256 if (lfs := present[name].lfs) else None)
        for name in chosen
        if (size := present[name].size) is not None
    )
    assert len(files) == len(chosen), "the Hub states the size of every file"
    return HubPlan(published, info.sha, files)


def _endpoint() -> str:
    # Read now: the client reads it once, when it is imported.
    return os.environ.get("HF_ENDPOINT", _PUBLIC_HUB).rstrip("/") or _PUBLIC_HUB


def _without_files(published: HubFiles, present: Iterable[str]) -> str:
    wanted = ", ".join(" or ".join(group) for group in published.wanted)
    text = f"{published.name}: the repository has no {wanted}"
    pickles = [name for name in present if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        text += (
            f", only {pickles[0]}, a pickle, which could run any program when it is read; convert "
            "it to safetensors where you trust it, and give the local path"
        )
    else:
        text += "; choose a repository that has"
    return text


@contextmanager
def _explained(published: HubFiles) -> Iterator[None]:
    """Turns what the Hub's client raises in the block into DataError or OutputError."""
    from huggingface_hub import errors

    name, address = published.name, f"{_endpoint()}/{published.repository}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise DataError(
            f"{name}: its owner grants access on request; accept the conditions at {address}, then "
            "log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"{name}: there is no such repository at {_endpoint()}, or it is private; correct the "
            "name, or log in with `hf auth login` or HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DataError(
            f"{name}: the repository has no revision '{published.revision}'; correct it, or leave "
            "out the part from @ on"
        ) from error
    except errors.HFValidationError as error:
        raise DataError(f"{name}: not the name of a repository; correct it") from error
    except errors.OfflineModeIsEnabled as error:
        raise DataError(f"cannot fetch {name}: HF_HUB_OFFLINE is set; unset it") from error
    except errors.HfHubHTTPError as error:
        raise DataError(f"cannot fetch {name}: {_answer(error)}; try again later") from error
    # Without a network the error is one of the client's transport, which it changes.
    except Exception as error:
        raise _of_disk_or_network(error, name) from error


def _answer(error: Exception) -> str:
    """Returns the status of the Hub's answer, without addresses: they may hold secrets."""
    status = getattr(getattr(error, "response", None), "status_code", "no status")
    return f"{_endpoint()} answers with {status}"


def _of_disk_or_network(error: BaseException, name: str) -> DataError | OutputError:
    reasons = list(_causes(error))
    disk = next((one for one in reasons if getattr(one, "errno", None) in _OF_DISK), None)
    if isinstance(disk, OSError):
        return OutputError(
            f"cannot write {name}: {disk.strerror}; free some space, or set SREPA_FETCHED to "
            "another folder"
        )
    kind = type(reasons[-1]).__name__
    return DataError(
        f"cannot fetch {name}: {_endpoint()} cannot be reached ({kind}); run this where there is a "
        "network, or set HF_ENDPOINT to a mirror"
    )


_OF_DISK = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}
)


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__
