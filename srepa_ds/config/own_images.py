"""The demo's configurations for a person's own folder of images, made from those for digits."""

import re
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Int64
from torch import Tensor

from srepa_ds.codec.config import CodecConfig
from srepa_ds.codec.table import build_codec
from srepa_ds.data.sources.image_folder import ImageFolderConfig
from srepa_ds.data.split import stratified_split
from srepa_ds.encoders.described import spec_for
from srepa_ds.encoders.published import local_weights
from srepa_ds.encoders.spec import IMAGENET_MEAN, IMAGENET_STD, TeacherSpec
from srepa_ds.encoders.table import TEACHERS
from srepa_ds.encoders.timm_models import has_published_weights
from srepa_ds.errors import ConfigError, Fault
from srepa_ds.files import shipped, unexpanded
from srepa_ds.schema import replaced, to_tree
from srepa_ds.trees import Tree, load_tree

GRID = 8
"""Tokens of the student along one side: 64 in all, which two CPU cores train in minutes."""

HOLDOUT_FRACTION = 0.2
"""Of each class, for the scores."""

FEWEST_IMAGES = 4
"""Precision and recall look for each image's 3 nearest neighbours."""


@dataclass(frozen=True)
class OwnImages:
    """A folder of images, one folder for each class, and the choices of the demo on it."""

    folder: Path
    image_size: int
    num_classes: int
    latent_shape: tuple[int, int, int]
    """Channels, height, width of the space that the model works in."""
    vae: Path | None
    """The VAE of that space, None for pixels."""
    teacher: TeacherSpec | None
    """The teacher; None to train a small one on the images."""
    teacher_name: str | None
    """Its name, for folders."""
    teacher_weights: Path | None
    """The teacher's weights, None for published ones."""

    @property
    def name(self) -> str:
        """A name for the folders that the demo writes to."""
        return _readable(self.folder.absolute().name) + f"-{self.image_size}" + self._space

    @property
    def run_name(self) -> str:
        """A name for the folder of a run: other choices make other runs."""
        return self.name + (f"-{_readable(self.teacher_name)}" if self.teacher_name else "")

    @property
    def _space(self) -> str:
        return "" if self.vae is None else f"-{_readable(self.vae.name)}"

    @property
    def data(self) -> Path:
        """The folder of the prepared data."""
        return Path("data") / self.name

    def trees(self, mode: str) -> dict[str, Tree]:
        """Returns the configurations of the demo's steps, by name; no `teacher` if one is given.

        Raises ConfigError if the model's grid does not divide the images.
        """
        if self.latent_shape[1] % GRID:
            reason = (
                f"gives latents of {self.latent_shape[1]} places along a side, and the demo's "
                f"model has {GRID} tokens; choose a multiple of "
                f"{GRID * self.image_size // self.latent_shape[1]}"
            )
            raise ConfigError("demo", [Fault("--size", reason)])
        own = {"prepare": self._prepare(), "experiment": self._experiment(mode)}
        return own if self.teacher else {**own, "teacher": self._teacher_training(mode)}

    def _prepare(self) -> Tree:
        tree = {
            "kind": "prepare",
            "source": {"kind": "image_folder", "path": unexpanded(self.folder.absolute())},
            "image_size": self.image_size,
            "output": str(self.data),
            "holdout_fraction": HOLDOUT_FRACTION,
            "on_error": "skip",
        }
        return {**tree, "latents": {"codec": self._codec()}} if self.vae else tree

    def _codec(self) -> Tree:
        if self.vae is None:
            return {"kind": "identity"}
        return {"kind": "vae", "weights": unexpanded(self.vae)}

    def _own_teacher(self, mode: str) -> TeacherSpec:
        """Returns the small ViT that learns to tell the classes of the images apart."""
        like = TEACHERS["digits-vit-cls" if mode.startswith("reg") else "digits-vit"]
        patch_size = self.image_size // GRID
        return replaced(
            like,
            arguments={**like.arguments, "patch_size": patch_size},
            patch_size=patch_size,
            input_size=self.image_size,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            num_classes=self.num_classes,
        )

    def _teacher_folder(self, mode: str) -> Path:
        return Path(f"{self.data}-teacher{'-cls' if mode.startswith('reg') else ''}")

    def _teacher_training(self, mode: str) -> Tree:
        shipped_tree = load_tree(shipped(Path("configs/digits-teacher.yaml")))
        return {
            **shipped_tree,
            "train": str(self.data / "train"),
            "heldout": str(self.data / "heldout"),
            "output": str(self._teacher_folder(mode)),
            "encoder": {"spec": to_tree(self._own_teacher(mode))},
            # Nobody knows how hard the classes are to tell apart.
            "required_accuracy": 0.0,
        }

    def _teacher(self, mode: str) -> Tree:
        if self.teacher is None:
            weights = self._teacher_folder(mode) / "model.safetensors"
            return {
                "spec": to_tree(self._own_teacher(mode)),
                "weights": str(weights),
                "dtype": "fp32",
            }
        weights = None if self.teacher_weights is None else unexpanded(self.teacher_weights)
        return {"spec": to_tree(self.teacher), "weights": weights, "dtype": "fp32"}

    def _experiment(self, mode: str) -> Tree:
        tree = load_tree(shipped(Path(f"configs/digits-{mode}.yaml")))
        channels, side, _ = self.latent_shape
        teacher = self._teacher(mode)
        own_grid = {"direction": "teacher_to_student", "mode": "bilinear"}
        alignments = [
            {**alignment, "teacher": teacher, **({"resampling": own_grid} if self.teacher else {})}
            for alignment in tree.get("alignments", [])
        ]
        model = {
            **tree["model"],
            "input_size": side,
            "in_channels": channels,
            "num_classes": self.num_classes,
            "patch_size": side // GRID,
        }
        if "class_token_width" in model:
            model["class_token_width"] = teacher["spec"]["width"]
        return {
            **tree,
            "run": {**tree["run"], "folder": f"runs/{self.run_name}-{mode}"},
            "data": {"folder": str(self.data / "train")},
            "codec": self._codec(),
            "model": model,
            "alignments": alignments,
            "evaluate": {"reference": str(self.data / "heldout"), "extractor": teacher},
        }


def look_at(
    folder: Path,
    *,
    image_size: int,
    vae: Path | None = None,
    teacher: str | None = None,
    teacher_weights: Path | None = None,
) -> OwnImages:
    """Returns the demo on a folder of images; `teacher` is one of ours, or a model of timm.

    Raises DataError for a folder without images or a VAE that cannot be read, ConfigError for
    settings that cannot work.
    """
    if teacher is None and teacher_weights is not None:
        raise ConfigError("demo", [Fault("--teacher-weights", "needs --teacher, its model")])
    codec = CodecConfig(kind="vae", weights=_as_setting(vae)) if vae else CodecConfig()
    source = ImageFolderConfig(kind="image_folder", path=_as_setting(folder)).opened()
    _check_enough(folder, source.labels)
    spec = spec_for(teacher) if teacher else None
    if teacher_weights is not None and not teacher_weights.is_file():
        raise ConfigError("demo", [Fault("--teacher-weights", f"{teacher_weights}: no such file")])
    if spec is not None and teacher_weights is None and has_published_weights(spec.architecture):
        # Raises if they were not fetched.
        local_weights(spec.architecture)
    return OwnImages(
        folder,
        image_size,
        num_classes=len(source.class_ids),
        latent_shape=build_codec(codec).latent_shape((3, image_size, image_size)),
        vae=vae,
        teacher=spec,
        teacher_name=teacher,
        teacher_weights=teacher_weights,
    )


def _check_enough(folder: Path, labels: Int64[Tensor, " samples"]) -> None:
    """Raises ConfigError if fewer images would be held out than scores need."""
    split = stratified_split(labels, holdout_fraction=HOLDOUT_FRACTION, seed=0)
    if len(split.heldout) < FEWEST_IMAGES:
        reason = (
            f"{folder} holds {len(labels)} images, of which {len(split.heldout)} would be held "
            f"out, and scores need {FEWEST_IMAGES}; give more, at least five of each class"
        )
        raise ConfigError("demo", [Fault("--data", reason)])


def _as_setting(path: Path) -> Path:
    """Returns a path of the command line as a configuration would give it."""
    return Path(unexpanded(path))


def _readable(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name) or "images"
