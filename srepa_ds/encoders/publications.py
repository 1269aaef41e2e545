"""The table of published things that `srepa-ds fetch` brings: `PUBLISHED`, a row for each kind."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from srepa_ds.errors import DataError

_REPOSITORY = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w][\w./-]*))?")

_VAE_FILES = (("config.json",), ("diffusion_pytorch_model.safetensors",))

_INDEX = ".safetensors.index.json"
_OWN_MODEL = (("config.json",), ("model.safetensors",))
_PARTS = r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
_MODEL_LAYOUTS = (
    (
        (("config.json",), ("model.safetensors", f"model{_INDEX}")),
        re.compile(rf"config\.json|model{_PARTS}"),
    ),
    (
        (
            ("transformer/config.json",),
            tuple(f"transformer/diffusion_pytorch_model{e}" for e in (".safetensors", _INDEX)),
        ),
        re.compile(
            rf"(transformer|vae)/(config\.json|diffusion_pytorch_model{_PARTS})"
            r"|scheduler/scheduler_config\.json|model_index\.json|provenance\.json"
        ),
    ),
)
"""Layouts of a model: the files that each needs, and all that are fetched of it."""

_OF_WEIGHTS = re.compile(r".*\.(safetensors|pt|pth|bin|ckpt|tar)")


@dataclass(frozen=True)
class HubFiles:
    """Some files of a model's repository on the Hugging Face Hub."""

    repository: str
    """Such as `stabilityai/sd-vae-ft-mse`."""
    wanted: tuple[tuple[str, ...], ...]
    """Of each group, the first file that the repository has; files of other names stay there."""
    revision: str | None = None
    """A commit, tag or branch; without it the one that is current when the files are fetched."""

    @property
    def name(self) -> str:
        """The repository, with its revision if one is named."""
        return f"{self.repository}@{self.revision}" if self.revision else self.repository

    @property
    def folder_name(self) -> str:
        """The name of the folder that receives the files."""
        return self.name.replace("/", "--")

    def chosen(self, present: Collection[str]) -> tuple[str, ...] | None:
        """Returns the wanted files among those `present`; None if a group has none."""
        groups = [[name for name in group if name in present] for group in self.wanted]
        return tuple(group[0] for group in groups) if all(groups) else None

    @property
    def lacking(self) -> str:
        """The message about a repository that lacks the files."""
        return f"no {', '.join(' or '.join(group) for group in self.wanted)}"


@dataclass(frozen=True)
class HubModel(HubFiles):
    """A diffusion model's repository: an export of this program, diffusers' layout, or one file.

    Only files of these names are fetched, whatever else there is: never programs, never pickles.
    """

    wanted: tuple[tuple[str, ...], ...] = _OWN_MODEL
    """Files that a whole model has: the cache of the Hub's client may hold a part of one."""

    def chosen(self, present: Collection[str]) -> tuple[str, ...] | None:
        """Returns the files of the model among those `present`; None if there is none."""
        names = set(present)
        for needed, allowed in _MODEL_LAYOUTS:
            if all(any(name in names for name in group) for group in needed):
                return tuple(sorted(name for name in names if allowed.fullmatch(name)))
        single = [name for name in names if name.endswith(".safetensors") and "/" not in name]
        return (single[0],) if len(single) == 1 else None

    @property
    def lacking(self) -> str:
        """The message about a repository that lacks the files."""
        return (
            "neither an exported model (config.json and model.safetensors), nor a model as "
            "diffusers lays it out (transformer/), nor one file of safetensors"
        )


@dataclass(frozen=True)
class WebFile:
    """A file at an address."""

    url: str
    sha256: str | None = None
    """In hexadecimal; None if none is published: that of the first download is kept then."""
    num_bytes: int | None = None
    """The size, None if none is published: the server's answer states it then."""

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.url.rpartition("/")[2]

    @property
    def folder_name(self) -> str:
        """The name of the folder that receives the file."""
        return f"web--{self.name}"


Published = HubFiles | WebFile

_FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"
_ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"

WEB_FILES: dict[str, WebFile] = {
    "inception": WebFile(
        f"{_FIDELITY}/weights-inception-2015-12-05-6726825d.pth",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        num_bytes=95_628_359,
    ),
    # Statistics of the training images of ImageNet, and 10,000 of the images.
    "adm-imagenet256": WebFile(f"{_ADM}/256/VIRTUAL_imagenet256_labeled.npz"),
    # Its users report that it has 1,000 images: too few for ADM's precision and recall.
    "adm-imagenet512": WebFile(f"{_ADM}/512/VIRTUAL_imagenet512.npz"),
    # 50,000 samples of ADM, guided and upsampled, whose scores are published.
    "adm-imagenet256-samples": WebFile(f"{_ADM}/256/admnet_guided_upsampled_imagenet256.npz"),
}
"""Files at fixed addresses by the names that settings give them."""


def repository_of(name: str) -> tuple[str, str | None] | None:
    """Returns repository and revision of `owner/name` or `owner/name@revision`, else None."""
    parts = _REPOSITORY.fullmatch(name)
    return (parts["name"], parts["revision"]) if parts else None


def vae(name: str) -> HubFiles:
    """Returns the files of a diffusers VAE; raises DataError if `name` names no repository."""
    parts = repository_of(name)
    if parts is None:
        raise DataError(
            f"{name}: not a folder, and not the name of a repository on the Hub, such as "
            "stabilityai/sd-vae-ft-mse"
        )
    repository, revision = parts
    return HubFiles(repository, _VAE_FILES, revision)


def sit(name: str) -> HubModel:
    """Returns the files of a diffusion model; raises DataError if `name` names no repository."""
    parts = repository_of(name)
    if parts is None or _OF_WEIGHTS.fullmatch(name):
        raise DataError(f"{name}: not the name of a repository on the Hub, such as owner/name")
    repository, revision = parts
    return HubModel(repository, revision=revision)


def timm_weights(architecture: str) -> HubFiles:
    """Returns the file of weights that timm publishes for `architecture`, which has a tag.

    Raises DataError if there is no safetensors file on the Hub in the names of its model.
    """
    from timm.models import get_pretrained_cfg

    found = get_pretrained_cfg(architecture)
    if found is None or not found.hf_hub_id or found.custom_load == "hf":
        at = f" ({found.url})" if found and found.url else ""
        raise DataError(
            f"timm has the weights of '{architecture}' in no safetensors file on the Hub; download "
            f"them yourself{at}, and give the file"
        )
    return HubFiles(found.hf_hub_id, _timm_files(found.hf_hub_filename))


def _timm_files(named: str | None) -> tuple[tuple[str, ...], ...]:
    """Returns the names to look for; `named` is the file that timm names, often a pickle."""
    stem = (named or "pytorch_model.bin").rpartition(".")[0]
    return ((f"{stem.replace('pytorch_', '')}.safetensors", f"{stem}.safetensors"),)


PUBLISHED: dict[str, Callable[[str], Published]] = {
    "vae": vae,
    "sit": sit,
    "timm": timm_weights,
    "web": WEB_FILES.__getitem__,
}
