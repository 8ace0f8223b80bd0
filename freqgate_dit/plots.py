"""Figures from measured tables. matplotlib (extra `[train]`) is imported where a figure is drawn, not before.

Colours are the Okabe-Ito palette, which colour-blind readers can tell apart.
"""

import math
import re
from collections.abc import Sequence

import numpy as np


PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **kwargs):
    """A figure outside of pyplot's global state, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    return figure, figure.subplots(rows, columns, **kwargs)


def loss_curves(
    series: dict[str, list[tuple[int, float]]], label_entropy: float | None = None, validated_on: str = "held-out"
):
    """Training loss, validation loss of raw and averaged weights, and how much the condition tells, over steps.

    Args:
        series: name -> `[(step, value), ...]`, as in `metrics.jsonl`. The panel of the condition is left out without
            "val_ema/information_nats".
        label_entropy: in nats, the most that a condition can tell; drawn as a line.
        validated_on: of which images the validation losses are.
    """
    informed = "val_ema/information_nats" in series
    figure, panels = new_figure(13.5 if informed else 9, 3.6, columns=3 if informed else 2)
    _draw_losses(panels[0], series, validated_on)
    _draw_timestep_losses(panels[1], series, validated_on)
    if informed:
        _draw_information(panels[2], series, label_entropy)
    for axes in panels:
        axes.set_xlabel("optimiser step")
        axes.grid(alpha=0.3)
    for axes in panels[:2]:
        _label_log_scale(axes)
    return figure


def _label_log_scale(axes):
    """A logarithmic y axis with plain numbers, between the powers of ten too where there is room."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if high < 30 * low else "")
    axes.tick_params(axis="y", which="minor", labelsize=7)


def _draw_losses(axes, series: dict, validated_on: str):
    curves = (
        ("train/mse", "training, at its own timesteps", PALETTE[5], "-"),
        ("val_raw/loss", f"{validated_on} images, uniform timesteps, raw weights", PALETTE[0], "-"),
        ("val_ema/loss", f"{validated_on} images, averaged weights", PALETTE[1], "-"),
        ("val_ema/null_loss", f"{validated_on} images, averaged weights, null condition", PALETTE[6], ":"),
    )
    for name, label, colour, style in curves:
        if name in series:
            axes.plot(*zip(*series[name], strict=True), style, label=label, color=colour, lw=1.5, marker=".", ms=4)
    axes.set(ylabel="mean squared error", title="Loss")
    axes.legend(frameon=False, fontsize=8)


def _draw_timestep_losses(axes, series: dict, validated_on: str):
    """A line per timestep bin, coloured by its place in the schedule."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm

    names = {}
    for name in series:
        if match := re.fullmatch(r"val_ema/loss_t(\d+)of(\d+)", name):
            index, num_bins = map(int, match.groups())
            names[index] = name
    axes.set_title(f"{validated_on.capitalize()} images, averaged weights, by timestep")
    if not names:
        return
    edges = np.linspace(0, 1, num_bins + 1)
    colours = ScalarMappable(BoundaryNorm(edges, 256), "viridis")
    for index, name in sorted(names.items()):
        colour = colours.to_rgba((index - 0.5) / num_bins)
        axes.plot(*zip(*series[name], strict=True), label=f"bin {index}", color=colour, lw=1.5, marker=".", ms=4)
    axes.figure.colorbar(colours, ax=axes, label="t/T (0 clean, 1 noise)", ticks=edges[:: max(1, num_bins // 5)])


def _draw_information(axes, series: dict, label_entropy: float | None):
    steps, values = zip(*series["val_ema/information_nats"], strict=True)
    # A standard error needs two images in a bin: it can be missing.
    errors = dict(series.get("val_ema/information_nats_se", []))
    errors = [errors.get(step, 0) for step in steps]
    axes.errorbar(
        steps, values, errors, color=PALETTE[2], lw=1.5, marker=".", ms=4, capsize=2, label="J ± standard error"
    )
    if label_entropy is not None:
        axes.axhline(label_entropy, color=PALETTE[6], ls="--", lw=1, label=f"label entropy {label_entropy:.2f}")
    axes.set(ylabel="J, nats", title="Information of the condition that is used")
    axes.set_ylim(bottom=min(0, *axes.get_ylim()))
    axes.legend(frameon=False, fontsize=8)


def validation_heatmap(result: dict, title: str = ""):
    """Where in noise and frequency the error lies, and where the condition is used.

    Args:
        result: `ValidationResult.to_json()`: the left panel is its "table", the right one its "information_table" (in
            nats, adding up to J), which is left out without null condition.
        title: of the figure.
    """
    from matplotlib.colors import CenteredNorm, LogNorm

    informed = result["information_table"] is not None
    table = _array(result["table"])
    num_bins, num_bands = table.shape
    width, height = max(4.4, 0.72 * num_bands + 2.2), 0.36 * num_bins + 1.5
    figure, panels = new_figure(width * (1 + informed), height, columns=1 + informed, squeeze=False)
    image = _draw_cells(panels[0, 0], result, table, LogNorm(*_log_limits(table)), "viridis", ".2g")
    figure.colorbar(image, ax=panels[0, 0], label="mean squared error of the prediction")
    panels[0, 0].set_title(f"Loss {_number(result['loss'], '.4g')}", fontsize=10)
    if informed:
        table = _array(result["information_table"])
        largest = np.abs(table[np.isfinite(table)]).max(initial=0) or 1
        decimals = max(0, 1 - math.floor(math.log10(largest)))
        image = _draw_cells(panels[0, 1], result, table, CenteredNorm(halfrange=largest), "PuOr_r", f"z.{decimals}f")
        figure.colorbar(image, ax=panels[0, 1], label="nats, adding up to J")
        panels[0, 1].set_title(_information_title(result), fontsize=10)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _array(table: list[list[float | None]]) -> np.ndarray:
    return np.array(table, dtype=float)  # None becomes NaN


def _log_limits(table: np.ndarray) -> tuple[float, float]:
    positive = table[table > 0]
    return (positive.min(), positive.max()) if positive.size else (0.1, 1)


def _number(value: float | None, form: str) -> str:
    """As text; what JSON could not hold is None."""
    return "not finite" if value is None else format(value, form)


def _information_title(result: dict) -> str:
    """J with its standard error and ceiling."""
    text = f"Information J = {_number(result['information'], '.2f')}"
    if result["information_se"] is not None:
        text += f" ± {result['information_se']:.2f}"
    text += " nats"
    if result["label_entropy"] is not None:
        text += f" (label entropy {result['label_entropy']:.2f})"
    return text


def _draw_cells(axes, result: dict, table: np.ndarray, norm, colours: str, form: str):
    """`table (bins, bands)` as an image, noise at the top, with the values written in the cells by format `form`."""
    num_bins, num_bands = table.shape
    image = axes.imshow(table, norm=norm, cmap=colours, aspect="auto", origin="lower")
    luminance = image.to_rgba(table)[..., :3] @ (0.2126, 0.7152, 0.0722)
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            colour = "black" if luminance[row, column] > 0.45 else "white"
            axes.text(column, row, format(value, form), color=colour, ha="center", va="center", fontsize=8)
    edges = np.ceil(np.arange(num_bins + 1) * result["num_train_timesteps"] / num_bins).astype(int)
    axes.set_yticks(np.arange(num_bins + 1) - 0.5, edges)
    axes.set_xticks(range(num_bands), result["bands"])
    axes.set(xlabel="spatial frequency, cycles per image", ylabel="timestep (0 clean, T noise)")
    return image


def image_grid(rows: Sequence[Sequence], row_labels: Sequence[str], column_labels: Sequence[str], title: str = ""):
    """Images in a labelled grid.

    Args:
        rows: a list of images (PIL, or arrays `(H, W, 3)`) per row; `None` leaves a place empty.
        row_labels, column_labels: names at the left and at the top.
    """
    num_columns = max(len(row) for row in rows)
    figure, axes = new_figure(0.9 * num_columns + 1.4, 0.9 * len(rows) + 0.6, len(rows), num_columns, squeeze=False)
    for row_axes, row, label in zip(axes, rows, row_labels, strict=True):
        for axis, image in zip(row_axes, [*row, *[None] * (num_columns - len(row))], strict=True):
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if image is not None:
                axis.imshow(np.asarray(image), interpolation="nearest")
        row_axes[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    for axis, label in zip(axes[0], column_labels, strict=False):
        axis.set_title(label, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def gate_curves(timesteps: Sequence[float], gates: np.ndarray):
    """The Freq-Gate over timesteps: mean over channels of each block, and the spread of the channels of one block.

    Args:
        timesteps: `(T,)`, ascending.
        gates: `(T, blocks, channels)` in [0, 1].
    """
    from matplotlib.cm import viridis

    figure, (left, right) = new_figure(9, 3.6, columns=2, sharey=True)
    num_blocks = gates.shape[1]
    for block in range(num_blocks):
        colour = viridis(block / max(1, num_blocks - 1))
        left.plot(timesteps, gates[:, block].mean(axis=-1), color=colour, lw=1.5, label=f"block {block}")
    left.set(
        xlabel="timestep (0 clean, T noise)",
        ylabel="gate g (1: Low, 0: High)",
        title="Mean over the channels of a block",
    )
    left.legend(frameon=False, fontsize=7, ncols=2)
    middle = num_blocks // 2
    right.plot(timesteps, gates[:, middle], color=PALETTE[0], lw=0.5, alpha=0.15)
    right.plot(timesteps, gates[:, middle].mean(axis=-1), color=PALETTE[1], lw=2, label="mean")
    right.set(xlabel="timestep (0 clean, T noise)", title=f"Each channel of block {middle}")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    return figure


def decibel(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Ratio of two gains in dB."""
    tiny = np.finfo(np.float32).tiny
    return 20 * np.log10((low + tiny) / (high + tiny))


def band_gain_curves(timesteps: Sequence[float], low: np.ndarray, high: np.ndarray, condition: str):
    """The gains of Band-Gate over timesteps: low over high band in decibel, per block, for attention and MLP.

    Args:
        timesteps: `(T,)`, ascending.
        low, high: gains `(T, blocks, 2)`, at least 0.
        condition: under which, in words.
    """
    from matplotlib.cm import viridis

    figure, columns = new_figure(9, 3.6, columns=2, sharey=True)
    ratio = decibel(low, high)
    num_blocks = ratio.shape[1]
    for branch, (axes, title) in enumerate(zip(columns, ("Attention", "MLP"))):
        for block in range(num_blocks):
            colour = viridis(block / max(1, num_blocks - 1))
            axes.plot(timesteps, ratio[:, block, branch], color=colour, lw=1.5, label=f"block {block}")
        axes.axhline(0, color="0.5", lw=0.8, ls="--")
        axes.set(xlabel="timestep (0 clean, T noise)", title=title)
        axes.grid(alpha=0.3)
    columns[0].set_ylabel("gain of low over high band (dB)")
    columns[0].legend(frameon=False, fontsize=7, ncols=2)
    figure.suptitle(f"Band gains {condition}", fontsize=10)
    return figure


def seed_curves(log_snr: Sequence[float], curves: np.ndarray, seeds: Sequence[str], parts: Sequence[str], ylabel: str):
    """The same curve of models that differ in their training seed alone, in a panel per part.

    Args:
        log_snr: `(T,)`.
        curves: `(seeds, T, parts)`.
        seeds, parts: names.
    """
    columns = min(4, len(parts))
    rows = -(-len(parts) // columns)
    figure, panels = new_figure(2.6 * columns + 1, 2.3 * rows + 0.6, rows, columns, sharex=True, sharey=True)
    panels = np.atleast_1d(panels).ravel()
    for axes, part, name in zip(panels, range(len(parts)), parts):
        for index, seed in enumerate(seeds):
            axes.plot(log_snr, curves[index, :, part], color=PALETTE[index % len(PALETTE)], lw=1.3, label=seed)
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
    for axes in panels[len(parts) :]:
        axes.remove()
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(seeds), frameon=False, fontsize=7)
    figure.supxlabel("log-SNR (left noise, right clean)", fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    return figure


def spectral_gate_curves(log_snr: Sequence[float], learned: np.ndarray, wiener: np.ndarray):
    """A learned spectral gate (solid) beside the Wiener gate that it started from (dashed), per ring of frequency.

    Args:
        log_snr: `(L,)`, ascending.
        learned, wiener: gains `(L, rings)` in [0, 1].
    """
    from matplotlib.cm import viridis

    figure, axes = new_figure(6.5, 3.8)
    rings = learned.shape[1]
    for ring in range(rings):
        colour = viridis(ring / max(1, rings - 1))
        axes.plot(log_snr, learned[:, ring], color=colour, lw=1.6, label=f"{ring}")
        axes.plot(log_snr, wiener[:, ring], color=colour, lw=1, ls="--")
    axes.set(xlabel="log-SNR (left noise, right clean)", ylabel="gain", title="Learned gate (dashed: Wiener's)")
    axes.legend(frameon=False, fontsize=7, ncols=2, title="ring, 0: lowest", title_fontsize=7)
    axes.grid(alpha=0.3)
    return figure


def error_curves(steps: Sequence[float], errors: dict[str, np.ndarray], error: str = "held-out error"):
    """Held-out error of each arm of a comparison over training, the mean of its seeds, best at the end first.

    Args:
        steps: `(S,)`, ascending; a first one of 0 is left out, where untrained models span orders of magnitude.
        errors: arm -> `(seeds, S)`.
        error: what it is called.
    """
    figure, axes = new_figure(9, 4.5)
    start = int(steps[0] == 0 and len(steps) > 1)
    for index, arm in enumerate(sorted(errors, key=lambda arm: errors[arm][:, -1].mean())):
        colour, style = PALETTE[index % len(PALETTE)], ("-", "--", ":", "-.")[index // len(PALETTE) % 4]
        axes.plot(steps[start:], errors[arm].mean(0)[start:], style, color=colour, lw=1.5, marker="o", ms=3, label=arm)
    axes.set(xlabel="optimiser step", ylabel=error, title="Mean over seeds; best at the end first")
    _label_log_scale(axes)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes.grid(alpha=0.3)
    return figure


def difference_curves(
    steps: Sequence[float],
    differences: dict[str, list[dict]],
    baseline: str,
    xlabel: str = "optimiser step",
    error: str = "held-out error",
):
    """How the difference of each arm to the baseline develops: does a gain persist, or where in noise does it lie?

    Args:
        steps: `(S,)`, ascending; of training, or others by `xlabel`.
        differences: arm -> S dictionaries with "mean", "low" and "high" in percent.
        baseline: name of the arm at 0.
        error: what it is called.
    """
    figure, axes = new_figure(7, 4)
    for index, (arm, values) in enumerate(differences.items()):
        mean, low, high = (np.array([value[name] for value in values]) for name in ("mean", "low", "high"))
        colour = PALETTE[index % len(PALETTE)]
        axes.plot(steps, mean, color=colour, lw=1.5, marker="o", ms=3, label=arm)
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
    axes.axhline(0, color="0.4", lw=1, ls="--", label=baseline)
    axes.set(xlabel=xlabel, ylabel=f"{error}, difference (%)", title="Paired mean, 95 % t-interval")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def forest_plot(differences: dict[str, dict[str, dict]], baseline: str, error: str = "held-out error"):
    """Final differences of each arm to the baseline with intervals, over everything and by band.

    Args:
        differences: arm -> column ("all", a band) -> dictionary with "mean", "low" and "high" in percent.
        baseline: name of the arm at 0.
        error: what it is called.
    """
    columns = list(next(iter(differences.values())))
    figure, panels = new_figure(
        2.4 * len(columns) + 1.5, 1 + 0.4 * len(differences), columns=len(columns), sharey=True, squeeze=False
    )
    places = range(len(differences) - 1, -1, -1)
    for column, axes in zip(columns, panels[0]):
        for place, (index, values) in zip(places, enumerate(differences.values())):
            value = values[column]
            colour = PALETTE[index % len(PALETTE)]
            axes.plot([value["low"], value["high"]], [place, place], color=colour, lw=2)
            axes.plot(value["mean"], place, "o", color=colour, ms=6)
        axes.axvline(0, color="0.4", lw=1, ls="--")
        axes.set_title("all frequencies" if column == "all" else f"{column} cycles/image", fontsize=9)
        axes.set_ylim(-0.6, len(differences) - 0.4)
        axes.grid(axis="x", alpha=0.3)
    panels[0][0].set_yticks(list(places), list(differences))
    figure.supxlabel(f"{error}, difference to {baseline} (%)", fontsize=9)
    return figure


def cell_maps(
    timesteps: Sequence[float], bands: Sequence[str], cells: dict[str, list[list[dict]]], error: str = "held-out error"
):
    """Where in noise and frequency one recipe's held-out error differs from another's: a map per comparison.

    Args:
        timesteps: `(bins,)` centres, ascending.
        bands: names of the octaves, in cycles per image.
        cells: title -> `(bins, bands)` dictionaries with "mean", "low" and "high" in percent. A cell whose interval
            excludes 0 has a dot.
        error: what it is called.
    """
    columns = min(3, len(cells))
    rows = math.ceil(len(cells) / columns)
    figure, panels = new_figure(
        3.6 * columns + 0.8, 2.6 * rows + 0.3, rows, columns, squeeze=False, sharex=True, sharey=True
    )
    means = {
        title: np.array([[cell["mean"] for cell in row] for row in table], dtype=float)
        for title, table in cells.items()
    }
    # What is more than doubled would leave all else pale.
    largest = min(100.0, max(np.abs(mean).max() for mean in means.values())) or 1.0
    for axes, (title, mean) in zip(panels.flat, means.items()):
        image = axes.imshow(mean.T, origin="lower", aspect="auto", cmap="RdBu_r", vmin=-largest, vmax=largest)
        sure = [
            (x, y)
            for x, row in enumerate(cells[title])
            for y, cell in enumerate(row)
            if cell["low"] * cell["high"] > 0
        ]
        axes.plot(*np.array(sure).reshape(-1, 2).T, ".", color="black", ms=3)
        axes.set_title(title.replace(" against ", "\nagainst "), fontsize=8)
        axes.set_xticks(range(0, len(timesteps), 3), [f"{timesteps[i]:.0f}" for i in range(0, len(timesteps), 3)])
        axes.set_yticks(range(len(bands)), bands)
    for axes in panels.flat[len(cells) :]:
        axes.set_axis_off()
    figure.supxlabel("timestep (0 clean, T noise)", fontsize=9)
    figure.supylabel("cycles per image", fontsize=9)
    figure.colorbar(image, ax=panels, label=f"{error}, difference (%)")
    return figure
