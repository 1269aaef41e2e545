"""Finds published files on this machine: a folder, what was fetched, or the Hub's own cache.

Nothing here downloads; `srepa-ds fetch` does, before.
"""

import os
import re
from difflib import get_close_matches
from pathlib import Path

from srepa_ds.encoders.fetched import FETCH_AGAIN, fetched_folder, find_fetched, sha256_once
from srepa_ds.encoders.publications import PUBLISHED, WEB_FILES, HubFiles, HubModel, Published
from srepa_ds.errors import DataError
from srepa_ds.files import looked_for

_SHA256 = re.compile(r"[0-9a-f]{64}")


def local_folder(weights: Path, *, setting: str, kind: str = "vae") -> Path:
    """Returns the folder of `weights`: that path, or the files fetched of a repository's name.

    `kind` is a row of `PUBLISHED`. Raises DataError, which names the `setting`, if there is
    neither, or if fetched files have changed.
    """
    if weights.is_dir():
        return weights
    try:
        published = PUBLISHED[kind](str(weights))
    except DataError as error:
        raise DataError(f"{setting}: {error}{looked_for(weights)}") from error
    if folder := find_published(published):
        return folder
    raise DataError(
        f"{setting}: {weights} is not a folder{looked_for(weights)} and not fetched (looked for in "
        f"{fetched_folder()}); {FETCH_AGAIN}, or give a folder"
    )


def local_model(path: Path, *, setting: str) -> Path:
    """Returns the folder or file of a diffusion model: that path, or what was fetched of a name.

    A path that exists comes first, and one that is no repository's name is returned as it is.
    Raises DataError, which names the `setting`, if there is neither, or if fetched files have
    changed.
    """
    place = path_of_model(path)
    if os.path.exists(place) or _model_named(path) is None:
        return place
    raise DataError(
        f"{setting}: {path}: no such file or folder{looked_for(path)}, and no repository of this "
        f"name was fetched (looked for in {fetched_folder()}); correct the path, or {FETCH_AGAIN}"
    )


def path_of_model(path: Path) -> Path:
    """Returns where the model lies that a setting names, if it was fetched, else `path`.

    It is a folder, or the file if the repository has a single one. Raises DataError if fetched
    files have changed.
    """
    if os.path.exists(path) or (published := _model_named(path)) is None:
        return path
    folder = find_published(published)
    if folder is None:
        return path
    names = published.chosen({str(p.relative_to(folder)) for p in folder.glob("**/*")}) or ()
    return folder / names[0] if len(names) == 1 else folder


def model_to_fetch(path: Path) -> HubModel | None:
    """Returns the repository that a setting names in place of a path, else None.

    Where there is a folder named like the owner, a path is meant, whether it exists yet or not.
    """
    if os.path.exists(path) or os.path.exists(path.parent):
        return None
    return _model_named(path)


def _model_named(path: Path) -> HubModel | None:
    try:
        published = PUBLISHED["sit"](str(path))
    except DataError:
        return None
    assert isinstance(published, HubModel)
    return published


def local_weights(architecture: str, *, setting: str = "teacher.weights") -> Path:
    """Returns the file of weights that timm publishes for `architecture`.

    Raises DataError, which names the `setting`, if it was not fetched, or has changed since.
    """
    published = PUBLISHED["timm"](architecture)
    folder = find_published(published)
    if folder is None:
        raise DataError(
            f"the pretrained weights of '{architecture}' ({published.name}) were not fetched "
            f"(looked for in {fetched_folder()}); {FETCH_AGAIN}, or give {setting}: a local "
            ".safetensors, .pt, .pth or .pth.tar file"
        )
    assert isinstance(published, HubFiles)
    names = published.chosen({path.name for path in folder.iterdir()})
    assert names is not None
    return folder / names[0]


def web_file_named(path: Path) -> str | None:
    """Returns the name in `WEB_FILES` that a setting gives in place of a path, else None.

    A file or folder of this name comes first.
    """
    name = str(path)
    return name if name in WEB_FILES and not os.path.exists(path) else None


def local_file(path: Path, *, setting: str) -> Path:
    """Returns the file that was fetched of a name in `WEB_FILES`, and any other path as it is.

    Raises DataError, which names the `setting`, if the file was not fetched or has changed since,
    or for a path that does not exist and nearly is such a name.
    """
    if name := web_file_named(path):
        return fetched_file(name, setting=setting)
    if not os.path.exists(path) and (near := get_close_matches(str(path), WEB_FILES, n=1)):
        raise DataError(
            f"{setting}: {path}: no such file or folder{looked_for(path)}, and not the name of a "
            f"published file; did you mean '{near[0]}'?"
        )
    return path


def fetched_file(name: str, *, setting: str) -> Path:
    """Returns the file that was fetched of a name in `WEB_FILES`.

    Raises DataError, which names the `setting`, if it was not fetched or has changed since.
    """
    published = WEB_FILES[name]
    if folder := find_published(published):
        return folder / published.name
    raise DataError(
        f"{setting}: '{name}' ({published.url}) was not fetched (looked for in "
        f"{fetched_folder()}); {FETCH_AGAIN}, or give the path of the file"
    )


def find_published(published: Published) -> Path | None:
    """Returns the folder of the files of `published`, fetched or in the Hub's cache, else None.

    Raises DataError if they have changed.
    """
    folder = find_fetched(published)
    if folder is None and isinstance(published, HubFiles):
        return _in_cache_of_hub(published)
    return folder


def _in_cache_of_hub(published: HubFiles) -> Path | None:
    """Returns the snapshot in the cache of huggingface_hub (`HF_HOME`) with all wanted files."""
    from huggingface_hub import try_to_load_from_cache

    def cached(name: str) -> Path | None:
        found = try_to_load_from_cache(published.repository, name, revision=published.revision)
        return Path(found) if isinstance(found, str) else None

    files = {name: path for group in published.wanted for name in group if (path := cached(name))}
    chosen = published.chosen(files)
    if chosen is None:
        return None
    for name in chosen:
        _check_cached(files[name])
    return files[chosen[0]].parent


def _check_cached(path: Path) -> None:
    """Compares a large file with its name in the cache, which is the hash; raises DataError."""
    expected = path.resolve().name
    if _SHA256.fullmatch(expected) and sha256_once(path) != expected:
        raise DataError(
            f"{path}: contents changed since they were downloaded; delete {path.resolve()} and "
            f"{FETCH_AGAIN}"
        )
