"""The faults of the tables: each function spoils a case's own copy of the small world."""

import json
import shutil
from collections.abc import Callable

import numpy as np
import torch
import yaml
from bad_input.case import Place
from builders import objective_of, pieces_of
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from srepa_ds.checkpoint.saving import save
from srepa_ds.data.shards import ShardDataset
from srepa_ds.distributed import ranks
from srepa_ds.files import sha256_of
from srepa_ds.model.sit import SiT
from srepa_ds.schema import to_tree
from srepa_ds.training.inputs import open_inputs
from srepa_ds.weights.exported import write_model


def nothing(_: Place) -> None:
    """The fault is in the command line."""


def no_data(place: Place) -> None:
    shutil.rmtree(place.shards)


def no_index(place: Place) -> None:
    (place.shards / "index.json").unlink()


def rewrite_shard(place: Place, rows: int, **header) -> None:
    """Replaces the first shard by one of `rows` samples, its header edited."""
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
    path = place.shards / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    index = json.loads((place.shards / "index.json").read_text())
    index["shards"][1]["sha256"] = sha256_of(path)
    (place.shards / "index.json").write_text(json.dumps(index))


def no_valid_checkpoint(place: Place) -> None:
    trained(place)
    (place.run / "checkpoints" / "step-0000005" / "state.json").write_text("{}")


def exported(place: Place) -> None:
    model = SiT(place.config.model, torch.Generator().manual_seed(0))
    provenance = {"checkpoint": "none", "step": 5, "weights": "ema"}
    tree = to_tree(place.config)
    write_model(place.run / "export", model.state_dict(), config=tree, provenance=provenance)


def exported_without_dropout(place: Place) -> None:
    """A model whose training never replaced a label by the null label."""
    tree = yaml.safe_load((place.folder / "experiment.yaml").read_text())
    place.edit(objective={"label_dropout": 0.0})
    exported(place)
    place.edit(objective=tree.get("objective", {}))


def exported_with_nan(place: Place) -> None:
    exported(place)
    folder = place.run / "export"
    tensors = load_file(folder / "model.safetensors")
    tensors["blocks.0.mlp.fc1.bias"][0] = float("nan")
    provenance = {"checkpoint": "none", "step": 5, "weights": "ema"}
    write_model(folder, tensors, config=to_tree(place.config), provenance=provenance)


def exported_beside_labels(place: Place) -> None:
    exported(place)
    (place.folder / "words.txt").write_text("3\ncat\n")
    (place.folder / "outside.txt").write_text("3\n10\n")


def weights_of_repa(place: Place) -> None:
    """A file such as REPA's training writes, of a narrower model."""
    state = objective_of(place.config).sit.state_dict()
    # Its position embedding is computed, and would be found to be another one first.
    model = {name: value[..., :16] for name, value in state.items() if name != "pos_embed"}
    torch.save({"model": model, "ema": model, "steps": 5}, place.folder / "repa.pt")


def torn_export(place: Place) -> None:
    exported(place)
    path = place.run / "export" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def sampled(place: Place, size: int = 16, *, count: int = 40) -> None:
    archived(place, np.zeros((count, size, size, 3), np.uint8))


def archived(place: Place, images: np.ndarray, save: Callable[..., None] = np.savez) -> None:
    folder = place.run / "samples"
    folder.mkdir(parents=True)
    save(folder / "samples.npz", arr_0=images, arr_1=np.arange(len(images)) % 10)


def torn_samples(place: Place) -> None:
    sampled(place)
    path = place.run / "samples" / "samples.npz"
    path.write_bytes(path.read_bytes()[:-50])


def empty_samples(place: Place) -> None:
    sampled(place)
    (place.run / "samples" / "samples.npz").write_bytes(b"")


def pickled_samples(place: Place) -> None:
    archived(place, np.array([{"runs": "code"}] * 8, dtype=object))


def bomb_of_samples(place: Place) -> None:
    archived(place, np.zeros((400, 256, 256, 3), np.uint8), np.savez_compressed)


def nan_samples(place: Place) -> None:
    archived(place, np.full((8, 16, 16, 3), np.nan, np.float32))


def mixed_samples(place: Place) -> None:
    (place.folder / "mixed").mkdir()
    for number, size in enumerate((16, 8, 16, 16)):
        Image.new("RGB", (size, size)).save(place.folder / "mixed" / f"{number}.png")


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


def no_json(place: Place) -> None:
    (place.folder / "ds.json").write_bytes(b"")


def a_list_of_json(place: Place) -> None:
    (place.folder / "ds.json").write_text("[1, 2]")


def binary_json(place: Place) -> None:
    (place.folder / "ds.json").write_bytes(b"\xff\xfe{\0}\0")


def record(place: Place, content: bytes) -> None:
    """A run of which only the record is left."""
    place.run.mkdir()
    (place.run / "metrics.jsonl").write_bytes(content)


def empty_record(place: Place) -> None:
    record(place, b"")


def record_of_zeros(place: Place) -> None:
    """What a crash of the machine leaves on some file systems."""
    record(place, b"\0" * 4096)


def record_without_steps(place: Place) -> None:
    record(place, b'{"loss_total": 1.0}\n[1]\n7\n{"step": "three"}\n{"step": 1e400}\n')


def record_in_latin_1(place: Place) -> None:
    record(place, b'{"step": 1, "note": "M\xfcnchen"}\n')


def folder_as_record(place: Place) -> None:
    (place.run / "metrics.jsonl").mkdir(parents=True)
