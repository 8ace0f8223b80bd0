"""Encoded images to pixels, and the check that this will work.

EXIF orientation is applied, transparency composited on white (what a browser shows), 16-bit grey scaled to 8 bits,
anything else converted to RGB (colour profiles are not applied); then the shorter side is resized with Lanczos, and
the centre cropped.
"""

import re
import threading
from contextlib import contextmanager
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps


# Longer side over shorter: beyond this the crop leaves little of an image, and resizing takes memory for all of it.
MAX_ASPECT = 20
# Pixels that all threads together decode at a time, each of which takes up to 16 bytes on its way to RGB.
PIXELS_AT_A_TIME = 2**27
# Part of every fingerprint: change it whenever the same files would give other pixels.
TRANSFORM = "exif, white, rgb, shorter side lanczos, centre crop, v1"


def decode_image(data: bytes, resolution: int) -> torch.Tensor:
    """Decode one encoded image (its first frame) to uint8 `(3, resolution, resolution)`, as the module describes.

    Raises:
        ValueError: if black and white of the pixels are unknown, or the image is a strip.
        OSError: if Pillow cannot read the data; its codecs may raise other errors, too.
    """
    with Image.open(BytesIO(data)) as image:
        _refuse_strip(image)
        with _room.taken(image.width * image.height):
            image = _to_rgb(image)
            scale = resolution / min(image.size)
            width, height = (max(resolution, round(side * scale)) for side in image.size)
            if image.size != (width, height):
                image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    image = image.crop((left, top, left + resolution, top + resolution))
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


def check_image(data: bytes) -> None:
    """Raise as `decode_image` does. JPEGs are decoded at an eighth of their size, in half the time."""
    with Image.open(BytesIO(data)) as image:
        _refuse_strip(image)
        if image.format == "PNG":
            image.verify()  # checksums, of which decoding takes no notice
    with Image.open(BytesIO(data)) as image, _room.taken(image.width * image.height):
        image.draft(None, (1, 1))
        _to_rgb(image)


def _refuse_strip(image: Image.Image) -> None:
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_ASPECT} times as long as wide")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose black and white are unknown; convert to 8 or 16 bits")
    is_deep = image.mode.startswith("I") or re.search(";16[BLN]", str(image.tile)) is not None
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # Pillow's own conversion clips at 255, which turns most of a 16-bit image white.
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(
                f"pixels from {pixels.min()} to {pixels.max()}, whose black and white are unknown; convert to 8 or 16 "
                "bits"
            )
        is_deep = pixels.any()  # black is black
        image = Image.fromarray((pixels // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image = image.convert("RGB")
    # As a rule 10 or 12 bits of a camera or scanner, or the numbers of segments.
    if is_deep and max(high for _, high in image.getextrema()) < 16:
        raise ValueError("16-bit pixels of less than 4096, which come out black; scale them to the range 0 to 65535")
    return image


class Room:
    """What threads share out among them: `size` at a time, or one of them more, alone."""

    def __init__(self, size: int):
        self.size, self.used, self.changed = size, 0, threading.Condition()

    @contextmanager
    def taken(self, amount: int):
        with self.changed:
            self.changed.wait_for(lambda: not self.used or self.used + amount <= self.size)
            self.used += amount
        try:
            yield
        finally:
            with self.changed:
                self.used -= amount
                self.changed.notify_all()


_room = Room(PIXELS_AT_A_TIME)
