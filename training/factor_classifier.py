"""Held-out judge of generated `ShapesTextures` images: which structure and which texture does an image show?

Example:
    python -m freqgate_dit.training.factor_classifier --world mod --out factor_classifier_mod.json
"""

import argparse
import json
import time

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from freqgate_dit.devices import bf16_is_fast
from freqgate_dit.files import user_path
from freqgate_dit.shapes_textures import STRUCTURES, TEXTURES, WORLDS, ShapesTextures


INPUT_SIZE = 32  # all bands end at 12 cycles per image, so 32 pixels hold both factors at any image size
BATCH_SIZE = 128
TEST_IMAGES = 4096


class FactorClassifier(nn.Module):
    """Small convolutional network with one head per factor.

    The structure head sees where features are, on a 4 x 4 grid; the texture head only how strong they are on average.

    Attributes:
        world: whose images it was trained on, `None` before.
    """

    def __init__(self):
        super().__init__()
        self.world: str | None = None
        self.features = nn.Sequential(
            _convolution(3, 32, kernel_size=5, stride=1),
            _convolution(32, 64, kernel_size=3, stride=2),
            _convolution(64, 96, kernel_size=3, stride=2),
            _convolution(96, 128, kernel_size=3, stride=1),
        )
        self.structure_head = nn.Sequential(
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.1), nn.Linear(128 * 16, len(STRUCTURES))
        )
        self.texture_head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, len(TEXTURES)))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of both factors.

        Args:
            images: Floating point (B, 3, H, W) in [-1, 1]; another size than 32 x 32 is resized with antialiasing.

        Returns:
            Structure logits and texture logits, (B, 8) each, in the order of `STRUCTURES` and `TEXTURES`.

        Raises:
            ValueError: if `images` has another shape or an integer type.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images has shape {tuple(images.shape)} and dtype {images.dtype}; pass floats in [-1, 1] of shape "
                "(batch, 3, height, width), for uint8 images `images / 127.5 - 1`."
            )
        if images.shape[-2:] != (INPUT_SIZE, INPUT_SIZE):
            images = F.interpolate(images, (INPUT_SIZE, INPUT_SIZE), mode="bilinear", antialias=True)
        features = self.features(images)
        return self.structure_head(features), self.texture_head(features)


def train_factor_classifier(
    world: str = "mod", image_size: int = 32, num_images: int = 16_384, seed: int = 0
) -> tuple[FactorClassifier, dict[str, float]]:
    """Train on images of split "train", each seen once, and score on 4,096 images of split "test".

    The global random state is left as it was. On a CPU the result still varies slightly with the number of threads.

    Args:
        world: One of `freqgate_dit.shapes_textures.WORLDS`.
        image_size: Height and width of the images, at least 32.
        num_images: Number of training images, at least 128 (one batch); the training time is proportional to it.
        seed: Of the data, the initial weights and the augmentation.

    Returns:
        The classifier in evaluation mode and its held-out accuracies {"structure": ..., "texture": ...} in [0, 1].

    Raises:
        ValueError: if `num_images` is below 128, or from `ShapesTextures`.
    """
    if num_images < BATCH_SIZE:
        raise ValueError(f"num_images is {num_images}; pass at least {BATCH_SIZE}, one batch.")
    data = ShapesTextures(num_images, image_size, world, split="train", seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = FactorClassifier()
        _fit(classifier, data)
    classifier.world = world
    test = ShapesTextures(TEST_IMAGES, image_size, world, split="test", seed=seed)
    structures, textures = factors_of(test.labels(range(len(test))))
    return classifier, factor_accuracy(classifier, scaled(test.images(range(len(test)))), structures, textures)


@torch.no_grad()
def factor_accuracy(
    classifier: FactorClassifier, images: torch.Tensor, structures: torch.Tensor, textures: torch.Tensor
) -> dict[str, float]:
    """Fraction of images in which each factor is recognised.

    Args:
        classifier: In evaluation mode; images are moved to its device in batches.
        images: Floating point (B, 3, H, W) in [-1, 1], B at least 1.
        structures: Integer (B,), the expected structures in 0..7.
        textures: Integer (B,), the expected textures in 0..7.

    Returns:
        {"structure": ..., "texture": ...}, each in [0, 1].

    Raises:
        ValueError: if the three first dimensions differ or are 0.
    """
    if not len(images) or len(structures) != len(images) or len(textures) != len(images):
        raise ValueError(
            f"images, structures and textures have lengths {len(images)}, {len(structures)} and {len(textures)}; "
            "pass one structure and one texture for each of at least one image."
        )
    device = next(classifier.parameters()).device
    correct = torch.zeros(2, dtype=torch.int64)
    for batch in torch.arange(len(images)).split(512):
        logits = classifier(images[batch].to(device))
        for factor, expected in enumerate((structures, textures)):
            correct[factor] += (logits[factor].argmax(-1).cpu() == expected[batch].cpu()).sum()
    return {"structure": int(correct[0]) / len(images), "texture": int(correct[1]) / len(images)}


def _convolution(inputs: int, outputs: int, kernel_size: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.SiLU(),
    )


@torch.enable_grad()
def _fit(classifier: FactorClassifier, data: ShapesTextures) -> None:
    """Train in one pass over `data`, with the global random state; leaves the classifier in evaluation mode."""
    steps = len(data) // BATCH_SIZE
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.15)
    classifier.train()
    for step in tqdm(range(steps), desc="training the judge of structure and texture", unit="batch", leave=False):
        batch = range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)
        structures, textures = factors_of(data.labels(batch))
        images = _augmented(scaled(data.images(batch)))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16_is_fast(torch.device("cpu"))):
            loss = _cross_entropies(classifier(images), structures, textures)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    classifier.eval()


def _cross_entropies(logits: tuple, structures: torch.Tensor, textures: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[0], structures) + F.cross_entropy(logits[1], textures)


def _augmented(images: torch.Tensor) -> torch.Tensor:
    """Images as a half-trained model would make them: a random share of blur, then noise of random strength."""
    shape = (len(images), 1, 1, 1)
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    images = images.lerp(blurred, 0.5 * torch.rand(shape))
    return images + 0.15 * torch.rand(shape) * torch.randn_like(images)


def scaled(images: torch.Tensor) -> torch.Tensor:
    """uint8 images as floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def factors_of(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Structure and texture of labels of the built-in data."""
    return labels // len(TEXTURES), labels % len(TEXTURES)


def label_of(structures: torch.Tensor, textures: torch.Tensor) -> torch.Tensor:
    """The inverse of `factors_of`."""
    return structures * len(TEXTURES) + textures


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the factor classifier and print its held-out accuracies.")
    parser.add_argument("--world", choices=WORLDS, default="mod")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--num_images", type=int, default=16_384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=user_path, help="JSON file for the settings, accuracies and seconds")
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in ("world", "image_size", "num_images", "seed")}
    start = time.perf_counter()
    _, accuracy = train_factor_classifier(**settings)
    result = {**settings, "test_images": TEST_IMAGES, "accuracy": accuracy, "seconds": time.perf_counter() - start}
    print(json.dumps(result))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
