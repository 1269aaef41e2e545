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


def golden_original_sit() -> SiT:
    """Returns the first SiT's model, with the half of its outputs that is no learned sigma.

    Its time runs the other way, which changes nothing in the arithmetic of one call.
    """
    weights = golden_weights("sit_original")
    stored = load_file(GOLDEN / "sit_original.safetensors")
    hidden_size, channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    settings = {
        "variant": "SiT-S/2",
        "input_size": stored["in.x"].shape[-1],
        "in_channels": channels,
        "num_classes": len(weights["y_embedder.embedding_table.weight"]) - 1,
        "depth": depth,
        "hidden_size": hidden_size,
        "num_heads": int(stored["num_heads"]),
        "patch_size": patch_size,
    }
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        both = weights[name].unflatten(0, (patch_size**2, 2, channels))
        weights[name] = both[:, 0].flatten(0, 1).contiguous()
    sit = SiT(SiTConfig(**settings))
    sit.load_state_dict(weights)
    return sit


def golden_weights(name: str) -> dict[str, Tensor]:
    """Returns the weights stored in a golden file, under their official names."""
    stored = load_file(GOLDEN / f"{name}.safetensors")
    return {k.removeprefix("param."): v for k, v in stored.items() if k.startswith("param.")}


def _loaded(settings, name) -> SiT:
    weights = golden_weights(name)
    sit = SiT(SiTConfig(**settings))
    sit.load_state_dict({k: v for k, v in weights.items() if not k.startswith("projectors.")})
    return sit
