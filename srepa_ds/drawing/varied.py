"""The same models drawing with other settings of the sampler."""

from dataclasses import replace

from srepa_ds.drawing.drawing import Drawing
from srepa_ds.sampling.config import SamplerConfig
from srepa_ds.sampling.provenance import Provenance
from srepa_ds.schema import to_tree

VARIED = ("solver", "num_steps", "cfg_scale", "cls_cfg_scale", "guidance_low", "guidance_high")
"""The settings in which two drawings of the same models may differ."""


def with_sampler(drawing: Drawing, sampler: SamplerConfig) -> Drawing:
    """Returns `drawing` with the settings `VARIED` of `sampler`; models and decoder are shared.

    So the weights are read and hashed once for many settings.
    """
    changes = {name: getattr(sampler, name) for name in VARIED}
    own = SamplerConfig(
        **{name: getattr(drawing.sampler, name) for name in SamplerConfig.model_fields} | changes
    )
    stated = drawing.provenance.facts["sampler"]
    # Only what is stated already: the guidance of a class token means nothing without one.
    stated = {**stated, **{k: v for k, v in to_tree(own).items() if k in VARIED and k in stated}}
    provenance = Provenance({**drawing.provenance.facts, "sampler": stated})
    return replace(drawing, sampler=own, provenance=provenance)
