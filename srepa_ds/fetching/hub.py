"""Fetches files of a repository on the Hugging Face Hub, by the Hub's own client.

The client reads `HF_ENDPOINT`, `HF_TOKEN` and the login of `hf auth login`, and goes on after a
lost connection.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from srepa_ds.encoders.fetched import Fetched
from srepa_ds.encoders.publications import HubFiles
from srepa_ds.errors import DataError
from srepa_ds.fetching.hub_errors import Action, endpoint, explained
from srepa_ds.fetching.received import received, received_files


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
        return f"{endpoint()}/{self.published.repository}"

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
        with explained(_action(self.published)):
            hf_hub_download(
                self.published.repository,
                file.name,
                revision=self.commit,
                local_dir=folder,
                # Otherwise a damaged file in the client's own cache would be copied from there.
                cache_dir=folder,
                endpoint=endpoint(),
            )


def plan_of(published: HubFiles) -> HubPlan:
    """Returns what there is to fetch of `published`.

    Raises DataError for a Hub that cannot be used, and for a repository without the files.
    """
    from huggingface_hub import HfApi

    with explained(_action(published)):
        info = HfApi(endpoint=endpoint()).model_info(
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


def _action(published: HubFiles) -> Action:
    return Action(published.repository, published.revision)


def _without_files(published: HubFiles, present: Iterable[str]) -> str:
    text = f"{published.name}: the repository has {published.lacking}"
    pickles = [name for name in present if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        text += (
            f", only {pickles[0]}, a pickle, which could run any program when it is read; convert "
            "it to safetensors where you trust it, and give the local path"
        )
    else:
        text += "; choose a repository that has"
    return text
