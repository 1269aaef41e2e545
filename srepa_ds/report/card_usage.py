"""The part of a model card that shows how to use the model, by commands that run as they are."""

from srepa_ds.report.card_facts import CardFacts

_OWN = """\
In Python, with srepa_ds installed (a folder of this machine takes the place of `{name}`):

```python
import json

import torch
from srepa_ds.weights.hub import PretrainedSiT

model = PretrainedSiT.from_pretrained("{name}")
noise = torch.randn(1, *model.latent_shape)
# Time 1 is noise, time 0 is data; the velocity points towards the noise.
velocity = model(noise, torch.ones(1), torch.tensor([0]){class_token}).velocity

# The experiment that trained it, for the commands below: JSON is YAML.
with open("experiment.yaml", "w") as file:
    json.dump(model.document.config, file)
```

Draw images into `drawn/` (`fetch` downloads the model, and whatever else the experiment names):

```sh
srepa-ds fetch experiment.yaml sample.weights={name} {sample}
srepa-ds sample experiment.yaml sample.weights={name} run.folder=drawn {sample}
```

Train on from these weights, with data of your own in `data.folder`:

```sh
srepa-ds fetch experiment.yaml train.init_from.path={name}
srepa-ds train experiment.yaml train.init_from.path={name} {weights} run.folder=further
```
"""

_DIFFUSERS = """\
In Python, with srepa_ds and diffusers installed (a folder takes the place of `{name}`):

```python
from srepa_ds.pipeline import SiTPipeline

pipeline = SiTPipeline.from_pretrained("{name}")
pipeline(class_labels=[0]).images[0].save("image.png")
```

Train on from these weights, by a configuration of yours with the same `model`:

```sh
srepa-ds fetch experiment.yaml train.init_from.path={name}
srepa-ds train experiment.yaml train.init_from.path={name} {weights} run.folder=further
```
"""

_FORMATS = {"srepa_ds": _OWN, "diffusers": _DIFFUSERS}


def usage(facts: CardFacts) -> str:
    """Returns the section, for the format of the export."""
    width = facts.trained.model.class_token_width
    is_master = facts.source.provenance["weights"] == "master"
    sample, own = facts.trained.sample, []
    # Where the experiment draws, and from what, was for the machine it ran on.
    if sample.source != "export":
        own.append("sample.source=export")
    own += [
        f"sample.{name}=null"
        for name in ("folder", "guide", "label_file")
        if (getattr(sample, name))
    ]
    return _FORMATS[facts.given.export.format].format(
        name=facts.name,
        class_token="" if width is None else f", cls_t=torch.randn(1, {width})",
        weights=f"train.init_from.weights={'model' if is_master else 'ema'}",
        sample=" ".join([*own, "sample.num_samples=16"]),
    )
