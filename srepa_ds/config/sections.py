"""The sections of an experiment that belong to no module of their own."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from srepa_ds.encoders.teacher import TeacherConfig
from srepa_ds.model.activation_checkpointing import RematConfig
from srepa_ds.optim.ema import MAIN, RelativeLength
from srepa_ds.sampling.solvers import SamplerConfig
from srepa_ds.schema import Section
from srepa_ds.weights.initial import InitialWeightsConfig


class RunConfig(Section):
    """The run's identity."""

    folder: Path
    """Where everything the run makes is kept; the same folder resumes."""

    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of weights, data order, times, noise and label dropout."""


class TrainConfig(Section):
    """How long and in what portions to train."""

    steps: int = Field(ge=1)
    """Optimizer steps in all."""

    batch_size: int = Field(default=256, ge=1)
    """Samples per optimizer step, over all ranks and accumulation steps."""

    accumulation_steps: int = Field(default=1, ge=1)
    """Micro steps per optimizer step on each rank."""

    log_every_steps: int = Field(default=50, ge=1)
    """Optimizer steps between lines of the record."""

    init_from: InitialWeightsConfig | None = None
    """Weights to begin with instead of random ones; a run that resumes does not ask for them."""

    max_skipped_steps: int = Field(default=10, ge=1)
    """Steps in a row whose losses or gradients are not finite, after which the run goes back to
    its last good checkpoint and on behind these samples. At the end one is enough."""

    max_rollbacks: int = Field(default=3, ge=0)
    """How often it may do so before it gives up, restarts included. A rollback is forgiven once a
    checkpoint of the step that had failed, or of a later one, is good."""


class EngineConfig(Section):
    """How DeepSpeed arranges memory and arithmetic."""

    deepspeed: Path = Path("ds_configs/zero2.json")
    """DeepSpeed JSON: ZeRO stage, offload, buckets. What this YAML says is not repeated there."""

    precision: Literal["fp32", "bf16_autocast", "bf16"] = "bf16"
    """`bf16`: weights and activations in bf16 with fp32 masters, moments and EMA. `bf16_autocast`:
    fp32 weights, matrix products in bf16, as the paper's runs."""

    remat: RematConfig = RematConfig()
    """Activation checkpointing: memory for a second forward pass of the blocks."""

    compile: bool = False
    """Whether torch.compile makes one graph that all blocks share, for a minute or so at the
    start; not under stage 3, whose hooks it cannot trace."""

    overlap_teachers: bool = False
    """Whether teachers run one micro batch ahead on a CUDA stream of their own, beside the student;
    it costs the memory of one more micro batch. Without a GPU it changes nothing."""


class MonitorConfig(Section):
    """What is looked at while training, with the EMA weights and the sampler of `sample`."""

    images_every_steps: int = Field(default=0, ge=0)
    """Optimizer steps between contact sheets; 0 draws none."""

    num_images: int = Field(default=64, ge=1)
    """Images on a sheet."""

    evaluate_every_steps: int = Field(default=0, ge=0)
    """Optimizer steps between Frechet distances in the feature space of `evaluate.extractor`,
    against `evaluate.reference`; 0 measures none."""

    num_evaluated: int = Field(default=2_000, ge=2)
    """Images drawn for a distance; only distances of equally many compare."""

    num_steps: int | None = Field(default=None, ge=1)
    """Steps of the sampler, if not those of `sample`."""


class ExportConfig(Section):
    """What `srepa-ds export` writes."""

    weights: str = MAIN
    """`ema`, another average that was kept (`ema-0.999`, `ema-power-0.05`), or `master`: the
    weights of the last step."""

    power_sigma: RelativeLength | None = None
    """Instead, a power-function average of this relative length, made of those in the run's
    checkpoints (ema.power_sigmas)."""

    step: int | None = Field(default=None, ge=1)
    """The checkpoint's step; without it the newest valid one."""

    folder: Path | None = None
    """Where `model.safetensors` and `config.json` go; without it `<run.folder>/export`."""


class SampleConfig(SamplerConfig):
    """What `srepa-ds sample` draws."""

    weights: Path | None = None
    """Folder of an exported model; without it `<run.folder>/export`."""

    folder: Path | None = None
    """Where the images go; without it `<run.folder>/samples/step-0050000`."""


class EvaluateConfig(Section):
    """What `srepa-ds evaluate` compares."""

    samples: Path | None = None
    """Folder of a finished sample set; without it where `sample` writes."""

    reference: Path
    """Shards of the real images, best a part that was not trained on."""

    extractor: TeacherConfig
    """The encoder whose feature space is compared in."""

    batch_size: int = Field(default=256, ge=1)
    """Images per pass through the extractor."""
