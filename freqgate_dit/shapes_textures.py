"""Built-in data set: images with an independent structure factor and texture factor, each in a known frequency band.

An image is `structure + texture + noise`. The structure is one of 8 shapes, the texture one of 8 gratings (4
orientations x 2 radial frequencies), drawn independently; position, scale, rotation, phase, amplitude and colour are
nuisances. Bands are hard windows on the radial frequency of the two-dimensional DCT, in cycles per image: components
with disjoint bands are exactly orthogonal, and a band means the same pattern at every resolution.

Which band carries which factor is what the five worlds vary, so that a claim such as "coarse things are decided first"
can be told apart from "the factor called structure is decided first":

========== ============================ ============================= ================================================
world      structure                    texture                       what it separates
========== ============================ ============================= ================================================
"mod"      filled shape, k <= 4         grating, 7 <= k <= 12         natural coupling: the shape masks the texture
"add"      filled shape, k <= 4         grating, 7 <= k <= 12         same bands, texture over the whole image
"reversed" outline of the shape, k >= 7 colour waves, k <= 3          names swapped against frequencies
"same"     outline, 4 <= k <= 7         colour waves, 4 <= k <= 7     no frequency difference between the factors
"flat"     as "add", then whitened      as "add", then whitened       every frequency has the same power
========== ============================ ============================= ================================================
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from freqgate_dit.spectral import dct2, idct2, radial_frequency


STRUCTURES: tuple[str, ...] = (
    "disc",
    "ring",
    "horizontal-bar",
    "vertical-bar",
    "cross",
    "diamond",
    "L",
    "two-discs",
)

_SCALES = ("coarse", "fine")
# Direction in which the stripes run, as seen on the screen; the wave vector is perpendicular to it.
_DIRECTIONS = ("horizontal", "rising", "vertical", "falling")
TEXTURES: tuple[str, ...] = tuple(f"{scale}-{direction}" for scale in _SCALES for direction in _DIRECTIONS)

SPLITS: tuple[str, ...] = ("train", "validation", "test")

MIN_IMAGE_SIZE = 32  # 12 cycles need DCT index 24, and an orientation off the axes some room beyond it.

_BACKGROUND_STD = 0.05  # of the 1/f background, in units of the [-1, 1] image
_SENSOR_STD = 0.04
_FLAT_STD = 0.36  # of whitened images: nearly Gaussian, so larger values would clip more than 1% of the pixels
_CALIBRATION_IMAGES = 4096
_CHUNK_PIXELS = 2**18  # pixels rendered at once: a few MB per intermediate, which stays in the cache of one core

# Nuisance draws: name, number of values, lower and upper end of a uniform distribution.
_NUISANCES = (
    ("shift", 2, -0.06, 0.06),  # of the image side
    ("scale", 1, 0.9, 1.1),
    ("rotation", 1, -math.radians(12), math.radians(12)),
    ("tilt", 1, -math.radians(8), math.radians(8)),
    ("frequency", 1, 0.97, 1.03),
    ("phase", 1, 0.0, 2 * math.pi),
    ("amplitude", 1, 0.85, 1.15),
    ("base", 3, -0.15, 0.15),
    ("contrast", 3, 0.8, 1.2),
    ("tint", 3, 0.75, 1.0),
    ("hue", 1, 0.0, 2 * math.pi),
)
_NUM_UNIFORMS = sum(count for _, count, _, _ in _NUISANCES)


@dataclass(frozen=True)
class _World:
    structure_band: tuple[float, float]
    texture_band: tuple[float, float]
    texture_frequencies: tuple[float, float]  # of the two texture scales, cycles per image
    structure_gain: float  # contrast of the shape (or line) before colour
    texture_gain: float  # amplitude of the grating before colour
    base: float = 0.0  # mean level of the image; only a band with k = 0 can carry it
    masked: bool = False  # texture only inside the shape
    outlined: bool = False  # shape drawn as a line instead of filled
    coloured: bool = False  # grating from one hue to its complement instead of dark to bright
    whitened: bool = False


_MOD = _World((0, 4), (7, 12), (8.0, 11.0), structure_gain=0.9, texture_gain=0.65, base=-0.6, masked=True)
_ADD = _World((0, 4), (7, 12), (8.0, 11.0), structure_gain=0.8, texture_gain=0.42, base=-0.42)
_WORLDS = {
    "mod": _MOD,
    "add": _ADD,
    "reversed": _World(
        (7, math.inf), (0, 3), (1.25, 2.5), structure_gain=1.6, texture_gain=0.6, outlined=True, coloured=True
    ),
    # Colour keeps two patterns of one band apart for the eye.
    "same": _World((4, 7), (4, 7), (4.6, 6.4), structure_gain=1.45, texture_gain=0.48, outlined=True, coloured=True),
    "flat": replace(_ADD, whitened=True),
}
WORLDS: tuple[str, ...] = tuple(_WORLDS)
NUM_CLASSES = len(STRUCTURES) * len(TEXTURES)


class Components(NamedTuple):
    """Summands of an image, float64 (3, H, W), or of several, (B, 3, H, W); before clipping to [-1, 1]."""

    structure: torch.Tensor
    texture: torch.Tensor
    noise: torch.Tensor


class ShapesTextures(torch.utils.data.Dataset):
    """Seeded images of 8 structures x 8 textures, generated on access.

    Image `i` is a function of (`seed`, `split`, `world`, `image_size`, `i`) alone: not of `num_images`, nor of which
    other images are asked for, or in which order. Labels and nuisances do not depend on `world` or `image_size`, so
    image `i` of two worlds shows the same shape in the same pose. Every 64 consecutive images starting at a multiple
    of 64 contain each class once, in random order.

    Args:
        num_images: Length of the data set, at least 1.
        image_size: Height and width in pixels, at least 32.
        world: One of `WORLDS`, see the table in this module's documentation.
        split: One of `SPLITS`; splits use disjoint random streams.
        seed: Non-negative integer.

    Raises:
        ValueError: if an argument is outside the ranges above.
    """

    def __init__(self, num_images: int, image_size: int = 32, world: str = "mod", split: str = "train", seed: int = 0):
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}; pass at least 1.")
        if image_size < MIN_IMAGE_SIZE:
            raise ValueError(
                f"image_size is {image_size}; the textures have up to 12 cycles per image and need at least "
                f"{MIN_IMAGE_SIZE} pixels."
            )
        if world not in WORLDS:
            raise ValueError(f"world is {world!r}; choose one of {', '.join(WORLDS)}.")
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}.")
        if seed < 0:
            raise ValueError(f"seed is {seed}; pass a non-negative integer.")
        self.num_images = num_images
        self.image_size = image_size
        self.world = world
        self.split = split
        self.seed = seed
        self._key = _stream_key(seed, SPLITS.index(split))

    @property
    def class_names(self) -> list[str]:
        """Names of the 64 labels, such as "ring fine-rising"."""
        return [f"{structure} {texture}" for structure in STRUCTURES for texture in TEXTURES]

    @property
    def bands(self) -> dict[str, tuple[float, float]]:
        """Band of each factor ("structure", "texture") as inclusive (lowest, highest) radial DCT frequency.

        In cycles per image, as `freqgate_dit.spectral.radial_frequency` gives it.
        """
        world = _WORLDS[self.world]
        return {"structure": world.structure_band, "texture": world.texture_band}

    @property
    def is_masked(self) -> bool:
        """Whether the texture is inside the shape alone, so that what it looks like depends on the structure."""
        return _WORLDS[self.world].masked

    @property
    def is_coloured(self) -> bool:
        """Whether the texture has no grey: its three channels sum to 0, but for the mean over the image."""
        return _WORLDS[self.world].coloured

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, i: int) -> dict[str, torch.Tensor | int]:
        """Image `i` as a dict: "image" uint8 (3, H, W), ints "structure", "texture", "label" (8 structure + texture).

        Raises:
            IndexError: if `i` is not in [0, len(self)).
        """
        label = int(self.labels([i])[0])
        structure, texture = divmod(label, len(TEXTURES))
        return {"image": self.images([i])[0], "structure": structure, "texture": texture, "label": label}

    def labels(self, indices: Sequence[int]) -> torch.Tensor:
        """Labels `8 * structure + texture` of several images: int64 (B,). Cheap, as no image is drawn.

        Raises:
            IndexError: if an index is not in [0, len(self)).
        """
        return torch.from_numpy(_labels(self._key, self._checked(indices)))

    def images(self, indices: Sequence[int]) -> torch.Tensor:
        """Several images: uint8 (B, 3, H, W), where 0 and 255 stand for -1 and 1.

        Raises:
            IndexError: if an index is not in [0, len(self)).
        """
        indices = self._checked(indices)
        images = torch.empty((len(indices), 3, self.image_size, self.image_size), dtype=torch.uint8)
        chunk = max(1, _CHUNK_PIXELS // self.image_size**2)
        for start in range(0, len(indices), chunk):
            parts = _render(_WORLDS[self.world], self._key, indices[start : start + chunk], self.image_size)
            values = (parts.structure + parts.texture + parts.noise).clamp(-1, 1)
            images[start : start + chunk] = ((values + 1) * 127.5).round().to(torch.uint8)
        return images

    def components(self, indices: int | Sequence[int]) -> Components:
        """The summands of an image, or of several, `(B, 3, H, W)` each, before they are added, clipped and rounded.

        Which one is low and which high in frequency depends on the world; `bands` tells.

        Raises:
            IndexError: if an index is not in [0, len(self)).
        """
        parts = _render(_WORLDS[self.world], self._key, self._checked(indices), self.image_size)
        return Components(*(part[0] for part in parts)) if np.ndim(indices) == 0 else parts

    def _checked(self, indices: Sequence[int]) -> np.ndarray:
        checked = np.asarray(indices, dtype=np.int64).reshape(-1)
        outside = checked[(checked < 0) | (checked >= self.num_images)]
        if outside.size:
            raise IndexError(f"index {outside[0]} is outside [0, {self.num_images}), the range set by num_images.")
        return checked


# Random streams. Philox is counter based: image i owns the counters whose third word is i, so any image can be drawn
# without the ones before it, and no two streams overlap.


def _stream_key(seed: int, split: int) -> np.ndarray:
    return np.random.SeedSequence((seed, split)).generate_state(2, np.uint64)


def _generator(key: np.ndarray, index: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, index, purpose]))


def _labels(key: np.ndarray, indices: np.ndarray) -> np.ndarray:
    blocks, inverse = np.unique(indices // NUM_CLASSES, return_inverse=True)
    orders = np.stack([_generator(key, block, purpose=1).permutation(NUM_CLASSES) for block in blocks])
    return orders[inverse, indices % NUM_CLASSES]


def _draw(key: np.ndarray, indices: np.ndarray, size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Nuisances by name, each (B, count, 1, 1), and standard normal noise (B, 4, H, W), all float64."""
    uniforms = np.empty((len(indices), _NUM_UNIFORMS))
    normals = np.empty((len(indices), 4, size, size), dtype=np.float32)
    for row, index in enumerate(indices):
        generator = _generator(key, index, purpose=0)
        generator.random(out=uniforms[row])
        generator.standard_normal(dtype=np.float32, out=normals[row])
    nuisances, start = {}, 0
    for name, count, low, high in _NUISANCES:
        values = torch.from_numpy(uniforms[:, start : start + count])
        nuisances[name] = (low + (high - low) * values)[:, :, None, None]
        start += count
    return nuisances, torch.from_numpy(normals).double()


# Rendering. Everything is float64: matrix products may sum in another order for another batch size, and in float64 the
# difference is far too small to move a pixel to another 8-bit level.


def _render(world: _World, key: np.ndarray, indices: np.ndarray, size: int) -> Components:
    labels = _labels(key, indices)
    nuisances, normals = _draw(key, indices, size)
    structure, texture = _signals(world, labels, nuisances, size)
    background_std = _background_std(size)
    noise = idct2(background_std * normals[:, :1]) + _SENSOR_STD * normals[:, 1:]
    if world.whitened:
        mean, variance = _signal_statistics(size)
        gain = _FLAT_STD / (variance + background_std**2 + _SENSOR_STD**2).sqrt()
        structure = idct2(gain * (dct2(structure) - mean))
        texture, noise = idct2(gain * dct2(texture)), idct2(gain * dct2(noise))
    return Components(structure, texture, noise)


def _signals(
    world: _World, labels: np.ndarray, nuisances: dict[str, torch.Tensor], size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Structure and texture components before whitening, (B, 3, H, W) each."""
    distance = _signed_distance(labels // len(TEXTURES), nuisances, size)
    grating = _grating(world, labels % len(TEXTURES), nuisances, size)
    if world.outlined:
        # Half its height is 0.05 wide, more than one sample at 32 pixels, so the line does not break up on the grid.
        shape = torch.exp(-((distance / 0.03) ** 2))
    else:
        shape = torch.sigmoid(-distance / 0.02)
    colour = _hue_vector(nuisances["hue"]) if world.coloured else nuisances["tint"]
    carrier = _band_pass(grating, world.texture_band)
    if world.masked:
        # The product has side bands as wide as the mask's spectrum, so the window is applied once more.
        carrier = _band_pass(shape * carrier, world.texture_band)
    structure = world.structure_gain * nuisances["contrast"] * _band_pass(shape, world.structure_band)
    texture = world.texture_gain * nuisances["amplitude"] * colour * carrier
    if world.structure_band[0] == 0:
        structure = structure + world.base + nuisances["base"]
    if world.texture_band[0] == 0:
        texture = texture + world.base + nuisances["base"]
    return structure, texture


def _band_pass(x: torch.Tensor, band: tuple[float, float]) -> torch.Tensor:
    """Keep the DCT coefficients with band[0] <= radial frequency <= band[1]."""
    return idct2(_window(band, x.shape[-1]) * dct2(x))


def _window(band: tuple[float, float], size: int) -> torch.Tensor:
    frequency = radial_frequency(size, size)
    return (frequency >= band[0]) & (frequency <= band[1])


def _grid(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel centres, x (1, W) and y (H, 1), from -1/2 to 1/2 of the image; y points down."""
    axis = (torch.arange(size, dtype=torch.float64) + 0.5) / size - 0.5
    return axis[None, :], axis[:, None]


def _grating(world: _World, textures: np.ndarray, nuisances: dict[str, torch.Tensor], size: int) -> torch.Tensor:
    """Plane waves with values in [-1, 1], (B, 1, H, W)."""
    scales, directions = np.divmod(textures, len(_DIRECTIONS))
    frequency = torch.tensor(world.texture_frequencies, dtype=torch.float64)[torch.from_numpy(scales)]
    frequency = frequency[:, None, None, None] * nuisances["frequency"]
    # Horizontal stripes vary along y; the next directions follow in steps of 45 degrees.
    angle = math.pi / 2 + math.pi / len(_DIRECTIONS) * torch.from_numpy(directions).double()
    angle = angle[:, None, None, None] + nuisances["tilt"]
    x, y = _grid(size)
    # y points down, so the plus sign in the usual formula becomes a minus to keep "rising" rising on the screen.
    position = x * torch.cos(angle) - y * torch.sin(angle)
    return torch.cos(2 * math.pi * frequency * position + nuisances["phase"])


def _hue_vector(hue: torch.Tensor) -> torch.Tensor:
    """Colour directions of zero sum, with maximal entries about 1: (B, 1, 1, 1) to (B, 3, 1, 1)."""
    return torch.cat([torch.cos(hue + shift) for shift in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)], dim=1)


def _signed_distance(structures: np.ndarray, nuisances: dict[str, torch.Tensor], size: int) -> torch.Tensor:
    """Distance to the outline of the posed shape in image sides, negative inside: (B, 1, H, W)."""
    x, y = _grid(size)
    cos, sin = torch.cos(nuisances["rotation"]), torch.sin(nuisances["rotation"])
    x, y = x - nuisances["shift"][:, :1], y - nuisances["shift"][:, 1:]
    scale = nuisances["scale"]
    x, y = (cos * x + sin * y) / scale, (cos * y - sin * x) / scale
    distance = torch.empty_like(x)
    for structure, outline in enumerate(_OUTLINES):
        chosen = torch.from_numpy(structures == structure)
        distance[chosen] = outline(x[chosen], y[chosen])
    return distance * scale


def _box(x: torch.Tensor, y: torch.Tensor, half_width: float, half_height: float) -> torch.Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _disc(x: torch.Tensor, y: torch.Tensor, radius: float) -> torch.Tensor:
    return torch.hypot(x, y) - radius


# In the order of STRUCTURES. Large enough that 4 cycles per image, a resolution of 1/8 of the side, keep them apart.
_OUTLINES = (
    lambda x, y: _disc(x, y, 0.30),
    lambda x, y: (torch.hypot(x, y) - 0.28).abs() - 0.10,
    lambda x, y: _box(x, y, 0.40, 0.14),
    lambda x, y: _box(x, y, 0.14, 0.40),
    lambda x, y: torch.minimum(_box(x, y, 0.40, 0.11), _box(x, y, 0.11, 0.40)),
    lambda x, y: (x.abs() + y.abs() - 0.42) / math.sqrt(2),
    lambda x, y: torch.minimum(_box(x + 0.20, y, 0.12, 0.34), _box(x, y - 0.22, 0.32, 0.12)),
    lambda x, y: torch.minimum(_disc(x + 0.18, y + 0.18, 0.17), _disc(x - 0.18, y - 0.18, 0.17)),
)


# Second-order statistics, in the DCT domain.


def _background_std(size: int) -> torch.Tensor:
    """Standard deviation of the background's DCT coefficients: 1/f, no mean, pixel variance `_BACKGROUND_STD ** 2`."""
    frequency = radial_frequency(size, size).double()
    std = torch.where(frequency > 0, 1 / frequency.clamp(min=0.5), 0.0)
    return std * (_BACKGROUND_STD * size / std.square().sum().sqrt())


def _signal_statistics(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """DCT coefficients of world "add", (H, W) each: mean of the structure, variance of structure + texture."""
    mean, variance = _calibrated_statistics()
    # The signals end at 12 cycles, DCT index 24, and orthonormal coefficients of one pattern grow like the side.
    pad = (0, size - MIN_IMAGE_SIZE, 0, size - MIN_IMAGE_SIZE)
    growth = size / MIN_IMAGE_SIZE
    return torch.nn.functional.pad(mean * growth, pad), torch.nn.functional.pad(variance * growth**2, pad)


@lru_cache(maxsize=1)
def _calibrated_statistics() -> tuple[torch.Tensor, torch.Tensor]:
    # A stream of its own, and the same for every data set: whitening is one fixed linear map, not a fit to the images.
    key = _stream_key(0, len(SPLITS))
    window = _window(_ADD.structure_band, MIN_IMAGE_SIZE)
    total, squares = 0.0, 0.0
    for indices in np.arange(_CALIBRATION_IMAGES).reshape(-1, 256):
        nuisances, _ = _draw(key, indices, MIN_IMAGE_SIZE)
        structure, texture = _signals(_ADD, _labels(key, indices), nuisances, MIN_IMAGE_SIZE)
        coefficients = dct2(structure + texture)
        # The texture has a random phase, hence no mean: outside the structure's band there is nothing to subtract.
        total = total + window * coefficients.mean(1).sum(0)
        squares = squares + coefficients.square().mean(1).sum(0)
    mean = total / _CALIBRATION_IMAGES
    return mean, squares / _CALIBRATION_IMAGES - mean.square()
