"""`SiTPipeline`: images of classes, the same ones as `srepa-ds sample` draws."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from jaxtyping import Float
from torch import Tensor

from srepa_ds.codec.config import PerChannel
from srepa_ds.codec.latent_codec import Rounding
from srepa_ds.pipeline.class_names import ClassNames
from srepa_ds.pipeline.decoding import decoded
from srepa_ds.pipeline.loading import (
    check_scheduler,
    facts_of,
    folder_of,
    load_scheduler,
    load_transformer,
    load_vae,
    read_pipeline_index,
)
from srepa_ds.pipeline.randomness import Generators, Randomness, randomness_of
from srepa_ds.pipeline.scheduler import SiTFlowMatchScheduler
from srepa_ds.pipeline.transformer import SiTTransformer2DModel
from srepa_ds.sampling.guidance import Guidance, GuidedModel

_OUTPUT_TYPES = ("pil", "np", "latent")
_FACTS = ("id2label", "latent_scale", "latent_shift")
_OWN_SETTINGS = ("transformer", "scheduler", "vae", *_FACTS)
_HUB_SETTINGS = ("subfolder", "revision", "token", "cache_dir", "local_files_only")


class SiTPipeline(DiffusionPipeline):
    """Draws images of classes with a SiT, a scheduler and, for models of latents, a VAE."""

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]

    def __init__(
        self,
        transformer: SiTTransformer2DModel,
        scheduler: Any,
        vae: Any = None,
        id2label: Mapping[str, str] | Mapping[int, str] | None = None,
        latent_scale: float | Sequence[float] | None = None,
        latent_shift: float | Sequence[float] | None = None,
    ) -> None:
        """Takes the parts, and the names of classes by number.

        The transformer's latents are (z - latent_shift) x latent_scale, for all channels or one
        number for each; without them the VAE's own are taken.
        """
        super().__init__()
        check_scheduler(scheduler)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        names = {int(number): text for number, text in (id2label or {}).items()}
        self.register_to_config(
            id2label={str(number): text for number, text in names.items()} or None,
            latent_scale=_as_json(latent_scale),
            latent_shift=_as_json(latent_shift),
        )
        self._names = ClassNames(names)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> "SiTPipeline":
        """Returns the pipeline of a folder or of a Hub's repository.

        Takes folders of `srepa-ds export` with export.format=diffusers, and those of the
        community's `SiT-diffusers`: their weights and configs. Code in them is never run. `dtype`
        (or `torch_dtype`), `variant` and other settings of diffusers go to transformer and VAE;
        `subfolder`, `revision`, `token`, `cache_dir` and `local_files_only` to the Hub's client;
        `transformer`, `scheduler`, `vae`, `id2label`, `latent_scale` and `latent_shift` replace
        what the folder holds. Raises CheckpointError if it does not hold a pipeline.
        """
        if kwargs.pop("trust_remote_code", False) or kwargs.pop("custom_pipeline", None):
            raise ValueError("SiTPipeline never runs code of a folder; leave trust_remote_code out")
        if kwargs.pop("output_loading_info", False) or kwargs.pop("use_safetensors", None) is False:
            raise ValueError(
                "SiTPipeline reads safetensors alone and strictly; leave output_loading_info and "
                "use_safetensors out"
            )
        hub = {name: kwargs.pop(name) for name in _HUB_SETTINGS if name in kwargs}
        given: dict[str, Any] = {name: kwargs.pop(name) for name in _OWN_SETTINGS if name in kwargs}
        folder = folder_of(pretrained_model_name_or_path, **hub)
        index = read_pipeline_index(folder)
        if "transformer" not in given:
            given["transformer"] = load_transformer(folder, index, kwargs)
        if "scheduler" not in given:
            given["scheduler"] = load_scheduler(folder, index)
        if "vae" not in given:
            given["vae"] = load_vae(folder, index, kwargs)
        facts = facts_of(folder, index)
        for name in _FACTS:
            given.setdefault(name, getattr(facts, name))
        pipeline = cls(**given)
        pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipeline

    @property
    def labels(self) -> dict[str, int]:
        """The class of each name that only one has, by name."""
        return self._names.numbers

    def get_label_ids(self, label: int | str | Sequence[int | str]) -> list[int]:
        """Returns the numbers of classes given by number or by one of their names, exactly.

        Raises ValueError for unknown and ambiguous names.
        """
        labels = (
            list(label)
            if isinstance(label, Sequence | Tensor) and not isinstance(label, str)
            else [label]
        )
        if not labels:
            raise ValueError("class_labels is empty; give a class for each image")
        return self._names.numbers_of(labels, num_classes=self.transformer.config["num_classes"])

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        *,
        guidance_scale: float = 1.0,
        guidance_low: float = 0.0,
        guidance_high: float = 1.0,
        guided_channels: int | None = None,
        num_inference_steps: int = 250,
        solver: str | None = None,
        seed: int | None = None,
        sample_ids: Sequence[int] | None = None,
        generator: Generators = None,
        rounding: Rounding = "truncate",
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Returns one image per label as `.images`.

        Guidance acts where its scale is above 1, at times from `guidance_low` to `guidance_high`
        (t = 1 is noise), on all channels or the first `guided_channels`. `solver` (euler, heun,
        euler_maruyama) takes the place of the pipeline's scheduler. With `seed`, image number i of
        `sample_ids` (0, 1, 2, ... without it) starts from the noise that `srepa-ds sample` gives
        image i; otherwise the noise comes from `generator`. `output_type`: `pil` images, `np`
        float32 (n, H, W, 3) in [0, 1], or `latent` float32 (n, channels, height, width). Raises
        ValueError for settings that do not fit the model or each other.
        """
        for name, value, known in (
            ("output_type", output_type, _OUTPUT_TYPES),
            ("rounding", rounding, get_args(Rounding)),
        ):
            if value not in known:
                raise ValueError(f"{name} may be {' or '.join(known)}, got {value!r}")
        device = self._execution_device
        labels = torch.tensor(self.get_label_ids(class_labels), dtype=torch.int64, device=device)
        shape = (len(labels), *self.transformer.latent_shape)
        randomness = randomness_of(
            shape, device, seed=seed, sample_ids=sample_ids, generator=generator
        )
        guidance = Guidance(guidance_scale, guidance_low, guidance_high, channels=guided_channels)
        scheduler = self.scheduler if solver is None else self._solving_by(solver)
        model = self._guided(labels, guidance)
        latents = self._solved(model, scheduler, randomness, num_inference_steps)
        images = self._as_output(latents.float(), output_type, rounding)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _solving_by(self, solver: str) -> SiTFlowMatchScheduler:
        path = self.scheduler.config.get("path", "linear")
        return SiTFlowMatchScheduler(solver=solver, path=path)

    def _guided(self, labels: Tensor, guidance: Guidance) -> GuidedModel:
        """Returns the velocity data - noise of the transformer, guided; raises ValueError."""
        null_label = self.transformer.null_label
        if guidance.scale > 1 and null_label is None:
            raise ValueError(
                "the model was trained without dropping labels, so there is nothing to guide away "
                "from; set guidance_scale to 1"
            )
        if guidance.low > guidance.high:
            raise ValueError(
                f"guidance_low ({guidance.low}) is above guidance_high ({guidance.high}); the "
                "interval is empty"
            )
        channels, height, width = self.transformer.latent_shape
        guided = channels if guidance.channels is None else guidance.channels
        if not 1 <= guided <= channels:
            raise ValueError(f"guided_channels must be 1 to {channels}, got {guided}")
        # Those that are not guided have scale 1, the conditional branch.
        scales = torch.ones(channels, height, width, dtype=torch.float64, device=labels.device)
        scales[:guided] = guidance.scale

        def velocity(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return self.transformer(x_t, t, labels, return_dict=False)[0]

        return GuidedModel(velocity, labels, null_label or 0, guidance, scales=scales)

    def _solved(
        self, model: GuidedModel, scheduler: Any, randomness: Randomness, num_steps: int
    ) -> Float[Tensor, "batch channels height width"]:
        """Returns the latents at the end of the path that begins at noise, in float64."""
        scheduler.set_timesteps(num_steps, device=randomness.device)
        if isinstance(scheduler, SiTFlowMatchScheduler):
            return self._solved_by_own(model, scheduler, randomness)
        check_scheduler(scheduler)
        state = randomness.start()
        # Those of diffusers go from 1000 (noise) to 0, and step with the velocity noise - data.
        times = (scheduler.timesteps / scheduler.config["num_train_timesteps"]).tolist()
        for t, timestep in self.progress_bar(list(zip(times, scheduler.timesteps, strict=True))):
            output = model(state, 1.0 - t, t)
            (state,) = scheduler.step(-output, timestep, state, return_dict=False)
        return state

    def _solved_by_own(
        self, model: GuidedModel, scheduler: SiTFlowMatchScheduler, randomness: Randomness
    ) -> Float[Tensor, "batch channels height width"]:
        state = randomness.start()
        calls = zip(scheduler.calls, scheduler.timesteps, strict=True)
        for call, timestep in self.progress_bar(list(calls)):
            # The time at the step's start decides whether Heun's second call is guided.
            output = model(state, 1.0 - call.t, call.step.t)
            drawn = randomness.of_step(call.step.index) if call.draws else None
            (state,) = scheduler.step(
                output, timestep, state, variance_noise=drawn, return_dict=False
            )
        return state

    def _as_output(self, latents: Tensor, output_type: str, rounding: Rounding) -> Any:
        if output_type == "latent":
            return latents
        config = self.config
        pixels = decoded(
            latents,
            self.vae,
            scale=_per_channel(config["latent_scale"]),
            shift=_per_channel(config["latent_shift"]),
            rounding=rounding,
        )
        # diffusers' form of the same pixels.
        images = pixels.cpu().numpy().astype("float32") / 255.0
        return self.numpy_to_pil(images) if output_type == "pil" else images


def _as_json(values: float | Sequence[float] | None) -> float | list[float] | None:
    return values if values is None or isinstance(values, int | float) else list(values)


def _per_channel(values: float | Sequence[float] | None) -> PerChannel | None:
    if values is None or isinstance(values, int | float):
        return None if values is None else float(values)
    return tuple(map(float, values))
