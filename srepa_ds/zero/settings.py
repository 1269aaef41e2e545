"""What DeepSpeed is told: each rank's share of a batch, its configuration, and its optimizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch.nn import Parameter
from torch.optim import Optimizer

from srepa_ds.errors import TopologyError
from srepa_ds.optim.adamw import OptimizerConfig, build_optimizer
from srepa_ds.zero.json_file import load_deepspeed_json, offloads_optimizer, stage_of


def micro_batch_size(batch_size: int, accumulation_steps: int, world_size: int) -> int:
    """Returns the samples per rank and micro step; raises TopologyError if not a whole number."""
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
    precision: str,
    batch_size: int,
    accumulation_steps: int,
    gradient_clipping: float,
    world_size: int,
) -> dict[str, Any]:
    """Returns DeepSpeed's configuration: the JSON at `path` plus what the YAML owns.

    Raises ConfigError for a JSON with faults, and what `micro_batch_size` does.
    """
    document = load_deepspeed_json(path)
    document |= {
        "train_micro_batch_size_per_gpu": micro_batch_size(
            batch_size, accumulation_steps, world_size
        ),
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": gradient_clipping,
        # DeepSpeed's own printing and its monitors stay silent; telemetry is ours.
        "steps_per_print": 1_000_000_000,
        # For a message that nobody sees it would wait for the device twice in every micro step,
        # for the teachers' stream too.
        "timers": {"throughput": {"enabled": False}},
        # Which AdamW steps offloaded weights the YAML says.
        "zero_force_ds_cpu_optimizer": False,
    }
    stage = stage_of(document)
    if stage == 3:
        # DeepSpeed's default gives wrong gradients under selective activation checkpointing.
        document["zero_optimization"]["memory_efficient_linear"] = False
    return document | _arithmetic(precision, stage)


def _arithmetic(precision: str, stage: int) -> dict[str, Any]:
    """Returns DeepSpeed's settings for a precision."""
    if precision == "bf16":
        # Without the second, micro batches are summed in bf16; stage 0 refuses it.
        data_types = {"data_types": {"grad_accum_dtype": "fp32"}} if stage > 0 else {}
        return {"bf16": {"enabled": True, "check_grad_overflow": True}, **data_types}
    if precision == "bf16_autocast":
        # An absent list would mean: reduce the gradients of linear maps and convolutions in bf16.
        autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        return {"torch_autocast": autocast}
    return {}


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
