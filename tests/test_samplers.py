"""Samplers by name keep the noise schedule and nothing of the grid that was, whatever they come from."""

import inspect
import itertools

import pytest
import torch
from components import SPECTRUM, make_pipeline, sample
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

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
    assert torch.equal(sigmas(there), sigmas(expected)) and torch.equal(there.timesteps, expected.timesteps)
    assert torch.equal(there.alphas_cumprod, TRAINING.alphas_cumprod) and there.config._spectrum == SPECTRUM
    name = type(there).__name__
    assert describe_sampler(name, there.config) == describe_sampler(name, expected.config)
    for option in inspect.signature(type(there)).parameters:
        assert there.config.get(option, there.config.get(f"_{option}")) == (
            expected.config.get(option, expected.config.get(f"_{option}"))
        ), option


def test_nothing_of_another_grid_is_kept():
    grid = {"interpolation_type": "log_linear", "sigma_min": 0.1, "final_sigmas_type": "sigma_min", "steps_offset": 1}
    config = EulerDiscreteScheduler(timestep_spacing="leading", use_karras_sigmas=True, **grid).config
    for name in SAMPLERS:
        ours, expected = (make_sampler(name, c, SPECTRUM) for c in (config, EulerDiscreteScheduler().config))
        assert torch.equal(sigmas(ours), sigmas(expected)) and torch.equal(ours.timesteps, expected.timesteps)


def test_betas_of_zero_terminal_snr_are_kept_or_refused():
    config = EulerDiscreteScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction").config
    assert sigmas(make_sampler("spectral", config, SPECTRUM))[0] == pytest.approx(4096, rel=1e-3)
    with pytest.raises(ValueError, match="HeunDiscreteScheduler cannot sample betas that were rescaled"):
        make_sampler("heun", config)


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
    # What other schedulers have left in a config is not this one's.
    ddim = DDIMScheduler.from_config(make_sampler("dpm", TRAINING.config).config)
    assert describe_sampler("DDIMScheduler", ddim.config) == "DDIMScheduler, linspace spacing"


def test_errors():
    with pytest.raises(ValueError, match=r"`sampler` \(spectre\) must be one of spectral, .*did you mean spectral\?"):
        make_sampler("spectre", TRAINING.config)
    for name in ("spectral", "spectral_euler"):
        with pytest.raises(ValueError, match=rf"`sampler` \({name}\) needs the spectrum .*Choose dpm, .* or source"):
            make_sampler(name, TRAINING.config)
