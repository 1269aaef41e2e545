"""The weights a set is drawn with: exports, checkpoints; and what is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_sets import drawn, facts, images, save_checkpoint, without_dropout, write_export
from ranks import run_function
from safetensors.torch import load_file, save_file

from srepa_ds.commands.export import export
from srepa_ds.config.experiment import load_config, samples_folder
from srepa_ds.distributed import ranks
from srepa_ds.drawing.model import open_models
from srepa_ds.errors import CheckpointError, ConfigError, DataError, OutputError
from srepa_ds.files import sha256_of
from srepa_ds.preparation.share import Share
from srepa_ds.schema import to_tree
from srepa_ds.weights.exported import write_model


@pytest.mark.parametrize("weights", ["ema", "master"])
def test_a_checkpoint_draws_the_set_of_its_export(configured, tmp_path, weights):
    config = configured(f"export.weights={weights}")
    save_checkpoint(config, 7)
    save_checkpoint(config, 9)
    export(config)
    from_export = drawn(config)
    own = configured(
        f"export.weights={weights}", "sample.source=checkpoint", f"sample.folder={tmp_path}/own"
    )
    direct = drawn(own)
    np.testing.assert_array_equal(images(direct), images(from_export))
    # The same facts, so one can finish what the other began.
    assert (direct / "provenance.json").read_bytes() == (
        from_export / "provenance.json"
    ).read_bytes()
    assert facts(direct)["ema"] == weights


def test_the_folder_is_named_after_the_checkpoint(configured):
    config = configured("sample.source=checkpoint")
    save_checkpoint(config, 7)
    save_checkpoint(config, 9)
    assert samples_folder(config) == config.run_folder.samples(9)
    assert drawn(config) == config.run_folder.samples(9)
    earlier = configured("sample.source=checkpoint", "export.step=7")
    assert drawn(earlier) == config.run_folder.samples(7)
    assert not np.array_equal(images(samples_folder(earlier)), images(samples_folder(config)))


def test_faults_of_checkpoints_are_those_of_export(configured):
    config = configured("sample.source=checkpoint", f"sample.folder={'set'}")
    with pytest.raises(CheckpointError, match="holds no checkpoint; train first"):
        drawn(config)
    save_checkpoint(config, 7)
    for override, words in (
        ("export.step=8", "step-0000008 is not valid"),
        ("export.weights=ema-0.5", "holds no 'ema-0.5'; export.weights may be: ema, master"),
        ("export.power_sigma=0.1", "holds no power-function averages"),
    ):
        with pytest.raises(CheckpointError, match=words):
            drawn(configured("sample.source=checkpoint", "sample.folder=set", override))


def with_nan(place: Path) -> None:
    file = place / "model.safetensors"
    tensors = load_file(file)
    tensors["blocks.1.mlp.fc1.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    document = json.loads((place / "config.json").read_text())
    document["sha256"] = sha256_of(file)
    (place / "config.json").write_text(json.dumps(document))


def test_weights_that_are_not_finite_are_refused(configured, tmp_path):
    config = configured()
    write_export(config.export_folder, config)
    write_export(tmp_path / "guide", config, seed=1)
    with_nan(tmp_path / "guide")
    words = r"not finite: blocks\.1\.mlp\.fc1\.weight; choose weights from before"
    with pytest.raises(CheckpointError, match=rf"guide: {words}"):
        drawn(configured(f"sample.guide={tmp_path}/guide", "sample.cfg_scale=2"))
    with_nan(config.export_folder)
    with pytest.raises(CheckpointError, match=rf"export: {words}"):
        drawn(config)


def test_no_guidance_by_a_null_label_that_was_never_trained(configured, tmp_path):
    config = configured("sample.cfg_scale=1.5")
    write_export(config.export_folder, config, edit=without_dropout)
    with pytest.raises(
        ConfigError, match=r"sample\.cfg_scale: .*label_dropout is 0.*sample\.guide"
    ):
        drawn(config)
    assert not samples_folder(config).exists()
    drawn(configured("sample.cfg_scale=1", f"sample.folder={tmp_path}/plain"))
    write_export(tmp_path / "guide", config, seed=1, edit=without_dropout)
    guided = drawn(configured("sample.cfg_scale=1.5", f"sample.guide={tmp_path}/guide"))
    assert facts(guided)["guide_sha256"] == sha256_of(tmp_path / "guide" / "model.safetensors")


def test_images_that_are_not_finite_are_named(configured, tmp_path):
    config = configured("sample.solver=euler")
    model = write_export(config.export_folder, config)
    with torch.no_grad():
        # Finite weights whose product is not: one class alone overflows.
        table = model.y_embedder.embedding_table.weight
        table[3] = 3e38
    provenance = {"checkpoint": "none", "step": 5, "weights": "ema"}
    write_model(
        config.export_folder, model.state_dict(), config=to_tree(config), provenance=provenance
    )
    broken = configured("sample.labels=[1, 2, 4, 5, 6, 3]", "sample.cfg_scale=1")
    drawn(broken, Share(0, 2))
    words = r"image 5 of the set: its latents are NaN or infinite; 1 of the 2 images of its chunk;"
    with pytest.raises(DataError, match=words):
        drawn(broken)
    # The first chunk stays.
    assert len(list((samples_folder(config) / "parts").iterdir())) == 1


def test_labels_of_a_file_are_drawn_and_decide_the_set(configured, tmp_path):
    config = configured()
    write_export(config.export_folder, config)
    listed = tmp_path / "labels.txt"
    listed.write_text("3\n1\n3\n0\n9\n7\n")
    folder = drawn(configured(f"sample.label_file={listed}"))
    with np.load(folder / "samples.npz") as archive:
        assert archive["arr_1"].tolist() == [3, 1, 3, 0, 9, 7]
    listed.rename(tmp_path / "moved.txt")
    assert drawn(configured(f"sample.label_file={tmp_path}/moved.txt")) == folder
    (tmp_path / "other.txt").write_text("3\n1\n3\n0\n9\n10\n")
    with pytest.raises(ConfigError, match=r"sample\.label_file: .*line 6: class 10"):
        drawn(configured(f"sample.label_file={tmp_path}/other.txt"))
    (tmp_path / "other.txt").write_text("3\n1\n3\n0\n9\n8\n")
    with pytest.raises(OutputError, match=r"labels_sha256: .* there, .* now"):
        drawn(configured(f"sample.label_file={tmp_path}/other.txt"))


def test_cuda_graphs_without_a_gpu_are_refused(configured):
    with pytest.raises(ConfigError, match="cuda_graphs needs compiled models"):
        configured("sample.cuda_graphs=true")
    if not torch.cuda.is_available():
        config = configured("sample.cuda_graphs=true", "sample.compile=true")
        with pytest.raises(ConfigError, match=r"sample\.cuda_graphs: needs a GPU"):
            drawn(config)


def test_a_compiled_model_draws_and_is_a_fact(configured, monkeypatch):
    config = configured("sample.compile=true")
    write_export(config.export_folder, config)
    compiled = []

    def compile(call, **options):
        compiled.append(options)
        return call

    monkeypatch.setattr(torch, "compile", compile)
    folder = drawn(config)
    assert compiled == [{"dynamic": False, "mode": None}]
    assert facts(folder)["compiled"] is True
    with pytest.raises(OutputError, match="compiled: True there, None now"):
        drawn(configured())


def open_in_own_folder(config: str, root: str) -> str:
    """Opens the models of a relative path, which is another folder on each rank."""
    os.chdir(Path(root, os.environ["RANK"]))
    ranks.initialize()
    try:
        open_models(load_config(Path(config), ["sample.weights=export"]))
    except ConfigError as error:
        return str(error)
    finally:
        ranks.close()
    return "no error"


@pytest.mark.slow
def test_ranks_with_different_weights_are_refused(configured, small_world, tmp_path):
    for rank in (0, 1):
        write_export(tmp_path / str(rank) / "export", configured(), seed=rank)
    messages = run_function(open_in_own_folder, 2, small_world.config, tmp_path)
    assert messages[0] == messages[1]
    assert "ranks read different weights; give all of them the same files" in messages[0]
    assert "model: " in messages[0]


def test_the_cure_for_a_configuration_is_that_of_its_source(configured, tmp_path):
    def broken(tree):
        tree["codec"] = {"kind": "unheard-of"}
        return tree

    config = configured()
    save_checkpoint(config, 7, edit=broken)
    with pytest.raises(CheckpointError, match="unknown codec") as from_checkpoint:
        drawn(configured("sample.source=checkpoint"))
    assert "choose another one" in str(from_checkpoint.value)
    assert "srepa-ds export" not in str(from_checkpoint.value)
    write_export(config.export_folder, config, edit=broken)
    with pytest.raises(
        CheckpointError, match=r"unknown codec.*\n.*make it again with `srepa-ds ex"
    ):
        drawn(config)
