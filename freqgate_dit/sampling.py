"""Images for someone who wants to see some: of which classes, from which seeds, and all of them in one picture."""

import math
import os
from io import BytesIO
from pathlib import Path

from diffusers.utils import make_image_grid
from PIL import Image

from freqgate_dit.pipelines.pipeline_freqgate_dit import WHY_BROKEN, FreqGateDiTPipeline, broken_images


# Images that are sampled at once, so that memory does not depend on how many there are.
BATCH_SIZE = 16
# Classes, if none are named.
MOST_CLASSES = 16
# Least side of an image in a grid, in pixels.
LEAST_SIDE = 64


def check_image_file(path: Path):
    """Raise `ValueError` unless a file of that name can be made, and Pillow can write a picture into it, which is
    tried in memory."""
    if path.is_dir():
        raise ValueError(f"`out` ({path}) is a folder: name a file in it, such as {path / 'samples.png'}.")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"`out` ({path}) cannot be made in {there}, which is no folder, or not yours to write to.")
    try:
        Image.new("RGB", (LEAST_SIDE, LEAST_SIDE)).save(BytesIO(), image_format(path))
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(
            f"`out` ({path}) has a suffix that Pillow cannot write ({path.suffix!r}): use .png or .jpg."
        ) from error


def image_format(path: Path) -> str:
    """What Pillow calls the format of a file, by its suffix, which stands for itself if that is unknown."""
    return Image.registered_extensions().get(path.suffix.lower(), path.suffix)


def check_makes_images(pipe: FreqGateDiTPipeline):
    """Raise `ValueError` for a pipeline that makes latents and has nothing to decode them."""
    channels = pipe.transformer.config.in_channels
    if pipe.vae is None and channels not in (1, 3):
        raise ValueError(
            f"the pipeline makes latents of {channels} channels and no images, for it has no autoencoder: give it the "
            "one that it was trained with (`vae` of `FreqGateDiTPipeline`, or of `freqgate-dit convert`)."
        )


def choose_conditions(
    pipe: FreqGateDiTPipeline, labels: list[str] | None, prompts: list[str] | None
) -> tuple[str | None, list]:
    """What to sample: an argument of the pipeline's call, and its values.

    Labels are names; one of digits is an id, unless a class has that name. Without labels and prompts the values are
    ids of up to 16 classes, spread evenly, or for a model without classes one `None`.
    """
    if prompts is not None:
        return "prompt", prompts
    if labels is not None:
        names = pipe.id2label.values()
        return "class_labels", [int(label) if label.isdecimal() and label not in names else label for label in labels]
    if pipe.num_classes is None:
        return None, [None]
    count = min(MOST_CLASSES, pipe.num_classes)
    return "class_labels", [index * pipe.num_classes // count for index in range(count)]


def sample_images(
    pipe: FreqGateDiTPipeline, argument: str | None, values: list, count: int, seed: int, **options
) -> list[Image.Image]:
    """`count` images of each of `values`, which the pipeline takes as `argument`; image i has the seed `seed` + i.

    Raises:
        ValueError: for images that have NaN or infinity in them.
    """
    values = [value for value in values for _ in range(count)]
    images = []
    for start in range(0, len(values), BATCH_SIZE):
        batch = values[start : start + BATCH_SIZE]
        given = {"num_images_per_label": len(batch)} if argument is None else {argument: batch}
        seeds = list(range(seed + start, seed + start + len(batch)))
        decoded = pipe.decode(pipe(**given, seed=seeds, output_type="latent", **options).images)
        broken = broken_images(decoded)
        if broken:
            raise ValueError(
                f"{len(broken)} of {len(decoded)} images, the first of them of seed {seeds[broken[0]]}, have NaN or "
                f"infinity in them. {WHY_BROKEN}"
            )
        images += pipe.image_processor.postprocess(decoded, output_type="pil")
    return images


def make_picture(images: list[Image.Image], count: int) -> Image.Image:
    """An image alone as it is; several as a grid, with `count` in a row if that is several rows, or else squarish.

    In a grid small images are enlarged by nearest neighbours, and places without an image are white.
    """
    if len(images) == 1:
        return images[0]
    columns = count if 1 < count < len(images) else math.ceil(math.sqrt(len(images)))
    factor = math.ceil(LEAST_SIDE / min(images[0].size))
    size = tuple(factor * side for side in images[0].size)
    places = [image.resize(size, Image.Resampling.NEAREST) for image in images]
    places += [Image.new("RGB", size, "white")] * (-len(images) % columns)
    return make_image_grid(places, len(places) // columns, columns)


def describe_seeds(pipe: FreqGateDiTPipeline, argument: str | None, values: list, count: int, seed: int) -> str:
    """Name and seeds of each of the values, a line each."""
    names = ["images" if value is None else value for value in values]
    if argument == "class_labels":
        names = [pipe.id2label.get(index, f"class {index}") for index in pipe.get_label_ids(values)]
    names = [" ".join(str(name).split()) for name in names]
    width = max(map(len, names))
    lines = []
    for index, name in enumerate(names):
        first = seed + index * count
        lines.append(f"  {name:<{width}}  seed{'' if count == 1 else f's {first} to'} {first + count - 1}")
    return "\n".join(lines)
