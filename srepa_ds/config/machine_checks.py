"""Checks of an experiment against the machine that trains it, before anything is written.

They refuse only what cannot work: memory is compared by orders of magnitude.
"""

import math
import os
import shlex
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from srepa_ds.alignment.alignment import AlignmentConfig
from srepa_ds.config.experiment import Config
from srepa_ds.distributed.ranks import Rank
from srepa_ds.distributed.surroundings import launched
from srepa_ds.errors import ConfigError, Fault
from srepa_ds.model.variants import MLP_RATIO, SiTConfig
from srepa_ds.plan.activations import activation_bytes
from srepa_ds.zero.json_file import load_deepspeed_json, offloads_optimizer, stage_of

_MARGIN = 4
"""A run is refused only if it needs this many times the memory. The estimates below leave much out,
but swap, pages that are never touched and lower precisions could also make them too high."""

_STATE_BYTES = 16
"""Per weight: the fp32 master, Adam's two moments, and the main average."""

_MOST_COUNTED_BLOCKS = 64
"""Blocks whose activations are counted one by one; those of more are in proportion."""


def check_machine(config: Config, rank: Rank) -> None:
    """Checks that this rank can train `config`; raises ConfigError with all faults."""
    faults = [*_compiler_faults(config, rank.device), *_memory_faults(config, rank)]
    if faults:
        raise ConfigError("configuration", faults)


def _compiler_faults(config: Config, device: torch.device) -> Iterator[Fault]:
    compiled = {"engine.compile": config.engine.compile} | {
        f"alignments.{number}.teacher.compile": alignment.teacher.compile
        for number, alignment in enumerate(config.alignments)
        if alignment.stored_tokens is None
    }
    reason = missing_compiler(device) if any(compiled.values()) else None
    if reason is not None:
        for path, is_on in compiled.items():
            if is_on:
                yield Fault(path, f"torch.compile cannot work here: {reason}; or set it to false")


def missing_compiler(device: torch.device) -> str | None:
    """Returns what torch.compile lacks for its kernels on `device`, with the cure, or None.

    On the CPU its kernels are C++, on a GPU a C compiler builds what launches them.
    """
    variable, language, known = (
        ("CC", "C", ("gcc", "clang"))
        if device.type == "cuda"
        # As torch looks: by default for this one alone.
        else ("CXX", "C++", ("g++",))
    )
    try:
        command = shlex.split(os.environ.get(variable, ""))[:1]
    except ValueError as error:
        return (
            f"{variable} cannot be parsed as a command ({error}); set it to a {language} compiler"
        )
    if not any(map(shutil.which, command or known)):
        missing = f"{variable} names no program" if command else f"there is no {language} compiler"
        return f"{missing}; install {known[0]}, or set {variable} to a {language} compiler"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"{header} is missing; install the headers of Python (python3-dev)"
    return None


class _Bytes(NamedTuple):
    """Bytes that one rank needs at the least."""

    states: int
    """Masters, moments and the average, wherever they lie."""
    activations: int
    """Of one micro batch."""
    on_host: int
    """Of all these, what is offloaded."""


def _memory_faults(config: Config, rank: Rank) -> Iterator[Fault]:
    needed = _needed(config, rank)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else 1
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks_here
    total = needed.states + needed.activations
    if rank.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(rank.device).total_memory
        places = {
            "its GPU": (total - needed.on_host, gpu),
            "the machine": (needed.on_host, machine),
        }
    else:
        places = {"the machine": (total, machine)}
    for place, (wanted, available) in places.items():
        if wanted > _MARGIN * available:
            share = " for it" if place == "the machine" and ranks_here > 1 else ""
            need = f"a rank needs at least {_gigabytes(wanted)}, and {place} has"
            need += f" {_gigabytes(available)}{share}"
            yield _too_large(config, need, model=needed.states > _MARGIN * available)


def _too_large(config: Config, need: str, *, model: bool) -> Fault:
    """Returns the fault of the model, if that alone is too large, else of the batch."""
    if model:
        return Fault(
            "model",
            f"has some {_fewest_weights(config):.2g} weights: {need}; choose a smaller model "
            "(depth, hidden_size), projector or number of classes, or more ranks",
        )
    return Fault(
        "train.batch_size",
        f"{config.train.batch_size} in {config.train.accumulation_steps} accumulation steps: "
        f"{need}; choose a smaller batch, more ranks, or more train.accumulation_steps",
    )


def _needed(config: Config, rank: Rank) -> _Bytes:
    document = load_deepspeed_json(config.engine.deepspeed)
    stage, weights = stage_of(document), _fewest_weights(config)
    states = _STATE_BYTES * weights // (rank.world_size if stage else 1)
    device, host = _activations(config, rank)
    return _Bytes(
        states=states,
        activations=device + host,
        on_host=host + (states if offloads_optimizer(document) else 0),
    )


def _activations(config: Config, rank: Rank) -> tuple[int, int]:
    """Returns the bytes of activations of one micro batch on the device and on the host."""
    parts = config.train.accumulation_steps * rank.world_size
    depth = config.model.shape.depth
    counted = min(depth, _MOST_COUNTED_BLOCKS)
    found = activation_bytes(
        config.model.model_copy(update={"depth": counted}),
        batch=math.ceil(config.train.batch_size / parts),
        precision=config.engine.precision,
        checkpointing=config.engine.activation_checkpointing,
        device_type="cuda" if rank.device.type == "cuda" else "cpu",
    )
    return found.device * depth // counted, found.host * depth // counted


def _fewest_weights(config: Config) -> int:
    """Returns a lower bound on the number of trained weights: the large matrices alone."""
    return _of_model(config.model) + sum(
        _of_projector(config.model, alignment) for alignment in config.alignments
    )


def _of_model(model: SiTConfig) -> int:
    depth, width, _, patch_size = model.shape
    # Of a block: queries, keys, values and the output of attention; the MLP; its modulation.
    block = (3 + 1 + 2 * MLP_RATIO + 6) * width**2
    patches = 2 * model.in_channels * patch_size**2 * width
    return depth * block + model.num_classes * width + patches


def _of_projector(model: SiTConfig, alignment: AlignmentConfig) -> int:
    projector, width = alignment.projector, model.shape.hidden_size
    if not alignment.has_projector:
        return 0
    if projector.kind == "mlp":
        return projector.hidden_width * (width + projector.hidden_width)
    return width * (projector.kernel**2 if projector.kind == "conv" else 1)


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes < 1e15 else f"{num_bytes:.1e} bytes"
