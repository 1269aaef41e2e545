"""Uploads an exported model to the Hugging Face Hub, over no other run's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srepa_ds.documents.json_reader import read_json
from srepa_ds.errors import ConfigError, Fault, OutputError, listed
from srepa_ds.fetching.upload import Pushed, Repository, check_pushable, open_repository
from srepa_ds.weights.ownership import (
    CARD,
    DOCUMENT,
    FORMAT,
    PICTURE,
    PIPELINE_FORMAT,
    run_of,
)

PUSHED_FORMATS = ("srepa_ds", "diffusers")
"""The formats of an export that are uploaded: folders without pickles."""

_OF_DIFFUSERS = "provenance.json"
_FILES = ("*.json", "*.safetensors")
"""What is uploaded of an exported folder, beside its card."""

_PART = "diffusion_pytorch_model*.safetensors*"
_REPLACED = (
    *("config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    *("model_index.json", "provenance.json", "scheduler/scheduler_config.json"),
    *("transformer/config.json", f"transformer/{_PART}", "vae/config.json", f"vae/{_PART}"),
)
"""What earlier pushes may have left there, of this or the other format, in other shards."""

_OF_MODELS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".gguf", ".h5", ".msgpack"),
    *("config.json", "model_index.json"),
)


@dataclass(frozen=True)
class Push:
    """Where an exported model is uploaded to."""

    name: str
    """The repository, `owner/name`."""

    is_private: bool = False
    """Whether a new repository is private."""

    def check(self, format: str) -> None:
        """Raises an error for what makes the upload impossible, before the work of an export.

        ConfigError for a format without a folder of its own, OutputError for a name that is none,
        and without a token. It asks nothing of the Hub.
        """
        if format not in PUSHED_FORMATS:
            reason = f"'{format}' is not pushed; choose {' or '.join(PUSHED_FORMATS)}"
            raise ConfigError("export --push", [Fault("export.format", reason)])
        check_pushable(self.name)


def push_model(
    folder: Path, push: Push, *, message: str, replace: bool = False, keeps_card: bool = False
) -> Pushed:
    """Uploads the exported model in `folder` in one commit.

    A missing repository is made. With `keeps_card`, the card that is there stays. Raises
    OutputError for a Hub that cannot be used, and, without `replace`, for a repository that holds a
    model of anything but this run.
    """
    repository = open_repository(push.name, is_private=push.is_private)
    if not replace:
        _refuse_another_model(repository, folder)
    card = () if keeps_card and CARD in repository.files else (CARD, PICTURE)
    return repository.upload(
        folder, message=message, files=(*_FILES, *card), replaced=(*_REPLACED, *card)
    )


def _refuse_another_model(repository: Repository, folder: Path) -> None:
    models = sorted(name for name in repository.files if name.endswith(_OF_MODELS))
    if not models:
        return
    own, there = _held(_local(folder)), _held(repository.document)
    if there is not None and there == own:
        return
    if there is None:
        what = f"another program ({listed(models, most=3)})"
    else:
        what = f"the run {there[1] or 'unknown'} in the format {there[0]}"
    assert own is not None
    raise OutputError(
        f"cannot push {repository.name}: it holds a model of {what}, and this is one of the run "
        f"{own[1] or 'unknown'} in the format {own[0]}; push to another repository, or add "
        "--replace"
    )


def _local(folder: Path) -> Callable[[str], Any]:
    return lambda name: read_json(folder / name) if (folder / name).is_file() else None


def _held(document: Callable[[str], Any]) -> tuple[str, str | None] | None:
    """Returns the format and the run of the exported model where `document` reads JSON files."""
    own = document(DOCUMENT)
    if isinstance(own, Mapping) and own.get("format") == FORMAT:
        return "srepa_ds", run_of(_part(own, "config"))
    mark = document(_OF_DIFFUSERS)
    if isinstance(mark, Mapping) and mark.get("format") == PIPELINE_FORMAT:
        run = mark.get("run_id")
        return "diffusers", run if isinstance(run, str) else None
    return None


def _part(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = document.get(name)
    return found if isinstance(found, Mapping) else {}
