"""Samplers by name keep the noise schedule and nothing of the grid that was, whatever they come from."""

import itertools

import pytest
import torch
from components import SPECTRUM, make_pipeline, sample
from diffusers import DDPMScheduler, EulerDiscreteScheduler

from freqgate_dit.samplers import SAMPLERS, configure, describe_sampler, make_sampler


TRAINING = DDPMScheduler(beta_end=0.015, prediction_type="v_prediction")


def sigmas(scheduler):
    scheduler.set_timesteps(6)
    return scheduler.sigmas


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_from_the_scheduler_of_training(name):
    scheduler = make_sampler(name, TRAINING.config, SPECTRUM)
    assert type(scheduler) is SAMPLERS[name].scheduler
    assert torch.equal(scheduler.alphas_cumprod, TRAINING.alphas_cumprod)
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config._spectrum == SPECTRUM
    # DDPM's default would clip latents to [-1, 1].
    assert scheduler.config.get("clip_sample") is False and scheduler.config.get("thresholding") is False
    for option, value in SAMPLERS[name].arguments.items():
        assert scheduler.config.get(option, scheduler.config.get(f"_{option}")) == value


@pytest.mark.parametrize("first, second", list(itertools.permutations(SAMPLERS, 2)))
def test_a_sampler_from_another_one_is_the_same(first, second):
    expected = make_sampler(second, TRAINING.config, SPECTRUM)
    there = make_sampler(second, make_sampler(first, TRAINING.config, SPECTRUM).config)
    assert torch.equal(sigmas(there), sigmas(expected))
    assert describe_sampler("X", there.config) == describe_sampler("X", expected.config)


def test_the_source_samples_as_it_did():
    # `EulerDiscreteScheduler.from_config(DDPMScheduler().config)`, which falls back to "linspace".
    training = DDPMScheduler(beta_start=1e-4, beta_end=0.02)
    theirs = EulerDiscreteScheduler.from_config(training.config)
    ours = make_sampler("source", training.config)
    assert torch.equal(sigmas(ours), sigmas(theirs)) and torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.init_noise_sigma == theirs.init_noise_sigma


def test_defaults_of_the_config_are_kept():
    # `from_config` alone would take Heun's own betas for those that Euler has by default.
    config = EulerDiscreteScheduler().config
    heun = configure(SAMPLERS["heun"].scheduler, config, use_karras_sigmas=True)
    assert torch.equal(heun.alphas_cumprod, EulerDiscreteScheduler().alphas_cumprod)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_pipeline_samples_with_each(name):
    pipe = make_pipeline()
    pipe.scheduler = make_sampler(name, pipe.scheduler.config, SPECTRUM)
    latents = sample(pipe, "cat", guidance_scale=2.0)
    assert latents.shape == (1, 4, 8, 8) and latents.isfinite().all()


def test_descriptions():
    descriptions = {
        name: describe_sampler(type(scheduler).__name__, scheduler.config)
        for name in SAMPLERS
        for scheduler in [make_sampler(name, TRAINING.config, SPECTRUM)]
    }
    assert descriptions == {
        "spectral": "SpectralEulerDiscreteScheduler, second order, spectral noise levels",
        "spectral_euler": "SpectralEulerDiscreteScheduler, trailing spacing",
        "dpm": "DPMSolverMultistepScheduler, Lu's noise levels",
        "unipc": "UniPCMultistepScheduler, trailing spacing",
        "heun": "HeunDiscreteScheduler, Karras' noise levels",
        "euler": "EulerDiscreteScheduler, trailing spacing",
        "source": "EulerDiscreteScheduler, linspace spacing",
    }
    warm = make_sampler("spectral", {**TRAINING.config, "_temperature": 0.9}, SPECTRUM)
    assert "temperature 0.9" in describe_sampler("SpectralEulerDiscreteScheduler", warm.config)
    assert describe_sampler("EDMEulerScheduler", {}) == "EDMEulerScheduler"


def test_errors():
    with pytest.raises(ValueError, match=r"`sampler` \(spectre\) must be one of spectral, .*did you mean spectral\?"):
        make_sampler("spectre", TRAINING.config)
    for name in ("spectral", "spectral_euler"):
        with pytest.raises(ValueError, match=rf"`sampler` \({name}\) needs the spectrum .* choose one of dpm, "):
            make_sampler(name, TRAINING.config)
