"""What a training run reached, as JSON: its settings, validation losses and speed.

python benchmarks/summarise_run.py runs/mine --out results/mine.json
"""

import argparse
import platform
import statistics
from pathlib import Path

import torch
import yaml
from output import write_result

from freqgate_dit.training.logbook import JsonLines


# Settings that say where things lie on one machine, and nothing about the result.
LOCAL = ("output_dir", "cache_dir", "resume", "dry_run")


def seconds_of_steps(rates: list[tuple[int, float]], settings: dict) -> dict[int, int]:
    """Step -> seconds of the training steps up to it, in a run of one process, at every validation."""
    images, seconds, before, known = settings["per_device_batch_size"], 0.0, 0, {}
    for step, rate in rates:
        seconds += (step - before) * images * settings["gradient_accumulation_steps"] / rate
        before = step
        if step % settings["validate_every"] == 0:
            known[step] = round(seconds)
    return known


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="output_dir of the run")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args()

    settings = yaml.safe_load((arguments.run / "config.yaml").read_text())
    series = JsonLines(arguments.run / "metrics.jsonl", step=2**62).series()
    result = {
        "settings": {name: value for name, value in settings.items() if name not in LOCAL},
        "validation": {name: dict(values) for name, values in series.items() if name.startswith("val_")},
        "seconds": seconds_of_steps(series["images_per_second"], settings),
        "images_per_second_median": statistics.median(value for _, value in series["images_per_second"]),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {settings.get('cpu_threads') or torch.get_num_threads()} threads",
    }
    # A path says where data lay on one machine; its last part says what it was.
    for name in ("dataset", "vae", "text_encoder", "tokenizer"):
        if settings[name] and "/" in settings[name]:
            result["settings"][name] = Path(settings[name]).name
    write_result(result, arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
