"""Seconds of a training step of arms of freq_grid.py, in turn, and their ratio to the last arm's.

    python benchmarks/freq_grid_speed.py --data cats64 --data_dir ../shared/data --out results/freq_grid_speed.json

On one thread of one process, whose own CPU time counts: a machine that other work shares slows all alike. With the
steps that each takes to an error (freq_grid_report.py) it gives the ratio of seconds to equal error. By default
Freq-Grid, the full grid, and diffusers' DiT in a plain loop.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from freq_grid import ARMS, DATA, Run, reset, words
from freq_grid_peer import DiffusersLoop
from output import print_table, write_result

from freqgate_dit.training.config import parse_config


def make_steps(options: argparse.Namespace) -> dict[str, tuple[Callable[[int], None], int]]:
    """By arm: what takes the step of a number, and its images."""
    steps = {}
    for arm in options.arms:
        reset()
        given = words(options.data, arm, 0, options, options.out / arm, max_steps=1, num_validation_images=8)
        run = Run(parse_config(given), budget=90e12)
        run.prepared_model.train()
        if arm == "diffusers":
            steps[arm] = DiffusersLoop(run, 0).step, run.global_batch_size
        else:
            steps[arm] = update(run), run.global_batch_size
    return steps


def update(run: Run) -> Callable[[int], None]:
    def step(index: int):
        run.step = index
        run.update(run.batches.draw(index))

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, required=True)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of the parquet files")
    parser.add_argument("--arms", nargs="+", default=["freq_grid", "full_grid", "diffusers"], choices=ARMS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of each arm in a round")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        file, options.out = options.out, Path(folder)  # of the runs
        arms = make_steps(options)
        for step, _ in arms.values():  # the first ones allocate
            step(0)
        rounds = []
        for number in range(options.rounds):
            seconds = {}
            for arm, (step, _) in arms.items():
                start = time.process_time()
                for index in range(options.steps):
                    step(1 + number * options.steps + index)
                seconds[arm] = (time.process_time() - start) / options.steps
            rounds.append(seconds)
    medians = {arm: statistics.median(one[arm] for one in rounds) for arm in arms}
    last = options.arms[-1]
    ratios = {arm: statistics.median(one[arm] / one[last] for one in rounds) for arm in arms}
    result = {
        "data": options.data,
        "images_per_step": {arm: images for arm, (_, images) in arms.items()},
        "cpu_seconds_per_step": medians,
        f"of_{last}": ratios,
        "rounds": rounds,
        "torch": torch.__version__,
    }
    rows = {arm: [f"{medians[arm]:.3f}", f"{ratios[arm]:.3f}"] for arm in arms}
    print_table("CPU seconds of a training step", ["seconds", f"of {last}"], rows, "arm")
    write_result(result, file)


if __name__ == "__main__":
    main()
