"""The index of a store of teacher tokens, and the exact layout of its files."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from pydantic import Field

from srepa_ds.data.headers import Form, preamble
from srepa_ds.data.index_document import (
    INDEX_NAME,
    FileName,
    check_different,
    read_index_document,
)
from srepa_ds.data.stored_tokens import Storage
from srepa_ds.schema import Section

TOKEN_FORMAT = "srepa-ds teacher tokens"
TOKEN_VERSION = 2
PREPARE_TEACHER = "`srepa-ds prepare CONFIG --teacher`"

_NUM_BYTES = {"BF16": 2, "F32": 4, "I8": 1}


class TokenDescription(Section):
    """Everything that decides the files of a store: equal descriptions, equal files."""

    dataset_id: str
    """Of the data set whose images the teacher saw."""

    teacher: dict[str, Any]
    """Everything that decides the tokens, as plain JSON values."""

    storage: Storage
    """`bf16`, or `int8` with a scale per token."""

    grid: tuple[int, int]
    """Rows and columns of patch tokens."""

    width: int = Field(ge=1)
    """Channels of a token."""

    has_cls: bool
    """Whether the class token is stored as well."""

    @property
    def num_tokens(self) -> int:
        """Patch tokens of an image."""
        return math.prod(self.grid)

    def facts(self, num_samples: int, *, shard_sha256: str) -> dict[str, Any]:
        """Returns the facts in the header of a file of `num_samples` images.

        The shard's hash distinguishes images that were prepared with the same settings.
        """
        return {
            "format": TOKEN_FORMAT,
            "version": TOKEN_VERSION,
            "num_samples": num_samples,
            "dataset_id": self.dataset_id,
            "shard_sha256": shard_sha256,
            "teacher": teacher_hash(self.teacher),
        }

    def tensors(self, num_samples: int) -> dict[str, Form]:
        """Returns the tensors of a file of `num_samples` images, in the order of the file.

        The widest numbers come first, so that each tensor starts at a multiple of its item size.
        """
        forms: dict[str, Form] = {}
        if self.storage == "int8":
            forms["patches_scale"] = ("F32", (num_samples, self.num_tokens))
        if self.has_cls:
            forms["cls"] = ("F32", (num_samples, self.width))
        dtype = "BF16" if self.storage == "bf16" else "I8"
        forms["patches"] = (dtype, (num_samples, self.num_tokens, self.width))
        return forms

    def preamble(self, num_samples: int, *, shard_sha256: str) -> bytes:
        """Returns the bytes before the first tensor: the safetensors header with its length."""
        facts = self.facts(num_samples, shard_sha256=shard_sha256)
        return preamble(facts, self.tensors(num_samples))

    def file_bytes(self, num_samples: int, *, shard_sha256: str) -> int:
        """Returns the size of the file with the tokens of a shard."""
        forms = self.tensors(num_samples).values()
        start = len(self.preamble(num_samples, shard_sha256=shard_sha256))
        return start + sum(map(form_bytes, forms))


class TokenFileEntry(Section):
    """The index's entry for one file of tokens."""

    file: FileName
    """Name inside the folder."""

    num_samples: int = Field(ge=1)
    """Images whose tokens it holds."""

    shard_sha256: str
    """Hash of the shard that holds these images."""

    bytes: int = Field(ge=0)
    """Size of the file."""

    sha256: str
    """Hash of the file, in hexadecimal."""


class TokenIndex(TokenDescription):
    """The contents of a store's `index.json`."""

    format: str
    """Always `srepa-ds teacher tokens`."""

    version: int
    """Version of the format."""

    files: tuple[TokenFileEntry, ...] = Field(min_length=1)
    """In the order of the shards."""


def form_bytes(form: Form) -> int:
    """Returns the size of a tensor."""
    dtype, shape = form
    return _NUM_BYTES[dtype] * math.prod(shape)


def teacher_hash(teacher: dict[str, Any]) -> str:
    """Returns 8 hexadecimal digits that identify a teacher."""
    text = json.dumps([TOKEN_FORMAT, TOKEN_VERSION, teacher], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def token_file_name(number: int) -> str:
    """Returns the name of the file that goes with shard `number`."""
    return f"tokens-{number:05d}.safetensors"


def is_finished(folder: Path) -> bool:
    """Returns whether `folder` has an index, which is written last."""
    return (folder / INDEX_NAME).is_file()


def read_token_index(folder: Path) -> TokenIndex:
    """Returns the index of the store in `folder`.

    Raises DataError if it is missing, unreadable, not of this format and version, or names a file
    twice.
    """
    index = read_index_document(
        folder,
        TokenIndex,
        format_name=TOKEN_FORMAT,
        versions=(TOKEN_VERSION,),
        missing=f"these tokens are not finished; complete them with {PREPARE_TEACHER}",
        again=again(folder),
    )
    check_different(folder / INDEX_NAME, [e.file for e in index.files], again=again(folder))
    return index


def again(folder: Path) -> str:
    """Returns the cure for a damaged store, for an error message."""
    return f"delete {folder} and run {PREPARE_TEACHER} again"
