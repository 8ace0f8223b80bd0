"""What changes the recipe for real images: a table and a JSON file from the `recipe_*` runs of freq_grid.py.

    python benchmarks/recipe_report.py --runs runs/recipe/clothing64 --out results/recipe_clothing64
    python benchmarks/recipe_report.py --runs runs/recipe_90/clothing64 --base together --out results/recipe_together

Measured is the geometric mean over tenths of the schedule of the held-out error of v, on all held-out images, with
averaged weights: arms draw noise levels differently, and this counts each alike. Differences to the base are paired by
seed and in percent. An option passes, by results/EXPERIMENTS.md (10), if the mean of three seeds is below -0.5 % and
each is below 0; of options that exclude each other, such as learning rates, the best of those that pass is taken.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from freq_grid import CHANGES
from freq_grid_report import Runs, interval

from freqgate_dit.files import write_text
from freqgate_dit.model_card import table


LEAST, SEEDS = -0.5, 3


def error(run: dict) -> float:
    return float(np.exp(np.log(run["final"]["by_timestep"]).mean()))


def rows_of(runs: Runs, base: str) -> list[dict]:
    """One for each arm that shares a seed with the base, the best first."""
    rows, errors = [], {seed: error(run) for seed, run in runs.of[base].items()}
    for arm, by_seed in runs.of.items():
        by_seed = {seed: run for seed, run in sorted(by_seed.items()) if seed in errors}
        if not by_seed or not arm.startswith("recipe_"):
            continue
        found = [100 * (error(run) / errors[seed] - 1) for seed, run in by_seed.items()]
        first, decided = next(iter(by_seed.values())), len(found) >= SEEDS or max(found) > 0
        rows.append(
            {
                "arm": arm.removeprefix("recipe_"),
                "change": CHANGES[arm.removeprefix("recipe_")],
                **{key: first[key] for key in ("budget", "steps", "images", "parameters")},
                "error": float(np.mean([error(run) for run in by_seed.values()])),
                "by_seed": dict(zip(by_seed, found)),
                "difference": runs.difference(arm, base, error),
                "passes": bool(np.mean(found) < LEAST and max(found) < 0) if decided else None,
            }
        )
    return sorted(rows, key=lambda row: np.mean(list(row["by_seed"].values())))


def words(row: dict, is_base: bool) -> tuple[str, ...]:
    numbers = [f"{row['budget'] / 1e12:.4g}", f"{row['images']:,}", f"{row['error']:.4f}"]
    change = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row["change"].items()
    )
    if is_base:
        return f"`{row['arm']}`", change, *numbers, "", "", ""
    by_seed = ", ".join(f"{value:+.1f}" for value in row["by_seed"].values())
    passes = {None: "", True: "yes", False: "no"}[row["passes"]]
    return (
        f"`{row['arm']}`",
        change,
        *numbers,
        by_seed,
        interval(row["difference"]) if row["difference"] else "",
        passes,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs on one data set")
    parser.add_argument("--base", default="base", help="arm that all are compared with (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="path without ending of the files to write")
    options = parser.parse_args()
    runs, base = Runs(options.runs), f"recipe_{options.base}"
    if base not in runs.of:
        raise SystemExit(f"`--base` ({options.base}) has no finished run in {options.runs}.")
    rows = rows_of(runs, base)
    header = ("arm", "options", "TFLOP", "images", "held-out error", "difference by seed, %", "mean", "passes")
    text = table([words(row, row["arm"] == options.base) for row in rows], header)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out.with_suffix(".json"), json.dumps({"arms": rows, "runs": runs.recorded()}) + "\n")
    write_text(options.out.with_suffix(".md"), text + "\n")
    print(text)


if __name__ == "__main__":
    main()
