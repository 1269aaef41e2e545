"""`srepa-ds verify PATH`: reads all of a folder and compares it with what was written."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from srepa_ds.checkpoint.folder import fault_of, steps_in
from srepa_ds.checkpoint.manifest import MANIFEST
from srepa_ds.codec.config import CodecConfig
from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.codec.table import build_codec
from srepa_ds.commands.verify_data import DataSet, Part, is_data, is_store, parts_of_store
from srepa_ds.console import steps_shown
from srepa_ds.distributed.devices import local_device
from srepa_ds.encoders.teacher_folder import REPORT_NAME, WEIGHTS_NAME, check_teacher
from srepa_ds.errors import CheckpointError, DataError, SRepaError
from srepa_ds.preparation.contact_sheet import write_sheet
from srepa_ds.run_folder import RunFolder
from srepa_ds.weights.exported import DOCUMENT, check_export, holds_export


def verify(
    path: Path, *, vae: Path | None = None, sheet: Path | None = None, every_class: bool = False
) -> str:
    """Returns how much was found to be as written; reads every file in full.

    Of data sets, it also decodes some samples and counts the classes. With `vae`, latents are
    compared with those that it makes of the images; `sheet` receives a picture of some images. The
    folder itself is only read. Raises DataError that lists every fault, or says that the folder
    holds nothing to compare; OutputError if the sheet cannot be written.
    """
    codec = _codec(vae)
    try:
        data = _data_sets(path, codec)
        parts = [part for one in data for part in one.parts()] + _other_parts(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; give a folder to check") from error
    if not parts:
        raise DataError(
            f"{path}: holds nothing that can be checked; give the folder of a data set, of stored "
            "tokens, of a run, of an exported model or of a teacher"
        )
    _check_wanted(path, data, vae=vae, sheet=sheet)
    lines = [_checked(path, parts)]
    for one in data:
        lines += one.summary(every_class=every_class)
    if sheet is not None:
        lines += _write_sheets(sheet, data, codec)
    return "\n".join(lines)


def _check_wanted(
    path: Path, data: Sequence[DataSet], *, vae: Path | None, sheet: Path | None
) -> None:
    """Checks, before all is read, that options have something to work on; raises DataError."""
    if not data and (vae or sheet):
        raise DataError(f"{path}: holds no data set; --vae and --sheet belong to data sets")
    indices = [index for one in data if (index := one.index()) is not None]
    if vae and indices and not any(index.latents for index in indices):
        raise DataError(f"{path}: holds no latents to compare; leave out --vae")
    if sheet and not vae and any(index.pixels is None for index in indices):
        raise DataError(
            f"{path}: holds no images for a contact sheet; give the VAE of its latents with --vae"
        )


def _checked(path: Path, parts: Sequence[Part]) -> str:
    """Returns how much was read; raises DataError that lists every fault."""
    # Files of a damaged store may fail in two checks alike.
    faults = dict.fromkeys(_faults(parts))
    files = dict.fromkeys(file for part in parts for file in part.files)
    if faults:
        count = f"{len(faults)} fault{'s' if len(faults) != 1 else ''}"
        lines = [fault.replace("\n", "\n    ") for fault in faults]
        raise DataError("\n  ".join([f"{path}: {count} in {len(files)} files", *lines]))
    size = sum(file.stat().st_size for file in files)
    amount = f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"
    return f"{len(files)} files, {amount}: all as written"


def _faults(parts: Sequence[Part]) -> Iterator[str]:
    for part in steps_shown(parts, total=len(parts), what="checked", is_main=True):
        try:
            part.check()
        except SRepaError as error:
            yield str(error)
        except OSError as error:
            place = error.filename or (part.files[0] if part.files else "data")
            yield f"{place}: {error.strerror or error}"


def _codec(vae: Path | None) -> LatentCodec | None:
    """Returns the codec to compare latents with; raises DataError if it cannot be read."""
    if vae is None:
        return None
    return build_codec(CodecConfig(kind="vae", weights=vae), device=local_device())


def _data_sets(path: Path, codec: LatentCodec | None) -> list[DataSet]:
    """Returns the data set in a folder, or those in the folders in it; raises OSError."""
    if is_data(path):
        return [DataSet(path, codec)]
    if is_store(path) or _of_kind(path):
        return []
    return [DataSet(folder, codec) for folder in _folders_in(path) if is_data(folder)]


def _other_parts(path: Path) -> list[Part]:
    """Returns the parts of a folder that are no data sets; raises OSError."""
    if is_data(path):
        return []
    if is_store(path):
        return list(parts_of_store(path))
    stores = [folder for folder in _folders_in(path) if is_store(folder)]
    return _of_kind(path) or [part for store in stores for part in parts_of_store(store)]


def _folders_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_dir()]


def _of_kind(folder: Path) -> list[Part]:
    """Returns the parts of a run, a checkpoint, a model or a teacher, none for any other folder."""
    names, run = {path.name for path in folder.iterdir()}, RunFolder(folder)
    if run.checkpoints.name in names:
        checkpoints = [_of_checkpoint(path) for path in steps_in(run.checkpoints)]
        return checkpoints + (_of_export(run.export()) if run.export().is_dir() else [])
    if MANIFEST in names:
        return [_of_checkpoint(folder)]
    if REPORT_NAME in names:
        return [Part((folder / WEIGHTS_NAME, folder / REPORT_NAME), partial(check_teacher, folder))]
    if DOCUMENT in names and holds_export(folder):
        return _of_export(folder)
    return [_of_checkpoint(path) for path in steps_in(folder)]


def _write_sheets(path: Path, data: Sequence[DataSet], codec: LatentCodec | None) -> Iterator[str]:
    """Writes a sheet of each data set, and yields a line for each; of several, named after them."""
    for one in data:
        place = path if len(data) == 1 else path.with_stem(f"{path.stem}-{one.folder.name}")
        write_sheet(place, one.opened(), codec)
        yield f"contact sheet: {place}"


def _of_checkpoint(folder: Path) -> Part:
    return Part(_files_in(folder), partial(_check_checkpoint, folder))


def _check_checkpoint(folder: Path) -> None:
    fault = fault_of(folder)
    # A run that goes on may have deleted it in the meantime.
    if fault is not None and folder.is_dir():
        raise CheckpointError(f"{folder}: {fault}; restore it, or delete it")


def _of_export(folder: Path) -> list[Part]:
    return [Part(_files_in(folder), partial(check_export, folder))]


def _files_in(folder: Path) -> tuple[Path, ...]:
    return tuple(path for path in sorted(folder.iterdir()) if path.is_file())
