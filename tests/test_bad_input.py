"""A table of what users get wrong: one clear message, exit code 2, nothing left behind."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from builders import contents, objective_of, pieces_of
from places import ROOT
from safetensors.torch import load_file, save_file

from srepa_ds.checkpoint.saving import save
from srepa_ds.cli import run
from srepa_ds.config.experiment import Config, load_config
from srepa_ds.data.shards import ShardDataset
from srepa_ds.distributed import ranks
from srepa_ds.model.sit import SiT
from srepa_ds.schema import to_tree
from srepa_ds.training.inputs import open_inputs
from srepa_ds.weights.exported import write_model

CONFIGS = ROOT / "configs"


@dataclass(frozen=True)
class Place:
    """What one case has before it goes wrong: its own copy of the small world."""

    folder: Path

    @property
    def config(self) -> Config:
        return load_config(self.folder / "experiment.yaml")

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def edit(self, **sections) -> None:
        path = self.folder / "experiment.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | sections))


def nothing(_: Place) -> None:
    """The fault is in the command line."""


def no_data(place: Place) -> None:
    shutil.rmtree(place.shards)


def no_index(place: Place) -> None:
    (place.shards / "index.json").unlink()


def rewrite_shard(place: Place, rows: int, **header) -> None:
    """Replaces the first shard by one of `rows` samples, its header edited."""
    from safetensors import safe_open

    path = place.shards / "shard-00000.safetensors"
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["srepa_ds"]) | header
    tensors = {name: value[:rows].clone() for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"srepa_ds": json.dumps(facts)})


def empty_shard(place: Place) -> None:
    rewrite_shard(place, 0, num_samples=0)


def contradicting_header(place: Place) -> None:
    rewrite_shard(place, 40, num_samples=39)


def truncated_shard(place: Place) -> None:
    path = place.shards / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def five_faults(place: Place) -> None:
    tree = yaml.safe_load((place.folder / "experiment.yaml").read_text())
    place.edit(
        optimizer={"learning_rate": "fast"},
        ema={"decya": 0.9},
        train={"steps": 0, "batch_size": 16},
        alignments=[{**tree["alignments"][0], "depth": 9}],
        engine={"precision": "fp64"},
    )


def foreign_teacher(place: Place) -> None:
    tensors = load_file(place.folder / "teacher.safetensors")
    tensors["blocks.0.attn.qkv_weight"] = tensors.pop("blocks.0.attn.qkv.weight")
    save_file(tensors, place.folder / "teacher.safetensors")


def tokenless_teacher(place: Place) -> None:
    tree = yaml.safe_load((place.folder / "experiment.yaml").read_text())
    (alignment,) = tree["alignments"]
    spec = {**alignment["teacher"]["spec"], "num_prefix_tokens": 0, "has_cls": False}
    teacher = {**alignment["teacher"], "spec": spec}
    place.edit(alignments=[{**alignment, "teacher": teacher}])


def overflowing_teacher(place: Place) -> list[int]:
    """Makes a teacher that overflows on the first red pixel of some images; returns which.

    float32 ends at 3.4e38; a pixel this far from the mean, times the weight, lies beyond.
    """
    path = place.folder / "teacher.safetensors"
    tensors = load_file(path)
    tensors["patch_embed.proj.weight"][0, 0, 0, 0] = 3e38
    save_file(tensors, path)
    dataset = ShardDataset(place.shards)
    pixels = dataset.read(torch.arange(len(dataset))).pixels[:, 0, ::2, ::2].float()
    beyond = (((pixels / 255 - 0.485) / 0.229).abs() * 3e38 > torch.finfo().max).flatten(1)
    return beyond.any(1).nonzero()[:, 0].tolist()


def trained(place: Place, **known) -> None:
    """A run with one checkpoint that knows some more."""
    weights = dict(objective_of(place.config).named_parameters())
    kinds = ("master", "exp_avg", "exp_avg_sq", "ema")
    pieces = [piece for kind in kinds for piece in pieces_of(weights, kind=kind)]
    state = {"step": 5, "adam_step": 5, "config": to_tree(place.config), **known}
    root = place.config.run_folder.checkpoints
    save(root, step=5, pieces=pieces, state=state, rank=0)
    (place.run / "config.yaml").write_text("of the first training")


def other_pictures(place: Place) -> None:
    """A run, and then other pictures that were prepared with the same settings."""
    try:
        identity = open_inputs(place.config, ranks.initialize()).identity
    finally:
        ranks.close()
    trained(place, identity=identity)
    path = place.shards / "index.json"
    index = json.loads(path.read_text())
    index["shards"][1]["sha256"] = "0" * 64
    path.write_text(json.dumps(index))


def no_valid_checkpoint(place: Place) -> None:
    trained(place)
    (place.run / "checkpoints" / "step-0000005" / "state.json").write_text("{}")


def exported(place: Place) -> None:
    model = SiT(place.config.model, torch.Generator().manual_seed(0))
    provenance = {"checkpoint": "none", "step": 5, "weights": "ema"}
    tree = to_tree(place.config)
    write_model(place.run / "export", model.state_dict(), config=tree, provenance=provenance)


def torn_export(place: Place) -> None:
    exported(place)
    path = place.run / "export" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def sampled(place: Place, size: int = 16) -> None:
    folder = place.run / "samples"
    folder.mkdir(parents=True)
    images = np.zeros((40, size, size, 3), np.uint8)
    np.savez(folder / "samples.npz", arr_0=images, arr_1=np.arange(40) % 10)


def torn_samples(place: Place) -> None:
    sampled(place)
    path = place.run / "samples" / "samples.npz"
    path.write_bytes(path.read_bytes()[:-50])


def empty_samples(place: Place) -> None:
    sampled(place)
    (place.run / "samples" / "samples.npz").write_bytes(b"")


def no_yaml(place: Place) -> None:
    (place.folder / "experiment.yaml").write_text("run: {folder: [unclosed\n")


def foreign_export(place: Place) -> None:
    trained(place)
    (place.run / "export").mkdir()
    (place.run / "export" / "thesis.txt").write_text("years of work")


def a_file(place: Place) -> None:
    (place.folder / "file").write_text("a file, where a folder is wanted")


def trained_beside_a_file(place: Place) -> None:
    trained(place)
    a_file(place)


def exported_beside_a_file(place: Place) -> None:
    exported(place)
    a_file(place)


def sampled_beside_a_file(place: Place) -> None:
    sampled(place)
    a_file(place)


def misspelt_keys(place: Place) -> None:
    (place.folder / "ds.json").write_text('{"zero_optimisation": {}, "gradient_cliping": 1.0}')


def owned_key(place: Place) -> None:
    (place.folder / "ds.json").write_text('{"train_batch_size": 4}')


TEACHER = "alignments.0.teacher"


@dataclass(frozen=True)
class Case:
    """One fault: how it comes about, the command line, and words of the message."""

    name: str
    arrange: Callable[[Place], None]
    command: str
    """Words, with {folder} for the case's folder; CONFIG is its experiment."""

    words: tuple[str, ...]

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


CASES = [
    # The command line and the file it names.
    Case("no such command", nothing, "trian CONFIG", ("No such command 'trian'", "train")),
    Case("no such option", nothing, "train CONFIG --rank 2", ("No such option: --rank", "--ranks")),
    Case("no config given", nothing, "train", ("Missing argument 'CONFIG'",)),
    Case("ranks is no number", nothing, "train CONFIG --ranks two", ("'--ranks'", "valid integer")),
    Case("no ranks", nothing, "train CONFIG --ranks 0", ("--ranks must be at least 1",)),
    Case("no config file", nothing, "train nowhere.yaml", ("nowhere.yaml", "No such file")),
    Case("a folder as config", nothing, "config {folder}", ("Is a directory", "YAML file")),
    Case("config is no YAML", no_yaml, "train CONFIG", ("experiment.yaml", "not valid YAML")),
    Case("config of another kind", nothing, "prepare CONFIG",
         ("kind 'experiment', not 'prepare'", "srepa-ds train")),
    Case("malformed override", nothing, "train CONFIG train.steps", ("section.field=value",)),
    Case("override of a misspelt key", nothing, "train CONFIG train.stps=3",
         ("train.stps: unknown key; did you mean 'steps'?",)),
    Case("five faults", five_faults, "train CONFIG",
         ("5 faults", "optimizer.learning_rate", "ema.decya", "did you mean 'decay'?",
          "train.steps", "alignments.0.depth: 9 exceeds the model's 3 blocks",
          "engine.precision")),
    Case("unknown teacher", nothing,
         f"train CONFIG {TEACHER}.spec=null {TEACHER}.name=dinov2-vit-c",
         (f"{TEACHER}.name: unknown teacher 'dinov2-vit-c'; did you mean 'dinov2-vit-",)),
    Case("unknown demo mode", nothing, "demo --mode srepa-msee", ("did you mean 'srepa-mse'?",)),
    Case("DeepSpeed sets what is ours", owned_key, "train CONFIG engine.deepspeed={folder}/ds.json",
         ("engine.deepspeed", "train_batch_size belongs to the YAML (train.batch_size)")),
    Case("no DeepSpeed file", nothing, "train CONFIG engine.deepspeed=zero9.json",
         ("engine.deepspeed: zero9.json: No such file",)),
    Case("compiling under stage 3", nothing,
         "train CONFIG engine.compile=true engine.deepspeed=ds_configs/zero3.json",
         ("engine.compile: torch.compile cannot trace the hooks of ZeRO stage 3",)),
    # The data.
    Case("no data folder", no_data, "train CONFIG", ("shards: no such data folder", "prepare")),
    Case("unfinished data", no_index, "train CONFIG", ("index.json: missing", "prepare")),
    Case("an empty shard", empty_shard, "train CONFIG",
         ("shard-00000.safetensors: an empty shard", "the index says 40", "prepare it again")),
    Case("a contradicting header", contradicting_header, "train CONFIG",
         ("shard-00000.safetensors", "index disagree about num_samples", "found 39")),
    Case("a truncated shard", truncated_shard, "train CONFIG",
         ("shard-00001.safetensors: not a readable shard", "1000 bytes")),
    Case("channels that do not match", nothing, "train CONFIG model.in_channels=4",
         ("latents of shape (3, 16, 16)", "(4, 16, 16)", "model.in_channels")),
    Case("classes that do not match", nothing, "train CONFIG model.num_classes=7",
         ("has 10 classes", "model.num_classes is 7")),
    Case("no data for a teacher", nothing,
         f"teacher {CONFIGS}/digits-teacher.yaml train={{folder}}/none heldout={{folder}}/shards",
         ("none: no such data folder",)),
    # The teacher.
    Case("no teacher weights", nothing, f"train CONFIG {TEACHER}.weights=none.safetensors",
         ("none.safetensors: no such file", "teacher.weights")),
    Case("teacher weights of another model", foreign_teacher, "train CONFIG",
         ("do not fit the teacher", "blocks.0.attn.qkv_weight")),
    Case("a teacher of another grid", nothing, f"train CONFIG {TEACHER}.spec.input_size=32",
         ("alignments.0.teacher: gives a grid of (16, 16) tokens", "the model has (8, 8)")),
    Case("a class token the teacher has not", tokenless_teacher,
         "train CONFIG model.class_token_width=32",
         ("alignments.0.teacher: 'vit_tiny_patch16_224' has no class token",)),
    Case("a class token of another width", nothing, "train CONFIG model.class_token_width=48",
         ("model.class_token_width: is 48, but the class token of", "has 32 channels")),
    Case("a class token without a teacher", nothing,
         "train CONFIG model.class_token_width=32 alignments=[]",
         ("model.class_token_width", "there is no alignment")),
    Case("comparing class tokens the model has not", nothing,
         "train CONFIG alignments.0.pointwise.include_cls=true",
         ("alignments.0: include_cls needs model.class_token_width",)),
    Case("feature asked for with kl", nothing,
         "train CONFIG alignments.0.structural.kind=kl "
         "alignments.0.structural.algorithm=feature",
         ("alignments.0.structural: algorithm 'feature' cannot compute kl",)),
    Case("an unknown algorithm", nothing, "train CONFIG alignments.0.structural.algorithm=tield",
         ("unknown algorithm 'tield'; did you mean 'tiled'?",)),
    Case("triton where it cannot run", nothing,
         "train CONFIG alignments.0.structural.algorithm=triton",
         ("alignments.0.structural.algorithm: 'triton' cannot run here",)),
    Case("a temperature of nought", nothing,
         "train CONFIG alignments.0.structural.kind=kl alignments.0.structural.tau_student=0",
         ("alignments.0.structural.tau_student", "greater than 0")),
    # What a run begins with.
    Case("weights to begin with that are not there", nothing,
         "train CONFIG run.folder={folder}/runs/new train.init_from.path=nowhere.pt",
         ("nowhere.pt: no such file; correct train.init_from",)),
    Case("an attention that cannot run", nothing, "train CONFIG model.attention=flash_attn",
         ("configuration: 1 fault", "model.attention: 'flash_attn' cannot run here")),
    # Checkpoints and exported models.
    Case("resume without a valid checkpoint", no_valid_checkpoint, "train CONFIG",
         ("holds no valid checkpoint", "step-0000005: state.json has 2 bytes")),
    Case("export without a valid checkpoint", no_valid_checkpoint, "export CONFIG",
         ("holds no valid checkpoint", "step-0000005: state.json has 2 bytes")),
    Case("export without a checkpoint", nothing, "export CONFIG", ("train first",)),
    Case("export of an unknown step", trained, "export CONFIG export.step=7",
         ("step-0000007 is not valid", "checkpoints: step-0000005")),
    Case("resume with another model", trained, "train CONFIG model.depth=2 run.seed=3",
         ("holds a run of another configuration", "--allow-config-change to continue: 2 faults",
          "model.depth: was 3, is 2", "run.seed: was 0, is 3")),
    Case("resume beside other pictures", other_pictures, "train CONFIG",
         ("holds a run of another configuration", "to continue: 1 fault",
          "data.shards: the contents have changed: their hash was")),
    Case("resume with another model, insisting", trained,
         "train CONFIG model.depth=2 --allow-config-change",
         ("is of another model", "sit.blocks.2.attn.qkv.weight: (144, 48) there, none in")),
    Case("sample without a model", nothing, "sample CONFIG",
         ("does not hold an exported model", "srepa-ds export")),
    Case("sample of a torn model", torn_export, "sample CONFIG",
         ("does not hold an exported model",)),
    # Scores.
    Case("evaluate without samples", nothing, "evaluate CONFIG",
         ("samples.npz is not a finished sample set", "srepa-ds sample")),
    Case("evaluate torn samples", torn_samples, "evaluate CONFIG", ("not a finished sample set",)),
    Case("evaluate empty samples", empty_samples, "evaluate CONFIG",
         ("not a finished sample set",)),
    Case("nothing to evaluate with", sampled, "evaluate CONFIG evaluate=null",
         ("evaluate: is required",)),
    Case("evaluate against no shards", sampled, "evaluate CONFIG evaluate.reference=none",
         ("none: no such data folder",)),
    Case("evaluate images of another size", lambda place: sampled(place, 8), "evaluate CONFIG",
         ("samples holds images of (8, 8) px", "shards of (16, 16)", "evaluate.reference")),
    # Places that cannot be written to.
    Case("run folder below a file", a_file, "train CONFIG run.folder={folder}/file/run",
         ("cannot write to the run's folder", "Not a directory", "run.folder")),
    Case("export folder below a file", trained_beside_a_file,
         "export CONFIG export.folder={folder}/file/export",
         ("cannot write the model to", "Not a directory")),
    Case("export into a foreign folder", foreign_export, "export CONFIG",
         ("other than an exported model (thesis.txt)", "choose another")),
    Case("samples below a file", exported_beside_a_file,
         "sample CONFIG sample.folder={folder}/file/samples",
         ("cannot write", "Not a directory", "room for the samples")),
    Case("shards below a file", a_file,
         f"prepare {CONFIGS}/digits-prepare.yaml output={{folder}}/file/digits",
         ("cannot write", "Not a directory")),
    Case("scores below a file", sampled_beside_a_file,
         "evaluate CONFIG run.folder={folder}/file/run evaluate.samples={folder}/run/samples",
         ("cannot write", "Not a directory")),
]  # fmt: skip

# These go through the real launcher, because that ranks agree is the point.
CASES_OF_RANKS = [
    Case("more ranks than images", exported, "sample CONFIG sample.num_samples=1 --ranks 2",
         ("2 ranks cannot share 1 image", "raise num_samples")),
    Case("a batch that ranks cannot share", nothing, "train CONFIG train.batch_size=15 --ranks 2",
         ("train.batch_size 15 cannot be split over 2 ranks", "a multiple of 2")),
    Case("a DeepSpeed file with typos", misspelt_keys,
         "train CONFIG engine.deepspeed={folder}/ds.json --ranks 2",
         ("did you mean 'zero_optimization'?", "gradient_cliping")),
    Case("ranks that resume with other settings", trained,
         "train CONFIG model.depth=2 run.seed=3 --ranks 2",
         ("--allow-config-change to continue: 2 faults", "model.depth: was 3, is 2")),
    Case("ranks that resume with another model", trained,
         "train CONFIG model.depth=2 --allow-config-change --ranks 2",
         ("is of another model", "sit.blocks.2.attn.qkv.weight: (144, 48) there, none in")),
]  # fmt: skip


@pytest.fixture
def place(small_world, tmp_path, monkeypatch) -> Place:
    """A copy of the small world to spoil, as the working directory."""
    folder = small_world.copied_to(tmp_path / "place").folder
    monkeypatch.chdir(folder)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SREPA_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    return Place(folder)


def command_line(case: Case, place: Place) -> list[str]:
    text = case.command.format(folder=place.folder)
    return [str(place.folder / "experiment.yaml") if w == "CONFIG" else w for w in text.split()]


def assert_one_message(text: str, words: tuple[str, ...]) -> None:
    assert "Traceback" not in text
    assert [line[:6] for line in text.splitlines()].count("error:") == 1, text
    message = text[text.index("error:") :]
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_message_code_2_and_nothing_left_behind(case, place, capfd):
    case.arrange(place)
    before = contents(place.folder)
    code = run(command_line(case, place))
    assert not ranks.joined()
    captured = capfd.readouterr()
    assert code == 2, captured
    assert_one_message(captured.err, case.words)
    assert captured.out == ""
    after = contents(place.folder)
    assert after == before


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES_OF_RANKS, ids=str)
def test_ranks_speak_with_one_voice(case, place):
    case.arrange(place)
    before = contents(place.folder)
    command = [sys.executable, "-m", "srepa_ds", *command_line(case, place)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2, done
    assert_one_message(done.stderr, case.words)
    assert contents(place.folder) == before


def test_samples_on_which_a_teacher_fails_are_named(place):
    bad = overflowing_teacher(place)
    assert 0 < len(bad)
    arguments = ["train", str(place.folder / "experiment.yaml"), "--ranks", "2"]
    command = [sys.executable, "-m", "srepa_ds", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2, done
    words = ("alignments.0.teacher: 'vit_tiny_patch16_224' gives tokens that are not finite",)
    assert_one_message(done.stderr, words)
    named = re.search(r"for sample\(s\) ([\d, ]+)", done.stderr).group(1)
    assert {int(number) for number in named.split(",") if number.strip()} <= set(bad)


@pytest.mark.slow
def test_ranks_that_diverge_say_so_once(place):
    settings = ["optimizer.learning_rate=1e30", "train.max_skipped_steps=2"]
    settings += ["train.log_every_steps=50"]
    arguments = ["train", str(place.folder / "experiment.yaml"), *settings, "--ranks", "2"]
    command = [sys.executable, "-m", "srepa_ds", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2, done
    assert_one_message(done.stderr, ("steps 2 to 3 were not finite", "skipped.jsonl"))


def test_debugging_shows_where_it_arose(place, monkeypatch, capfd):
    monkeypatch.setenv("SREPA_DEBUG", "1")
    assert run(["train", "nowhere.yaml"]) == 2
    text = capfd.readouterr().err
    assert "Traceback" in text
    assert text.splitlines()[-2].startswith("error: nowhere.yaml")
