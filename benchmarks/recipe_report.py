"""Which changes enter the recipe for real images: a table and a JSON file from the `recipe_*` runs of freq_grid.py.

    python benchmarks/recipe_report.py --runs runs/recipe/clothing64 --out results/recipe_clothing64

Measured is the geometric mean over tenths of the schedule of the held-out error of v, on all held-out images, with
averaged weights: arms draw noise levels differently, and this counts each alike. A difference to `recipe_base` is
paired by seed and in percent. The rule of results/EXPERIMENTS.md (10): a change enters if that is below -0.5 % on the
mean of three seeds and below 0 in each.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from freq_grid import CHANGES
from freq_grid_report import Runs, interval

from freqgate_dit.files import write_text
from freqgate_dit.model_card import table


BASE = "recipe_base"
LEAST, SEEDS = -0.5, 3


def error(run: dict) -> float:
    return float(np.exp(np.log(run["final"]["by_timestep"]).mean()))


def rows_of(runs: Runs) -> list[dict]:
    """One for each arm, the best first."""
    rows, base = [], {seed: error(run) for seed, run in runs.of[BASE].items()}
    for arm, by_seed in runs.of.items():
        of_seed = {seed: 100 * (error(run) / base[seed] - 1) for seed, run in sorted(by_seed.items()) if seed in base}
        first = next(iter(by_seed.values()))
        row = {"arm": arm.removeprefix("recipe_"), "change": CHANGES[arm.removeprefix("recipe_")]}
        row |= {key: first[key] for key in ("steps", "images", "parameters")}
        row |= {"error": runs.mean(arm, error), "by_seed": of_seed, "difference": runs.difference(arm, BASE, error)}
        known = list(of_seed.values())
        row["enters"] = None  # as long as it can still come out either way
        if len(known) >= SEEDS or max(known) > 0:
            row["enters"] = None if arm == BASE else bool(np.mean(known) < LEAST and max(known) < 0)
        rows.append(row)
    return sorted(rows, key=lambda row: np.mean(list(row["by_seed"].values())))


def words(row: dict) -> tuple[str, ...]:
    change = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row["change"].items()
    )
    by_seed = ", ".join(f"{value:+.1f}" for value in row["by_seed"].values()) if row["change"] else ""
    enters = {None: "", True: "yes", False: "no"}[row["enters"]]
    difference = interval(row["difference"]) if row["difference"] and row["change"] else ""
    return f"`{row['arm']}`", change, f"{row['images']:,}", f"{row['error']:.4f}", by_seed, difference, enters


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs on one data set")
    parser.add_argument("--out", type=Path, required=True, help="path without ending of the files to write")
    options = parser.parse_args()
    runs = Runs(options.runs)
    if BASE not in runs.of:
        raise SystemExit(f"`--runs` ({options.runs}) has no finished `{BASE}`, with which all are compared.")
    rows = rows_of(runs)
    header = ("arm", "what it changes", "images", "held-out error", "difference by seed, %", "mean", "enters")
    text = table([words(row) for row in rows], header)
    # Of a machine that other work shared; of speeds freq_grid_speed.py has those that count.
    left_out = ("seconds_in_all", "images_per_second")
    of = {
        arm: [{k: v for k, v in run.items() if k not in left_out} for run in by.values()]
        for arm, by in runs.of.items()
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out.with_suffix(".json"), json.dumps({"arms": rows, "runs": of}) + "\n")
    write_text(options.out.with_suffix(".md"), text + "\n")
    print(text)


if __name__ == "__main__":
    main()
