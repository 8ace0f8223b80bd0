"""Figures from measured tables. matplotlib (extra `[train]`) is imported where a figure is drawn, not before.

Colours are the Okabe-Ito palette, which colour-blind readers can tell apart.
"""

from collections.abc import Sequence

import numpy as np


PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **kwargs):
    """A figure outside of pyplot's global state, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    return figure, figure.subplots(rows, columns, **kwargs)


def loss_curves(series: dict[str, list[tuple[int, float]]]):
    """Training loss, and validation loss of raw and averaged weights, over steps.

    Args:
        series: name -> `[(step, value), ...]`, as in `metrics.jsonl`.
    """
    figure, (left, right) = new_figure(9, 3.6, columns=2)
    curves = (
        ("train/mse", "training, at its own timesteps", PALETTE[5]),
        ("val_raw/loss", "held-out (uniform timesteps), raw weights", PALETTE[0]),
        ("val_ema/loss", "held-out (uniform timesteps), averaged weights", PALETTE[1]),
    )
    for name, label, colour in curves:
        if name in series:
            left.plot(*zip(*series[name], strict=True), label=label, color=colour, lw=1.5, marker=".", ms=4)
    left.set(xlabel="optimiser step", ylabel="mean squared error", yscale="log", title="Loss")
    left.legend(frameon=False, fontsize=8)
    quarters = sorted(name for name in series if name.startswith("val_ema/loss_t"))
    for index, name in enumerate(quarters):
        low, high = index / len(quarters), (index + 1) / len(quarters)
        right.plot(
            *zip(*series[name], strict=True),
            label=f"t/T in [{low:g}, {high:g})",
            color=PALETTE[index],
            lw=1.5,
            marker=".",
        )
    right.set(xlabel="optimiser step", yscale="log", title="Held-out, averaged weights, by timestep")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="minor", labelsize=7)
    return figure


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
