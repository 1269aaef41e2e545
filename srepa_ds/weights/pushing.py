"""Uploads an exported model to the Hugging Face Hub, over no other run's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srepa_ds.documents.json_reader import read_json
from srepa_ds.errors import ConfigError, Fault, OutputError, listed
from srepa_ds.fetching.upload import Pushed, Repository, check_pushable, open_repository
from srepa_ds.weights.exported import CARD, DOCUMENT, FORMAT, PICTURE

PUSHED_FORMATS = ("srepa_ds", "diffusers")
"""The formats of an export that are uploaded: folders without pickles."""

_OF_DIFFUSERS = "provenance.json"
_FILES = ("*.json", "*.safetensors")
"""What is uploaded of an exported folder, beside its card."""

_REPLACED = (
    *("config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    *("model_index.json", "provenance.json", "transformer/*", "scheduler/*", "vae/*"),
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
    """Whether nobody else may see it."""

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
    own, there = _run_in(_local(folder)), _run_in(repository.document)
    if there is not None and there == own:
        return
    what = f"another run, '{there}'" if there else f"another program ({listed(models, most=3)})"
    raise OutputError(
        f"cannot push {repository.name}: it holds a model of {what}, not of the run '{own}'; push "
        "to another repository, or add --replace"
    )


def _local(folder: Path) -> Callable[[str], Any]:
    return lambda name: read_json(folder / name) if (folder / name).is_file() else None


def _run_in(document: Callable[[str], Any]) -> str | None:
    """Returns the name of the run whose model lies where `document` reads JSON files."""
    own = document(DOCUMENT)
    if isinstance(own, Mapping) and own.get("format") == FORMAT:
        provenance, run = _part(own, "provenance"), _part(_part(own, "config"), "run")
        named = provenance.get("run")
        # Exports of earlier releases name the folder alone.
        return named if isinstance(named, str) else Path(str(run.get("folder"))).name
    named = _part({"": document(_OF_DIFFUSERS)}, "").get("run")
    return named if isinstance(named, str) else None


def _part(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = document.get(name)
    return found if isinstance(found, Mapping) else {}
