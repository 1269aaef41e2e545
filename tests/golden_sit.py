"""The tiny SiT of the reference implementations, whose outputs are stored in `tests/golden`."""

from places import GOLDEN
from safetensors.torch import load_file
from torch import Tensor

from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig

GOLDEN_CONFIG = {
    "variant": "SiT-S/2",
    "input_size": 8,
    "in_channels": 4,
    "num_classes": 10,
    "depth": 4,
    "hidden_size": 64,
    "num_heads": 4,
}


def golden_sit() -> SiT:
    """Returns REPA's model with its stored weights, without the projector's."""
    return _loaded(GOLDEN_CONFIG, "sit_qknorm0")


def golden_reg_sit(**changes) -> SiT:
    """Returns REG's model, which carries class tokens of width 48, with its stored weights."""
    return _loaded(GOLDEN_CONFIG | {"class_token_width": 48} | changes, "reg_sit")


def golden_weights(name: str) -> dict[str, Tensor]:
    """Returns the weights stored in a golden file, under their official names."""
    stored = load_file(GOLDEN / f"{name}.safetensors")
    return {k.removeprefix("param."): v for k, v in stored.items() if k.startswith("param.")}


def _loaded(settings, name) -> SiT:
    weights = golden_weights(name)
    sit = SiT(SiTConfig(**settings))
    sit.load_state_dict({k: v for k, v in weights.items() if not k.startswith("projectors.")})
    return sit
