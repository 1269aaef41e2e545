"""The reference implementations' tiny SiT and REG's, whose outputs are stored in `tests/golden`."""

from places import GOLDEN
from safetensors.torch import load_file

from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig


def golden_sit() -> SiT:
    """Returns the model with its stored weights; the projector's are left out."""
    return _loaded(_CONFIG, "sit_qknorm0")


def golden_reg_sit(**changes) -> SiT:
    """Returns REG's model likewise: class tokens of width 48 go through it."""
    return _loaded(_CONFIG | {"class_token_width": 48} | changes, "reg_sit")


_CONFIG = {
    "variant": "SiT-S/2",
    "input_size": 8,
    "in_channels": 4,
    "num_classes": 10,
    "depth": 4,
    "hidden_size": 64,
    "num_heads": 4,
}


def _loaded(settings, name) -> SiT:
    stored = load_file(GOLDEN / f"{name}.safetensors")
    weights = {k.removeprefix("param."): v for k, v in stored.items() if k.startswith("param.")}
    sit = SiT(SiTConfig(**settings))
    sit.load_state_dict({k: v for k, v in weights.items() if not k.startswith("projectors.")})
    return sit
