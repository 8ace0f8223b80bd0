import math

import numpy as np
import pytest
import torch
from components import tiny_transformer
from diffusers import DDPMScheduler

from freqgate_dit.losses import (
    PREDICTION_TYPES,
    DiffusionObjective,
    drop_labels,
    min_snr_weight,
    prediction_target,
    sample_timesteps,
    signal_to_noise_ratio,
    spectral_magnitude_loss,
    stratified_uniform,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def ddpm(prediction_type: str = "epsilon", **kwargs) -> DDPMScheduler:
    return DDPMScheduler(prediction_type=prediction_type, **kwargs)


def batch(size: int = 5):
    """Clean sample, noise and timesteps, in float64."""
    generator = torch.Generator().manual_seed(0)
    sample, noise = torch.randn(2, size, 4, 6, 8, dtype=torch.float64, generator=generator)
    return sample, noise, torch.tensor([0, 10, 200, 600, 999])[:size]


def alpha_bar(timesteps: torch.Tensor) -> torch.Tensor:
    """Of the source's linear betas, from their definition; `(B, 1, 1, 1)`, float64."""
    return torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0)[timesteps].view(-1, 1, 1, 1)


def x0_from(prediction_type: str, prediction, noisy, timesteps) -> torch.Tensor:
    a = alpha_bar(timesteps)
    if prediction_type == "epsilon":
        return (noisy - (1 - a).sqrt() * prediction) / a.sqrt()
    if prediction_type == "v_prediction":
        return a.sqrt() * noisy - (1 - a).sqrt() * prediction
    return prediction


# ---------------------------------------------------------------------------------------------------------------------
# Targets


def test_targets_are_consistent():
    sample, noise, timesteps = batch()
    noisy = ddpm().add_noise(sample, noise, timesteps)
    a = alpha_bar(timesteps)
    torch.testing.assert_close(noisy, a.sqrt() * sample + (1 - a).sqrt() * noise, rtol=1e-4, atol=1e-5)
    targets = {kind: prediction_target(ddpm(kind), sample, noise, timesteps) for kind in PREDICTION_TYPES}
    assert torch.equal(targets["epsilon"], noise) and torch.equal(targets["sample"], sample)
    v = targets["v_prediction"]
    torch.testing.assert_close(a.sqrt() * noisy - (1 - a).sqrt() * v, sample, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((1 - a).sqrt() * noisy + a.sqrt() * v, noise, rtol=1e-4, atol=1e-4)
    assert (v - noise).abs().max() > 0.1 and (v + sample).abs().max() > 0.1


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_scheduler_recovers_the_sample_from_the_target(prediction_type):
    """The scheduler that samples reads the target as we write it: one step from a perfect prediction finds x0."""
    sample, noise, timesteps = batch()
    scheduler = ddpm(prediction_type, clip_sample=False)
    noisy = scheduler.add_noise(sample, noise, timesteps)
    target = prediction_target(scheduler, sample, noise, timesteps)
    for i, timestep in enumerate(timesteps):
        step = scheduler.step(target[i], int(timestep), noisy[i])
        torch.testing.assert_close(step.pred_original_sample, sample[i], rtol=1e-4, atol=1e-4)


def test_unknown_prediction_type():
    scheduler = ddpm()
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="prediction_type.*'flow'.*epsilon"):
        prediction_target(scheduler, *batch())
    with pytest.raises(ValueError, match="prediction_type 'flow'.*epsilon"):
        DiffusionObjective(scheduler)


# ---------------------------------------------------------------------------------------------------------------------
# Timesteps and labels


def test_uniform_timesteps():
    u = (torch.arange(50_000) + 0.5) / 50_000
    t = sample_timesteps(u, 1000)
    assert t.dtype == torch.int64
    assert torch.equal(torch.bincount(t, minlength=1000), torch.full((1000,), 50))
    assert DiffusionObjective(ddpm()).timesteps(torch.tensor([0.0, 1 - 2**-24])).tolist() == [0, 999]


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 0.7), (1.0, 2.0)])
def test_logit_normal_timesteps(mean, std):
    n = 200_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    objective = DiffusionObjective(ddpm(), timestep_sampling="logit_normal", logit_mean=mean, logit_std=std)
    t = objective.timesteps(u)
    assert (t.diff() >= 0).all() and t.min() >= 0 and t.max() <= 999
    for k in (20, 100, 300, 500, 800, 980):
        # P(t < k) = Phi((logit(k / T) - mean) / std)
        expected = 0.5 * (1 + math.erf((math.log(k / (1000 - k)) - mean) / std / math.sqrt(2)))
        assert (t < k).double().mean().item() == pytest.approx(expected, abs=2e-5)
    # The ends, where the normal's quantile is infinite.
    edges = objective.timesteps(torch.tensor([0.0, 1 - 2**-24]))
    assert 0 <= edges[0] < edges[1] <= 999


def test_unknown_sampling():
    with pytest.raises(ValueError, match="`sampling` \\('cosine'\\).*logit_normal"):
        sample_timesteps(torch.rand(2), 1000, "cosine")


@pytest.mark.parametrize("count", [1, 7, 96, 1000])
def test_one_sample_per_stratum(count):
    generator = torch.Generator().manual_seed(count)
    index = torch.randperm(count, generator=generator)
    noise = torch.rand(count, generator=generator)
    u = stratified_uniform(noise, index, count)
    assert torch.equal((u.double() * count).floor().long(), index)
    # Inside its stratum each is where the noise says.
    torch.testing.assert_close(u * count - index, noise, rtol=0, atol=1e-4)


def test_strata_do_not_depend_on_sharding():
    noise, index = torch.rand(12), torch.arange(12)
    whole = stratified_uniform(noise, index, 12)
    for shards in (2, 3, 4):
        parts = [stratified_uniform(n, i, 12) for n, i in zip(noise.chunk(shards), index.chunk(shards))]
        assert torch.equal(torch.cat(parts), whole)
        parts = [stratified_uniform(noise[r::shards], index[r::shards], 12) for r in range(shards)]
        assert torch.equal(torch.stack(parts, 1).flatten(), whole)


def test_stratified_uniform_stays_below_one():
    u = stratified_uniform(torch.tensor([1 - 2**-24, 0.0]), torch.tensor([95, 0]), 96)
    assert u[0] < 1 and u[1] == 0
    assert sample_timesteps(u, 1000).tolist() == [999, 0]


def test_drop_labels():
    u = (torch.arange(1000) + 0.5) / 1000
    labels = torch.arange(1000) % 3
    for probability in (0.0, 0.1, 0.3, 1.0):
        dropped = drop_labels(labels, 3, u, probability)
        assert (dropped == 3).sum().item() == round(1000 * probability)
        assert torch.equal(dropped[dropped != 3], labels[dropped != 3]) and dropped.dtype == labels.dtype
    # The ends of [0, 1): nothing is dropped at probability 0, everything at 1.
    edges = torch.tensor([0.0, 1 - 2**-24])
    assert drop_labels(labels[:2], 3, edges, 0.0).tolist() == [0, 1]
    assert drop_labels(labels[:2], 3, edges, 1.0).tolist() == [3, 3]
    assert torch.equal(labels, torch.arange(1000) % 3)  # not in place


# ---------------------------------------------------------------------------------------------------------------------
# Min-SNR


def test_signal_to_noise_ratio():
    timesteps = batch()[2]
    a = alpha_bar(timesteps).flatten()
    snr = signal_to_noise_ratio(ddpm(), timesteps)
    assert snr.dtype == torch.float32
    torch.testing.assert_close(snr.double(), a / (1 - a), rtol=2e-3, atol=0)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 1e6])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weighs_the_error_of_x0(prediction_type, gamma):
    sample, noise, timesteps = batch()
    seen = {}

    def denoise(noisy, timesteps):
        seen["noisy"] = noisy
        seen["prediction"] = torch.randn(noisy.shape, dtype=noisy.dtype, generator=torch.Generator().manual_seed(3))
        return seen["prediction"]

    objective = DiffusionObjective(ddpm(prediction_type), min_snr_gamma=gamma)
    mse = objective.terms(denoise, sample, noise, timesteps)["mse"]
    x0 = x0_from(prediction_type, seen["prediction"], seen["noisy"], timesteps)
    a = alpha_bar(timesteps).flatten()
    expected = (a / (1 - a)).clamp(max=gamma) * (x0 - sample).square().mean(dim=(1, 2, 3))
    # The scheduler's alphas are float32, and 1 - alpha_bar is 1e-4 at the first timestep.
    torch.testing.assert_close(mse.double(), expected, rtol=5e-3, atol=0)


def test_min_snr_is_finite_at_zero_terminal_snr():
    scheduler = ddpm(rescale_betas_zero_snr=True)
    snr = signal_to_noise_ratio(scheduler, torch.tensor([999, 0]))
    assert snr[0] == 0
    weights = {kind: min_snr_weight(snr, 5.0, kind)[0].item() for kind in PREDICTION_TYPES}
    assert weights == {"epsilon": 1.0, "v_prediction": 0.0, "sample": 0.0}


# ---------------------------------------------------------------------------------------------------------------------
# Spectral loss


def test_spectral_loss_is_the_formula():
    prediction, target, _ = batch()
    loss = spectral_magnitude_loss(prediction, target)
    assert loss.shape == (5,) and loss.dtype == torch.float32
    magnitudes = [np.abs(np.fft.rfft2(x.numpy(), norm="ortho")) for x in (prediction, target)]
    expected = np.abs(magnitudes[0] - magnitudes[1]).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-5)


def test_spectral_loss_is_blind_to_phase():
    prediction, target = (x.float() for x in batch()[:2])
    assert torch.equal(spectral_magnitude_loss(target, target), torch.zeros(5))
    shifted = prediction.roll((2, 3), dims=(2, 3))
    expected = spectral_magnitude_loss(prediction, target)
    assert expected.min() > 0.1
    torch.testing.assert_close(spectral_magnitude_loss(shifted, target), expected)
    torch.testing.assert_close(
        spectral_magnitude_loss(target.roll(1, dims=3), target), torch.zeros(5), rtol=0, atol=1e-6
    )
    # One channel shifted alone, too, but not exchanged with another.
    assert (spectral_magnitude_loss(prediction.roll(1, dims=1), target) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_spectral_loss_in_half_precision(dtype):
    prediction, target = (x.to(dtype) for x in batch()[:2])
    expected = spectral_magnitude_loss(prediction.float(), target.float())
    assert torch.equal(spectral_magnitude_loss(prediction, target), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = spectral_magnitude_loss(prediction, target)
    assert torch.equal(loss, expected) and loss.dtype == torch.float32


def test_spectral_loss_has_gradients():
    prediction, target = (x.float() for x in batch()[:2])
    prediction.requires_grad_()
    spectral_magnitude_loss(prediction, target).sum().backward()
    assert prediction.grad.abs().max() > 0
    # A magnitude of 0, which an untrained model predicts, must not make NaN.
    zero = torch.zeros_like(target, requires_grad=True)
    spectral_magnitude_loss(zero, target).sum().backward()
    assert zero.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Objective


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_perfect_prediction_costs_nothing(prediction_type):
    sample, noise, timesteps = batch()
    scheduler = ddpm(prediction_type)
    target = prediction_target(scheduler, sample, noise, timesteps)
    objective = DiffusionObjective(scheduler, spectral_weight=0.1)
    terms = objective.terms(lambda noisy, timesteps: target, sample, noise, timesteps)
    assert all(torch.equal(term, torch.zeros(5)) for term in terms.values())
    terms = objective.terms(lambda noisy, timesteps: target + 2, sample, noise, timesteps)
    torch.testing.assert_close(terms["mse"], torch.full((5,), 4.0))


def test_denoiser_gets_the_noisy_sample():
    sample, noise, timesteps = batch()
    calls = []
    DiffusionObjective(ddpm()).terms(lambda *args: calls.append(args) or args[0], sample, noise, timesteps)
    ((noisy, seen),) = calls
    a = alpha_bar(timesteps)
    torch.testing.assert_close(noisy, a.sqrt() * sample + (1 - a).sqrt() * noise, rtol=1e-4, atol=1e-5)
    assert torch.equal(seen, timesteps)


@pytest.mark.parametrize("weight", [0.0, 0.1, 3.0])
def test_total_is_the_weighted_sum(weight):
    sample, noise, timesteps = batch()
    objective = DiffusionObjective(ddpm(), spectral_weight=weight)
    terms = objective.terms(lambda noisy, timesteps: noisy, sample, noise, timesteps)
    assert set(terms) == ({"mse", "spectral"} if weight else {"mse"})
    noisy = ddpm().add_noise(sample, noise, timesteps)
    expected = (noisy - noise).square().mean() + weight * spectral_magnitude_loss(noisy, noise).mean()
    total = objective.total(terms)
    assert total.shape == () and total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_terms_of_a_model_in_bfloat16_are_float32():
    model = tiny_transformer("freq_gate")
    generator = torch.Generator().manual_seed(0)
    sample, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    objective = DiffusionObjective(ddpm("v_prediction"), min_snr_gamma=5.0, spectral_weight=0.1)

    def terms():
        labels = torch.tensor([0, 1, 3])
        return objective.terms(lambda x, t: model(x, t, labels).sample, sample, noise, torch.tensor([1, 500, 999]))

    expected = terms()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = terms()
    for name, term in autocast.items():
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, expected[name], rtol=0.1, atol=1e-2)
    objective.total(autocast).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"timestep_sampling": "cosine"}, ["`timestep_sampling` ('cosine')", "logit_normal"]),
        ({"min_snr_gamma": 0.0}, ["`min_snr_gamma` (0.0)", "positive"]),
        ({"min_snr_gamma": -1.0}, ["`min_snr_gamma` (-1.0)", "positive"]),
        ({"spectral_weight": -0.1}, ["`spectral_weight` (-0.1)", "negative"]),
    ],
)
def test_objective_errors(kwargs, words):
    with pytest.raises(ValueError) as error:
        DiffusionObjective(ddpm(), **kwargs)
    assert all(word in str(error.value) for word in words)
