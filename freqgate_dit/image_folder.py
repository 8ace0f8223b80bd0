"""Plain folders of images: samples that were kept, or references that need no preprocessing."""

import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps

from freqgate_dit.devices import available_cores


# At the root of a disk, where nobody else can list them.
OF_THE_SYSTEM = ("lost+found", "System Volume Information", "$RECYCLE.BIN")
MEND = "make it readable, or move it elsewhere."
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


def is_image_name(name: str) -> bool:
    """Whether a file has a suffix of a format that Pillow, or a plug-in of it, reads and calls an image: no document,
    film or scientific data."""
    form = Image.registered_extensions().get(os.path.splitext(name)[1].lower())
    return form in Image.OPEN and Image.MIME.get(form, "").startswith("image/")


def by_suffix(names: list[str]) -> str:
    """How many files there are of each suffix, most first, such as "3 .txt, 1 without a suffix"."""
    counts = Counter(os.path.splitext(name)[1].lower() or "without a suffix" for name in names)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())


def as_text(name: str) -> str:
    """A name of a file or class as it is shown and compared: in the Unicode form NFC, bytes that are no UTF-8 written
    as `\\xe9`."""
    if name.isascii():
        return name
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", text)


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk`, in order, through links but not in circles, without what is hidden.

    Raises:
        ValueError: if a folder cannot be listed, or a link leads nowhere: images would be missed.
    """

    def refuse(error: OSError):
        raise ValueError(f"folder {error.filename!r} cannot be listed ({error.strerror}): {MEND}") from error

    seen = set()
    for directory, subfolders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(directory)
        # Class folders are often links, and links can form circles.
        names = [name for name in subfolders if not name.startswith(".") and name not in OF_THE_SYSTEM]
        subfolders[:] = [] if real in seen else sorted(names)
        if real not in seen:
            files = sorted(name for name in files if not name.startswith("."))
            for name in files:  # of what was a class; a link to an image that is gone is reported with the images
                if not os.path.splitext(name)[1] and not os.path.exists(os.path.join(directory, name)):
                    raise ValueError(f"{os.path.join(directory, name)!r} is a link to nothing: {MEND}")
            yield directory, subfolders, files
        seen.add(real)


def read_images(folder: str | Path, resolution: int | None = None, refuse_jpeg: bool = False) -> ImageFolder:
    """Find and check the images of a folder and of its subfolders; every file is read once. None is resized.

    Args:
        folder: holds image files at any depth; hidden ones do not count.
        resolution: the side that every image must have; by default that of the first one.
        refuse_jpeg: for generated images, whose JPEG artefacts would be measured as the model's.

    Raises:
        ValueError: if there is no image, or one cannot be read, is not square, has another size, or is a JPEG that is
            refused; names it.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"`folder` ({folder}) is no folder (current directory: {Path.cwd()}).")
    files = [
        Path(directory, name).relative_to(root).as_posix() for directory, _, names in walk(root) for name in names
    ]
    names = sorted(filter(is_image_name, files))
    if not names:
        raise ValueError(f"`folder` ({folder}) holds no image that Pillow reads, but {by_suffix(files) or 'nothing'}.")
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
