"""SiT as a model of diffusers, in the convention of the first SiT: t = 1 is data.

The names of config keys and weights are those of the community's `SiT-diffusers` repositories.
"""

import os
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import is_accelerate_available
from jaxtyping import Float, Int64
from torch import Tensor, nn

from srepa_ds.errors import ConfigError, Fault
from srepa_ds.model.activation_checkpointing import ActivationCheckpointingConfig
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import MLP_RATIO, SiTConfig
from srepa_ds.pipeline.strict import refuse_differences
from srepa_ds.schema import validated


class SiTTransformer2DModel(ModelMixin, ConfigMixin):
    """A SiT that predicts data - noise at t = 0 (noise) to t = 1 (data).

    A new one has weights of zero, to be loaded. `state_dict` has the first SiT's names, `pos_embed`
    among them.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SiTBlock"]
    # The first weight decides there whether the others are cast, and ours stays in float32.
    _supports_param_buffer_assignment = False
    _repeated_blocks = ["SiTBlock"]

    @register_to_config
    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        """Builds the model; raises ConfigError for sizes that do not fit together.

        Training dropped labels with `class_dropout_prob`; at 0 there is no null label. With
        `learn_sigma` the last layer has twice the channels, of which the second half is unused.
        """
        super().__init__()
        if mlp_ratio != MLP_RATIO:
            reason = f"{mlp_ratio} is not supported; SiT has {MLP_RATIO}"
            raise ConfigError("the transformer's config", [Fault("mlp_ratio", reason)])
        sizes = {
            "variant": "SiT-XL/2",
            "input_size": input_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "num_classes": num_classes,
        }
        sit = SiT(validated(SiTConfig, sizes, source="the transformer's config"))
        if learn_sigma:
            linear = sit.final_layer.linear
            linear.out_features *= 2
            linear.weight = _with_rows(linear.weight, linear.out_features)
            linear.bias = _with_rows(linear.bias, linear.out_features)
        if class_dropout_prob == 0:
            table = sit.y_embedder.embedding_table
            table.num_embeddings = num_classes
            table.weight = _with_rows(table.weight, num_classes)
        # Both are one model with one set of layers and buffers, so that weights have the names of
        # a SiT. A tuple, because a module would become a layer.
        self._modules, self._buffers = sit._modules, sit._buffers
        self._sit = (sit,)
        self._recomputes = False

    @property
    def null_label(self) -> int | None:
        """The label that stands for 'no class', where training dropped labels."""
        return self.config["num_classes"] if self.config["class_dropout_prob"] > 0 else None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The (channels, height, width) of one input."""
        return self._sit[0].latent_shape

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass, as diffusers calls it."""
        return self._recomputes

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self._recomputes = value
        policy = "full" if value else "none"
        self._sit[0].set_activation_checkpointing(ActivationCheckpointingConfig(policy=policy))

    def forward(
        self,
        hidden_states: Float[Tensor, "batch channels height width"],
        timestep: Tensor | float,
        class_labels: Int64[Tensor, " batch"],
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Returns the velocity data - noise (batch, channels, height, width) as `.sample`.

        `timestep` is one time in [0, 1] for all, or (batch,), and 1 is data. The velocity has the
        dtype of `hidden_states`. Raises ValueError for latents of another shape.
        """
        times = torch.as_tensor(timestep, device=hidden_states.device)
        if not times.is_floating_point():
            # Not rounded to whole numbers: 0 and 1 are times too.
            times = times.float()
        output = self._sit[0](hidden_states, times.expand(len(hidden_states)), class_labels)
        # With a learned sigma, its channels come second.
        velocity = output.velocity[:, : self.latent_shape[0]].to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **kwargs: Any
    ) -> Any:
        """Returns the model of a folder or a repository, from safetensors files alone.

        Takes the arguments of diffusers. Raises CheckpointError if weights are missing, unknown or
        of another shape, and whatever diffusers raises.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        # As diffusers decides, which otherwise warns that accelerate is not there.
        kwargs.setdefault("low_cpu_mem_usage", is_accelerate_available())
        kwargs["use_safetensors"] = True
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **kwargs
        )
        refuse_differences(info, pretrained_model_name_or_path)
        return (model, info) if wants_info else model


def _with_rows(parameter: Tensor, rows: int) -> nn.Parameter:
    """Returns zeros like `parameter`, with another number of rows."""
    return nn.Parameter(parameter.detach().new_zeros(rows, *parameter.shape[1:]))
