"""The parts of a pipeline from a folder: weights and configs, never code.

diffusers would look for a Python file of the name that `model_index.json` gives. Here the names of
classes choose among those below, and nothing else in the file names code.
"""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.utils import is_accelerate_available
from huggingface_hub import snapshot_download
from pydantic import Field

from srepa_ds.codec.config import PerChannel
from srepa_ds.documents.json_reader import read_json
from srepa_ds.errors import CheckpointError, SRepaError, listed
from srepa_ds.files import reason_of
from srepa_ds.pipeline.scheduler import SiTFlowMatchScheduler
from srepa_ds.pipeline.strict import refuse_differences
from srepa_ds.pipeline.transformer import SiTTransformer2DModel
from srepa_ds.schema import Section, validated

log = logging.getLogger("srepa_ds")

INDEX = "model_index.json"
_OWN_PACKAGE = "srepa_ds"
_PARTS = ("transformer", "scheduler", "vae")
# Neither code nor pickles.
_WANTED = ("*.json", "*.safetensors")


def folder_of(
    name: str | os.PathLike[str],
    *,
    subfolder: str = "",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Returns the folder of a pipeline on this machine, or the download of a Hub's repository.

    Only JSON and safetensors files are downloaded. Raises CheckpointError if there is neither.
    """
    folder = Path(name)
    if not folder.is_dir():
        prefix = f"{subfolder}/" if subfolder else ""
        patterns = [f"{prefix}{INDEX}", *(f"{prefix}{p}/{w}" for p in _PARTS for w in _WANTED)]
        try:
            folder = Path(
                snapshot_download(
                    str(name),
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                    allow_patterns=patterns,
                )
            )
        # What the Hub's client raises depends on the fault, and none of it is ours.
        except Exception as error:
            raise CheckpointError(
                f"{name} is not a folder, and was not got from the Hub: "
                f"{reason_of(error).splitlines()[0]}; correct the path or the repository's name"
            ) from error
    return folder / subfolder


def read_pipeline_index(folder: Path) -> dict[str, Any]:
    """Returns the contents of `model_index.json`; raises CheckpointError if it is not one."""
    path = folder / INDEX
    try:
        index = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} holds no pipeline ({INDEX}: {reason_of(error)}); make one with "
            "export.format=diffusers"
        ) from error
    if not isinstance(index, dict):
        raise CheckpointError(f"{path} is no JSON object; export or download it again")
    return index


class IndexFacts(Section):
    """What `model_index.json` says of a pipeline beside its parts."""

    id2label: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], str] | None = None
    """The names of classes by number, synonyms with commas between."""

    latent_scale: PerChannel | None = None
    """The transformer's latents are (z - shift) x scale; without it the VAE's own."""

    latent_shift: PerChannel | None = None
    """Without it the VAE's own."""


def facts_of(folder: Path, index: Mapping[str, Any]) -> IndexFacts:
    """Returns what an index says beside the parts; raises ConfigError with all faults."""
    tree = {name: index[name] for name in IndexFacts.model_fields if name in index}
    return validated(IndexFacts, tree, source=str(folder / INDEX))


def load_transformer(folder: Path, index: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Returns the transformer of a pipeline's folder; raises CheckpointError."""
    _class_of(folder, index, "transformer", ("SiTTransformer2DModel",))
    return _loaded(SiTTransformer2DModel.from_pretrained, folder / "transformer", options)


def load_scheduler(folder: Path, index: Mapping[str, Any]) -> Any:
    """Returns the scheduler of a pipeline's folder; raises CheckpointError.

    The community's `SiTFlowMatchScheduler` becomes Euler's steps at equal times: what its config
    means is only in its code.
    """
    kinds = {
        "SiTFlowMatchScheduler": SiTFlowMatchScheduler,
        "FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler,
    }
    library, name = _class_of(folder, index, "scheduler", tuple(kinds))
    kind = kinds[name]
    if kind is SiTFlowMatchScheduler and library.split(".")[0] != _OWN_PACKAGE:
        log.info("%s: Euler's steps take the place of its own scheduler", folder)
        return SiTFlowMatchScheduler()
    scheduler = _loaded(kind.from_pretrained, folder / "scheduler", {})
    check_scheduler(scheduler)
    return scheduler


def check_scheduler(scheduler: Any) -> None:
    """Raises CheckpointError for a scheduler that a SiT cannot be drawn with.

    Others of diffusers round their times, or expect a model of another kind.
    """
    kinds: tuple[type, ...] = (SiTFlowMatchScheduler, FlowMatchEulerDiscreteScheduler)
    if not isinstance(scheduler, kinds):
        raise CheckpointError(
            f"the scheduler {type(scheduler).__name__} is not supported; give "
            f"{listed((kind.__name__ for kind in kinds), ' or ')}"
        )
    if scheduler.config.get("stochastic_sampling"):
        raise CheckpointError(
            "the scheduler's stochastic_sampling adds noise in a way that SiT does not; give "
            "scheduler=SiTFlowMatchScheduler(solver='euler_maruyama') for its SDE"
        )
    for name in ("invert_sigmas", "use_dynamic_shifting"):
        if scheduler.config.get(name):
            raise CheckpointError(
                f"the scheduler's {name} is of other models; give one without it, such as "
                "scheduler=SiTFlowMatchScheduler()"
            )


def load_vae(folder: Path, index: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Returns the VAE of a pipeline's folder, or None without one; raises CheckpointError."""
    if index.get("vae") in (None, [None, None]) or not (folder / "vae").is_dir():
        return None
    _class_of(folder, index, "vae", ("AutoencoderKL",))
    # As diffusers decides, which otherwise warns that accelerate is not there.
    settings = {"low_cpu_mem_usage": is_accelerate_available(), **options, "use_safetensors": True}
    return _loaded(_strict_vae, folder / "vae", settings)


def _strict_vae(folder: Path, **settings: Any) -> Any:
    # Its annotation does not know of the second value.
    load: Callable[..., Any] = AutoencoderKL.from_pretrained
    vae, info = load(folder, output_loading_info=True, **settings)
    refuse_differences(info, "it")
    return vae


def _class_of(
    folder: Path, index: Mapping[str, Any], part: str, known: tuple[str, ...]
) -> tuple[str, str]:
    """Returns library and class that the index names for a part; raises CheckpointError."""
    match index.get(part):
        case [str(library), str(name)] if name in known:
            return library, name
        case found:
            raise CheckpointError(
                f"{folder / INDEX}: '{part}' is {found!r}, which is not supported; it may be of "
                f"class {listed(known, ' or ')}"
            )


def _loaded(load: Callable[..., Any], folder: Path, options: Mapping[str, Any]) -> Any:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; export or download the pipeline again")
    try:
        return load(folder, local_files_only=True, **options)
    except SRepaError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    # What diffusers raises depends on the fault, and none of it is ours.
    except Exception as error:
        reason = " ".join(reason_of(error).split())
        raise CheckpointError(
            f"{folder} cannot be read: {reason}; export or download the pipeline again"
        ) from error
