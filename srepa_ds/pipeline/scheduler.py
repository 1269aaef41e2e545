"""The solvers of `sampling/solvers.py` as a scheduler of diffusers."""

from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor

from srepa_ds.errors import ConfigError, Fault, nearest
from srepa_ds.interpolant import INTERPOLANTS
from srepa_ds.sampling.solvers import SOLVERS, Step, advanced, corrected, diffused, steps_of


class SolverCall(NamedTuple):
    """One call of the model, and what the solver does with its output."""

    step: Step
    corrects: bool = False
    """Whether it is Heun's second call, at the end of the step."""
    draws: bool = False
    """Whether the step adds noise."""

    @property
    def t(self) -> float:
        """The time of the state that the model sees; 1 is noise."""
        return self.step.next_t if self.corrects else self.step.t


class SiTFlowMatchScheduler(SchedulerMixin, ConfigMixin):
    """Solves from noise to data with a model that predicts data - noise at t = 0 to t = 1.

    `timesteps` are what the model takes: 0 is noise and 1 is data. The solvers themselves run in
    float64; a state comes back in the dtype it was given in, so give float64 to lose nothing.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, solver: str = "euler", path: str = "linear") -> None:
        """Sets the solver (euler, heun, euler_maruyama) and the path the model was trained on.

        Raises ConfigError for unknown names.
        """
        tables = (("solver", solver, SOLVERS), ("path", path, INTERPOLANTS))
        faults = [
            Fault(key, f"unknown {key} '{name}'; {nearest(name, table)}")
            for key, name, table in tables
            if name not in table
        ]
        if faults:
            raise ConfigError("the scheduler's config", faults)
        self.order = 2 if solver == "heun" else 1
        self.calls: tuple[SolverCall, ...] = ()
        self.timesteps = torch.zeros(0)
        self._restart()

    def _restart(self) -> None:
        self._position = 0
        self._start: Tensor | None = None
        self._velocity: Tensor | None = None

    @property
    def step_index(self) -> int:
        """How many calls of the model were stepped with."""
        return self._position

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None
    ) -> None:
        """Sets `timesteps` (calls,), in float32, for a new start from noise.

        Heun calls the model twice in all steps but the last. Raises ValueError without a step.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        calls, solver = [], self.config["solver"]
        for step in steps_of(solver, num_inference_steps):
            is_sde = solver == "euler_maruyama"
            calls.append(SolverCall(step, draws=is_sde and not step.is_last))
            if solver == "heun" and not step.is_last:
                calls.append(SolverCall(step, corrects=True))
        self.calls = tuple(calls)
        times = torch.tensor([1.0 - call.t for call in calls], dtype=torch.float64)
        self.timesteps = times.to(torch.float32).to(device or "cpu")
        self._restart()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Returns `sample`: the model takes states as they are."""
        return sample

    def step(
        self,
        model_output: Float[Tensor, " batch *event"],
        timestep: Any,
        sample: Float[Tensor, " batch *event"],
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Float[Tensor, " batch *event"] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Returns the state to call the model with next, as `.prev_sample`.

        Steps are taken in the order of `timesteps`; `timestep` is not looked at, as a comparison
        would wait for the device. The SDE takes `variance_noise`, or draws from `generator`. Raises
        ValueError beyond the last step.
        """
        if self._position >= len(self.calls):
            raise ValueError("there is no step left; call set_timesteps for a new start from noise")
        call = self.calls[self._position]
        self._position += 1
        # The solvers' velocity is noise - data.
        velocity, x_t = -model_output.double(), sample.double()
        if call.corrects:
            assert self._start is not None
            assert self._velocity is not None
            result = corrected(self._start, self._velocity, velocity, call.step)
            self._start = self._velocity = None
        elif self.config["solver"] == "euler_maruyama":

            def noise(index: int) -> Tensor:
                if variance_noise is not None:
                    return variance_noise.to(x_t)
                return randn_tensor(
                    x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype
                )

            score = INTERPOLANTS[self.config["path"]].score
            result = diffused(x_t, velocity, call.step, score=score, noise=noise)
        else:
            result = advanced(x_t, velocity, call.step)
            if self.order == 2:
                self._start, self._velocity = x_t, velocity
        result = result.to(sample.dtype)
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)
