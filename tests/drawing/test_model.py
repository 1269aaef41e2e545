"""The weights a set is drawn with: exports, checkpoints, files, guides; and what is refused."""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import objective_of, pieces_of, randomised
from ranks import run_function
from safetensors.torch import load_file, save_file

from srepa_ds.checkpoint import saving
from srepa_ds.commands.export import export
from srepa_ds.commands.sample import sample
from srepa_ds.config.experiment import Config, load_config, samples_folder
from srepa_ds.distributed import ranks
from srepa_ds.drawing.model import open_models
from srepa_ds.errors import CheckpointError, ConfigError, DataError, OutputError
from srepa_ds.files import sha256_of
from srepa_ds.model.sit import SiT
from srepa_ds.objective import official_name
from srepa_ds.preparation.share import EVERYTHING, Share
from srepa_ds.schema import replaced, to_tree
from srepa_ds.weights.exported import write_model

QUICK = ("sample.num_steps=2", "sample.batch_size=4", "sample.num_samples=6")


@pytest.fixture
def configured(small_world, tmp_path):
    """Returns a function that loads the configuration with overrides, in its own folder."""

    def load(*overrides: str) -> Config:
        own = (f"run.folder={tmp_path}/run", *QUICK, *overrides)
        return load_config(small_world.config, own)

    return load


def drawn(config: Config, share: Share = EVERYTHING) -> Path:
    """Draws a set in this process and returns its folder."""
    try:
        return sample(config, share=share)
    finally:
        ranks.close()


def images(folder: Path) -> np.ndarray:
    with np.load(folder / "samples.npz") as archive:
        return archive["arr_0"]


def facts(folder: Path) -> dict:
    return json.loads((folder / "provenance.json").read_text())


def save_checkpoint(
    config: Config, step: int, *, kinds=("master", "ema"), edit=lambda tree: tree
) -> None:
    """Writes a checkpoint whose weights are random, in pieces as of several ranks."""
    pieces = [
        piece
        for number, kind in enumerate(kinds)
        for piece in pieces_of(
            dict(randomised(objective_of(config), seed=step + number).named_parameters()),
            kind=kind,
            run=1000,
        )
    ]
    state = {"step": step, "adam_step": step, "config": edit(to_tree(config))}
    saving.save(config.run_folder.checkpoints, step=step, pieces=pieces, state=state, rank=0)


def write_export(folder: Path, config: Config, *, seed: int = 0, edit=lambda tree: tree) -> SiT:
    """Writes an exported model with random weights, and returns the model."""
    model = randomised(SiT(config.model), seed=seed)
    provenance = {"checkpoint": "none", "step": 5, "weights": "ema"}
    tree = edit(to_tree(config))
    write_model(folder, model.state_dict(), config=tree, provenance=provenance)
    return model


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


def official(config: Config, seed: int) -> dict[str, torch.Tensor]:
    objective = randomised(objective_of(config), seed=seed)
    return {official_name(name): value for name, value in objective.state_dict().items()}


def write_repa(path: Path, config: Config) -> None:
    """Writes a checkpoint as REPA's training does: weights, averages, pickled settings."""
    content = {
        "model": official(config, 1),
        "ema": official(config, 2),
        "opt": {"state": {}, "param_groups": []},
        "args": argparse.Namespace(model="SiT-XL/2"),
        "steps": 400_000,
    }
    torch.save(content, path)


@pytest.mark.parametrize(("weights", "seed"), [("ema", 2), ("master", 1)])
def test_a_checkpoint_of_repa_is_drawn_from(configured, tmp_path, weights, seed):
    config = configured(f"sample.weights={tmp_path}/0400000.pt", f"export.weights={weights}")
    write_repa(tmp_path / "0400000.pt", config)
    save_file(official(config, seed), tmp_path / "plain.safetensors")
    folder = drawn(config)
    assert folder == config.run.folder / "samples"
    found = facts(folder)
    assert found["checkpoint_sha256"] == sha256_of(tmp_path / "0400000.pt")
    assert found["ema"] == weights
    plain = configured(
        f"sample.weights={tmp_path}/plain.safetensors", f"sample.folder={tmp_path}/plain"
    )
    np.testing.assert_array_equal(images(drawn(plain)), images(folder))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("model.hidden_size=24",), r"does not fit the model: .*; set the section `model`"),
        (
            ("model.depth=2",),
            r"the model has no blocks\.2\.[^\n]* and \d+ more; set the section `model`[^\n]*$",
        ),
        (("export.weights=ema-0.99",), r"export\.weights: 'ema-0\.99': .* ema or master"),
        (("export.power_sigma=0.1",), r"export\.power_sigma: is made of a run's checkpoints"),
    ],
)
def test_files_of_another_model_or_kind_are_refused(configured, tmp_path, overrides, words):
    write_repa(tmp_path / "repa.pt", configured())
    with pytest.raises((CheckpointError, ConfigError), match=words):
        drawn(configured(f"sample.weights={tmp_path}/repa.pt", *overrides))


def test_a_file_without_the_wanted_kind_names_the_setting(configured, tmp_path):
    torch.save({"model": official(configured(), 1), "opt": {}}, tmp_path / "no-ema.pt")
    with pytest.raises(CheckpointError, match=r"does not hold 'ema'.*set export\.weights"):
        drawn(configured(f"sample.weights={tmp_path}/no-ema.pt"))


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


def without_dropout(tree):
    tree["objective"]["label_dropout"] = 0.0
    return tree


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


def test_the_guide_of_another_size_decides_the_images(configured, tmp_path):
    config = configured("sample.cfg_scale=2.5")
    write_export(config.export_folder, config)
    write_export(
        tmp_path / "guide", replaced(config, model=replaced(config.model, depth=1)), seed=1
    )
    guide = f"sample.guide={tmp_path}/guide"
    sets = [
        drawn(configured(*overrides, f"sample.folder={tmp_path}/set-{number}"))
        for number, overrides in enumerate(
            [
                ("sample.cfg_scale=2.5", guide),
                ("sample.cfg_scale=2.5",),
                ("sample.cfg_scale=1", guide),
                ("sample.cfg_scale=1",),
                ("sample.cfg_scale=2.5", guide, "sample.guidance_high=0.3"),
            ]
        )
    ]
    guided, by_label, at_one, plain, late = map(images, sets)
    assert not np.array_equal(guided, by_label)
    assert not np.array_equal(guided, plain)
    assert not np.array_equal(guided, late)
    np.testing.assert_array_equal(at_one, plain)
    assert facts(sets[0])["evaluations"] == {"conditional": 2, "unconditional": 0, "guide": 2}
    # Steps begin at 1 and 0.04.
    assert facts(sets[4])["evaluations"] == {"conditional": 2, "unconditional": 0, "guide": 1}
    assert "guide_sha256" not in facts(sets[2])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input_size": 8}, r"latents of \(3, 8, 8\), not \(3, 16, 16\)"),
        ({"num_classes": 4}, "number of classes 4, not 10"),
        ({"class_token_width": 32}, "class_token_width 32, not None"),
    ],
)
def test_a_guide_of_other_images_is_refused(configured, tmp_path, changes, words):
    config = configured()
    write_export(config.export_folder, config)
    other = replaced(config, model=replaced(config.model, **changes))
    write_export(tmp_path / "guide", other)
    with pytest.raises(ConfigError, match=rf"sample\.guide: .* has {words}; give a guide"):
        drawn(configured(f"sample.guide={tmp_path}/guide"))


def test_a_guide_of_another_path_is_refused(configured, tmp_path):
    config = configured()
    write_export(config.export_folder, config)

    def cosine(tree):
        tree["objective"]["interpolant"]["path"] = "cosine"
        return tree

    write_export(tmp_path / "guide", config, edit=cosine)
    with pytest.raises(ConfigError, match=r"sample\.guide: .* has path cosine, not linear"):
        drawn(configured(f"sample.guide={tmp_path}/guide"))


def test_a_class_token_is_autoguided_with_its_own_scale(configured, tmp_path):
    overrides = ("model.class_token_width=32", "sample.cfg_scale=2")
    config = configured(*overrides)
    write_export(config.export_folder, config)
    write_export(tmp_path / "guide", config, seed=1)
    sets = [
        images(drawn(configured(*overrides, f"sample.cls_cfg_scale={scale}",
                                f"sample.guide={tmp_path}/guide", f"sample.folder={tmp_path}/{n}")))
        for n, scale in enumerate((0, 9))
    ]  # fmt: skip
    assert not np.array_equal(*sets)


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


def test_the_heads_of_a_model_that_its_file_does_not_describe_are_a_fact(configured, tmp_path):
    save_file(official(configured(), 1), tmp_path / "plain.safetensors")
    own = (f"sample.weights={tmp_path}/plain.safetensors", f"sample.folder={tmp_path}/set")
    sizes = facts(drawn(configured(*own)))["model"]
    assert (sizes["num_heads"], sizes["depth"]) == (3, 3)
    with pytest.raises(OutputError, match=r"model\.num_heads: 3 there, 6 now"):
        drawn(configured(*own, "model.num_heads=6"))


@pytest.mark.parametrize("form", ["file", "repa", "checkpoint"])
def test_a_guide_is_read_in_every_form(configured, tmp_path, form):
    config = configured("sample.cfg_scale=2.5", "run.folder=" + str(tmp_path / "weaker"))
    save_checkpoint(config, 7)
    places = {
        "file": tmp_path / "guide.safetensors",
        "repa": tmp_path / "0400000.pt",
        "checkpoint": tmp_path / "weaker/checkpoints/step-0000007",
    }
    # Of a checkpoint, the average of the step is the guide.
    guide = {
        "file": official(config, 2),
        "repa": official(config, 2),
        "checkpoint": official(config, 8),
    }[form]
    save_file(guide, places["file"])
    write_repa(places["repa"], config)
    write_export(configured().export_folder, configured())
    own = ("sample.cfg_scale=2.5", f"sample.folder={tmp_path}/own")
    found = drawn(configured(*own, f"sample.guide={places[form]}"))
    model = {k: v for k, v in guide.items() if not k.startswith("projectors.")}
    provenance = {"checkpoint": "none", "step": 5, "weights": "ema"}
    write_model(tmp_path / "as-export", model, config=to_tree(config), provenance=provenance)
    expected = ("sample.cfg_scale=2.5", f"sample.folder={tmp_path}/expected")
    exported = drawn(configured(*expected, f"sample.guide={tmp_path}/as-export"))
    np.testing.assert_array_equal(images(found), images(exported))
    assert ("guide" in facts(found)) == (form != "checkpoint")


def test_a_guide_that_is_nothing_of_the_kind_names_what_would_be(configured, tmp_path):
    config = configured("sample.cfg_scale=2.5")
    write_export(config.export_folder, config)
    (tmp_path / "empty").mkdir()
    for guide, words in (
        ("empty", r"sample\.guide: .*does not hold an exported model.* or give a checkpoint"),
        ("absent", r"sample\.guide: .*absent/config\.json: no such file.* or give a checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=words):
            drawn(configured("sample.cfg_scale=2.5", f"sample.guide={tmp_path / guide}"))
    torch.save({"model": official(config, 1), "opt": {}}, tmp_path / "no-ema.pt")
    with pytest.raises(CheckpointError, match=r"does not hold 'ema'.*set sample\.guide to a file"):
        drawn(configured("sample.cfg_scale=2.5", f"sample.guide={tmp_path}/no-ema.pt"))


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
    with pytest.raises(CheckpointError, match="unknown codec.*\n.*make it again with `srepa-ds ex"):
        drawn(config)
