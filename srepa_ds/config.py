"""The whole experiment in one tree: the sections of every module and what must hold across them."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from srepa_ds.alignment.alignment import AlignmentConfig
from srepa_ds.alignment.teachers import TeacherConfig
from srepa_ds.checkpoint import CheckpointConfig
from srepa_ds.data.loader import DataConfig
from srepa_ds.deepspeed_json import load_deepspeed_json, stage_of
from srepa_ds.ema import MAIN, EmaConfig, RelativeLength
from srepa_ds.errors import ConfigError, Fault
from srepa_ds.initial_weights import InitialWeightsConfig
from srepa_ds.latent_codec import CodecConfig
from srepa_ds.model.remat import RematConfig
from srepa_ds.model.variants import SiTConfig
from srepa_ds.model.weights import exported_step
from srepa_ds.objective import ObjectiveConfig
from srepa_ds.optim import OptimizerConfig
from srepa_ds.sampling.solvers import SamplerConfig
from srepa_ds.schema import (
    CrossCheck,
    Section,
    Tree,
    apply_overrides,
    load_tree,
    validated,
)
from srepa_ds.telemetry import RECORD


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
    its last good checkpoint and on behind these samples."""

    max_rollbacks: int = Field(default=3, ge=0)
    """How often it may do so before it gives up."""


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


class Config(Section):
    """One experiment, from data to scores."""

    kind: Literal["experiment"] = "experiment"
    """What this file configures."""

    run: RunConfig
    """The run's identity."""

    data: DataConfig
    """Where training images come from."""

    codec: CodecConfig = CodecConfig()
    """The space the diffusion model works in."""

    model: SiTConfig
    """The diffusion transformer."""

    objective: ObjectiveConfig = ObjectiveConfig()
    """The flow-matching part of the loss."""

    alignments: tuple[AlignmentConfig, ...] = ()
    """One entry per teacher: which, at which depth, and with which losses. Empty: plain SiT."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its learning rate schedule."""

    ema: EmaConfig = EmaConfig()
    """How the exponential moving average of the weights is kept."""

    train: TrainConfig
    """How long and in what portions to train."""

    engine: EngineConfig = EngineConfig()
    """How DeepSpeed arranges memory and arithmetic."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written and which are kept."""

    monitor: MonitorConfig = MonitorConfig()
    """What is looked at while training."""

    export: ExportConfig = ExportConfig()
    """What `srepa-ds export` writes."""

    sample: SampleConfig = SampleConfig()
    """What `srepa-ds sample` draws."""

    evaluate: EvaluateConfig | None = None
    """What `srepa-ds evaluate` compares."""

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints lie."""
        return self.run.folder / "checkpoints"

    @property
    def record(self) -> Path:
        """Where training writes its losses, line by line."""
        return self.run.folder / RECORD

    @property
    def resolved(self) -> Path:
        """Where training keeps the configuration it ran with."""
        return self.run.folder / "config.yaml"

    @property
    def environment(self) -> Path:
        """Where training says what it ran on."""
        return self.run.folder / "environment.json"

    @property
    def results(self) -> Path:
        """Where the scores lie."""
        return self.run.folder / "results.json"

    @property
    def timings(self) -> Path:
        """Where the demo says how long each command took."""
        return self.run.folder / "timings.json"

    @property
    def report(self) -> Path:
        """Where the report lies."""
        return self.run.folder / "report.html"

    @property
    def export_folder(self) -> Path:
        """Where the exported model lies."""
        return self.export.folder or self.run.folder / "export"

    @property
    def weights_folder(self) -> Path:
        """Where `sample` finds the model."""
        return self.sample.weights or self.export_folder

    @property
    def samples_folder(self) -> Path:
        """Where `sample` writes: a folder for each exported step, so that no two sets collide."""
        if self.sample.folder is not None:
            return self.sample.folder
        step = exported_step(self.weights_folder)
        samples = self.run.folder / "samples"
        return samples if step is None else samples / f"step-{step:07d}"


def _depth_within_model(
    model: SiTConfig, alignments: tuple[AlignmentConfig, ...]
) -> Iterator[Fault]:
    for number, alignment in enumerate(alignments):
        if alignment.depth > model.shape.depth:
            yield Fault(
                f"alignments.{number}.depth",
                f"{alignment.depth} lies beyond the model's {model.shape.depth} blocks",
            )


def _class_tokens_have_a_source(
    model: SiTConfig, alignments: tuple[AlignmentConfig, ...]
) -> Iterator[Fault]:
    """REG: the class token is the first teacher's; whoever compares class tokens needs two."""
    width = model.class_token_width
    if width is not None and not alignments:
        yield Fault(
            "model.class_token_width",
            "the class token is that of the first alignment's teacher, but there is no alignment",
        )
    for number, alignment in enumerate(alignments):
        teacher, path = alignment.teacher.resolved, f"alignments.{number}"
        named = alignment.teacher.name or teacher.architecture
        if width is not None and number == 0 and not teacher.has_cls:
            yield Fault(
                f"{path}.teacher",
                f"'{named}' has no class token, which the model is to carry "
                "(model.class_token_width); choose a teacher with one",
            )
        elif width is not None and number == 0 and teacher.width != width:
            yield Fault(
                "model.class_token_width",
                f"is {width}, but the class token of '{named}' has {teacher.width} channels",
            )
        if alignment.includes_cls and width is None:
            yield Fault(
                f"{path}", "include_cls needs model.class_token_width; the model has no class token"
            )
        elif alignment.includes_cls and not teacher.has_cls and number > 0:
            yield Fault(f"{path}", f"include_cls: the teacher '{named}' has no class token")


def _weights_can_be_had(alignments: tuple[AlignmentConfig, ...]) -> Iterator[Fault]:
    for number, alignment in enumerate(alignments):
        fault = alignment.teacher.weights_fault()
        if fault is not None:
            yield Fault(f"alignments.{number}.teacher.{fault.path}", fault.message)


def _extractor_can_be_had(evaluate: EvaluateConfig | None) -> Iterator[Fault]:
    fault = evaluate.extractor.weights_fault() if evaluate else None
    if fault is not None:
        yield Fault(f"evaluate.extractor.{fault.path}", fault.message)


def _monitor_can_judge(monitor: MonitorConfig, evaluate: EvaluateConfig | None) -> Iterator[Fault]:
    if monitor.evaluate_every_steps and evaluate is None:
        yield Fault(
            "monitor.evaluate_every_steps", "needs a section `evaluate`: reference and extractor"
        )


def _batch_divides(train: TrainConfig) -> Iterator[Fault]:
    if train.batch_size % train.accumulation_steps:
        yield Fault(
            "train.batch_size",
            f"{train.batch_size} is no multiple of accumulation_steps {train.accumulation_steps}",
        )


def _deepspeed_json_is_sound(engine: EngineConfig) -> Iterator[Fault]:
    try:
        document = load_deepspeed_json(engine.deepspeed)
    except ConfigError as error:
        for fault in error.faults:
            words = (f"{error.source}:", fault.path, fault.message)
            yield Fault("engine.deepspeed", " ".join(filter(None, words)))
        return
    if engine.compile and stage_of(document) == 3:
        yield Fault(
            "engine.compile",
            f"torch.compile cannot trace the hooks of ZeRO stage 3 ({engine.deepspeed}); choose a "
            "stage of 0 to 2, or set it to false",
        )
    if engine.precision == "bf16_autocast" and "communication_data_type" in document:
        yield Fault(
            "engine.deepspeed",
            f"{engine.deepspeed}: communication_data_type means nothing to precision "
            "bf16_autocast, which reduces gradients in fp32; remove it",
        )


CROSS_CHECKS: Mapping[tuple[str, ...], Iterable[CrossCheck]] = {
    ("model", "alignments"): (_depth_within_model, _class_tokens_have_a_source),
    ("alignments",): (_weights_can_be_had,),
    ("evaluate",): (_extractor_can_be_had,),
    ("monitor", "evaluate"): (_monitor_can_judge,),
    ("train",): (_batch_divides,),
    ("engine",): (_deepspeed_json_is_sound,),
}


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Returns the experiment of a YAML file with overrides; raises ConfigError with all faults."""
    return config_from(apply_overrides(load_tree(path), overrides), source=str(path))


def config_from(tree: Tree, *, source: str) -> Config:
    """Returns the experiment of a tree; raises ConfigError with all faults."""
    return validated(Config, tree, source=source, cross_checks=CROSS_CHECKS)
