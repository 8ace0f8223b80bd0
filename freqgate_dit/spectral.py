"""Discrete cosine transform of images, as matrix products.

The orthonormal DCT-II has one convention worth knowing by heart: basis function ``k`` of an axis with ``n`` samples is
``cos(pi * k * (i + 1/2) / n)``, which completes ``k / 2`` cycles over the image. Band limits in this package are in
cycles per image, so they name the same pattern at every resolution.
"""

import math

import torch


# Side of the block of lowest frequencies whose means a spectrum keeps.
MEAN_SIZE = 8
# Of a ring, relative to the mean power of a coefficient.
LEAST_POWER = 1e-6


def dct_matrix(n: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> torch.Tensor:
    """Orthonormal DCT-II matrix `C`, so that `C @ x` are the coefficients of `x` and `C.T @ C` is the identity.

    Args:
        n: Number of samples, at least 1.
        dtype: Floating point type of the result. The entries are computed in float64 and rounded once.
        device: Device of the result.

    Returns:
        Tensor of shape (n, n): row `k` is the basis function with `k / 2` cycles.

    Raises:
        ValueError: if `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}; a DCT needs at least 1 sample.")
    index = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi / n * index[:, None] * (index[None, :] + 0.5)) * math.sqrt(2.0 / n)
    matrix[0] *= math.sqrt(0.5)
    return matrix.to(device=device, dtype=dtype)


def dct2(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal two-dimensional DCT-II over the last two dimensions.

    Args:
        x: Floating point tensor of shape (..., H, W), any H and W.

    Returns:
        Coefficients of shape (..., H, W); index (0, 0) is the mean times `sqrt(H * W)`, and the sum of squares equals
        that of `x`. float64 stays float64; every other type is computed and returned in float32, autocast or not.

    Raises:
        ValueError: if `x` is not floating point or has fewer than two dimensions.
    """
    return _transform(x, inverse=False)


def idct2(coefficients: torch.Tensor) -> torch.Tensor:
    """Inverse of `dct2`: images of shape (..., H, W) from coefficients of the same shape.

    Types and errors are those of `dct2`.
    """
    return _transform(coefficients, inverse=True)


def radial_frequency(
    height: int, width: int, device: torch.device | str | None = None, basis: str = "dct"
) -> torch.Tensor:
    """Radial frequency of every index of a transform, in cycles per image.

    Index (ky, kx) of the DCT has ky / 2 cycles over the height and kx / 2 over the width, hence
    `sqrt(ky**2 + kx**2) / 2`: 0 in the corner (0, 0), `(n - 1) / 2` at the end of an axis of n samples. An index of
    the FFT has the cycles of its wave, whole numbers up to `n / 2`, of either sign.

    Returns:
        float32 tensor of shape (height, width), in the order of `dct2` or of `torch.fft.fft2`.
    """
    rows, columns = (_axis_frequency(n, basis).to(device) for n in (height, width))
    return torch.hypot(rows[:, None], columns[None, :])


def _axis_frequency(n: int, basis: str) -> torch.Tensor:
    if basis == "dct":
        return torch.arange(n, dtype=torch.float32) / 2
    if basis == "fft":
        return torch.fft.fftfreq(n, 1 / n, dtype=torch.float32).abs()
    raise ValueError(f"`basis` ({basis!r}) must be dct or fft.")


def octave_edges(height: int, width: int) -> list[int]:
    """Limits of the frequency bands of an image, in cycles per image: `[0, 1, 2, 4, 8, ...]`.

    The last band is the octave that ends at or beyond the Nyquist frequency of the longer axis,
    `max(height, width) / 2`. So 32 x 32 has `[0, 1, 2, 4, 8, 16]`, and every band holds at least one coefficient.
    """
    edges = [0, 1]
    while edges[-1] < max(height, width) / 2:
        edges.append(2 * edges[-1])
    return edges


def octave_labels(height: int, width: int) -> list[str]:
    """Names of the bands of `octave_bands` in cycles per image: `["0-1", "1-2", "2-4", ...]`."""
    edges = octave_edges(height, width)
    return [f"{low}-{high}" for low, high in zip(edges[:-1], edges[1:], strict=True)]


def octave_bands(
    height: int, width: int, device: torch.device | str | None = None, basis: str = "dct"
) -> torch.Tensor:
    """Octave band of every index of the transform `basis`, by its radial frequency (see `radial_frequency`).

    Band 0 is below 1 cycle per image (the mean, and half a cycle over one axis or both), band b is
    `[2**(b - 1), 2**b)`. The last band also holds the corner, whose frequency exceeds that of either axis.

    Returns:
        int64 tensor of shape (height, width) with values 0 to `len(octave_edges(height, width)) - 2`.
    """
    limits = torch.tensor(octave_edges(height, width)[1:-1], dtype=torch.float32, device=device)
    return torch.bucketize(radial_frequency(height, width, device, basis), limits, right=True)


class SpectrumStatistics:
    """Mean and power of every DCT coefficient of images (or latents) that come in batches.

    Attributes:
        count: number of images so far.
        mean: `(C, H, W)` float64 on the CPU.
        power: `(C, H, W)`, mean square of the deviation from `mean`. White noise of unit variance has power 1.
    """

    def __init__(self):
        self.count = 0

    def update(self, images: torch.Tensor):
        """Take in a batch `(N, C, H, W)`, all batches of one `(C, H, W)`.

        Raises:
            ValueError: for a batch that is empty, of another shape than the first, or not finite.
        """
        if images.ndim != 4 or not len(images) or (self.count and images.shape[1:] != self.mean.shape):
            expected = tuple(self.mean.shape) if self.count else "(C, H, W)"
            raise ValueError(f"`images` has shape {tuple(images.shape)}; expected at least one image of {expected}.")
        coefficients = dct2(images.detach().cpu().double())
        if not coefficients.isfinite().all():
            raise ValueError("`images` has values that are not finite: look for what made them, and leave them out.")
        count, mean = len(images), coefficients.mean(0)
        power = (coefficients - mean).square().mean(0)
        if self.count:
            # Means and squares of two sets in one (Chan et al. 1979); a sum of squares would cancel.
            share = count / (self.count + count)
            shift = mean - self.mean
            mean = self.mean + share * shift
            power = (1 - share) * self.power + share * power + share * (1 - share) * shift.square()
        self.count, self.mean, self.power = self.count + count, mean, power

    @property
    def std(self) -> float:
        """Standard deviation of all values of all images."""
        offset = self.mean[:, 0, 0].mean() / math.sqrt(self.mean[0].numel())
        return math.sqrt(max(0.0, (self.power + self.mean.square()).mean().item() - offset.item() ** 2))

    def spectrum(self) -> dict:
        """What `SpectralEulerDiscreteScheduler` takes as `spectrum`: numbers and lists, ready for JSON.

        Power by radial frequency ([`radial_power`]), and the means of the lowest `MEAN_SIZE` x `MEAN_SIZE`
        coefficients divided by `sqrt(H * W)`, which makes entry (0, 0) the mean of the channel. What the mean image
        has beyond those counts as power.

        Raises:
            ValueError: with fewer than two images, or if all are equal.
        """
        if self.count < 2 or not self.power.any():
            raise ValueError(f"{self.count} images that do not differ have no spectrum: take in more of them.")
        height, width = self.power.shape[-2:]
        beyond = self.mean.square()
        beyond[:, :MEAN_SIZE, :MEAN_SIZE] = 0
        # What never varies, such as a black margin, still needs a clock.
        power = radial_power(self.power + beyond).clamp(min=LEAST_POWER * self.power.mean().item())
        mean = self.mean[:, :MEAN_SIZE, :MEAN_SIZE] / math.sqrt(height * width)
        return {"height": height, "width": width, "power": _rounded(power), "mean": _rounded(mean)}


def radial_power(power: torch.Tensor) -> torch.Tensor:
    """Mean power of the DCT coefficients in each ring of radial frequency, in cycles per pixel.

    Args:
        power: `(C, H, W)`.

    Returns:
        `(C, rings)`: ring j has the indices (ky, kx) with `hypot(ky * L / H, kx * L / W)` nearest to j, where
        L = max(H, W); they have about j / 2 cycles over the longer side. Ring 0 is the mean alone; none is empty.
    """
    height, width = power.shape[-2:]
    longer = max(height, width)
    rows = torch.arange(height, dtype=torch.float64) * (longer / height)
    columns = torch.arange(width, dtype=torch.float64) * (longer / width)
    ring = torch.hypot(rows[:, None], columns[None, :]).add(0.5).long().flatten()
    totals = torch.zeros(len(power), int(ring.max()) + 1, dtype=power.dtype)
    return totals.index_add(1, ring, power.flatten(1)) / ring.bincount()


def _rounded(values: torch.Tensor) -> list:
    """As nested lists of numbers with six digits."""
    if values.ndim:
        return [_rounded(part) for part in values]
    return float(f"{values.item():.6g}")


def _transform(x: torch.Tensor, inverse: bool) -> torch.Tensor:
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(
            f"the input has shape {tuple(x.shape)} and dtype {x.dtype}; pass a floating point tensor of shape "
            "(..., height, width), for example `images.float()`."
        )
    # bfloat16 keeps 8 bits: its rounding of the strong low frequencies would bury the weak high ones.
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = dct_matrix(x.shape[-2], dtype, x.device)
    columns = dct_matrix(x.shape[-1], dtype, x.device)
    with torch.autocast(x.device.type, enabled=False):
        if inverse:
            return rows.T @ x.to(dtype) @ columns
        return rows @ x.to(dtype) @ columns.T
