"""Experiments of what foreign files tell of their training."""

from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from srepa_ds.config.experiment import Config, config_from
from srepa_ds.errors import CheckpointError, ConfigError
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig
from srepa_ds.trees import merged
from srepa_ds.weights.foreign.model import ForeignModel, OptimizerState
from srepa_ds.weights.foreign.settings import Described, described
from srepa_ds.weights.foreign.told import Told

REPA = {
    "model": "SiT-XL/2", "resolution": 256, "num_classes": 1000, "encoder_depth": 8,
    "enc_type": "dinov2-vit-b", "proj_coeff": 0.5, "path_type": "linear", "prediction": "v",
    "weighting": "uniform", "qk_norm": False, "fused_attn": True, "cfg_prob": 0.1, "legacy": False,
    "learning_rate": 1e-4, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 0.0,
    "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "batch_size": 256,
    "gradient_accumulation_steps": 1, "max_train_steps": 400_000, "mixed_precision": "fp16",
    "seed": 3, "allow_tf32": True, "data_dir": "../data", "report_to": "wandb",
}  # fmt: skip
SIZES = {"variant": "SiT-S/2", "input_size": 32, "in_channels": 4, "num_classes": 1000}
MLP = {"0.weight": (2048, 384), "2.weight": (2048, 2048), "4.weight": (768, 2048)}
CONV = {"projection_layer.weight": (768, 384, 3, 3), "projection_layer.bias": (768,)}


def model_of(
    settings: dict[str, Any], *projectors: dict, layout: str = "repa", **changes
) -> ForeignModel:
    """Returns a model without values that has these settings and projectors."""
    sizes = {name: changes.pop(name) for name in list(changes) if name in SiTConfig.model_fields}
    with torch.device("meta"):
        weights = dict(SiT(SiTConfig(**SIZES | sizes)).named_parameters())
        for number, layers in enumerate(projectors):
            weights |= {f"projectors.{number}.{k}": torch.empty(v) for k, v in layers.items()}
    positions = torch.empty(1, 256 + ("class_token_width" in sizes), 384, device="meta")
    told = {"positions": positions, **changes}
    return ForeignModel(Path("weights.pt"), layout, {"ema": weights}, settings=settings, **told)


def experiment_of(found: Described) -> Config:
    tree = merged(found.tree, {"run": {"folder": "run"}})
    return config_from(tree, source="test")


def notes_of(found: Described) -> str:
    return "\n".join(note.text for note in found.notes)


def test_repa():
    found = described(model_of(REPA, MLP, step=100_000))
    config = experiment_of(found)
    (alignment,) = config.alignments
    assert (alignment.teacher.name, alignment.depth) == ("dinov2-vit-b", 8)
    assert alignment.projector.kind == "mlp"
    assert alignment.projector.hidden_width == 2048
    assert alignment.pointwise.weight == 0.5
    assert (alignment.pointwise.include_cls, alignment.spatial_norm) == (False, None)
    assert config.model == SiTConfig(**SIZES)
    assert (config.objective.interpolant.path, config.objective.label_dropout) == ("linear", 0.1)
    assert (config.codec.kind, str(config.codec.weights)) == ("vae", "stabilityai/sd-vae-ft-mse")
    assert (config.optimizer.learning_rate, config.optimizer.betas) == (1e-4, (0.9, 0.999))
    assert (config.optimizer.gradient_clipping, config.ema.decay) == (1.0, 0.9999)
    assert (config.train.steps, config.train.batch_size, config.run.seed) == (400_000, 256, 3)
    assert config.engine.precision == "bf16_autocast"
    assert (config.sample.preset, str(config.sample.decoder)) == (
        "repa",
        "stabilityai/sd-vae-ft-ema",
    )
    assert str(config.data.folder) == "data/imagenet256/train"
    assert not found.lacks_heads
    assert not found.lacks_latent_statistics
    assert "not taken over: allow_tf32, data_dir, report_to" in notes_of(found)
    assert "engine.precision: bf16_autocast (mixed_precision was fp16)" in notes_of(found)
    assert "data.folder is not in it: data/imagenet256/train is assumed" in notes_of(found)


def test_reg():
    arguments = REPA | {"cls": 0.05}
    config = experiment_of(described(model_of(arguments, MLP, class_token_width=768)))
    assert config.model.class_token_width == 768
    assert config.objective.cls_weight == 0.05
    assert config.alignments[0].pointwise.include_cls
    assert config.sample.preset == "reg"


IREPA = REPA | {
    "projection_layer_type": "conv", "projection_loss_type": "cosine", "proj_coeff": "1.0",
    "spnorm_method": "zscore", "zscore_alpha": 0.6, "ema_decay": 0.999, "ema_update_freq": 2,
    "repa_loss": True, "enc_type": "dinov3-vit-b16",
}  # fmt: skip


def test_irepa():
    statistics = ((2.0, 3.0, 4.0, 5.0), (0.1, 0.2, 0.3, 0.4))
    found = described(model_of(IREPA, CONV), statistics)
    config = experiment_of(found)
    (alignment,) = config.alignments
    assert (alignment.projector.kind, alignment.projector.kernel) == ("conv", 3)
    assert (alignment.spatial_norm.gamma, alignment.pointwise.weight) == (0.6, 1.0)
    assert alignment.teacher.name == "dinov3-vit-b"
    assert (config.codec.scale, config.codec.shift) == statistics
    assert config.ema.decay == 0.999
    assert (config.sample.preset, config.sample.decoder) == ("irepa", None)
    assert "the average moved every 2 steps there" in notes_of(found)
    assert "the teacher dinov3-vit-b16 is dinov3-vit-b here" in notes_of(found)
    assert not found.lacks_latent_statistics
    assert described(model_of(IREPA, CONV)).lacks_latent_statistics
    assert described(model_of({}, CONV)).lacks_latent_statistics
    assert not described(model_of(IREPA, CONV, in_channels=3)).lacks_latent_statistics


def test_irepa_without_its_loss_has_no_alignment():
    found = described(model_of(IREPA | {"repa_loss": False}, CONV))
    assert found.tree["alignments"] == []
    assert "there are projectors, but no alignment is told" in notes_of(found)


def test_several_encoders():
    arguments = REPA | {"enc_type": "dinov2-vit-b,clip-vit-L"}
    wide = MLP | {"4.weight": (1024, 2048)}
    found = described(model_of(arguments, MLP, wide))
    names = [alignment.teacher.name for alignment in experiment_of(found).alignments]
    assert names == ["dinov2-vit-b", "clip-vit-l"]
    assert "the teacher clip-vit-L is clip-vit-l here" in notes_of(found)


def test_a_teacher_that_is_not_known_is_refused_where_settings_are():
    found = described(model_of(REPA | {"enc_type": "dinov2-vit-x"}, MLP))
    with pytest.raises(ConfigError, match=r"alignments.0.teacher.name: unknown teacher"):
        experiment_of(found)


def test_a_bare_file():
    found = described(model_of({}, MLP))
    config = experiment_of(found)
    assert config.model == SiTConfig(**SIZES)
    assert config.alignments == ()
    assert found.notes_beside([]) == [
        "data.folder is not in it: data/imagenet256/train is assumed",
        "there are projectors, but no alignment is told that they belong to: alignments is empty",
        "train.steps is not in it: 400,000 is assumed",
        "train.batch_size is not in it: 256 is assumed",
        "engine.precision: bf16_autocast (its precision is not told)",
        "sample.preset: repa",
    ]
    given = ["data.folder", "alignments", "train", "sample.presets", "engine.precision"]
    assert found.notes_beside(given) == ["sample.preset: repa"]


def test_a_bare_file_of_a_plain_model_has_no_note_of_alignments():
    assert "projectors" not in notes_of(described(model_of({})))


def test_sizes_of_no_variant_lack_heads():
    found = described(model_of({}, depth=5, num_heads=4))
    assert found.lacks_heads
    assert not described(model_of({"num_heads": 4}, depth=5, num_heads=4)).lacks_heads


def test_what_a_file_names_stays_on_one_line_without_codes():
    told = Told({"evil\x1b[2J\nERROR: fake": 1})
    told.note(f"not taken over: {', '.join(told.rest())}")
    assert told.notes[0].text == r"not taken over: evil\x1b[2J\nERROR: fake"


def test_original_sit():
    arguments = {
        "model": "SiT-S/2", "image_size": 512, "num_classes": 1000, "global_batch_size": 128,
        "global_seed": 4, "vae": "ema", "path_type": "GVP", "prediction": "velocity",
        "loss_weight": None, "epochs": 1400,
    }  # fmt: skip
    found = described(model_of(arguments, layout="sit", positions=torch.empty(1, 1024, 384)))
    config = experiment_of(found)
    assert config.model.input_size == 64
    assert (config.train.batch_size, config.run.seed) == (128, 4)
    assert config.objective.interpolant.path == "cosine"
    assert (config.optimizer.gradient_clipping, config.sample.preset) == (0.0, "sit")
    assert str(config.data.folder) == "data/imagenet512/train"
    assert "not taken over: vae, loss_weight, epochs" in notes_of(found)
    assert "mirrors half of its images" in notes_of(found)


def test_a_folder_of_diffusers():
    settings = {
        "_class_name": "SiTTransformer2DModel", "_diffusers_version": "0.42.1", "input_size": 32,
        "patch_size": 2, "in_channels": 4, "hidden_size": 384, "depth": 12, "num_heads": 6,
        "mlp_ratio": 4.0, "class_dropout_prob": 0.2, "num_classes": 1000, "learn_sigma": True,
    }  # fmt: skip
    found = described(model_of(settings, layout="diffusers", positions=None))
    config = experiment_of(found)
    assert config.model.shape == SiTConfig(**SIZES).shape
    assert (config.model.input_size, config.objective.label_dropout) == (32, 0.2)
    assert "not taken over" not in notes_of(found)
    assert (config.optimizer.gradient_clipping, config.sample.preset) == (1.0, None)
    assert "its trainer is not told" in notes_of(found)


def test_a_told_zero_is_refused_where_settings_are():
    names = ("batch_size", "gradient_accumulation_steps", "max_train_steps")
    found = described(model_of(REPA | dict.fromkeys(names, 0), MLP))
    with pytest.raises(ConfigError) as caught:
        experiment_of(found)
    places = {fault.path for fault in caught.value.faults}
    assert places == {"train.batch_size", "train.accumulation_steps", "train.steps"}


def test_statistics_of_latents_that_nothing_tells_of_are_taken_with_a_note():
    statistics = ((2.0, 3.0, 4.0, 5.0), (0.1, 0.2, 0.3, 0.4))
    assert "nothing in it says that its latents were" in notes_of(
        described(model_of(REPA, MLP), statistics)
    )
    assert "nothing in it says" not in notes_of(described(model_of(IREPA, CONV), statistics))


def test_the_optimizers_state_tells_more_than_arguments():
    settings = {"lr": 2e-4, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    state = OptimizerState({}, {}, 5, settings)
    optimizer = experiment_of(described(model_of(REPA, MLP, optimizer=state))).optimizer
    found = (optimizer.learning_rate, optimizer.epsilon, optimizer.weight_decay)
    assert found == (2e-4, 1e-6, 0.1)
    assert optimizer.betas == (0.8, 0.99)


@pytest.mark.parametrize(
    ("changes", "path", "value", "note"),
    [
        ({"cfg_prob": 0.2}, "objective.label_dropout", 0.1, "cfg_prob 0.2 never reached the model"),
        ({"cfg_prob": 0.2, "legacy": True}, "objective.label_dropout", 0.28, "dropped twice"),
        ({"gradient_accumulation_steps": 2}, "train.batch_size", 512, ""),
        ({"gradient_accumulation_steps": 2}, "train.accumulation_steps", 2, ""),
        ({"mixed_precision": "no"}, "engine.precision", "fp32", "mixed_precision was no"),
        ({"batch_size": "many"}, "train.batch_size", 256, "batch_size 'many' is no number"),
        ({"batch_size": torch.tensor(32)}, "train.batch_size", 32, ""),
        ({"max_train_steps": 10}, "train.steps", 10, "raise train.steps to go on"),
        ({"weighting": "lognormal"}, "objective.interpolant.time_weighting", "lognormal", ""),
        (
            {"projection_loss_type": "mse"},
            "alignments.0.pointwise.weight",
            0.5,
            "'mse' is not here",
        ),
        ({"proj_coeff": "0.5,1.0"}, "alignments.0.pointwise.weight", 1.5, "of several losses"),
        ({"proj_coeff": None}, "alignments.0.pointwise.weight", 0.5, "proj_coeff) is not told"),
        (
            {"spnorm_method": "zscore"},
            "alignments.0.spatial_norm.gamma",
            0.6,
            "zscore_alpha is not told: 0.6",
        ),
        ({"spnorm_method": "l2"}, "alignments.0.spatial_norm", None, "'l2' is not here"),
    ],
)
def test_a_setting_becomes_ours_or_a_note(changes, path, value, note):
    found = described(model_of(REPA | changes, MLP, step=20))
    node: Any = experiment_of(found)
    for key in path.split("."):
        node = node[int(key)] if key.isdecimal() else getattr(node, key)
    assert node == value
    assert note in notes_of(found)


def test_only_a_velocity_can_go_on():
    with pytest.raises(CheckpointError, match=r"weights.pt predicts 'x'; only a model of"):
        described(model_of(REPA | {"prediction": "x"}, MLP))


def test_what_is_of_no_sit_is_refused():
    model = ForeignModel(Path("weights.pt"), "repa", {"model": {"fc.weight": torch.zeros(3)}})
    with pytest.raises(CheckpointError, match=r"is of no SiT: 'x_embedder.proj.weight' is missing"):
        described(model)


@pytest.mark.parametrize(("channels", "kind"), [(3, "identity"), (4, "vae"), (16, "stored")])
def test_the_codec_follows_the_channels(channels, kind):
    found = described(model_of({}, in_channels=channels))
    config = experiment_of(found)
    assert config.codec.kind == kind
    assert config.model.in_channels == channels
    assert ("codec.kind" in notes_of(found)) == (kind != "vae")
    assert ("the scale of its latents is not in it" in notes_of(found)) == (kind == "stored")


ODD = (
    None, True, -1, 10**400, 1e308, float("nan"), "text", b"bytes", [1, 2], {"a": 1}, (),
    torch.zeros(3), torch.zeros(2).to_sparse(), torch.empty(1, device="meta"), torch.tensor(2j),
)  # fmt: skip


@pytest.mark.parametrize("name", {**IREPA, "cls": 0.03, "num_heads": 6, "input_size": 32})
def test_a_setting_of_any_type_is_read(name):
    """What a file holds may be anything; the experiment is validated afterwards."""
    model = model_of(IREPA, CONV, step=5)
    for value in ODD:
        settings = IREPA | {name: value}
        refused = suppress(CheckpointError) if name == "prediction" else nullcontext()
        with refused:
            described(ForeignModel(model.path, "repa", model.weights, step=5, settings=settings))
