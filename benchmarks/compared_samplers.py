"""The samplers that the benchmarks compare, and tables of them."""

from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import SchedulerMixin

from freqgate_dit.samplers import configure
from freqgate_dit.scheduling_spectral_euler import Frequencies, SpectralEulerDiscreteScheduler, spectral_power


TRAILING, LINSPACE = {"timestep_spacing": "trailing"}, {"timestep_spacing": "linspace"}
KARRAS, SPECTRAL_GRID, SECOND = {"use_karras_sigmas": True}, {"use_spectral_sigmas": True}, {"spectral_order": 2}
SPECTRAL = SpectralEulerDiscreteScheduler


class ScalarClock(SpectralEulerDiscreteScheduler):
    """The same noise levels, and steps with the mean power of each channel at all frequencies."""

    def frequencies(self, height: int, width: int):
        spectrum = self.config._spectrum
        power = spectral_power(spectrum, spectrum["height"], spectrum["width"]).mean((1, 2))
        return Frequencies({**spectrum, "power": [[value] for value in power.tolist()]}, height, width)


class DPMOnSpectralGrid(DPMSolverMultistepScheduler):
    """DPM-Solver++(2M) at the noise levels of the spectral sampler."""

    def set_timesteps(self, num_inference_steps: int, device=None):
        super().set_timesteps(num_inference_steps, device)
        other = configure(SPECTRAL, self.config, **SPECTRAL_GRID)
        other.set_timesteps(num_inference_steps, device)
        self.sigmas, self.timesteps = other.sigmas, other.timesteps


# Name -> class and arguments. Grids that are not of timesteps run from the greatest noise of training to the least.
COMPARED = {
    "Euler, linspace (source)": (EulerDiscreteScheduler, LINSPACE),
    "Euler, trailing": (EulerDiscreteScheduler, TRAILING),
    "Euler, Karras": (EulerDiscreteScheduler, KARRAS),
    "Euler, exponential": (EulerDiscreteScheduler, {"use_exponential_sigmas": True}),
    "DPM-Solver++(2M), trailing": (DPMSolverMultistepScheduler, TRAILING),
    "DPM-Solver++(2M), Lu": (DPMSolverMultistepScheduler, {"use_lu_lambdas": True}),
    "Heun, Karras": (HeunDiscreteScheduler, KARRAS),
    "UniPC, trailing": (UniPCMultistepScheduler, TRAILING),
    "UniPC, Karras": (UniPCMultistepScheduler, KARRAS),
    "spectral, trailing": (SPECTRAL, TRAILING),
    "spectral, trailing, 2nd order": (SPECTRAL, {**TRAILING, **SECOND}),
    "spectral, own grid": (SPECTRAL, SPECTRAL_GRID),
    "spectral, own grid, 2nd order": (SPECTRAL, {**SPECTRAL_GRID, **SECOND}),
    # Controls. One clock for all frequencies, which is TrigFlow's Euler, and DPM-Solver++ at the same noise levels.
    "scalar S, trailing": (ScalarClock, TRAILING),
    "scalar S, trailing, 2nd order": (ScalarClock, {**TRAILING, **SECOND}),
    "scalar S, spectral's grid": (ScalarClock, SPECTRAL_GRID),
    "scalar S, spectral's grid, 2nd order": (ScalarClock, {**SPECTRAL_GRID, **SECOND}),
    "DPM-Solver++(2M), spectral's grid": (DPMOnSpectralGrid, {}),
}


def compared_scheduler(name: str, config: dict, spectrum: dict) -> SchedulerMixin:
    """A sampler of the table, with the noise schedule and prediction type of `config`."""
    scheduler, arguments = COMPARED[name]
    if scheduler is DPMOnSpectralGrid:
        return configure(scheduler, {**config, "_spectrum": spectrum})
    if issubclass(scheduler, SPECTRAL):
        arguments = {**arguments, "spectrum": spectrum}
    return configure(scheduler, config, **arguments)


def steps_for(name: str, evaluations: int) -> int:
    """Steps of a sampler that take at most so many network evaluations: Heun takes two a step, but one in the last."""
    return (evaluations + 1) // 2 if COMPARED[name][0] is HeunDiscreteScheduler else evaluations


def joined(values: list[float], digits: int) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)
