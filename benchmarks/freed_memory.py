"""What keeping freed memory brings a training step on a CPU: the demo's trainer with and without, each in a process.

    python benchmarks/freed_memory.py --out results/freed_memory.json

Rounds go through both in turn, so that a busy machine slows both; the ratio is the median over rounds. Without: the
environment asks glibc for its own default, which `keep_freed_memory` then leaves alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from output import write_result
from tqdm.auto import tqdm

from freqgate_dit.training.logbook import JsonLines


ROOT = Path(__file__).resolve().parents[1]
# A variable that changes nothing (it is glibc's default) but is there. One of malloc's own limits would not do: glibc
# stops adapting them to the program once one is set.
WITHOUT = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}


def images_per_second(steps: int, cache_dir: str, environment: dict[str, str]) -> float:
    """Of the demo's trainer, after the first tenth of `steps`."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "config": ROOT / "training" / "configs" / "demo.yaml",
            "max_steps": steps,
            "log_every": steps // 10,
            "validate_every": steps,
            "preview_every": steps,
            "save_every": steps,
            "num_validation_images": 16,
            "num_previews": 1,
            "report_to": "none",
            "cache_dir": cache_dir,
            "output_dir": Path(folder) / "run",
        }
        command = [sys.executable, str(ROOT / "training" / "train.py")]
        command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True)
        speeds = JsonLines(Path(folder) / "run" / "metrics.jsonl", steps).series()["images_per_second"]
    return statistics.median(speed for _, speed in speeds[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--cache_dir", default="~/.cache/freqgate_dit")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    rounds = [
        {
            "kept": images_per_second(arguments.steps, arguments.cache_dir, {}),
            "given_back": images_per_second(arguments.steps, arguments.cache_dir, WITHOUT),
        }
        for _ in tqdm(range(arguments.rounds), unit="round")
    ]
    result = {
        "command": f"python benchmarks/freed_memory.py --rounds {arguments.rounds} --steps {arguments.steps}",
        "images_per_second": {name: statistics.median(row[name] for row in rounds) for name in rounds[0]},
        "faster_by": statistics.median(row["kept"] / row["given_back"] for row in rounds),
        "in_single_rounds": [row["kept"] / row["given_back"] for row in rounds],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result, indent=2))
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
