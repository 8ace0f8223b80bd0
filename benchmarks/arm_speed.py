"""Training speed of the arms of a comparison, in one process: rounds go through all of them in turn.

python benchmarks/arm_speed.py --config training/configs/compare_parts.yaml --out results/arm_speed_parts.json

A machine that is busy for a while slows all arms alike; what counts is the median over rounds of an arm's time over
the baseline's in the same round. The images/s are those of the fastest round.
"""

import argparse
import contextlib
import dataclasses
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from output import print_table, write_result

from freqgate_dit.cost import count_parameters, flops_per_forward
from freqgate_dit.training.compare import load_comparison, matched, only
from freqgate_dit.training.config import parse_config
from freqgate_dit.training.hardware import wait_for
from freqgate_dit.training.matching import ModelSizes
from freqgate_dit.training.train import Trainer


# What costs no step and takes long to make.
SMALL = {"num_images": 640, "num_validation_images": 8, "report_to": "none"}


def make_trainers(config: Path, arms: list[str] | None, folder: Path) -> tuple[str, dict[str, Trainer]]:
    """The comparison's baseline, and a run of each arm that is ready to take a step."""
    comparison = load_comparison(config)
    if arms:
        comparison = only(comparison, arms)
    comparison = matched(comparison, ModelSizes(comparison.config(comparison.baseline)))
    comparison = dataclasses.replace(
        comparison, common={**comparison.common, **SMALL, "cache_dir": str(folder / "cache")}
    )
    trainers = {}
    for arm in comparison.arms:
        words = comparison.arguments(arm, comparison.seeds[0], folder / arm)
        with contextlib.redirect_stdout(sys.stderr):
            trainers[arm] = Trainer(parse_config(words))
        trainers[arm].prepared_model.train()
    return comparison.baseline, trainers


def seconds_per_step(trainer: Trainer, first: int, steps: int) -> float:
    start = time.perf_counter()
    for index in range(first, first + steps):
        trainer.step = index
        trainer.update(trainer.batches.draw(index))
    wait_for(trainer.device)
    return (time.perf_counter() - start) / steps


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of a comparison on the built-in data")
    parser.add_argument("--arms", nargs="+", help="some of its arms (default: all)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="of each arm in a round")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        baseline, trainers = make_trainers(options.config, options.arms, Path(folder))
        for trainer in trainers.values():  # the first steps allocate
            seconds_per_step(trainer, 0, 3)
        rounds = [
            {name: seconds_per_step(one, 3 + index * options.steps, options.steps) for name, one in trainers.items()}
            for index in range(options.rounds)
        ]
        first = trainers[baseline]
        arms = {
            name: {
                "parameters": count_parameters(trainer.model),
                "flops_per_forward": flops_per_forward(trainer.model),
                "time_of_baseline": statistics.median(times[name] / times[baseline] for times in rounds),
                "images_per_second": trainer.global_batch_size / min(times[name] for times in rounds),
            }
            for name, trainer in trainers.items()
        }
        result = {
            "config": options.config.name,
            "baseline": baseline,
            "arms": arms,
            "seconds_per_step": rounds,
            "mixed_precision": first.accelerator.mixed_precision,
            "batch_size": first.global_batch_size,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "torch": torch.__version__,
        }
    rows = {
        name: [f"{arm['parameters'] / 1e6:.2f} M", f"{arm['time_of_baseline']:.3f}", f"{arm['images_per_second']:.0f}"]
        for name, arm in arms.items()
    }
    print_table(f"Training, batches of {first.global_batch_size}", ["parameters", "time", "images/s"], rows, "arm")
    write_result(result, options.out)


if __name__ == "__main__":
    main()
