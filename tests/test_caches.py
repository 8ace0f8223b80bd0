"""diffusers' caches, which reuse parts of earlier steps, with the pipeline."""

import pytest
import torch
from components import make_pipeline, sample, spectral, tiny_transformer
from diffusers import (
    ClassifierFreeGuidance,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from test_freq_grid import with_views


def first_block(pipe, reuses: bool):
    return FirstBlockCacheConfig(threshold=1e9 if reuses else 0.0)


def taylor_seer(pipe, reuses: bool):
    return TaylorSeerCacheConfig(cache_interval=4 if reuses else 1, disable_cache_before_step=1)


def mag(pipe, reuses: bool):
    threshold, ratios = 1e9 if reuses else 0.0, torch.linspace(0.9, 0.99, 8)
    return MagCacheConfig(threshold, max_skip_steps=2, retention_ratio=0.0, num_inference_steps=8, mag_ratios=ratios)


def pyramid(pipe, reuses: bool):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2 if reuses else 1,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


CACHES = [first_block, taylor_seer, mag, pyramid]


def eight_steps(pipe, **kwargs) -> torch.Tensor:
    return sample(pipe, ["cat", "dog"], num_inference_steps=8, **kwargs)


@pytest.mark.parametrize("scheduler", [None, EulerDiscreteScheduler, DDIMScheduler])
@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_leaves_no_trace(cache, views, scheduler):
    """One that reuses nothing changes nothing; one that does gives the same in every call; and off, it is off. It also
    works where tokens or passes become fewer on the way: with views, and with an interval of guidance."""
    transformer = with_views(num_layers=3) if views > 1 else tiny_transformer(num_layers=3)
    pipe = make_pipeline(transformer, spectral())
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    guided = [{}, {"guidance_scale": 1.0}, {"guidance_interval": (0.25, 0.75)}]
    if cache is mag:
        if views > 1:
            pytest.skip("refused: test_mag_cache_is_refused_where_it_would_begin_anew")
        guided.pop()
    plain = [eight_steps(pipe, **kwargs) for kwargs in guided]
    transformer.enable_cache(cache(pipe, reuses=False))
    for kwargs, expected in zip(guided, plain):
        assert torch.equal(eight_steps(pipe, **kwargs), expected)
    transformer.disable_cache()
    transformer.enable_cache(cache(pipe, reuses=True))
    for kwargs, without in zip(guided, plain):
        result = eight_steps(pipe, **kwargs)
        assert result.isfinite().all() and not torch.equal(result, without)

        def stop(pipeline, step, timestep, tensors):
            if step == 3:
                raise KeyError

        with pytest.raises(KeyError):  # a call that ends on the way leaves nothing for the next one either
            eight_steps(pipe, callback_on_step_end=stop, **kwargs)
        assert torch.equal(eight_steps(pipe, **kwargs), result)
    transformer.disable_cache()
    assert torch.equal(eight_steps(pipe), plain[0])


@pytest.mark.parametrize("cache", [first_block, taylor_seer, mag])
def test_a_cache_keeps_the_passes_of_a_guider_apart(cache):
    pipe = make_pipeline(tiny_transformer(num_layers=3), spectral())
    pipe.transformer.enable_cache(cache(pipe, reuses=True))
    guided = eight_steps(pipe, guider=ClassifierFreeGuidance(guidance_scale=2.0))
    torch.testing.assert_close(guided, eight_steps(pipe, guidance_scale=2.0), rtol=1e-3, atol=1e-3)


def test_mag_cache_is_refused_where_it_would_begin_anew():
    """It counts the steps of a call, by which it takes its ratios."""
    views = make_pipeline(with_views(num_layers=3), spectral())
    plain = make_pipeline(tiny_transformer(num_layers=3), spectral())
    for pipe, kwargs in ((views, {}), (plain, {"guidance_interval": (0.25, 0.75)})):
        pipe.transformer.enable_cache(mag(pipe, reuses=True))
        with pytest.raises(ValueError, match="MagCache"):
            eight_steps(pipe, **kwargs)


def test_a_cache_serves_one_call_at_a_time():
    pipe = make_pipeline(tiny_transformer(num_layers=3), spectral())
    pipe.transformer.enable_cache(first_block(pipe, reuses=True))
    expected = eight_steps(pipe)

    def callback(pipeline, step, timestep, tensors):
        with pytest.raises(ValueError, match="one call at a time"):
            eight_steps(pipe)

    assert torch.equal(eight_steps(pipe, callback_on_step_end=callback), expected)


def test_caches_that_cannot_work_are_refused():
    pipe = make_pipeline(scheduler=spectral())
    for config in (FasterCacheConfig(), TextKVCacheConfig()):
        with pytest.raises(ValueError, match=type(config).__name__.removesuffix("Config")):
            pipe.transformer.enable_cache(config)
    pipe.transformer.enable_cache(pyramid(pipe, reuses=True))
    with pytest.raises(ValueError, match="`guider` .* pyramid attention broadcast"):
        eight_steps(pipe, guider=ClassifierFreeGuidance())
