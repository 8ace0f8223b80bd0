"""What the ablation of Freq-Grid found: a table, two figures and a JSON file from the runs of freq_grid.py.

    python benchmarks/freq_grid_report.py --runs runs/freq_grid/cats64 --out results/freq_grid_cats64 \\
        --speed results/freq_grid_speed_cats64.json

Counted are the seeds that both sides of a contrast have. Errors are those of freq_grid.py's final measurement, on all
held-out images; differences are paired by seed, in percent of the second arm's mean. Seconds are the steps of a run
times the CPU seconds of a step by freq_grid_speed.py, which times the arms in turn.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from freqgate_dit import plots
from freqgate_dit.files import read_json, write_text
from freqgate_dit.model_card import table
from freqgate_dit.statistics import holm, paired_difference


# As planned in results/EXPERIMENTS.md (9).
CONTRASTS = [
    ("freq_grid", "full_grid"),
    ("freq_grid_02", "freq_grid"),
    ("freq_grid_10", "freq_grid"),
    ("freq_grid_priced", "freq_grid"),
    ("large_patches", "freq_grid"),
    ("whole_patch_head", "freq_grid"),
    ("scalar_complement", "freq_grid"),
    ("shared_projections", "freq_grid"),
    ("permuted", "freq_grid"),
    ("random_block", "freq_grid"),
    ("constant_large_patch", "freq_grid"),
    ("full_grid", "full_grid_plain"),
    ("freq_grid", "diffusers"),
]
AT_EQUAL_IMAGES = [
    (f"{arm}_images", "full_grid")
    for arm in ("freq_grid", "freq_grid_02", "freq_grid_10", "freq_grid_priced", "large_patches", "whole_patch_head")
]


class Runs:
    """The finished runs of a folder, by arm and seed."""

    def __init__(self, folder: Path):
        self.of: dict[str, dict[int, dict]] = {}
        for file in sorted(folder.glob("*.json")):
            run = read_json(file)
            self.of.setdefault(run["arm"], {})[run["seed"]] = run
        codes = {run["code"] for arm, runs in self.of.items() if arm != "diffusers" for run in runs.values()}
        if len(codes) > 1:
            print(f"note: these runs are of {len(codes)} versions of the code, and may differ in more than their arms")
        if not self.of:
            raise SystemExit(f"`--runs` ({folder}) has no finished run: start benchmarks/freq_grid.py first.")

    def difference(self, arm: str, other: str, value) -> dict | None:
        """Of `value(run)` over the seeds of both, in percent; `None` with fewer than two."""
        seeds = sorted(self.of.get(arm, {}).keys() & self.of.get(other, {}).keys())
        if len(seeds) < 2:
            return None
        ours, theirs = (np.array([value(self.of[name][seed]) for seed in seeds]) for name in (arm, other))
        return asdict(paired_difference(100 * ours / theirs.mean(), 100 * theirs / theirs.mean()))

    def recorded(self) -> dict[str, list[dict]]:
        """By arm what is kept of each run: not the speed on a machine that other work shared (freq_grid_speed.py)."""
        left_out = ("seconds_in_all", "images_per_second")
        return {
            arm: [{key: value for key, value in run.items() if key not in left_out} for run in by_seed.values()]
            for arm, by_seed in self.of.items()
        }

    def mean(self, arm: str, value) -> float:
        return float(np.mean([value(run) for run in self.of[arm].values()]))


def contrast(runs: Runs, arm: str, other: str) -> dict | None:
    total = runs.difference(arm, other, lambda run: run["final"]["loss"])
    if total is None:
        return None
    bins, bands = np.array(next(iter(runs.of[arm].values()))["final"]["table"]).shape
    cells = [
        [runs.difference(arm, other, lambda run, i=i, j=j: run["final"]["table"][i][j]) for j in range(bands)]
        for i in range(bins)
    ]
    levels = [runs.difference(arm, other, lambda run, i=i: run["final"]["by_timestep"][i]) for i in range(bins)]
    return {"arm": arm, "against": other, "difference": total, "by_timestep": levels, "by_cell": cells}


def to_reach(runs: Runs, arm: str, target: str, speed: dict[str, float]) -> dict | None:
    """Share of the target's FLOPs and seconds after which the arm's curve is below the target's end, over seeds.

    On the way an arm is not annealed yet, and the target's end is, so the share is an upper bound. (The peer's end is
    that of its averaged weights, also where its last ones are better.)

    Args:
        speed: CPU seconds of a step, of the arms that were timed.
    """
    shares = []
    for seed in runs.of[arm].keys() & runs.of.get(target, {}).keys():
        one, other = runs.of[arm][seed], runs.of[target][seed]
        end = other["curve"][-1]["loss"]
        below = [point["step"] for point in one["curve"] if point["loss"] <= end]
        if not below:
            return None
        timed = arm.removesuffix("_images"), target
        ratio = speed[timed[0]] / speed[timed[1]] if all(name in speed for name in timed) else float("nan")
        shares.append((below[0] * one["flops_per_step"] / other["flops"], below[0] * ratio / other["steps"]))
    if not shares:
        return None
    flops, seconds = np.mean(shares, axis=0).tolist()
    return {"flops": flops, "seconds": None if np.isnan(seconds) else seconds}


def interval(difference: dict) -> str:
    return f"{difference['mean']:+.2f} % [{difference['low']:+.2f}, {difference['high']:+.2f}]"


def arms_table(runs: Runs) -> str:
    rows = []
    for arm in sorted(runs.of, key=lambda arm: runs.mean(arm, lambda run: run["final"]["loss"])):
        errors = [run["final"]["loss"] for run in runs.of[arm].values()]
        first = next(iter(runs.of[arm].values()))
        rows.append(
            (
                f"`{arm}`",
                str(len(errors)),
                f"{first['flops'] / 1e12:.0f}",
                f"{first['images']:,}",
                f"{np.mean(errors):.4f}" + (f" ± {np.std(errors, ddof=1):.4f}" if len(errors) > 1 else ""),
                " ".join(f"{runs.mean(arm, lambda run, i=i: run['final']['by_timestep'][i]):.4f}" for i in range(10)),
            )
        )
    header = ("arm", "seeds", "TFLOP", "images", "held-out error of v", "by tenth of the schedule")
    return table(rows, header)


def contrasts_table(found: list[dict]) -> str:
    rows = [
        (
            f"`{one['arm']}` against `{one['against']}`",
            interval(one["difference"]),
            str(one["difference"]["num_pairs"]),
            f"{one['difference']['p_two_sided']:.3f}",
            f"{one['p_holm']:.3f}",
            " ".join(f"{level['mean']:+.1f}" for level in one["by_timestep"]),
            f"{max(cell['mean'] for row in one['by_cell'] for cell in row):+.1f} %",
        )
        for one in found
    ]
    header = ("compared", "difference", "seeds", "p", "p (Holm)", "by tenth of the schedule, %", "worst cell")
    return table(rows, header)


def report(runs: Runs, out: Path, speed: dict[str, float]):
    result = {"arms": runs.recorded(), "reached": {}}
    for name, pairs in (("equal computation", CONTRASTS), ("equal images", AT_EQUAL_IMAGES)):
        found = [one for pair in pairs if (one := contrast(runs, *pair))]
        for one, p in zip(found, holm([one["difference"]["p_two_sided"] for one in found])):
            one["p_holm"] = p
        result[name] = found
    for target in ("full_grid", "diffusers"):
        reached = {arm: to_reach(runs, arm, target, speed) for arm in runs.of if arm != target}
        result["reached"][target] = {arm: share for arm, share in reached.items() if share}
    text = [arms_table(runs), "At equal computation:", contrasts_table(result["equal computation"])]
    text += ["At equal images, against the full grid:", contrasts_table(result["equal images"])]
    for target, shares in result["reached"].items():
        rows = [
            (f"`{arm}`", f"{one['flops']:.3f}", f"{one['seconds']:.3f}" if one["seconds"] else "")
            for arm, one in sorted(shares.items())
        ]
        text += [
            f"Share of the computation and of the seconds of `{target}` after which an arm is below its last error:",
            table(rows, ("arm", "computation", "seconds")),
        ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out.with_suffix(".json"), json.dumps(result) + "\n")
    write_text(out.with_suffix(".md"), "\n\n".join(text) + "\n")
    draw(runs, result, out)
    print("\n\n".join(text))


def draw(runs: Runs, result: dict, out: Path):
    figures = out.parent / "figures"
    figures.mkdir(exist_ok=True)
    first = next(iter(runs.of["full_grid"].values()))["final"]
    middles = [(index + 0.5) * 100 for index in range(10)]
    cells = {
        f"{one['arm']} against {one['against']}": one["by_cell"]
        for one in (*result["equal images"], *result["equal computation"])
    }
    if cells:
        figure = plots.cell_maps(middles, first["bands"], cells, "held-out error of v")
        figure.savefig(figures / f"{out.name}_cells.png")
    figure, axes = plots.new_figure(8, 5)
    for index, (arm, by_seed) in enumerate(runs.of.items()):
        curves = [[point["loss"] for point in run["curve"]] for run in by_seed.values()]
        run = next(iter(by_seed.values()))
        flops = [point["step"] * run["flops_per_step"] / 1e12 for point in run["curve"]]
        style = "--" if arm.endswith("_images") else "-"
        colour = plots.PALETTE[index % len(plots.PALETTE)]
        marker = ".sx"[index // len(plots.PALETTE) % 3]  # arms that share a colour
        axes.plot(flops[1:], np.mean(curves, axis=0)[1:], style, color=colour, label=arm, marker=marker, ms=5)
    axes.set_xlabel("TFLOP of matrix products, forward x 3")
    axes.set_ylabel("held-out error of v, averaged weights")
    axes.set_xscale("log")
    axes.set_yscale("log")
    shown = [point["loss"] for run in runs.of["full_grid"].values() for point in run["curve"][1:]]
    axes.set_ylim(top=1.05 * max(shown))  # what begins far above comes in from there
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(fontsize=7, ncols=2)
    axes.grid(alpha=0.3)
    figure.savefig(figures / f"{out.name}_curves.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs on one data set")
    parser.add_argument("--out", type=Path, required=True, help="path without ending of the files to write")
    parser.add_argument("--speed", type=Path, help="JSON file of freq_grid_speed.py")
    options = parser.parse_args()
    speed = read_json(options.speed)["cpu_seconds_per_step"] if options.speed else {}
    report(Runs(options.runs), options.out, speed)


if __name__ == "__main__":
    main()
