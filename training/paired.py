"""What a comparison found: paired differences over seeds of what its runs wrote, as JSON, table and figures."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from freqgate_dit import __version__, plots
from freqgate_dit.files import read_json, read_json_lines, write_text
from freqgate_dit.model_card import table
from freqgate_dit.statistics import holm, paired_difference
from freqgate_dit.summary import read_summary
from freqgate_dit.training.matching import size_cells


ERRORS = ("loss", "loss_by_band", "loss_by_timestep", "table")


def read_run(folder: Path, weights: str, evaluated: bool, measure: str = "own") -> dict:
    """What a run measured; with images if it was `evaluated`.

    Returns: "steps", "loss" `(S,)`, "bands", "loss_by_band" `(S, bands)`, "loss_by_timestep" `(S, bins)` from clean to
    noise, "table" `(S, bins, bands)`, "num_train_timesteps", "images_per_second", and "metrics", name -> value, of the
    trained model's images.
    """
    records = read_json_lines(folder / "validation.jsonl")
    measured = [record.get(weights) or record["raw"] for record in records]
    lines = read_json_lines(folder / "metrics.jsonl")
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
    evaluation = folder / "evaluation" / "evaluation.json"
    metrics = read_json(evaluation)["metrics"] if evaluated else []
    prefix = "" if measure == "own" else f"{measure}_"
    if prefix + "loss" not in measured[0]:
        raise ValueError(
            f"`measure` ({measure}): {folder} was validated by an older version, which did not measure that: delete "
            "that run, or set `measure` to own."
        )
    if None in measured[-1]["loss_by_timestep"]:
        raise ValueError(
            f"{folder} has noise levels without held-out images, which cannot be compared: it takes "
            f"{len(measured[-1]['loss_by_timestep'])} or more (`num_validation_images`, and the data's held-out part)."
        )
    return {
        "steps": [record["step"] for record in records],
        **{name: [values[prefix + name] for values in measured] for name in ERRORS},
        "bands": measured[0]["bands"],
        "num_train_timesteps": measured[0]["num_train_timesteps"],
        "images_per_second": float(np.median(speeds or [np.nan])),
        "metrics": {metric["name"]: metric["value"] for metric in metrics},
    }


def relative_difference(arm: np.ndarray, baseline: np.ndarray) -> dict:
    """Paired differences in percent of the baseline's mean, over seeds."""
    scale = 100 / baseline.mean()
    return asdict(paired_difference(arm * scale, baseline * scale))


class Measured:
    """The numbers of all runs, by arm and seed, as arrays with the seeds first."""

    def __init__(self, folders: dict[tuple[str, int], Path], *options):
        self.runs = {key: read_run(folder, *options) for key, folder in folders.items()}
        self.seeds = list(dict.fromkeys(seed for _, seed in folders))
        first = next(iter(self.runs.values()))
        self.steps, self.bands, self.metrics = first["steps"], first["bands"], list(first["metrics"])

    def of(self, arm: str, name: str) -> np.ndarray:
        """`(seeds, ...)`: "loss" `(seeds, S)`, "loss_by_band" `(seeds, S, bands)`."""
        return np.array([self.runs[arm, seed][name] for seed in self.seeds])

    def metric(self, arm: str, name: str) -> np.ndarray:
        return np.array([self.runs[arm, seed]["metrics"][name] for seed in self.seeds])

    def difference(self, arm: str, other: str) -> dict:
        """Of `arm` to `other`, in percent: at the end, by step, by band and timestep at the end, and of the images."""
        loss, base = self.of(arm, "loss"), self.of(other, "loss")
        by_band, base_by_band = self.of(arm, "loss_by_band")[:, -1], self.of(other, "loss_by_band")[:, -1]
        by_time, base_by_time = self.of(arm, "loss_by_timestep")[:, -1], self.of(other, "loss_by_timestep")[:, -1]
        return {
            "difference_percent": relative_difference(loss[:, -1], base[:, -1]),
            "difference_percent_by_step": [relative_difference(*pair) for pair in zip(loss.T, base.T)],
            "difference_percent_by_band": {
                band: relative_difference(*pair) for band, *pair in zip(self.bands, by_band.T, base_by_band.T)
            },
            "difference_percent_by_timestep": [relative_difference(*pair) for pair in zip(by_time.T, base_by_time.T)],
            "metrics_difference": {
                name: asdict(paired_difference(self.metric(arm, name), self.metric(other, name)))
                for name in self.metrics
            },
        }

    def difference_by_cell(self, arm: str, other: str) -> list[list[dict]]:
        """Of `arm` to `other` at the end, in percent: by timestep, and there by band."""
        cells, base = self.of(arm, "table")[:, -1], self.of(other, "table")[:, -1]  # (seeds, bins, bands)
        return [
            [relative_difference(*pair) for pair in zip(row.T, base_row.T)]
            for row, base_row in zip(cells.swapaxes(0, 1), base.swapaxes(0, 1))
        ]


def summarise(comparison, folders: dict[tuple[str, int], Path]) -> dict:
    """All numbers of a `compare.Comparison` from its finished runs, ready for JSON.

    Args:
        folders: (arm, seed) -> folder, all arms for each of the seeds.
    """
    measured = Measured(folders, comparison.weights, bool(comparison.evaluation), comparison.measure)
    arms = {}
    for arm, options in comparison.arms.items():
        model = read_summary(folders[arm, measured.seeds[0]] / "pipeline")
        loss = measured.of(arm, "loss")
        arms[arm] = {
            "options": options,
            "parameters": model.parameters,
            "flops": model.mean_flops,
            "images_per_second": float(np.median(measured.of(arm, "images_per_second"))),
            "loss": loss.tolist(),
            "loss_mean": loss[:, -1].mean(),
            "loss_std": loss[:, -1].std(ddof=1),
            "metrics": {name: measured.metric(arm, name).tolist() for name in measured.metrics},
        }
        if arm != comparison.baseline:
            arms[arm] |= measured.difference(arm, comparison.baseline)
    contrasts = [
        {
            "arm": arm,
            "against": other,
            **measured.difference(arm, other),
            "difference_percent_by_cell": measured.difference_by_cell(arm, other),
        }
        for arm, other in comparison.contrasts
    ]
    for contrast, p in zip(contrasts, holm([one["difference_percent"]["p_two_sided"] for one in contrasts])):
        contrast["p_holm"] = p
    versions = {"freqgate_dit": __version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    first = measured.runs[comparison.baseline, measured.seeds[0]]
    bins, length = len(first["loss_by_timestep"][0]), first["num_train_timesteps"]
    found = {"seeds": measured.seeds, "steps": measured.steps, "bands": measured.bands}
    found["timesteps"] = [(index + 0.5) * length / bins for index in range(bins)]
    return {**asdict(comparison), **found, "arms": arms, "contrasts": contrasts, "versions": versions}


# -- for the reader ---------------------------------------------------------------------------------------------------


def _interval(difference: dict, unit: str = " %") -> str:
    return f"{difference['mean']:+.2f}{unit} [{difference['low']:+.2f}, {difference['high']:+.2f}]"


def error_of(result: dict) -> str:
    """What was measured, in words."""
    return "held-out error" if result["measure"] == "own" else "held-out error of the noise"


def _arms_table(result: dict) -> str:
    baseline = result["arms"][result["baseline"]]
    metrics = list(baseline["metrics"])
    rows = []
    for name, arm in sorted(result["arms"].items(), key=lambda item: item[1]["loss_mean"]):
        is_baseline = name == result["baseline"]
        row = [
            name,
            *size_cells(arm, baseline),
            f"{arm['images_per_second']:.0f}",
            f"{arm['loss_mean']:.5f} ± {arm['loss_std']:.5f}",
            "baseline" if is_baseline else _interval(arm["difference_percent"]),
            "" if is_baseline else f"{arm['difference_percent']['p_two_sided']:.3f}",
        ]
        measured = [arm["metrics"][metric] for metric in metrics]
        row += [f"{np.mean(values):.4g} ± {np.std(values, ddof=1):.2g}" for values in measured]
        rows.append(tuple(row))
    return table(rows, ("arm", "parameters", "GFLOPs", "images/s", error_of(result), "difference", "p", *metrics))


def _contrasts_table(result: dict) -> str:
    metrics = list(result["arms"][result["baseline"]]["metrics"])
    rows = []
    for contrast in result["contrasts"]:
        total = contrast["difference_percent"]
        row = [f"{contrast['arm']} against {contrast['against']}", _interval(total)]
        row += [f"{total['p_two_sided']:.3f}", f"{contrast['p_holm']:.3f}"]
        row += [_interval(value) for value in contrast["difference_percent_by_band"].values()]
        row += [_interval(contrast["metrics_difference"][metric], "") for metric in metrics]
        rows.append(tuple(row))
    bands = [f"{band} cycles" for band in result["bands"]]
    return table(rows, ("compared", "difference", "p", "p (Holm)", *bands, *metrics))


def markdown(result: dict) -> str:
    """The comparison as two tables: the arms, best first, and the contrasts."""
    seeds = len(result["seeds"])
    return (
        f"{_arms_table(result)}\n\n{error_of(result).capitalize()} after {result['steps'][-1]} steps, "
        f"{result['weights']} weights, mean ± standard deviation over {seeds} seeds. Differences in percent of the "
        "baseline's error, with 95 % t-intervals of the paired mean; p by all sign flips, two-sided, not adjusted.\n\n"
        f"{_contrasts_table(result)}\n\nWhat the comparison was made for, in percent of the error of the second arm, "
        f"by spatial frequency too; p as above, at best {2.0 ** (1 - seeds):.3f} with {seeds} seeds, and adjusted for "
        "the number of rows (Holm). A negative difference in held-out error is a better denoiser, and says nothing "
        "yet about images.\n"
    )


def write_report(result: dict, out: Path):
    """`comparison.json`, `comparison.md` and the pictures, in `out`."""
    write_text(out / "comparison.json", json.dumps(result, indent=2) + "\n")
    text = markdown(result)
    write_text(out / "comparison.md", text)
    baseline = result["baseline"]
    named = {
        one["arm"] if one["against"] == baseline else f"{one['arm']} against {one['against']}": one
        for one in result["contrasts"]
    }
    zero = f"{baseline}, or the arm named" if any(" against " in name for name in named) else baseline
    errors = {name: np.array(arm["loss"]) for name, arm in result["arms"].items()}
    error = error_of(result)
    plots.error_curves(result["steps"], errors, error).savefig(out / "errors.png")
    for file, x, label, key in (
        ("curves.png", result["steps"], "optimiser step", "difference_percent_by_step"),
        ("timesteps.png", result["timesteps"], "timestep (0 clean, T noise)", "difference_percent_by_timestep"),
    ):
        values = {name: one[key] for name, one in named.items()}
        plots.difference_curves(x, values, zero, label, error).savefig(out / file)
    others = {name: arm for name, arm in result["arms"].items() if name != baseline} | named
    rows = {
        name: {"all": one["difference_percent"], **one["difference_percent_by_band"]} for name, one in others.items()
    }
    plots.forest_plot(rows, zero, error).savefig(out / "forest.png")
    cells = {
        f"{one['arm']} against {one['against']}": one["difference_percent_by_cell"] for one in result["contrasts"]
    }
    plots.cell_maps(result["timesteps"], result["bands"], cells, error).savefig(out / "cells.png")
    print(f"\n{text}\nwrote comparison.json, comparison.md and its pictures into {out}")
