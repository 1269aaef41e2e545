"""Sizes by the shapes of weights."""

import pytest
import torch
from builders import objective_of

from srepa_ds.config.experiment import load_config
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SIT_VARIANTS, SiTConfig
from srepa_ds.objective import official_name
from srepa_ds.weights.foreign.sizes import sizes_of


def shapes_of_model(**settings) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in SiT(SiTConfig(**settings)).named_parameters()}


@pytest.mark.parametrize("variant", SIT_VARIANTS)
def test_each_variant_is_recognised(variant):
    settings = {"variant": variant, "input_size": 32, "in_channels": 4, "num_classes": 1000}
    found = sizes_of(shapes_of_model(**settings))
    shape = SIT_VARIANTS[variant]
    assert (found.depth, found.hidden_size, found.patch_size) == (
        shape.depth, shape.hidden_size, shape.patch_size,
    )  # fmt: skip
    assert found.variant == variant
    assert (found.in_channels, found.num_classes) == (4, 1000)
    assert (found.qk_norm, found.class_token_width, found.projectors) == (False, None, ())
    assert found.input_size(SiTConfig(**settings).num_tokens) == 32


def test_further_parts_are_recognised():
    settings = {
        "variant": "SiT-S/4", "input_size": 16, "in_channels": 3, "num_classes": 7, "depth": 2,
        "qk_norm": True, "class_token_width": 24,
    }  # fmt: skip
    found = sizes_of(shapes_of_model(**settings))
    assert (found.qk_norm, found.class_token_width, found.variant) == (True, 24, None)
    # One position is the class token's.
    assert (found.input_size(17), found.input_size(16), found.input_size(1)) == (16, None, None)
    assert found.input_size(0) is None


@pytest.mark.parametrize(
    "settings",
    [{"kind": "mlp", "hidden_width": 40}, {"kind": "conv", "kernel": 5}, {"kind": "linear"}],
)
def test_each_projector_is_recognised(small_world, settings):
    config = load_config(small_world.config, [f"alignments.0.projector={settings}"])
    with torch.device("meta"):
        objective = objective_of(config)
    shapes = {official_name(name): tuple(p.shape) for name, p in objective.named_parameters()}
    (found,) = sizes_of(shapes).projectors
    assert (dict(found.settings), found.width) == (settings, 32)


@pytest.mark.parametrize("name", ["x_embedder.proj.weight", "y_embedder.embedding_table.weight"])
def test_what_is_of_no_sit_is_named(name):
    shapes = shapes_of_model(variant="SiT-Ti/2", input_size=4, in_channels=1, num_classes=2)
    for changed in ({k: v for k, v in shapes.items() if k != name}, {**shapes, name: (3,)}):
        with pytest.raises(LookupError, match=name):
            sizes_of(changed)
