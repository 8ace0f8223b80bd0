"""Many small images: what checking, caching and drawing them costs, each stage in a process of its own.

    python benchmarks/latent_cache.py --out results/latent_cache_100k.json

Makes a temporary folder of JPEGs in ten classes, then does what the trainer does: check and fingerprint every file,
again with the index, write the pixel cache, open it, draw batches. The files were just written, so the system has them
in memory; a cold disk adds its own time. `peak` is the most that the stage's process held; `private` is what it holds
at the end without the pages of mapped files (libraries, the cache), which processes share and the system takes back.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
import safetensors
import torch
from output import write_result
from PIL import Image

from freqgate_dit.training.batches import Batches
from freqgate_dit.training.data import DataConfig, load_images
from freqgate_dit.training.latents import LatentCache


NUM_CLASSES, SIDE = 10, 64
NUM_BATCHES, BATCH_SIZE = 200, 128
ROOT = Path(__file__).resolve().parents[1]


def make_images(folder: Path, count: int) -> None:
    """Gratings, each of its own frequency, direction and colour."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    for index in range(count):
        label = index % NUM_CLASSES
        wave = np.cos(2 * np.pi * ((1 + label) * x + (index % 97) / 10 * y))
        colour = np.array([index % 251, index % 241, index % 239]) / 255
        file = folder / "images" / f"class_{label}" / f"{index:07d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((127.5 + 127.5 * wave[..., None] * colour).astype(np.uint8)).save(file, quality=90)


def memory() -> dict[str, float]:
    """MiB that this process held at most, and what is its own now."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(status[key].split()[0]) / 1024 for name, key in (("peak", "VmHWM"), ("private", "RssAnon"))}


def timed(function, values=(None,)) -> float:
    """Seconds to call `function` with each of `values`; what it returns is dropped, as a training step does."""
    start = time.perf_counter()
    for value in values:
        function(value)
    return time.perf_counter() - start


def run_stage(stage: str, folder: Path) -> dict[str, float]:
    """Seconds of the stage itself, and memory after it."""
    if stage == "start":
        return {"seconds": 0.0, **memory()}
    config = DataConfig(dataset=str(folder / "images"), resolution=SIDE, horizontal_flip=True, heldout_fraction=0.0)
    if stage in ("first index", "second index"):
        return {"seconds": timed(lambda _: load_images(config, folder / "cache")), **memory()}
    cache = LatentCache(load_images(config, folder / "cache")[0], None, True, folder / "cache")
    if stage == "encode":
        return {"seconds": timed(lambda _: cache.encode("cpu")), **memory()}
    if stage == "open":
        return {"seconds": timed(lambda _: cache.load("cpu")), **memory()}
    data = cache.load("cpu", resident=stage.endswith("resident"))
    if stage.startswith("gather"):
        indices, flip = torch.randint(len(data), (NUM_BATCHES, BATCH_SIZE)), torch.rand(BATCH_SIZE)
        return {"seconds": timed(lambda part: data.draw(part, flip, None), indices), **memory()}
    batches = Batches(data, BATCH_SIZE, seed=0)
    return {"seconds": timed(batches.draw, range(NUM_BATCHES)), **memory()}


STAGES = {
    "start": "nothing: imports alone",
    "first index": "check and fingerprint every file",
    "second index": "the same with the index",
    "encode": "write the pixel cache",
    "open": "open the cache",
    "batches mapped": f"{NUM_BATCHES} batches of {BATCH_SIZE}, with noise",
    "batches resident": "the same from memory",
    "gather mapped": f"{NUM_BATCHES} x {BATCH_SIZE} images, without noise",
    "gather resident": "the same from memory",
}


def measure(stage: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--stage", stage, "--folder", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="number of images")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(run_stage(arguments.stage, arguments.folder)))
        return

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_images(folder, arguments.count)
        stages = {}
        print(f"{'stage':<18} {'seconds':>8} {'peak MiB':>9} {'private':>8}")
        for stage, what in STAGES.items():
            stages[stage] = values = measure(stage, folder)
            print(f"{stage:<18} {values['seconds']:8.2f} {values['peak']:9.0f} {values['private']:8.0f}  {what}")
        index_bytes, cache_bytes = (
            sum(file.stat().st_size for file in (folder / "cache").rglob(pattern))
            for pattern in ("index/*.json", "*.safetensors")
        )
    result = {
        "command": f"python benchmarks/latent_cache.py --count {arguments.count}",
        "images": arguments.count,
        "side": SIDE,
        "unit": {"seconds": "s", "peak": "MiB", "private": "MiB"},
        "stages": {name: {key: round(value, 3) for key, value in values.items()} for name, values in stages.items()},
        "mapped_over_resident": round(stages["gather mapped"]["seconds"] / stages["gather resident"]["seconds"], 3),
        "index_mib": round(index_bytes / 2**20, 1),
        "cache_mib": round(cache_bytes / 2**20, 1),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "safetensors": safetensors.__version__,
    }
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
