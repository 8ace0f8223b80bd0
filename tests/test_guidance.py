"""Guiders against plain formulas on the network's own predictions."""

import json
import math

import pytest
import torch
from components import make_pipeline, sample, tiny_transformer
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
)
from diffusers.hooks import LayerSkipConfig

from freqgate_dit.guidance import BandGuidance, InformationGuidance, WeakModelGuidance


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


@pytest.mark.parametrize("kind", ["auto", "skip_layer", "perturbed_attention"])
def test_guiders_that_leave_out_layers(variant, kind):
    """Their other prediction is that of the model without a block, or with one whose tokens attend to themselves."""
    pipe = make_pipeline(tiny_transformer(variant, num_layers=3))
    model, weaker = pipe.transformer, tiny_transformer(variant, num_layers=3)
    if kind == "perturbed_attention":
        weaker.transformer_blocks[1].attn.processor = lambda attn, tokens, *_: attn.to_out(attn.to_v(tokens))
        skip = LayerSkipConfig([1], skip_attention=False, skip_attention_scores=True, skip_ff=False)
        guider = PerturbedAttentionGuidance(
            3.0,
            perturbed_guidance_scale=2.0,
            perturbed_guidance_config=skip,
            perturbed_guidance_start=0.0,
            perturbed_guidance_stop=1.0,
        )
    else:
        del weaker.transformer_blocks[1]
        skip = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0, "skip_layer_guidance_scale": 2.0}
        guider = {
            "auto": lambda: AutoGuidance(3.0, auto_guidance_config=LayerSkipConfig([1])),
            "skip_layer": lambda: SkipLayerGuidance(3.0, skip_layer_config=LayerSkipConfig([1]), **skip),
        }[kind]()
    before = sample(pipe, "cat")
    # diffusers' two begin after the step that `start` names.
    guided, latents, timestep = predictions(pipe, 1, 4, ["cat", "cat"], guider=guider)
    assert torch.equal(sample(pipe, "cat"), before)
    cond, null = (network(model, latents, timestep, label) for label in (0, 3))
    if kind == "auto":
        weak = network(weaker, latents, timestep, 3)
        expected = weak + 3 * (cond - weak)
    else:
        expected = null + 3 * (cond - null) + 2 * (cond - network(weaker, latents, timestep, 0))
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)
    assert (expected - null - 3 * (cond - null)).abs().max() > 0.01


def test_a_guider_that_fails_leaves_the_network_as_it_was(pipe):
    before = sample(pipe, "cat")
    skips = [LayerSkipConfig([1]), LayerSkipConfig([99])]
    with pytest.raises(ValueError, match="99"):
        sample(pipe, "cat", guider=AutoGuidance(3.0, auto_guidance_config=skips))
    assert torch.equal(sample(pipe, "cat"), before)


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
    weak.patch_embed = None  # it fails half-way
    with pytest.raises(TypeError):
        sample(pipe, "cat", guider=WeakModelGuidance(weak))
    assert torch.equal(sample(pipe, "cat", guidance_scale=1), before)


def test_weak_model_guidance_is_refused_where_the_weak_model_is_not_asked(pipe, weak, monkeypatch):
    """As by the pipeline files of repositories that an earlier version has saved."""
    monkeypatch.delattr(WeakModelGuidance, "network_of_pass")
    with pytest.raises(ValueError, match="weaker model"):
        sample(pipe, "cat", guider=WeakModelGuidance(weak))


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


# -- by band ----------------------------------------------------------------------------------------------------------


def of_band(x, low, high):
    """The part of `x (B, C, 8, 8)` with frequencies in [low, high) cycles per image, in float64."""
    result = torch.zeros_like(x, dtype=torch.float64)
    for u in range(8):
        for v in range(8):
            if not low <= math.hypot(u, v) / 2 < high:
                continue
            rows, columns = ([math.cos(math.pi * k * (i + 0.5) / 8) for i in range(8)] for k in (u, v))
            image = torch.tensor(rows, dtype=torch.float64)[:, None] * torch.tensor(columns, dtype=torch.float64)
            result += (x * image).sum(dim=(2, 3), keepdim=True) * image / image.square().sum()
    return result


def test_band_guidance(pipe):
    guider = BandGuidance(guidance_scales=[0.5, 2.0, 4.0], edges=[1.0, 2.5])
    guided, latents, timestep = predictions(pipe, 1, 3, ["cat", "cat"], guider=guider)
    cond, uncond = (network(pipe.transformer, latents, timestep, label).double() for label in (0, 3))
    shift = cond - uncond
    expected = uncond + 0.5 * of_band(shift, 0, 1) + 2 * of_band(shift, 1, 2.5) + 4 * of_band(shift, 2.5, 99)
    torch.testing.assert_close(guided.double(), expected, rtol=1e-4, atol=1e-4)


def test_equal_scales_are_plain_guidance(pipe):
    alone = sample(pipe, ["cat", "dog"], guider=ClassifierFreeGuidance(guidance_scale=3.0))
    guider = BandGuidance(guidance_scales=[3.0, 3.0], edges=[2.0])
    assert torch.equal(sample(pipe, ["cat", "dog"], guider=guider), alone)
    nearly = BandGuidance(guidance_scales=[3.0, 3.0000002], edges=[2.0])  # goes through the transform
    torch.testing.assert_close(sample(pipe, ["cat", "dog"], guider=nearly), alone, rtol=1e-3, atol=1e-3)


def test_guiders_are_saved_and_loaded(pipe, tmp_path):
    BandGuidance(guidance_scales=[2.0, 3.0], edges=[1.5], intervals=[(0.0, 0.5), (0.5, 1.0)]).save_pretrained(tmp_path)
    loaded = BandGuidance.from_pretrained(tmp_path)
    given = BandGuidance(guidance_scales=[2.0, 3.0], edges=[1.5], intervals=[(0.0, 0.5), (0.5, 1.0)])
    assert torch.equal(sample(pipe, "cat", guider=loaded), sample(pipe, "cat", guider=given))


def test_bands_are_guided_in_their_intervals(pipe):
    """In 4 steps: none, the low band, both, the high band."""
    batches = []
    hook = pipe.transformer.register_forward_pre_hook(lambda module, args: batches.append(args[1]))
    guider = BandGuidance(guidance_scales=[2.0, 3.0], edges=[1.5], intervals=[(0.25, 0.75), (0.5, 1.0)])
    sample(pipe, "cat", num_inference_steps=4, guider=guider)
    hook.remove()
    assert len(batches) == 1 + 2 + 2 + 2  # a pass is saved where nothing is guided
    guided, latents, timestep = predictions(pipe, 3, 4, ["cat", "cat"], guider=guider)
    cond, uncond = (network(pipe.transformer, latents, timestep, label).double() for label in (0, 3))
    expected = cond + 2 * of_band(cond - uncond, 1.5, 99)
    torch.testing.assert_close(guided.double(), expected, rtol=1e-4, atol=1e-4)


def test_band_guidance_at_1_is_the_model_alone(pipe):
    alone = sample(pipe, ["cat", "dog"], guidance_scale=1)
    for guider in (
        BandGuidance(guidance_scales=[1.0, 1.0], edges=[2.0]),
        BandGuidance(guidance_scales=[5.0, 9.0], edges=[2.0], enabled=False),
    ):
        assert torch.equal(sample(pipe, ["cat", "dog"], guider=guider), alone)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([2.0], [1.0]), "`edges`.*makes 2 bands, but `guidance_scales`.*has 1"),
        (([2.0, 3.0], [0.0]), r"`edges` \(\[0.0\]\) must ascend and be above 0"),
        (([2.0, 3.0, 4.0], [2.0, 1.0]), "must ascend"),
        (([2.0, 3.0], [1.0], [(0, 1)]), "`intervals`.*has 1 entries for 2 bands"),
        (([2.0, 3.0], [1.0], [(0, 1), (0.5, 0.25)]), r"`intervals` has \(0.5, 0.25\)"),
    ],
)
def test_bands_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        BandGuidance(**dict(zip(("guidance_scales", "edges", "intervals"), arguments)))


DENSITY = [[0.0, 0.0], [1.0, -0.5], [4.0, 2.0], [0.5, 1.0]]


@pytest.mark.parametrize("timestep, weights", [(100, [1, 1]), (400, [1.5, 1]), (740.5, [3, 2]), (999, [1.25, 1.5])])
def test_information_guidance_follows_the_density(timestep, weights):
    guider = InformationGuidance(guidance_scale=3.0, density=DENSITY, edges=[2.0])
    guider.set_state(step=0, num_inference_steps=4, timestep=torch.tensor(timestep))
    assert guider.weights() == weights
    assert guider.num_conditions == (1 if weights == [1, 1] else 2)


def test_flat_information_is_plain_guidance(pipe):
    alone = sample(pipe, ["cat", "dog"], guider=ClassifierFreeGuidance(guidance_scale=3.0))
    flat = InformationGuidance(guidance_scale=3.0, density=[[0.2, 0.2]] * 10, edges=[2.0])
    assert torch.equal(sample(pipe, ["cat", "dog"], guider=flat), alone)
    assert torch.equal(sample(pipe, ["cat", "dog"], guider=flat.new()), alone)


def write_validation(path, table, timesteps=1000):
    measured = {"num_train_timesteps": timesteps, "bands": ["0-1", "1-2", "2-4"], "information_table": table}
    path.write_text("{}\n" + json.dumps({"step": 2, "raw": {**measured, "information_table": None}, "ema": measured}))
    return path


def test_information_of_a_run_becomes_a_density_over_log_snr(tmp_path, pipe):
    log_snr = torch.logit(pipe.scheduler.alphas_cumprod.double())[[0, 500, 999]]
    widths = (log_snr[:-1] - log_snr[1:]).tolist()
    # Densities 1, 2, 0 and 0.5, 4, 1 nats per unit of log-SNR.
    table = [[1 * widths[0], 2 * widths[0], None], [0.5 * widths[1], 4 * widths[1], 1 * widths[1]]]
    guider = InformationGuidance.from_validation(write_validation(tmp_path / "v", table), pipe.scheduler, 5.0)
    assert guider.edges == [1.0, 2.0]
    torch.testing.assert_close(torch.tensor(guider.shape), torch.tensor([[0.25, 0.5, 0], [0.125, 1, 0.25]]))
    assert sample(pipe, "cat", guider=guider).isfinite().all()


def test_information_that_makes_no_sense(tmp_path, pipe):
    with pytest.raises(ValueError, match=r"`density` has rows of \[3\] values.*2 bands"):
        InformationGuidance(guidance_scale=2.0, density=[[1.0, 2.0, 3.0]], edges=[1.0])
    with pytest.raises(ValueError, match="`density` has a largest value of 0.0"):
        InformationGuidance(guidance_scale=2.0, density=[[0.0, 0.0]], edges=[1.0])
    with pytest.raises(ValueError, match="trained without a null condition"):
        InformationGuidance.from_validation(write_validation(tmp_path / "v", None), pipe.scheduler, 2.0)
    path = write_validation(tmp_path / "v", [[1.0] * 3], timesteps=500)
    with pytest.raises(ValueError, match="`scheduler` has 1000 training timesteps.*500"):
        InformationGuidance.from_validation(path, pipe.scheduler, 2.0)
