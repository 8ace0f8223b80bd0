"""How right are the samples of a comparison's models of the built-in data? By the classifier and sampler of the demo.

python benchmarks/demo_accuracy.py --comparison runs/compare_demo --out results/demo_accuracy.json

Goes on where it was cut off. Per run: shares of samples whose structure and whose texture are right, unguided and with
guidance; held-out error; and the time of training, by its median images/s. Per arm: paired differences of the unguided
share (mean of structure and texture) to the comparison's baseline, in percentage points.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from output import write_result

from freqgate_dit import FreqGateDiTPipeline
from freqgate_dit.devices import choose_dtype
from freqgate_dit.files import digest, read_json
from freqgate_dit.model_card import table
from freqgate_dit.shapes_textures import NUM_CLASSES
from freqgate_dit.statistics import paired_difference
from freqgate_dit.training.config import load_yaml
from freqgate_dit.training.decisions import FACTORS
from freqgate_dit.training.demo import STEPS, sample, score
from freqgate_dit.training.factor_classifier import train_factor_classifier
from freqgate_dit.training.generation import weights_digest
from freqgate_dit.training.hardware import use_all_cores
from freqgate_dit.training.paired import read_run


def measure(run: Path, classifier, options: argparse.Namespace, weights: str, dtype: torch.dtype) -> dict:
    pipe = FreqGateDiTPipeline.from_pretrained(run / "pipeline", dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    labels = list(range(NUM_CLASSES)) * options.images_per_class
    start = time.perf_counter()
    found = {
        name: score(classifier, sample(pipe, labels, scale, steps=options.steps), labels)
        for name, scale in scales(options).items()
    }
    found["sampling_seconds"] = round(time.perf_counter() - start, 1)
    trained = read_run(run, weights, evaluated=False)
    settings = load_yaml(run / "config.yaml")
    images = settings["max_steps"] * settings["per_device_batch_size"] * settings["gradient_accumulation_steps"]
    found["training_seconds"] = round(images / trained["images_per_second"], 1)
    found["held_out_error"] = trained["loss"][-1]
    return found


def scales(options: argparse.Namespace) -> dict[str, float]:
    guided = {f"guidance {options.guidance_scale:g}": options.guidance_scale} if options.guidance_scale != 1 else {}
    return {"unguided": 1.0, **guided}


def unguided(runs: dict[int, dict]) -> np.ndarray:
    """Percentage of right samples `(seeds,)`, mean of structure and texture."""
    return np.array([100 * np.mean([runs[seed]["unguided"][factor] for factor in FACTORS]) for seed in sorted(runs)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--comparison", type=Path, required=True, help="folder of training/compare.py, with its report"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="1: unguided alone")
    parser.add_argument("--images_per_class", type=int, default=8)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the sampler (default: the demo's {STEPS})")
    parser.add_argument("--arms", nargs="+", help="some of the arms and the baseline (default: all)")
    options = parser.parse_args()
    use_all_cores()

    comparison = read_json(options.comparison / "comparison.json")
    for arm in options.arms or []:
        if arm not in comparison["arms"]:
            raise SystemExit(f"error: `--arms` has {arm!r}: choose some of {', '.join(comparison['arms'])}.")
    world = comparison["common"].get("world", "mod")
    classifier, real = train_factor_classifier(world=world, image_size=comparison["common"]["resolution"])
    dtype = choose_dtype("auto", torch.device("cpu"))
    cache = options.comparison / "accuracy"
    cache.mkdir(exist_ok=True)
    arms = {}
    for arm in comparison["arms"]:
        if options.arms and arm not in (*options.arms, comparison["baseline"]):
            continue
        arms[arm] = {}
        for seed in comparison["seeds"]:
            run = options.comparison / "runs" / f"{arm}_seed{seed}"
            asked = options.guidance_scale, options.images_per_class, options.steps, dtype
            file = cache / f"{run.name}_{digest(weights_digest(run / 'pipeline' / 'transformer'), *asked)[:12]}.json"
            if not file.is_file():
                print(f"sampling from {run.name}")
                file.write_text(json.dumps(measure(run, classifier, options, comparison["weights"], dtype)))
            arms[arm][seed] = read_json(file)

    baseline = unguided(arms[comparison["baseline"]])
    result = {
        "sampling": {
            "images": NUM_CLASSES * options.images_per_class,
            "steps": options.steps,
            "guidance": options.guidance_scale,
            "dtype": str(dtype),
        },
        "real": real,
        "baseline": comparison["baseline"],
        "arms": {
            arm: {
                "parameters": comparison["arms"][arm]["parameters"],
                "runs": runs,
                "difference_of_unguided_points": asdict(paired_difference(unguided(runs), baseline)),
            }
            for arm, runs in arms.items()
        },
    }
    write_result(result, options.out)
    rows = []
    for arm, runs in arms.items():
        row = [arm, f"{np.mean([run['held_out_error'] for run in runs.values()]):.4f}"]
        for kind in scales(options):
            row += [f"{100 * np.mean([run[kind][factor] for run in runs.values()]):.1f}" for factor in FACTORS]
        difference = result["arms"][arm]["difference_of_unguided_points"]
        row += [f"{difference['mean']:+.1f} [{difference['low']:+.1f}, {difference['high']:+.1f}]"]
        row += [f"{np.median([run['training_seconds'] for run in runs.values()]):.0f}"]
        rows.append(tuple(row))
    head = ("arm", "held-out error", *(f"{factor}, {kind} %" for kind in scales(options) for factor in FACTORS))
    print(table(rows, (*head, "unguided, difference", "training, s")))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
