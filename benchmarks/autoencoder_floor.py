"""Frechet distance of an autoencoder's reconstructions: what no model on its latents can get below but by chance.

    python benchmarks/autoencoder_floor.py --vae ../shared/weights/taesdxl \\
        --features ../shared/weights/inception_mixed7.py:load --dataset '../shared/data/afhq_cat128_*.parquet' \\
        --resolution 128 --heldout_per_class 1700 --out results/autoencoder_floor_taesdxl.json

The floor of `training/evaluation.py --floors`, for the held-out images of a data set and without a pipeline. Features
are cached, so that interrupted work goes on.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoModel
from output import write_result

from freqgate_dit.features import CACHE_DIR, load_extractor
from freqgate_dit.metrics import frechet_distance, kernel_distance
from freqgate_dit.references import reference_statistics
from freqgate_dit.training.data import DataConfig, load_images
from freqgate_dit.training.generation import weights_digest
from freqgate_dit.training.hardware import use_all_cores
from freqgate_dit.training.references import Reconstructed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", required=True, type=Path, help="folder of an autoencoder")
    parser.add_argument("--features", default="inception", help="as `training/evaluation.py` takes it")
    parser.add_argument("--dataset", required=True, help="as the trainer takes it")
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--heldout_per_class", type=int, required=True)
    parser.add_argument("--cpu_threads", type=int, help="by default all cores")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    use_all_cores(arguments.cpu_threads)
    data = DataConfig(
        dataset=arguments.dataset, resolution=arguments.resolution, heldout_per_class=arguments.heldout_per_class
    )
    _, heldout = load_images(data)
    vae = AutoModel.from_pretrained(str(arguments.vae), dtype=torch.float32).eval()
    vae.to(memory_format=torch.channels_last)
    extractor = load_extractor(arguments.features)
    real = reference_statistics(heldout, extractor, "heldout", CACHE_DIR)
    images = Reconstructed(heldout, vae, weights_digest(arguments.vae))
    reconstructed = reference_statistics(images, extractor, "heldout, reconstructed", CACHE_DIR)
    result = {
        **extractor.describe(),
        "vae": arguments.vae.name,
        "dataset": Path(arguments.dataset).name,
        "images": len(heldout),
        "frechet": frechet_distance(real.statistics(), reconstructed.statistics()),
        "kernel_1e3": 1e3 * kernel_distance(real.features, reconstructed.features).value,
        "torch": torch.__version__,
    }
    print(f"fd_{extractor.name}_{len(heldout)}_reconstructed_vs_heldout {result['frechet']:.4f}")
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
