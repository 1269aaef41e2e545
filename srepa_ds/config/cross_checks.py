"""Checks across the sections of an experiment, before any data is read."""

from collections.abc import Iterable, Iterator, Mapping

from srepa_ds.alignment.alignment import AlignmentConfig
from srepa_ds.codec.config import CodecConfig
from srepa_ds.config.sections import EngineConfig, EvaluateConfig, MonitorConfig, TrainConfig
from srepa_ds.config.sweep_config import sweep_draws, sweep_finds_weights, sweep_is_scored
from srepa_ds.data.loader import DataConfig
from srepa_ds.errors import ConfigError, Fault
from srepa_ds.model.precision import PRECISIONS
from srepa_ds.model.variants import SiTConfig
from srepa_ds.schema import CrossCheck
from srepa_ds.zero.json_file import load_deepspeed_json, stage_of


def _depth_within_model(
    model: SiTConfig, alignments: tuple[AlignmentConfig, ...]
) -> Iterator[Fault]:
    for number, alignment in enumerate(alignments):
        if alignment.depth > model.shape.depth:
            yield Fault(
                f"alignments.{number}.depth",
                f"{alignment.depth} exceeds the model's {model.shape.depth} blocks",
            )


def _checkpointing_finds_a_block(model: SiTConfig, engine: EngineConfig) -> Iterator[Fault]:
    checkpointing, depth = engine.activation_checkpointing, model.shape.depth
    if checkpointing.policy == "every_k" and checkpointing.k > depth:
        yield Fault(
            "engine.activation_checkpointing.k",
            f"{checkpointing.k} exceeds the model's {depth} blocks, so none would be recomputed; "
            f"choose at most {depth}, or policy 'none'",
        )


def _class_tokens_have_a_source(
    model: SiTConfig, alignments: tuple[AlignmentConfig, ...]
) -> Iterator[Fault]:
    """REG: the class token is the first teacher's; `include_cls` needs one on both sides."""
    width = model.class_token_width
    if width is not None and not alignments:
        yield Fault(
            "model.class_token_width",
            "the class token comes from the first alignment's teacher, but there is no alignment",
        )
    for number, alignment in enumerate(alignments):
        teacher, path = alignment.teacher.resolved, f"alignments.{number}"
        named = alignment.teacher.name or teacher.architecture
        if width is not None and number == 0 and not teacher.has_cls:
            yield Fault(
                f"{path}.teacher",
                f"'{named}' has no class token, but the model carries one "
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


def _tokens_form_pairs(
    model: SiTConfig, alignments: tuple[AlignmentConfig, ...]
) -> Iterator[Fault]:
    """A structural term compares pairs of tokens, on the model's grid or on the teacher's."""
    if model.num_tokens > 1:
        return
    for number, alignment in enumerate(alignments):
        structural, resampling = alignment.structural, alignment.resampling
        on_own_grid = resampling is None or resampling.direction == "teacher_to_student"
        if structural is not None and not structural.include_cls and on_own_grid:
            _, height, width = model.latent_shape
            yield Fault(
                f"alignments.{number}.structural",
                f"compares pairs of tokens, and the model has one: its patches of "
                f"{model.shape.patch_size} are as large as its latents of {height}x{width}; choose "
                "smaller patches, or set it to null",
            )


def _weights_are_available(alignments: tuple[AlignmentConfig, ...]) -> Iterator[Fault]:
    for number, alignment in enumerate(alignments):
        fault = alignment.teacher.weights_fault()
        if fault is not None:
            yield Fault(f"alignments.{number}.teacher.{fault.path}", fault.message)


def _mirrored_pixels_reach_the_teachers(
    data: DataConfig, alignments: tuple[AlignmentConfig, ...]
) -> Iterator[Fault]:
    """Stored tokens are those of the images as they are."""
    for number, alignment in enumerate(alignments):
        if data.mirror and alignment.stored_tokens is not None:
            yield Fault(
                "data.mirror",
                f"alignments.{number}.stored_tokens are tokens of images that are not mirrored; "
                "set data.mirror to false, or run the teacher in training (stored_tokens: null)",
            )


def _extractors_are_available(evaluate: EvaluateConfig | None) -> Iterator[Fault]:
    if evaluate is None:
        return
    further = enumerate(evaluate.further_extractors)
    places = {f"further_extractors.{number}": extractor for number, extractor in further}
    for place, extractor in {"extractor": evaluate.extractor, **places}.items():
        if fault := extractor.weights_fault():
            yield Fault(f"evaluate.{place}.{fault.path}", fault.message)


def _extractors_differ(evaluate: EvaluateConfig | None) -> Iterator[Fault]:
    """Scores are called after their extractor, so two of one name could not be told apart."""
    if evaluate is None:
        return
    known = {evaluate.extractor.label}
    for number, extractor in enumerate(evaluate.further_extractors):
        if extractor.label in known:
            yield Fault(
                f"evaluate.further_extractors.{number}",
                f"two extractors are called '{extractor.label}', by which their scores are told "
                "apart; leave one out, and use it in an evaluation of its own",
            )
        known.add(extractor.label)


def _monitor_has_a_reference(
    monitor: MonitorConfig, evaluate: EvaluateConfig | None
) -> Iterator[Fault]:
    if monitor.evaluate_every_steps and evaluate is None:
        yield Fault(
            "monitor.evaluate_every_steps", "needs a section `evaluate`: reference and extractor"
        )


def _codec_decodes(codec: CodecConfig, monitor: MonitorConfig) -> Iterator[Fault]:
    """Images are looked at; stored latents have no decoder."""
    for name in ("images_every_steps", "evaluate_every_steps"):
        if codec.kind == "stored" and getattr(monitor, name):
            yield Fault(
                f"monitor.{name}",
                "needs images, and codec 'stored' cannot decode latents; set it to 0, or "
                "codec.kind=vae",
            )


def _monitor_has_heldout_data(monitor: MonitorConfig) -> Iterator[Fault]:
    if monitor.heldout_every_steps and monitor.heldout is None:
        yield Fault("monitor.heldout_every_steps", "needs monitor.heldout, a folder of shards")


def _batch_divides(train: TrainConfig) -> Iterator[Fault]:
    if train.batch_size % train.accumulation_steps:
        yield Fault(
            "train.batch_size",
            f"{train.batch_size} is not a multiple of accumulation_steps "
            f"{train.accumulation_steps}",
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
    if PRECISIONS[engine.precision].is_autocast and "communication_data_type" in document:
        yield Fault(
            "engine.deepspeed",
            f"{engine.deepspeed}: communication_data_type has no effect with precision "
            f"{engine.precision}, which reduces gradients in fp32; remove it",
        )


CROSS_CHECKS: Mapping[tuple[str, ...], Iterable[CrossCheck]] = {
    ("model", "alignments"): (
        _depth_within_model,
        _class_tokens_have_a_source,
        _tokens_form_pairs,
    ),
    ("model", "engine"): (_checkpointing_finds_a_block,),
    ("data", "alignments"): (_mirrored_pixels_reach_the_teachers,),
    ("alignments",): (_weights_are_available,),
    ("evaluate",): (_extractors_are_available, _extractors_differ),
    ("monitor", "evaluate"): (_monitor_has_a_reference,),
    ("codec", "monitor"): (_codec_decodes,),
    ("monitor",): (_monitor_has_heldout_data,),
    ("sweep", "evaluate"): (sweep_is_scored,),
    ("sweep", "ema"): (sweep_finds_weights,),
    ("sweep", "sample"): (sweep_draws,),
    ("train",): (_batch_divides,),
    ("engine",): (_deepspeed_json_is_sound,),
}
