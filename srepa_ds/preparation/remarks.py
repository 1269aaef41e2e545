"""What a preparation says of the data set that it finds or leaves, as texts without its folder."""

from collections.abc import Mapping, Sequence
from typing import Any

from srepa_ds.data.prepared_folder import SKIPPED_NAME
from srepa_ds.data.shard_index import LatentDescription, ShardIndex
from srepa_ds.errors import listed
from srepa_ds.trees import differences


def summary(index: ShardIndex) -> str:
    """Returns what a finished data set holds."""
    text = f"{index.num_samples:,} images in {index.num_classes:,} classes"
    if index.latents is not None:
        text += f", latents {index.latents.latent_shape}"
    if index.num_skipped:
        text += f"; {index.num_skipped:,} images left out ({SKIPPED_NAME})"
    return text


def about_skipped(index: ShardIndex) -> str:
    """Returns a warning of images that are left out although one that fails must end the command.

    Empty if there are none.
    """
    if not index.num_skipped:
        return ""
    return (
        f"{index.num_skipped:,} images of the source were left out when it was prepared "
        f"({SKIPPED_NAME} lists them); to try them again, delete the folder"
    )


def about_other_latents(there: LatentDescription, wanted: LatentDescription) -> str:
    """Returns how latents that are there differ from those wanted; empty if they do not."""
    found = differences(
        there.model_dump(mode="json", exclude={"files"}), wanted.model_dump(mode="json")
    )
    return "; ".join(f"{d.path} is {d.old!r} there and {d.new!r} here" for d in found)


def about_other_settings(others: Sequence[Mapping[str, Any]], own: Mapping[str, Any]) -> str:
    """Returns that files of latents were encoded with the settings `others`; empty for none."""
    if not others:
        return ""
    changes = [f"{d.path} was {d.old!r} and is {d.new!r}" for d in differences(others[0], own)]
    return (
        f"{len(others):,} files of latents were encoded with other settings ({'; '.join(changes)})"
    )


def about_missing(names: Sequence[str]) -> str:
    """Returns why a data set is not finished whose files were all written."""
    return (
        "not finished, although everything was written: "
        f"{listed(names, most=3) or 'index.json'} missing or changed since; see what else writes "
        "there, and run the same command again"
    )
