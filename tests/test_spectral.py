import json
import math

import pytest
import torch

from freqgate_dit.scheduling_spectral_euler import SpectralEulerDiscreteScheduler, spectral_mean, spectral_power
from freqgate_dit.spectral import (
    SpectrumStatistics,
    dct2,
    dct_matrix,
    idct2,
    octave_bands,
    octave_edges,
    octave_labels,
    radial_frequency,
    radial_power,
)


@pytest.mark.parametrize("n", [1, 2, 7, 32])
def test_matrix_is_orthonormal(n):
    matrix = dct_matrix(n, torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64))
    assert dct_matrix(n).dtype == torch.float32


def test_row_k_has_half_k_cycles():
    n, k = 24, 6
    position = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    wave = torch.cos(2 * math.pi * (k / 2) * position) * math.sqrt(2 / n)
    torch.testing.assert_close(dct_matrix(n, torch.float64)[k], wave)


@pytest.mark.parametrize("shape", [(8, 8), (3, 5, 12), (2, 3, 9, 4), (1, 7)])
def test_inverse_and_parseval(shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    coefficients = dct2(x)
    assert coefficients.shape == x.shape and coefficients.dtype == torch.float64
    torch.testing.assert_close(idct2(coefficients), x)
    torch.testing.assert_close(coefficients.square().sum(), x.square().sum())
    torch.testing.assert_close(coefficients[..., 0, 0], x.mean((-2, -1)) * math.sqrt(x.shape[-2] * x.shape[-1]))


def test_transform_is_the_separable_definition():
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for ky in range(3):
        for kx in range(4):
            basis = torch.outer(dct_matrix(3, torch.float64)[ky], dct_matrix(4, torch.float64)[kx])
            torch.testing.assert_close(dct2(x)[ky, kx], (basis * x).sum())


def test_low_precision_and_autocast_compute_in_float32():
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    expected = dct2(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dct2(x), expected)
        assert torch.equal(idct2(x), idct2(x.float()))
    assert dct2(x.bfloat16()).dtype == torch.float32
    assert torch.equal(dct2(x.bfloat16()), dct2(x.bfloat16().float()))


def test_transform_is_differentiable():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dct2, x) and torch.autograd.gradcheck(idct2, x)


def test_radial_frequency_is_in_cycles_per_image():
    frequency = radial_frequency(7, 9)
    assert frequency.shape == (7, 9)
    assert frequency[0, 0] == 0 and frequency[6, 0] == 3 and frequency[0, 8] == 4
    assert frequency[6, 8] == 5


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 1), (5, 4), (8, 8), (6, 20), (32, 32), (33, 17)])
def test_octave_bands_partition_the_grid(size):
    edges, bands, frequency = octave_edges(*size), octave_bands(*size), radial_frequency(*size)
    assert bands.shape == size and bands.dtype == torch.int64
    assert bands.unique().tolist() == list(range(len(edges) - 1))  # none is empty
    assert edges[-1] >= max(size) / 2 and (len(edges) == 2 or edges[-2] < max(size) / 2)
    upper = torch.tensor([*edges[1:-1], math.inf])  # the corner belongs to the last band
    assert (torch.tensor(edges)[bands] <= frequency).all() and (frequency < upper[bands]).all()


def test_octave_bands_of_known_sizes():
    assert octave_edges(32, 32) == [0, 1, 2, 4, 8, 16] and octave_edges(16, 6) == [0, 1, 2, 4, 8]
    assert octave_labels(8, 8) == ["0-1", "1-2", "2-4"] and octave_labels(1, 1) == ["0-1"]
    # One cycle is index 2 of an axis; (1, 1) is sqrt(2) / 2 cycles, (2, 3) is sqrt(13) / 2.
    assert octave_bands(4, 8)[0].tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    assert octave_bands(4, 8)[:, 3].tolist() == [1, 1, 1, 2]
    assert octave_bands(8, 8).flatten().bincount().tolist() == [4, 11, 49]
    assert torch.equal(octave_bands(8, 4), octave_bands(4, 8).T)
    # A pattern keeps its band at every resolution.
    assert torch.equal(octave_bands(32, 32)[:8, :8], octave_bands(16, 16)[:8, :8])


def test_errors():
    with pytest.raises(ValueError, match="n is 0"):
        dct_matrix(0)
    with pytest.raises(ValueError, match="shape"):
        dct2(torch.zeros(4))
    with pytest.raises(ValueError, match="int64"):
        idct2(torch.zeros(4, 4, dtype=torch.int64))


def statistics_of(images, *sizes) -> SpectrumStatistics:
    statistics = SpectrumStatistics()
    for batch in images.split(list(sizes) or len(images)):
        statistics.update(batch)
    return statistics


def test_statistics_are_those_of_all_images_in_any_batches():
    # An offset of 1000 at a spread of 1: a sum of squares less the squared mean would lose digits.
    images = torch.randn(20, 2, 5, 7, generator=torch.Generator().manual_seed(0)) + 1000
    coefficients = dct2(images.double())
    for sizes in ((20,), (1, 19), (7, 7, 6), (1,) * 20):
        statistics = statistics_of(images, *sizes)
        assert statistics.count == 20 and statistics.mean.dtype == torch.float64
        torch.testing.assert_close(statistics.mean, coefficients.mean(0), rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(statistics.power, coefficients.var(0, unbiased=False), rtol=1e-9, atol=1e-9)


def test_statistics_take_any_type():
    images = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = statistics_of(images.float())
    assert torch.equal(statistics_of(images).power, expected.power)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (5, 12), (16, 3), (2, 31)])
def test_rings_of_radial_power(size):
    height, width = size
    power = torch.rand(2, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rings = radial_power(power)
    assert rings.shape[0] == 2 and rings.isfinite().all()
    torch.testing.assert_close(rings[:, 0], power[:, 0, 0])
    longer = max(size)
    for ring in range(rings.shape[1]):
        members = [
            power[:, ky, kx]
            for ky in range(height)
            for kx in range(width)
            if math.floor(math.hypot(ky * longer / height, kx * longer / width) + 0.5) == ring
        ]
        torch.testing.assert_close(rings[:, ring], torch.stack(members).mean(0))


def test_spectrum_of_known_data():
    # Independent coefficients of a power that falls with frequency, about a mean.
    generator, size = torch.Generator().manual_seed(0), (12, 8)
    truth = {
        "height": 12,
        "width": 8,
        "power": [[9 / (1 + ring) ** 1.2 for ring in range(17)], [1.0] * 17],
        "mean": [[[0.5, 0.1], [-0.2, 0.0]], [[-2.0, 0.0], [0.3, 0.0]]],
    }
    power, mean = spectral_power(truth, *size), spectral_mean(truth, *size)
    images = idct2(mean + power.sqrt() * torch.randn(4000, 2, *size, dtype=torch.float64, generator=generator))
    spectrum = statistics_of(images, 3000, 1000).spectrum()
    assert (spectrum["height"], spectrum["width"]) == size
    assert [len(row) for row in spectrum["power"]] == [len(radial_power(power)[0])] * 2
    ratio = spectral_power(spectrum, *size) / power
    assert (ratio.log().abs() < 0.12).all() and ratio.log().abs().mean() < 0.03
    torch.testing.assert_close(spectral_mean(spectrum, *size), mean, rtol=0, atol=0.2)
    assert spectrum["mean"][1][0][0] == pytest.approx(images[:, 1].mean().item(), rel=1e-5)
    # Plain numbers, which JSON gives back as they are.
    assert json.loads(json.dumps(spectrum)) == spectrum


def test_white_noise_has_power_one():
    images = torch.randn(2000, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    (power,) = statistics_of(images).spectrum()["power"]
    assert power == pytest.approx([1.0] * len(power), rel=0.1)


def test_what_the_mean_has_beyond_its_block_counts_as_power():
    images = torch.randn(500, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pattern = torch.zeros(1, 16, 16, dtype=torch.float64)
    pattern[0, 3, 2], pattern[0, 12, 0] = 5.0, 4.0
    (plain,), (power,) = (statistics_of(x).spectrum()["power"] for x in (images, images + idct2(pattern)))
    rise = radial_power(pattern.square())[0].clone()
    rise[round(math.hypot(3, 2))] = 0  # within the block: that is the mean's
    assert [new - old for new, old in zip(power, plain, strict=True)] == pytest.approx(rise.tolist(), abs=0.1)


def test_what_never_varies_still_has_a_clock():
    images = torch.randn(10, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    images[:, 1] = 0.5
    spectrum = statistics_of(images).spectrum()
    assert all(value > 0 for row in spectrum["power"] for value in row)
    assert spectrum["mean"][1][0][0] == 0.5
    scheduler = SpectralEulerDiscreteScheduler(spectrum=spectrum, prediction_type="sample", spectral_order=2)
    scheduler.set_timesteps(3)
    x, original = images[:2] * scheduler.init_noise_sigma, images[:1].repeat(2, 1, 1, 1)
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        x = scheduler.step(original, t, x).prev_sample
    torch.testing.assert_close(x[:, 1], original[:, 1], rtol=0, atol=1e-2)


def test_statistics_that_are_refused():
    statistics = SpectrumStatistics()
    with pytest.raises(ValueError, match=r"`images` has shape \(3, 4, 4\)"):
        statistics.update(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match=r"\(0, 3, 4, 4\)"):
        statistics.update(torch.zeros(0, 3, 4, 4))
    statistics.update(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 5\); expected at least one image of \(3, 4, 4\)"):
        statistics.update(torch.zeros(2, 3, 4, 5))
    with pytest.raises(ValueError, match="not finite"):
        statistics.update(torch.full((1, 3, 4, 4), math.nan))
    assert statistics.count == 1 and not statistics.mean.any()
    with pytest.raises(ValueError, match="1 images that do not differ"):
        statistics.spectrum()
    statistics.update(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="2 images that do not differ"):
        statistics.spectrum()
