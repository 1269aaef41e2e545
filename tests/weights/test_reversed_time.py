"""Time turned round within the weights."""

import torch
from golden_sit import golden_original_sit
from places import GOLDEN
from safetensors.torch import load_file

from srepa_ds.weights.reversed_time import reversed_time


def test_the_velocity_is_that_of_the_other_direction():
    stored = load_file(GOLDEN / "sit_original.safetensors")
    model = golden_original_sit()
    model.load_state_dict(dict(reversed_time(model.state_dict())))
    with torch.no_grad():
        found = model(stored["in.x"], stored["in.t"], stored["in.y"]).velocity
    torch.testing.assert_close(found, stored["out.v_converted"], rtol=1e-5, atol=1e-5)


def test_it_is_its_own_inverse():
    state = golden_original_sit().state_dict()
    twice = reversed_time(reversed_time(state))
    for name, value in state.items():
        torch.testing.assert_close(twice[name], value, rtol=0, atol=1e-7)


def test_only_three_weights_change():
    state = golden_original_sit().state_dict()
    turned = reversed_time(state)
    changed = {name for name, value in state.items() if not torch.equal(turned[name], value)}
    assert changed == {
        "t_embedder.mlp.0.weight",
        "final_layer.linear.weight",
        "final_layer.linear.bias",
    }
