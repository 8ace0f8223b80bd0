"""Spectral preconditioning against the closed form of Gaussian data, in float64."""

import math

import pytest
import torch
from components import randomize, tiny_transformer
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from torch.testing import assert_close
from transformer_cases import assert_differ, inputs, run, untrained

from freqgate_dit import VARIANTS, FreqGateDiTPipeline
from freqgate_dit.cost import flops_per_forward
from freqgate_dit.spectral import dct2, idct2
from freqgate_dit.transformer_freqgate_dit import (
    PREDICTION_TYPES,
    DataSpectrum,
    SpectralPreconditioner,
    dct_matrix,
    radial_index,
    radial_ring,
)
from freqgate_dit.transformer_freqgate_dit import dct2 as model_dct2
from freqgate_dit.transformer_freqgate_dit import idct2 as model_idct2


ALPHAS_CUMPROD = DDPMScheduler().alphas_cumprod.double()


def natural_spectrum(channels: int = 4, size: int = 8):
    """Mean and power `(C, size, size)` float64, over three decades as in natural images."""
    generator = torch.Generator().manual_seed(3)
    power = (0.1 + radial_index(size, size).double()) ** -2 * torch.tensor([1.0, 0.3, 0.1, 2.0])[:channels, None, None]
    return torch.randn(channels, size, size, generator=generator, dtype=torch.float64), power / 10


def preconditioned(prediction_type: str = "epsilon", variant: str = "adaln_zero", kind: str = "wiener", **kwargs):
    """Freshly initialised, with a spectrum."""
    model = untrained(variant, preconditioning=kind, prediction_type=prediction_type, **kwargs).eval()
    model.set_spectrum(*natural_spectrum(), ALPHAS_CUMPROD)
    return model


def wiener_denoiser(noisy, timestep, mean, power):
    """Posterior mean of x0 for Gaussian data, by the textbook: M + a S / (a^2 S + s^2) (x - a M)."""
    alphas_cumprod = ALPHAS_CUMPROD[timestep][:, None, None, None]
    a, s = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    x0 = idct2(mean + a * power / (a**2 * power + s**2) * (dct2(noisy) - a * mean))
    epsilon = (noisy - a * x0) / s
    return {"sample": x0, "epsilon": epsilon, "v_prediction": a * epsilon - s * x0}


def call(model, timestep):
    return run(model, timestep=timestep).double(), inputs(model)["hidden_states"].double()


TIMESTEPS = [(999, 600), (40, 0)]


@pytest.mark.parametrize("timestep", TIMESTEPS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_untrained_model_is_the_wiener_denoiser(variant, prediction_type, timestep):
    timestep = torch.tensor(timestep)
    prediction, noisy = call(preconditioned(prediction_type, variant), timestep)
    expected = wiener_denoiser(noisy, timestep, *natural_spectrum())[prediction_type]
    assert (prediction - expected).norm() <= 1e-5 * expected.norm()
    assert_differ(expected, noisy)


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_the_scalar_control_knows_the_mean_power_only(timestep):
    timestep = torch.tensor(timestep)
    mean, power = natural_spectrum()
    prediction, noisy = call(preconditioned(kind="scalar"), timestep)
    expected = wiener_denoiser(noisy, timestep, mean, power.mean().expand_as(power))["epsilon"]
    assert (prediction - expected).norm() <= 1e-5 * expected.norm()


@torch.no_grad()
def test_the_learned_gate_starts_as_wieners_and_leaves_it_per_ring():
    model = preconditioned(kind="learned")
    assert torch.equal(run(model), run(preconditioned()))
    given = inputs(model)
    before = dct2(run(model).double())
    model.preconditioner.offset[:, 2] += 1
    changed = (dct2(run(model).double()) - before).abs().amax(dim=(0, 1)) > 1e-4
    ring = (8 * radial_index(*given["hidden_states"].shape[-2:])).long()
    assert torch.equal(changed, ring == 2)


@pytest.mark.parametrize("size", [(8, 8), (20, 20), (37, 74), (16, 24)])
def test_rings_are_exact_at_their_borders(size):
    height, width = size
    squares = [[64 * ((i * width) ** 2 + (j * height) ** 2) for j in range(width)] for i in range(height)]
    expected = [[min(7, math.isqrt(square) // (height * width)) for square in row] for row in squares]
    assert radial_ring(height, width).tolist() == expected


def test_predictions_of_one_network_agree():
    x0 = {}
    weights = randomize(preconditioned()).state_dict()
    timestep = torch.tensor([500, 100])
    alphas_cumprod = ALPHAS_CUMPROD[timestep][:, None, None, None]
    a, s = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    for prediction_type in PREDICTION_TYPES:
        model = preconditioned(prediction_type)
        model.load_state_dict(weights)
        output, noisy = call(model, timestep)
        x0[prediction_type] = {
            "sample": output,
            "epsilon": (noisy - s * output) / a,
            "v_prediction": a * noisy - s * output,
        }[prediction_type]
    assert_close(x0["epsilon"], x0["sample"], rtol=1e-4, atol=1e-4)
    assert_close(x0["v_prediction"], x0["sample"], rtol=1e-4, atol=1e-4)
    assert_differ(x0["sample"], wiener_denoiser(noisy, timestep, *natural_spectrum())["sample"])


@pytest.mark.parametrize("log_snr", [-9.0, -1.0, 0.5, 7.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_networks_target_has_unit_variance_at_every_frequency(prediction_type, log_snr):
    mean, power = (statistic.float() for statistic in natural_spectrum())
    log_snr = torch.full((1, 1, 1, 1), log_snr)
    a, s = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    preconditioner = SpectralPreconditioner("wiener", "both", prediction_type, 4)

    def remainder(x0, epsilon):  # what the skip leaves of the target, over the output's factor; linear in both
        noisy = model_idct2(a * (x0 + mean) + s * epsilon)
        skip, output = preconditioner(noisy, log_snr, mean, power)[1]
        target = {"sample": x0 + mean, "epsilon": epsilon, "v_prediction": a * epsilon - s * (x0 + mean)}
        return (target[prediction_type] - skip) / output

    ones, zeros = torch.ones(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)
    variance = power * remainder(ones, zeros) ** 2 + remainder(zeros, ones) ** 2
    assert_close(variance, ones, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("timestep", [0, 300, 999])
def test_the_networks_input_has_unit_power(timestep):
    mean, power = (statistic.float() for statistic in natural_spectrum())
    generator = torch.Generator().manual_seed(0)
    x0 = mean + power.sqrt() * torch.randn(4096, *mean.shape, generator=generator)
    alphas_cumprod = ALPHAS_CUMPROD[timestep].float()
    noise = torch.randn(x0.shape, generator=generator)
    noisy = alphas_cumprod.sqrt() * idct2(x0) + (1 - alphas_cumprod).sqrt() * noise
    log_snr = torch.logit(alphas_cumprod).expand(4096, 1, 1, 1)
    shown, _ = SpectralPreconditioner("wiener", "both", "epsilon", 4)(noisy, log_snr, mean, power)
    assert shown.square().mean().item() == pytest.approx(1, rel=0.01)


def test_input_and_output_are_gated_separately():
    both, only_input, only_output = (preconditioned(preconditioning_at=at) for at in ("both", "input", "output"))
    # An untrained network outputs 0, whatever it is shown.
    assert not run(only_input).any()
    assert torch.equal(run(only_output), run(both))
    given = inputs(both)
    seen = []
    for model in (both, only_input, only_output):
        model.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        run(model)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], given["hidden_states"])
    assert_differ(seen[0], seen[2])


def test_the_mask_opens_from_coarse_to_fine_and_leaves_the_output():
    model = preconditioned(kind="mask")
    assert not run(model).any()
    spectrum = model.spectrum(torch.tensor([999.0, 300.0, 0.0]), 8, 8)
    noisy = model_idct2(torch.ones(3, 4, 8, 8))
    gains = dct2(model.preconditioner(noisy, *spectrum)[0])[:, 0]
    assert (gains[0].diagonal()[:4].diff() < 0).all() and gains[0, 0, 0] > 0.8 and gains[0, -1, -1] < 1e-6
    assert (gains.diff(dim=0) > -1e-6).all()
    assert gains[2, 4, 4] > 0.99


def test_the_models_transform_is_the_packages():
    images = torch.randn(2, 3, 6, 10)
    assert_close(model_dct2(images), dct2(images.double()).float(), rtol=1e-5, atol=1e-5)
    assert_close(model_idct2(model_dct2(images)), images, rtol=1e-5, atol=1e-5)
    assert_close(dct_matrix(16) @ dct_matrix(16).T, torch.eye(16), rtol=0, atol=1e-6)


def test_the_noise_level_between_two_timesteps_lies_between_theirs():
    spectrum = DataSpectrum(4, 8, 1000)
    expected = torch.logit(ALPHAS_CUMPROD).float()
    log_snr = spectrum(torch.tensor([0.0, 17.0, 17.5, 999.0]), 8, 8)[0].flatten()
    assert_close(log_snr[[0, 1, 3]], expected[[0, 17, 999]], rtol=1e-4, atol=1e-4)
    assert log_snr[2].item() == pytest.approx(expected[17:19].mean().item(), abs=1e-4)


def test_another_size_has_the_power_of_the_same_cycles_per_pixel():
    model = preconditioned()
    _, mean, power = model.spectrum(torch.zeros(1), 16, 24)
    assert torch.equal(power[:, ::2, ::3], model.spectrum.power)
    # A constant of the data's image is one of the larger image.
    scale = math.sqrt(16 * 24 / 64)
    assert_close(mean[:, 0, 0], scale * model.spectrum.mean[:, 0, 0], rtol=1e-4, atol=1e-4)
    assert run(model, **inputs(model, height=16, width=24)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_stay_float32_and_travel_with_the_weights(tmp_path, dtype):
    model = preconditioned()
    expected = {name: buffer.clone() for name, buffer in model.spectrum.named_buffers()}
    model.save_pretrained(tmp_path)
    for loaded in (
        type(model).from_pretrained(tmp_path),
        type(model).from_pretrained(tmp_path, torch_dtype=dtype),
        type(model).from_pretrained(tmp_path, torch_dtype=dtype, low_cpu_mem_usage=False),
        model.to(dtype),
    ):
        for name, buffer in loaded.spectrum.named_buffers():
            assert torch.equal(buffer, expected[name])
    assert model.dtype == dtype and run(model).dtype == dtype and run(model).isfinite().all()


def test_half_precision_of_the_blocks_keeps_the_skip_exact():
    model = preconditioned("sample")
    expected = run(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(run(model).float(), expected, rtol=1e-6, atol=1e-6)


def test_power_has_a_floor():
    model = preconditioned()
    mean, power = natural_spectrum()
    power[0, 3, 3] = 0
    model.set_spectrum(mean, power, ALPHAS_CUMPROD)
    assert model.spectrum.power[0, 3, 3].item() == pytest.approx(1e-3 * power.mean().item())
    assert run(model).isfinite().all()


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preconditioning": "fourier", "prediction_type": "epsilon"}, "`preconditioning` .'fourier'.*wiener"),
        ({"preconditioning": "wiener"}, "needs a `prediction_type` .None"),
        ({"prediction_type": "noise"}, "`prediction_type` .'noise'"),
        ({"preconditioning_at": "skip"}, "`preconditioning_at` .'skip'"),
        ({"preconditioning_at": "input"}, "`preconditioning_at` .'input'. does not apply"),
        ({"preconditioning": "mask", "prediction_type": "sample", "out_channels": 6}, "`out_channels` .6. must equal"),
        ({"num_train_timesteps": 0}, "`num_train_timesteps` .0."),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_transformer("adaln_zero", **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"power": torch.ones(4, 4, 4)}, r"`power` has shape \(4, 4, 4\); expected \(4, 8, 8\)"),
        ({"power": torch.zeros(4, 8, 8)}, "`power` has a minimum of 0"),
        ({"mean": torch.full((4, 8, 8), math.nan)}, "`mean` has values that are not finite"),
        ({"alphas_cumprod": torch.linspace(0.9, 0, 1000)}, "zero terminal SNR"),
    ],
)
def test_statistics_that_make_no_sense(changes, message):
    mean, power = natural_spectrum()
    with pytest.raises(ValueError, match=message):
        preconditioned().set_spectrum(**{"mean": mean, "power": power, "alphas_cumprod": ALPHAS_CUMPROD, **changes})


def test_a_model_without_preconditioning_takes_no_statistics():
    with pytest.raises(ValueError, match="knows no spectrum"):
        untrained("adaln_zero").set_spectrum(*natural_spectrum(), ALPHAS_CUMPROD)


def test_a_pipeline_refuses_the_scheduler_of_another_prediction_type():
    transformer = tiny_transformer("adaln_zero", preconditioning="wiener", prediction_type="v_prediction")
    with pytest.raises(ValueError, match="expects prediction_type 'epsilon'.*output 'v_prediction'"):
        FreqGateDiTPipeline(transformer, EulerDiscreteScheduler())


def test_cost_is_counted_after_transformers_has_patched_linspace(monkeypatch):
    """In a process whose first model is transformers', torch remembers the patched `torch.linspace` for ever."""
    torch.utils._device._device_constructors.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "linspace", lambda *args, **kwargs: None)
        with torch.device("meta"):
            torch.zeros(1)
    try:
        # Four transforms of 4 channels of 8 x 8, two products each.
        transforms = 4 * 2 * (2 * 4 * 8**3)
        assert flops_per_forward(preconditioned()) == flops_per_forward(untrained("adaln_zero")) + transforms
    finally:
        torch.utils._device._device_constructors.cache_clear()
