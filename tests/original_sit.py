"""The golden model of the original SiT in the files and folders that people have of it."""

import json
from pathlib import Path

import torch
from golden_sit import golden_weights
from places import GOLDEN
from safetensors.torch import load_file, save_file
from torch import Tensor

from srepa_ds.model.sit import SiT, fixed_position_embedding
from srepa_ds.model.variants import SiTConfig

STORED = load_file(GOLDEN / "sit_original.safetensors")
ORIGINAL = golden_weights("sit_original")
LAST = ("final_layer.linear.weight", "final_layer.linear.bias")


def sizes() -> SiTConfig:
    width, channels, patch_size, _ = ORIGINAL["x_embedder.proj.weight"].shape
    return SiTConfig(
        variant="SiT-S/2",
        input_size=STORED["in.x"].shape[-1],
        in_channels=channels,
        num_classes=len(ORIGINAL["y_embedder.embedding_table.weight"]) - 1,
        depth=len({name.split(".")[1] for name in ORIGINAL if name.startswith("blocks.")}),
        hidden_size=width,
        num_heads=int(STORED["num_heads"]),
        patch_size=patch_size,
    )


def without_sigma() -> dict[str, Tensor]:
    """The same model as its samplers save it: without the rows that are dropped."""
    patch_size, channels = ORIGINAL["x_embedder.proj.weight"].shape[-1], STORED["in.x"].shape[1]
    kept = {}
    for name in LAST:
        rows = [
            (y * patch_size + x) * 2 * channels + channel
            for y in range(patch_size)
            for x in range(patch_size)
            for channel in range(channels)
        ]
        kept[name] = ORIGINAL[name][rows]
    return ORIGINAL | kept


def transformer_config(**changes) -> dict:
    shape = sizes().shape
    return {
        "_class_name": "SiTTransformer2DModel",
        "_diffusers_version": "0.35.0",
        "input_size": sizes().input_size,
        "patch_size": shape.patch_size,
        "in_channels": sizes().in_channels,
        "hidden_size": shape.hidden_size,
        "depth": shape.depth,
        "num_heads": shape.num_heads,
        "mlp_ratio": 4.0,
        "class_dropout_prob": 0.1,
        "num_classes": sizes().num_classes,
        "learn_sigma": True,
        **changes,
    }


def write_shards(
    folder: Path, weights: dict[str, Tensor], stem: str, *, ending: str = ".safetensors"
) -> Path:
    """Writes two files and an index, which is returned."""
    names = [f"{stem}-{n:05d}-of-00002{ending}" for n in (1, 2)]
    places = {name: names[i % 2] for i, name in enumerate(weights)}
    for name in names:
        part = {key: weights[key] for key, place in places.items() if place == name}
        save_file(part, folder / name) if ending == ".safetensors" else torch.save(
            part, folder / name
        )
    index = folder / f"{stem}{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def write_pipeline(
    folder: Path,
    weights: dict[str, Tensor] = ORIGINAL,
    *,
    form: str = "safetensors",
    **changes,
) -> Path:
    """Writes a folder of the community's layout, with code beside the weights; returns it."""
    transformer = folder / "transformer"
    transformer.mkdir(parents=True)
    stem = "diffusion_pytorch_model"
    match form:
        case "safetensors":
            save_file(weights, transformer / f"{stem}.safetensors")
        case "shards":
            write_shards(transformer, weights, stem)
        case "bin":
            torch.save(weights, transformer / f"{stem}.bin")
        case "bin shards":
            write_shards(transformer, weights, stem, ending=".bin")
    (transformer / "config.json").write_text(json.dumps(transformer_config(**changes)))
    code = f"open({str(folder / 'trace')!r}, 'w')\n"
    (transformer / "transformer_sit.py").write_text(code)
    (folder / "pipeline.py").write_text(code)
    index = {
        "_class_name": ["pipeline", "SiTPipeline"],
        "transformer": ["transformer_sit", "SiTTransformer2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def velocity(weights, x: Tensor = STORED["in.x"]) -> Tensor:
    """What weights in REPA's convention predict for the golden inputs."""
    model = SiT(sizes())
    model.load_state_dict({**weights, "pos_embed": fixed_position_embedding(sizes())})
    with torch.no_grad():
        return model(x, STORED["in.t"], STORED["in.y"]).velocity


def assert_golden(weights) -> None:
    found = velocity(weights)
    torch.testing.assert_close(found, STORED["out.v_converted"], rtol=1e-5, atol=1e-5)
