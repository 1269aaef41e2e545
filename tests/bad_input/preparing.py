"""What is wrong with a preparation: its options, its settings, its images, its output."""

from bad_input.arrangements import nothing
from bad_input.case import CONFIGS, Case, Place
from image_tree import write_config, write_tree

_DIGITS = f"prepare {CONFIGS}/digits-prepare.yaml output={{folder}}/new"
_TREE = "prepare {folder}/images.yaml"


def images(place: Place, **changes: object) -> None:
    """Writes a folder of images and a configuration that prepares it."""
    tree = write_tree(place.folder / "tree", num_images=9, broken=(4,))
    write_config(place.folder / "images.yaml", tree, place.folder / "new", **changes)


def full_output(place: Place) -> None:
    images(place)
    (place.folder / "new/train").mkdir(parents=True)
    (place.folder / "new/train/thesis.txt").write_text("three years of work")


def no_pixels(place: Place) -> None:
    images(place, pixels=None)


def pixels_as_latents(place: Place) -> None:
    images(place, latents={"codec": {"kind": "identity"}})


def no_weights(place: Place) -> None:
    images(place, latents={"codec": {"kind": "vae", "weights": str(place.folder / "none")}})


CASES = [
    # The options.
    Case("a share that is none", nothing, f"{_DIGITS} --share two",
         ("--share: must be i/n, with i from 0 to n - 1", "'two'")),
    Case("a share beyond the last", nothing, f"{_DIGITS} --share 3/3", ("--share: must be i/n",)),
    Case("a share of nothing", nothing, f"{_DIGITS} --share 0/0", ("--share: must be i/n",)),
    Case("a share of a teacher's tokens", nothing, "prepare --teacher CONFIG --share 0/2",
         ("prepare --teacher: 1 fault", "--share: is for images")),
    Case("a dry run of a teacher", nothing, "prepare --teacher CONFIG --dry-run --share 0/2",
         ("prepare --teacher: 2 faults", "--dry-run: is for images")),
    Case("a dry run on no ranks", nothing, f"{_DIGITS} --dry-run --ranks 0",
         ("--ranks must be at least 1, got 0",)),
    # The settings.
    Case("an unknown storage of pixels", nothing, f"{_DIGITS} pixels=jpeg",
         ("pixels: Input should be 'raw', 'png' or 'webp'",)),
    Case("no threads", nothing, f"{_DIGITS} threads=0", ("threads", "greater than or equal to 1")),
    Case("no samples in a shard", nothing, f"{_DIGITS} samples_per_shard=0",
         ("samples_per_shard", "greater than or equal to 1")),
    Case("errors that are neither skipped nor fatal", nothing, f"{_DIGITS} on_error=ignore",
         ("on_error", "'fail' or 'skip'")),
    Case("neither pixels nor latents", no_pixels, _TREE,
         ("pixels: null leaves nothing to store", "pixels: webp")),
    Case("latents that are pixels", pixels_as_latents, _TREE,
         ("latents.codec.kind: 'identity' has no latents", "choose 'vae'")),
    Case("latents of no VAE", no_weights, _TREE, ("none",)),
    Case("a dry run of latents of no VAE", no_weights, f"{_TREE} --dry-run", ("none",)),
    # The images and the output.
    Case("an image that cannot be read", images, f"{_TREE} holdout_fraction=0",
         ("n0001/image 004.JPEG: cannot be decoded",)),
    Case("an output with something else", full_output, _TREE,
         ("train: not empty (it holds thesis.txt)", "choose an empty folder or delete it")),
]  # fmt: skip
