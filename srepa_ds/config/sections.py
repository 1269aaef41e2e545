"""The sections of an experiment that do not belong to one component."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from srepa_ds.encoders.extractors import ExtractorConfig
from srepa_ds.errors import ConfigError
from srepa_ds.metrics.scores import METRICS
from srepa_ds.model.activation_checkpointing import ActivationCheckpointingConfig
from srepa_ds.model.precision import Precision
from srepa_ds.sampling.config import SamplerConfig
from srepa_ds.sampling.labels import read_label_file
from srepa_ds.schema import MayChange, OnlyFor, Section, one_of
from srepa_ds.weights.initial import InitialWeightsConfig


class RunConfig(Section):
    """The run's identity."""

    folder: Annotated[Path, MayChange]
    """The folder for everything the run writes; training resumes from the same folder."""

    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """The seed of weights, data order, times, noise and label dropout."""


class TrainConfig(Section):
    """The length of training, its batches, and what happens to steps that are not finite."""

    steps: Annotated[int, MayChange] = Field(ge=1)
    """Optimizer steps in total."""

    batch_size: int = Field(default=256, ge=1)
    """Samples per optimizer step, over all ranks and accumulation steps."""

    accumulation_steps: Annotated[int, MayChange] = Field(default=1, ge=1)
    """Micro steps per optimizer step on each rank."""

    log_every_steps: Annotated[int, MayChange] = Field(default=50, ge=1)
    """Optimizer steps between lines of the record."""

    init_from: Annotated[InitialWeightsConfig | None, MayChange] = None
    """Weights to start from instead of random ones; a run that resumes ignores them."""

    max_skipped_steps: Annotated[int, MayChange] = Field(default=10, ge=1)
    """Steps in a row whose losses or gradients are not finite, after which the run rolls back to
    its last good checkpoint and continues with the data after these samples. At the last step of
    the run, one is enough."""

    max_rollbacks: Annotated[int, MayChange] = Field(default=3, ge=0)
    """Rollbacks allowed before the run gives up, counted over all restarts. A rollback counts until
    a checkpoint of the step that failed, or of a later one, is good."""


class EngineConfig(Section):
    """How DeepSpeed arranges memory and arithmetic."""

    former_names = {"remat": "activation_checkpointing"}

    deepspeed: Path = Path("ds_configs/zero2.json")
    """DeepSpeed JSON: ZeRO stage, offload, buckets. It may not repeat what this YAML sets."""

    precision: Precision = "bf16"
    """`bf16`: weights and activations in bf16 with fp32 masters, moments and EMA. `bf16_autocast`:
    fp32 weights, but matrix products in bf16, as in the paper's runs."""

    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    """Activation checkpointing: saves memory at the cost of a second forward pass."""

    compile: bool = False
    """Whether torch.compile makes one graph that all blocks share, which takes a minute or so at
    the start; not under stage 3, whose hooks it cannot trace."""

    overlap_teachers: bool = False
    """Whether teachers run one micro batch ahead on their own CUDA stream, beside the student, at
    the cost of one more micro batch in memory. Without a GPU this changes nothing."""


class MonitorConfig(Section):
    """Images, distances and held-out losses during training, all with the EMA weights."""

    images_every_steps: int = Field(default=0, ge=0)
    """Optimizer steps between contact sheets; 0 draws none."""

    num_images: int = Field(default=64, ge=1)
    """Images on a sheet."""

    evaluate_every_steps: int = Field(default=0, ge=0)
    """Optimizer steps between Frechet distances in the feature space of `evaluate.extractor`,
    against `evaluate.reference`; 0 measures none."""

    num_evaluated: int = Field(default=2_000, ge=2)
    """Images drawn for a distance; distances over other numbers of images cannot be compared."""

    num_steps: int | None = Field(default=None, ge=1, lt=1 << 24)
    """Steps of the sampler; without it those of `sample`."""

    heldout_every_steps: int = Field(default=0, ge=0)
    """Optimizer steps between flow losses on `heldout`, at fixed times and with fixed noise, which
    do not depend on run.seed: a curve to compare runs by; 0 measures none."""

    heldout: Path | None = None
    """Data that training does not see, such as the part `heldout` of `srepa-ds prepare`."""

    num_heldout: int = Field(default=2_048, ge=1)
    """Samples of `heldout`, evenly spread."""

    heldout_batch_size: int = Field(default=32, ge=1)
    """Samples per pass and rank."""


class SampleConfig(SamplerConfig):
    """The images that `srepa-ds sample` draws."""

    source: Literal["export", "checkpoint"] = "export"
    """`export`: draw from an exported model. `checkpoint`: from a checkpoint of the run, with the
    weights that the section `export` describes, which need not be exported before."""

    weights: Annotated[Path | None, OnlyFor("source", "export")] = None
    """The folder of an exported model; or weights of the model that the section `model` describes:
    a file (`.safetensors`, `.pt`) of REPA, iREPA, REG or the original SiT, or a folder of SiT as
    diffusers saves it; or a repository on the Hugging Face Hub (`owner/name`,
    `owner/name@revision`), which `srepa-ds fetch` downloads. Without it `<run.folder>/export`."""

    guide: Path | None = None
    """Autoguidance: a weaker model, whose velocity for the same class takes the place of the
    unconditional one. An exported folder, a run's checkpoint (`.../checkpoints/step-0050000`, of
    which `ema` is taken), or weights of the model that the section `model` describes, in whatever
    form `weights` takes."""

    decoder: Path | None = None
    """The VAE whose decoder draws, as `codec.weights` names one; null takes `codec.weights`. It has
    to be one for the same latents: REPA trains on those of `stabilityai/sd-vae-ft-mse` and draws
    with `stabilityai/sd-vae-ft-ema`."""

    label_file: Path | None = None
    """A text file with the class of each image, one number per line, instead of `labels`;
    `num_samples` is then the number of lines, unless it is given."""

    outputs: tuple[Literal["npz", "png", "shards"], ...] = Field(default=("npz",), min_length=1)
    """Files to make of the images: `npz` (`samples.npz`, as ADM's evaluator reads it), `png` (a
    folder with labels) or `shards` (a data set). An output added later is made from another one."""

    compile: bool = False
    """Whether to compile the model with torch.compile, about a minute at the start. Compiled models
    differ in the last bits."""

    cuda_graphs: bool = False
    """Whether compiled models run as CUDA graphs, which spares the host most of its work: for small
    models and small batches. Needs `compile` and a GPU."""

    folder: Path | None = None
    """The folder for the images; without it `<run.folder>/samples/step-0050000`."""

    @model_validator(mode="after")
    def _labels_have_one_origin(self) -> "SampleConfig":
        if self.label_file is None:
            return self
        if self.labels is not None:
            raise ValueError("labels and label_file both name classes; remove one of them")
        if "num_samples" not in self.model_fields_set:
            # Faults of the file are reported where it is used: a run can resume without it.
            with suppress(ConfigError):
                object.__setattr__(self, "num_samples", len(read_label_file(self.label_file)))
        return self

    @model_validator(mode="after")
    def _graphs_are_of_compiled_models(self) -> "SampleConfig":
        if self.cuda_graphs and not self.compile:
            raise ValueError("cuda_graphs needs compiled models; set compile to true")
        return self


def _without_repeats(metrics: tuple[str, ...]) -> tuple[str, ...]:
    if repeated := next((name for name in metrics if metrics.count(name) > 1), None):
        raise ValueError(f"{repeated} is given twice; remove one")
    return metrics


_Metrics = Annotated[
    tuple[Annotated[str, one_of("metric", METRICS)], ...],
    Field(min_length=1),
    AfterValidator(_without_repeats),
]


class EvaluateConfig(Section):
    """The images that `srepa-ds evaluate` compares, and the feature space."""

    samples: Path | None = None
    """The images to score: a sample set, a folder of PNG or JPEG files, an `.npz` as ADM's script
    reads it, shards, or `adm-imagenet256-samples`, which `srepa-ds fetch` downloads; without it the
    set that `sample` writes."""

    draw: bool = False
    """Whether to draw the images of the section `sample` and score them without writing them."""

    reference: Path
    """The real images: shards, a folder of files, or an `.npz` as ADM publishes it, with or without
    the statistics of a larger set; `adm-imagenet256` and `adm-imagenet512` are ADM's own, which
    `srepa-ds fetch` downloads."""

    extractor: ExtractorConfig
    """The encoder in whose feature space the images are compared; `inception` gives the scores of
    ADM's evaluator."""

    further_extractors: tuple[ExtractorConfig, ...] = ()
    """Encoders for further Frechet and kernel distances, such as FD-DINOv2."""

    metrics: _Metrics | None = None
    """Rows of the table of metrics: frechet, spatial_frechet, inception_score, precision_recall,
    kernel_distance. Without it, all that the extractor has features for and that the images are
    enough for."""

    num_manifold_images: int = Field(default=10_000, ge=4)
    """Reference images for precision, recall and the kernel distance; of more, evenly spread
    ones."""

    distance_arithmetic: Literal["fp16", "fp32"] | None = None
    """Distances of precision and recall; null: in half precision for Inception, as in ADM's
    evaluator, in fp32 for all others."""

    batch_size: int = Field(default=256, ge=1)
    """Images per pass through an extractor."""


class StructureConfig(Section):
    """The tokens whose spatial structure `srepa-ds structure` measures."""

    images: Path | None = None
    """The shards of the images; without it `data.folder`."""

    num_images: int = Field(default=256, ge=1)
    """Images to measure, evenly spread over the classes."""

    masks: Path | None = None
    """A folder with a PNG mask per image, above 0 in the foreground, for SRSS: named as the image's
    file in its source (`n01440764/a.png` for `n01440764/a.JPEG`), or by its index (`17.png`)."""

    time: float = Field(default=0.3, ge=0, le=1)
    """The time to which the student's images are noised; 0 is the clean image."""

    batch_size: int = Field(default=32, ge=1)
    """Images per pass."""
