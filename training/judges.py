"""The judge of the built-in data, trained once on a machine and kept: training it takes longer than using it.

One file for each world and image size in `cache_dir/judges`, whose name has a digest of the code that made it: another
version of that code trains its own.
"""

import inspect
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from freqgate_dit import shapes_textures, spectral
from freqgate_dit.features import CACHE_DIR
from freqgate_dit.files import cache_folder, digest, make_cache_folder, replace_file
from freqgate_dit.training import factor_classifier
from freqgate_dit.training.factor_classifier import FactorClassifier, train_factor_classifier


def factor_judge(
    world: str, image_size: int, cache_dir: str | Path = CACHE_DIR
) -> tuple[FactorClassifier, dict[str, float]]:
    """A judge of what an image shows, in evaluation mode, and its accuracies on held-out real images:
    `train_factor_classifier`, or what that gave before. A file that is damaged is made again.

    Raises:
        OSError: if `cache_dir` cannot be written to; before anything is trained.
    """
    path = cache_folder(cache_dir, "judges", f"{world}_{image_size}_{_digest_of_code()}.safetensors")
    judge = FactorClassifier()
    try:
        with safe_open(path, "pt") as file:
            judge.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
            accuracy = json.loads(file.metadata()["accuracy"])
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError):  # absent or damaged
        make_cache_folder(path.parent)
        judge, accuracy = train_factor_classifier(world=world, image_size=image_size)
        metadata = {"accuracy": json.dumps(accuracy)}
        content = save(judge.state_dict(), metadata)  # as bytes, as `save_file` makes files that others cannot read
        replace_file(path, lambda temporary: temporary.write_bytes(content))
    judge.world = world
    return judge.eval(), accuracy


def _digest_of_code() -> str:
    modules = (spectral, shapes_textures, factor_classifier)
    return digest([inspect.getsource(module) for module in modules])[:12]
