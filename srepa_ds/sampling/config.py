"""The settings of the sampler: solver, guidance, labels, and the size of the set."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from torch import Tensor

from srepa_ds.codec.latent_codec import Rounding
from srepa_ds.sampling.guidance import Guidance
from srepa_ds.sampling.presets import PRESETS
from srepa_ds.sampling.solvers import SOLVERS, Dynamics, integrate
from srepa_ds.schema import Section, one_of


def _class_number(key: Any) -> Any:
    """Returns the number that a key is; raises ValueError for text that is none, or is `03`."""
    if isinstance(key, str) and not re.fullmatch(r"0|[1-9][0-9]{0,9}", key):
        raise ValueError(f"{key!r} is no class; write its number, such as 3")
    return int(key) if isinstance(key, str) else key


_Label = Annotated[int, Field(ge=0, lt=1 << 31)]
_Counted = Annotated[_Label, BeforeValidator(_class_number)]
_InTurn = Annotated[tuple[_Label, ...], Tag("in turn")]
_Counts = Annotated[dict[_Counted, Annotated[int, Field(ge=1, lt=1 << 40)]], Tag("counts")]


def _form_of_labels(labels: Any) -> str:
    return "counts" if isinstance(labels, dict) else "in turn"


class SamplerConfig(Section):
    """Everything that decides the images of a set, beside the weights."""

    preset: Annotated[str, one_of("preset", PRESETS)] | None = None
    """Settings of a paper, for all that is not given here: unguided, repa, srepa, srepa-512, reg,
    irepa or sit. What is given and differs is noted in the provenance."""

    solver: Annotated[str, one_of("solver", SOLVERS)] = "euler_maruyama"
    """Name in the table of solvers: euler and heun solve the ODE, euler_maruyama the SDE."""

    num_steps: Annotated[int, Field(ge=1, lt=1 << 24)] = 250
    """Steps from noise to data; heun evaluates the model twice in all but the last."""

    cfg_scale: Annotated[float, Field(ge=1)] = 1.0
    """Scale of classifier-free guidance; 1 turns it off."""

    cls_cfg_scale: Annotated[float, Field(ge=0)] = 0.0
    """REG: scale of the class token's guidance, wherever the image is guided; 0 turns it off. Above
    0 it needs a `cfg_scale` above 1, without which nothing is guided."""

    guidance_low: Annotated[float, Field(ge=0, le=1)] = 0.0
    """First time (t = 1 is noise) that is guided, itself included."""

    guidance_high: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Last time (t = 1 is noise) that is guided, itself included."""

    guided_channels: int | None = Field(default=None, ge=1)
    """Channels of the latents that are guided, the others follow the class; null guides all. The
    first SiT and DiT guide 3 of 4."""

    label_mode: Literal["random", "balanced"] = "random"
    """random draws each label; balanced cycles through the classes. `labels` overrides both."""

    labels: Annotated[_InTurn | _Counts, Discriminator(_form_of_labels)] | None = None
    """Classes to draw, instead of all: a list, which is repeated in turn ([3, 7]), or the number of
    images of each ({"3": 100, "7": 50}), drawn in the order of the classes; `num_samples` is then
    their sum. Pictures and distances during training always show all classes."""

    num_samples: Annotated[int, Field(ge=1)] = 50_000
    """Number of images in the set."""

    batch_size: Annotated[int, Field(ge=1)] = 64
    """Images per chunk: one rank draws them at once, and one part file holds them. Another size
    rounds otherwise, so that a set has to be finished with the one it was begun with."""

    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Seed of start noise, labels and SDE noise; image i of a seed is always the same image."""

    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Arithmetic of the model: plain fp32, TF32 products on GPUs that have them (elsewhere they are
    fp32), or bf16 autocast; the solver's state is float64."""

    rounding: Rounding = "truncate"
    """From a decoded value to a pixel of 0..255: `truncate` as REPA and its family do, or `round`
    to the nearest, as EDM2, MAR and LightningDiT do."""

    @property
    def guidance(self) -> Guidance:
        """Returns scale and interval of the guidance, and the channels it is limited to."""
        return Guidance(
            self.cfg_scale,
            self.guidance_low,
            self.guidance_high,
            self.cls_cfg_scale,
            self.guided_channels,
        )

    # The first of the validators: the others look at what it fills. It cannot come before the
    # fields, because a validator there turns JSON's lists into values that strict tuples refuse.
    @model_validator(mode="after")
    def _preset_fills_what_is_not_given(self) -> "SamplerConfig":
        row = PRESETS[self.preset].settings if self.preset else {}
        for name in row.keys() - self.model_fields_set:
            # The section is frozen for everybody else.
            object.__setattr__(self, name, row[name])
        return self

    @model_validator(mode="after")
    def _interval_is_ordered(self) -> "SamplerConfig":
        if self.guidance_low > self.guidance_high:
            raise ValueError(
                f"guidance_low ({self.guidance_low}) is above guidance_high "
                f"({self.guidance_high}); the interval is empty"
            )
        return self

    @model_validator(mode="after")
    def _labels_are_of_the_set(self) -> "SamplerConfig":
        if self.labels is not None and not self.labels:
            raise ValueError("labels names no class; name one, or leave it out to draw all")
        if isinstance(self.labels, dict):
            total = sum(self.labels.values())
            if "num_samples" not in self.model_fields_set:
                # The section is frozen for everybody else.
                object.__setattr__(self, "num_samples", total)
            elif self.num_samples != total:
                raise ValueError(
                    f"labels asks for {total} images in all, num_samples for {self.num_samples}; "
                    f"set num_samples to {total}, or leave it out"
                )
        return self

    @model_validator(mode="after")
    def _class_token_is_guided_with_the_image(self) -> "SamplerConfig":
        if self.cls_cfg_scale > 0 and self.cfg_scale <= 1:
            raise ValueError(
                f"cls_cfg_scale ({self.cls_cfg_scale}) guides the class token only where the image "
                f"is guided, which cfg_scale ({self.cfg_scale}) never does; set cfg_scale above 1, "
                "or cls_cfg_scale to 0"
            )
        return self


@dataclass(frozen=True)
class Evaluations:
    """Function evaluations per image: what each network computes, whatever shares a batch."""

    conditional: int
    """Of the model for the image's class: one in every call by the solver."""

    unconditional: int
    """Of the model without a class."""

    guide: int
    """Of the guide, for autoguidance."""

    @property
    def total(self) -> int:
        """All function evaluations of an image."""
        return self.conditional + self.unconditional + self.guide

    @property
    def calls(self) -> int:
        """The solver's calls, guided or not."""
        return self.conditional

    @property
    def guided(self) -> int:
        """The solver's calls that are guided."""
        return self.unconditional + self.guide

    def __str__(self) -> str:
        parts = vars(self).items()
        return " + ".join(f"{count} {name}" for name, count in parts if count)


def count_evaluations(config: SamplerConfig, *, autoguided: bool = False) -> Evaluations:
    """Returns the function evaluations per image, counted by solving for an empty batch.

    `autoguided`: a guide takes the place of the model without a class.
    """
    guided = []

    def velocity(x_t: Tensor, t: float, guidance_t: float) -> Tensor:
        guided.append(config.guidance.active(guidance_t))
        return x_t

    nothing = torch.zeros(0, 1, dtype=torch.float64)
    dynamics = Dynamics(velocity, lambda velocity, x_t, t: x_t, lambda index: nothing)
    integrate(dynamics, nothing, solver=config.solver, num_steps=config.num_steps)
    second = sum(guided)
    return Evaluations(
        conditional=len(guided),
        unconditional=0 if autoguided else second,
        guide=second if autoguided else 0,
    )
