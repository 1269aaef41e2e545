"""Names of REPA's family, and models that are of no SiT."""

import pytest
import torch
from golden_sit import golden_weights
from original_sit import ORIGINAL

from srepa_ds.errors import CheckpointError
from srepa_ds.weights.foreign.layouts import LAYOUTS
from srepa_ds.weights.foreign.names import official_names
from srepa_ds.weights.foreign.opening import open_foreign

OFFICIAL = list(golden_weights("sit_qknorm1"))


def legacy(name: str) -> str:
    """Aligned after two blocks: the later ones are numbered from zero."""
    for number in (2, 3):
        name = name.replace(f"blocks.{number}.", f"decoder_blocks.{number - 2}.")
    return name


FORMS = {
    "as they are": lambda name: name,
    "data parallel": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "legacy": legacy,
    "legacy in wrappers": lambda name: f"module._orig_mod.{legacy(name)}",
    "iREPA's MLP": lambda name: name.replace("projectors.0.", "projectors.0.projection_layer."),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_official_in_its_own_order(form):
    given = [FORMS[form](name) for name in OFFICIAL]
    found = official_names(given)
    assert list(found) == given
    assert list(found.values()) == OFFICIAL


def test_legacy_names_keep_the_order_that_optimizers_count_by():
    """REPA's early trainer had its projector between the two kinds of blocks."""
    given = ["pos_embed", "blocks.0.w", "blocks.1.w", "projectors.0.0.weight", "decoder_blocks.0.w"]
    assert list(official_names(given).values()) == [
        "pos_embed", "blocks.0.w", "blocks.1.w", "projectors.0.0.weight", "blocks.2.w",
    ]  # fmt: skip


@pytest.mark.parametrize("channels", [3, 4])
def test_latents_that_irepa_may_have_scaled_are_noted(tmp_path, channels):
    state = {
        "x_embedder.proj.weight": torch.zeros(8, channels, 2, 2),
        "projectors.0.projection_layer.0.weight": torch.zeros(8, 8),
    }
    notes = LAYOUTS["repa"].convert(state, tmp_path).notes
    assert ["codec.scale and codec.shift must be" in note for note in notes] == (
        [True] if channels == 4 else []
    )


def test_layers_of_irepa_that_are_no_mlp_keep_their_names():
    given = ["projectors.0.projection_layer.weight", "projectors.1.projection_layer.bias"]
    assert official_names(given) == {name: name for name in given}


def test_class_tokens_of_reg_keep_their_names():
    given = list(golden_weights("reg_sit"))
    assert list(official_names(given).values()) == given


def test_two_that_become_the_same_are_named(tmp_path):
    given = ["blocks.0.w", "blocks.1.w", "blocks.3.w", "decoder_blocks.0.w"]
    with pytest.raises(ValueError, match=r"'blocks.3.w' and 'decoder_blocks.0.w' are both"):
        official_names(given)
    torch.save({name: torch.ones(1) for name in given}, tmp_path / "both.pt")
    with pytest.raises(CheckpointError, match=r"both.pt: '.*' are both blocks.3.w; keep one"):
        open_foreign(tmp_path / "both.pt")


WIDTH = len(ORIGINAL["x_embedder.proj.bias"])
OTHERS = {
    "rotary": ("feat_rope.freqs_cos", (16, 8), "a rotary position embedding, as in the released"),
    "gated": ("blocks.0.mlp.w12.weight", (8, WIDTH), r"a gated MLP \(SwiGLU\)"),
    "weighted norm": ("blocks.1.norm1.weight", (WIDTH,), r"a norm with weights \(RMSNorm\)"),
    "last norm": ("final_layer.norm_final.weight", (WIDTH,), "a norm with weights"),
    "no shift": (
        "blocks.0.adaLN_modulation.1.weight",
        (4 * WIDTH, WIDTH),
        r"a modulation without shifts \(wo_shift\), as in the released models of LightningDiT",
    ),
    "SRA": ("ap_head.0.weight", (8, 8), "SRA's head of the alignment"),
    "Internal Guidance": ("final_layer_xr.linear.weight", (8, 8), "second final layer"),
}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("other", OTHERS)
def test_the_tensor_that_no_sit_has_is_named(tmp_path, other, prefix):
    name, shape, words = OTHERS[other]
    state = {prefix + key: value for key, value in {**ORIGINAL, name: torch.ones(shape)}.items()}
    torch.save({"ema": state, "model": state}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=f"other.pt is of no SiT: '{name}' is .*{words}"):
        open_foreign(tmp_path / "other.pt")


def test_anything_else_is_named(tmp_path):
    state = {f"in_blocks.{n}.attn.qkv.weight": torch.ones(2, 2) for n in range(7)}
    torch.save({**state, "mid_block.norm1.bias": torch.ones(2)}, tmp_path / "uvit.pt")
    with pytest.raises(
        CheckpointError, match=r"these names are of no SiT: in_blocks\.0\..* and 3 more; give"
    ):
        open_foreign(tmp_path / "uvit.pt")
