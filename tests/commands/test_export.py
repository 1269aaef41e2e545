"""Export: which weights, of which step, under which names."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from builders import contents, objective_of, pieces_of
from places import GOLDEN
from safetensors.torch import load_file

from srepa_ds.checkpoint import saving
from srepa_ds.checkpoint.folder import step_folder
from srepa_ds.checkpoint.fragment_file import Piece
from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.commands.export import export
from srepa_ds.commands.verify import verify
from srepa_ds.config.experiment import Config, load_config
from srepa_ds.errors import CheckpointError, ConfigError, DataError, OutputError
from srepa_ds.model.embeddings import position_embedding
from srepa_ds.model.sit import SiT
from srepa_ds.objective import Objective
from srepa_ds.optim.power_ema import PowerAverage, combination, gamma_of
from srepa_ds.report.tokens import _tensors_below
from srepa_ds.schema import to_tree
from srepa_ds.weights.exported import read_model
from srepa_ds.weights.from_checkpoint import read_model_of_checkpoint
from srepa_ds.weights.initial import InitialWeightsConfig, initialise_from


def objective(config: Config, seed: int) -> Objective:
    return objective_of(config, generator=torch.Generator().manual_seed(seed))


def save(config: Config, step: int) -> None:
    """Writes a checkpoint with masters drawn by seed `step` and averages by `step` + 100."""
    pieces = [
        piece
        for kind, seed in (("master", step), ("ema", step + 100))
        for piece in pieces_of(dict(objective(config, seed).named_parameters()), kind=kind)
    ]
    state = {"step": step, "adam_step": step, "config": to_tree(config)}
    saving.save(config.run_folder.checkpoints, step=step, pieces=pieces, state=state, rank=0)


@pytest.fixture
def configured(small_world, tmp_path):
    """Returns a function that loads the configuration with overrides, in its own folder."""

    def load(*overrides: str) -> Config:
        return load_config(small_world.config, [f"run.folder={tmp_path}/run", *overrides])

    return load


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_drawn_by(folder: Path, config: Config, seed: int) -> None:
    expected = dict(objective(config, seed).named_parameters())
    found = weights(folder)
    for name, value in expected.items():
        assert torch.equal(found[name.removeprefix("sit.")], value), name
    assert len(found) == len(expected) + 1


@pytest.mark.parametrize(("overrides", "seed"), [
    ([], 110),
    (["export.weights=master"], 10),
    (["export.step=5"], 105),
    (["export.step=5", "export.weights=master"], 5),
])  # fmt: skip
def test_the_weights_that_were_asked_for(configured, tmp_path, overrides, seed):
    config = configured(*overrides)
    for step in (5, 10):
        save(config, step)
    folder = export(config)
    assert folder == tmp_path / "run" / "export"
    assert_drawn_by(folder, config, seed)
    provenance = json.loads((folder / "config.json").read_text())["provenance"]
    step = seed % 100
    source = step_folder(config.run_folder.checkpoints, step)
    assert provenance == {
        "checkpoint": CheckpointReader(source).fingerprint(),
        "step": step,
        "weights": "ema" if seed > 100 else "master",
        "ema_decay": 0.9,
        "run": "run",
        "config_sha256": hashlib.sha256(
            json.dumps(to_tree(config), sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest(),
        "dtype": "fp32",
    }


def test_names_are_the_official_ones_projectors_included(configured):
    config = configured()
    save(config, 5)
    found = weights(export(config))
    shapes = json.loads((GOLDEN / "sit_shapes.json").read_text())["SiT-XL/2"]["state_dict"]
    official = {name.replace("blocks.0.", f"blocks.{k}.") for name in shapes for k in range(3)}
    assert found.keys() == official
    assert torch.equal(found["pos_embed"], position_embedding((8, 8), 48))


def test_a_model_with_a_class_token_is_read_back(configured):
    config = configured("model.class_token_width=32")
    model = SiT(config.model, torch.Generator().manual_seed(4))
    pieces = [
        Piece("ema", f"sit.{name}", tuple(value.shape), 0, value.detach().reshape(-1))
        for name, value in model.named_parameters()
    ]
    state = {"step": 5, "adam_step": 5, "config": to_tree(config)}
    saving.save(config.run_folder.checkpoints, step=5, pieces=pieces, state=state, rank=0)
    folder = export(config)
    assert weights(folder).keys() == model.state_dict().keys()
    found = read_model(folder).model.state_dict()
    assert found["pos_embed"].shape == (1, 65, 48)
    assert not found["pos_embed"][0, 0].any()
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value), name


def test_the_model_is_that_of_the_checkpoint_whatever_the_file_says_now(configured):
    save(configured(), 5)
    folder = export(configured("model.input_size=32", "model.depth=2", "ema.decay=0.5"))
    assert read_model(folder).model.config == configured().model
    assert json.loads((folder / "config.json").read_text())["provenance"]["ema_decay"] == 0.9


def test_exporting_again_gives_the_same_bytes(configured, tmp_path):
    config = configured()
    save(config, 5)
    first = (export(config) / "model.safetensors").read_bytes()
    assert (export(config) / "model.safetensors").read_bytes() == first
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"export", "checkpoints"}


def test_a_folder_of_ones_own(configured, tmp_path):
    config = configured(f"export.folder={tmp_path}/mine")
    save(config, 5)
    assert export(config) == tmp_path / "mine"
    assert read_model(tmp_path / "mine").provenance["step"] == 5


def test_an_unknown_step_names_those_there_are(configured, tmp_path):
    for step in (5, 10):
        save(configured(), step)
    with pytest.raises(CheckpointError, match="checkpoints: step-0000005, step-0000010"):
        export(configured("export.step=7"))
    assert not (tmp_path / "run" / "export").exists()


def test_a_damaged_newest_is_passed_over_but_not_if_asked_for(configured):
    for step in (5, 10):
        save(configured(), step)
    (step_folder(configured().run_folder.checkpoints, 10) / "state.json").write_text("{}")
    assert read_model(export(configured())).provenance["step"] == 5
    with pytest.raises(CheckpointError, match=r"step-0000010 is not valid: state.json has 2 bytes"):
        export(configured("export.step=10"))


def test_without_a_checkpoint_it_says_to_train(configured):
    with pytest.raises(CheckpointError, match="train first"):
        export(configured())


def test_other_averages_that_were_kept_can_be_exported(small_world, tmp_path):
    config = load_config(
        small_world.config, [f"run.folder={tmp_path}/run", "ema.power_sigmas=[0.05, 0.1]"]
    )
    kinds = ("master", "ema", "ema-power-0.05", "ema-power-0.1")
    values = torch.randn(len(kinds), 2, generator=torch.Generator().manual_seed(0))
    for number, step in enumerate((100, 200)):
        pieces = [
            Piece(
                kind,
                f"sit.{name}",
                tuple(value.shape),
                0,
                values[row, number].expand(value.numel()),
            )
            for row, kind in enumerate(kinds)
            for name, value in objective(config, 0).sit.named_parameters()
        ]
        state = {"step": step, "adam_step": step, "config": to_tree(config)}
        saving.save(config.run_folder.checkpoints, step=step, pieces=pieces, state=state, rank=0)

    def exported(*overrides: str) -> torch.Tensor:
        changed = [f"run.folder={tmp_path}/run", *overrides]
        model = read_model(export(load_config(small_world.config, changed)))
        assert model.provenance["step"] == 200
        return model.model.blocks[0].attn.qkv.weight

    assert torch.all(exported("export.weights=ema-power-0.05") == values[2, 1])
    assert torch.all(exported("export.weights=master") == values[0, 1])
    # A stored length: the newest average of that kind. Another: all of them, by their factors.
    torch.testing.assert_close(exported("export.power_sigma=0.1").mean(), values[3, 1])
    stored = [PowerAverage(step, gamma_of(s)) for step in (100, 200) for s in (0.05, 0.1)]
    factors, error = combination(stored, PowerAverage(200, gamma_of(0.07)))
    expected = sum(f * v for f, v in zip(factors, values[2:].T.flatten().tolist(), strict=True))
    found = exported("export.power_sigma=0.07")
    assert found.mean().item() == pytest.approx(expected, rel=1e-5)
    document = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert document["provenance"]["profile_error"] == pytest.approx(error)
    with pytest.raises(CheckpointError, match=r"cannot be made of 2 checkpoint.*off by \d+%"):
        exported("export.power_sigma=0.005")
    with pytest.raises(
        CheckpointError, match=r"holds no 'ema-0\.5'; export\.weights may be: ema, "
    ):
        exported("export.weights=ema-0.5")


def test_a_length_cannot_be_made_of_nothing(small_world, tmp_path):
    config = load_config(small_world.config, [f"run.folder={tmp_path}", "export.power_sigma=0.1"])
    save(config, 5)
    with pytest.raises(CheckpointError, match=r"train with ema\.power_sigmas"):
        export(config)


def test_shards_of_fewer_bits_without_projectors(configured, tmp_path):
    settings = ["export.dtype=bf16", "export.projectors=false", "export.max_shard_size=50KB"]
    config = configured(*settings)
    save(config, 5)
    folder = export(config)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    found = {name: value for path in shards for name, value in load_file(path).items()}
    expected = {
        name.removeprefix("sit."): value.bfloat16()
        for name, value in objective(config, 105).sit.named_parameters(prefix="sit")
    }
    assert found.keys() == expected.keys() | {"pos_embed"}
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert read_model(folder).provenance["dtype"] == "bf16"
    assert verify(tmp_path / "run").startswith(f"{len(shards) + 6} files, ")
    assert verify(folder).startswith(f"{len(shards) + 3} files, ")
    shards[1].unlink()
    with pytest.raises(DataError, match=rf"{shards[1].name}: No such file"):
        verify(folder)


def test_the_projectors_of_shards_are_read_as_those_of_one_file(configured):
    config = configured("export.max_shard_size=20KB")
    save(config, 5)
    export(config)
    found = _tensors_below("projectors.0.", config)
    expected = objective(config, 105).projectors[0].state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_training_starts_from_shards_as_from_one_file(configured):
    config = configured("export.max_shard_size=20KB")
    save(config, 5)
    started = objective(config, 0)
    report = initialise_from(started, InitialWeightsConfig(path=export(config)))
    assert not report.initialised
    assert not report.unused
    expected = dict(objective(config, 105).named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in started.named_parameters())


@pytest.mark.parametrize("size", ["5", "GB", "0GB", "-1GB", "5 bananas", "5gb", "1e3MB", "5GB "])
def test_what_is_no_size_is_refused(configured, size):
    with pytest.raises(ConfigError, match=r"export\.max_shard_size: .*is no size; write a number"):
        configured(f"export.max_shard_size={size!r}")


@pytest.mark.parametrize("size", ["5GB", "500 MB", "0.5TB", "20KB"])
def test_sizes_are_those_of_the_hub(configured, size):
    assert configured(f"export.max_shard_size={size}").export.max_shard_size == size


def test_settings_of_another_format_are_refused(configured):
    with pytest.raises(ConfigError, match="dtype belongs to format 'srepa_ds' or"):
        configured("export.format=repa", "export.dtype=bf16")


@pytest.mark.parametrize("format", ["srepa_ds", "repa"])
def test_the_model_of_another_run_is_only_replaced_if_told_to(configured, tmp_path, format):
    shared = [f"export.folder={tmp_path}/shared", f"export.format={format}"]
    shared += ["export.optimizer=false"] if format == "repa" else []
    for name in ("a", "b"):
        save(configured(f"run.folder={tmp_path}/{name}"), 5)
    files = [f"run.folder={tmp_path}/a", *shared], [f"run.folder={tmp_path}/b", *shared]
    for _ in range(2):
        export(configured(*files[0]))
    before = contents(tmp_path / "shared")
    with pytest.raises(OutputError, match=rf"run {tmp_path}/a .*run {tmp_path}/b .*--replace"):
        export(configured(*files[1]))
    assert contents(tmp_path / "shared") == before
    export(configured(*files[1]), replace=True)
    with pytest.raises(OutputError, match=rf"holds a model of the run {tmp_path}/b "):
        export(configured(*files[0]))


def test_a_checkpoint_is_known_as_its_export_is(configured):
    config = configured()
    save(config, 5)
    exported = read_model(export(config))
    drawn = read_model_of_checkpoint(
        step_folder(config.run_folder.checkpoints, 5), weights="ema", power_sigma=None,
        schema=Config,
    )  # fmt: skip
    assert drawn.sha256 == exported.sha256
    assert drawn.provenance.items() <= exported.provenance.items()
