"""DeepSpeed's configuration, each rank's share of a batch, and the optimizer."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch.nn import Parameter
from torch.optim import Optimizer

from srepa_ds.errors import TopologyError
from srepa_ds.model.precision import Precision
from srepa_ds.optim.adamw import OptimizerConfig, build_optimizer
from srepa_ds.zero.json_file import load_deepspeed_json, offloads_optimizer, stage_of


def micro_batch_size(batch_size: int, accumulation_steps: int, world_size: int) -> int:
    """Returns the samples per rank and micro step; raises TopologyError unless it is whole."""
    parts = accumulation_steps * world_size
    if batch_size % parts:
        raise TopologyError(
            f"train.batch_size {batch_size} cannot be split over {world_size} ranks x "
            f"{accumulation_steps} accumulation steps; choose a multiple of {parts}"
        )
    return batch_size // parts


def deepspeed_config(
    path: Path,
    *,
    precision: Precision,
    batch_size: int,
    accumulation_steps: int,
    gradient_clipping: float,
    world_size: int,
) -> dict[str, Any]:
    """Returns DeepSpeed's configuration: the JSON at `path` plus the keys that the YAML owns.

    Raises ConfigError for a JSON with faults, and TopologyError as `micro_batch_size` does.
    """
    document = load_deepspeed_json(path)
    document |= {
        "train_micro_batch_size_per_gpu": micro_batch_size(
            batch_size, accumulation_steps, world_size
        ),
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": gradient_clipping,
        # DeepSpeed's own printing and monitors stay silent; the package has its own telemetry.
        "steps_per_print": 1_000_000_000,
        # For a message that is not shown it would wait for the device twice in every micro step,
        # for the teachers' CUDA stream too.
        "timers": {"throughput": {"enabled": False}},
        # The YAML says which AdamW steps offloaded weights.
        "zero_force_ds_cpu_optimizer": False,
    }
    stage = stage_of(document)
    if stage == 3:
        # DeepSpeed's default gives wrong gradients under selective activation checkpointing.
        document["zero_optimization"]["memory_efficient_linear"] = False
    return document | PRECISION_SETTINGS[precision](stage)


def _bf16_settings(stage: int) -> dict[str, Any]:
    # Without the second, micro batches are summed in bf16; stage 0 refuses it.
    data_types = {"data_types": {"grad_accum_dtype": "fp32"}} if stage > 0 else {}
    return {"bf16": {"enabled": True, "check_grad_overflow": True}, **data_types}


def _autocast_settings(stage: int) -> dict[str, Any]:
    # Without the list, the gradients of linear maps and convolutions are reduced in bf16.
    autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return {"torch_autocast": autocast}


PRECISION_SETTINGS: Mapping[Precision, Callable[[int], dict[str, Any]]] = {
    "fp32": lambda stage: {},
    "bf16_autocast": _autocast_settings,
    "bf16": _bf16_settings,
}
"""DeepSpeed's settings for each row of `PRECISIONS`, as a function of the ZeRO stage."""


def build_optimizer_for(
    document: Mapping[str, Any], config: OptimizerConfig, parameters: list[Parameter]
) -> Optimizer:
    """Returns the AdamW that steps `parameters`: torch's, or DeepSpeed's for offloaded weights.

    Raises TopologyError if DeepSpeed's is asked for and cannot be built on this machine.
    """
    if not offloads_optimizer(document) or config.cpu_adam == "torch":
        return build_optimizer(config, parameters)
    try:
        return DeepSpeedCPUAdam(
            parameters,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
        )
    except RuntimeError as error:
        raise TopologyError(
            "optimizer.cpu_adam: deepspeed needs a C++ compiler and ninja to build its kernel "
            f"({error.__cause__ or error}); install them or choose optimizer.cpu_adam=torch"
        ) from error
