"""Samplers by name: a scheduler with the noise levels that suit it, for any pipeline.

    pipe.scheduler = make_sampler("dpm", pipe.scheduler.config)

`benchmarks/samplers.py` measures them: how far each is from the accurate solution for a number of network evaluations.
"""

import difflib
import inspect
from typing import NamedTuple

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
    "use_karras_sigmas": "Karras'",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "Lu's",
}

# Options that are no switch, and what they are where nothing else is said.
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
            f"`sampler` ({name}) needs the spectrum of the training data, which the trainer keeps with a pipeline; "
            f"here is none: pass `spectrum`, or choose one of {', '.join(others)}."
        )
    return configure(SAMPLERS[name].scheduler, config, **SAMPLERS[name].arguments)


def configure(scheduler: type[SchedulerMixin], config: dict, **arguments) -> SchedulerMixin:
    """A scheduler from the config of another one: its noise schedule, and nothing of its grid of noise levels.

    diffusers' `from_config` alone keeps the grid that was (Karras' levels, say), clips x0 to [-1, 1] where it comes
    from a `DDPMScheduler`, and loses what is marked as a default in `config`, as Heun's default betas are others.
    """
    kept = {name: value for name, value in config.items() if not _is_of_grid(name.lstrip("_"))}
    kept |= {"_use_default_values": [], "clip_sample": False, "thresholding": False}
    grid = {name: False for name in inspect.signature(scheduler).parameters if _is_of_grid(name)}
    grid |= {name: value for name, value in PLAIN.items() if name in grid}
    return scheduler.from_config(kept, **{**grid, **arguments})


def _is_of_grid(name: str) -> bool:
    return name in PLAIN or (name.startswith("use_") and name.endswith(("_sigmas", "_lambdas")))


def describe_sampler(class_name: str, config: dict) -> str:
    """A scheduler in words: "SpectralEulerDiscreteScheduler, second order, spectral noise levels"."""
    parts, grids = [class_name], {}
    if class_name == SpectralEulerDiscreteScheduler.__name__:
        own = {name: config.get(f"_{name}") for name in OWN_ARGUMENTS}
        parts += ["second order"] if own["spectral_order"] == 2 else []
        parts += [f"temperature {own['temperature']}"] if own["temperature"] != 1 else []
        grids = {"spectral": own["use_spectral_sigmas"]}
    grids |= {label: config.get(option) for option, label in GRIDS.items()}
    chosen = [label for label, is_on in grids.items() if is_on]
    if chosen:
        parts.append(f"{chosen[0]} noise levels")
    elif config.get("timestep_spacing"):
        parts.append(f"{config['timestep_spacing']} spacing")
    return ", ".join(parts)
