"""Uploads files to a repository on the Hugging Face Hub, by the Hub's own client.

The token is that of `HF_TOKEN` or of `hf auth login`, and is named nowhere else.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from srepa_ds.documents.json_reader import read_json
from srepa_ds.encoders.publications import repository_of
from srepa_ds.errors import OutputError
from srepa_ds.fetching.hub_errors import Action, explained

_LARGEST_DOCUMENT = 64 << 20


@dataclass(frozen=True)
class Pushed:
    """What an upload has made."""

    address: str
    """The address of the repository."""

    commit: str
    """The commit that holds the files."""


@dataclass(frozen=True)
class Repository:
    """A repository that may be written to, as it is at one commit."""

    name: str
    """Such as `owner/name`."""

    commit: str
    files: dict[str, int]
    """The bytes of its files."""

    def document(self, name: str) -> Any:
        """Returns what a JSON file of the repository holds, None if there is no such document.

        Raises OutputError for a Hub that cannot be used.
        """
        from huggingface_hub import hf_hub_download

        if not 0 < self.files.get(name, 0) <= _LARGEST_DOCUMENT:
            return None
        action = _action(self.name)
        with TemporaryDirectory() as folder:
            with explained(action):
                path = hf_hub_download(
                    self.name,
                    name,
                    revision=self.commit,
                    local_dir=folder,
                    cache_dir=folder,
                    endpoint=action.endpoint,
                    token=_token(self.name),
                )
            try:
                return read_json(Path(path))
            except ValueError:
                return None

    def upload(
        self, folder: Path, *, message: str, files: Sequence[str], replaced: Sequence[str]
    ) -> Pushed:
        """Makes one commit of the `files` of `folder`, and returns what it made.

        Other files of the repository that match `replaced` are deleted by it. Both are patterns as
        of a shell. After an upload that broke off, another one sends what has not arrived. Raises
        OutputError for a Hub that cannot be used, or has changed meanwhile.
        """
        from huggingface_hub.utils import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        action = _action(self.name)
        with explained(action):
            made = _api(self.name).upload_folder(
                repo_id=self.name,
                folder_path=folder,
                commit_message=message,
                allow_patterns=list(files),
                delete_patterns=list(replaced),
                parent_commit=self.commit,
            )
        return Pushed(action.address, made.oid)


def check_pushable(name: str) -> None:
    """Raises OutputError unless `name` is that of a repository, and there is a token.

    It asks nothing of the Hub, so that a long export begins only where an upload may follow.
    """
    parts = repository_of(name)
    if parts is None or parts[1] is not None:
        raise OutputError(f"cannot push to '{name}': not the name of a repository: give OWNER/NAME")
    _token(name)


def open_repository(name: str, *, is_private: bool) -> Repository:
    """Returns the repository, which is made if it is missing.

    Raises OutputError for a Hub that cannot be used, a token that may not write, and for an
    existing public repository if it is to be private.
    """
    check_pushable(name)
    action, api = _action(name), _api(name)
    with explained(action):
        api.create_repo(name, private=True if is_private else None, exist_ok=True)
        info = api.model_info(name, files_metadata=True)
    if is_private and not info.private:
        raise OutputError(
            f"cannot push {name}: the repository exists and is public; leave out --private, push "
            f"to another one, or make it private at {action.address}/settings"
        )
    files = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    assert info.sha is not None, "the Hub states the commit"
    return Repository(name, info.sha, files)


def _action(name: str) -> Action:
    return Action(name, verb="push", fault=OutputError)


def _api(name: str) -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=_action(name).endpoint, token=_token(name))


def _token(name: str) -> str:
    from huggingface_hub import get_token

    token = get_token()
    if token is None:
        raise OutputError(
            f"cannot push {name}: there is no token of the Hub; log in with `hf auth login`, or "
            "set HF_TOKEN to one with write access"
        )
    return token
