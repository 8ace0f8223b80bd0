"""The spectral Euler scheduler: exact on Gaussians, known closed forms and limits, and diffusers' conventions."""

import json
import logging
import math

import components
import numpy as np
import pytest
import torch
from components import euler, make_pipeline, sample
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from freqgate_dit.scheduling_spectral_euler import (
    SpectralEulerDiscreteScheduler,
    spectral_mean,
    spectral_power,
)
from freqgate_dit.spectral import dct2, idct2, octave_bands


# Of 8 x 12 latents with two channels; the rings of 8 x 12 go to 15.
SPECTRUM = {
    "height": 8,
    "width": 12,
    "power": [[15 / (1 + ring) ** 1.5 for ring in range(16)], [2 / (1 + ring) for ring in range(16)]],
    "mean": [[[0.4, -0.1, 0.02], [0.05, 0, 0]], [[-1.0, 0.2, 0], [0, 0, 0.01]]],
}
SIZES = [(8, 12), (12, 8), (8, 8), (5, 16), (1, 1)]
WAYS = [{}, {"spectral_order": 2}, {"use_spectral_sigmas": True, "spectral_order": 2}]
OTHERS = [EulerDiscreteScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler]


def spectral(**kwargs) -> SpectralEulerDiscreteScheduler:
    return SpectralEulerDiscreteScheduler(**{"spectrum": SPECTRUM, "timestep_spacing": "trailing", **kwargs})


def gaussian_denoiser(power, mean):
    """The posterior mean of Gaussian data: a Wiener filter on DCT coefficients."""

    def denoise(x, sigma):
        return idct2(mean + power / (power + sigma**2) * (dct2(x) - mean))

    return denoise


def mixture_denoiser(shape, count=3):
    """The posterior mean of a mixture of Gaussians of the same frequencies as `SPECTRUM`."""
    generator = torch.Generator().manual_seed(0)
    power = spectral_power(SPECTRUM, *shape[-2:])
    centres = spectral_mean(SPECTRUM, *shape[-2:]) + (0.7 * power).sqrt() * torch.randn(
        count, *shape[-3:], generator=generator, dtype=torch.float64
    )

    def denoise(x, sigma):
        coefficients = dct2(x.double())[:, None]
        spread = 0.3 * power + sigma**2
        weights = (-((coefficients - centres) ** 2) / (2 * spread)).sum((-1, -2, -3)).softmax(1)
        posterior = centres + 0.3 * power / spread * (coefficients - centres)
        return idct2((weights[..., None, None, None] * posterior).sum(1)).to(x)

    return denoise


def output_for(prediction_type, x, original, sigma):
    """What a network of that prediction type says in place of `original`."""
    if prediction_type == "epsilon":
        return (x - original) / sigma
    if prediction_type == "v_prediction":
        return (x / (sigma**2 + 1) - original) * math.sqrt(sigma**2 + 1) / sigma
    return original


def run(scheduler, denoise, x, steps=None):
    """From the state `x` at the first noise level to the sample."""
    if steps is not None:
        scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        sigma = scheduler.sigmas[scheduler.step_index].item()
        output = output_for(scheduler.config.prediction_type, x, denoise(x, sigma), sigma)
        x = scheduler.step(output, t, x).prev_sample
    return x


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# -- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gaussian_data_is_sampled_exactly_in_any_number_of_steps(size, dtype, tolerance, way, prediction_type):
    power, mean = spectral_power(SPECTRUM, *size), spectral_mean(SPECTRUM, *size)
    scheduler = spectral(prediction_type=prediction_type, **way)
    for steps in (1, 2, 5, 20):
        scheduler.set_timesteps(steps)
        sigma = scheduler.sigmas[0].item()
        # The map is affine in every coefficient: two states show the mean and the variance that come out.
        states = idct2(torch.stack([mean, mean + (power + sigma**2).sqrt()])).to(dtype)
        denoise = gaussian_denoiser(power, mean)
        result = dct2(run(scheduler, lambda x, sigma: denoise(x.double(), sigma).to(x), states).double())
        variance = (result[1] - result[0]) ** 2
        assert result.isfinite().all()
        torch.testing.assert_close(variance / power, torch.ones_like(power), rtol=0, atol=tolerance)
        torch.testing.assert_close((result[0] - mean) / power.sqrt(), torch.zeros_like(mean), rtol=0, atol=tolerance)


def test_from_pure_noise_the_variance_lacks_what_the_schedule_leaves_out():
    # A schedule starts at noise of `init_noise_sigma`, without the data that true states at that level still have.
    power, mean = spectral_power(SPECTRUM, 8, 12), spectral_mean(SPECTRUM, 8, 12)
    scheduler = spectral()
    scheduler.set_timesteps(4)
    start = torch.stack([torch.zeros_like(power), torch.ones_like(power)]) * scheduler.init_noise_sigma
    result = dct2(run(spectral(), gaussian_denoiser(power, mean), idct2(start.double()), 4))
    sigma = scheduler.init_noise_sigma.item()
    expected = power * sigma**2 / (power + sigma**2)
    torch.testing.assert_close((result[1] - result[0]) ** 2, expected, rtol=1e-6, atol=0)
    assert (1 - expected / power).max() < 1e-3


@pytest.mark.parametrize("power", [0.3, 4.0])
def test_one_power_for_all_is_the_euler_step_of_trigflow(power):
    # TrigFlow: x_t = cos(t) x0 + sin(t) sigma_d z, dx/dt = -sin(t) x0 + cos(t) sigma_d z, tan(t) = sigma / sigma_d.
    spectrum = {"height": 8, "width": 12, "power": [[power]] * 2, "mean": [[[0.0]]] * 2}
    scheduler = spectral(spectrum=spectrum, prediction_type="sample")
    scheduler.set_timesteps(5)
    x, denoise = noise(2, 2, 8, 12) * scheduler.init_noise_sigma, mixture_denoiser((2, 8, 12))
    result = run(scheduler, denoise, x)
    sigma_d = math.sqrt(power)
    for sigma, next_sigma in zip(scheduler.sigmas[:-1].tolist(), scheduler.sigmas[1:].tolist(), strict=True):
        t, next_t = math.atan(sigma / sigma_d), math.atan(next_sigma / sigma_d)
        original = denoise(x, sigma)
        slope = -math.sin(t) * original + math.cos(t) * sigma_d * (x - original) / sigma_d / math.tan(t)
        x = (math.cos(t) * x + (next_t - t) * slope) / math.cos(next_t)
    torch.testing.assert_close(result, x)


def test_weak_frequencies_take_eulers_step():
    # As S goes to 0 the clock runs as sigma does, but for the step to noise 0.
    spectrum = {**SPECTRUM, "power": [[1e-14]] * 2, "mean": [[[0.0]]] * 2}
    scheduler, other = spectral(spectrum=spectrum, prediction_type="sample"), euler("trailing")
    x = noise(2, 2, 8, 12)
    for one in (scheduler, other):
        one.set_timesteps(5)
        one.scale_model_input(x, one.timesteps[0])
    original = mixture_denoiser((2, 8, 12))(x, other.sigmas[0].item())
    expected = other.step((x - original) / other.sigmas[0], other.timesteps[0], x).prev_sample
    got = scheduler.step(original, scheduler.timesteps[0], x).prev_sample
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# -- many steps -------------------------------------------------------------------------------------------------------


def errors(scheduler, steps, reference, x, denoise):
    return [(run(scheduler, denoise, x, n) - reference).square().mean().sqrt().item() for n in steps]


@pytest.fixture(scope="module")
def mixture():
    """Denoiser of a mixture, states at the greatest noise, and what their flow ends in."""
    denoise = mixture_denoiser((2, 4, 6))
    scheduler = spectral(use_spectral_sigmas=True, spectral_order=2, prediction_type="sample")
    x = noise(4, 2, 4, 6) * scheduler.init_noise_sigma
    return denoise, x, run(scheduler, denoise, x, 1000)


def test_many_steps_end_where_eulers_do(mixture):
    denoise, x, reference = mixture
    karras = {"use_karras_sigmas": True, "prediction_type": "sample"}
    ours, theirs = (
        errors(scheduler, (100, 200), reference, x, denoise) for scheduler in (spectral(**karras), euler(**karras))
    )
    assert theirs[1] < 0.55 * theirs[0] and theirs[1] < 0.1  # Euler goes there, by its first order
    assert ours[1] < 0.55 * ours[0] and ours[1] < theirs[1]


@pytest.mark.parametrize("order, ratio", [(1, 1.8), (2, 3.5)])
def test_order_of_convergence(order, ratio, mixture):
    denoise, x, reference = mixture
    scheduler = spectral(spectral_order=order, use_spectral_sigmas=True, prediction_type="sample")
    error = errors(scheduler, (40, 80), reference, x, denoise)
    assert error[0] > ratio * error[1]


def test_few_steps_err_less_than_eulers_and_with_second_order_less_again(mixture):
    denoise, x, reference = mixture
    own_grid = {"use_spectral_sigmas": True, "prediction_type": "sample"}
    error = [
        errors(scheduler, (12,), reference, x, denoise)[0]
        for scheduler in (
            euler("trailing", prediction_type="sample"),
            spectral(prediction_type="sample"),
            spectral(**own_grid),
            spectral(**own_grid, spectral_order=2),
        )
    ]
    assert error[1] < 0.8 * error[0] and error[3] < 0.6 * error[2]


def test_on_uneven_grids_second_order_does_no_harm(mixture):
    # The last of the trailing steps is by far the longest in log sigma: extrapolated in full, F would overshoot.
    denoise, x, reference = mixture
    first, second = (
        errors(spectral(spectral_order=order, prediction_type="sample"), (5,), reference, x, denoise)[0]
        for order in (1, 2)
    )
    assert second < 1.05 * first


@pytest.mark.parametrize("step", [1, 3, 4])
@pytest.mark.parametrize("levels", ["spectral", "trailing"])
def test_the_weight_of_second_order_by_fine_quadrature(levels, step):
    scheduler = spectral(spectral_order=2, use_spectral_sigmas=levels == "spectral")
    scheduler.set_timesteps(6)
    frequencies = scheduler.frequencies(8, 12)
    ahead = scheduler._turn(frequencies, step, True).ahead
    before, here, there = scheduler.sigmas[step - 1 : step + 2].tolist()
    log = torch.linspace(math.log(here), math.log(there), 4001, dtype=torch.float64)
    phi = torch.atan(log.exp() / frequencies.root[..., None])
    covered = (log[0] - (log[1:] + log[:-1]) / 2) / max(math.log(before / here), math.log(here / there) / 2)
    expected = (covered * (phi[..., :-1] - phi[..., 1:])).sum(-1)
    torch.testing.assert_close(ahead, expected, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("grid", ["spectral", "karras", "exponential"])
def test_levels_below_the_least_noise_of_training_are_sampled(grid, mixture):
    denoise, x, _ = mixture
    scheduler = spectral(spectral_order=2, sigma_min=0.002, prediction_type="sample", **{f"use_{grid}_sigmas": True})
    assert run(scheduler, denoise, x, 20).isfinite().all() and scheduler.sigmas[-2] < 0.003
    scheduler = spectral(spectral_order=2, prediction_type="sample")
    scheduler.set_timesteps(sigmas=[10.0, 1.0, 0.1, 0.008, 0.004, 0.0])
    assert run(scheduler, denoise, x).isfinite().all()


@pytest.mark.parametrize("steps", [3, 4, 7, 20])
def test_a_network_that_changes_at_known_levels_is_followed_exactly(steps):
    """With an F that is constant between switches, wherever the steps fall: w turns by phi times F."""
    switches = [8.0, 0.4]
    scheduler = spectral(spectral_order=2, use_spectral_sigmas=True, switch_sigmas=switches)
    frequencies = scheduler.frequencies(8, 8)
    power, frame = frequencies.power, frequencies.frame
    answers = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def denoise(x, sigma):
        answer = answers[sum(sigma < switch for switch in switches)]
        deviation = frame.rows @ x @ frame.columns.T - frame.mean
        spread = (power + sigma**2).sqrt()
        original = power / spread**2 * deviation + sigma * frequencies.root / spread * answer
        return frame.rows.T @ (frame.mean + original) @ frame.columns

    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.tolist()
    # Each change needs a step of its own to be noticed, and one after it.
    assert len({sum(sigma < switch for switch in switches) for sigma in sigmas[:-1]}) == 3
    x = noise(1, 2, 8, 8)
    w = (frame.rows @ x @ frame.columns.T * sigmas[0] - frame.mean) / (power + sigmas[0] ** 2).sqrt()
    for answer, start, stop in zip(answers, [sigmas[0], *switches], [*switches, 0.0]):
        w = w + frequencies.angle(start, stop) * answer
    expected = frame.rows.T @ (frame.mean + frequencies.root * w) @ frame.columns
    torch.testing.assert_close(run(scheduler, denoise, x * sigmas[0], steps), expected, rtol=1e-5, atol=1e-5)


def test_after_a_step_that_was_left_out_the_first_order_is_taken(mixture):
    denoise, x, _ = mixture
    results = []
    for order in (1, 2):
        scheduler = spectral(spectral_order=order, prediction_type="sample")
        scheduler.set_timesteps(5)
        scheduler.scale_model_input(x, scheduler.timesteps[0])
        state = scheduler.step(denoise(x, 9.0), scheduler.timesteps[0], x).prev_sample
        scheduler._step_index = 2
        results.append(scheduler.step(denoise(state, 3.0), scheduler.timesteps[2], state).prev_sample)
    assert torch.equal(*results)


# -- the spectrum on other sizes --------------------------------------------------------------------------------------


def test_the_training_size_has_the_power_of_the_table():
    power = spectral_power(SPECTRUM, 8, 12)
    assert power.shape == (2, 8, 12) and power.dtype == torch.float64
    torch.testing.assert_close(power[:, 0], torch.tensor(SPECTRUM["power"], dtype=torch.float64)[:, :12])
    # Index (2, 0) of height 8 has the frequency of index (0, 3) of width 12, in cycles per pixel.
    torch.testing.assert_close(power[:, 2, 0], power[:, 0, 3])
    # Between rings: log power linear in log frequency.
    radius = math.hypot(1.5, 1)
    share = math.log(radius) / math.log(2)
    expected = math.exp((1 - share) * power[0, 0, 1].log() + share * power[0, 0, 2].log())
    assert power[0, 1, 1].item() == pytest.approx(expected)


def test_a_larger_image_has_the_same_power_at_the_same_scale():
    power, larger = spectral_power(SPECTRUM, 8, 12), spectral_power(SPECTRUM, 16, 36)
    torch.testing.assert_close(larger[:, ::2, ::3], power)
    # Frequencies below those of the training size lie between its first ring and its mean.
    assert (larger[:, 0, 0] >= larger[:, 0, 1]).all() and (larger[:, 0, 1] > larger[:, 0, 2]).all()


def test_white_noise_has_one_power_at_every_size():
    spectrum = {"height": 8, "width": 8, "power": [[2.0] * 11], "mean": [[[0.0]]]}
    for size in ((8, 8), (3, 20)):
        torch.testing.assert_close(spectral_power(spectrum, *size), torch.full((1, *size), 2.0).double())


def test_the_mean_image_stretches_and_keeps_its_colours():
    image = idct2(spectral_mean(SPECTRUM, 8, 12))
    larger = idct2(spectral_mean(SPECTRUM, 24, 36))
    torch.testing.assert_close(larger.mean((1, 2)), torch.tensor([0.4, -1.0], dtype=torch.float64))
    torch.testing.assert_close(larger[:, 1::3, 1::3], image)
    assert spectral_mean(SPECTRUM, 1, 1).flatten().tolist() == [0.4, -1.0]


@pytest.mark.parametrize("size", [(4, 6), (16, 24), (7, 7), (3, 40)], ids=str)
def test_other_sizes_are_sampled(size):
    scheduler = spectral(spectral_order=2, use_spectral_sigmas=True)
    x = noise(3, 2, *size, dtype=torch.float32) * scheduler.init_noise_sigma
    result = run(scheduler, mixture_denoiser((2, *size)), x, 5)
    assert result.isfinite().all() and 0.3 < result.std() < 3


# -- the grid ---------------------------------------------------------------------------------------------------------


def assert_even(way: torch.Tensor, sigmas: torch.Tensor):
    """Equal steps of what was covered of the way and of the logarithm together."""
    logs = sigmas.log()
    progress = (way - way[-1]) / (way[0] - way[-1]) + (logs - logs[-1]) / (logs[0] - logs[-1])
    torch.testing.assert_close(progress, torch.linspace(2, 0, len(sigmas), dtype=torch.float64), rtol=0, atol=2e-3)


def test_the_grid_of_one_frequency_in_closed_form():
    spectrum = {"height": 8, "width": 8, "power": [[0.7]], "mean": [[[0.0]]]}
    scheduler = spectral(spectrum=spectrum, use_spectral_sigmas=True)
    scheduler.set_timesteps(7)
    sigmas = scheduler.sigmas.double()
    assert sigmas[-1] == 0 and sigmas[0] == pytest.approx(157.40727, rel=1e-6)
    assert sigmas[-2] == pytest.approx(0.01, rel=1e-3)
    assert_even(torch.atan(sigmas[:-1] / math.sqrt(0.7)), sigmas[:-1])


def test_the_grid_of_a_spectrum_by_the_chords_of_the_way():
    scheduler = spectral(use_spectral_sigmas=True)
    scheduler.set_timesteps(6)
    sigmas = scheduler.sigmas.double()[:-1]
    root = spectral_power(SPECTRUM, 8, 12).sqrt().flatten()
    lengths = []
    for start, stop in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        # Of the curve of all angles in units of the image.
        curve = root * torch.atan(torch.linspace(start, stop, 20001, dtype=torch.float64)[:, None] / root)
        lengths.append(curve.diff(dim=0).norm(dim=1).sum())
    assert_even(-torch.stack([torch.zeros(()).double(), *lengths]).cumsum(0), sigmas)


def test_the_grid_is_denser_where_steps_are_cheaper():
    """By sqrt(2) from each switch on; without switches it is what it was."""
    switches = [8.0, 0.4]
    plain, dense = (
        spectral(use_spectral_sigmas=True, **more) for more in ({}, {"switch_sigmas": switches, "spectral_order": 2})
    )
    for scheduler in (plain, dense):
        scheduler.set_timesteps(400)
    # Noise levels as places among the plain ones, which are even.
    ours, theirs = (-scheduler.sigmas[:-1].double().log().numpy() for scheduler in (dense, plain))
    places = np.interp(ours, theirs, np.arange(400))
    steps, sigmas = np.diff(places), dense.sigmas[:-1]
    lengths = []
    for least, greatest in ((8.0, np.inf), (0.4, 8.0), (0, 0.4)):
        inside = ((sigmas[:-1] < greatest) & (sigmas[1:] >= least)).numpy()
        assert inside.sum() > 20 and steps[inside].std() < 0.01 * steps[inside].mean()
        lengths.append(steps[inside].mean())
    assert lengths[1] / lengths[0] == pytest.approx(2**0.5, rel=1e-2)
    assert lengths[2] / lengths[1] == pytest.approx(2**0.5, rel=1e-2)
    assert dense.sigmas[0] == plain.sigmas[0] and dense.sigmas[-2] == pytest.approx(plain.sigmas[-2].item())


def test_the_grid_asks_for_no_less_noise_than_was_trained():
    scheduler, least = spectral(use_spectral_sigmas=True), euler().sigmas[-2]
    for steps in (1, 2, 50, 500):
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == steps == len(scheduler.timesteps.unique())
        assert (scheduler.sigmas.diff() < 0).all() and scheduler.sigmas[-2] >= least * (1 - 1e-6)
    assert (scheduler.timesteps % 1 != 0).any()  # fractional
    scheduler = spectral(use_spectral_sigmas=True, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(5)
    assert scheduler.sigmas[-1] == least
    scheduler.set_timesteps(sigmas=[10.0, 1.0, 0.0])  # as in the parent class
    assert scheduler.sigmas.tolist() == [10, 1, 0]


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_timesteps_and_noise_are_eulers(spacing):
    one, other = spectral(timestep_spacing=spacing), euler(spacing)
    for scheduler in (one, other):
        scheduler.set_timesteps(7)
    assert torch.equal(one.timesteps, other.timesteps) and torch.equal(one.sigmas, other.sigmas)
    assert one.init_noise_sigma == other.init_noise_sigma and one.order == 1
    x, e = noise(2, 2, 8, 12), noise(2, 2, 8, 12, seed=1)
    t = one.timesteps[[2, 4]]
    assert torch.equal(one.add_noise(x, e, t), other.add_noise(x, e, t))
    assert torch.equal(one.scale_model_input(x, t[0]), other.scale_model_input(x, t[0]))


# -- conventions of diffusers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_prediction_types_agree(way, mixture):
    denoise, x, _ = mixture
    results = [
        run(spectral(prediction_type=name, **way), denoise, x, 6) for name in ("sample", "epsilon", "v_prediction")
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-6)


def test_types_are_kept_and_rounding_is_that_of_the_input():
    scheduler = spectral(prediction_type="sample")
    x = 5 * noise(2, 2, 8, 12)
    results = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        scheduler.set_timesteps(4)
        scheduler.scale_model_input(x, scheduler.timesteps[2])
        output = scheduler.step(noise(2, 2, 8, 12, seed=1).to(dtype), scheduler.timesteps[2], x.to(dtype))
        assert output.prev_sample.dtype == dtype
        assert output.pred_original_sample.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        results[dtype] = output.prev_sample.double()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)):
        error = (results[dtype] - results[torch.float64]).norm() / results[torch.float64].norm()
        assert 0 < error < tolerance


def test_autocast_changes_nothing(mixture):
    denoise, x, _ = mixture
    expected = run(spectral(prediction_type="sample"), denoise, x.float(), 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(spectral(prediction_type="sample"), denoise, x.float(), 3), expected)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_an_image_is_the_same_in_any_batch(way, mixture):
    denoise, x, _ = mixture
    together = run(spectral(prediction_type="sample", **way), denoise, x.float(), 5)
    alone = torch.cat([run(spectral(prediction_type="sample", **way), denoise, one.float(), 5) for one in x.split(1)])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_a_run_leaves_nothing_behind(mixture):
    denoise, x, _ = mixture
    scheduler = spectral(prediction_type="sample", spectral_order=2)
    first = run(scheduler, denoise, x, 4)
    scheduler.set_timesteps(4)
    scheduler.scale_model_input(x, scheduler.timesteps[0])
    scheduler.step(noise(*x.shape), scheduler.timesteps[0], x)  # a run that was given up
    assert torch.equal(run(scheduler, denoise, x, 4), first)
    # And one of another shape that starts in the middle, as from an image with noise.
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    x = scheduler.sigmas[2] * noise(1, 2, 8, 12)
    for t in scheduler.timesteps[2:]:
        scheduler.scale_model_input(x, t)
        x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
    assert x.shape == (1, 2, 8, 12) and x.isfinite().all()


def test_output_as_a_tuple():
    scheduler = spectral(prediction_type="sample")
    scheduler.set_timesteps(2)
    x, t = noise(1, 2, 8, 12), scheduler.timesteps[0]
    scheduler.scale_model_input(x, t)
    output = scheduler.step(x, t, x)
    scheduler.set_timesteps(2)
    both = scheduler.step(x, t, x, return_dict=False)
    assert torch.equal(both[0], output.prev_sample) and torch.equal(both[1], output.pred_original_sample)


@pytest.fixture
def warnings(caplog):
    """What diffusers has warned of."""
    logging.getLogger("diffusers").addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    logging.getLogger("diffusers").removeHandler(caplog.handler)


@pytest.mark.parametrize("other", OTHERS)
def test_from_config_both_ways(other, warnings, tmp_path):
    arguments = {"prediction_type": "v_prediction", "beta_end": 0.01, "timestep_spacing": "leading"}
    plain = other.from_config(EulerDiscreteScheduler(**arguments).config)
    own = {"spectrum": SPECTRUM, "spectral_order": 2, "temperature": [1.0, 0.5]}
    ours = SpectralEulerDiscreteScheduler.from_config(plain.config, **own)
    assert {name: ours.config[name] for name in arguments} == arguments
    # There and back keeps the spectrum, in memory and through a file.
    there = other.from_config(ours.config)
    there.save_pretrained(tmp_path)
    for config in (there.config, other.from_pretrained(tmp_path).config):
        back = SpectralEulerDiscreteScheduler.from_config(config)
        assert {name: back.config[f"_{name}"] for name in own} == own
        assert {name: back.config[name] for name in arguments} == arguments
    assert type(there) is other and torch.equal(there.alphas_cumprod, ours.alphas_cumprod)
    if other is DPMSolverMultistepScheduler:
        assert there.config.solver_order == 2
    assert warnings() == []
    # A new spectrum replaces the old one, for good.
    changed = {**SPECTRUM, "mean": [[[0.0]]] * 2}
    back = SpectralEulerDiscreteScheduler.from_config(there.config, spectrum=changed)
    assert back.config._spectrum == changed and back.config._spectral_order == 2


@pytest.mark.parametrize("other", [DDIMScheduler, DDPMScheduler])
def test_the_config_of_a_training_scheduler_will_do(other):
    ours = SpectralEulerDiscreteScheduler.from_config(other(beta_end=0.01).config, spectrum=SPECTRUM)
    assert ours.config.beta_end == 0.01 and ours.config.timestep_spacing in ("leading", "linspace")


def test_json_round_trip(tmp_path, mixture, warnings):
    denoise, x, _ = mixture
    scheduler = spectral(spectral_order=2, use_spectral_sigmas=True, temperature=0.9, prediction_type="v_prediction")
    scheduler.save_pretrained(tmp_path)
    loaded = SpectralEulerDiscreteScheduler.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    name = "scheduler_config.json"
    assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert json.loads((tmp_path / name).read_text())["_spectrum"] == SPECTRUM
    assert torch.equal(run(loaded, denoise, x, 3), run(scheduler, denoise, x, 3))
    assert warnings() == []


def test_the_pipeline_samples_with_it():
    pipe = make_pipeline(scheduler=components.spectral())
    latents = sample(pipe, "cat", guidance_scale=2.0)
    assert latents.shape == (1, 4, 8, 8) and latents.isfinite().all()
    assert torch.equal(sample(pipe, "cat", guidance_scale=2.0), latents)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert not torch.allclose(sample(pipe, "cat", guidance_scale=2.0), latents)


# -- temperature ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_temperature_is_the_variance_of_each_octave(way):
    power, mean = spectral_power(SPECTRUM, 8, 12), spectral_mean(SPECTRUM, 8, 12)
    temperatures = [1.0, 0.8, 1.2]
    octaves = octave_bands(8, 12).clamp(max=2)
    for temperature, expected in (
        (0.7, torch.full((8, 12), 0.7)),
        (temperatures, torch.tensor(temperatures)[octaves]),
    ):
        scheduler = spectral(temperature=temperature, **way)
        scheduler.set_timesteps(3)
        states = idct2(torch.stack([mean, mean + (power + scheduler.sigmas[0].item() ** 2).sqrt()]))
        result = dct2(run(scheduler, gaussian_denoiser(power, mean), states))
        torch.testing.assert_close(
            (result[1] - result[0]) ** 2 / power, expected.double().expand_as(power), rtol=1e-6, atol=0
        )
        torch.testing.assert_close(result[0], mean, rtol=0, atol=1e-9)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"switch_sigmas": [1.0, math.inf]}, r"`switch_sigmas` \(\[1.0, inf\]\)"),
        ({"spectrum": None}, "`spectrum` is missing: pass `spectrum=statistics.spectrum\\(\\)`"),
        ({"spectrum": {"height": 8, "power": [[1.0]]}}, r"lacks \['width', 'mean'\]"),
        ({"spectrum": {**SPECTRUM, "power": [[1.0, 0.0]] * 2}}, r"power 0.0 at \(0, 1\), which must be positive"),
        ({"spectrum": {**SPECTRUM, "power": [[1.0], [1.0, 2.0]]}}, "unequal lengths"),
        ({"spectrum": {**SPECTRUM, "power": [[1.0, math.nan]] * 2}}, r"power nan at \(0, 1\), which"),
        ({"spectrum": {**SPECTRUM, "power": []}}, r"power of shape \(0,\)"),
        ({"spectrum": {**SPECTRUM, "mean": [[[0.0]]]}}, r"the mean of shape \(1, 1, 1\)"),
        ({"spectrum": {**SPECTRUM, "mean": [1.0, 2.0]}}, r"the mean of shape \(2,\)"),
        (
            {"spectrum": {**SPECTRUM, "mean": [[[math.nan]], [[0.0]]]}},
            r"mean nan at \(0, 0, 0\), which must be finite",
        ),
        ({"spectrum": {**SPECTRUM, "mean": [[[0.0]], [[0.0, 1.0]]]}}, "unequal lengths"),
        ({"spectrum": {**SPECTRUM, "height": 0}}, "the height 0: give the size"),
        ({"spectrum": {**SPECTRUM, "width": "12"}}, "the width '12': give the size"),
        ({"spectral_order": 3}, r"`spectral_order` \(3\)"),
        ({"use_spectral_sigmas": True, "use_karras_sigmas": True}, "cannot be combined"),
        ({"temperature": 0.0}, r"`temperature` \(0.0\)"),
        ({"temperature": [1.0, -1.0]}, "`temperature`"),
        ({"temperature": []}, "`temperature`"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        spectral(**arguments)


def test_a_config_without_spectrum_says_what_to_do():
    with pytest.raises(ValueError, match="`spectrum` is missing.*SpectrumStatistics"):
        SpectralEulerDiscreteScheduler.from_config(euler().config)


@pytest.mark.parametrize(
    "churn", [{"s_churn": 1.0}, {"s_tmin": 0.1}, {"s_tmax": 9.0}, {"s_noise": 1.1}], ids=lambda churn: str(*churn)
)
def test_churn_is_refused(churn):
    scheduler = spectral()
    scheduler.set_timesteps(2)
    x = noise(1, 2, 8, 12)
    with pytest.raises(ValueError, match=f"`{next(iter(churn))}` \\({next(iter(churn.values()))}\\)"):
        scheduler.step(x, scheduler.timesteps[0], x, **churn)


def test_steps_that_are_refused(warnings):
    scheduler = spectral(prediction_type="flow")
    scheduler.set_timesteps(2)
    x, t = noise(1, 2, 8, 12), scheduler.timesteps[0]
    for index in (0, torch.tensor(0)):
        with pytest.raises(ValueError, match=r"`timestep` \(.*0.*\) is an integer"):
            scheduler.step(x, index, x)
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\), but the spectrum of this scheduler has 2 channels"):
        scheduler.step(torch.zeros(1, 3, 8, 8), t, torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="`prediction_type` \\('flow'\\)"):
        scheduler.step(x, t, x)
    assert len(warnings()) == 1 and "scale_model_input" in warnings()[0]


def test_a_schedule_of_zero_terminal_snr_is_sampled():
    scheduler = spectral(rescale_betas_zero_snr=True, prediction_type="v_prediction", use_spectral_sigmas=True)
    x = noise(2, 2, 8, 12, dtype=torch.float32)
    scheduler.set_timesteps(4)
    result = run(scheduler, mixture_denoiser((2, 8, 12)), x * scheduler.init_noise_sigma)
    assert result.isfinite().all() and np.isclose(scheduler.sigmas[0], 4096, rtol=1e-3)
