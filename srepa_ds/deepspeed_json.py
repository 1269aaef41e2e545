"""DeepSpeed's own configuration file: how memory and communication are arranged, nothing else."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from srepa_ds.errors import ConfigError, Fault, nearest
from srepa_ds.files import shipped

OWNED_BY_YAML = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulation_steps",
    "managed_gradient_accumulation": "train.accumulation_steps",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "optimizer",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "torch_autocast": "engine.precision",
    "data_types": "engine.precision",
}

# DeepSpeed ignores a key it does not know, so a misspelt one would silently change nothing.
ALLOWED = (
    "zero_optimization",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "comms_logger",
    "flops_profiler",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
)


def load_deepspeed_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in `path`, or in the file of that name shipped with the package.

    Raises ConfigError with all faults: keys that are unknown or belong to the YAML, and a ZeRO
    stage that does not exist. What stands inside `zero_optimization` DeepSpeed checks itself.
    """
    try:
        document = json.loads(shipped(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"is not JSON: {error}"
        raise ConfigError(str(path), [Fault("", reason)]) from error
    faults = list(_faults(document))
    if faults:
        raise ConfigError(str(path), faults)
    return document


def _faults(document: Any) -> Iterator[Fault]:
    if not isinstance(document, dict):
        yield Fault("", "must be a JSON object")
        return
    for key in sorted(document):
        if key in OWNED_BY_YAML:
            yield Fault(key, f"belongs to the YAML ({OWNED_BY_YAML[key]}); remove it here")
        elif key not in ALLOWED:
            yield Fault(key, f"unknown key; {nearest(key, ALLOWED)}")
    zero = document.get("zero_optimization", {})
    if not (isinstance(zero, dict) and zero.get("stage", 0) in range(4)):
        yield Fault("zero_optimization", 'must be an object with a "stage" of 0 to 3')
