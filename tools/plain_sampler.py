"""A sampling loop as research code writes it, on the same model: the sampler's baseline.

Euler-Maruyama on the linear path, with a doubled batch for guidance above scale 1, float64 state,
eager, the model's arithmetic as PyTorch is set; noise from PyTorch's own generator.
"""

import torch
from torch import Tensor

from srepa_ds.model.sit import SiT

LAST_TIME = 0.04


@torch.no_grad()
def plain_batch(
    model: SiT, labels: Tensor, *, num_steps: int, cfg_scale: float, dtype: torch.dtype
) -> Tensor:
    """Returns latents (b, c, h, w) of `labels` in float64; `dtype` bf16 turns autocast on."""
    device, is_guided = labels.device, cfg_scale > 1
    state = torch.randn(len(labels), *model.config.latent_shape, device=device).double()
    nulls = torch.full_like(labels, model.config.null_label)
    times = [*torch.linspace(1.0, LAST_TIME, num_steps, dtype=torch.float64), torch.tensor(0.0)]
    for number in range(num_steps):
        t, dt = times[number], times[number + 1] - times[number]
        noise = torch.randn_like(state)
        given, classes = (state, labels)
        if is_guided:
            given, classes = torch.cat((state, state)), torch.cat((labels, nulls))
        at = torch.full((len(given),), float(t), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            velocity = model(given.float(), at, classes).velocity.double()
        drift = velocity + (given + (1 - t) * velocity)
        if is_guided:
            of_class, of_none = drift.chunk(2)
            drift = of_none + cfg_scale * (of_class - of_none)
        state = state + dt * drift
        if number < num_steps - 1:
            state = state + torch.sqrt(2 * t * dt.abs()) * noise
    return state
