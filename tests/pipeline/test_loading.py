"""Folders of the community's layout: their weights and configs, never their code."""

import json
import shutil
import sys
from contextlib import suppress
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from golden_sit import golden_weights
from places import GOLDEN
from safetensors.torch import load_file, save_file
from small_vae import write_vae

from srepa_ds.errors import CheckpointError, ConfigError
from srepa_ds.pipeline import SiTFlowMatchScheduler, SiTPipeline, SiTTransformer2DModel, loading
from srepa_ds.pipeline.loading import check_scheduler

SIZES = {"input_size": 8, "hidden_size": 64, "depth": 3, "num_heads": 4, "num_classes": 10}
FLOW_EULER = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
EARLIER = ["scheduling_flow_match_sit", "SiTFlowMatchScheduler"]
NAMES = {"0": "tench, Tinca tinca", "7": "cock"}


def write_community(folder: Path, *, scheduler=FLOW_EULER, trace: Path | None = None) -> Path:
    """Writes the first SiT's tiny model as `SiT-diffusers` lays it out, with code that leaves a
    trace where diffusers would look for it."""
    transformer = SiTTransformer2DModel(**SIZES)
    transformer.load_state_dict(golden_weights("sit_original"))
    transformer.save_pretrained(folder / "transformer")
    (folder / "scheduler").mkdir()
    config = {"_class_name": scheduler[1], "_diffusers_version": "0.36.0", "solver": "theirs"}
    if scheduler is FLOW_EULER:
        config = {**config, "num_train_timesteps": 1000, "shift": 1.0, "stochastic_sampling": False}
        del config["solver"]
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    write_vae(folder / "vae")
    index = {
        "_class_name": ["pipeline", "SiTPipeline"],
        "_diffusers_version": "0.36.0",
        "transformer": ["transformer_sit", "SiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": scheduler,
        "id2label": NAMES,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    if trace is not None:
        code = f"open({str(trace)!r}, 'w').close()\n"
        for place in (
            "pipeline.py", "None.py", "transformer/transformer_sit.py",
            "scheduler/scheduling_flow_match_sit.py", "vae/diffusers.py", "__init__.py",
        ):  # fmt: skip
            (folder / place).write_text(code)
    return folder


def edit(folder: Path, **changes) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def opened(folder: Path, **settings) -> SiTPipeline:
    pipeline = SiTPipeline.from_pretrained(folder, **settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("scheduler", "kind"), [
    (FLOW_EULER, FlowMatchEulerDiscreteScheduler), (EARLIER, SiTFlowMatchScheduler),
])  # fmt: skip
def test_weights_are_loaded_and_code_is_not_run(tmp_path, scheduler, kind):
    trace = tmp_path / "trace"
    folder = write_community(tmp_path / "model", scheduler=scheduler, trace=trace)
    pipeline = opened(folder)
    assert type(pipeline.scheduler) is kind
    assert pipeline.get_label_ids(["Tinca tinca", 7, "cock"]) == [0, 7, 7]
    golden = load_file(GOLDEN / "sit_original.safetensors")
    with torch.no_grad():
        found = pipeline.transformer(golden["in.x"], golden["in.t"], golden["in.y"]).sample
    torch.testing.assert_close(found, golden["out.v"], rtol=1e-5, atol=1e-5)
    (image,) = pipeline(["cock"], guidance_scale=4.0, num_inference_steps=2, seed=0).images
    assert image.size == (32, 32)
    assert not trace.exists()


def test_diffusers_itself_would_run_the_code(tmp_path, monkeypatch):
    """So that the test above can fail."""
    trace = tmp_path / "trace"
    folder = write_community(tmp_path / "model", trace=trace)
    cache = str(tmp_path / "modules")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", cache)
    monkeypatch.setattr("sys.path", [*sys.path])
    # It defines no pipeline, which fails afterwards.
    with suppress(Exception):
        DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert trace.exists()


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@torch.no_grad()
def test_flow_matching_of_diffusers_is_followed(tmp_path, guidance_scale):
    """Their step: the model at 1 - timestep / 1000, guided on all channels, negated, times dt."""
    pipeline = opened(write_community(tmp_path))
    labels, generator = torch.tensor([3, 0]), torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    scheduler, nulls = FlowMatchEulerDiscreteScheduler(), torch.tensor([10, 10])
    scheduler.set_timesteps(6)
    settings = {"num_inference_steps": 6, "output_type": "latent"}
    found = pipeline(
        [3, 0],
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(5),
        **settings,
    ).images
    for timestep, (sigma, next_sigma) in zip(
        scheduler.timesteps, pairwise(scheduler.sigmas), strict=True
    ):
        time = 1 - timestep / 1000
        velocity = pipeline.transformer(x, time, labels).sample
        if guidance_scale > 1:
            unconditional = pipeline.transformer(x, time, nulls).sample
            velocity = unconditional + guidance_scale * (velocity - unconditional)
        x = x + (next_sigma - sigma) * -velocity
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_earlier_scheduler_is_eulers_steps(tmp_path):
    """As it was: times linspace(0, 1, n + 1), x += v dt; checked by the first SiT's own sampler."""
    golden = load_file(GOLDEN / "sit_original.safetensors")
    pipeline = opened(write_community(tmp_path, scheduler=EARLIER))
    scheduler, x = pipeline.scheduler, golden["sample.start"].double()
    scheduler.set_timesteps(int(golden["sample.num_steps"]) - 1)
    for timestep in scheduler.timesteps:
        velocity = pipeline.transformer(x, timestep, golden["sample.y"]).sample
        x = scheduler.step(velocity, timestep, x).prev_sample
    torch.testing.assert_close(x.float(), golden["sample.euler"], rtol=1e-4, atol=1e-4)


def test_parts_may_be_replaced(tmp_path):
    folder = write_community(tmp_path)
    edit(folder, transformer=["transformer_sit", "Other"])
    transformer = SiTTransformer2DModel(**SIZES)
    pipeline = opened(folder, transformer=transformer, vae=None, id2label={3: "mine"})
    assert pipeline.transformer is transformer
    assert pipeline.vae is None
    assert pipeline.labels == {"mine": 3}


def test_half_precision(tmp_path):
    pipeline = opened(write_community(tmp_path), torch_dtype=torch.bfloat16)
    assert pipeline.transformer.dtype == pipeline.vae.dtype == torch.bfloat16
    (image,) = pipeline([3], num_inference_steps=2, seed=0).images
    assert image.size == (32, 32)


@pytest.mark.parametrize(("changes", "says"), [
    ({"transformer": ["os", "system"]}, "'transformer' is .*'system'.*not supported"),
    ({"scheduler": ["diffusers", "DDIMScheduler"]}, "'scheduler' is .*may be of class"),
    ({"scheduler": None}, "'scheduler' is None"),
    ({"vae": ["diffusers", "AutoencoderTiny"]}, "'vae' is .*may be of class AutoencoderKL"),
    ({"id2label": {"one": "tench"}}, "id2label"),
    ({"latent_scale": "much"}, "latent_scale"),
])  # fmt: skip
def test_an_index_that_is_not_supported_is_refused(tmp_path, changes, says):
    folder = write_community(tmp_path)
    edit(folder, **changes)
    with pytest.raises((CheckpointError, ConfigError), match=says):
        SiTPipeline.from_pretrained(folder)


def test_noise_that_is_not_sits_is_refused(tmp_path):
    folder = write_community(tmp_path)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("false", "true"))
    with pytest.raises(CheckpointError, match="stochastic_sampling adds noise"):
        SiTPipeline.from_pretrained(folder)


def without_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def without_weights(folder: Path) -> None:
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()


def with_a_pickle(folder: Path) -> None:
    without_weights(folder)
    torch.save({}, folder / "transformer" / "diffusion_pytorch_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def without_a_weight_of_the_vae(folder: Path) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["decoder.conv_in.bias"]
    save_file(weights, path, metadata={"format": "pt"})


def without_transformer(folder: Path) -> None:
    (folder / "transformer").rename(folder / "elsewhere")


def leaving_the_folder(folder: Path) -> None:
    outside = folder / "model_index.json"
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    names = load_file(weights)
    weights.rename(folder / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (weights.parent / f"{weights.name}.index.json").write_text(json.dumps(index))
    assert outside.exists()


@pytest.mark.parametrize(("damage", "says"), [
    (without_index, "holds no pipeline .*make one with export.format=diffusers"),
    (without_weights, "cannot be read: .*export or download the pipeline again"),
    (with_a_pickle, "cannot be read: .*export or download the pipeline again"),
    (truncated, "cannot be read: .*export or download the pipeline again"),
    (without_a_weight_of_the_vae, r"/vae: it does not hold .* lacks decoder\.conv_in\.bias"),
    (without_transformer, "transformer: no such folder"),
    (leaving_the_folder, "cannot be read: .*path separator"),
])  # fmt: skip
def test_damaged_folders_are_refused_in_one_line(tmp_path, damage, says):
    folder = write_community(tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=says) as caught:
        SiTPipeline.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_code_is_never_asked_for(tmp_path):
    with pytest.raises(ValueError, match="never runs code"):
        SiTPipeline.from_pretrained(tmp_path, trust_remote_code=True)


def test_a_variant_of_a_repository_is_downloaded_without_its_code(tmp_path, monkeypatch):
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    write_community(hub / "SiT-Ti-2", trace=tmp_path / "trace")
    (hub / "SiT-B-2").mkdir()
    (hub / "SiT-B-2" / "model_index.json").write_text("{}")

    def download(name, *, revision, token, cache_dir, local_files_only, allow_patterns):
        assert (name, revision, cache_dir) == ("someone/SiT-diffusers", "main", cache)
        for path in filter(Path.is_file, hub.rglob("*")):
            inside = path.relative_to(hub)
            if any(fnmatch(str(inside), pattern) for pattern in allow_patterns):
                (cache / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, cache / inside)
        return str(cache)

    monkeypatch.setattr(loading, "snapshot_download", download)
    settings = {"subfolder": "SiT-Ti-2", "revision": "main", "cache_dir": cache}
    pipeline = opened("someone/SiT-diffusers", **settings)
    assert pipeline.get_label_ids("tench") == [0]
    found = {path for path in cache.rglob("*") if path.is_file()}
    assert {path.suffix for path in found} == {".json", ".safetensors"}
    assert {path.relative_to(cache).parts[0] for path in found} == {"SiT-Ti-2"}


def test_what_is_neither_folder_nor_repository_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder, and was not got from the Hub"):
        SiTPipeline.from_pretrained(tmp_path / "missing", local_files_only=True)
    with pytest.raises(CheckpointError, match="is not a folder, and was not got from the Hub"):
        SiTPipeline.from_pretrained("a/b", local_files_only=True, cache_dir=tmp_path)


@pytest.mark.parametrize("settings", [{"output_loading_info": True}, {"use_safetensors": False}])
def test_what_it_does_not_do_is_refused(tmp_path, settings):
    with pytest.raises(ValueError, match="reads safetensors alone and strictly"):
        SiTPipeline.from_pretrained(tmp_path, **settings)


@pytest.mark.parametrize("name", ["invert_sigmas", "use_dynamic_shifting"])
def test_schedulers_of_other_models_are_refused(name):
    scheduler = FlowMatchEulerDiscreteScheduler(**{name: True})
    with pytest.raises(CheckpointError, match=f"the scheduler's {name} is of other models"):
        check_scheduler(scheduler)


@pytest.mark.parametrize(
    ("labels", "words"),
    [([1.5], "whole number or a name, got 1.5"), ([True], "got True"), ([], "is empty")],
)
def test_labels_that_are_none_are_named(tmp_path, unchecked_shapes, labels, words):
    pipeline = opened(write_community(tmp_path / "sit"))
    assert pipeline.get_label_ids(np.int64(7)) == [7]
    with pytest.raises(ValueError, match=words):
        pipeline.get_label_ids(labels)
