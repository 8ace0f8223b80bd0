"""In which order the octaves of the image are made."""

import numpy as np
import torch

from freqgate_dit import plots, report_plots
from freqgate_dit.metrics import band_power
from freqgate_dit.shapes_textures import STRUCTURES, TEXTURES
from freqgate_dit.traces import DenoisingTrace, NoPredictionError, last_crossing, noised_power
from freqgate_dit.training.decisions import factors
from freqgate_dit.training.report.page import Section
from freqgate_dit.training.report.subject import Spectrum, Subject


SAME_LEVEL = 0.25  # nats of log-SNR: less apart is the same step of the sampler
SHARES = (0.5, 0.9)  # of an octave's final power
COARSE_TO_FINE, UNTOLD = "from coarse to fine", "not to be told"
MOST_CLASSES = 8  # that the traces' table lists one by one


@torch.no_grad()
def trace_section(subject: Subject) -> Section:
    """In which order the octaves are made."""
    section = Section("The order of denoising", [], shown=("arrival",))
    around = subject.spectrum_around_classes
    spectra = {"latent": around or subject.data_spectrum}
    if subject.pipe.vae is not None:
        spectra["pixel"] = subject.pixel_spectrum
        section.shown += ("arrival_of_pixels",)
    count = min(subject.num_images, subject.batch_size)
    means = {space: known.mean if known else None for space, known in spectra.items()}
    if around:
        means["latent"] = around.mean[subject.labels[:count]]
    traces = {space: DenoisingTrace(space, mean=mean) for space, mean in means.items()}
    shown = [index for index in subject.diverse(6) if index < count]
    strip = []  # predictions of the images shown after each step, as the model sees them

    def watch(pipe, step, timestep, tensors):
        for trace in traces.values():
            trace(pipe, step, timestep, tensors)
        strip.append(tensors["pred_original_sample"][shown])
        return {}

    watched = {"callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": DenoisingTrace.tensor_inputs}
    try:
        subject.pipe(**subject.given(range(count)), **subject.options(output_type="latent"), **watched)
    except NoPredictionError as error:
        return Section(section.title, [f"Left out: {error}"])
    for space, trace in traces.items():
        known = spectra[space]
        name = "trace" if len(traces) == 1 else f"trace_of_{space}s"
        power = trace.predicted_power.mean((1, 2)).numpy()
        section.tables[name] = trace.rows()
        what = "latent" if space == "latent" and len(traces) > 1 else "image"
        octaves = known.octaves.numpy() if known else None
        caption = [_read_arrival(section, subject, trace, count, what, known)]
        if known:
            caption.append(_read_final_power(trace, power[-1] / octaves, known.source, what))
        elif space == "latent":
            caption.append("The pipeline holds no spectrum of the training data, so there is nothing to compare with.")
        section.show(name, report_plots.trace_figure(trace.log_snr, trace.bands, power, octaves), " ".join(caption))
    if around:
        section.reading.append(
            "Powers of the predicted image are those of its difference from the mean image of the class, which can be "
            "told from the label alone, in pure noise."
        )
    if spectra["latent"]:
        octaves = spectra["latent"].octaves
        _compare_with_forward_process(section, subject, traces["latent"], means["latent"], octaves)

    steps = np.unique(np.linspace(0, len(strip) - 1, 10).round().astype(int))
    images = [subject.pipe.postprocess(strip[step], "np") for step in steps]
    figure = plots.image_grid(
        list(zip(*images)),
        [subject.name_of(index) for index in shown],
        [f"{traces['latent'].log_snr[step]:+.1f}" for step in steps],
        "predicted clean image, columns: log-SNR",
    )
    caption = "What the model takes for the clean image, from noise to the end."
    errors = np.array([float((each - strip[-1]).square().mean() / strip[-1].var().clamp(min=1e-12)) for each in strip])
    near = last_crossing(traces["latent"].log_snr, -errors, -0.1)
    if np.isfinite(near):
        caption += (
            " Its mean squared difference from the last one is below a tenth of that one's variance from a log-SNR "
            f"of {near:+.1f} on."
        )
    section.show("predictions", figure, caption)
    return section


def _read_arrival(
    section: Section, subject: Subject, trace: DenoisingTrace, count: int, what: str, known: Spectrum | None
) -> str:
    """At which noise levels the octaves of `what` have a share of their final power, of all images, by class, on the
    built-in data by structure and by texture; and of the best linear denoiser of data that are `known`."""
    groups = {"all": range(count)}
    if subject.has_factors:
        for names, places in zip((STRUCTURES, TEXTURES), factors(torch.tensor(subject.labels[:count]))):
            groups |= {name: np.flatnonzero(places == place).tolist() for place, name in enumerate(names)}
    if subject.is_conditional and subject.pipe.num_classes <= MOST_CLASSES:
        for label in range(subject.pipe.num_classes):
            name = subject.pipe.id2label.get(label, str(label))
            groups[name] = [index for index in range(count) if subject.labels[index] == label]
    section.tables["arrival_of_pixels" if trace.space == "pixel" else "arrival"] = [
        {"space": what, "class": group, "share": share}
        | {f"{band} cycles": level for band, level in zip(trace.bands, trace.arrival(share, list(images)))}
        for group, images in groups.items()
        if images
        for share in SHARES
    ]
    linear = {}
    if known is not None and trace.space == "latent":
        linear = {share: known.linear_arrival(share) for share in SHARES}
        section.tables["arrival"] += [
            {"space": what, "class": "linear denoiser", "share": share}
            | {f"{band} cycles": level for band, level in zip(trace.bands, levels)}
            for share, levels in linear.items()
        ]
    arrivals = [trace.arrival(share) for share in SHARES]
    orders = [order_of(arrival) for arrival in arrivals]
    told = "; ".join(
        f"{share:.0%}: {order} ({', '.join(_level(level, trace) for level in arrival)})"
        for share, order, arrival in zip(SHARES, orders, arrivals)
    )
    section.claim(
        f"The octaves of the {what} are made from coarse to fine, by half and by nine tenths of their power.",
        None if UNTOLD in orders else set(orders) == {COARSE_TO_FINE},
        f"{told}; log-SNR of {', '.join(trace.bands)} cycles",
    )
    best = "; ".join(f"{share:.0%}: {', '.join(f'{x:+.1f}' for x in levels)}" for share, levels in linear.items())
    return (
        f"Mean over {count} images. Order in which the octaves of the predicted clean {what} "
        f"({', '.join(trace.bands)} cycles) reach a share of their final power, and the log-SNR of each: {told}. "
        + (
            "The best linear denoiser of data with this spectrum, which takes every frequency by itself, has them at "
            f"{best}."
            if linear
            else ""
        )
    )


def _level(level: float, trace: DenoisingTrace) -> str:
    return "from the start" if level == trace.log_snr[0] else f"{level:+.1f}"


def _read_final_power(trace: DenoisingTrace, ratio: np.ndarray, source: str, what: str) -> str:
    """Power `(bands,)` of the finished `what` over the data's, which is known from `source`."""
    worst = int(np.abs(np.log(ratio)).argmax())
    return (
        f"At the end the octaves of the {what} have {', '.join(f'{value:.2f}' for value in ratio)} times the power of "
        f"the training data, as known from {source}; the largest gap is at {trace.bands[worst]} cycles per image."
    )


def _compare_with_forward_process(
    section: Section, subject: Subject, trace: DenoisingTrace, mean: torch.Tensor, data: torch.Tensor
):
    """The spectrum of the noisy samples beside that of noised data, which is known without any network.

    Args:
        mean: of the data, `(C, H, W)`, or of each image's class.
        data: `(bands,)` power around it.
    """
    # x_t after a step has the noise of the next one; its power is about zero, not about the data's mean.
    steps = torch.from_numpy(trace.timesteps[1:])
    whole = data + band_power(mean.view(-1, *mean.shape[-3:]).float()).mean((0, 1)).double()
    forward = noised_power(whole, subject.alphas_cumprod, steps).numpy()
    sampled = trace.latent_power.mean((1, 2)).numpy()[:-1]
    section.tables["forward_process"] = [
        {"timestep": float(step), "log_snr": float(level), "band": band, "power": a, "sampled_power": b}
        for step, level, row, own in zip(steps, trace.log_snr[1:], forward.tolist(), sampled.tolist())
        for band, a, b in zip(trace.bands, row, own)
    ]
    section.show(
        "forward_process",
        report_plots.forward_figure(trace.log_snr[1:], trace.bands, sampled, forward),
        "The spectrum of the noisy samples on the way is at most a factor of "
        f"{np.exp(np.abs(np.log(sampled / forward)).max()):.2f} from that of noised training data. The nearer to 1, "
        "the less it says of the network: noise schedule and data alone make it. So the order is read from the "
        "predicted image.",
    )


def order_of(arrival: list[float]) -> str:
    """In which order the octaves arrive, in words, by their log-SNR from the lowest frequency to the highest."""
    levels = np.array(arrival)
    if not np.isfinite(levels).all():
        return UNTOLD
    if np.ptp(levels) < SAME_LEVEL:
        return "all at about the same level"
    # Of all pairs, not of neighbours alone: many small steps back are a large one.
    steps = (levels[None] - levels[:, None])[np.triu_indices(len(levels), 1)]
    if steps.min() > -SAME_LEVEL and levels[-1] - levels[0] > SAME_LEVEL:
        return COARSE_TO_FINE
    if steps.max() < SAME_LEVEL and levels[0] - levels[-1] > SAME_LEVEL:
        return "from fine to coarse"
    return "not in the order of their frequencies"
