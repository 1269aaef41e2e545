"""Other settings of the sampler with models that are open already."""

import pytest
import torch
from builders import randomised

from srepa_ds.config.experiment import load_config
from srepa_ds.distributed import ranks
from srepa_ds.drawing.drawing import open_drawing
from srepa_ds.drawing.varied import with_sampler
from srepa_ds.model.sit import SiT
from srepa_ds.schema import to_tree
from srepa_ds.weights.exported import write_model

GIVEN = ("sample.num_samples=5", "sample.batch_size=3", "sample.num_steps=2", "sample.cfg_scale=2")


@pytest.fixture
def opened(small_world, tmp_path):
    """Returns a function that opens the drawing of an exported model, with overrides."""

    def open_here(*overrides):
        folder = tmp_path / "export"
        given = [*GIVEN, f"run.folder={tmp_path}", *overrides]
        config = load_config(small_world.config, given)
        if not folder.exists():
            provenance = {"checkpoint": "none", "step": 5, "weights": "ema"}
            tensors = randomised(SiT(config.model), scale=0.1).state_dict()
            write_model(folder, tensors, config=to_tree(config), provenance=provenance)
        return open_drawing(config, ranks.initialize())

    yield open_here
    ranks.close()


@pytest.mark.parametrize("width", [None, 32])
@pytest.mark.parametrize(
    "changes",
    [
        {"solver": "heun", "num_steps": 3},
        {"cfg_scale": 1.5, "guidance_low": 0.1, "guidance_high": 0.7},
        {"cfg_scale": 1.0},
    ],
)
def test_it_is_the_drawing_that_these_settings_open(opened, width, changes):
    model = f"model.class_token_width={'null' if width is None else width}"
    first = opened(model)
    wanted = opened(model, *(f"sample.{name}={value}" for name, value in changes.items()))
    found = with_sampler(first, wanted.sampler)
    assert found.provenance.digest() == wanted.provenance.digest() != first.provenance.digest()
    assert found.sampler == wanted.sampler
    assert found.model is first.model
    images = [
        torch.cat([batch.images for batch in one.batches(one.chunks)]) for one in (found, wanted)
    ]
    assert torch.equal(*images)
