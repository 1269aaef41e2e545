"""DeepSpeed's own configuration file, which arranges memory and communication and nothing else.

It is checked here, not by DeepSpeed, which ignores unknown keys and settings of another stage: a
misspelt one would silently change nothing.
"""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from srepa_ds.documents.json_reader import read_json
from srepa_ds.errors import ConfigError, Fault, nearest
from srepa_ds.files import looked_for, reason_of, shipped

OWNED_BY_YAML = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulation_steps",
    "managed_gradient_accumulation": "train.accumulation_steps",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "optimizer",
    "zero_force_ds_cpu_optimizer": "optimizer.cpu_adam",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "torch_autocast": "engine.precision",
    "data_types": "engine.precision",
    "activation_checkpointing": "engine.activation_checkpointing",
    "compile": "engine.compile",
    "steps_per_print": "train.log_every_steps",
}

MEANINGLESS = {
    "comms_logger": "nothing prints what it gathers, and it makes every collective wait for the "
    "device; torch.profiler shows collectives without that",
    "flops_profiler": "it does not see the products of compiled blocks, flash_attn and xformers, "
    "and after its step the host waits for the device in every other step; metrics.jsonl has "
    "tflops_per_rank and mfu",
    "memory_breakdown": "it resets the peak that peak_memory_gb in metrics.jsonl is read from",
    "dump_state": "deepspeed's own messages are not shown; ds_config.json in the run's folder has "
    "the same settings",
    "timers": "it times throughput for a message that is not shown; metrics.jsonl has "
    "images_per_second",
}
"""Settings that would cost or spoil something and show nothing, with the reason."""


class Kind(NamedTuple):
    """A kind of value: a test whether a value is of this kind, and its description."""

    holds: Callable[[Any], bool]
    words: str


class Setting(NamedTuple):
    """A setting of `zero_optimization`: the kind of its value, and the stages that read it."""

    kind: Kind
    stages: Collection[int]


def _is_count(value: Any) -> bool:
    # JSON's 2e8 is a float; DeepSpeed takes it as a whole number.
    return type(value) in (int, float) and value >= 0 and float(value).is_integer()


SWITCH = Kind(lambda value: isinstance(value, bool), "true or false")
COUNT = Kind(_is_count, "a whole number of at least 0")
SIZE = Kind(lambda value: _is_count(value) and value > 0, "a whole number of at least 1")
FACTOR = Kind(
    lambda value: type(value) in (int, float) and 0 < value < math.inf, "a number above 0"
)
OBJECT = Kind(lambda value: isinstance(value, dict), "an object")
STAGE = Kind(lambda value: type(value) is int and value in range(4), "0, 1, 2 or 3")
DEVICE = Kind(lambda value: value in ("cpu", "none"), '"cpu" or "none"')
DTYPE = Kind(lambda value: value in ("fp32", "bf16", "fp16"), '"fp32", "bf16" or "fp16"')
OFF = Kind(
    lambda value: value is False,
    "left out or false: it silently gives wrong gradients where activation checkpointing keeps the "
    "results of matrix products, and it replaces torch's linear in the whole process",
)

ALLOWED: Mapping[str, Kind] = {
    "zero_optimization": OBJECT,
    "communication_data_type": DTYPE,
    "prescale_gradients": SWITCH,
    "gradient_predivide_factor": FACTOR,
    "wall_clock_breakdown": SWITCH,
}

ZERO_SETTINGS: Mapping[str, Setting] = {
    "stage": Setting(STAGE, range(4)),
    "contiguous_gradients": Setting(SWITCH, (1, 2, 3)),
    "reduce_scatter": Setting(SWITCH, (1, 2, 3)),
    "reduce_bucket_size": Setting(SIZE, (1, 2, 3)),
    "overlap_comm": Setting(SWITCH, (1, 2, 3)),
    "allgather_partitions": Setting(SWITCH, (1, 2)),
    "allgather_bucket_size": Setting(COUNT, (1, 2)),
    "use_multi_rank_bucket_allreduce": Setting(SWITCH, (1, 2)),
    "round_robin_gradients": Setting(SWITCH, (1, 2)),
    "offload_optimizer": Setting(OBJECT, (2, 3)),
    "offload_param": Setting(OBJECT, (3,)),
    "memory_efficient_linear": Setting(OFF, (3,)),
    "sub_group_size": Setting(SIZE, (3,)),
    "stage3_prefetch_bucket_size": Setting(COUNT, (3,)),
    "stage3_param_persistence_threshold": Setting(COUNT, (3,)),
    "stage3_model_persistence_threshold": Setting(COUNT, (3,)),
    "stage3_max_live_parameters": Setting(COUNT, (3,)),
    "stage3_max_reuse_distance": Setting(COUNT, (3,)),
    "stage3_module_granularity_threshold": Setting(COUNT, (3,)),
    "stage3_use_all_reduce_for_fetch_params": Setting(SWITCH, (3,)),
    "stage3_allgather_sequential": Setting(SWITCH, (3,)),
}

OFFLOAD_SETTINGS: Mapping[str, Kind] = {"device": DEVICE, "pin_memory": SWITCH}


def load_deepspeed_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in `path`, or in the file of that name shipped with the package.

    Raises ConfigError with all faults, down to the settings of offloading: keys that are unknown,
    belong to the YAML or to another ZeRO stage, and values that a setting does not take.
    """
    try:
        document = read_json(shipped(path))
    except (OSError, ValueError) as error:
        reason = f"is not JSON: {error}"
        if isinstance(error, OSError):
            reason = f"{reason_of(error)}{looked_for(path)}; give the path of a DeepSpeed JSON"
        raise ConfigError(str(path), [Fault("", reason)]) from error
    if not isinstance(document, dict):
        raise ConfigError(str(path), [Fault("", "must be a JSON object")])
    faults = list(_faults(document))
    if faults:
        raise ConfigError(str(path), faults)
    return document


def stage_of(document: Mapping[str, Any]) -> int:
    """Returns the ZeRO stage of a checked document; 0 unless it names one."""
    return document.get("zero_optimization", {}).get("stage", 0)


def offloads_optimizer(document: Mapping[str, Any]) -> bool:
    """Returns whether a checked document keeps masters and Adam's moments on the CPU."""
    offload = document.get("zero_optimization", {}).get("offload_optimizer", {})
    return offload.get("device", "none") == "cpu"


def _faults(document: Mapping[str, Any]) -> Iterator[Fault]:
    for key in sorted(OWNED_BY_YAML.keys() & document.keys()):
        yield Fault(key, f"belongs to the YAML ({OWNED_BY_YAML[key]}); remove it here")
    for key in sorted(MEANINGLESS.keys() & document.keys()):
        yield Fault(key, f"means nothing here: {MEANINGLESS[key]}; remove it")
    elsewhere = OWNED_BY_YAML.keys() | MEANINGLESS.keys()
    rest = {key: value for key, value in document.items() if key not in elsewhere}
    yield from _misfits("", rest, ALLOWED)
    zero = document.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return
    kinds = {name: setting.kind for name, setting in ZERO_SETTINGS.items()}
    yield from _misfits("zero_optimization.", zero, kinds)
    stage = zero.get("stage", 0)
    if STAGE.holds(stage):
        yield from _of_another_stage(zero, stage)
    for name in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(name), dict):
            yield from _misfits(f"zero_optimization.{name}.", zero[name], OFFLOAD_SETTINGS)


def _misfits(prefix: str, section: Mapping[str, Any], kinds: Mapping[str, Kind]) -> Iterator[Fault]:
    for name in sorted(section):
        if name not in kinds:
            yield Fault(prefix + name, f"unknown or not supported here; {nearest(name, kinds)}")
        elif not kinds[name].holds(section[name]):
            given = json.dumps(section[name])
            yield Fault(prefix + name, f"must be {kinds[name].words} (given: {given})")


def _of_another_stage(zero: Mapping[str, Any], stage: int) -> Iterator[Fault]:
    for name in sorted(ZERO_SETTINGS.keys() & zero.keys()):
        stages = ZERO_SETTINGS[name].stages
        if stage not in stages:
            fitting = " or ".join(map(str, stages))
            yield Fault(
                f"zero_optimization.{name}",
                f"means nothing to stage {stage}; remove it, or choose stage {fitting}",
            )
