"""What a trained model does, as tables and as a picture: the gate of Freq-Gate, the band gains of Band-Gate."""

import numpy as np
import torch

from freqgate_dit import plots
from freqgate_dit.pipelines.pipeline_freqgate_dit import FreqGateDiTPipeline
from freqgate_dit.transformer_freqgate_dit import (
    BandGateDiTTransformer2DModel,
    ConditionedDiTTransformer2DModel,
    FreqGateDiTTransformer2DModel,
    radial_ring,
)


BRANCHES = ("attention", "mlp")  # of a block, in the order of tables
MOST_AVERAGED = 8  # classes whose gates are read for a mean


@torch.no_grad()
def gate_table(
    transformer: FreqGateDiTTransformer2DModel, num_train_timesteps: int, num_timesteps: int = 50
) -> tuple[np.ndarray, np.ndarray]:
    """Every gate of the model over time; a gate depends on the timestep alone.

    Exchanging a block's two paths while negating its gate gives the same function, so a curve alone proves nothing.

    Returns:
        timesteps `(T,)` from 0 to `num_train_timesteps - 1`, gates `(T, blocks, channels)` in (0, 1).

    Raises:
        ValueError: for a model without such a gate.
    """
    if "gate" not in transformer.inspectable:
        raise ValueError(
            f"`transformer` is a {type(transformer).__name__}; only Freq-Gate has a gate over time alone."
        )
    timesteps = torch.linspace(0, num_train_timesteps - 1, num_timesteps)
    temb = transformer.embed_timestep(timesteps, num_timesteps, transformer.device, transformer.dtype)
    gates = torch.stack([block.gate(temb) for block in transformer.transformer_blocks], dim=1)
    return timesteps.numpy(), gates.float().cpu().numpy()


def gate_statistics(gates: np.ndarray, log_snr: np.ndarray, wiener: np.ndarray | None = None) -> list[dict]:
    """What can be said of the gates of each block, by numbers that do not know which path is called Low.

    The same function with its two paths exchanged has gate 1 - g: rising channels fall, and the direction means
    nothing by itself. Its size, and how far the channels agree on one, do.

    Args:
        gates: `(T, blocks, channels)`, from `gate_table`.
        log_snr: `(T,)`.
        wiener: `(T,)` Wiener gain of the data at the same levels, see `wiener_gain`, to compare the mean gate with.

    Returns:
        per block "correlation" of the mean gate with the log-SNR, in [-1, 1], of which only the size is invariant;
        "rising", the share of channels that rise with it; "agreement" `|2 rising - 1|`; "range", the mean over
        channels of largest minus smallest gate; and with `wiener` the "wiener_correlation" and "wiener_slope" of the
        mean gate over it. A gate that is the Wiener gain has 1 and 1, with its paths exchanged -1 and -1.
    """
    rows = []
    for block in range(gates.shape[1]):
        channels = gates[:, block]
        covariance = ((log_snr - log_snr.mean())[:, None] * (channels - channels.mean(0))).mean(0)
        rising = float((covariance > 0).mean())
        mean = channels.mean(1)
        correlation = float(np.corrcoef(mean, log_snr)[0, 1]) if mean.std() > 0 else 0.0
        spread = float((channels.max(0) - channels.min(0)).mean())
        values = {"correlation": correlation, "rising": rising, "agreement": abs(2 * rising - 1), "range": spread}
        if wiener is not None:
            values["wiener_correlation"] = float(np.corrcoef(mean, wiener)[0, 1]) if mean.std() > 0 else 0.0
            values["wiener_slope"] = float(np.polyfit(wiener, mean, 1)[0])
        rows.append({"block": block, **values})
    return rows


def wiener_gain(power: np.ndarray, log_snr: np.ndarray) -> np.ndarray:
    """Share of the signal in noisy data, `sigmoid(l + ln S)`, its mean over octaves: `(T,)` from power `(bands,)`."""
    return (1 / (1 + np.exp(-log_snr[:, None]) / power)).mean(1)


@torch.no_grad()
def band_gain_table(
    transformer: BandGateDiTTransformer2DModel, num_timesteps: int = 50, label: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How strongly each residual branch adds low and high frequencies over time.

    Args:
        num_timesteps: T.
        label: class; by default the null condition.

    Returns:
        timesteps `(T,)` from 0 to the last of training; root mean square over channels of the gain of the low band
        and of that of the high band, `(T, blocks, branches)` each, with the branches attention and MLP.

    Raises:
        ValueError: for a model without band gates, or a label that it does not have.
    """
    if "band" not in transformer.inspectable:
        raise ValueError(
            f"`transformer` is a {type(transformer).__name__} without band gates: there is no gain to read."
        )
    config, device = transformer.config, transformer.device
    if label is not None and not (type(label) is int and config.num_classes and 0 <= label <= config.num_classes):
        has = f"give one from 0 to {config.num_classes}" if config.num_classes else "the model has no classes"
        raise ValueError(f"`label` ({label!r}) is no class of this model: {has}.")
    timesteps = torch.linspace(0, config.num_train_timesteps - 1, num_timesteps)
    shape = (num_timesteps, config.in_channels, config.sample_size, config.sample_size)
    arguments = {}
    if config.num_classes:
        label = config.num_classes if label is None else label
        arguments["class_labels"] = torch.full((num_timesteps,), label, device=device)
    if config.pooled_projection_dim:
        shape_of_text = (num_timesteps, config.pooled_projection_dim)
        arguments["pooled_projections"] = torch.zeros(shape_of_text, device=device, dtype=transformer.dtype)
    # On the full grid at all of them: in one pass, and no gate depends on the view.
    arguments["samples_per_view"] = num_timesteps, *[0] * (config.grid_views - 1)
    with transformer.inspect("modulation", "band") as recorder:
        transformer(torch.zeros(shape, device=device, dtype=transformer.dtype), timesteps.to(device), **arguments)
    low, high = [], []
    for block, modulation, band in zip(
        transformer.transformer_blocks, recorder.select("modulation"), recorder.select("band")
    ):
        gates = dict(zip(BRANCHES, modulation.value[:, 0].float().chunk(6, dim=-1)[2::3]))  # (T, D) each
        bands = dict(zip(block.branches, band.value[:, 0].float().chunk(len(block.branches), dim=-1)))
        gains = [block.band_gains(gate, bands.get(branch)) for branch, gate in gates.items()]
        high.append(torch.stack([gain for gain, _ in gains], dim=1))  # (T, branches, D)
        low.append(torch.stack([gain if excess is None else gain + excess for gain, excess in gains], dim=1))
    low, high = (torch.stack(gains, dim=1).square().mean(-1).sqrt().numpy() for gains in (low, high))
    return timesteps.numpy(), low, high


def usual_band_gains(pipeline: FreqGateDiTPipeline) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """The band gains of a pipeline's model under no condition in particular.

    That is the null condition; one that was never trained says nothing, so then it is the mean over the first
    `MOST_AVERAGED` classes, at the cost of a forward pass of 50 images for each.

    Returns:
        timesteps, low, high as `band_gain_table` gives them, and under what condition, in words.
    """
    num_classes, labels = pipeline.num_classes, [None]
    if pipeline.is_text_conditional:
        condition = "under a text embedding of zeros"
    elif not pipeline.is_conditional:
        condition = "without a condition"
    elif pipeline.has_null_condition:
        condition = "under the null condition"
    else:
        labels = range(min(num_classes, MOST_AVERAGED))
        few = f"the first {MOST_AVERAGED} " if num_classes > MOST_AVERAGED else ""
        condition = f"on average over {few}classes"
    tables = [band_gain_table(pipeline.transformer, label=label) for label in labels]
    timesteps, low, high = (np.mean(values, axis=0) for values in zip(*tables))
    return timesteps, low, high, condition


@torch.no_grad()
def band_visibility(transformer: BandGateDiTTransformer2DModel, timesteps: np.ndarray) -> np.ndarray | None:
    """By how many dB the low band of the data is more visible than the high one: the ratio of their mean Wiener gains,
    which are factors of amplitudes, as a branch's gains are.

    Returns:
        `(T,)`, or `None` for a model that knows no spectrum.
    """
    config = transformer.config
    shape = (len(timesteps), config.in_channels, config.sample_size, config.sample_size)
    known = transformer.known_of(torch.zeros(shape, device=transformer.device), torch.from_numpy(timesteps))
    if known is None:
        return None
    low, high = transformer.band_clocks(known).double().cpu().numpy().T
    return plots.decibel(low, high)


def band_gain_statistics(
    ratio: np.ndarray, log_snr: np.ndarray, visibility: np.ndarray | None = None, by_class: np.ndarray | None = None
) -> list[dict]:
    """What can be said of the band gains of each block and branch.

    Args:
        ratio: `(T, blocks, 2)` gain of the low over the high band in dB, timesteps ascending.
        log_snr: `(T,)`.
        visibility: `(T,)`, from `band_visibility`.
        by_class: `(classes, T', blocks, 2)`, the ratio of each class.

    Returns:
        per block and branch "low_over_high_dB_in_noise" and "..._clean"; "correlation" of the ratio with the log-SNR;
        with `visibility` "wiener_correlation" and "wiener_slope" over it: a branch that amplified each band as its
        visibility grows has 1 and 1; and with `by_class` "class_std_dB", the standard deviation over classes at the
        timestep where it is largest.
    """
    rows = []
    for block in range(ratio.shape[1]):
        for index, branch in enumerate(BRANCHES):
            values = ratio[:, block, index]
            moves = values.std() > 1e-9
            row = {"block": block, "branch": branch}
            row |= {"low_over_high_dB_in_noise": float(values[-1]), "low_over_high_dB_clean": float(values[0])}
            row["correlation"] = float(np.corrcoef(values, log_snr)[0, 1]) if moves else 0.0
            if visibility is not None:
                correlates = moves and visibility.std() > 1e-9
                row["wiener_correlation"] = float(np.corrcoef(values, visibility)[0, 1]) if correlates else 0.0
                row["wiener_slope"] = float(np.polyfit(visibility, values, 1)[0]) if correlates else 0.0
            if by_class is not None:
                row["class_std_dB"] = float(by_class[:, :, block, index].std(0).max())
            rows.append(row)
    return rows


@torch.no_grad()
def spectral_gate_table(
    transformer: ConditionedDiTTransformer2DModel, num_levels: int = 61
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
    """The learned spectral gate of a model with `preconditioning="learned"`, beside the Wiener gate it started from.

    Returns:
        log-SNR `(L,)` from -10 to 8; gain of the learned and of the Wiener gate `(L, rings)` each, mean over channels
        and coefficients; and per channel and ring "slope" (1 + alpha; Wiener's is 1), "offset" c, and
        "half_open_shift": by how much later (in log-SNR) than Wiener's the gate is half open, at the ring's
        geometric mean power, NaN for a slope of 0.

    Raises:
        ValueError: for a model without a learned spectral gate.
    """
    gate = transformer.preconditioner
    if gate is None or gate.kind != "learned":
        raise ValueError(
            f"`transformer` has the preconditioning {transformer.config.preconditioning!r}; only 'learned' has a gate "
            "that training changes."
        )
    power = transformer.spectrum.power.float()
    ring = radial_ring(*power.shape[-2:], power.device)
    rings = range(gate.slope.shape[1])
    levels = torch.linspace(-10, 8, num_levels, device=power.device)
    logits = gate.gate_logit(levels.view(-1, 1, 1, 1), power), levels.view(-1, 1, 1, 1) + power.log()
    learned, wiener = (
        torch.stack([logit.sigmoid()[..., ring == index].mean((1, 2)) for index in rings], dim=1) for logit in logits
    )
    rows = []
    for channel in range(len(power)):
        for index in rings:
            slope, offset = 1 + float(gate.slope[channel, index]), float(gate.offset[channel, index])
            log_power = float(power[channel][ring == index].log().mean())
            shift = log_power - (log_power + offset) / slope if slope else float("nan")
            values = {"slope": slope, "offset": offset, "half_open_shift": shift}
            rows.append({"channel": channel, "ring": index, **values})
    return levels.cpu().numpy(), learned.cpu().numpy(), wiener.cpu().numpy(), rows


def mechanism_figures(pipeline: FreqGateDiTPipeline) -> dict:
    """Pictures of what is special in a pipeline's variant, by name: "gate" or "band_gains"; none for the others."""
    inspectable = pipeline.transformer.inspectable
    if "gate" in inspectable:
        timesteps, gates = gate_table(pipeline.transformer, pipeline.scheduler.config.num_train_timesteps)
        return {"gate": plots.gate_curves(timesteps, gates)}
    if "band" in inspectable:
        return {"band_gains": plots.band_gain_curves(*usual_band_gains(pipeline))}
    return {}
