"""`srepa-ds import`: a run of foreign weights, from the file to the next step and the images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import contents, largest_file
from foreign_runs import exported_as_repa, overrides_for, repa_run
from kills import killed_at
from ranks import run_function
from repa_trainer import PlainTrainer
from safetensors.torch import save_file
from torch import Tensor
from trainings import train_runs

from srepa_ds.checkpoint.folder import newest_valid
from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.cli import run as command
from srepa_ds.commands.import_weights import import_weights
from srepa_ds.config.experiment import load_config
from srepa_ds.errors import OutputError
from srepa_ds.objective import official_name
from srepa_ds.weights.exported import read_document, read_model
from srepa_ds.weights.foreign.opening import open_foreign

KINDS = ("master", "ema", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def loop(small_world) -> PlainTrainer:
    return repa_run(small_world.config, steps=2)


def imported(source: Path, folder: Path, *overrides: str) -> None:
    assert command(["import", str(source), str(folder), *overrides]) == 0


def state_of(folder: Path, kind: str) -> dict[str, Tensor]:
    reader = CheckpointReader(folder)
    return {official_name(name): reader.tensor(kind, name) for name in reader.names(kind)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    expected = {name: value for name, value in expected.items() if name != "pos_embed"}
    found = {name: value for name, value in found.items() if name != "pos_embed"}
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_a_trainers_file_becomes_a_checkpoint_to_the_bit(small_world, loop, tmp_path, capsys):
    file = loop.save(tmp_path / "0000002.pt")
    imported(file, tmp_path / "run", *overrides_for(small_world.folder))
    assert sorted(contents(tmp_path / "run")) == [
        "checkpoints",
        "checkpoints/latest",
        "checkpoints/step-0000002",
        "checkpoints/step-0000002/fragments-00000.safetensors",
        "checkpoints/step-0000002/manifest.json",
        "checkpoints/step-0000002/state.json",
        "config.yaml",
    ]
    folder = newest_valid(tmp_path / "run" / "checkpoints")
    of_adam = {name: loop.optimizer.state[w] for name, w in loop.weights.items()}
    for kind, expected in {
        "master": loop.weights,
        "ema": loop.ema,
        **{k: {n: s[k] for n, s in of_adam.items() if s} for k in ("exp_avg", "exp_avg_sq")},
    }.items():
        assert_same(state_of(folder, kind), expected)
    state = CheckpointReader(folder).state
    assert (state["step"], state["adam_step"], state["samples_seen"]) == (2, 2, 32)
    said = capsys.readouterr().out
    assert f"{file}: layout repa; step 2; ema, model; Adam's state is taken over" in said
    assert f"{tmp_path / 'run'} holds checkpoints/step-0000002 and config.yaml" in said
    assert "note: not taken over: " in said
    assert "data_dir" in said
    # It was given.
    assert "note: data.folder" not in said


def test_the_written_experiment_is_whole(small_world, loop, tmp_path):
    file = loop.save(tmp_path / "0000002.pt")
    switched_on = "alignments.0.structural={kind: mse, weight: 2.0}"
    imported(file, tmp_path / "run", *overrides_for(small_world.folder), switched_on)
    config = load_config(tmp_path / "run" / "config.yaml")
    small = load_config(small_world.config)
    assert config.model.shape == small.model.shape
    assert config.model.latent_shape == small.model.latent_shape
    assert config.alignments[0].structural == small.alignments[0].structural
    assert config.alignments[0].projector == small.alignments[0].projector
    assert (config.train.steps, config.run.folder) == (4, tmp_path / "run")
    assert config.train.init_from is None
    assert CheckpointReader(newest_valid(config.run_folder.checkpoints)).state["config"] == (
        config.model_dump(mode="json")
    )


def doubled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: v if name == "pos_embed" else 2 * v for name, v in state.items()}


@pytest.mark.parametrize("kind", ["ema", "model"])
def test_a_bare_file_becomes_a_model_to_start_from(small_world, loop, tmp_path, capsys, kind):
    state = {name: weight.detach().contiguous() for name, weight in loop.weights.items()}
    save_file(state, tmp_path / "last.safetensors")
    document = {"ema": state, "model": doubled(state)}
    torch.save(document, tmp_path / "both.pt")
    bare = kind == "ema"
    source = tmp_path / ("last.safetensors" if bare else "both.pt")
    further = [] if bare else ["train.init_from.weights=model"]
    settings = ["model.num_heads=3", "engine.precision=fp32", *further]
    imported(source, tmp_path / "run", *settings)
    assert sorted(contents(tmp_path / "run")) == [
        "config.yaml", "export", "export/config.json", "export/model.safetensors",
    ]  # fmt: skip
    config = load_config(tmp_path / "run" / "config.yaml")
    assert config.train.init_from.path == config.export_folder == tmp_path / "run" / "export"
    # A plain state_dict may be either; its kind here is that of the weights themselves.
    assert config.train.init_from.weights == "model"
    factor = 1 if bare else 2
    model = read_model(tmp_path / "run" / "export").model
    own = {k: factor * v for k, v in state.items() if not k.startswith("projectors.")}
    assert_same(dict(model.state_dict()), own)
    provenance = read_document(tmp_path / "run" / "export").provenance
    assert (provenance["checkpoint"], provenance["weights"]) == (source.name, "master")
    said = capsys.readouterr().out
    assert "no step is told" in said
    assert "no state of an optimizer" in said
    assert "note: projectors 0: kept, but no alignment has a projector" in said
    assert "note: 3 channels are taken to be pixels" in said


@pytest.fixture(scope="module")
def trained(small_world, loop, tmp_path_factory) -> Path:
    """Returns a folder with two imported runs, trained: one went on, one started from weights."""
    folder = tmp_path_factory.mktemp("trained")
    whole = loop.save(folder / "0000002.pt")
    imported(whole, folder / "continued", *overrides_for(small_world.folder))
    bare = loop.save(folder / "weights.pt", opt=None)
    settings = [*overrides_for(small_world.folder)[:-1], "train.steps=1", "train.batch_size=2"]
    imported(bare, folder / "started", *settings, "optimizer.learning_rate=1e-9")
    configs = (str(folder / name / "config.yaml") for name in ("continued", "started"))
    run_function(train_runs, 1, *([config] for config in configs))
    return folder


def test_training_goes_on_with_one_command(trained):
    last = newest_valid(trained / "continued" / "checkpoints")
    assert (last.name, CheckpointReader(last).state["adam_step"]) == ("step-0000004", 4)
    metrics = (trained / "continued" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics][-1] == 4


def test_training_starts_from_an_imported_model(loop, trained):
    masters = state_of(trained / "started" / "checkpoints" / "step-0000001", "master")
    assert masters.keys() == loop.ema.keys() - {"pos_embed"}
    for name, value in masters.items():
        torch.testing.assert_close(value, loop.ema[name], rtol=0, atol=1e-7)


def test_images_are_drawn_of_an_imported_run(small_world, loop, tmp_path):
    file = loop.save(tmp_path / "0000002.pt")
    imported(file, tmp_path / "run", *overrides_for(small_world.folder))
    assert command(["sample", str(tmp_path / "run" / "config.yaml")]) == 0
    images = np.load(tmp_path / "run" / "samples" / "step-0000002" / "samples.npz")["arr_0"]
    assert images.shape == (4, 16, 16, 3)


def test_a_damaged_optimizer_can_be_left_behind(small_world, loop, tmp_path, capsys):
    file = loop.save(tmp_path / "0000002.pt", opt={"state": {1: {}}, "param_groups": [{}, {}]})
    settings = overrides_for(small_world.folder)[:-1]
    arguments = ["import", str(file), str(tmp_path / "run"), *settings]
    assert command(arguments) == 2
    assert "to import its weights alone, add train.init_from.weights=ema" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert command([*arguments, "train.init_from.weights=ema"]) == 0
    assert read_document(tmp_path / "run" / "export").weights == "ema"


def test_without_alignments_the_projectors_and_their_moments_stay_behind(
    small_world, loop, tmp_path, capsys
):
    file = loop.save(tmp_path / "0000002.pt")
    settings = [s for s in overrides_for(small_world.folder) if not s.startswith("alignments")]
    imported(file, tmp_path / "run", *settings, "alignments=[]")
    folder = newest_valid(tmp_path / "run" / "checkpoints")
    for kind in KINDS:
        names = state_of(folder, kind).keys()
        assert names == {n for n in loop.ema if not n.startswith(("projectors.", "pos_embed"))}
    assert "projectors 0: left out, with their moments" in capsys.readouterr().out


def test_a_moment_that_is_not_finite_leaves_nothing(small_world, tmp_path, capsys):
    loop = repa_run(small_world.config)
    loop.optimizer.state[loop.weights["final_layer.linear.bias"]]["exp_avg"][0] = torch.inf
    file = loop.save(tmp_path / "0000001.pt")
    before = contents(tmp_path)
    overrides = overrides_for(small_world.folder)
    assert command(["import", str(file), str(tmp_path / "run"), *overrides]) == 2
    assert "exp_avg of 'final_layer.linear.bias' is not finite" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_another_position_embedding_is_refused(small_world, loop, tmp_path, capsys):
    trained = {**loop.ema, "pos_embed": loop.ema["pos_embed"] + 0.1}
    file = loop.save(tmp_path / "0000002.pt", ema=trained)
    arguments = ["import", str(file), str(tmp_path / "run"), *overrides_for(small_world.folder)]
    assert command(arguments) == 2
    assert "its pos_embed is not SiT's sines and cosines" in capsys.readouterr().err


def test_a_model_for_another_resolution_computes_its_own(small_world, loop, tmp_path, capsys):
    file = loop.save(tmp_path / "weights.pt", opt=None)
    settings = [*overrides_for(small_world.folder)[:-1], "model.input_size=32"]
    imported(file, tmp_path / "run", *settings)
    model = read_model(tmp_path / "run" / "export").model
    assert model.pos_embed.shape == (1, 256, 48)
    assert "computed anew for another size: (1, 64, 48) there" in capsys.readouterr().out


def test_a_full_disk_leaves_nothing(small_world, loop, tmp_path):
    file = loop.save(tmp_path / "0000002.pt")
    before = contents(tmp_path)
    with largest_file(100_000), pytest.raises(OutputError, match="cannot write"):
        import_weights(file, tmp_path / "run", overrides_for(small_world.folder))
    assert contents(tmp_path) == before


def test_a_kill_at_any_moment_leaves_no_half_of_a_run(small_world, loop, tmp_path):
    file = loop.save(tmp_path / "0000002.pt")
    overrides = overrides_for(small_world.folder)
    place = tmp_path / "runs"
    place.mkdir()
    import_weights(file, tmp_path / "whole", overrides)
    whole = contents(tmp_path / "whole").keys()
    moment, kills = 1, 0
    while killed_at(moment, lambda: import_weights(file, place / "run", overrides), place):
        kills += 1
        if (place / "run").exists():
            assert contents(place / "run").keys() == whole
            break
        # Every second one: each attempt takes a quarter of a second.
        moment += 2
    assert kills > 10
    if not newest_valid(place / "run" / "checkpoints"):
        import_weights(file, place / "run", overrides)
    assert contents(place / "run").keys() == whole
    assert [path.name for path in place.iterdir()] == ["run"]


@pytest.mark.slow
def test_training_by_way_of_repas_file_is_training_without_it(small_world, tmp_path):
    base = ["checkpoint.every_steps=3", "train.steps=3", "optimizer.learning_rate=2e-3"]
    run_function(
        train_runs, 1, [str(small_world.config), f"run.folder={tmp_path / 'direct'}", *base]
    )
    file = exported_as_repa(tmp_path / "direct" / "config.yaml", tmp_path / "repa")
    structural = json.dumps({"kind": "mse", "weight": 2.0})
    settings = [*overrides_for(small_world.folder), f"alignments.0.structural={structural}"]
    imported(file, tmp_path / "detour", *settings)
    runs = [
        [str(tmp_path / name / "config.yaml"), "train.steps=6"] for name in ("direct", "detour")
    ]
    run_function(train_runs, 1, *runs)
    for kind in KINDS:
        direct, detour = (
            state_of(tmp_path / name / "checkpoints" / "step-0000006", kind)
            for name in ("direct", "detour")
        )
        assert_same(detour, direct)


def test_reading_it_again_gives_the_same_weights(small_world, loop, tmp_path):
    """An exported folder of the import is a source like any other."""
    file = loop.save(tmp_path / "weights.pt", opt=None)
    imported(file, tmp_path / "run", *overrides_for(small_world.folder)[:-1])
    found = open_foreign(tmp_path / "run" / "export" / "model.safetensors")
    assert_same(dict(found.weights["model"]), loop.ema)


def test_an_empty_folder_behind_a_link_is_filled(small_world, loop, tmp_path):
    file = loop.save(tmp_path / "0000002.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    imported(file, tmp_path / "link", *overrides_for(small_world.folder))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty" / "config.yaml").exists()


def test_latents_scaled_by_statistics_of_their_own(small_world, tmp_path):
    loop = repa_run(small_world.config)
    loop.arguments |= {"projection_layer_type": "mlp", "enc_type": "None"}
    for state in (loop.weights, loop.ema):
        state["x_embedder.proj.weight"] = torch.ones(48, 4, 2, 2)
        for part, shape in (("weight", (16, 48)), ("bias", (16,))):
            state[f"final_layer.linear.{part}"] = torch.ones(shape)
    file = loop.save(tmp_path / "0000001.pt", opt=None)
    statistics = {
        "latents_scale": torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1),
        "latents_bias": torch.tensor([0.5, 0.25, 0, -1]).view(1, 4, 1, 1),
    }
    torch.save(statistics, tmp_path / "stats.pt")
    option = f"--latent-statistics={tmp_path / 'stats.pt'}"
    imported(file, tmp_path / "run", "model.num_heads=3", option)
    codec = load_config(tmp_path / "run" / "config.yaml").codec
    assert codec.scale == (1, 2, 3, 4)
    assert codec.shift == (0.5, 0.25, 0, -1)


@pytest.mark.parametrize(("missing", "name"), [("ema", "0000002.pt"), ("steps", "last.pt")])
def test_a_training_that_is_not_whole_starts_anew(
    small_world, loop, tmp_path, capsys, missing, name
):
    file = loop.save(tmp_path / name, **{missing: None})
    imported(file, tmp_path / "run", *overrides_for(small_world.folder)[:-1])
    assert (tmp_path / "run" / "export").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()
    said = capsys.readouterr().out
    assert f"Adam's state is not taken over: there is no {missing} to go on with" in said


def test_the_folder_of_the_command_is_not_replaced(loop, tmp_path, monkeypatch, capsys):
    file = loop.save(tmp_path / "0000002.pt")
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert command(["import", str(file), ".", "model.num_heads=3"]) == 2
    assert "is where this command runs; choose another FOLDER" in capsys.readouterr().err
    assert not [*(tmp_path / "run").iterdir()]
