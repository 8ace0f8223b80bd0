"""Compare recipes fairly: every arm with every seed, on the same data, noise and number of steps.

    python training/compare.py --config training/configs/compare_variants.yaml --out runs/compare_variants

The file names the arms (options of training/train.py that differ), what they share, the seeds and the baseline. Runs
go into `--out`/runs; what is finished is kept, what was cut off resumes. A seed fixes the order of the data, noise,
timesteps and dropped labels of all arms alike, and all are validated on the same noisy images: differences are paired.
Written: `comparison.json` (all numbers), `comparison.md` (the table), `curves.png`, `forest.png`. A difference in
held-out error is no difference in images.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from tqdm import tqdm

from freqgate_dit import __version__, plots
from freqgate_dit.files import write_text
from freqgate_dit.model_card import table
from freqgate_dit.statistics import holm, paired_difference
from freqgate_dit.summary import read_summary
from freqgate_dit.training.checkpoints import checkpoint_folders
from freqgate_dit.training.config import parse_config


# With others, held-out errors are not of the same thing.
SHARED = (
    "dataset world resolution num_images heldout_per_class vae prediction_type num_train_timesteps beta_schedule "
    "beta_start beta_end num_validation_images condition max_steps num_epochs per_device_batch_size "
    "gradient_accumulation_steps validate_every seed output_dir"
).split()


@dataclass(frozen=True)
class Comparison:
    """What a comparison's YAML file says.

    Args:
        baseline: name of the arm that the others are compared with.
        seeds: of training, at least 2.
        common: options of the trainer that all arms share.
        arms: name -> options of the trainer that only this arm has.
        weights: which held-out errors count: "ema", of the averaged weights, or "raw".
    """

    baseline: str
    seeds: list[int]
    common: dict
    arms: dict[str, dict]
    weights: str = "ema"

    def __post_init__(self):
        if len(set(self.seeds)) < max(2, len(self.seeds)):
            raise ValueError(f"`seeds` ({self.seeds}) must be at least 2 different numbers.")
        if len(self.arms) < 2 or self.baseline not in self.arms:
            raise ValueError(f"`baseline` ({self.baseline!r}) must be one of at least 2 `arms` ({list(self.arms)}).")
        if self.weights not in ("ema", "raw"):
            raise ValueError(f"`weights` ({self.weights!r}) must be ema or raw.")
        for arm, options in self.arms.items():
            if not arm.replace("_", "").isalnum():
                raise ValueError(f"`arms` has {arm!r}: use letters, digits and underscores, it becomes a folder.")
            for name in SHARED:
                if name in options:
                    raise ValueError(f"`arms` has `{name}` in {arm!r}; that must be the same for all: use `common`.")
        for name in ("seed", "output_dir"):
            if name in self.common:
                raise ValueError(f"`common` has `{name}`, which the comparison sets itself.")

    def arguments(self, arm: str, seed: int, folder: Path) -> list[str]:
        """The trainer's command line for one run in `folder`."""
        options = {**self.common, **self.arms[arm], "seed": seed, "output_dir": folder}
        words = []
        for name, value in options.items():
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *("none" if value is None else str(value) for value in values)]
        return words


def load_comparison(path: Path) -> Comparison:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Comparison(**values)
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(
            f"`--config` ({path}) must hold baseline, seeds, common, arms and perhaps weights: {error}."
        ) from error


# -- running ----------------------------------------------------------------------------------------------------------


def last_validation(folder: Path) -> dict | None:
    path = folder / "validation.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return json.loads(lines[-1]) if lines else None


def is_finished(folder: Path, steps: int) -> bool:
    last = last_validation(folder)
    return last is not None and last["step"] == steps and (folder / "pipeline" / "model_index.json").is_file()


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def run_all(runs: dict[tuple[str, int], tuple[list[str], Path]], parallel: int):
    """Train what is not finished, `parallel` runs at a time; what each prints goes into a file beside its folder."""
    waiting = {}
    for key, (arguments, folder) in runs.items():
        if not is_finished(folder, parse_config(arguments).train.max_steps):
            waiting[key] = arguments, folder
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs were finished before")
    running = {}
    progress = tqdm(total=len(waiting), desc="training", unit="run")
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                key = next(iter(waiting))
                arguments, folder = waiting.pop(key)
                if checkpoint_folders(folder / "checkpoints"):
                    arguments = [*arguments, "--resume", "latest"]
                elif folder.exists():
                    shutil.rmtree(folder)  # cut off before its first checkpoint: there is nothing to go on from
                folder.parent.mkdir(parents=True, exist_ok=True)
                command = [sys.executable, "-m", "freqgate_dit.training.train", *arguments]
                with open(log_of(folder), "a", encoding="utf-8") as log:
                    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=dict(os.environ))
                running[key] = process, folder
            for key, (process, folder) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[key]
                if process.returncode:
                    said = log_of(folder).read_text(encoding="utf-8").splitlines()[-1:]
                    raise RuntimeError(
                        f"{key[0]} with seed {key[1]} ended with status {process.returncode}: {''.join(said)} (more "
                        f"in {log_of(folder)}). The same command goes on where it stopped."
                    )
                progress.update()
            time.sleep(0.2)
    finally:
        progress.close()
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()


# -- results ----------------------------------------------------------------------------------------------------------


def read_run(folder: Path, weights: str) -> dict:
    """Held-out errors of a run by step: "steps", "loss" `(S,)`, "bands", "loss_by_band" `(S, bands)`; its speed."""
    records = [json.loads(line) for line in (folder / "validation.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = [record.get(weights) or record["raw"] for record in records]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "steps": [record["step"] for record in records],
        "loss": [values["loss"] for values in measured],
        "bands": measured[0]["bands"],
        "loss_by_band": [values["loss_by_band"] for values in measured],
        "images_per_second": float(
            np.median([line["images_per_second"] for line in metrics if "images_per_second" in line] or [np.nan])
        ),
    }


def relative_difference(arm: np.ndarray, baseline: np.ndarray) -> dict:
    """Paired differences in percent of the baseline's mean, over seeds."""
    scale = 100 / baseline.mean()
    return asdict(paired_difference(arm * scale, baseline * scale))


def summarise(comparison: Comparison, folders: dict[tuple[str, int], Path]) -> dict:
    """All numbers of finished runs, ready for JSON."""
    runs = {key: read_run(folder, comparison.weights) for key, folder in folders.items()}
    steps = runs[comparison.baseline, comparison.seeds[0]]["steps"]
    bands = runs[comparison.baseline, comparison.seeds[0]]["bands"]

    def losses(arm: str) -> np.ndarray:  # (seeds, S)
        return np.array([runs[arm, seed]["loss"] for seed in comparison.seeds])

    def losses_by_band(arm: str) -> np.ndarray:  # (seeds, bands), at the end
        return np.array([runs[arm, seed]["loss_by_band"][-1] for seed in comparison.seeds])

    arms = {}
    for arm in comparison.arms:
        model = read_summary(folders[arm, comparison.seeds[0]] / "pipeline")
        arms[arm] = {
            "options": comparison.arms[arm],
            "parameters": model.parameters,
            "flops": model.flops,
            "images_per_second": float(np.median([runs[arm, seed]["images_per_second"] for seed in comparison.seeds])),
            "loss": losses(arm).tolist(),
            "loss_mean": losses(arm)[:, -1].mean(),
            "loss_std": losses(arm)[:, -1].std(ddof=1),
        }
        if arm != comparison.baseline:
            base = losses(comparison.baseline)
            arms[arm] |= {
                "difference_percent": relative_difference(losses(arm)[:, -1], base[:, -1]),
                "difference_percent_by_step": [
                    relative_difference(losses(arm)[:, index], base[:, index]) for index in range(len(steps))
                ],
                "difference_percent_by_band": {
                    band: relative_difference(
                        losses_by_band(arm)[:, index], losses_by_band(comparison.baseline)[:, index]
                    )
                    for index, band in enumerate(bands)
                },
            }
    others = [arm for arm in arms if arm != comparison.baseline]
    adjusted = holm([arms[arm]["difference_percent"]["p_two_sided"] for arm in others])
    for arm, p in zip(others, adjusted):
        arms[arm]["p_holm"] = p
    versions = {"freqgate_dit": __version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    return {**asdict(comparison), "steps": steps, "bands": bands, "arms": arms, "versions": versions}


def markdown(result: dict) -> str:
    """The comparison as a table, best first."""
    baseline = result["arms"][result["baseline"]]
    bands = [f"{band} cycles" for band in result["bands"]]
    header = ("arm", "parameters", "GFLOPs", "images/s", "held-out error", "difference", "p", "p (Holm)", *bands)
    rows = []
    for name, arm in sorted(result["arms"].items(), key=lambda item: item[1]["loss_mean"]):
        row = [
            name,
            f"{arm['parameters'] / 1e6:.2f} M ({arm['parameters'] / baseline['parameters']:.2f})",
            f"{arm['flops'] / 1e9:.3f} ({arm['flops'] / baseline['flops']:.2f})",
            f"{arm['images_per_second']:.0f}",
            f"{arm['loss_mean']:.5f} ± {arm['loss_std']:.5f}",
        ]
        if name == result["baseline"]:
            row += ["baseline", "", "", *[""] * len(bands)]
        else:
            total = arm["difference_percent"]
            row += [_interval(total), f"{total['p_two_sided']:.3f}", f"{arm['p_holm']:.3f}"]
            row += [_interval(value) for value in arm["difference_percent_by_band"].values()]
        rows.append(tuple(row))
    seeds = len(result["seeds"])
    return (
        f"{table(rows, header)}\n\nHeld-out error after {result['steps'][-1]} steps, {result['weights']} weights, "
        f"mean ± standard deviation over {seeds} seeds. Differences in percent of the baseline, with 95 % t-intervals "
        f"of the paired mean; p by all sign flips, two-sided, at best {2.0 ** (1 - seeds):.3f} with {seeds} seeds; "
        "last columns: by spatial frequency.\n"
    )


def _interval(difference: dict) -> str:
    return f"{difference['mean']:+.2f} % [{difference['low']:+.2f}, {difference['high']:+.2f}]"


def write_report(result: dict, out: Path):
    write_text(out / "comparison.json", json.dumps(result, indent=2) + "\n")
    text = markdown(result)
    write_text(out / "comparison.md", text)
    others = {name: arm for name, arm in result["arms"].items() if name != result["baseline"]}
    plots.difference_curves(
        result["steps"], {name: arm["difference_percent_by_step"] for name, arm in others.items()}, result["baseline"]
    ).savefig(out / "curves.png")
    rows = {
        name: {"all": arm["difference_percent"], **arm["difference_percent_by_band"]} for name, arm in others.items()
    }
    plots.forest_plot(rows, result["baseline"]).savefig(out / "forest.png")
    print(f"\n{text}\nwrote comparison.json, comparison.md, curves.png and forest.png into {out}")


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the comparison")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--dry_run", action="store_true", help="check all options and print the runs, train nothing")
    options = parser.parse_args(arguments)
    try:
        if options.parallel < 1:
            raise ValueError(f"`--parallel` ({options.parallel}) must be at least 1.")
        comparison = load_comparison(options.config)
        runs = {}
        for seed in comparison.seeds:  # all arms of a seed first: what is cut off is still paired
            for arm in comparison.arms:
                folder = options.out / "runs" / f"{arm}_seed{seed}"
                runs[arm, seed] = comparison.arguments(arm, seed, folder), folder
        for words, _ in runs.values():
            if parse_config(words).train.max_steps is None:
                raise ValueError("`common` needs `max_steps`, the budget of every run.")
        if options.dry_run:
            for words, _ in runs.values():
                print(f"python training/train.py {' '.join(words)}")
            return
        run_all(runs, options.parallel)
        write_report(summarise(comparison, {key: folder for key, (_, folder) in runs.items()}), options.out)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
