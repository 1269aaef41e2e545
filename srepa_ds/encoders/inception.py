"""Inception-2015, as ADM's evaluator uses it: torch-fidelity's network with checked weights."""

import io
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from srepa_ds.distributed.devices import tensor_float32
from srepa_ds.encoders.features import Features
from srepa_ds.errors import DataError, listed
from srepa_ds.weight_file import plain_tensors, read_weight_file

POOLED_WIDTH = 2048
SPATIAL_CHANNELS = 7
SPATIAL_WIDTH = 17 * 17 * SPATIAL_CHANNELS
NUM_CLASSES = 1008

_OUTPUTS = ["2048", "logits_unbiased"]
# A larger batch's activations, 6 MB an image after the first layers, take memory and save no time.
_ON_CPU_AT_ONCE = 16


class Inception(nn.Module):
    """Maps images of 0..255 to the features of ADM's evaluator; frozen, in float32."""

    width = POOLED_WIDTH
    spatial_width = SPATIAL_WIDTH
    num_classes = NUM_CLASSES

    def __init__(self, network: nn.Module, *, sha256: str):
        """Takes torch-fidelity's network; `sha256` is the hash of its weights' file."""
        super().__init__()
        self.network = network
        self._sha256 = sha256
        self._spatial: Tensor | None = None
        # The first channels of the block's output are those of its first branch.
        network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._keep)

    @property
    def identity(self) -> dict[str, Any]:
        """Names the network, the hash of its weights' file and the precision."""
        return {"name": "inception", "weights_sha256": self._sha256, "dtype": "float32"}

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS]

    @torch.no_grad()
    def features(self, images: UInt8[Tensor, "batch 3 height width"]) -> Features:
        """Returns pool_3, its product with the class weights, and 7 channels of Mixed_6d.

        Images of any size are resized to 299 x 299 as TensorFlow 1 does: bilinear, no half-pixel
        centres, no antialiasing. Logits have no bias, and spatial features are flattened
        channels-last, as the graph of ADM's evaluator has them. Products are exact float32, also
        inside autocast and where TF32 is allowed.
        """
        at_once = _ON_CPU_AT_ONCE if images.device.type == "cpu" else max(1, len(images))
        with tensor_float32(False), torch.autocast(images.device.type, enabled=False):
            parts = [self._seen(part) for part in images.split(at_once)]
        pooled, logits, spatial = (torch.cat(kind) for kind in zip(*parts, strict=True))
        return Features(pooled, logits, spatial)

    def _seen(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pooled, logits = self.network(images)
        assert self._spatial is not None
        spatial, self._spatial = self._spatial, None
        return pooled, logits, spatial.permute(0, 2, 3, 1).flatten(1)


def build_network() -> nn.Module:
    """Returns torch-fidelity's network on the CPU, whose weights mean nothing yet.

    It gives pool_3 and the logits without bias. Raises DataError without torch-fidelity.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise DataError(
            "Inception needs torch-fidelity; install the extra: pip install 'srepa_ds[eval]'"
        ) from error

    class Unfilled(FeatureExtractorInceptionV3):
        """The network with an own loader that does nothing: it would run what a pickle holds."""

        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return None

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    # Without memory: random initial weights would take a second and numbers of torch's generator.
    with torch.device("meta"):
        network = Unfilled("inception", _OUTPUTS, feature_extractor_weights_path=nothing)
    return network.to_empty(device="cpu")


def load_inception(weights: Path, *, sha256: str, device: torch.device | str) -> Inception:
    """Returns the frozen network with the weights of a file whose hash is `sha256`.

    The file is read without running what a pickle may hold. Raises DataError for a file that is
    missing, damaged or of another network, naming the weights that do not fit.
    """
    named = f"weights of Inception {weights}"
    found = read_weight_file(weights, named=named, setting="extractor.weights", fault=DataError)
    if strange := sorted(name for name, value in found.items() if not isinstance(value, Tensor)):
        raise DataError(f"{named}: holds no state_dict, but {listed(strange)}")
    network = build_network()
    tensors = plain_tensors(found, weights, named=named, fault=DataError)
    _check_fit(network, tensors, named)
    nn.Module.load_state_dict(network, tensors)
    return Inception(network, sha256=sha256).to(device)


def _check_fit(network: nn.Module, found: dict[str, Tensor], named: str) -> None:
    """Raises DataError unless `found` has the network's names and shapes."""
    own = network.state_dict()
    # Counters of training batches have no effect, and older versions of torch wrote none.
    needed = {name for name in own if not name.endswith("num_batches_tracked")}
    groups = {
        "missing": sorted(needed - found.keys()),
        "unexpected": sorted(found.keys() - own.keys()),
        "of another shape": sorted(
            f"{name} {tuple(found[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own.keys() & found.keys()
            if found[name].shape != own[name].shape
        ),
    }
    faults = [f"  {len(names)} {kind}: {listed(names)}" for kind, names in groups.items() if names]
    if faults:
        raise DataError("\n".join([f"{named} do not fit the network", *faults]))
