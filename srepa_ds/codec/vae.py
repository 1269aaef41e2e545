"""The codec `vae`: the latents of an `AutoencoderKL` of diffusers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from srepa_ds.codec.config import CodecConfig
from srepa_ds.codec.latent_codec import Encodable, Rounding
from srepa_ds.codec.posterior import Affine, drawn
from srepa_ds.codec.quantised import quantised, refuse_broken_rows
from srepa_ds.distributed.devices import tensor_float32
from srepa_ds.encoders.published import local_folder
from srepa_ds.errors import DataError
from srepa_ds.files import reason_of
from srepa_ds.weight_file import hash_of_tensors

# diffusers' AutoencoderKL; imported late, because that takes seconds.
Autoencoder = Any


class VaeCodec:
    """A frozen VAE: encodes images, draws from stored posteriors, decodes latents."""

    reads_moments = True

    def __init__(self, vae: Autoencoder, config: CodecConfig, *, device: torch.device):
        """Takes the VAE's own scale and shift where `config` has none."""
        self._vae = vae.eval().requires_grad_(False).to(device)
        self._device = device
        self._config = config
        own = vae.config
        self._scale = own.scaling_factor if config.scale is None else config.scale
        self._shift = (own.shift_factor or 0.0) if config.shift is None else config.shift
        self._affine = Affine(self._scale, self._shift)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The hash of the encoder: VAEs that differ in their decoders have the same latents."""
        return {"kind": "vae", "encoder_sha256": _hash_of(self._vae, ("encoder.", "quant_conv."))}

    @property
    def space(self) -> dict[str, Any]:
        """The encoder, and the scale and shift that are used."""
        return {**self.identity, "scale": self._scale, "shift": self._shift}

    @cached_property
    def decoding(self) -> dict[str, Any]:
        """The hash of the decoder, and how it is used."""
        return {
            "kind": "vae",
            "decoder_sha256": _hash_of(self._vae, ("decoder.", "post_quant_conv.")),
            "scale": self._scale,
            "shift": self._shift,
            "precision": self._config.precision,
            "tiled": self._config.tiled,
            # Kernels round otherwise for other numbers of images.
            "batch_size": self._config.batch_size,
        }

    @property
    def downsampling(self) -> int:
        """Pixels per place of a latent, in each direction."""
        return 2 ** (len(self._vae.config.block_out_channels) - 1)

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Returns (channels, height, width) of the latent of an image of `image_shape`.

        Raises DataError if its sides are no multiples of the VAE's downsampling.
        """
        _, height, width = image_shape
        factor = self.downsampling
        if height % factor or width % factor:
            raise DataError(
                f"the VAE makes one place of {factor} x {factor} pixels, and images have "
                f"{height} x {width}; choose sides that are multiples of {factor}"
            )
        return self._vae.config.latent_channels, height // factor, width // factor

    @torch.no_grad()
    def moments(self, images: UInt8[Tensor, "batch 3 H W"]) -> Float[Tensor, "batch moments h w"]:
        """Returns mean and standard deviation of the posterior of images, concatenated, fp32.

        Images are scaled to [-1, 1] by x / 127.5 - 1, as REPA's preparation does.
        """
        pixels = images.to(self._device).to(torch.float32) / 127.5 - 1.0
        with self._arithmetic():
            posterior = self._vae.encode(pixels).latent_dist
        mean, std = posterior.mean.to(torch.float32), posterior.std.to(torch.float32)
        return torch.cat((mean, std), dim=1)

    def encode(self, batch: Encodable, *, seed: int) -> Float[Tensor, "batch c h w"]:
        """Returns a draw from each posterior, stored or encoded now, scaled and shifted, fp32.

        Raises DataError if the shards hold neither latents nor images.
        """
        moments, values = batch.moments, batch.latent_values
        if moments is None:
            if batch.images is None:
                raise DataError("these shards hold neither latents nor images")
            parts = batch.images.split(self._config.batch_size)
            moments, values = torch.cat([self.moments(part) for part in parts]), "moments"
        return self._affine.forward(drawn(moments, values, batch.positions, seed=seed))

    @torch.no_grad()
    def decode(
        self,
        latents: Float[Tensor, "batch c h w"],
        *,
        rounding: Rounding = "truncate",
        refuse_broken: bool = False,
    ) -> UInt8[Tensor, "batch H W 3"]:
        """Returns the images of `latents`, decoded `batch_size` at a time.

        Raises BrokenImagesError as the protocol says.
        """
        parts, extremes = [], []
        for part in latents.split(self._config.batch_size):
            z = self._affine.inverse(part.to(self._device, torch.float32))
            with self._arithmetic():
                decoded = self._vae.decode(z).sample
            parts.append(quantised(decoded, rounding))
            if refuse_broken:
                # One number per image, looked at once for all: the maximum keeps NaN and infinity.
                extremes.append(decoded.abs().flatten(1).amax(1))
        if extremes:
            refuse_broken_rows(torch.cat(extremes), "pixels")
        return torch.cat(parts)

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Sets the precision of the VAE's products while the block runs."""
        kind, precision = self._device.type, self._config.precision
        with ExitStack() as settings:
            if precision == "bf16":
                settings.enter_context(torch.autocast(kind, dtype=torch.bfloat16))
            elif kind == "cuda":
                settings.enter_context(tensor_float32(precision == "tf32"))
            yield


def open_vae(config: CodecConfig, device: torch.device) -> VaeCodec:
    """Returns the codec of a VAE; raises DataError for weights that cannot be read."""
    vae = _loaded(config)
    if config.tiled:
        vae.enable_tiling()
    return VaeCodec(vae, config, device=device)


def _loaded(config: CodecConfig) -> Autoencoder:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise DataError(
            "the codec 'vae' needs diffusers; install the extra: pip install 'srepa_ds[vae]'"
        ) from error
    assert config.weights is not None
    folder = local_folder(config.weights, setting="codec.weights")
    try:
        return AutoencoderKL.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=torch.float32,
            # Without accelerate, diffusers would print that it cannot have it otherwise.
            low_cpu_mem_usage=False,
        )
    # What diffusers raises depends on the fault, and none of it is ours.
    except Exception as error:
        raise DataError(
            f"{folder}: not a readable AutoencoderKL: {reason_of(error)}; give a "
            "folder with config.json and diffusion_pytorch_model.safetensors"
        ) from error


def _hash_of(vae: Autoencoder, prefixes: tuple[str, ...]) -> str:
    """Returns a hash of the weights of a part of the VAE, in fp32."""
    state = vae.state_dict()
    return hash_of_tensors({name: state[name] for name in state if name.startswith(prefixes)})
