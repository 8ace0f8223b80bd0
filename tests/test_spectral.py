import math

import pytest
import torch

from freqgate_dit.spectral import (
    dct2,
    dct_matrix,
    idct2,
    octave_bands,
    octave_edges,
    octave_labels,
    radial_frequency,
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
