"""The trainers of REPA's family in plain operations: a loop of AdamW, and the file they write."""

import argparse
from pathlib import Path

import torch
from plain_sit import plain_sit
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from srepa_ds.model.variants import SiTConfig

_ORDER = (
    "pos_embed", "x_embedder", "t_embedder", "y_embedder", "blocks", "projectors",
    "final_layer.linear.", "final_layer.linear_cls.", "final_layer.adaLN", "cls_projectors2",
    "wg_norm",
)  # fmt: skip
_IN_BLOCK = ("attn.qkv", "attn.q_norm", "attn.k_norm", "attn.proj", "mlp", "adaLN")

ARGUMENTS = {
    "model": "SiT-B/2", "resolution": 64, "num_classes": 10, "encoder_depth": 2,
    "enc_type": "dinov2-vit-b", "proj_coeff": 0.5, "path_type": "linear", "prediction": "v",
    "weighting": "uniform", "qk_norm": False, "fused_attn": True, "cfg_prob": 0.1, "legacy": False,
    "learning_rate": 1e-3, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 0.0,
    "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "batch_size": 4, "gradient_accumulation_steps": 1,
    "max_train_steps": 6, "mixed_precision": "no", "seed": 0, "num_workers": 4,
    "allow_tf32": False, "output_dir": "exps", "data_dir": "../data/imagenet256",
}  # fmt: skip


def in_order(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights in the order of the official model's state_dict."""

    def place(name: str) -> tuple:
        part = next(i for i, start in enumerate(_ORDER) if name.startswith(start))
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            inner = next(i for i, start in enumerate(_IN_BLOCK) if rest.startswith(start))
            return part, int(number), inner, *_layer(rest)
        return part, 0, 0, *_layer(name)

    return {name: state[name] for name in sorted(state, key=place)}


def _layer(name: str) -> tuple[str, bool]:
    layer, _, kind = name.rpartition(".")
    return layer, kind == "bias"


class PlainTrainer:
    """Six lines of a training loop per step, without any of the package's training code."""

    def __init__(
        self,
        state: dict[str, Tensor],
        config: SiTConfig,
        *,
        pointwise: float = 0.0,
        mse: float = 0.0,
        kl: float = 0.0,
        gamma: float | None = None,
        cls: float = 0.0,
        depth: int = 2,
        ema_decay: float = 0.9999,
        arguments: dict | None = None,
    ):
        self.config, self.depth, self.ema_decay = config, depth, ema_decay
        self.pointwise, self.mse, self.kl, self.gamma, self.cls = pointwise, mse, kl, gamma, cls
        self.arguments = ARGUMENTS | {"proj_coeff": pointwise} | (arguments or {})
        self.weights = {k: v.clone().requires_grad_(k != "pos_embed") for k, v in state.items()}
        self.ema = {k: v.clone() for k, v in state.items()}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=1e-3, weight_decay=0.0)
        self.steps = 0

    def step(self, inputs: dict[str, Tensor]) -> Tensor:
        """Takes one step; returns flow, pointwise, structural, total and the gradient's norm."""
        losses = self._losses(inputs)
        self.optimizer.zero_grad()
        losses[-1].backward()
        trained = [weight for weight in self.weights.values() if weight.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimizer.step()
        self.steps += 1
        with torch.no_grad():
            for name, average in self.ema.items():
                average.mul_(self.ema_decay).add_(self.weights[name], alpha=1 - self.ema_decay)
        return torch.stack([*losses, norm]).detach()

    def _losses(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        t = inputs["t"][:, None, None, None]
        x_t = (1 - t) * inputs["x"] + t * inputs["eps"]
        cls_t = None
        if self.cls:
            t = inputs["t"][:, None]
            cls_t = (1 - t) * inputs["cls"] + t * inputs["cls_eps"]
        output = plain_sit(self.weights, self.config, x_t, inputs["t"], inputs["y"], cls_t)
        velocity, hidden, cls_velocity = output
        flow = (velocity - (inputs["eps"] - inputs["x"])).square().mean()
        zero = torch.zeros(())
        projected = structural = zero
        if self.pointwise or self.mse or self.kl:
            own = self._projected(hidden[self.depth - 1])
            target = self._target(inputs)
            projected = -F.cosine_similarity(own, target, dim=-1).mean()
            structural = structure(own, target, kl=bool(self.kl)) if self.mse or self.kl else zero
        total = flow + self.pointwise * projected + (self.mse + self.kl) * structural
        if cls_velocity is not None:
            wanted = inputs["cls_eps"] - inputs["cls"]
            total = total + self.cls * (cls_velocity - wanted).square().mean()
        return [flow, projected, structural, total]

    def _projected(self, tokens: Tensor) -> Tensor:
        weights = self.weights
        if (layer := weights.get("projectors.0.projection_layer.weight")) is not None:
            rows, columns = self.config.grid
            grid = tokens.transpose(1, 2).unflatten(2, (rows, columns))
            bias = weights["projectors.0.projection_layer.bias"]
            return F.conv2d(grid, layer, bias, padding=layer.shape[-1] // 2).flatten(2).mT
        for number in (0, 2, 4):
            name = f"projectors.0.{number}"
            tokens = F.linear(tokens, weights[f"{name}.weight"], weights[f"{name}.bias"])
            tokens = F.silu(tokens) if number < 4 else tokens
        return tokens

    def _target(self, inputs: dict[str, Tensor]) -> Tensor:
        target = inputs["z0"]
        if self.gamma is not None:
            centred = target - self.gamma * target.mean(1, keepdim=True)
            target = centred / (target.std(1, keepdim=True) + 1e-6)
        return torch.cat((inputs["cls"][:, None], target), 1) if self.cls else target

    def save(self, path: Path, **changes: object) -> Path:
        """Writes what the trainers of REPA write after a step; `changes` replace its entries."""
        document = {
            "model": {name: weight.detach() for name, weight in self.weights.items()},
            "ema": self.ema,
            "opt": self.optimizer.state_dict(),
            "args": argparse.Namespace(**self.arguments),
            "steps": self.steps,
        }
        torch.save({k: v for k, v in (document | changes).items() if v is not None}, path)
        return path


def structure(student: Tensor, teacher: Tensor, *, kl: bool) -> Tensor:
    """Returns sREPA's structural loss, Eq. 6 or 8 with both temperatures 0.2."""
    grams = [F.normalize(z, dim=-1) @ F.normalize(z, dim=-1).mT for z in (student, teacher)]
    n = student.shape[1]
    others = ~torch.eye(n, dtype=torch.bool)
    own, wanted = (gram[:, others].unflatten(1, (n, n - 1)) for gram in grams)
    if not kl:
        return (wanted - own).square().mean()
    log_p, log_q = ((gram / 0.2).log_softmax(-1) for gram in (wanted, own))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def save_inputs(path: Path, inputs: list[dict[str, Tensor]]) -> None:
    """Writes the inputs of several steps for the worker that continues."""
    save_file({key: torch.stack([step[key] for step in inputs]) for key in inputs[0]}, path)
