"""Guiders against plain formulas on the network's own predictions."""

import pytest
import torch
from components import make_pipeline, sample, tiny_transformer
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance, ClassifierFreeZeroStarGuidance

from freqgate_dit.guidance import WeakModelGuidance


CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def pipe():
    return make_pipeline(tiny_transformer("freq_gate"))


@pytest.fixture
def weak():
    return tiny_transformer("freq_gate", seed=1)


def predictions(pipe, step, steps, *labels, **kwargs):
    """What a call of `steps` steps guides with at `step`, and what the network saw there: latents, timestep."""
    seen, guided = [], []

    def keep(pipe, index, timestep, tensors):
        guided.append(tensors["noise_pred"])
        return {}

    hook = pipe.transformer.register_forward_pre_hook(lambda module, args: seen.append(args))
    options = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": ["noise_pred"]}
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    sample(pipe, *labels, num_inference_steps=steps, latents=latents, **options, **kwargs)
    hook.remove()
    timesteps = sorted({float(args[1]) for args in seen}, reverse=True)
    latents = next(args[0] for args in seen if float(args[1]) == timesteps[step])
    return guided[step], latents[:2], timesteps[step]


@torch.no_grad()
def network(model, latents, timestep, label):
    labels = None if label is None else torch.full((len(latents),), label)
    return model(latents, timestep, **({} if labels is None else {"class_labels": labels})).sample


def test_adaptive_projected_guidance(pipe):
    """Sadat et al. 2024, arXiv 2410.02416: the part of the difference along the prediction is scaled by eta."""
    guider = AdaptiveProjectedGuidance(
        guidance_scale=3.0,
        eta=0.25,
        adaptive_projected_guidance_rescale=0.0,
        adaptive_projected_guidance_momentum=None,
    )
    guided, latents, timestep = predictions(pipe, 1, 3, ["cat", "cat"], guider=guider)
    cond, uncond = (network(pipe.transformer, latents, timestep, label).double() for label in (0, 3))
    for one in range(2):
        difference, along = cond[one] - uncond[one], cond[one] / cond[one].norm()
        parallel = (difference * along).sum() * along
        expected = uncond[one] + 3.0 * (difference - parallel + 0.25 * parallel)
        torch.testing.assert_close(guided[one].double(), expected, **CLOSE)


def test_zero_star_guidance(pipe):
    """Fan et al. 2025, arXiv 2503.18886: the null prediction is scaled to fit best; the first step predicts zero."""
    guider = ClassifierFreeZeroStarGuidance(guidance_scale=3.0, zero_init_steps=1)
    guided, _, _ = predictions(pipe, 0, 3, ["dog", "dog"], guider=guider)
    assert torch.equal(guided, torch.zeros_like(guided))
    guided, latents, timestep = predictions(pipe, 1, 3, ["dog", "dog"], guider=guider)
    cond, uncond = (network(pipe.transformer, latents, timestep, label) for label in (1, 3))
    for one in range(2):
        best = (cond[one] * uncond[one]).sum() / (uncond[one] ** 2).sum()
        expected = best * uncond[one] + 3.0 * (cond[one] - best * uncond[one])
        torch.testing.assert_close(guided[one], expected, **CLOSE)


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.5])
def test_weak_model_guidance(scale, pipe, weak):
    guider = WeakModelGuidance(weak, guidance_scale=scale)
    guided, latents, timestep = predictions(pipe, 2, 4, ["cat", "cat"], guider=guider)
    strong, other = (network(model, latents, timestep, 0) for model in (pipe.transformer, weak))
    torch.testing.assert_close(guided, other + scale * (strong - other), **CLOSE)


def test_weak_model_guidance_at_1_or_by_the_same_model_is_the_model_alone(pipe, weak):
    alone = sample(pipe, ["cat", "dog"], guidance_scale=1)
    assert torch.equal(sample(pipe, ["cat", "dog"], guider=WeakModelGuidance(weak, guidance_scale=1.0)), alone)
    same = tiny_transformer("freq_gate")
    torch.testing.assert_close(sample(pipe, ["cat", "dog"], guider=WeakModelGuidance(same)), alone, **CLOSE)


def test_weak_model_guidance_acts_between_start_and_stop(pipe, weak):
    calls = []
    forward, weak.forward = weak.forward, lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    sample(pipe, "cat", num_inference_steps=8, guider=WeakModelGuidance(weak, start=0.25, stop=0.5))
    assert len(calls) == 2


def test_the_model_is_itself_again_afterwards(pipe, weak):
    before = sample(pipe, "cat", guidance_scale=1)
    sample(pipe, "cat", guider=WeakModelGuidance(weak))
    assert "forward" not in vars(pipe.transformer)
    weak.patch_embed = None  # it fails half-way
    with pytest.raises(TypeError):
        sample(pipe, "cat", guider=WeakModelGuidance(weak))
    assert torch.equal(sample(pipe, "cat", guidance_scale=1), before)


def test_weak_model_guidance_needs_no_null_condition():
    pipe = make_pipeline(tiny_transformer("adaln_zero"), class_dropout_prob=0.0)
    guider = WeakModelGuidance(tiny_transformer("adaln_zero", seed=1))
    assert sample(pipe, "cat", guider=guider).isfinite().all()
    with pytest.raises(ValueError, match="needs a null condition"):
        sample(pipe, "cat", guider=ClassifierFreeGuidance())
    unconditional = {"num_classes": None}
    pipe = make_pipeline(tiny_transformer("adaln_zero", **unconditional))
    weak = tiny_transformer("adaln_zero", seed=1, **unconditional)
    guided, latents, timestep = predictions(
        pipe, 1, 3, num_images_per_label=2, guider=WeakModelGuidance(weak, guidance_scale=3.0)
    )
    strong, other = (network(model, latents, timestep, None) for model in (pipe.transformer, weak))
    torch.testing.assert_close(guided, other + 3.0 * (strong - other), **CLOSE)
