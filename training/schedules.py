"""Schedules: the learning rate over steps, the noise over timesteps, and what is spread over a run."""

import math
from functools import partial

import torch
from diffusers import DDPMScheduler
from diffusers.schedulers import SchedulerMixin

from freqgate_dit.band_weights import BandWeights, decoder_weights, octave_weights
from freqgate_dit.ladder import priced_switches
from freqgate_dit.losses import DiffusionObjective
from freqgate_dit.pipelines.pipeline_freqgate_dit import decode_from_latents
from freqgate_dit.samplers import make_sampler
from freqgate_dit.spectral import SpectrumStatistics
from freqgate_dit.training.config import ObjectiveConfig, TrainConfig
from freqgate_dit.training.latents import CachedLatents


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of `step` (from 0), in optimiser steps: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    decay = 1 - progress if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * decay


def is_spread(step: int, count: int, total_steps: int) -> bool:
    """Whether `step` (from 1) is one of `count` steps spread evenly over the run, the last one among them."""
    return step * count // total_steps > (step - 1) * count // total_steps


def make_scheduler(config: ObjectiveConfig) -> DDPMScheduler:
    """The scheduler that adds noise in training."""
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    return DDPMScheduler(**{name: getattr(config, name) for name in names})


def make_sampling_scheduler(
    name: str, training: DDPMScheduler, spectrum: dict | None, switch_sigmas: list[float] | None = None
) -> SchedulerMixin:
    """The sampler of that name (`freqgate_dit.samplers`) on the noise of `training`, for data with that spectrum and a
    model that changes its grid at `switch_sigmas`."""
    config = {**training.config, **({"_switch_sigmas": switch_sigmas} if switch_sigmas else {})}
    sampling = make_sampler(name, config, spectrum)
    if not torch.equal(training.alphas_cumprod, sampling.alphas_cumprod):
        raise RuntimeError(
            f"DDPMScheduler and {type(sampling).__name__} disagree on the noise schedule; please report it."
        )
    return sampling


@torch.no_grad()
def tell_spectrum(model, statistics: SpectrumStatistics, objective: DiffusionObjective, grid_price: float | None):
    """Tell a model that asks for it the spectrum of its data, and by it where to switch between its views."""
    known = statistics.mean, statistics.power, objective.scheduler.alphas_cumprod
    if known[2].min() <= 0:
        betas = objective.scheduler.config
        raise ValueError(
            f"`beta_end` ({betas.beta_end:g}) with `beta_schedule` {betas.beta_schedule!r} ends in pure noise, which "
            "has no log-SNR for the gates of `preconditioning` and `band_clock` to go by: lower `beta_end`."
        )
    model.set_spectrum(*known)
    if grid_price is not None:
        density = objective.timestep_distribution().diff()
        model.set_spectrum(*known, priced_switches(model, density, grid_price))


def make_band_weights(
    config: ObjectiveConfig, scheduler: DDPMScheduler, power: torch.Tensor, data: CachedLatents, vae
) -> BandWeights | None:
    """The weights that `config` names, for data of that `power (C, H, W)`; the same whenever a run is resumed."""
    if config.band_weights is None:
        return None
    if config.band_weights == "bump":
        return BandWeights(power=power, alphas_cumprod=scheduler.alphas_cumprod, blind=config.band_blind)
    if config.band_weights == "octave":
        return BandWeights(octave_weights(*power.shape[1:])[None], blind=config.band_blind)
    if vae is None:
        raise ValueError(
            "`band_weights` is 'decoder', but there is no `vae`: a model of pixels has no decoder to ask. Choose "
            "octave or bump."
        )
    some = torch.arange(min(16, len(data)))
    latents, _ = data.draw(some, torch.zeros(len(some)), None)
    weights = decoder_weights(partial(decode_from_latents, vae), latents.to(vae.device))
    return BandWeights(weights, blind=config.band_blind)


def make_objective(config: ObjectiveConfig, scheduler: DDPMScheduler) -> DiffusionObjective:
    """The loss of training, with the noise of `scheduler`."""
    return DiffusionObjective(
        scheduler,
        config.timestep_sampling,
        config.logit_mean,
        config.logit_std,
        config.min_snr_gamma,
        config.spectral_weight,
    )
