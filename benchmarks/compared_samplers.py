"""The samplers that the benchmarks compare, and tables of them."""

from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import SchedulerMixin

from freqgate_dit.samplers import configure
from freqgate_dit.scheduling_spectral_euler import SpectralEulerDiscreteScheduler, spectral_power


TRAILING, LINSPACE = {"timestep_spacing": "trailing"}, {"timestep_spacing": "linspace"}
KARRAS, OWN_GRID, SECOND = {"use_karras_sigmas": True}, {"use_spectral_sigmas": True}, {"spectral_order": 2}
SPECTRAL = SpectralEulerDiscreteScheduler
# Name -> class and arguments. Grids that are not of timesteps run from the greatest noise of training to the least.
SAMPLERS = {
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
    "spectral, own grid": (SPECTRAL, OWN_GRID),
    "spectral, own grid, 2nd order": (SPECTRAL, {**OWN_GRID, **SECOND}),
    # TrigFlow's Euler: what is left of the method with one clock for all frequencies. The control.
    "scalar S, trailing": (SPECTRAL, TRAILING),
    "scalar S, trailing, 2nd order": (SPECTRAL, {**TRAILING, **SECOND}),
    "scalar S, own grid": (SPECTRAL, OWN_GRID),
    "scalar S, own grid, 2nd order": (SPECTRAL, {**OWN_GRID, **SECOND}),
}


def make_scheduler(name: str, config: dict, spectrum: dict) -> SchedulerMixin:
    """A sampler of the table, with the noise schedule and prediction type of `config`."""
    scheduler, arguments = SAMPLERS[name]
    if scheduler is SPECTRAL:
        is_control = name.startswith("scalar S")
        arguments = {**arguments, "spectrum": same_power_for_all(spectrum) if is_control else spectrum}
    return configure(scheduler, config, **arguments)


def same_power_for_all(spectrum: dict) -> dict:
    """The spectrum with the mean power of each channel at all frequencies."""
    power = spectral_power(spectrum, spectrum["height"], spectrum["width"]).mean((1, 2))
    return {**spectrum, "power": [[value] for value in power.tolist()]}


def steps_for(name: str, evaluations: int) -> int:
    """Steps of a sampler that take at most so many network evaluations: Heun takes two a step, but one in the last."""
    return (evaluations + 1) // 2 if SAMPLERS[name][0] is HeunDiscreteScheduler else evaluations


def print_table(title: str, columns: list[str], rows: dict[str, list[str]]):
    print(f"\n{title}\n\n| sampler | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


def joined(values: list[float], digits: int) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)
