"""Runs of REPA, REG and iREPA, imported in the middle, end where their own trainers end."""

import json

import pytest
import torch
from foreign_runs import exported_as_repa
from golden_sit import GOLDEN_CONFIG, golden_weights
from places import GOLDEN, ROOT
from ranks import run_worker
from repa_trainer import PlainTrainer, in_order, save_inputs
from safetensors.torch import load_file

from srepa_ds.cli import run as command
from srepa_ds.model.variants import SiTConfig

BEFORE, STEPS = 3, 6
TEACHER = {
    "spec": {
        "architecture": "vit_tiny_patch16_224",
        "width": 48,
        "patch_size": 16,
        "input_size": 64,
    },
    "weights": "unused.safetensors",
}
OVERRIDES = ["model.num_heads=4", "ema.decay=0.99"]
ALIGNED = [*OVERRIDES, f"alignments.0.teacher={json.dumps(TEACHER)}"]
MSE = "alignments.0.structural={kind: mse, weight: 2.0}"
GOLDEN_MODES = {
    "sit": ({}, OVERRIDES),
    "repa": ({"pointwise": 0.5}, ALIGNED),
    "srepa_mse": ({"pointwise": 1.0, "mse": 2.0}, [*ALIGNED, MSE]),
    "srepa_kl": (
        {"pointwise": 1.0, "kl": 0.5},
        [*ALIGNED, "alignments.0.structural={kind: kl, weight: 0.5}"],
    ),
}
# Columns of the log, as in test_trajectory.py.
COLUMNS = {"sit": [0, 3, 4], "repa": [0, 1, 3, 4]}
QUICK = [(0, 1), (2, 2)]
SLOW = [
    pytest.param(pair, marks=pytest.mark.slow)
    for pair in [(0, 2), (1, 1), (1, 2), (2, 1), (3, 1), (3, 2)]
]


def trainer(name: str) -> tuple[PlainTrainer, list[str]]:
    """Returns the plain loop of a method, and the overrides that its import needs here."""
    if name == "reg":
        state = in_order(golden_weights("reg_sit"))
        sizes = SiTConfig(**GOLDEN_CONFIG, class_token_width=48)
        return PlainTrainer(
            state, sizes, pointwise=0.5, cls=0.03, ema_decay=0.99, arguments={"cls": 0.03}
        ), ALIGNED
    state = in_order(golden_weights("sit_qknorm0"))
    sizes = SiTConfig(**GOLDEN_CONFIG)
    if name == "irepa":
        state = {k: v for k, v in state.items() if not k.startswith("projectors.")}
        generator = torch.Generator().manual_seed(1)
        state["projectors.0.projection_layer.weight"] = 0.1 * torch.randn(
            48, 64, 3, 3, generator=generator
        )
        state["projectors.0.projection_layer.bias"] = torch.zeros(48)
        arguments = {
            "projection_layer_type": "conv", "projection_loss_type": "cosine",
            "proj_coeff": "1.0", "spnorm_method": "zscore", "zscore_alpha": 0.6,
            "repa_loss": True, "ema_decay": 0.99, "ema_update_freq": 1,
        }  # fmt: skip
        return PlainTrainer(
            in_order(state), sizes, pointwise=1.0, gamma=0.6, ema_decay=0.99, arguments=arguments
        ), [*ALIGNED, "codec.scale=[1, 2, 3, 4]", "codec.shift=0"]
    terms, overrides = GOLDEN_MODES["repa" if name == "repa_then_srepa" else name]
    if not terms:
        state = {k: v for k, v in state.items() if not k.startswith("projectors.")}
    arguments = {} if terms else {"enc_type": "None"}
    plain = PlainTrainer(state, sizes, **terms, ema_decay=0.99, arguments=arguments)
    return plain, [*overrides, MSE] if name == "repa_then_srepa" else overrides


def inputs_of(name: str) -> list[dict[str, torch.Tensor]]:
    """Returns the golden inputs of each step; REG's with class tokens and their noise."""
    data = load_file(GOLDEN / "trajectory.safetensors")
    keys = ("x", "y", "t", "eps", "z0")
    steps = [{key: data[f"in.{key}"][step] for key in keys} for step in range(STEPS)]
    if name == "reg":
        generator = torch.Generator().manual_seed(2)
        for step in steps:
            for key in ("cls", "cls_eps"):
                step[key] = torch.randn(4, 48, generator=generator)
    return steps


NAMES = (*GOLDEN_MODES, "repa_then_srepa", "reg", "irepa")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory):
    """Returns the folder of all imported runs, and the logs and ends of the plain loops."""
    folder = tmp_path_factory.mktemp("continued")
    logs, ends = {}, {}
    for name in NAMES:
        loop, overrides = trainer(name)
        steps, place = inputs_of(name), folder / name
        place.mkdir()
        log = [loop.step(inputs) for inputs in steps[:BEFORE]]
        file = loop.save(place / f"{BEFORE:07d}.pt")
        assert command(["import", str(file), str(place / "run"), *overrides]) == 0
        if name == "repa_then_srepa":
            loop.mse = 2.0
        log += [loop.step(inputs) for inputs in steps[BEFORE:]]
        save_inputs(place / "inputs.safetensors", steps[BEFORE:])
        logs[name], ends[name] = torch.stack(log), loop
    return folder, logs, ends


@pytest.fixture(scope="module", params=QUICK + SLOW, ids=str)
def continued(request: pytest.FixtureRequest, plain, tmp_path_factory: pytest.TempPathFactory):
    stage, world_size = request.param
    output = tmp_path_factory.mktemp("continued") / "result.safetensors"
    run_worker("continued", world_size, ROOT / f"ds_configs/zero{stage}.json", output, plain[0])
    return load_file(output)


@pytest.mark.parametrize("mode", GOLDEN_MODES)
def test_the_plain_loop_is_the_references(plain, mode):
    golden = load_file(GOLDEN / "trajectory.safetensors")
    columns = COLUMNS.get(mode, [0, 1, 2, 3, 4])
    torch.testing.assert_close(
        plain[1][mode][:, columns], golden[f"{mode}.log"][:, columns], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", NAMES)
def test_each_step_is_that_of_the_uninterrupted_loop(plain, continued, name):
    expected, found = plain[1][name][BEFORE:], continued[f"{name}/log"]
    columns = COLUMNS.get(name, [0, 1, 2, 3, 4])
    torch.testing.assert_close(found[:, columns], expected[:, columns], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_end_is_that_of_the_uninterrupted_loop(plain, continued, name):
    loop = plain[2][name]
    moments = {
        name: loop.optimizer.state[weight]
        for name, weight in loop.weights.items() if weight.requires_grad
    }  # fmt: skip
    for weight, state in moments.items():
        expected = {"master": loop.weights[weight], "ema": loop.ema[weight], **state}
        for kind in ("master", "ema", "exp_avg", "exp_avg_sq"):
            found, wanted = continued[f"{name}/{kind}/{weight}"], expected[kind]
            assert (found - wanted).norm() < 1e-4 * wanted.norm(), (kind, weight)
    assert len([key for key in continued if key.startswith(f"{name}/master/")]) == len(moments)


@pytest.mark.parametrize("mode", GOLDEN_MODES)
def test_it_ends_where_the_reference_trainer_ends(continued, mode):
    golden = load_file(GOLDEN / "trajectory.safetensors")
    columns = COLUMNS.get(mode, [0, 1, 2, 3, 4])
    log, expected = continued[f"{mode}/log"], golden[f"{mode}.log"][BEFORE:]
    torch.testing.assert_close(log[:, columns], expected[:, columns], rtol=1e-4, atol=1e-6)
    compared = 0
    for key, value in golden.items():
        for kind, ours in (("param", "master"), ("ema", "ema")):
            own = f"{mode}/{ours}/{key.removeprefix(f'{mode}.{kind}.')}"
            if key.startswith(f"{mode}.{kind}.") and own in continued:
                assert (continued[own] - value).norm() < 1e-4 * value.norm(), key
                compared += 1
    assert compared == (12 if mode == "sit" else 14)


@pytest.mark.parametrize("name", NAMES)
def test_the_file_comes_back_to_the_bit(plain, tmp_path, name):
    place = plain[0] / name
    source = place / f"{BEFORE:07d}.pt"
    again = exported_as_repa(place / "run" / "config.yaml", tmp_path / "back")
    assert again.name == source.name
    back, there = (torch.load(path, weights_only=False) for path in (again, source))
    for kind in ("model", "ema"):
        assert list(back[kind]) == list(there[kind])
        # An average of this constant is rounded a little at each step; here it is computed.
        drift = back[kind].pop("pos_embed") - there[kind].pop("pos_embed")
        assert drift.abs().max() <= (0 if kind == "model" else 1e-6)
        assert [n for n, v in there[kind].items() if not torch.equal(back[kind][n], v)] == []
    assert back["opt"]["state"].keys() == there["opt"]["state"].keys()
    for number, state in there["opt"]["state"].items():
        for key, value in state.items():
            assert torch.equal(back["opt"]["state"][number][key], value), (number, key)
    ours, theirs = (found["opt"]["param_groups"][0] for found in (back, there))
    for key in ("lr", "betas", "eps", "weight_decay", "params"):
        assert ours[key] == theirs[key], key
    assert back["steps"] == there["steps"] == BEFORE
    for key in (
        "batch_size",
        "max_train_steps",
        "path_type",
        "encoder_depth",
        "seed",
        "resolution",
    ):
        assert name == "sit" or getattr(back["args"], key) == getattr(there["args"], key), key
