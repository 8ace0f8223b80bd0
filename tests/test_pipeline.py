import math
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from components import (
    LABELS,
    TEXT_DIM,
    VAES,
    euler,
    make_pipeline,
    sample,
    tiny_transformer,
    tiny_vae_kl,
)
from diffusers import (
    AutoencoderKL,
    ClassifierFreeGuidance,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin

from freqgate_dit import FreqGateDiTPipeline
from freqgate_dit.pipelines.pipeline_freqgate_dit import (
    NEED_DISTANCE,
    SOURCE_GUIDANCE_SCALE,
    decode_from_latents,
    encode_to_latent_moments,
)


ROOT = Path(__file__).resolve().parent.parent
# Rounding differs between batch sizes; a guided random network amplifies it over the steps.
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture
def pipe() -> FreqGateDiTPipeline:
    return make_pipeline()


@pytest.fixture
def unconditional_pipe() -> FreqGateDiTPipeline:
    return make_pipeline(tiny_transformer(num_classes=None))


class Calls:
    """What a module was called with, through a hook."""

    def __init__(self, module):
        self.calls = []
        module.register_forward_hook(
            lambda module, args, kwargs, output: self.calls.append((args, kwargs)), with_kwargs=True
        )

    @property
    def batch_sizes(self):
        return [args[0].shape[0] for args, _ in self.calls]

    @property
    def timesteps(self):
        return [args[1] for args, _ in self.calls]


# -- the sampler, on data where the exact answer is known -------------------------------------------------------------


class GaussianDenoiser(ModelMixin, ConfigMixin):
    """The exact noise prediction for independent Gaussian pixels; each channel has its own mean and variance.

    For x_t = sqrt(a) x_0 + sqrt(1 - a) eps, E[eps | x_t] = sqrt(1 - a) (x_t - sqrt(a) mean) / (a variance + 1 - a).
    At a fractional timestep, sigma = sqrt((1 - a) / a) is interpolated as Euler's scheduler does.
    """

    @register_to_config
    def __init__(
        self,
        mean=(2.0, -1.0, 0.0, 0.5),
        variance=(0.01, 0.25, 1.0, 9.0),
        in_channels=4,
        sample_size=8,
        patch_size=1,
        num_classes=None,
        pooled_projection_dim=None,
    ):
        super().__init__()
        alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float32), 0).double()
        self.sigmas = (((1 - alphas) / alphas) ** 0.5).numpy()
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # for `dtype` and `device`

    def forward(self, hidden_states, timestep):
        assert timestep.dtype in (torch.float32, torch.int64)
        sigma = float(np.interp(float(timestep), np.arange(1000), self.sigmas))
        alpha = 1 / (1 + sigma**2)
        mean, variance = (
            torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)
            for values in (self.config.mean, self.config.variance)
        )
        eps = math.sqrt(1 - alpha) * (hidden_states.double() - math.sqrt(alpha) * mean)
        return Transformer2DModelOutput(sample=(eps / (alpha * variance + 1 - alpha)).to(hidden_states.dtype))


def euler_closed_form(sigmas, mean, variance):
    """Gain and mean of Euler on a Gaussian: dx/dsigma = sigma (x - mean) / (variance + sigma^2), sigma by sigma.

    Each step multiplies x - mean by 1 + (sigma' - sigma) sigma / (variance + sigma^2); x starts at sigma_max noise.
    """
    gain = np.ones_like(variance)
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        gain *= 1 + (following - sigma) * sigma / (variance + sigma**2)
    return gain * sigmas[0], mean * (1 - gain)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("steps", [5, 20])
def test_euler_on_gaussian_data_is_its_closed_form(spacing, steps):
    model = GaussianDenoiser()
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    result = sample(
        make_pipeline(model, euler(spacing)), num_images_per_label=3, latents=noise, num_inference_steps=steps
    )

    # The grid and its sigmas from the definitions, not from the scheduler.
    timesteps = np.linspace(999, 0, steps) if spacing == "linspace" else np.arange(1000, 0, -1000 / steps).round() - 1
    sigmas = np.append(np.interp(timesteps, np.arange(1000), model.sigmas), 0.0)
    gain, mean = euler_closed_form(sigmas, np.array(model.config.mean), np.array(model.config.variance))
    gain, mean = (torch.from_numpy(values).view(1, -1, 1, 1) for values in (gain, mean))
    torch.testing.assert_close(result.double(), gain * noise.double() + mean, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
def test_euler_with_many_steps_gives_the_data_distribution(spacing):
    model = GaussianDenoiser()
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    run = {"num_images_per_label": 2, "num_inference_steps": 500}
    # The sampler is affine in the noise, so two runs give its gain and its mean.
    result = sample(make_pipeline(model, euler(spacing)), latents=noise, **run)
    mean = sample(make_pipeline(model, euler(spacing)), latents=torch.zeros_like(noise), **run)
    expected_mean = torch.tensor(model.config.mean).view(1, -1, 1, 1).expand_as(mean)
    expected_std = torch.tensor(model.config.variance).sqrt().view(1, -1, 1, 1).expand_as(mean)
    torch.testing.assert_close(mean, expected_mean, rtol=0.02, atol=0.02)
    torch.testing.assert_close((result - mean) / noise, expected_std, rtol=0.03, atol=0.02)


def test_fewer_euler_steps_lose_variance():
    gains = []
    for steps in (10, 20, 100):
        pipe = make_pipeline(GaussianDenoiser(mean=(0.0,) * 4, variance=(0.01, 0.25, 1.0, 9.0)))
        gains.append(sample(pipe, latents=torch.ones(1, 4, 8, 8), num_inference_steps=steps)[0, :, 0, 0])
    true = torch.tensor([0.1, 0.5, 1.0, 3.0])
    assert (gains[0] < gains[1]).all() and (gains[1] < gains[2]).all() and (gains[2] < true).all()


DETERMINISTIC = [DPMSolverMultistepScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler, DDIMScheduler]


@pytest.mark.parametrize("scheduler", DETERMINISTIC)
def test_other_schedulers_give_the_gaussian_data_too(scheduler):
    pipe = make_pipeline(GaussianDenoiser())
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    result = sample(pipe, latents=noise, num_inference_steps=200)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1) for values in (pipe.transformer.config.mean, [0.1, 0.5, 1.0, 3.0])
    )
    torch.testing.assert_close(result, mean + std * noise, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("scheduler", [*DETERMINISTIC, EulerAncestralDiscreteScheduler, DDPMScheduler])
def test_schedulers_swap_and_swap_back(pipe, scheduler):
    before = sample(pipe, "cat")
    config = pipe.scheduler.config
    pipe.scheduler = scheduler.from_config(config)
    swapped = sample(pipe, "cat")
    assert swapped.isfinite().all() and not torch.equal(swapped, before)
    assert torch.equal(swapped, sample(pipe, "cat"))  # the noise of the steps is a function of the seed, too
    pipe.scheduler = type(euler()).from_config(pipe.scheduler.config)
    assert torch.equal(sample(pipe, "cat"), before)


@pytest.mark.parametrize("scheduler", [EulerAncestralDiscreteScheduler, DDPMScheduler])
def test_stochastic_schedulers_give_each_image_noise_of_its_own(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    batch = sample(pipe, ["cat", "dog"], seed=5, guidance_scale=1)
    torch.testing.assert_close(sample(pipe, "dog", seed=6, guidance_scale=1), batch[1:], **CLOSE)


@pytest.mark.parametrize("name", NEED_DISTANCE)
def test_solvers_that_divide_by_the_distance_of_noise_levels_are_finite_or_refuse(pipe, name):
    for options, steps in (({}, 50), ({"timestep_spacing": "linspace"}, 1000), ({}, 1001)):
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
        try:
            found = sample(pipe, 0, num_inference_steps=steps, guidance_scale=1)
        except ValueError as error:
            assert steps > 50 and f"`num_inference_steps` ({steps}) gives two steps one noise level" in str(error)
        else:
            assert np.isfinite(np.asarray(found)).all() and steps < 1001


@pytest.mark.parametrize("cause", ["weights", "guidance"])
def test_images_that_come_out_black_are_told(pipe, cause, caplog):
    if cause == "weights":
        with torch.no_grad():
            pipe.transformer.proj_out.weight[0] = torch.nan
    pipe([0, 1], num_inference_steps=2, guidance_scale=1e38 if cause == "guidance" else 1.0, output_type="pt")
    (told,) = [record.getMessage() for record in caplog.records]
    assert "2 of 2 images have NaN or infinity" in told and "float32" in told and "`guidance_scale`" in told


@pytest.mark.parametrize("scheduler", [*DETERMINISTIC, EulerAncestralDiscreteScheduler, DDPMScheduler])
@pytest.mark.parametrize("reload", [False, True])
def test_a_swapped_scheduler_keeps_the_noise_schedule(pipe, scheduler, reload, tmp_path):
    if reload:
        pipe.save_pretrained(tmp_path)
        pipe = FreqGateDiTPipeline.from_pretrained(tmp_path)
    swapped = scheduler.from_config(pipe.scheduler.config)
    assert torch.equal(swapped.alphas_cumprod, pipe.scheduler.alphas_cumprod)
    assert swapped.config.timestep_spacing == "trailing" and swapped.config.clip_sample is False


def test_a_scheduler_that_clips_still_does():
    assert make_pipeline(scheduler=DDPMScheduler(clip_sample=True)).scheduler.config.clip_sample is True


def test_scheduler_of_another_prediction_type_is_refused(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    with pytest.raises(ValueError, match="'v_prediction'.*'epsilon'"):
        sample(pipe, "cat")


def test_flow_matching_schedulers_are_refused(pipe):
    for flow in (
        FlowMatchEulerDiscreteScheduler(),
        UniPCMultistepScheduler.from_config(pipe.scheduler.config, use_flow_sigmas=True),
    ):
        pipe.scheduler = flow
        with pytest.raises(ValueError, match=f"{type(flow).__name__}.*flow matching.*EulerDiscreteScheduler"):
            sample(pipe, "cat")
        with pytest.raises(ValueError, match="flow matching"):
            sample(make_pipeline(scheduler=flow), "cat")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("EDMEulerScheduler", "EDM's noise"),
        ("EDMDPMSolverMultistepScheduler", "EDM's noise"),
        ("CMStochasticIterativeScheduler", "EDM's noise"),
        ("DDIMInverseScheduler", "noise alone"),
        ("DPMSolverMultistepInverseScheduler", "noise alone"),
        ("RePaintScheduler", "noise alone"),
    ],
)
def test_schedulers_for_something_else_are_refused_by_name(pipe, name, why):
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=rf"\({name}\).*{why}"):
        sample(pipe, "cat")


def test_model_sees_the_float_timesteps_of_the_scheduler(pipe):
    pipe.scheduler = euler("linspace")
    pipe.to(torch.bfloat16)
    calls = Calls(pipe.transformer)
    sample(pipe, "cat", num_inference_steps=50)
    timesteps = torch.stack(calls.timesteps)
    assert timesteps.dtype == torch.float32 and calls.calls[0][0][0].dtype == torch.bfloat16
    torch.testing.assert_close(timesteps, torch.linspace(999, 0, 50), rtol=0, atol=1e-3)


def test_latents_stay_float32_in_a_bfloat16_pipeline(pipe):
    exact = sample(pipe, "cat", guidance_scale=1)
    pipe.to(torch.bfloat16)
    rounded = sample(pipe, "cat", guidance_scale=1)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.1


# -- guidance ---------------------------------------------------------------------------------------------------------


def conditional_euler(pipe, noise, label, steps) -> torch.Tensor:
    """Euler written out, with the bare transformer: x + (x - x0) / sigma * (sigma' - sigma) = x + eps dsigma."""
    scheduler = euler("trailing")
    scheduler.set_timesteps(steps)
    x = noise * scheduler.sigmas[0]
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            sigma, following = scheduler.sigmas[i], scheduler.sigmas[i + 1]
            labels = torch.full((len(noise),), label)
            x = x + pipe.transformer(x / (sigma**2 + 1) ** 0.5, t, class_labels=labels).sample * (following - sigma)
    return x


def test_scale_one_is_the_conditional_model_in_one_pass(pipe):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    calls = Calls(pipe.transformer)
    result = sample(pipe, [1, 1], latents=noise, guidance_scale=1)
    assert calls.batch_sizes == [2, 2, 2]
    torch.testing.assert_close(result, conditional_euler(pipe, noise, 1, steps=3), rtol=1e-4, atol=1e-4)


def test_scale_zero_is_the_null_condition(pipe):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    calls = Calls(pipe.transformer)
    result = sample(pipe, [0, 2], latents=noise, guidance_scale=0)
    assert calls.batch_sizes == [4, 4, 4]
    assert calls.calls[0][1]["class_labels"].tolist() == [0, 2, 3, 3]  # the null id is `num_classes`
    torch.testing.assert_close(result, conditional_euler(pipe, noise, len(LABELS), steps=3), **CLOSE)


def test_guidance_is_linear_in_the_scale_on_all_channels(pipe):
    uncond, cond, guided = (sample(pipe, "cat", guidance_scale=s, num_inference_steps=1) for s in (0, 1, 3.5))
    torch.testing.assert_close(guided, uncond + 3.5 * (cond - uncond), **CLOSE)
    assert ((cond - uncond).abs().amax(dim=(0, 2, 3)) > 1).all()  # every channel moves
    assert not torch.allclose(guided[:, 3], cond[:, 3], atol=1)  # and the last one is guided


def test_default_scale(pipe):
    assert torch.equal(sample(pipe, "cat"), sample(pipe, "cat", guidance_scale=SOURCE_GUIDANCE_SCALE))
    pipe = make_pipeline(class_dropout_prob=0.0)
    assert torch.equal(sample(pipe, "cat"), sample(pipe, "cat", guidance_scale=1))


def test_what_may_have_no_null_condition_is_guided_only_if_asked(caplog):
    """The probability of dropout is no component, so that a copy by components does not know it."""
    original = make_pipeline(class_dropout_prob=0)
    copied = FreqGateDiTPipeline(**original.components)
    copied.set_progress_bar_config(disable=True)
    assert torch.equal(sample(copied, 0), sample(original, 0)) and not caplog.messages
    sample(copied, 0, guidance_scale=2.0)
    assert any("`class_dropout_prob`" in message for message in caplog.messages)
    with pytest.raises(ValueError, match="null condition"):
        sample(FreqGateDiTPipeline.from_pipe(original), 0, guidance_scale=2.0)


def test_guidance_interval(pipe):
    calls = Calls(pipe.transformer)
    run = {"num_inference_steps": 8, "guidance_scale": 3}
    sample(pipe, "cat", guidance_interval=(0.25, 0.75), **run)
    assert calls.batch_sizes == [1, 1, 2, 2, 2, 2, 1, 1]
    assert torch.equal(sample(pipe, "cat", guidance_interval=(0, 1), **run), sample(pipe, "cat", **run))
    conditional = sample(pipe, "cat", num_inference_steps=8, guidance_scale=1)
    assert torch.equal(sample(pipe, "cat", guidance_interval=(0.5, 0.5), **run), conditional)
    for interval in ((0.5, 0.2), (-0.1, 1), (0, 8)):
        with pytest.raises(ValueError, match="guidance_interval"):
            sample(pipe, "cat", guidance_interval=interval, **run)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_diffusers_guider_equals_ours(pipe, scale):
    ours = sample(pipe, ["cat", "dog"], guidance_scale=scale)
    torch.testing.assert_close(
        sample(pipe, ["cat", "dog"], guider=ClassifierFreeGuidance(guidance_scale=scale)), ours, **CLOSE
    )


def test_diffusers_guider_interval_and_text(text_pipe):
    run = {"prompt": ["cat", "dog"], "num_inference_steps": 8}
    ours = sample(text_pipe, guidance_scale=3, guidance_interval=(0.25, 0.75), **run)
    guider = ClassifierFreeGuidance(guidance_scale=3, start=0.25, stop=0.75)
    torch.testing.assert_close(sample(text_pipe, guider=guider, **run), ours, **CLOSE)


def test_guider_and_scale_or_interval_are_refused_together(pipe):
    for name, value in {"guidance_scale": 2.0, "guidance_interval": (0.0, 0.5)}.items():
        with pytest.raises(ValueError, match=f"`guider` and `{name}`"):
            sample(pipe, "cat", guider=ClassifierFreeGuidance(), **{name: value})


@pytest.mark.parametrize("kind", ["no dropout", "unconditional"])
def test_guidance_without_a_null_condition_is_refused(kind, unconditional_pipe):
    pipe, labels = (make_pipeline(class_dropout_prob=0.0), ["cat"])
    if kind == "unconditional":
        pipe, labels = unconditional_pipe, []
    assert sample(pipe, *labels, guidance_scale=1).isfinite().all()
    assert torch.equal(sample(pipe, *labels), sample(pipe, *labels, guidance_scale=1))
    with pytest.raises(ValueError, match=r"`guidance_scale` \(2.0\) needs a null condition"):
        sample(pipe, *labels, guidance_scale=2.0)
    with pytest.raises(ValueError, match="`guider` needs a null condition"):
        sample(pipe, *labels, guider=ClassifierFreeGuidance())


# -- conditions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels", ["dog", 1, ["dog"], (1,), torch.tensor(1), torch.tensor([1]), np.int64(1), np.array([1]), [np.int64(1)]]
)
def test_a_label_in_every_form_gives_the_same_image(pipe, labels):
    assert pipe.get_label_ids(labels) == [1]
    assert torch.equal(sample(pipe, labels), sample(pipe, "dog"))
    assert not torch.allclose(sample(pipe, labels), sample(pipe, "cat"), atol=0.1)


def test_names_count_in_any_unicode_form():
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for known, given in ((composed, decomposed), (decomposed, composed)):
        assert make_pipeline(id2label={0: "cat", 1: known, 2: "3"}).get_label_ids([given, "3"]) == [1, 2]


def test_names_and_ids_mix(pipe):
    assert pipe.get_label_ids(["wild", 0, "dog"]) == [2, 0, 1]


def test_images_of_a_label_follow_each_other(pipe):
    result = sample(pipe, ["cat", "wild"], num_images_per_label=2, seed=[7, 8, 9, 10])
    assert torch.equal(result, sample(pipe, ["cat", "cat", "wild", "wild"], seed=7))


def test_unknown_label_lists_labels_and_the_nearest(pipe):
    with pytest.raises(ValueError, match="'dgo'.*Did you mean 'dog'.*'cat', 'dog', 'wild'"):
        sample(pipe, "dgo")
    with pytest.raises(ValueError, match="'zebra'") as error:
        sample(pipe, ["cat", "zebra"])
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize("label", [3, -1, True, 1.0, [0, 3], torch.tensor([1.0]), torch.tensor([True]), [None]])
def test_bad_label_ids(pipe, label):
    with pytest.raises(ValueError, match="`class_labels` has .*from 0 to 2"):
        sample(pipe, label)


def test_labels_without_names():
    pipe = make_pipeline(id2label=None)
    assert sample(pipe, 2).isfinite().all()
    with pytest.raises(ValueError, match="'cat'.*no names.*0 to 2"):
        sample(pipe, "cat")
    with pytest.raises(ValueError, match="`class_labels` is missing.*0 to 2"):
        sample(pipe)


def test_missing_and_empty_conditions(pipe, text_pipe):
    with pytest.raises(ValueError, match="`class_labels` is missing.*'cat', 'dog', 'wild'"):
        sample(pipe)
    with pytest.raises(ValueError, match="got no condition: pass `prompt`"):
        sample(text_pipe)
    with pytest.raises(ValueError, match="`class_labels` is empty"):
        sample(pipe, [])
    with pytest.raises(ValueError, match="`prompt` is empty"):
        sample(text_pipe, prompt=[])


def test_conditions_that_the_model_cannot_take(pipe, text_pipe, unconditional_pipe):
    with pytest.raises(ValueError, match="`prompt` .*needs a text encoder.*'cat', 'dog', 'wild'"):
        sample(pipe, prompt="a cat")
    with pytest.raises(ValueError, match="`class_labels` and `prompt` were both given"):
        sample(pipe, "cat", prompt="a cat")
    with pytest.raises(ValueError, match=r"conditioned on text and got `class_labels` \('cat'\): pass `prompt`"):
        sample(text_pipe, "cat")
    with pytest.raises(ValueError, match="`class_labels` was given, but this model is unconditional"):
        sample(unconditional_pipe, 0)
    with pytest.raises(ValueError, match="`class_labels` is empty"):
        sample(pipe, torch.tensor([], dtype=torch.long))
    null = torch.zeros(1, TEXT_DIM)
    for ignored in ({"negative_prompt": "blur"}, {"negative_pooled_prompt_embeds": null}):
        with pytest.raises(ValueError, match="was given, but this model is not conditioned on text"):
            sample(pipe, "cat", **ignored)
    with pytest.raises(ValueError, match="`negative_prompt` and `negative_pooled_prompt_embeds` were both given"):
        sample(text_pipe, prompt="cat", negative_prompt="dog", negative_pooled_prompt_embeds=null)
    with pytest.raises(ValueError, match="`negative_prompt` .*one for each prompt"):
        sample(text_pipe, prompt=["cat"] * 3, negative_prompt=["dog"] * 2)


def test_unconditional(unconditional_pipe):
    calls = Calls(unconditional_pipe.transformer)
    assert sample(unconditional_pipe, num_images_per_label=3).shape == (3, 4, 8, 8)
    assert calls.batch_sizes == [3, 3, 3] and not calls.calls[0][1]


# -- noise ------------------------------------------------------------------------------------------------------------


def test_image_of_a_seed_does_not_depend_on_the_batch(pipe):
    batch = sample(pipe, ["cat"] * 4, seed=10)
    assert torch.equal(batch, sample(pipe, ["cat"] * 4, seed=10))
    assert torch.equal(batch, sample(pipe, ["cat"] * 4, seed=[10, 11, 12, 13]))
    assert torch.equal(batch, sample(pipe, ["cat"] * 4, seed=np.arange(10, 14)))
    for i in range(4):
        torch.testing.assert_close(sample(pipe, "cat", seed=10 + i), batch[i : i + 1], **CLOSE)
    assert not torch.allclose(batch[0], batch[1], atol=0.1)
    torch.testing.assert_close(sample(pipe, ["cat"] * 2, seed=[12, 10]), batch[[2, 0]], **CLOSE)


def test_generators(pipe):
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    batch = sample(pipe, ["cat", "dog"], seed=[3, 4])
    assert torch.equal(sample(pipe, ["cat", "dog"], generator=generators(3, 4)), batch)
    assert torch.equal(sample(pipe, "cat", generator=generators(3)[0]), sample(pipe, "cat", seed=3))
    with pytest.raises(ValueError, match="1 generators for 2 images"):
        sample(pipe, ["cat", "dog"], generator=generators(3))
    with pytest.raises(ValueError, match="`seed` .*and `generator`"):
        sample(pipe, "cat", seed=0, generator=generators(3))
    with pytest.raises(ValueError, match="3 seeds for 2 images"):
        sample(pipe, ["cat", "dog"], seed=[1, 2, 3])
    with pytest.raises(ValueError, match=r"`seed` \(1.5\)"):
        sample(pipe, "cat", seed=1.5)


def test_without_a_seed_torchs_global_one_counts(pipe):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = (sample(pipe, "cat", generator=None) for _ in range(2))
        torch.manual_seed(0)
        assert torch.equal(sample(pipe, "cat", generator=None), first)
    assert not torch.equal(first, second)


def test_latents_reproduce_a_seed(pipe):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(21))
    kept = noise.clone()
    assert torch.equal(sample(pipe, "cat", latents=noise), sample(pipe, "cat", seed=21))
    assert torch.equal(noise, kept)
    with pytest.raises(ValueError, match=r"\(1, 4, 8, 8\); expected unit noise of shape \(2, 4, 8, 8\)"):
        sample(pipe, ["cat", "dog"], latents=noise)


@pytest.mark.parametrize("name", ["num_images_per_label", "num_inference_steps"])
def test_counts_below_one(pipe, name):
    with pytest.raises(ValueError, match=rf"`{name}` \(0\)"):
        sample(pipe, "cat", **{name: 0})


# -- sizes and autoencoders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vae", [None, *VAES])
def test_non_square_sizes(vae):
    factor = 1 if vae is None else 2
    pipe = make_pipeline(tiny_transformer(in_channels=4 if vae else 3), vae=VAES[vae]() if vae else None)
    image = pipe("cat", num_inference_steps=1, height=8 * factor, width=12 * factor, seed=0).images[0]
    assert image.size == (12 * factor, 8 * factor)
    assert sample(pipe, "cat", height=8 * factor, width=12 * factor).shape[-2:] == (8, 12)
    assert pipe("cat", num_inference_steps=1).images[0].size == (8 * factor, 8 * factor)
    height = 9 * factor
    with pytest.raises(ValueError, match=rf"`height` \({height}\) .*multiple of {2 * factor} .*such as") as error:
        pipe("cat", height=height, width=8 * factor)
    nearest = int(re.findall(r"such as (\d+)\.", str(error.value))[0])
    assert abs(nearest - height) == factor
    assert pipe("cat", num_inference_steps=1, height=nearest).images[0].size[1] == nearest
    for wrong in (0, 8.0, "8"):
        with pytest.raises(ValueError, match=rf"`height` \({wrong!r}\)"):
            pipe("cat", height=wrong)


@pytest.mark.parametrize("vae", VAES)
@pytest.mark.parametrize("shift", [None, 0.7])
@torch.no_grad()
def test_encoding_and_decoding_invert_each_others_scaling(vae, shift):
    vae = VAES[vae](scaling_factor=0.13025, shift_factor=shift)
    images = torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = encode_to_latent_moments(vae, images)
    encoded = vae.encode(images)
    if isinstance(vae, AutoencoderKL):
        raw = encoded.latent_dist.mean
        torch.testing.assert_close(std, encoded.latent_dist.std * 0.13025)
    else:
        raw = encoded.latents
        assert std is None
    torch.testing.assert_close(mean, (raw - (shift or 0)) * 0.13025)
    torch.testing.assert_close(decode_from_latents(vae, mean), vae.decode(raw).sample, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_half_precision_autoencoder_computes_in_float32_and_is_put_back():
    half = tiny_vae_kl(force_upcast=True).half()
    full = tiny_vae_kl()
    full.load_state_dict({key: value.float() for key, value in half.state_dict().items()})
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = encode_to_latent_moments(half, images)
    expected_mean, expected_std = encode_to_latent_moments(full, images)
    assert torch.equal(mean, expected_mean) and torch.equal(std, expected_std)
    assert torch.equal(decode_from_latents(half, mean), decode_from_latents(full, mean))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    with pytest.raises(RuntimeError):  # three channels where four are needed
        decode_from_latents(half, mean[:, :3])
    assert half.dtype == torch.float16


@pytest.mark.parametrize("vae", [None, *VAES])
def test_output_types_are_one_image(vae):
    pipe = make_pipeline(tiny_transformer(in_channels=4 if vae else 3), vae=VAES[vae]() if vae else None)
    run = {"class_labels": ["cat", "dog"], "num_inference_steps": 2, "seed": 0}
    latents = pipe(output_type="latent", **run).images
    pixels = latents if vae is None else decode_from_latents(pipe.vae, latents)
    pt = pipe(output_type="pt", **run).images
    torch.testing.assert_close(pt, (pixels / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)
    assert pt.shape == (2, 3, *(side * pipe.vae_scale_factor for side in (8, 8)))
    array = pipe(output_type="np", **run).images
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    for image, expected in zip(pipe(**run).images, array, strict=True):
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), (expected * 255).round().astype("uint8"))
    assert torch.equal(pipe(output_type="latent", return_dict=False, **run)[0], latents)
    with pytest.raises(ValueError, match="`output_type` \\('jpg'\\)"):
        pipe(output_type="jpg", **run)


# -- callback, progress -----------------------------------------------------------------------------------------------


def test_callback_sees_the_trajectory(pipe):
    seen, sigmas = [], []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, float(timestep), {key: value.clone() for key, value in tensors.items()}))
        sigmas.append(pipeline.scheduler.sigmas[step])

    names = ["latents", "noise_pred", "pred_original_sample"]
    result = sample(
        pipe, "cat", callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names, num_inference_steps=4
    )
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert [timestep for _, timestep, _ in seen] == [999, 749, 499, 249]
    assert all(list(tensors) == names for _, _, tensors in seen)
    assert torch.equal(result, sample(pipe, "cat", num_inference_steps=4))
    assert torch.equal(seen[-1][2]["latents"], result)
    # x_0 = x - sigma eps at every step, and the last step ends there.
    for i in range(1, 4):
        sigma, before, now = sigmas[i], seen[i - 1][2], seen[i][2]
        torch.testing.assert_close(now["pred_original_sample"], before["latents"] - sigma * now["noise_pred"])
    torch.testing.assert_close(seen[-1][2]["pred_original_sample"], result, rtol=1e-4, atol=1e-4)


def test_callback_may_replace_the_latents(pipe):
    def replace(pipeline, step, timestep, tensors):
        return {"latents": torch.full_like(tensors["latents"], 0.25)} if step == 2 else {}

    assert (sample(pipe, "cat", callback_on_step_end=replace) == 0.25).all()
    with pytest.raises(ValueError, match=r"\['x0'\]; choose from .*pred_original_sample"):
        sample(pipe, "cat", callback_on_step_end=replace, callback_on_step_end_tensor_inputs=["x0"])


def test_progress_bar_can_be_turned_off(pipe, capfd):
    sample(pipe, "cat")
    assert capfd.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    sample(pipe, "cat")
    assert "3/3" in capfd.readouterr().err


def test_names_of_classes_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"`id2label` names the ids \[0, 3\], but the transformer has 3 classes"):
        make_pipeline(id2label={0: "cat", 3: "null"})


def test_scheduler_with_other_betas_is_refused(pipe):
    pipe.scheduler = HeunDiscreteScheduler()
    with pytest.raises(ValueError, match=r"HeunDiscreteScheduler\) has other betas.*from_config"):
        sample(pipe, "cat")
