"""The pipeline draws what `srepa-ds sample` draws."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from PIL import Image

from srepa_ds.errors import CheckpointError
from srepa_ds.pipeline import SiTFlowMatchScheduler, SiTPipeline, SiTTransformer2DModel

LABELS = [3, 0, 7, 3, 0, 7]
GUIDED = {"guidance_scale": 2.5, "guidance_low": 0.2, "guidance_high": 0.9}
AS_SAMPLED = ("sample.cfg_scale=2.5", "sample.guidance_low=0.2", "sample.guidance_high=0.9")
UNGUIDED = ("sample.cfg_scale=1",)


def quiet(pipeline: SiTPipeline) -> SiTPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pixels(of_pixels) -> SiTPipeline:
    return quiet(SiTPipeline.from_pretrained(of_pixels.folder))


@pytest.fixture(scope="module")
def latents(of_latents) -> SiTPipeline:
    return quiet(SiTPipeline.from_pretrained(of_latents.folder))


def drawn(pipeline: SiTPipeline, **settings) -> np.ndarray:
    settings = {"num_inference_steps": 5, "seed": 11, **settings}
    images = pipeline(LABELS, output_type="np", **settings).images
    assert images.dtype == np.float32
    return np.rint(images * 255).astype(np.uint8)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Turning time round within the weights rounds: a pixel may fall to the next number."""
    assert found.shape == expected.shape
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.002
    # Not because there is nothing to see.
    assert expected.std() > 20


@pytest.mark.parametrize(("settings", "overrides"), [
    (GUIDED, AS_SAMPLED), ({}, UNGUIDED),
], ids=["guided", "unguided"])  # fmt: skip
@pytest.mark.parametrize("solver", ["euler", "heun", "euler_maruyama"])
def test_pixels_are_those_of_sample(of_pixels, pixels, tmp_path, solver, settings, overrides):
    expected = of_pixels.sampled(tmp_path / "set", f"sample.solver={solver}", *overrides)
    assert_same(drawn(pixels, solver=solver, **settings), expected)


@pytest.mark.parametrize("solver", ["heun", "euler_maruyama"])
def test_decoded_images_are_those_of_sample(of_latents, latents, tmp_path, solver):
    overrides = (*AS_SAMPLED, "sample.guided_channels=3", "sample.rounding=round")
    expected = of_latents.sampled(tmp_path / "set", f"sample.solver={solver}", *overrides)
    found = drawn(latents, solver=solver, guided_channels=3, rounding="round", **GUIDED)
    assert expected.shape == (6, 32, 32, 3)
    assert_same(found, expected)
    assert not np.array_equal(drawn(latents, solver=solver, **GUIDED), expected)


def test_an_image_is_that_of_its_number_and_label(pixels):
    whole = drawn(pixels, solver="euler_maruyama")
    part = pixels(
        [7, 0], seed=11, sample_ids=[5, 1], num_inference_steps=5, solver="euler_maruyama"
    )
    for image, number in zip(part.images, (5, 1), strict=True):
        assert isinstance(image, Image.Image)
        # Another batch size rounds otherwise.
        assert np.abs(np.asarray(image).astype(int) - whole[number]).max() <= 1


def test_the_scheduler_is_that_of_the_run(pixels, of_pixels):
    assert pixels.scheduler.config.solver == "euler_maruyama"
    assert np.array_equal(drawn(pixels), drawn(pixels, solver="euler_maruyama"))
    pipeline = quiet(
        SiTPipeline.from_pretrained(
            of_pixels.folder, scheduler=SiTFlowMatchScheduler(solver="heun")
        )
    )
    assert np.array_equal(drawn(pipeline), drawn(pixels, solver="heun"))


def test_generators_take_the_place_of_a_seed(pixels):
    def one(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pixels([1], generator=generator, num_inference_steps=2, output_type="latent").images

    assert torch.equal(one(3), one(3))
    assert not torch.equal(one(3), one(4))
    assert one(3).shape == (1, 3, 16, 16)
    assert one(3).dtype == torch.float32


def test_images_as_a_tuple_and_classes_by_name(pixels):
    # The classes of the data set are called "0" to "9".
    assert pixels.labels["7"] == 7
    settings = {"num_inference_steps": 1, "seed": 0, "output_type": "np", "return_dict": False}
    (named,) = pixels("7", **settings)
    (numbered,) = pixels([7], **settings)
    assert np.array_equal(named, numbered)


def test_saved_and_loaded_again(latents, tmp_path):
    latents.save_pretrained(tmp_path)
    again = quiet(SiTPipeline.from_pretrained(tmp_path))
    assert again.labels == latents.labels
    assert np.array_equal(drawn(again), drawn(latents))


def test_parts_load_by_themselves_and_diffusers_knows_no_pipeline(latents, of_latents):
    """What the package's description says of diffusers' own entry points."""
    folder = of_latents.folder
    transformer = SiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", low_cpu_mem_usage=False)
    scheduler = SiTFlowMatchScheduler.from_pretrained(folder, subfolder="scheduler")
    parts = quiet(
        SiTPipeline(transformer, scheduler, vae, latent_scale=latents.config["latent_scale"])
    )
    assert np.array_equal(drawn(parts), drawn(latents))
    with pytest.raises(AttributeError, match="SiTPipeline"):
        DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)


def test_components_are_complete(latents):
    assert latents.components.keys() == {"transformer", "scheduler", "vae"}


@pytest.mark.parametrize(("settings", "says"), [
    ({"seed": 1, "generator": torch.Generator()}, "seed and generator both"),
    ({"sample_ids": [1]}, "give the seed too"),
    ({"seed": 1, "sample_ids": [1, 2]}, "2 sample_ids were given for 1 class_labels"),
    ({"guidance_scale": 2.0, "guided_channels": 4}, "guided_channels must be 1 to 3, got 4"),
    ({"num_inference_steps": 0}, "at least 1"),
    ({"guidance_low": 0.8, "guidance_high": 0.2}, "the interval is empty"),
    ({"output_type": "pt"}, "output_type may be pil or np or latent, got 'pt'"),
])  # fmt: skip
def test_settings_that_contradict_are_named(pixels, settings, says):
    with pytest.raises(ValueError, match=says):
        pixels([0], **settings)


def test_schedulers_of_other_models_are_refused(pixels):
    pipeline = SiTPipeline(pixels.transformer, pixels.scheduler)
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(CheckpointError, match="DDIMScheduler is not supported; give SiTFlowMatch"):
        pipeline([0], num_inference_steps=1)
    with pytest.raises(CheckpointError, match="DDIMScheduler is not supported"):
        SiTPipeline(pixels.transformer, DDIMScheduler())


def test_a_model_without_a_null_label_is_not_guided():
    sizes = {"input_size": 4, "in_channels": 3, "hidden_size": 8, "depth": 1, "num_heads": 2}
    transformer = SiTTransformer2DModel(**sizes, num_classes=2, class_dropout_prob=0.0)
    pipeline = quiet(SiTPipeline(transformer, SiTFlowMatchScheduler()))
    with pytest.raises(ValueError, match="trained without dropping labels"):
        pipeline([0], guidance_scale=1.5, num_inference_steps=1, seed=0)
    (image,) = pipeline([1], num_inference_steps=1, seed=0).images
    assert image.size == (4, 4)


def test_latents_without_a_vae_are_no_images(latents):
    pipeline = quiet(SiTPipeline(latents.transformer, latents.scheduler))
    with pytest.raises(ValueError, match=r"need a VAE to become images; give vae=\.\.\."):
        pipeline([0], num_inference_steps=1, seed=0)
    found = pipeline([0], num_inference_steps=1, seed=0, output_type="latent").images
    assert found.shape == (1, 4, 8, 8)
