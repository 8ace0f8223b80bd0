"""A grid of samples from fixed labels and seeds, to watch a run by."""

import math

from diffusers.utils import make_image_grid
from PIL import Image

from freqgate_dit.pipelines.pipeline_freqgate_dit import FreqGateDiTPipeline
from freqgate_dit.training.conditions import Condition
from freqgate_dit.training.config import SamplingConfig


def preview_grid(
    pipeline: FreqGateDiTPipeline, condition: Condition, config: SamplingConfig, guided: bool
) -> Image.Image:
    """Samples of labels spread over the classes, always with the same noise; small images are enlarged to 64 px."""
    count, classes = config.num_previews, max(1, len(condition.class_names))
    labels = [index * classes // count if classes > count else index % classes for index in range(count)]
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        **condition.pipeline_arguments(labels),
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale if guided else 1.0,
        seed=0,
    ).images
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    side = max(64, images[0].width)
    images += [Image.new("RGB", images[0].size, "white")] * (rows * columns - count)
    return make_image_grid([image.resize((side, side), resample=0) for image in images], rows, columns)
