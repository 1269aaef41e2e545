"""Models that look like SiT and are not: each is named by the tensor that shows it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srepa_ds.errors import CheckpointError, listed
from srepa_ds.weights.foreign.names import is_official
from srepa_ds.weights.foreign.sit import model_in

Shapes = Mapping[str, tuple[int, ...]]

_LIGHTNINGDIT = "as in the released models of LightningDiT: no SiT can hold it"
_OTHER_PARTS: tuple[tuple[str, str], ...] = (
    (r"feat_rope\.", f"a rotary position embedding, {_LIGHTNINGDIT}"),
    (r"blocks\.\d+\.mlp\.w12\.", f"a gated MLP (SwiGLU), {_LIGHTNINGDIT}"),
    (r"blocks\.\d+\.norm[12]\.weight", f"a norm with weights (RMSNorm), {_LIGHTNINGDIT}"),
    (r"final_layer\.norm_final\.weight", f"a norm with weights (RMSNorm), {_LIGHTNINGDIT}"),
    (r"ap_head\.", "SRA's head of the alignment with its own average, which is not here"),
    (r"final_layer_xr\.", "Internal Guidance's second final layer, which is not here"),
)
_MODULATION = re.compile(r"blocks\.\d+\.adaLN_modulation\.1\.weight")
_ROWS_OF_SHIFTLESS = 4


def check_is_sit(shapes: Shapes, settings: Mapping[str, Any], path: Path) -> None:
    """Raises CheckpointError if weights are of another architecture, with the tensor that says so.

    `shapes` are those of the weights without wrappers around their names. Only `settings` tell a
    DiT from a SiT.
    """
    if (model := model_in(settings)).startswith("DiT"):
        raise CheckpointError(
            f"{path} is of {model[:40]}, which predicts noise, not a velocity; give weights of SiT "
            "or REPA"
        )
    for pattern, reason in _OTHER_PARTS:
        if found := next((name for name in shapes if re.match(pattern, name)), None):
            raise CheckpointError(f"{path} is of no SiT: '{found}' is {reason}")
    for name, shape in shapes.items():
        is_shiftless = len(shape) == 2 and shape[0] == _ROWS_OF_SHIFTLESS * shape[1]
        if is_shiftless and _MODULATION.fullmatch(name):
            raise CheckpointError(
                f"{path} is of no SiT: '{name}' is {shape}, a modulation without shifts "
                f"(wo_shift), {_LIGHTNINGDIT}"
            )
    if unknown := [name for name in shapes if not is_official(name)]:
        raise CheckpointError(
            f"{path}: these names are of no SiT: {listed(unknown)}; give weights of SiT, REPA, "
            "iREPA or REG"
        )
