"""The forms in which a set of images is stored: `OUTPUTS`."""

from srepa_ds.sampling.outputs.content import Output
from srepa_ds.sampling.outputs.npz import NpzOutput
from srepa_ds.sampling.outputs.png import PngOutput
from srepa_ds.sampling.outputs.shards import ShardsOutput

OUTPUTS: dict[str, Output] = {"npz": NpzOutput(), "shards": ShardsOutput(), "png": PngOutput()}
"""By their names in `sample.outputs`; of a finished set, the first that is there is read."""
