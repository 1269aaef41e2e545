"""The settings that REPA's trainer keeps with its weights, of a run's configuration."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srepa_ds.alignment.alignment import AlignmentConfig
from srepa_ds.encoders.table import TEACHERS
from srepa_ds.model.variants import SIT_VARIANTS, SiTConfig
from srepa_ds.objective import ObjectiveConfig
from srepa_ds.optim.adamw import OptimizerConfig
from srepa_ds.schema import validated
from srepa_ds.weights.ownership import run_of
from srepa_ds.weights.repa_names import TrainedModel

_PIXELS_PER_LATENT = 8
_OWN_SPELLING = {"clip-vit-l": "clip-vit-L"}


def args_of(config: Mapping[str, Any], model: TrainedModel, *, source: Path) -> Namespace:
    """Returns the arguments with which REPA's, REG's or iREPA's trainer would train such a run.

    What those trainers do not have (structural terms, schedules, further averages) is left out.
    Raises ConfigError about `source`.
    """
    objective = validated(ObjectiveConfig, config["objective"], source=f"{source}: objective")
    optimizer = validated(OptimizerConfig, config["optimizer"], source=f"{source}: optimizer")
    train = config["train"]
    place = Path(config["run"]["folder"])
    return Namespace(
        output_dir=str(place.parent),
        exp_name=place.name,
        # Not theirs: tells this run from others of the same name.
        run_id=run_of(config),
        **_of_model(model.sizes),
        **_of_alignments(model),
        path_type=objective.interpolant.path,
        prediction="v",
        weighting=objective.interpolant.time_weighting,
        cfg_prob=objective.label_dropout,
        legacy=False,
        **({} if model.sizes.class_token_width is None else {"cls": objective.cls_weight}),
        # Theirs is that of a micro step, over all processes.
        batch_size=train["batch_size"] // train["accumulation_steps"],
        max_train_steps=train["steps"],
        gradient_accumulation_steps=train["accumulation_steps"],
        mixed_precision="no" if config["engine"]["precision"] == "fp32" else "bf16",
        **_of_optimizer(optimizer),
        # REPA's and REG's trainers do not read it: theirs is 0.9999.
        ema_decay=config["ema"]["decay"],
        seed=config["run"]["seed"],
    )


def _of_model(sizes: SiTConfig) -> dict[str, Any]:
    same = (name for name, shape in SIT_VARIANTS.items() if shape == sizes.shape)
    return {
        "model": next(same, sizes.variant),
        "num_classes": sizes.num_classes,
        "resolution": sizes.latent_shape[1] * _PIXELS_PER_LATENT,
        "qk_norm": sizes.qk_norm,
        "fused_attn": True,
    }


def _of_alignments(model: TrainedModel) -> dict[str, Any]:
    if not model.alignments:
        return {"enc_type": "None", "encoder_depth": model.sizes.shape.depth, "proj_coeff": 0.0}
    first = model.alignments[0]
    coefficient = first.pointwise.weight if first.pointwise else 0.0
    found = {
        "enc_type": ",".join(map(_encoder_of, model.alignments)),
        "encoder_depth": first.depth,
        "proj_coeff": coefficient,
    }
    if not model.is_of_irepa:
        return found
    found |= {"proj_coeff": str(coefficient), "projection_loss_type": "cosine"}
    # Without the first, iREPA's trainer aligns nothing.
    found |= {"repa_loss": True, "projection_layer_type": first.projector.kind}
    if first.projector.kind == "conv":
        found |= {"proj_kwargs_kernel_size": first.projector.kernel}
    if first.spatial_norm is None:
        return found | {"spnorm_method": "none"}
    return found | {"spnorm_method": "zscore", "zscore_alpha": first.spatial_norm.gamma}


def _encoder_of(alignment: AlignmentConfig) -> str:
    teacher = alignment.teacher
    name = teacher.name or next(
        (name for name, spec in TEACHERS.items() if spec == teacher.spec),
        teacher.resolved.architecture,
    )
    return _OWN_SPELLING.get(name, name)


def _of_optimizer(optimizer: OptimizerConfig) -> dict[str, Any]:
    return {
        "learning_rate": optimizer.learning_rate,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_weight_decay": optimizer.weight_decay,
        "adam_epsilon": optimizer.epsilon,
        "max_grad_norm": optimizer.gradient_clipping,
    }
