"""The experiment's configuration: shipped files, cross-checks, folders."""

from pathlib import Path

import pytest
import torch
from places import ROOT

from srepa_ds.cli import run
from srepa_ds.commands.parity import ParityConfig
from srepa_ds.commands.teacher import TeacherTrainingConfig
from srepa_ds.config.experiment import Config, config_from, load_config, samples_folder
from srepa_ds.documents.yaml_reader import parse_yaml
from srepa_ds.errors import ConfigError
from srepa_ds.model.sit import SiT
from srepa_ds.preparation.config import PrepareConfig
from srepa_ds.schema import load_section, validated
from srepa_ds.trees import load_tree

CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))
KINDS = {
    "prepare": PrepareConfig,
    "teacher": TeacherTrainingConfig,
    "parity": ParityConfig,
    "experiment": Config,
}
TEACHER = {"name": "dinov2-vit-b", "weights": "dinov2.safetensors"}
ALIGNMENT = {"teacher": TEACHER, "depth": 4, "structural": {"kind": "mse", "weight": 2.0}}


def tree(**changes) -> dict:
    return {
        "run": {"folder": "runs/test"},
        "data": {"folder": "data/test"},
        "model": {"variant": "SiT-B/2", "input_size": 32, "in_channels": 4, "num_classes": 1000},
        "alignments": [ALIGNMENT],
        "train": {"steps": 10, "batch_size": 8},
        **changes,
    }


def paths_of_faults(tree: dict) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config_from(tree, source="test")
    return [fault.path for fault in caught.value.faults]


def built(**changes) -> Config:
    return config_from(tree(**changes), source="test")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_is_valid_and_its_print_reads_back(path, capsys):
    assert run(["config", str(path)]) == 0
    printed = capsys.readouterr().out
    loaded = load_tree(path)
    schema = KINDS[loaded.get("kind", "experiment")]
    config = validated(schema, loaded, source=path.name)
    assert validated(schema, parse_yaml(printed), source="print") == config
    assert printed.count("# ") >= len(schema.model_fields)


LATENT = sorted(ROOT.glob("configs/imagenet*/sit-*.yaml"))
VAE_DOWNSAMPLING = 8


@pytest.mark.parametrize("path", LATENT, ids=lambda path: str(path.relative_to(ROOT)))
def test_experiments_on_imagenet_fit_their_data_and_teacher(path):
    config = load_config(path)
    prepare = load_section(PrepareConfig, path.parent / "prepare.yaml")
    assert config.data.folder == prepare.output / "train"
    assert config.model.latent_shape[1] * VAE_DOWNSAMPLING == prepare.image_size
    assert prepare.latents is not None
    assert prepare.latents.codec.kind == config.codec.kind == "vae"
    for alignment in config.alignments:
        spec = alignment.teacher.resolved
        side = spec.input_size_at(prepare.image_size)[0] // spec.patch_size
        assert (side, side) == config.model.grid
    with torch.device("meta"):
        model = SiT(config.model)
    assert model.pos_embed.shape[1] == config.model.num_tokens


def test_overrides_reach_what_is_printed(capsys):
    path = str(ROOT / "configs/digits-sit.yaml")
    assert run(["config", path, "train.steps=7", "optimizer.betas=[0.8, 0.9]"]) == 0
    printed = config_from(parse_yaml(capsys.readouterr().out), source="print")
    assert printed == load_config(Path(path), ["train.steps=7", "optimizer.betas=[0.8, 0.9]"])
    assert printed.train.steps == 7
    assert printed.optimizer.betas == (0.8, 0.9)


@pytest.mark.parametrize("checkpointing", ["{}", "{policy: selective, keep: products}"])
def test_activation_checkpointing_has_a_former_name(tmp_path, caplog, checkpointing):
    path = tmp_path / "experiment.yaml"
    base = ROOT / "configs/digits-sit.yaml"
    path.write_text(f"base: {base}\nengine: {{activation_checkpointing: {checkpointing}}}\n")
    new = load_config(path, ["engine.activation_checkpointing.policy=full"])
    assert not caplog.records
    assert load_config(path, ["engine.remat.policy=full"]) == new
    assert new.engine.activation_checkpointing.policy == "full"
    (record,) = caplog.records
    told = "the key 'engine.remat' is now 'engine.activation_checkpointing'; please rename it"
    assert record.getMessage() == told


def test_overrides_address_items_of_lists(small_world):
    config = load_config(
        small_world.config, ["alignments.0.depth=1", "alignments.0.pointwise=null"]
    )
    assert config.alignments[0].depth == 1
    assert config.alignments[0].pointwise is None


@pytest.mark.parametrize("schema", KINDS.values(), ids=KINDS)
def test_every_field_is_documented(schema):
    def undocumented(section, path=""):
        for name, field in section.model_fields.items():
            if not field.description:
                yield f"{path}{name}"
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                yield from undocumented(field.annotation, f"{path}{name}.")

    assert list(undocumented(schema)) == []


def test_defaults_are_the_papers():
    config = built()
    assert config.optimizer.learning_rate == 1e-4
    assert config.optimizer.betas == (0.9, 0.999)
    assert config.optimizer.weight_decay == 0
    assert config.optimizer.gradient_clipping == 1.0
    assert config.ema.decay == 0.9999
    assert not config.ema.warmup
    assert config.objective.label_dropout == 0.1


def test_five_faults_are_named_at_once_across_sections():
    found = paths_of_faults(
        tree(
            train={"steps": 10, "batch_size": 9, "accumulation_steps": 2},
            optimizer={"learning_rate": "1e-4", "betas": [0.9, 1.0]},
            alignments=[{**ALIGNMENT, "depth": 13}],
            ema={"decya": 0.9},
            engine={"deepspeed": "ds_configs/zero7.json"},
        )
    )
    assert found == [
        "optimizer.learning_rate",
        "optimizer.betas.1",
        "ema.decya",
        "alignments.0.depth",
        "train.batch_size",
        "engine.deepspeed",
    ]


def test_every_extractor_needs_weights_that_can_be_had():
    unpublished, fetched = {"name": "mocov3-vit-b"}, {"name": "inception"}
    section = {"reference": "real", "extractor": unpublished}
    further = [fetched, {**unpublished, "weights": "own.pt", "dtype": "fp32"}]
    assert paths_of_faults(tree(evaluate={**section, "further_extractors": further})) == [
        "evaluate.extractor.weights"
    ]
    section = {"reference": "real", "extractor": fetched}
    further = [{"name": "dinov2-vit-b"}, unpublished]
    assert paths_of_faults(tree(evaluate={**section, "further_extractors": further})) == [
        "evaluate.further_extractors.1.weights"
    ]


def test_two_extractors_of_one_name_are_refused():
    spec = {"architecture": "vit_tiny_patch16_224", "width": 192, "patch_size": 16}
    spec["input_size"] = 224
    section = {"reference": "real", "extractor": {"name": "inception"}}

    def found(*further):
        return paths_of_faults(tree(evaluate={**section, "further_extractors": further}))

    one, other = ({"spec": spec, "weights": name} for name in ("one.pt", "other.pt"))
    built(evaluate={**section, "further_extractors": [one, {**other, "dtype": "fp32"}]})
    assert found(one, other) == ["evaluate.further_extractors.1"]
    assert found({"name": "inception", "weights": "own.pt"}) == ["evaluate.further_extractors.0"]


def test_a_depth_is_held_against_the_overridden_model():
    model = {**tree()["model"], "depth": 3}
    assert paths_of_faults(tree(model=model)) == ["alignments.0.depth"]
    assert built(model={**model, "depth": 4}).model.shape.depth == 4


def test_a_broken_model_does_not_hide_the_other_sections():
    model = {**tree()["model"], "input_size": 33}
    found = paths_of_faults(tree(model=model, train={"steps": 0, "batch_size": 8}))
    assert found == ["model", "train.steps"]


def test_folders_follow_the_run_unless_given():
    config = built()
    assert config.run_folder.checkpoints == Path("runs/test/checkpoints")
    assert config.export_folder == config.weights_folder == Path("runs/test/export")
    assert samples_folder(config) == Path("runs/test/samples")
    config = built(export={"folder": "e"}, sample={"weights": "w", "folder": "s"})
    folders = (config.export_folder, config.weights_folder, samples_folder(config))
    assert folders == (Path("e"), Path("w"), Path("s"))
    assert built(export={"folder": "e"}).weights_folder == Path("e")


def test_an_unknown_kind_names_the_known_ones(tmp_path, capsys):
    path = tmp_path / "file.yaml"
    path.write_text("kind: preparation\n")
    assert run(["config", str(path)]) == 2
    assert "kind: unknown 'preparation'; did you mean 'prepare'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "is_refused"),
    [
        ({}, True),
        ({"resampling": {"direction": "teacher_to_student", "mode": "area"}}, True),
        ({"resampling": {"direction": "student_to_teacher", "mode": "area"}}, False),
        ({"structural": None, "pointwise": {"weight": 1.0}}, False),
    ],
)
def test_a_structural_term_needs_two_tokens(changes, is_refused):
    model = {"variant": "SiT-B/2", "input_size": 2, "in_channels": 4, "num_classes": 10}
    experiment = tree(model=model, alignments=[{**ALIGNMENT, **changes}])
    if is_refused:
        with pytest.raises(ConfigError, match="compares pairs of tokens, and the model has one"):
            config_from(experiment, source="test")
    else:
        config_from(experiment, source="test")
    oblong = {**experiment, "model": {**model, "input_size": [2, 4]}}
    config_from(oblong, source="test")
