"""What the gates are, over time, against the data's spectrum, by class and by channel."""

import numpy as np
import torch

from freqgate_dit import plots
from freqgate_dit.analysis import (
    BRANCHES,
    band_gain_statistics,
    band_gain_table,
    band_visibility,
    gate_statistics,
    gate_table,
    spectral_gate_table,
    usual_band_gains,
    wiener_gain,
)
from freqgate_dit.traces import log_snr
from freqgate_dit.training.report.page import Section
from freqgate_dit.training.report.subject import Subject


MOST_GATED, OF_A_CLASS = 64, 5  # classes whose gates are read one by one, and timesteps of each
SAME_DIRECTION = 0.5  # three channels of four; or a correlation with log-SNR
LEAST_RANGE = 0.01  # of a gate over time, for it to have moved


def gate_section(subject: Subject) -> Section:
    """What the gates are, over time; of the conditioning, and of the preconditioning where that is learned."""
    section = block_gate_section(subject)
    preconditioner = subject.pipe.transformer.preconditioner
    if preconditioner is not None and preconditioner.kind == "learned":
        if not section.tables:
            section.reading = ["The blocks have no gates over time; the preconditioning has one over frequency."]
        levels, learned, wiener, rows = spectral_gate_table(subject.pipe.transformer)
        section.tables["spectral_gate"] = rows
        shifts = np.array([row["half_open_shift"] for row in rows])
        by_ring = np.nanmean(shifts.reshape(-1, learned.shape[1]), axis=0)
        slopes = np.array([row["slope"] for row in rows])
        section.show(
            "spectral_gate",
            plots.spectral_gate_curves(levels, learned, wiener),
            "The learned spectral gate is half open later than the Wiener gate by "
            f"{np.nanmean(shifts):+.2f} nats of log-SNR on average over rings and channels (from "
            f"{np.nanmin(shifts):+.2f} to {np.nanmax(shifts):+.2f}), with a slope of {slopes.mean():.2f} (Wiener's is "
            f"1). By ring, from the lowest frequency: {', '.join(f'{shift:+.2f}' for shift in by_ring)}. "
            "Unlike a gate of the blocks it is tied to its frequencies. For Gaussian data it would not move.",
        )
    return section


def channel_rows(gates: np.ndarray, levels: np.ndarray) -> list[dict]:
    """A row per block and channel of `(T, blocks, channels)` gates, timesteps ascending."""
    centred = (levels - levels.mean())[:, None, None] * (gates - gates.mean(0))
    correlation = centred.mean(0) / (levels.std() * np.maximum(gates.std(0), 1e-12))
    return [
        {
            "block": block,
            "channel": channel,
            "in_noise": float(gates[-1, block, channel]),
            "clean": float(gates[0, block, channel]),
            "correlation": float(correlation[block, channel]),
        }
        for block in range(gates.shape[1])
        for channel in range(gates.shape[2])
    ]


def listed(rows: list[dict], name: str, form: str) -> str:
    return ", ".join(format(row[name], form) for row in rows)


def block_gate_section(subject: Subject) -> Section:
    """The gates of the blocks."""
    title = "The gates"
    transformer = subject.pipe.transformer
    kinds = transformer.inspectable
    train_steps = subject.pipe.scheduler.config.num_train_timesteps
    if "gate" in kinds:
        timesteps, gates = gate_table(transformer, train_steps)
        levels = log_snr(subject.alphas_cumprod, torch.from_numpy(timesteps)).numpy()
        known = subject.data_spectrum
        statistics = gate_statistics(gates, levels, wiener_gain(known.octaves.numpy(), levels) if known else None)
        signs = "".join("+" if row["correlation"] > 0 else "-" for row in statistics)
        mean = {name: np.mean([row[name] for row in statistics]) for name in ("agreement", "range")}
        rows = [
            {
                "timestep": float(step),
                "log_snr": float(level),
                "block": block,
                "mean_gate": float(gates[i, block].mean()),
            }
            for i, (step, level) in enumerate(zip(timesteps, levels))
            for block in range(gates.shape[1])
        ]
        reading = (
            f"From noise to clean, the mean gates of the blocks rise (+) or fall (-): {signs}. A channel's gate "
            f"moves by {mean['range']:.2f} on average, and the channels of a block agree on a direction by "
            f"{mean['agreement']:.2f} (0: as many rise as fall, 1: all one way). Exchanging Low and High while "
            "negating the gate is the same function, so a direction is no evidence of coarse-to-fine; the "
            "interventions below are."
        )
        if known:
            reading += (
                f" Against the Wiener gain of the training data (the share of signal at that noise level, mean over "
                f"octaves) the mean gates correlate by {listed(statistics, 'wiener_correlation', '+.2f')}, with "
                f"slopes of {listed(statistics, 'wiener_slope', '+.2f')}; a gate that followed it would have 1 and 1, "
                "or with its paths exchanged -1 and -1."
            )
        tables = {"gates": statistics, "gate_means": rows, "gate_channels": channel_rows(gates, levels)}
        section = Section(title, [], tables=tables, shown=("gates",))
        section.show("gate", plots.gate_curves(timesteps, gates), reading)
        section.claim(
            "In every block most channels' gates move one way (which way is no evidence of coarse to fine).",
            all(row["agreement"] > SAME_DIRECTION and row["range"] > LEAST_RANGE for row in statistics),
            f"agreement by block {listed(statistics, 'agreement', '.2f')}; movement of a channel "
            f"{listed(statistics, 'range', '.2f')}",
        )
        return section
    if "band" in kinds:
        return band_gate_section(subject)
    return Section(
        title,
        [f"{type(transformer).__name__} has no gates over time or frequency: there is nothing to show here."],
    )


def band_gate_section(subject: Subject) -> Section:
    """The band gates of Band-Gate, as gains of the low over the high band."""
    transformer = subject.pipe.transformer
    classes = range(min(subject.pipe.num_classes, MOST_GATED)) if subject.is_conditional else []
    timesteps, low, high, condition = usual_band_gains(subject.pipe)
    levels = log_snr(subject.alphas_cumprod, torch.from_numpy(timesteps)).numpy()
    ratio = plots.decibel(low, high)  # (T, blocks, 2)
    visibility = band_visibility(transformer, timesteps)
    tables = [band_gain_table(transformer, OF_A_CLASS, label) for label in classes]
    by_class = np.array([plots.decibel(low, high) for _, low, high in tables]) if len(tables) > 1 else None
    rows = [
        row
        for row in band_gain_statistics(ratio, levels, visibility, by_class)
        if row["branch"] in transformer.transformer_blocks[0].branches
    ]
    curves = [
        {
            "timestep": float(step),
            "log_snr": float(level),
            "block": row["block"],
            "branch": row["branch"],
            "low_over_high_dB": float(ratio[i, row["block"], BRANCHES.index(row["branch"])]),
        }
        for i, (step, level) in enumerate(zip(timesteps, levels))
        for row in rows
    ]
    ends = ("low_over_high_dB_in_noise", "low_over_high_dB_clean")
    in_noise, clean = (np.mean([row[name] for row in rows]) for name in ends)
    falling = np.mean([row["correlation"] < 0 for row in rows])
    clearly = np.mean([row["correlation"] < -SAME_DIRECTION for row in rows])
    is_frequency = transformer.config.band_basis != "random"
    meaning = (
        "Low and high are frequencies of the token grid by construction, so the direction means something: of the "
        "gain of a branch, not of the image."
        if is_frequency
        else "In this model, a control, low and high are random directions of the token grid, not frequencies."
    )
    reading = [
        f"{condition.capitalize()} and in noise the low band's gain exceeds the high band's by {in_noise:+.1f} dB on "
        f"average, in clean images by {clean:+.1f} dB; in {falling:.0%} of the gated branches the low band gives way "
        f"to the high one as noise falls, in {clearly:.0%} clearly (correlation below -{SAME_DIRECTION:g}). {meaning}"
    ]
    if visibility is not None and is_frequency:
        reading.append(
            "Against the visibility of the low over the high band of the data (ratio of their mean Wiener gains, "
            f"{visibility[-1]:+.1f} dB in noise) they correlate by {listed(rows, 'wiener_correlation', '+.2f')}, with "
            f"slopes of {listed(rows, 'wiener_slope', '+.2f')}."
        )
    section = Section(
        "The gates",
        reading[1:],
        tables={"gains": rows, "gain_curves": curves},
        shown=("gains",),
    )
    section.show("band_gains", plots.band_gain_curves(timesteps, low, high, condition), reading[0])
    if by_class is not None:
        section.reading.append(
            "Between classes the ratio differs by a standard deviation of "
            f"{np.mean([row['class_std_dB'] for row in rows]):.2f} dB on average over branches, at most "
            f"{max(row['class_std_dB'] for row in rows):.2f} dB."
        )
        section.tables["gains_by_class"] = [
            {
                "class": subject.pipe.id2label.get(label, str(label)),
                "timestep": float(step),
                "block": row["block"],
                "branch": row["branch"],
                "low_over_high_dB": float(by_class[label, i, row["block"], BRANCHES.index(row["branch"])]),
            }
            for label in classes
            for i, step in enumerate(tables[0][0])
            for row in rows
        ]
    section.claim(
        f"{condition.capitalize()} the low band gives way to the high one in every branch as noise falls"
        + ("." if is_frequency else " (bands of this control are random directions)."),
        all(row["correlation"] < -SAME_DIRECTION for row in rows),
        f"correlation with log-SNR {listed(rows, 'correlation', '+.2f')}",
    )
    return section
