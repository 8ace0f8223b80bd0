"""Samplers by name: a scheduler with the noise levels that suit it, for any pipeline.

    pipe.scheduler = make_sampler("dpm", pipe.scheduler.config)

`benchmarks/samplers.py` measures them: how far each is from the accurate solution for a number of network evaluations.
"""

import difflib
import inspect
from typing import NamedTuple

import diffusers
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import SchedulerMixin

from freqgate_dit.scheduling_spectral_euler import OWN_ARGUMENTS, SpectralEulerDiscreteScheduler


class Sampler(NamedTuple):
    """A scheduler class, what it is called with besides the noise schedule, and what that is in words."""

    scheduler: type[SchedulerMixin]
    arguments: dict
    help: str


SAMPLERS = {
    "spectral": Sampler(
        SpectralEulerDiscreteScheduler,
        {"use_spectral_sigmas": True, "spectral_order": 2},
        "each frequency in its own clock, second order; needs the spectrum of the data, which the trainer keeps",
    ),
    "spectral_euler": Sampler(
        SpectralEulerDiscreteScheduler, {"timestep_spacing": "trailing"}, "the same, first order, trailing timesteps"
    ),
    "dpm": Sampler(DPMSolverMultistepScheduler, {"use_lu_lambdas": True}, "DPM-Solver++(2M), even in log-SNR"),
    "unipc": Sampler(UniPCMultistepScheduler, {"timestep_spacing": "trailing"}, "UniPC, trailing timesteps"),
    "heun": Sampler(
        HeunDiscreteScheduler, {"use_karras_sigmas": True}, "Heun, Karras' noise levels; two passes a step"
    ),
    "euler": Sampler(EulerDiscreteScheduler, {"timestep_spacing": "trailing"}, "Euler, trailing timesteps"),
    "source": Sampler(EulerDiscreteScheduler, {"timestep_spacing": "linspace"}, "Euler as in the source experiment"),
}


# Option of a scheduler -> its noise levels in words.
GRIDS = {
    "use_spectral_sigmas": "spectral",
    "use_karras_sigmas": "Karras'",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "Lu's",
}
# What else a grid of noise levels is made by; a scheduler's own defaults are taken for it.
OF_GRID = ("interpolation_type", "sigma_min", "sigma_max", "final_sigmas_type", "steps_offset")
# Likewise, with what is taken where nothing else is said.
PLAIN = {"timestep_spacing": "linspace", "spectral_order": 1}


def make_sampler(name: str, config: dict, spectrum: dict | None = None) -> SchedulerMixin:
    """The sampler of that name in `SAMPLERS`, with the noise schedule and prediction type of `config`.

    Args:
        config: of any scheduler of the family (Euler, DDPM, DPM-Solver++, ...).
        spectrum: of the training data, see [`SpectralEulerDiscreteScheduler`]; by default that in `config`. Kept by
            every sampler, so that one can change to "spectral" later.

    Raises:
        ValueError: for an unknown name, or for "spectral" without a spectrum.
    """
    if name not in SAMPLERS:
        close = difflib.get_close_matches(name, SAMPLERS, n=1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise ValueError(f"`sampler` ({name}) must be one of {', '.join(SAMPLERS)}{hint}")
    config = dict(config) if spectrum is None else {**config, "_spectrum": spectrum}
    if SAMPLERS[name].scheduler is SpectralEulerDiscreteScheduler and not config.get("_spectrum"):
        others = [other for other in SAMPLERS if SAMPLERS[other].scheduler is not SpectralEulerDiscreteScheduler]
        raise ValueError(
            f"`sampler` ({name}) needs the spectrum of the training data, and there is none: the pipeline was saved "
            f"without one, or all of its training images are alike. Choose {', '.join(others[:-1])} or {others[-1]}."
        )
    return configure(SAMPLERS[name].scheduler, config, **SAMPLERS[name].arguments)


def configure(scheduler: type[SchedulerMixin], config: dict, **arguments) -> SchedulerMixin:
    """A scheduler from the config of another one: its noise schedule, and nothing of its grid of noise levels.

    diffusers' `from_config` alone keeps the grid that was (Karras' levels, say), clips x0 to [-1, 1] where it comes
    from a `DDPMScheduler`, and loses what is marked as a default in `config`, as Heun's default betas are others.

    Raises:
        ValueError: if the class has no way to the noise schedule of `config`.
    """
    known = inspect.signature(scheduler).parameters
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        raise ValueError(
            f"{scheduler.__name__} cannot sample betas that were rescaled to zero terminal SNR: choose another one."
        )
    kept = {name: value for name, value in config.items() if not _is_of_grid(name.lstrip("_"))}
    kept |= {"_use_default_values": [], "clip_sample": False, "thresholding": False}
    grid = {name: False for name in known if name in GRIDS}
    grid |= {name: value for name, value in PLAIN.items() if name in known}
    return scheduler.from_config(kept, **{**grid, **arguments})


def _is_of_grid(name: str) -> bool:
    return name in GRIDS or name in PLAIN or name in OF_GRID


def describe_sampler(class_name: str, config: dict) -> str:
    """A scheduler in words: "SpectralEulerDiscreteScheduler, second order, spectral noise levels".

    A config keeps options of schedulers that it came from; only those that the class has say something.
    """
    is_spectral = class_name == SpectralEulerDiscreteScheduler.__name__
    scheduler = SpectralEulerDiscreteScheduler if is_spectral else getattr(diffusers, class_name, None)
    known = inspect.signature(scheduler).parameters if scheduler else ()
    value = {name: config.get(f"_{name}" if name in OWN_ARGUMENTS else name) for name in known}
    parts = [class_name]
    parts += ["second order"] if value.get("spectral_order") == 2 else []
    parts += [f"temperature {value['temperature']}"] if value.get("temperature") not in (None, 1) else []
    chosen = [label for option, label in GRIDS.items() if value.get(option)]
    if chosen:
        parts.append(f"{chosen[0]} noise levels")
    elif value.get("timestep_spacing"):
        parts.append(f"{value['timestep_spacing']} spacing")
    return ", ".join(parts)
