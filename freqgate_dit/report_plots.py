"""Figures of a report: what a trained model does in which order, and what it uses of its label."""

import math
from collections.abc import Sequence

import numpy as np

from freqgate_dit.plots import PALETTE, new_figure


def trace_figure(log_snr: Sequence[float], bands: Sequence[str], power: np.ndarray, data: np.ndarray | None = None):
    """How the octaves of the predicted clean image grow: as curves beside the data, and as a map over the steps.

    Args:
        log_snr: `(steps,)` at which was predicted, ascending.
        bands: names of the octaves, in cycles per image.
        power: `(steps, bands)` of the predictions.
        data: `(bands,)` power of the training data, where it is known.
    """
    figure, (left, right) = new_figure(10, 3.8, columns=2)
    for band, name in enumerate(bands):
        colour = PALETTE[band % len(PALETTE)]
        left.semilogy(log_snr, power[:, band], color=colour, lw=1.6, label=f"{name} cycles")
        if data is not None:
            left.axhline(data[band], color=colour, lw=1, ls=":")
    title = "Predicted clean image" + ("" if data is None else " (dotted: training data)")
    left.set(xlabel="log-SNR (left noise, right clean)", ylabel="power per coefficient", title=title)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    left.grid(alpha=0.3)
    share = power / power[-1]
    mesh = right.pcolormesh(
        np.arange(len(log_snr) + 1), np.arange(len(bands) + 1), share.T, cmap="cividis", vmin=0, vmax=1
    )
    right.set_yticks(np.arange(len(bands)) + 0.5, bands)
    right.set(xlabel="step", ylabel="cycles per image", title="Share of the final power")
    figure.colorbar(mesh, ax=right)
    return figure


def forward_figure(log_snr: Sequence[float], bands: Sequence[str], sampled: np.ndarray, forward: np.ndarray):
    """Spectrum of noisy samples on their way (solid) beside that of noised training data (dashed).

    Args:
        log_snr: `(steps,)`, ascending.
        bands: names of the octaves, in cycles per image.
        sampled, forward: `(steps, bands)` power of x_t at unit scale.
    """
    figure, axes = new_figure(6.5, 3.8)
    for band, name in enumerate(bands):
        colour = PALETTE[band % len(PALETTE)]
        axes.semilogy(log_snr, sampled[:, band], color=colour, lw=1.6, label=f"{name} cycles")
        axes.semilogy(log_snr, forward[:, band], color=colour, lw=1.2, ls="--")
    title = "Noisy samples (dashed: noised training data)"
    axes.set(xlabel="log-SNR (left noise, right clean)", ylabel="power per coefficient of x_t", title=title)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def decision_figure(log_snr: Sequence[float], shares: dict[str, np.ndarray], levels: dict[str, float], title: str):
    """Which label the finished image shows, over the level at which it was exchanged.

    Args:
        log_snr: `(K,)`.
        shares: factor -> `(K,)` share that shows the first label.
        levels: factor -> its decision level.
    """
    figure, axes = new_figure(6.5, 3.8)
    for index, (factor, share) in enumerate(shares.items()):
        colour = PALETTE[index]
        axes.plot(log_snr, share, color=colour, marker="o", ms=4, lw=1.5, label=factor)
        axes.axvline(levels[factor], color=colour, ls="--", lw=1)
    axes.set(xlabel="log-SNR of the exchange (left noise, right clean)", ylabel="share with the first label")
    axes.set(title=title, ylim=(-0.03, 1.03))
    axes.legend(frameon=False, fontsize=9, title="dashed: decided")
    axes.grid(alpha=0.3)
    return figure


def decided_worlds(worlds: dict[str, dict]):
    """By how much later the texture is decided than the structure, by models of several worlds, beside the data's own;
    a panel for each variant.

    Args:
        worlds: name -> "of_data", the data's own difference or `None`, and "models", variant -> kind of measurement ->
            a dictionary per model with "difference", "low" and "high", the last two `None` where there is no interval.
    """
    models = [found["models"] for found in worlds.values()]
    variants = list(dict.fromkeys(variant for by_variant in models for variant in by_variant))
    kinds = list(dict.fromkeys(kind for by_variant in models for by_kind in by_variant.values() for kind in by_kind))
    size = 2.5 + 3.7 * len(variants), 1.3 + 0.75 * len(worlds)
    figure, panels = new_figure(*size, columns=len(variants), sharex=True, sharey=True, squeeze=False)
    shown = {}
    for axes, variant in zip(panels[0], variants, strict=True):
        for place, found in enumerate(worlds.values()):
            if found["of_data"] is not None:
                ends = [place - 0.4, place + 0.4]
                [shown["the noisy data"]] = axes.plot([found["of_data"]] * 2, ends, color="black", lw=2.5)
            for kind, rows in found["models"].get(variant, {}).items():
                index = kinds.index(kind)
                for model, row in enumerate(rows):
                    middle = place + 0.2 * (index - (len(kinds) - 1) / 2) + 0.05 * (model - (len(rows) - 1) / 2)
                    if row["low"] is not None:
                        axes.plot([row["low"], row["high"]], [middle, middle], color=PALETTE[index], lw=1.3)
                    [shown[kind]] = axes.plot(row["difference"], middle, "o", color=PALETTE[index], ms=4)
        axes.axvline(0, color="0.4", lw=1, ls="--")
        axes.set(title=variant, ylim=(len(worlds) - 0.5, -0.5), xlabel="texture later than structure by (log-SNR)")
        axes.grid(axis="x", alpha=0.3)
    panels[0][0].set_yticks(range(len(worlds)), list(worlds))
    panels[0][0].set_ylabel("world")
    panels[0][-1].legend(shown.values(), shown, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def information_figure(
    of_label: Sequence[dict] | None,
    by_factor: dict[str, Sequence[dict]],
    data: tuple[Sequence[float], dict[str, np.ndarray], dict[str, float]] | None,
):
    """Information about the label over the noise level: what images hold, and what a model's predictions use of it.

    Args:
        of_label: rows with "log_snr", "density" and the density in each octave, as "1-2 cycles"; drawn where there is
            nothing by factor.
        by_factor: factor -> such rows; empty if not known.
        data: log-SNR `(K,)`; `(K,)` nats, by factor and, dotted, by factor where the other is known; and the level at
            which half of each is.
    """
    by_octave = {f"Used of {factor}, by octave": rows for factor, rows in by_factor.items()}
    if of_label and not by_factor:
        by_octave["Used of the label, by octave"] = of_label
    count = (data is not None) + bool(by_factor) + len(by_octave)
    columns, rows = min(2, count), math.ceil(count / 2)
    figure, panels = new_figure(4.6 * columns, 3.4 * rows, rows, columns, squeeze=False)
    panels = list(panels.flat)
    for axes in panels[count:]:
        axes.remove()
    if data is not None:
        axes = panels.pop(0)
        levels, curves, half = data
        for index, (factor, nats) in enumerate(curves.items()):
            colour, style = PALETTE[index % 2], "-" if index < 2 else ":"
            label = factor.replace(", the other factor known", ", other told")
            axes.plot(levels, nats, color=colour, ls=style, lw=1.6, label=label)
            if index < 2:
                axes.axvline(half[factor], color=colour, ls="--", lw=1)
        axes.set(title="In the noisy image (dashed: half of it)", ylabel="known of the factor (nats)")
        axes.legend(frameon=False, fontsize=8)
    if by_factor:
        totals = {factor: [(row["log_snr"], row["density"]) for row in rows] for factor, rows in by_factor.items()}
        _draw_densities(panels.pop(0), "Used of one factor, the other known", totals)
    for title, rows in by_octave.items():
        names = [name for name in rows[0] if name.endswith("cycles")]
        bands = {name: [(row["log_snr"], row[name]) for row in rows] for name in names}
        _draw_densities(panels.pop(0), title, bands)
    for axes in figure.axes:
        axes.set_xlabel("log-SNR (left noise, right clean)")
        axes.grid(alpha=0.3)
    return figure


def _draw_densities(axes, title: str, curves: dict[str, list[tuple[float, float]]]):
    for index, (name, points) in enumerate(curves.items()):
        axes.plot(*zip(*sorted(points)), color=PALETTE[index % len(PALETTE)], lw=1.5, label=name)
    axes.axhline(0, color="0.4", lw=0.8, ls="--")
    axes.set(title=title, ylabel="nats per nat of log-SNR")
    axes.legend(frameon=False, fontsize=8)


def worlds_figure(log_snr: Sequence[float], worlds: dict[str, dict]):
    """What noisy images of several worlds tell of each factor, a panel per world.

    Args:
        log_snr: `(K,)`.
        worlds: name -> "nats", factor -> `(K,)`, two factors and then, dotted, each where the other is known; and
            "half", factor -> level at which half of them is there or `None`.
    """
    columns = min(3, len(worlds))
    rows = math.ceil(len(worlds) / columns)
    figure, panels = new_figure(2.4 * columns + 0.8, 2.3 * rows + 0.5, rows, columns, sharey=True, squeeze=False)
    for axes, (world, found) in zip(panels.flat, worlds.items()):
        for index, (factor, nats) in enumerate(found["nats"].items()):
            if index > 1:
                axes.plot(log_snr, nats, color=PALETTE[index % 2], lw=1.2, ls=":")
                continue
            axes.plot(log_snr, nats, color=PALETTE[index], lw=1.6, label=factor)
            if found["half"][factor] is not None:
                axes.axvline(found["half"][factor], color=PALETTE[index], ls="--", lw=1)
        axes.set_title(world, fontsize=10)
        axes.grid(alpha=0.3)
    for axes in panels.flat[len(worlds) :]:
        axes.remove()
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.supylabel("known of the factor (nats)", fontsize=9)
    figure.supxlabel(
        "log-SNR (left noise, right clean); dashed: half known; dotted: the other factor told", fontsize=9
    )
    return figure


def effect_figure(effects: dict[str, Sequence[float]], bands: Sequence[str]):
    """By how much interventions change the image, per octave, as a map with numbers.

    Args:
        effects: intervention -> `(bands,)` power of the change over power of the image.
    """
    values = np.array(list(effects.values()))
    figure, axes = new_figure(2.6 + 0.9 * len(bands), 1.2 + 0.32 * len(effects))
    mesh = axes.imshow(values, cmap="cividis", vmin=0, vmax=max(1.0, float(values.max())), aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            dark = value < 0.5 * max(1.0, float(values.max()))
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="w" if dark else "k")
    axes.set_xticks(range(len(bands)), bands)
    axes.set_yticks(range(len(effects)), list(effects), fontsize=8)
    axes.set(xlabel="cycles per image", title="Change over image, power")
    figure.colorbar(mesh, ax=axes)
    return figure
