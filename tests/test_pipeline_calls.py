"""A call of the pipeline among others: in threads, in its own callback, stopped or changed on the way, with caches."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
import torch
from components import TEXT_DIM, euler, make_pipeline, sample, spectral, tiny_transformer, tiny_vae_kl
from diffusers import (
    AdaptiveProjectedGuidance,
    DDIMScheduler,
    DEISMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback


@pytest.fixture
def pipe():
    return make_pipeline(scheduler=spectral(timestep_spacing="trailing"))


# -- side by side -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [None, EulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler])
def test_one_pipeline_serves_many_threads(pipe, scheduler):
    """Calls of different lengths, labels and guidance, 8 threads with 5 each, are to the bit those one by one."""
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    guider = AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5)  # it remembers the last step

    def call(index: int):
        guidance = {"guider": guider} if index % 5 == 0 else {"guidance_scale": 1.0 + index % 3}
        return sample(pipe, index % 3, seed=index, num_inference_steps=2 + index % 4, **guidance)

    expected = [call(index) for index in range(40)]
    with ThreadPoolExecutor(8) as threads:
        for one, other in zip(threads.map(call, range(40)), expected, strict=True):
            assert torch.equal(one, other)


def test_an_autoencoder_that_computes_wider_for_a_while_serves_many_threads():
    vae = tiny_vae_kl(force_upcast=True).half()
    pipe = make_pipeline(vae=vae)
    latents = sample(pipe, [0, 1, 2])

    def decode(index: int):
        return pipe.decode(latents)

    with ThreadPoolExecutor(4) as threads:
        assert all(torch.equal(one, decode(0)) for one in threads.map(decode, range(20)))
    assert vae.dtype == torch.float16


def test_a_call_in_a_callback_leaves_the_outer_one_alone(pipe):
    inner = []

    def callback(pipeline, step, timestep, tensors):
        inner.append(sample(pipeline, "dog", num_inference_steps=5, guidance_scale=1.0))
        inner.append(sample(pipe, "dog", num_inference_steps=5, guidance_scale=1.0))

    assert torch.equal(sample(pipe, "cat", callback_on_step_end=callback), sample(pipe, "cat"))
    assert all(torch.equal(one, inner[0]) for one in inner) and len(inner) == 6
    assert torch.equal(inner[0], sample(pipe, "dog", num_inference_steps=5, guidance_scale=1.0))


# -- what diffusers' pipelines tell their callbacks, and take from them -----------------------------------------------


def test_a_callback_sees_the_state_of_its_call(pipe):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((pipeline.num_timesteps, pipeline.guidance_scale, pipeline.interrupt, pipe.num_timesteps))
        assert pipeline.current_timestep == timestep == pipe.current_timestep
        assert pipeline.scheduler.step_index == step + 1

    sample(pipe, "cat", guidance_scale=3.0, callback_on_step_end=callback)
    assert seen == [(3, 3.0, False, 3)] * 3


def test_a_callback_stops_its_call(pipe):
    steps = []

    def callback(pipeline, step, timestep, tensors):
        steps.append(tensors["latents"])
        pipeline._interrupt = step == 1

    whole = sample(pipe, "cat", num_inference_steps=5)
    result = sample(pipe, "cat", num_inference_steps=5, callback_on_step_end=callback)
    assert len(steps) == 2 and torch.equal(result, steps[1]) and not torch.equal(result, whole)
    assert torch.equal(sample(pipe, "cat", num_inference_steps=5), whole)  # the next one is not stopped


def test_a_call_is_stopped_from_another_thread(pipe):
    began, stopped, steps = Event(), Event(), []

    def callback(pipeline, step, timestep, tensors):
        steps.append(step)
        began.set()
        stopped.wait()

    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(sample, pipe, "cat", num_inference_steps=5, callback_on_step_end=callback)
        began.wait()
        pipe._interrupt = True
        assert pipe.interrupt
        stopped.set()
        call.result()
    assert steps == [0] and not pipe.interrupt
    pipe._interrupt = True  # there is nothing to stop
    sample(pipe, "cat", callback_on_step_end=callback)
    assert steps == [0, 0, 1, 2]


def test_a_callback_changes_the_guidance_scale(pipe):
    def callback(pipeline, step, timestep, tensors):
        pipeline._guidance_scale += 1.0
        return tensors

    last = []

    def record(pipeline, step, timestep, tensors):
        last.append(tensors["noise_pred"])
        return callback(pipeline, step, timestep, {})

    inputs = {"guidance_scale": 2.0, "num_inference_steps": 4}
    changed = sample(
        pipe, "cat", callback_on_step_end=record, callback_on_step_end_tensor_inputs=["noise_pred"], **inputs
    )
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps == 6.0
    # The first step is that of a call of the first scale, the second one is not.
    plain = []

    def keep(pipeline, step, timestep, tensors):
        plain.append(tensors["noise_pred"])

    sample(pipe, "cat", callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["noise_pred"], **inputs)
    assert torch.equal(last[0], plain[0]) and not torch.equal(last[1], plain[1])
    assert torch.equal(changed, sample(pipe, "cat", callback_on_step_end=callback, **inputs))


@pytest.mark.parametrize("labels", [["cat"], ["cat", "dog"]])
def test_diffusers_callback_cuts_guidance_off(pipe, labels):
    """From the step after the cut on it is the interval of guidance that ends there."""
    cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    inputs = {"guidance_scale": 3.0, "num_inference_steps": 4}
    expected = sample(pipe, labels, guidance_interval=(0, 0.5), **inputs)
    assert torch.equal(sample(pipe, labels, callback_on_step_end=cut, **inputs), expected)


@pytest.mark.parametrize("interval", [[0, 1], (0, 1), np.array([0, 1])], ids=str)
def test_a_guider_takes_the_whole_interval_in_every_form(pipe, interval):
    expected = sample(pipe, "cat", guider=AdaptiveProjectedGuidance(3.0))
    assert torch.equal(
        sample(pipe, "cat", guider=AdaptiveProjectedGuidance(3.0), guidance_interval=interval), expected
    )


def test_a_callback_cannot_change_the_scale_of_a_guider(pipe):
    guider = AdaptiveProjectedGuidance(3.0)
    cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    with pytest.raises(ValueError, match=r"`_guidance_scale` \(0.0\).* guider"):
        sample(pipe, "cat", guider=guider, callback_on_step_end=cut)


def test_a_callback_cannot_guide_what_cannot_be_guided():
    def callback(pipeline, step, timestep, tensors):
        pipeline._guidance_scale = 2.0

    with pytest.raises(ValueError, match=r"`guidance_scale` \(2.0\) needs a null condition"):
        sample(make_pipeline(class_dropout_prob=0), "cat", callback_on_step_end=callback)
    text = make_pipeline(tiny_transformer(num_classes=None, pooled_projection_dim=TEXT_DIM))
    with pytest.raises(ValueError, match="needs `negative_pooled_prompt_embeds`"):
        sample(text, pooled_prompt_embeds=torch.ones(1, TEXT_DIM), guidance_scale=1.0, callback_on_step_end=callback)


# -- steps of one's own -----------------------------------------------------------------------------------------------


def test_steps_of_ones_own(pipe):
    scheduler = pipe.scheduler
    scheduler.set_timesteps(3)
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append(float(timestep))

    by_count = sample(pipe, "cat")
    by_level = sample(pipe, "cat", sigmas=scheduler.sigmas.tolist(), callback_on_step_end=callback)
    torch.testing.assert_close(by_level, by_count, rtol=1e-4, atol=1e-4)
    assert len(seen) == 3
    pipe.scheduler = EulerDiscreteScheduler.from_config(scheduler.config)
    seen.clear()
    by_list = sample(pipe, "cat", timesteps=[900, 500, 100, 10], callback_on_step_end=callback)
    assert seen == [900, 500, 100, 10]
    for same in (torch.tensor([900, 500, 100, 10]), (900.0, 500.0, 100.0, 10.0)):
        assert torch.equal(sample(pipe, "cat", timesteps=same, num_inference_steps=None), by_list)


@pytest.mark.parametrize("number", [torch.tensor(2.0), np.float32(2)])
def test_numbers_of_other_libraries_are_numbers(pipe, number):
    steps = {"num_inference_steps": np.int64(4)}
    expected = sample(pipe, "cat", guidance_scale=2.0, guidance_interval=(0, 0.5), **steps)
    given = sample(pipe, "cat", guidance_scale=number, guidance_interval=np.array([0, 0.5]), **steps)
    assert torch.equal(given, expected)


def test_steps_that_a_scheduler_does_not_take(pipe):
    with pytest.raises(ValueError, match="`timesteps` and `sigmas` were both given"):
        sample(pipe, "cat", timesteps=[900], sigmas=[1.0])
    for wrong in ([], 900, ["900"], [float("nan")], [100, 900], [500, 500], [1000], [-1]):
        with pytest.raises(ValueError, match="`timesteps` .* falling numbers from 0 to below 1000"):
            sample(pipe, "cat", timesteps=wrong)
    for wrong in ([5.0], [1.0, 10.0, 0.0], [1.0, -1.0], [0.0, 0.0]):
        with pytest.raises(ValueError, match="`sigmas` .* 2 or more falling numbers"):
            sample(pipe, "cat", sigmas=wrong)
    pipe.scheduler = DEISMultistepScheduler.from_config(euler().config)
    with pytest.raises(ValueError, match="`sigmas` was given, but DEISMultistepScheduler"):
        sample(pipe, "cat", sigmas=[1.0, 0.0])
    pipe.scheduler = DDIMScheduler.from_config(euler().config)
    with pytest.raises(ValueError, match=r"`num_inference_steps` \(1001\) is nothing that DDIMScheduler can take"):
        sample(pipe, "cat", num_inference_steps=1001)


def test_a_step_replaced_in_the_scheduler_is_refused(pipe):
    """Its copies would go on calling the one of the original."""
    pipe.scheduler.step = pipe.scheduler.step
    with pytest.raises(ValueError, match="`scheduler.step` was replaced"):
        sample(pipe, "cat")


# -- inputs of another type -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_inference_steps": 2.5},
        {"num_inference_steps": "4"},
        {"num_inference_steps": True},
        {"num_images_per_label": 1.0},
        {"guidance_scale": "2"},
        {"guidance_scale": float("nan")},
        {"guidance_interval": 0.5},
        {"guidance_interval": (0.1, 0.2, 0.3)},
        {"guidance_interval": ("a", "b")},
        {"width": 8.0},
        {"generator": 3},
        {"generator": [3]},
        {"latents": [[0.0]]},
        {"seed": 2**64},
        {"seed": [1.5]},
        {"seed": 1.5},
        {"seed": "1"},
        {"guider": 3},
        {"callback_on_step_end": 3},
        {"callback_on_step_end_tensor_inputs": None},
        {"callback_on_step_end_tensor_inputs": "latents"},
        {"prompt": 5},
        {"negative_prompt": ["blur", None]},
        {"pooled_prompt_embeds": [[0.0]]},
        {"negative_pooled_prompt_embeds": [0.0]},
    ],
    ids=str,
)
def test_a_wrong_type_or_range_is_named(pipe, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"`{name}`"):
        pipe("cat", **{"num_inference_steps": 1, **wrong})
