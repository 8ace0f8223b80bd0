"""The two judges of the built-in data, trained once on a machine and kept: training them takes longer than using them.

One file each in `cache_dir/judges`, named by its world, its image size, and the code that made it: another version of
that code trains its own.
"""

import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from freqgate_dit import shapes_textures, spectral
from freqgate_dit.features import CACHE_DIR
from freqgate_dit.files import digest, replace_file
from freqgate_dit.training import factor_classifier, information
from freqgate_dit.training.factor_classifier import FactorClassifier, train_factor_classifier
from freqgate_dit.training.information import NoiseClassifier, train_noise_classifier


def factor_judge(
    world: str, image_size: int, cache_dir: str | Path = CACHE_DIR
) -> tuple[FactorClassifier, dict[str, float]]:
    """A judge of what an image shows, and its accuracies on held-out real images: `train_factor_classifier`, or what
    that gave before.

    Raises:
        OSError: if `cache_dir` cannot be written to; before anything is trained.
    """
    judge, accuracy = _kept(FactorClassifier(), train_factor_classifier, world, image_size, cache_dir)
    judge.world = world
    return judge, accuracy


def noise_judge(world: str, image_size: int, cache_dir: str | Path = CACHE_DIR) -> NoiseClassifier:
    """A judge of what a noisy image tells: `train_noise_classifier`, or what that gave before.

    Raises:
        OSError: if `cache_dir` cannot be written to; before anything is trained.
    """

    def train(world: str, image_size: int) -> tuple[NoiseClassifier, dict[str, float]]:
        return train_noise_classifier(world, image_size), {}

    return _kept(NoiseClassifier(), train, world, image_size, cache_dir)[0]


def _kept(
    judge: nn.Module, train: Callable, world: str, image_size: int, cache_dir: str | Path
) -> tuple[nn.Module, dict[str, float]]:
    """The judge that is kept, in evaluation mode, with its accuracies; a file that is damaged is made again."""
    folder = Path(cache_dir).expanduser() / "judges"
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"`cache_dir` ({cache_dir}) cannot be written to: choose another.")
    path = folder / f"{type(judge).__name__}_{world}_{image_size}_{_digest_of_code()}.safetensors"
    try:
        with safe_open(path, "pt") as file:
            judge.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
            return judge.eval(), json.loads(file.metadata()["accuracy"])
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError):  # absent or damaged
        judge, accuracy = train(world=world, image_size=image_size)
    metadata = {"accuracy": json.dumps(accuracy)}
    content = save(judge.state_dict(), metadata)  # as bytes, as `save_file` makes files that others cannot read
    replace_file(path, lambda temporary: temporary.write_bytes(content))
    return judge, accuracy


def _digest_of_code() -> str:
    modules = (spectral, shapes_textures, factor_classifier, information)
    return digest([inspect.getsource(module) for module in modules])[:12]
