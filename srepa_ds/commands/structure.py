"""`srepa-ds structure`: the spatial structure of the tokens of teachers and student."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from srepa_ds.config.experiment import Config
from srepa_ds.config.sections import StructureConfig
from srepa_ds.data.masks import find_mask, has_both_regions, read_mask
from srepa_ds.data.shards import Parts, ShardDataset
from srepa_ds.distributed import devices
from srepa_ds.errors import ConfigError, DataError, Fault
from srepa_ds.files import make_folder, try_writing, write_aside, writing
from srepa_ds.report.markup import element
from srepa_ds.report.page import page, require_matplotlib
from srepa_ds.report.probe import (
    NUM_IMAGES,
    spread_over_classes,
)
from srepa_ds.report.structure import HEADER, Layer, rows_of, structure_section
from srepa_ds.schema import to_tree
from srepa_ds.weights.exported import ExportedModel, holds_export, read_model

log = logging.getLogger("srepa_ds")

_CURE = "choose another run.folder or fix its permissions"


def structure(config: Config) -> Path:
    """Writes `structure.json` and `structure.html` to the run's folder; returns the page's path.

    Measures the teachers of the alignments and, if the run has an exported model, the block that
    each was aligned with. Raises ConfigError without a teacher, DataError for images, masks or
    weights that cannot be used, OutputError if the files cannot be written.
    """
    require_matplotlib()
    from srepa_ds.report.layers import TeachersAlone, TeachersAndStudent

    settings = config.structure
    exported = _exported(config)
    if not config.alignments and exported is None:
        raise ConfigError(
            "structure",
            [
                Fault(
                    "alignments",
                    "is empty, and `structure` measures the tokens of teachers; add one",
                )
            ],
        )
    devices.use_exact_float32()
    device = devices.take_device()
    data = _open(settings.images or config.data.folder, has_student=exported is not None)
    for path in (config.run_folder.structure, config.run_folder.structure_page):
        with writing(path, cure=_CURE):
            try_writing(path)
    indices = spread_over_classes(data.labels, settings.num_images)
    masks = _found_masks(settings, data, indices)
    if exported is None:
        source = TeachersAlone(config, data, device)
    else:
        source = TeachersAndStudent(config, exported, data, device)
    layers: dict[int, Layer] = {}
    for places in torch.arange(len(indices)).split(settings.batch_size):
        for number, seen in enumerate(source.tokens(indices[places])):
            layer = layers.setdefault(number, Layer(seen.teacher, seen.name, seen.grid))
            layer.add(seen.tokens, *_regions(masks, places.tolist(), seen.grid))
    maps = source.maps(spread_over_classes(data.labels, NUM_IMAGES))
    measured = list(layers.values())
    notes = [*_notes(measured, masks), *([] if exported else [_without_student(config)])]
    # First, because what cannot be written has still been measured.
    for line in (HEADER, *rows_of(measured)):
        log.info("%s", f"{line[0]:36} " + " ".join(f"{cell:>9}" for cell in line[1:]))
    for sentence in notes:
        log.warning("%s", sentence)
    _write(config, measured, notes, data, exported)
    title = f"{config.run.folder.name}: spatial structure"
    sections = [structure_section(measured, notes, images=len(indices)), maps]
    text = page(title, header=element("h1", title), sections=sections)
    path = config.run_folder.structure_page
    # A file's name may be no Unicode.
    _write_file(path, text.encode("utf-8", errors="replace"))
    log.info("wrote %s", path)
    return path


def _exported(config: Config) -> ExportedModel | None:
    folder = config.weights_folder
    return read_model(folder) if holds_export(folder) else None


def _without_student(config: Config) -> str:
    return (
        f"the teachers alone were measured: {config.weights_folder} holds no exported model; "
        "`srepa-ds export` writes one"
    )


def _open(folder: Path, *, has_student: bool) -> ShardDataset:
    data = ShardDataset(folder, parts=Parts(moments=has_student))
    data.require_images("teachers look at images")
    data.compare_if_small()
    return data


def _found_masks(
    settings: StructureConfig, data: ShardDataset, indices: Tensor
) -> list[Path | None]:
    """Returns the mask of each image; none without a folder of masks."""
    if settings.masks is None:
        return []
    keyed = zip(data.keys(indices), indices.tolist(), strict=True)
    found = [find_mask(settings.masks, key=key, index=index) for key, index in keyed]
    if not any(found):
        raise DataError(
            f"{settings.masks}: holds no mask of any of the {len(found)} images; name them as "
            f"the images, such as {Path(data.keys(indices[:1])[0]).with_suffix('.png')}, or by "
            f"their index, such as {int(indices[0])}.png"
        )
    return found


def _regions(
    masks: Sequence[Path | None], places: Sequence[int], grid: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the masks of some images, and which of them have regions large enough."""
    if not masks:
        return None, None
    empty = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    chosen = [masks[place] for place in places]
    read = torch.stack([read_mask(path, grid) if path else empty for path in chosen])
    return read, has_both_regions(read)


def _notes(layers: Sequence[Layer], masks: Sequence[Path | None]) -> Iterator[str]:
    if not masks:
        yield "SRSS was not measured: it needs masks of the foreground (structure.masks)"
        return
    if missing := sum(path is None for path in masks):
        yield f"{missing} of {len(masks)} images have no mask, and no part in SRSS"
    if all(layer.means()["srss"] is None for layer in layers):
        yield (
            "SRSS was not measured: it takes images with a quarter of their tokens or more in the "
            "foreground, and as many in the background"
        )


def _write(
    config: Config,
    layers: Sequence[Layer],
    notes: Sequence[str],
    data: ShardDataset,
    exported: ExportedModel | None,
) -> None:
    document = {
        "layers": [layer.document() for layer in layers],
        **({"notes": list(notes)} if notes else {}),
        "settings": to_tree(config.structure),
        "images_id": data.index.dataset_id,
        "weights_sha256": exported.sha256 if exported else None,
    }
    text = json.dumps(document, indent=2) + "\n"
    _write_file(config.run_folder.structure, text.encode())


def _write_file(path: Path, content: bytes) -> None:
    with writing(path, cure=_CURE):
        make_folder(path.parent)
        write_aside(path, lambda aside: aside.write_bytes(content), concurrent=True)
