"""The four variants trained briefly on the built-in data, with identical data order, noise and validation.

    python benchmarks/short_runs.py --steps 300 --out results/short_runs_300.json

One seed and a short budget: this shows that all variants train, and says nothing about which is better.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from output import write_result

from freqgate_dit import VARIANTS
from freqgate_dit.cost import count_parameters, flops_per_forward
from freqgate_dit.training.config import parse_config
from freqgate_dit.training.logbook import JsonLines
from freqgate_dit.training.train import Trainer


PRESET = Path(__file__).resolve().parents[1] / "training" / "configs" / "demo.yaml"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache_dir", default="~/.cache/freqgate_dit")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()

    rows = {}
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            options = {
                "config": PRESET,
                "variant": variant,
                "max_steps": arguments.steps,
                "seed": arguments.seed,
                "output_dir": Path(folder) / "run",
                "cache_dir": arguments.cache_dir,
                "report_to": "none",
                "validate_every": max(1, arguments.steps // 3),
                "preview_every": arguments.steps,
                "save_every": arguments.steps,
            }
            trainer = Trainer(parse_config([f"--{name}={value}" for name, value in options.items()]))
            start = time.perf_counter()
            trainer.train()
            series = JsonLines(Path(folder) / "run" / "metrics.jsonl", arguments.steps).series()
        rows[variant] = {
            "parameters": count_parameters(trainer.model),
            "gflops_forward": flops_per_forward(trainer.model) / 1e9,
            "validation_loss": {name: dict(series[f"val_{name}/loss"]) for name in ("raw", "ema")},
            "seconds": time.perf_counter() - start,
        }
    result = {
        "preset": PRESET.name,
        "steps": arguments.steps,
        "seed": arguments.seed,
        "torch": torch.__version__,
        "variants": rows,
    }
    print(
        "\n| variant | parameters | GFLOPs | held-out loss, raw | averaged weights |\n| --- | --- | --- | --- | --- |"
    )
    for variant, row in rows.items():
        raw, ema = (list(row["validation_loss"][name].values())[-1] for name in ("raw", "ema"))
        print(f"| {variant} | {row['parameters'] / 1e6:.2f} M | {row['gflops_forward']:.2f} | {raw:.4f} | {ema:.4f} |")
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
