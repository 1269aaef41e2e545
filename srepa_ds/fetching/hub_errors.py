"""What the Hub's client raises, as errors that the user can mend."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from srepa_ds.errors import DataError, OutputError, SRepaError

_PUBLIC_HUB = "https://huggingface.co"

_OF_DISK = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}
)


def endpoint() -> str:
    """Returns the address of the Hub, of `HF_ENDPOINT` or the public one."""
    # Read now: the client reads it once, when it is imported.
    return os.environ.get("HF_ENDPOINT", _PUBLIC_HUB).rstrip("/") or _PUBLIC_HUB


@dataclass(frozen=True)
class Action:
    """What is done with a repository, as messages call it."""

    repository: str
    """Its name, without a revision."""

    revision: str | None = None
    """The revision that was named."""

    verb: str = "fetch"
    """`fetch` or `push`."""

    fault: type[SRepaError] = DataError
    """The error for what the Hub refuses."""

    disk_advice: str = "free some space, or set SREPA_FETCHED to another folder"
    """What to do about a disk that cannot be written."""

    @property
    def name(self) -> str:
        """The repository, with its revision if one is named."""
        return f"{self.repository}@{self.revision}" if self.revision else self.repository

    @property
    def endpoint(self) -> str:
        """The address of the Hub."""
        return endpoint()

    @property
    def address(self) -> str:
        """The address of the repository."""
        return f"{self.endpoint}/{self.repository}"


@contextmanager
def explained(action: Action) -> Iterator[None]:
    """Turns what the Hub's client raises in the block into `action.fault` or OutputError.

    Messages hold no addresses that the Hub answers with: they may hold secrets.
    """
    try:
        yield
    except SRepaError:
        raise
    # Without a network the error is one of the client's transport, which it changes.
    except Exception as error:
        # Some of the client's errors are of its own, with that of the Hub as their cause.
        found = (_of_hub(cause, action) for cause in _causes(error))
        raise next(filter(None, found), _of_disk_or_network(error, action)) from error


def _of_hub(error: BaseException, action: Action) -> SRepaError | None:
    """Returns the error for an answer of the Hub, None for anything else."""
    from huggingface_hub import errors

    name, verb = action.name, action.verb
    if isinstance(error, errors.GatedRepoError):
        text = (
            f"{name}: its owner grants access on request; accept the conditions at "
            f"{action.address}, then log in with `hf auth login` or set HF_TOKEN"
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = (
            f"{name}: there is no such repository at {endpoint()}, or it is private; correct the "
            "name, or log in with `hf auth login` or HF_TOKEN"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        text = (
            f"{name}: the repository has no revision '{action.revision}'; correct it, or leave "
            "out the part from @ on"
        )
    elif isinstance(error, errors.HFValidationError):
        text = f"{name}: not the name of a repository; correct it"
    elif isinstance(error, errors.OfflineModeIsEnabled):
        text = f"cannot {verb} {name}: HF_HUB_OFFLINE is set; unset it"
    elif isinstance(error, errors.HfHubHTTPError):
        text = _of_status(error, action)
    else:
        return None
    return action.fault(text)


def _of_status(error: BaseException, action: Action) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = f"cannot {action.verb} {action.name}: {endpoint()} answers with {status or 'no status'}"
    if status == 401:
        return f"{text}: the token is not valid; log in with `hf auth login`, or correct HF_TOKEN"
    if status == 403 and action.verb == "push":
        return f"{text}: the token may not write there; use one with write access to {action.name}"
    if status == 412:
        return f"{text}: somebody else has changed the repository meanwhile; run it again"
    return f"{text}; try again later"


def _of_disk_or_network(error: BaseException, action: Action) -> SRepaError:
    reasons = list(_causes(error))
    disk = next((one for one in reasons if getattr(one, "errno", None) in _OF_DISK), None)
    if isinstance(disk, OSError) and action.verb == "fetch":
        return OutputError(f"cannot write {action.name}: {disk.strerror}; {action.disk_advice}")
    kind = type(reasons[-1]).__name__
    if action.verb == "push":
        text = (
            "cannot be reached, or the upload broke off ({kind}); run the same command again where "
            "there is a network: what has arrived is not sent again"
        )
    else:
        text = (
            "cannot be reached ({kind}); run this where there is a network, or set HF_ENDPOINT to "
            "a mirror"
        )
    where = f"cannot {action.verb} {action.name}: {endpoint()}"
    return action.fault(f"{where} {text.format(kind=kind)}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__
