"""The original SiT: learned sigma, time, and everything that says which convention a file has."""

import pytest
import torch
from original_sit import LAST, ORIGINAL, STORED, assert_golden, sizes, without_sigma
from safetensors.torch import save_file

from srepa_ds.errors import CheckpointError
from srepa_ds.interpolant import INTERPOLANTS
from srepa_ds.model.sit import SiT, fixed_position_embedding
from srepa_ds.sampling.guidance import Guidance, GuidedModel
from srepa_ds.sampling.solvers import Dynamics, integrate
from srepa_ds.sampling.state import StateLayout, state_velocity
from srepa_ds.weights.foreign.opening import open_foreign
from srepa_ds.weights.lazy import LazyTensors

SIGMA, TIME, DIT = "the learned sigma is left out", "time is reversed, exactly", "SiT and of DiT"


def opened(path, state=ORIGINAL, **options):
    torch.save(state, path)
    return open_foreign(path, **options)


def test_a_bare_file_has_the_velocity_of_repas_convention(tmp_path):
    save_file(ORIGINAL, tmp_path / "SiT-XL-2-256x256.safetensors")
    found = open_foreign(tmp_path / "SiT-XL-2-256x256.safetensors")
    assert (found.layout, list(found.weights)) == ("sit", ["model"])
    assert_golden(found.weights["model"])
    assert list(found.weights["model"]) == [name for name in ORIGINAL if name != "pos_embed"]
    assert [any(words in note for note in found.notes) for words in (SIGMA, TIME, DIT)] == [
        True
    ] * 3


def test_a_file_of_its_trainer(tmp_path):
    args = {"model": "SiT-XL/2", "image_size": 256, "path_type": "Linear"}
    other = {name: v if name == "pos_embed" else v + 1 for name, v in ORIGINAL.items()}
    content = {"model": other, "ema": ORIGINAL, "opt": {"state": {}}, "args": args}
    found = opened(tmp_path / "0400000.pt", content)
    assert_golden(found.weights["ema"])
    assert not torch.equal(found.weights["model"][LAST[1]], found.weights["ema"][LAST[1]])
    assert found.settings == args
    assert found.optimizer is None
    assert any("the optimizer's state is left out" in note for note in found.notes)
    assert not any(DIT in note for note in found.notes)


TOLD = {
    "sampler's": ({"learn_sigma": False}, None),
    "LightningDiT's": ({"model": {"model_type": "LightningDiT-XL/1"}}, None),
    "nothing": ({}, "sit"),
}


@pytest.mark.parametrize("told", TOLD)
def test_without_learned_sigma_only_settings_tell(tmp_path, told):
    settings, layout = TOLD[told]
    content = {"ema": without_sigma(), "config": settings}
    found = opened(tmp_path / "sit.pt", content, layout=layout)
    is_noted = any("scales each channel of its latents" in note for note in found.notes)
    assert is_noted == (told == "LightningDiT's")
    assert found.layout == "sit"
    assert_golden(found.weights["ema"])
    assert not any(SIGMA in note for note in found.notes)


@pytest.mark.parametrize(
    "settings", [{}, {"model": "SiT-B/2"}, {"learn_sigma": False, "enc_type": "dinov2-vit-b"}]
)
def test_what_is_not_told_is_of_repa(tmp_path, settings):
    found = opened(tmp_path / "last.pt", {"ema": without_sigma(), "args": settings})
    assert found.layout == "repa"
    assert torch.equal(found.weights["ema"][LAST[0]], without_sigma()[LAST[0]])


def test_a_dit_that_says_so_is_refused(tmp_path):
    content = {"ema": ORIGINAL, "args": {"model": "DiT-XL/2"}}
    for layout in (None, "sit", "repa"):
        with pytest.raises(CheckpointError, match="is of DiT-XL/2, which predicts noise"):
            opened(tmp_path / "dit.pt", content, layout=layout)


@pytest.mark.parametrize("name", [*LAST, "t_embedder.mlp.0.weight"])
@pytest.mark.parametrize("damage", ["missing", "of another shape"])
def test_what_cannot_be_turned_is_named(tmp_path, name, damage):
    state = dict(ORIGINAL)
    value = state.pop(name)
    if damage != "missing":
        state[name] = value.flatten()[:7]
    with pytest.raises(CheckpointError, match=r"is of no SiT: .* three weights, .*" + name):
        opened(tmp_path / "sit.pt", state, layout="sit")


def test_half_precision_is_not_rounded_again(tmp_path):
    halved = {name: value.bfloat16() for name, value in ORIGINAL.items()}
    found = opened(tmp_path / "half.pt", halved).weights["model"]
    exact = opened(tmp_path / "whole.pt", {n: v.float() for n, v in halved.items()})
    for name, value in exact.weights["model"].items():
        torch.testing.assert_close(found[name].float(), value, rtol=0, atol=0)
    # Only what changed is wider than the file.
    assert {value.dtype for value in found.values()} == {torch.float32, torch.bfloat16}
    assert found["blocks.0.attn.qkv.weight"].dtype == torch.bfloat16


def test_tensors_are_converted_when_they_are_read(tmp_path):
    weights = opened(tmp_path / "sit.pt").weights["model"]
    assert isinstance(weights, LazyTensors)
    assert weights.shapes[LAST[0]] == (len(ORIGINAL[LAST[0]]) // 2, sizes().shape.hidden_size)
    assert weights[LAST[0]] is not weights[LAST[0]]


def no_noise(step):
    raise AssertionError("an ODE solver asked for noise")


@pytest.mark.parametrize(
    ("case", "solver", "guidance"),
    [
        ("euler", "euler", Guidance()),
        ("euler_cfg2.5", "euler", Guidance(2.5, channels=3)),
        ("sde_euler_mean", "euler_maruyama", Guidance()),
    ],
)
@torch.no_grad()
def test_it_draws_what_the_original_sampler_draws(tmp_path, case, solver, guidance):
    model = SiT(sizes())
    weights = opened(tmp_path / "sit.pt").weights["model"]
    model.load_state_dict({**weights, "pos_embed": fixed_position_embedding(sizes())})
    layout, labels = StateLayout.of(sizes()), STORED["sample.y"]
    guided = GuidedModel(
        state_velocity(model),
        labels,
        sizes().null_label,
        guidance,
        scales=layout.guidance_scales(guidance),
    )
    draws = STORED["sample.sde_noise"]
    is_ode = solver == "euler"
    noise = no_noise if is_ode else lambda step: layout.pack(draws[step]).double()
    points = int(STORED["sample.num_steps"])
    end = integrate(
        Dynamics(guided, INTERPOLANTS["linear"].score, noise),
        layout.pack(STORED["sample.start"]),
        solver=solver,
        num_steps=points - 1 if is_ode else points,
    )
    latents, _ = layout.unpack(end)
    torch.testing.assert_close(latents.float(), STORED[f"sample.{case}"], rtol=1e-4, atol=1e-4)
