"""The same noise by several samplers, beside the network's accurate solution, as a picture.

    python benchmarks/sampler_picture.py --pipeline runs/mine/pipeline --out results/figures/samplers_mine.png

The pipeline's scheduler must have the spectrum of the data, as the trainer leaves it.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
from compared_samplers import compared_scheduler, steps_for
from samplers import ACCURATE, Network

from freqgate_dit.training.hardware import use_all_cores


SHOWN = ("Euler, trailing", "DPM-Solver++(2M), Lu", "spectral, own grid, 2nd order")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", type=Path, required=True, help="folder of a pipeline")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--evaluations", type=int, default=10, help="network evaluations; the last row takes 200")
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--cpu_threads", type=int, help="by default all cores")
    parser.add_argument("--out", type=Path, required=True, help="picture file")
    arguments = parser.parse_args()
    use_all_cores(arguments.cpu_threads)
    network = Network(arguments.pipeline, arguments.samples, arguments.samples)
    rows = [(name, arguments.evaluations) for name in SHOWN] + [(ACCURATE[0], 200)]
    figure, axes = plt.subplots(
        len(rows), arguments.samples, figsize=(1.2 * arguments.samples + 1.6, 1.2 * len(rows)), squeeze=False
    )
    for (name, count), places in zip(rows, axes, strict=True):
        scheduler = compared_scheduler(name, network.config, network.config["_spectrum"])
        latents = network.sample(scheduler, steps_for(name, count), arguments.guidance_scale)
        for image, place in zip(network.pictures(latents).permute(0, 2, 3, 1), places, strict=True):
            place.imshow(image)
            place.set(xticks=[], yticks=[])
        label = f"{name.replace(', ', ',' + chr(10))}\n{count} evaluations"
        places[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    figure.tight_layout(pad=0.3)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=110)


if __name__ == "__main__":
    main()
