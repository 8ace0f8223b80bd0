"""Plain folders of images: samples that were kept, or references that need no preprocessing."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps

from freqgate_dit.devices import available_cores


EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# All that Pillow raised on 24,000 files with random bytes changed or cut off.
UNREADABLE = (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageFolder:
    """The square images of a folder and of its subfolders, all of one size, sorted by name.

    Args:
        root: the folder.
        names: of the files, relative to it.
        resolution: side of every image in pixels.
        fingerprint: hex digest of names and content; equal for equal folders wherever they lie.
    """

    root: Path
    names: list[str]
    resolution: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.names)

    def images(self, indices: Sequence[int]) -> torch.Tensor:
        """Images `indices`, in that order: uint8 `(B, 3, resolution, resolution)`.

        Raises:
            ValueError: if one cannot be decoded; names it.
        """

        def decode(index: int) -> np.ndarray:
            try:
                with Image.open(self.root / self.names[index]) as image:
                    return np.array(_to_rgb(ImageOps.exif_transpose(image))).transpose(2, 0, 1)
            except UNREADABLE as error:
                raise _unreadable(self.names[index], error) from error

        with ThreadPoolExecutor(available_cores()) as pool:
            return torch.from_numpy(np.stack(list(pool.map(decode, indices))))


def read_images(folder: str | Path, resolution: int | None = None, refuse_jpeg: bool = False) -> ImageFolder:
    """Find and check the images of a folder and of its subfolders; every file is read once. None is resized.

    Args:
        folder: holds PNG, JPEG, WebP, BMP, GIF or TIFF files at any depth; hidden ones do not count.
        resolution: the side that every image must have; by default that of the first one.
        refuse_jpeg: for generated images, whose JPEG artefacts would be measured as the model's.

    Raises:
        ValueError: if there is no image, or one cannot be read, is not square, has another size, or is a JPEG that is
            refused; names it.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"`folder` ({folder}) is no folder (current directory: {Path.cwd()}).")
    found = (path.relative_to(root) for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS)
    names = sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))
    if not names:
        raise ValueError(f"`folder` ({folder}) holds no image; looked for {', '.join(EXTENSIONS)}.")
    with ThreadPoolExecutor(available_cores()) as pool:
        checked = list(pool.map(lambda name: _inspect(root, name), names))
    side = resolution or checked[0][0][0]
    for name, (size, form, _) in zip(names, checked, strict=True):
        if refuse_jpeg and form == "JPEG":
            raise ValueError(
                f"{name} is a JPEG, whose compression artefacts a distance to real images counts as the model's: "
                "generate the images as PNG, or force it."
            )
        if size != (side, side):
            others = f"`resolution` is {side}" if resolution else f"{names[0]} is {side} px wide"
            raise ValueError(
                f"{name} has {size[0]} x {size[1]} pixels, but {others}: all images must be squares of one size."
            )
    identity = json.dumps(["pixels v1", names, [digest for *_, digest in checked]])
    return ImageFolder(root, names, side, hashlib.sha256(identity.encode()).hexdigest())


def _inspect(root: Path, name: str) -> tuple[tuple[int, int], str, str]:
    """Width and height, format and SHA-256 of an image file, which is checked on the way."""
    data = (root / name).read_bytes()
    try:
        with Image.open(BytesIO(data)) as image:
            size, form = _to_rgb(ImageOps.exif_transpose(image)).size, image.format
    except UNREADABLE as error:
        raise _unreadable(name, error) from error
    return size, form, hashlib.sha256(data).hexdigest()


def _unreadable(name: str, error: Exception) -> ValueError:
    # The message of one error is the address of a buffer.
    why = "not an image that Pillow knows" if isinstance(error, PIL.UnidentifiedImageError) else error
    return ValueError(f"{name} cannot be read as an image ({why}): remove or replace it.")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError(f"its pixels have mode {image.mode}; save it with 8 bits per channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
