"""Traces of denoising: Parseval, the forward process in closed form, and Gaussian data, where all is known."""

import math

import numpy as np
import pytest
import torch
from components import euler, make_pipeline, tiny_transformer
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from freqgate_dit.metrics import band_power
from freqgate_dit.spectral import dct2, idct2, octave_bands, octave_labels, radial_frequency
from freqgate_dit.traces import DenoisingTrace, last_crossing, log_snr, noised_power


ALPHAS = DDPMScheduler().alphas_cumprod


@pytest.mark.parametrize("basis", ["dct", "fft"])
@pytest.mark.parametrize("size", [(8, 8), (9, 12), (16, 5)])
def test_octaves_hold_all_of_the_energy(basis, size):
    images = torch.randn(3, 2, *size, dtype=torch.float64)
    counts = octave_bands(*size, basis=basis).flatten().bincount()
    energy = (band_power(images, basis=basis) * counts).sum(-1)
    torch.testing.assert_close(energy, images.square().sum((-2, -1)))


def test_a_wave_lies_in_the_octave_of_its_cycles():
    place = torch.arange(16) / 16
    for cycles, band in ((1, 1), (3, 2), (5, 3), (7, 3)):
        wave = torch.cos(2 * math.pi * cycles * place).expand(1, 1, 16, 16)
        power = band_power(wave, basis="fft")[0, 0]
        assert power.argmax() == band and power.sum() - power[band] < 1e-9
        assert cycles in radial_frequency(16, 16, basis="fft")[0]
    with pytest.raises(ValueError, match=r"`basis` \('wavelet'\)"):
        band_power(wave, basis="wavelet")


def test_log_snr_of_a_schedule():
    steps = torch.tensor([0, 500, 999])
    torch.testing.assert_close(log_snr(ALPHAS, steps), (ALPHAS / (1 - ALPHAS)).log().double()[steps])
    between = log_snr(ALPHAS, torch.tensor(500.5))
    assert log_snr(ALPHAS, steps)[1] > between > log_snr(ALPHAS, torch.tensor(501))


def test_the_forward_process_has_the_power_of_its_formula():
    power = torch.tensor([9.0, 1.0, 0.1], dtype=torch.float64)
    bands = octave_bands(8, 8)
    data = idct2(power[bands].sqrt() * torch.randn(4000, 1, 8, 8, dtype=torch.float64))
    steps = torch.tensor([10, 400, 900])
    expected = noised_power(power, ALPHAS, steps)
    for step, row in zip(steps, expected):
        noisy = DDPMScheduler().add_noise(data, torch.randn_like(data), step.expand(4000))
        torch.testing.assert_close(band_power(noisy).mean((0, 1)), row, rtol=0.03, atol=0)
    torch.testing.assert_close(noised_power(torch.ones(4), ALPHAS, steps), torch.ones(3, 4, dtype=torch.float64))


POWER = torch.tensor([40.0, 10.0, 1.5, 0.3], dtype=torch.float64)  # of the octaves of 16 x 16


def gaussian_pipeline(scheduler):
    """A pipeline whose network knows Gaussian data of `POWER` exactly."""
    power = POWER[octave_bands(16, 16)]

    def denoise(sample, timestep, *args, **kwargs):
        alpha = log_snr(ALPHAS, torch.as_tensor(float(timestep.flatten()[0]))).sigmoid()
        gain = alpha.sqrt() * power / (alpha * power + 1 - alpha)
        original = idct2(gain * dct2(sample.double()))
        epsilon = ((sample - alpha.sqrt() * original) / (1 - alpha).sqrt()).float()
        return Transformer2DModelOutput(sample=epsilon)

    transformer = tiny_transformer(num_classes=None, in_channels=1, sample_size=16)
    transformer.forward = denoise
    return make_pipeline(transformer=transformer, scheduler=scheduler, vae=None, id2label=None)


@pytest.mark.parametrize(
    "scheduler", [euler("trailing"), DDIMScheduler(timestep_spacing="trailing", clip_sample=False)]
)
def test_gaussian_data_arrive_when_they_must(scheduler):
    pipe = gaussian_pipeline(scheduler)
    trace = DenoisingTrace()
    steps = 100  # Euler loses a little power in each; the arrival is exact in the limit
    pipe(
        num_images_per_label=64,
        seed=list(range(64)),
        num_inference_steps=steps,
        output_type="latent",
        callback_on_step_end=trace,
        callback_on_step_end_tensor_inputs=trace.tensor_inputs,
    )
    assert trace.predicted_power.shape == (steps, 64, 1, 4) and trace.bands == octave_labels(16, 16)
    # The posterior mean of a coefficient with power S has power S g with g = S / (S + sigma^2), and at the end S: nine
    # tenths where sigma^2 = S / 9.
    expected = np.log(9 / POWER.numpy())
    np.testing.assert_allclose(trace.arrival(), expected, atol=0.2)
    assert np.all(np.diff(trace.arrival()) > 0.5)  # coarse to fine
    gain = POWER / (POWER + torch.tensor(np.exp(-trace.log_snr))[:, None])
    measured = trace.predicted_power.mean((1, 2))
    torch.testing.assert_close(measured, gain * POWER, rtol=0.5, atol=0.05)
    # x_t follows the forward process.
    following = torch.tensor([*trace.timesteps[1:], 0])
    expected = noised_power(POWER, ALPHAS, following)[:-1]
    torch.testing.assert_close(trace.latent_power.mean((1, 2))[:-1], expected, rtol=0.4, atol=0.02)
    rows = trace.rows()
    assert len(rows) == 4 * steps and rows[5]["band"] == "1-2" and rows[5]["step"] == 1
    assert rows[5]["predicted_power"] == pytest.approx(trace.predicted_power[1, :, :, 1].mean().item())


def test_a_trace_of_pixels(tmp_path):
    pipe = make_pipeline()
    trace = DenoisingTrace("pixel", mean=None)
    options = {"callback_on_step_end": trace, "callback_on_step_end_tensor_inputs": trace.tensor_inputs}
    images = pipe([0, 1], seed=0, num_inference_steps=3, output_type="pt", **options).images
    assert trace.bands == octave_labels(*images.shape[-2:])
    # After the last step the prediction is the image.
    torch.testing.assert_close(trace.predicted_power[-1], band_power(2 * images - 1), rtol=1e-3, atol=1e-4)
    assert "latent_power" not in trace.rows()[0]
    with pytest.raises(ValueError, match="has watched a call already"):
        pipe([0], num_inference_steps=2, **options)
    with pytest.raises(ValueError, match=r"`space` \('wave'\)"):
        DenoisingTrace("wave")


def test_a_scheduler_that_tells_no_prediction():
    trace = DenoisingTrace()
    pipe = make_pipeline(scheduler=DPMSolverMultistepScheduler())
    options = {"callback_on_step_end": trace, "callback_on_step_end_tensor_inputs": trace.tensor_inputs}
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler tells no predicted clean image"):
        pipe([0], num_inference_steps=2, **options)


def test_last_crossing():
    x = np.array([0.0, 1, 2, 3])
    assert last_crossing(x, np.array([0.0, 0.5, 1, 1]), 0.75) == 1.5
    assert last_crossing(x, np.array([1.0, 0.5, 1, 1]), 0.75) == 1.5
    assert last_crossing(x, np.array([1.0, 1, 1, 1]), 0.75) == 0
    assert math.isnan(last_crossing(x, np.array([1.0, 1, 1, 0]), 0.75))
    assert math.isnan(last_crossing(x, np.full(4, np.nan), 0.75))
