"""Time and memory of the metrics at the sizes of published numbers.

    python benchmarks/metrics_memory.py --out results/metrics_memory.json

Features are random, float32, in memory once as an evaluation holds them; each metric runs in a process of its own, so
that its peak is its own.
"""

import argparse
import multiprocessing
import resource
import time
from pathlib import Path

import torch
from output import write_result

from freqgate_dit.metrics import (
    FeatureStatistics,
    density_coverage,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from freqgate_dit.training.hardware import use_all_cores


METRICS = {
    "Frechet distance": lambda real, fake: frechet_distance(FeatureStatistics.of(real), FeatureStatistics.of(fake)),
    "kernel distance": kernel_distance,
    "precision and recall": precision_recall,
    "density and coverage": density_coverage,
}


def measure(name: str, images: int, width: int, threads: int | None) -> dict:
    use_all_cores(threads)
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(images, width, generator=generator) for _ in range(2))
    start = time.perf_counter()
    METRICS[name](real, fake)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"images": images, "width": width, "seconds": round(seconds, 1), "peak_gib": round(peak, 3)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--images", type=int, default=50_000, help="for the Frechet distance")
    parser.add_argument("--images_of_pairs", type=int, default=10_000, help="for what compares all pairs")
    parser.add_argument("--cpu_threads", type=int, help="by default all cores")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    result = {"torch": torch.__version__, "metrics": {}}
    print("| metric | images of each kind | seconds | peak memory of the process, GiB |\n| --- | --- | --- | --- |")
    for name in METRICS:
        images = arguments.images if name == "Frechet distance" else arguments.images_of_pairs
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(measure, (name, images, arguments.width, arguments.cpu_threads))
        result["metrics"][name] = row
        print(f"| {name} | {images:,} x {arguments.width} | {row['seconds']} | {row['peak_gib']} |", flush=True)
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
