"""The folder for diffusers: what is in it, what it refuses, and what it leaves alone."""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from builders import contents, largest_file, odd_sizes, randomised
from drawn_sets import save_checkpoint, without_dropout
from safetensors import safe_open
from safetensors.torch import load_file
from small_vae import write_vae

from srepa_ds.checkpoint import saving
from srepa_ds.checkpoint.fragment_file import Piece
from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.commands.export import export
from srepa_ds.config.experiment import load_config
from srepa_ds.errors import CheckpointError, DataError, OutputError
from srepa_ds.model.sit import SiT
from srepa_ds.schema import to_tree
from srepa_ds.weights.from_checkpoint import chosen_checkpoint, read_checkpoint_weights
from srepa_ds.weights.ownership import run_of
from srepa_ds.weights.reversed_time import reversed_time

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LATENTS = ("alignments=[]", "model.in_channels=4", "model.input_size=8", "codec.kind=vae")


@pytest.fixture
def configured(small_world, tmp_path):
    """Returns a function that loads the configuration with overrides, in its own folder."""

    def load(*overrides: str):
        own = (f"run.folder={tmp_path}/run", "export.format=diffusers", *overrides)
        return load_config(small_world.config, own)

    return load


def save_model(config, model: SiT | None = None) -> None:
    """Writes a checkpoint of a model alone, by default of random weights."""
    model = model or randomised(SiT(config.model))
    pieces = [
        Piece("ema", f"sit.{name}", tuple(value.shape), 0, value.detach().reshape(-1))
        for name, value in model.named_parameters()
    ]
    state = {"step": 5, "adam_step": 5, "config": to_tree(config)}
    saving.save(config.run_folder.checkpoints, step=5, pieces=pieces, state=state, rank=0)


def expected_tensors(config) -> dict[str, torch.Tensor]:
    folder = chosen_checkpoint(config.run_folder.checkpoints, None)
    source = read_checkpoint_weights(folder, weights="ema", power_sigma=None, schema=type(config))
    turned = reversed_time(source.tensors.only(lambda n: not n.startswith("projectors.")))
    return dict(turned)


def document(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def test_what_is_in_it(configured, tmp_path):
    config = configured("objective.interpolant.path=cosine", "sample.solver=heun")
    save_checkpoint(config, 5)
    folder = export(config)
    assert folder == tmp_path / "run" / "export-diffusers"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "model_index.json",
        "provenance.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        WEIGHTS,
    }
    found, expected = load_file(folder / WEIGHTS), expected_tensors(config)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert document(folder, "transformer/config.json") == {
        "_class_name": "SiTTransformer2DModel",
        "input_size": 16,
        "patch_size": 2,
        "in_channels": 3,
        "hidden_size": 48,
        "depth": 3,
        "num_heads": 3,
        "mlp_ratio": 4.0,
        "class_dropout_prob": 0.1,
        "num_classes": 10,
        "learn_sigma": False,
    }
    assert document(folder, "scheduler/scheduler_config.json") == {
        "_class_name": "SiTFlowMatchScheduler",
        "solver": "heun",
        "path": "cosine",
    }
    assert document(folder, "model_index.json") == {
        "_class_name": "SiTPipeline",
        "transformer": ["srepa_ds.pipeline", "SiTTransformer2DModel"],
        "scheduler": ["srepa_ds.pipeline", "SiTFlowMatchScheduler"],
        "vae": [None, None],
        "id2label": {str(number): str(number) for number in range(10)},
        "latent_scale": None,
        "latent_shift": None,
    }
    checkpoint = chosen_checkpoint(config.run_folder.checkpoints, None)
    tree = CheckpointReader(checkpoint).state["config"]
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    assert document(folder, "provenance.json") == {
        "format": "srepa_ds.diffusers",
        "version": 1,
        "run": "run",
        "step": 5,
        "weights": "ema",
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "checkpoint": CheckpointReader(checkpoint).fingerprint(),
        "run_id": run_of(tree),
        "dtype": "fp32",
        "ema_decay": 0.9,
    }


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_and_shards(configured, dtype, kind):
    config = configured(f"export.dtype={dtype}", "export.max_shard_size=100KB")
    save_checkpoint(config, 5)
    folder, expected = export(config) / "transformer", expected_tensors(config)
    index = document(folder, "diffusion_pytorch_model.safetensors.index.json")
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    found = {name: load_file(folder / file)[name] for name, file in index["weight_map"].items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value if name == "pos_embed" else value.to(kind)), name
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in found.values())
    assert all((folder / file).stat().st_size < 110_000 for file in files)


def test_weights_beyond_half_precision_are_refused(configured, tmp_path):
    config = configured("export.dtype=fp16", "alignments=[]")
    model = randomised(SiT(config.model))
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] = 1e5
    save_model(config, model)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.fc1\.weight has values up to 1e"):
        export(config)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints"}


def test_without_dropout_there_is_no_row_for_no_class(configured):
    config = configured()
    save_checkpoint(config, 5, edit=without_dropout)
    folder = export(config)
    assert document(folder, "transformer/config.json")["class_dropout_prob"] == 0.0
    table = "y_embedder.embedding_table.weight"
    found = load_file(folder / WEIGHTS)[table]
    assert torch.equal(found, expected_tensors(config)[table][:10])


def test_the_vae_is_copied_without_code(configured, tmp_path):
    vae = write_vae(tmp_path / "vae")
    (vae / "code.py").write_text("raise AssertionError")
    torch.save({}, vae / "diffusion_pytorch_model.bin")
    config = configured(*LATENTS, f"codec.weights={vae}", "codec.shift=0.25")
    save_checkpoint(config, 5)
    folder = export(config)
    assert contents(folder / "vae") == {
        name: (vae / name).read_bytes()
        for name in ("config.json", "diffusion_pytorch_model.safetensors")
    }
    index = document(folder, "model_index.json")
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert (index["latent_scale"], index["latent_shift"]) == (None, 0.25)
    other = write_vae(tmp_path / "other", decoder_seed=3)
    export(configured(*LATENTS, f"codec.weights={vae}", f"sample.decoder={other}"))
    assert (folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == (
        other / "diffusion_pytorch_model.safetensors"
    ).read_bytes()


def test_a_vae_that_is_not_whole_is_refused(configured, tmp_path):
    vae = write_vae(tmp_path / "vae")
    config = configured(*LATENTS, f"codec.weights={vae}")
    save_checkpoint(config, 5)
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(DataError, match="holds no VAE, as it lacks diffusion_pytorch_model"):
        export(config)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints"}


def test_a_vae_that_is_elsewhere_is_said_and_left_out(configured, tmp_path, caplog):
    vae = write_vae(tmp_path / "vae")
    config = configured(*LATENTS, f"codec.weights={vae}")
    save_checkpoint(config, 5)
    shutil.rmtree(vae)
    with caplog.at_level(logging.WARNING):
        folder = export(config)
    assert not (folder / "vae").exists()
    assert document(folder, "model_index.json")["vae"] == ["diffusers", "AutoencoderKL"]
    assert f"or copy the VAE's folder to {folder}/vae" in caplog.text


def test_without_the_data_set_classes_have_no_names(configured, tmp_path):
    config = configured(f"data.folder={tmp_path}/elsewhere")
    save_checkpoint(config, 5)
    assert document(export(config), "model_index.json")["id2label"] is None


@pytest.mark.parametrize(("overrides", "says"), [
    (["model.class_token_width=32"], "a class token .* as REG has"),
    (["alignments=[]", "model.qk_norm=true"], "norms of queries and keys"),
    (["alignments=[]", "model.input_size=[16,24]"], r"not square \(16 x 24 latents\)"),
])  # fmt: skip
def test_what_the_layout_cannot_hold_is_refused(configured, tmp_path, overrides, says):
    config = configured(*overrides)
    save_model(config)
    with pytest.raises(CheckpointError, match=f"{says}.*; export.format=srepa_ds can"):
        export(config)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints"}


def test_an_earlier_export_of_the_run_is_replaced(configured, tmp_path):
    save_checkpoint(configured(), 5)
    folder = export(configured("export.max_shard_size=100KB"))
    (folder / "README.md").write_text("a card")
    save_checkpoint(configured(), 10)
    assert export(configured()) == folder
    assert document(folder, "provenance.json")["step"] == 10
    assert [path.name for path in (folder / "transformer").glob("*.safetensors*")] == [
        "diffusion_pytorch_model.safetensors"
    ]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "checkpoints",
        "export-diffusers",
    }


def test_another_runs_export_is_replaced_only_if_asked_for(configured, tmp_path):
    place = f"export.folder={tmp_path}/model"
    save_checkpoint(configured(), 5)
    export(configured(place))
    before = contents(tmp_path / "model")
    other = configured(f"run.folder={tmp_path}/other", place)
    save_checkpoint(other, 7)
    with pytest.raises(
        OutputError, match=r"of the run .*/run \[.*, and this is one of .*/other \[.*--replace"
    ):
        export(other)
    assert contents(tmp_path / "model") == before
    export(other, replace=True)
    assert document(tmp_path / "model", "provenance.json")["run"] == "other"


@pytest.mark.parametrize("name", ["notes.txt", "model_index.json"])
def test_a_folder_with_anything_else_is_left_alone(configured, tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).write_text("{}")
    config = configured(f"export.folder={folder}")
    save_checkpoint(config, 5)
    for replace in (False, True):
        with pytest.raises(OutputError, match=f"other than an exported model.*{name}"):
            export(config, replace=replace)
    assert contents(folder) == {name: b"{}"}
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is no folder"):
        export(configured(f"export.folder={tmp_path}/file"))


def test_a_clone_of_git_is_left_alone(configured, tmp_path):
    save_checkpoint(configured(), 5)
    folder = export(configured())
    (folder / ".git").mkdir()
    with pytest.raises(OutputError, match=r"holds \.git, which would go with the earlier export"):
        export(configured(), replace=True)
    assert (folder / ".git").exists()


def test_the_folder_of_the_command_is_not_replaced(configured, tmp_path, monkeypatch):
    save_checkpoint(configured(), 5)
    folder = export(configured())
    monkeypatch.chdir(folder)
    before = contents(folder)
    with pytest.raises(OutputError, match="is where this command runs"):
        export(configured())
    assert contents(folder) == before


def test_a_model_between_two_names_is_found_again(configured, tmp_path):
    config = configured()
    save_checkpoint(config, 5)
    folder = export(config)
    before = contents(folder)
    folder.rename(tmp_path / "run" / ".export-diffusers.replaced")
    save_checkpoint(config, 10)
    with largest_file(100_000), pytest.raises(OutputError, match="cannot write the model"):
        export(config)
    assert contents(folder) == before


def test_a_link_stays_a_link(configured, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    config = configured(f"export.folder={tmp_path}/model")
    save_checkpoint(config, 5)
    export(config)
    export(config)
    assert (tmp_path / "model").is_symlink()
    assert (tmp_path / "disk" / "model_index.json").exists()


def test_a_full_disk_leaves_what_was_there(configured, tmp_path):
    config = configured()
    save_checkpoint(config, 5)
    with largest_file(100_000), pytest.raises(OutputError, match="cannot write the model"):
        export(config)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints"}
    folder = export(config)
    before = contents(folder)
    save_checkpoint(config, 10)
    with largest_file(100_000), pytest.raises(OutputError, match="cannot write the model"):
        export(config)
    assert contents(folder) == before


def test_what_a_killed_export_left_is_removed(configured, tmp_path):
    config = configured()
    save_checkpoint(config, 5)
    left = tmp_path / "run" / ".export-diffusers.writing"
    (left / "transformer").mkdir(parents=True)
    export(config)
    assert not left.exists()
    left.mkdir()
    (left / "mine.txt").write_text("")
    with pytest.raises(OutputError, match="is in the way of the export"):
        export(config)
    assert (left / "mine.txt").exists()


def test_odd_sizes_are_written(tmp_path, small_world):
    overrides = [f"model.{name}={value}" for name, value in odd_sizes()["model"].items()]
    own = [f"run.folder={tmp_path}/run", "export.format=diffusers", "alignments=[]", *overrides]
    config = load_config(small_world.config, own)
    save_model(config)
    found, expected = load_file(export(config) / WEIGHTS), expected_tensors(config)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
