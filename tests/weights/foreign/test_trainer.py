"""The optimizer's state and the step in the files of REPA's trainers."""

from pathlib import Path

import pytest
import torch
from golden_sit import GOLDEN_CONFIG, golden_weights
from repa_trainer import PlainTrainer, in_order
from torch import Tensor

from srepa_ds.errors import CheckpointError
from srepa_ds.model.variants import SiTConfig
from srepa_ds.weights.foreign.opening import open_foreign

SIZES = {**GOLDEN_CONFIG, "depth": 3}


def trained(*, steps: int = 1) -> PlainTrainer:
    """Returns a loop after some steps of a small model."""
    state = in_order(golden_weights("sit_qknorm0"))
    state = {name: value for name, value in state.items() if not name.startswith("blocks.3.")}
    loop = PlainTrainer(state, SiTConfig(**SIZES), pointwise=0.5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x, eps = torch.randn(2, 2, 4, 8, 8, generator=generator)
        z0 = torch.randn(2, 16, 48, generator=generator)
        t = torch.rand(2, generator=generator)
        loop.step({"x": x, "eps": eps, "t": t, "y": torch.tensor([1, 10]), "z0": z0})
    return loop


@pytest.fixture(scope="module")
def loop() -> PlainTrainer:
    return trained(steps=2)


def moments(loop: PlainTrainer, key: str) -> dict[str, Tensor]:
    """Returns one of the moments of each weight that has one."""
    state = loop.optimizer.state
    return {name: state[w][key] for name, w in loop.weights.items() if w in state}


def renamed(state: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    """Returns weights, in their order, under the names that a release has given them."""
    replace = {
        "as today": lambda name: name,
        "legacy": lambda name: name.replace("blocks.2.", "decoder_blocks.0."),
        "iREPA": lambda name: name.replace("projectors.0.", "projectors.0.projection_layer."),
        "wrapped": lambda name: f"module._orig_mod.{name}",
    }[form]
    return {replace(name): value.detach() for name, value in state.items()}


@pytest.mark.parametrize("form", ["as today", "legacy", "iREPA", "wrapped"])
def test_each_moment_is_that_of_its_weight(loop, tmp_path, form):
    own = renamed(loop.weights, form)
    file = loop.save(tmp_path / "weights.pt", model=own, ema=renamed(loop.ema, form))
    found = open_foreign(file, with_optimizer=True)
    assert (found.step, found.optimizer.step) == (2, 2)
    assert found.positions.shape == (1, 16, 64)
    for key in ("exp_avg", "exp_avg_sq"):
        mapped, expected = getattr(found.optimizer, key), moments(loop, key)
        assert mapped.keys() == expected.keys() == found.weights["model"].keys()
        assert all(torch.equal(mapped[name], expected[name]) for name in expected)
    settings = found.optimizer.settings
    assert settings == {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def test_it_is_read_only_where_it_is_wanted(loop, tmp_path):
    broken = {"state": {0: 1}, "param_groups": []}
    file = loop.save(tmp_path / "weights.pt", opt=broken)
    assert open_foreign(file).optimizer is None
    with pytest.raises(CheckpointError, match="0 groups of weights, and one is expected"):
        open_foreign(file, with_optimizer=True)


@pytest.mark.parametrize("changes", [{"opt": None}, {"model": None}])
def test_without_a_model_or_a_state_there_is_none(loop, tmp_path, changes):
    file = loop.save(tmp_path / "weights.pt", **changes)
    assert open_foreign(file, with_optimizer=True).optimizer is None


def test_an_optimizer_before_its_first_step_has_no_state(tmp_path):
    file = trained(steps=0).save(tmp_path / "weights.pt")
    assert open_foreign(file, with_optimizer=True).optimizer is None


def test_a_skipped_step_counts_for_the_trainer_alone(loop, tmp_path):
    found = open_foreign(loop.save(tmp_path / "weights.pt", steps=9), with_optimizer=True)
    assert (found.step, found.optimizer.step) == (9, 2)


@pytest.mark.parametrize(
    ("name", "steps", "found"),
    [
        ("0400000.pt", None, 400_000), ("0400000.pt", 5, 5),
        ("last.pt", None, None), ("400000.pt", None, None),
    ],
)  # fmt: skip
def test_the_step_is_in_the_file_or_its_name(loop, tmp_path, name, steps, found):
    assert open_foreign(loop.save(tmp_path / name, steps=steps)).step == found


@pytest.mark.parametrize("steps", ["three", True, -1, 2.5, 10**12])
def test_a_step_that_is_no_number_of_steps(loop, tmp_path, steps):
    with pytest.raises(CheckpointError, match=r"'steps' is .*, which is no number of steps"):
        open_foreign(loop.save(tmp_path / "weights.pt", steps=steps))


def _second_group(opt: dict) -> None:
    opt["param_groups"].append(opt["param_groups"][0])


def _other_order(opt: dict) -> None:
    opt["param_groups"][0]["params"].reverse()


def _fewer_weights(opt: dict) -> None:
    opt["param_groups"][0]["params"].pop()


def _group(**changes: object):
    return lambda opt: opt["param_groups"][0].update(changes)


def _state(index: int, **changes: object):
    return lambda opt: opt["state"][index].update(changes)


def _unknown_weight(opt: dict) -> None:
    opt["state"][1000] = opt["state"][1]


def _no_mapping(opt: dict) -> None:
    opt["state"][1] = [1, 2]


def _no_moment(opt: dict) -> None:
    del opt["state"][1]["exp_avg_sq"]


def _every_step(value: float):
    def change(opt: dict) -> None:
        for state in opt["state"].values():
            state["step"] = torch.tensor(value)

    return change


FAULTS = {
    "two groups": (_second_group, "it has 2 groups of weights, and one is expected"),
    "another order": (_other_order, "its group does not name the model's 48 weights in order"),
    "fewer weights": (_fewer_weights, "its group does not name the model's 48 weights in order"),
    "amsgrad": (_group(amsgrad=True), "it uses amsgrad, which is not here"),
    "maximize": (_group(maximize=True), "it uses maximize, which is not here"),
    "weights that are no list": (_group(params=5), "its group does not name the model's 48"),
    "a weight that is a tensor": (
        _group(params=[torch.ones(3)] * 48),
        "its group does not name the model's 48",
    ),
    "amsgrad of many": (_group(amsgrad=torch.ones(3)), "it uses amsgrad, which is not here"),
    "a decay of many": (_group(weight_decay=torch.ones(3)), "its weight_decay is a Tensor"),
    "a huge step": (_state(2, step=10**400), "the step of 'x_embedder.proj.bias' is no number"),
    "Adam": (
        _group(decoupled_weight_decay=False, weight_decay=0.1),
        "it is Adam's, whose weight decay is not AdamW's",
    ),
    "unknown weight": (_unknown_weight, "it has a state 1000, and the model 48 weights"),
    "no mapping": (_no_mapping, "its state 1 is a list"),
    "no moment": (_no_moment, "that of 'x_embedder.proj.weight' lacks exp_avg_sq"),
    "another shape": (
        _state(2, exp_avg=torch.zeros(3)),
        r"exp_avg of 'x_embedder.proj.bias' is \(3,\), the weight \(64,\)",
    ),
    "no tensor": (_state(2, exp_avg="x"), "exp_avg of 'x_embedder.proj.bias' is no tensor"),
    "sparse": (_state(2, exp_avg=torch.zeros(64).to_sparse()), "is a sparse tensor"),
    "no step": (_state(2, step="x"), "the step of 'x_embedder.proj.bias' is no number"),
    "different steps": (
        _state(2, step=torch.tensor(1.0)),
        "its weights have taken different numbers of steps, 1, 2",
    ),
    "half a step": (_every_step(2.5), "it has taken 2.5 steps"),
    "steps not finite": (_every_step(torch.inf), "it has taken inf steps"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_state_of_another_optimizer_is_refused(tmp_path, fault):
    loop, (damage, message) = trained(steps=2), FAULTS[fault]
    opt = loop.optimizer.state_dict()
    damage(opt)
    file = loop.save(tmp_path / "weights.pt", opt=opt)
    with pytest.raises(CheckpointError, match=message) as raised:
        open_foreign(file, with_optimizer=True)
    assert str(raised.value).startswith(str(file))
    assert "\n" not in str(raised.value)
    assert open_foreign(file).weights.keys() == {"model", "ema"}


@pytest.mark.parametrize("opt", [[], 3, {"state": []}, {"state": {}, "param_groups": {}}])
def test_something_else_than_a_state(loop, tmp_path: Path, opt):
    with pytest.raises(CheckpointError, match="it is not what AdamW"):
        open_foreign(loop.save(tmp_path / "weights.pt", opt=opt), with_optimizer=True)


def test_a_moment_that_is_not_finite_is_refused_when_it_is_read(tmp_path):
    loop = trained()
    state = loop.optimizer.state[loop.weights["x_embedder.proj.bias"]]
    state["exp_avg"][3] = torch.nan
    optimizer = open_foreign(loop.save(tmp_path / "weights.pt"), with_optimizer=True).optimizer
    assert optimizer.exp_avg["x_embedder.proj.weight"].isfinite().all()
    with pytest.raises(CheckpointError, match=r"exp_avg of 'x_embedder.proj.bias' is not finite"):
        optimizer.exp_avg["x_embedder.proj.bias"]
