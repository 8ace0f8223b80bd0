"""Sampling speed with Freq-Grid against the full grid of the same pipeline, in turn, in one process.

    python benchmarks/freq_grid_sampling.py --pipeline runs/mine/pipeline --out results/freq_grid_sampling.json

The full grid is the same weights with switches that are never reached. Speed does not depend on what the weights are,
so a run of one step will do. Rounds alternate; what counts is the median of the ratios of neighbours.
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch
from output import print_table, write_result

from freqgate_dit import FreqGateDiTPipeline


def images_per_second(pipe: FreqGateDiTPipeline, options: argparse.Namespace) -> float:
    labels = None if pipe.num_classes is None else [i % pipe.num_classes for i in range(options.images)]
    count = {"num_images_per_label": options.images} if labels is None else {}
    scale = options.guidance_scale if pipe.has_null_condition else 1
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
        pipe(labels, num_inference_steps=options.steps, guidance_scale=scale, seed=0, output_type="np", **count)
    return options.images / (time.perf_counter() - start)


def measure(folder: Path, options: argparse.Namespace) -> dict:
    pipe = FreqGateDiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    switches = pipe.transformer.spectrum.switches
    own, never = switches.clone(), torch.full_like(switches, -torch.inf)
    pipe.scheduler.set_timesteps(options.steps)
    views = pipe.transformer.views_of(pipe.scheduler.timesteps).bincount(minlength=len(own) + 1).tolist()
    speeds = {"views": [], "full grid": []}
    for round_ in range(options.rounds + 1):
        for name, values in (("views", own), ("full grid", never)):
            switches.copy_(values)
            speed = images_per_second(pipe, options)
            if round_:  # the first one warms up
                speeds[name].append(speed)
    config = pipe.transformer.config
    return {
        "size": config.sample_size,
        "patch_size": config.patch_size,
        "evaluations_per_view": views,
        "guided": pipe.has_null_condition and options.guidance_scale != 1,
        "images_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "ratio": statistics.median(a / b for a, b in zip(speeds["views"], speeds["full grid"])),
        "rounds": speeds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, nargs="+", required=True, help="pipeline folders with views")
    parser.add_argument("--images", type=int, default=16, help="of a call")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="autocast, as `freqgate-dit sample` does where it is fast")
    parser.add_argument("--cpu_threads", type=int)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    if options.cpu_threads:
        torch.set_num_threads(options.cpu_threads)
    results = [measure(folder, options) for folder in options.pipeline]
    rows = {
        f"{one['size']} px": [
            " + ".join(map(str, one["evaluations_per_view"])),
            *(f"{speed:.2f}" for speed in one["images_per_second"].values()),
            f"{one['ratio']:.2f}",
        ]
        for one in results
    }
    print_table(
        f"{options.steps} steps, {options.images} images",
        ["evaluations per view", "images/s with views", "full grid", "ratio"],
        rows,
        "samples of",
    )
    settings = {name: getattr(options, name) for name in ("images", "steps", "guidance_scale", "bf16", "cpu_threads")}
    versions = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
    write_result({**settings, **versions, "pipelines": results}, options.out)


if __name__ == "__main__":
    main()
