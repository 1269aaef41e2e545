"""A run as a file of REPA's trainer: strict, in order, and with AdamW's state."""

import argparse
from pathlib import Path

import pytest
import torch
import yaml
from builders import largest_file, pieces_of
from official_sit import engine_name, official_sit, values_of
from torch import Tensor, nn

from srepa_ds.checkpoint import saving
from srepa_ds.commands.export import export
from srepa_ds.config.experiment import Config, config_from
from srepa_ds.errors import CheckpointError, OutputError
from srepa_ds.model.sit import fixed_position_embedding
from srepa_ds.schema import to_tree
from srepa_ds.weights.initial import read_initial_weights

STEPS = 3
OPTIMIZER = {"learning_rate": 1e-2, "weight_decay": 0.1, "betas": [0.8, 0.95], "epsilon": 1e-6}
POINTWISE = {"pointwise": {"weight": 0.5}, "structural": None}
UNPROJECTED = {
    "pointwise": None, "structural": {"kind": "mse", "weight": 1.0, "tokens": "hidden"},
}  # fmt: skip


def experiment(small_world, run: Path, *alignments: dict, model=None, **export_settings):
    """Returns an experiment of the small world with its alignment changed so, once for each."""
    tree = yaml.safe_load(small_world.config.read_text())
    (alignment,) = tree["alignments"]
    tree["run"]["folder"] = str(run)
    tree["alignments"] = [{**alignment, **changes} for changes in alignments]
    tree["model"] |= {"depth": 2, **(model or {})}
    tree |= {"optimizer": OPTIMIZER, "export": {"format": "repa", **export_settings}}
    tree["ema"] = {"decay": 0.9, "more_decays": [0.5]}
    return config_from(tree, source="test")


class Trainer:
    """An official model that AdamW has trained on random gradients, and averages of it."""

    def __init__(self, config: Config):
        self.module = official_sit(config)
        with torch.no_grad():
            self.module.pos_embed.copy_(fixed_position_embedding(config.model))
        self.optimizer = adamw(self.module)
        self.averages = {kind: values_of(self.module) for kind in ("ema", "ema-0.5")}
        for step in range(STEPS):
            take_step(self.module, self.optimizer, seed=step)
            for kind, decay in (("ema", 0.9), ("ema-0.5", 0.5)):
                for name, value in values_of(self.module).items():
                    self.averages[kind][name].lerp_(value, 1 - decay)

    def save(self, config: Config, *, moments: bool = True) -> None:
        """Writes the checkpoint that the engine would have written."""
        state = self.optimizer.state
        named = [(engine_name(n), p) for n, p in self.module.named_parameters() if p.requires_grad]
        kinds = {"master": values_of(self.module), **self.averages}
        for kind in ("exp_avg", "exp_avg_sq") if moments else ():
            kinds[kind] = {name: state[parameter][kind] for name, parameter in named}
        saving.save(
            config.run_folder.checkpoints,
            step=STEPS,
            pieces=[p for kind, own in kinds.items() for p in pieces_of(own, kind=kind, run=99)],
            state={"step": STEPS, "adam_step": STEPS, "config": to_tree(config)},
            rank=0,
        )


def adamw(module: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        module.parameters(), lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6
    )


def take_step(module: nn.Module, optimizer: torch.optim.AdamW, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def opened(path: Path) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    own = {engine_name(name): value for name, value in found.items() if name != "pos_embed"}
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], value) for name, value in expected.items())


IREPA = {"spatial_norm": {"gamma": 0.6}, **POINTWISE}
RUNS = {
    "sit": ((), {}),
    "repa": ((POINTWISE,), {}),
    "srepa": (({},), {"qk_norm": True}),
    "two teachers": ((POINTWISE, POINTWISE), {}),
    "structural alone": ((UNPROJECTED,), {}),
    "reg": (({"pointwise": {"weight": 0.5, "include_cls": True}},), {"class_token_width": 32}),
    "irepa mlp": ((IREPA,), {}),
    "irepa conv": (({**IREPA, "projector": {"kind": "conv", "kernel": 1}},), {}),
    "irepa linear": (({**POINTWISE, "projector": {"kind": "linear"}},), {}),
}


@pytest.mark.parametrize("run", RUNS)
def test_the_official_model_and_its_adamw_go_on_to_the_bit(small_world, tmp_path, run):
    alignments, sizes = RUNS[run]
    config = experiment(small_world, tmp_path, *alignments, model=sizes)
    trainer = Trainer(config)
    trainer.save(config)
    path = export(config)
    assert path == tmp_path / "export-repa" / "0000003.pt"
    found = opened(path)
    assert list(found) == ["model", "ema", "opt", "args", "steps"]
    assert found["steps"] == STEPS
    assert_equal(found["ema"], trainer.averages["ema"])

    module = official_sit(config)
    module.load_state_dict(found["ema"], strict=True)
    module.load_state_dict(found["model"], strict=True)
    names = [name for name, _ in module.named_parameters()]
    assert names == list(found["model"]) == list(found["ema"])
    optimizer = adamw(module)
    assert found["opt"]["param_groups"] == trainer.optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(found["opt"])
    for own, restored in ((trainer.module, module), (trainer.optimizer, optimizer)):
        assert_same(restored.state_dict(), own.state_dict())
    for step in range(2):
        take_step(trainer.module, trainer.optimizer, seed=50 + step)
        take_step(module, optimizer, seed=50 + step)
    assert_same(module.state_dict(), trainer.module.state_dict())
    assert_same(optimizer.state_dict(), trainer.optimizer.state_dict())


def assert_same(found, expected) -> None:
    """Compares nested mappings of tensors bit for bit, dtypes and devices included."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected


@pytest.fixture
def repa(small_world, tmp_path):
    """Returns a function that makes the experiment of REPA, with its trained model saved."""

    def make(*alignments: dict, model=None, moments=True, name="run", **export_settings):
        config = experiment(
            small_world, tmp_path / name, *(alignments or [POINTWISE]), model=model,
            **export_settings,
        )  # fmt: skip
        # Of what cannot be exported no official model can be built.
        trainable = experiment(small_world, tmp_path / name, POINTWISE)
        trainer = Trainer(trainable)
        trainer.save(config, moments=moments)
        return config, trainer

    return make


def test_no_more_is_stored_than_the_values(repa):
    config, _ = repa()
    path = export(config)
    found = opened(path)
    moments = [value for own in found["opt"]["state"].values() for value in own.values()]
    tensors = [*found["model"].values(), *found["ema"].values(), *moments]
    for tensor in tensors:
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    # Names, and up to 64 bytes before each tensor.
    assert path.stat().st_size < sum(4 * t.numel() for t in tensors) + 500 * len(tensors)


def test_it_is_read_back_under_our_names(repa):
    config, trainer = repa({**IREPA})
    for which, expected in (("model", values_of(trainer.module)), ("ema", trainer.averages["ema"])):
        assert_equal(read_initial_weights(export(config), which=which), expected)


@pytest.mark.parametrize(
    ("chosen", "kind"), [("ema", "ema"), ("ema-0.5", "ema-0.5"), ("master", "ema")]
)
def test_the_average_that_was_asked_for_is_beside_the_masters(repa, chosen, kind):
    config, trainer = repa(weights=chosen)
    found = opened(export(config))
    assert_equal(found["model"], values_of(trainer.module))
    assert_equal(found["ema"], trainer.averages[kind])


def test_optimizer_and_projectors_may_be_left_out(repa):
    config, trainer = repa(optimizer=False, projectors=False)
    found = opened(export(config))
    assert list(found) == ["model", "ema", "args", "steps"]
    kept = {n: v for n, v in values_of(trainer.module).items() if n.startswith("sit.")}
    assert_equal(found["model"], kept)


def test_without_moments_it_says_how_to_export(repa):
    config, _ = repa(moments=False)
    with pytest.raises(CheckpointError, match=r"no state of Adam; .*export\.optimizer=false"):
        export(config)
    assert not config.export_folder.exists()


DEEPER = {**POINTWISE, "depth": 1}
WIDER = {**POINTWISE, "projector": {"hidden_width": 65}}
REG = {"class_token_width": 32}
RESAMPLING = {"direction": "teacher_to_student", "mode": "area"}
WITHOUT = r"export without them: export\.projectors=false"
REFUSED = {
    "two depths": ((POINTWISE, DEEPER), {}, f"behind one block, .*{WITHOUT}"),
    "two projectors": ((POINTWISE, WIDER), {}, f"of one kind and size, .*{WITHOUT}"),
    "a teacher without": ((POINTWISE, UNPROJECTED), {}, f"has teachers without; {WITHOUT}"),
    "REG without": ((UNPROJECTED,), REG, f"REG's have at least one, .*{WITHOUT}"),
    "REG with iREPA's": ((IREPA,), REG, f"REG's are plain MLPs, .*{WITHOUT}"),
    "oblong latents": ((), {"input_size": [16, 8]}, "take square latents, not 16 x 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_official_model_can_hold_is_refused(small_world, tmp_path, case):
    alignments, sizes, words = REFUSED[case]
    tree_of = experiment(small_world, tmp_path / "run", *alignments, model=sizes)
    Trainer(experiment(small_world, tmp_path / "run", POINTWISE)).save(tree_of)
    with pytest.raises(CheckpointError, match=words):
        export(tree_of)
    assert not tree_of.export_folder.exists()


def test_its_arguments_are_those_of_repa(repa):
    args = opened(export(repa()[0]))["args"]
    assert vars(args).items() >= {
        "exp_name": "run", "model": "SiT-Ti/2", "resolution": 128, "num_classes": 10,
        "encoder_depth": 2, "proj_coeff": 0.5, "path_type": "linear", "weighting": "uniform",
        "prediction": "v", "qk_norm": False, "cfg_prob": 0.1, "legacy": False, "batch_size": 16,
        "max_train_steps": 10, "mixed_precision": "no", "learning_rate": 1e-2, "adam_beta1": 0.8,
        "adam_beta2": 0.95, "adam_weight_decay": 0.1, "adam_epsilon": 1e-6, "max_grad_norm": 1.0,
        "seed": 0, "ema_decay": 0.9,
    }.items()  # fmt: skip
    assert not {"cls", "spnorm_method", "projection_layer_type"} & vars(args).keys()


def test_their_batch_is_that_of_a_micro_step(small_world, tmp_path):
    config = experiment(small_world, tmp_path, POINTWISE)
    tree = to_tree(config)
    tree["train"] |= {"batch_size": 16, "accumulation_steps": 4}
    config = config_from(tree, source="test")
    Trainer(config).save(config)
    args = opened(export(config))["args"]
    assert (args.batch_size, args.gradient_accumulation_steps) == (4, 4)


@pytest.mark.parametrize(("changes", "model", "expected"), [
    ({"pointwise": {"weight": 0.5, "include_cls": True}}, REG, {"cls": 0.03}),
    (IREPA, {}, {"spnorm_method": "zscore", "zscore_alpha": 0.6, "projection_layer_type": "mlp",
                 "proj_coeff": "0.5"}),
    ({**POINTWISE, "projector": {"kind": "conv"}}, {},
     {"spnorm_method": "none", "projection_layer_type": "conv", "proj_kwargs_kernel_size": 3,
      "repa_loss": True}),
    ({"teacher": {"name": "clip-vit-l"}, "resampling": RESAMPLING}, {}, {"enc_type": "clip-vit-L"}),
])  # fmt: skip
def test_arguments_of_its_relatives(small_world, tmp_path, changes, model, expected):
    config = experiment(small_world, tmp_path, changes, model=model)
    Trainer(config).save(config)
    assert vars(opened(export(config))["args"]).items() >= expected.items()


def test_a_full_disk_leaves_the_earlier_file_and_nothing_else(repa):
    config, _ = repa()
    path = export(config)
    before = path.read_bytes()
    for limit in (len(before) // 3, len(before) - 1000):
        with largest_file(limit), pytest.raises(OutputError, match="cannot write the model"):
            export(config)
        assert path.read_bytes() == before
        assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_files_of_other_steps_stay_and_those_of_other_runs_are_asked_about(repa, tmp_path):
    shared = str(tmp_path / "shared")
    config, _ = repa(folder=shared)
    path = export(config)
    earlier = path.with_name("0000002.pt")
    earlier.write_bytes(path.read_bytes())
    (path.parent / f"{path.name}.partial").write_text("half")
    export(config)
    assert {file.name for file in path.parent.iterdir()} == {path.name, earlier.name}
    other, _ = repa(name="other", folder=shared)
    words = rf"holds a model of the run {tmp_path}/run \[.*format repa, .*run {tmp_path}/other"
    with pytest.raises(OutputError, match=f"{words}.*--replace"):
        export(other)
    assert opened(path)["args"].exp_name == "run"
    assert opened(export(other, replace=True))["args"].exp_name == "other"
    # Of the other run only the file of that name is replaced.
    assert {file.name for file in path.parent.iterdir()} == {path.name, earlier.name}
