"""What a report of a pipeline says: each function measures one thing and reads it in plain language."""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from diffusers import DDPMScheduler
from tqdm.auto import tqdm

from freqgate_dit import plots
from freqgate_dit.analysis import (
    BRANCHES,
    band_gain_statistics,
    band_gain_table,
    band_visibility,
    gate_statistics,
    gate_table,
    spectral_gate_table,
    wiener_gain,
)
from freqgate_dit.interventions import changed_gate, gate_changes, labels_from, labels_in_path
from freqgate_dit.metrics import band_power
from freqgate_dit.pipelines.pipeline_freqgate_dit import FreqGateDiTPipeline, encode_to_latent_moments
from freqgate_dit.scheduling_spectral_euler import spectral_mean, spectral_power
from freqgate_dit.shapes_textures import STRUCTURES, TEXTURES, ShapesTextures
from freqgate_dit.spectral import SpectrumStatistics, idct2, octave_bands, octave_labels
from freqgate_dit.statistics import bootstrap
from freqgate_dit.traces import DenoisingTrace, NoPredictionError, log_snr, noised_power, span_levels
from freqgate_dit.training.decisions import FACTORS, KINDS, LEAST_CHANGE, PREDICTED, factors, swap_labels
from freqgate_dit.training.factor_classifier import scaled, train_factor_classifier
from freqgate_dit.training.information import factor_information, half_level
from freqgate_dit.training.latents import CachedLatents
from freqgate_dit.training.report_page import Section
from freqgate_dit.training.validation import Validation, ValidationResult


LEAST_SHOWN = 0.5
SAME_LEVEL = 0.25  # nats of log-SNR: less apart is the same step of the sampler
SAME_DECISION = 0.5
MOST_GATED, OF_A_CLASS = 64, 5  # classes whose gates are read, and timesteps of each
SHARES = (0.5, 0.9)  # of an octave's final power
SMALL_INDEX = 0.1
SAME_DIRECTION = 0.5  # three channels of four; or a correlation with log-SNR
LEAST_RANGE = 0.01  # of a gate over time, for it to have moved
SMALL_CHANGE = 0.01  # of the held-out loss
COARSE_TO_FINE, UNTOLD = "from coarse to fine", "not to be told"
MOST_CLASSES = 8  # that the traces' table lists one by one


@dataclass
class Subject:
    """What is analysed, and how.

    Args:
        world: of the built-in data that the pipeline was trained on, or `None`: then labels have no known factors.
        num_images: sampled for each measurement.
        steps: of the scheduler.
        prompts: of a text-conditional pipeline, used in turn.

    Raises:
        ValueError: for a text-conditional pipeline without prompts.
    """

    pipe: FreqGateDiTPipeline
    world: str | None
    num_images: int = 128
    steps: int = 30
    num_pairs: int = 64
    num_levels: int = 12
    seed: int = 0
    batch_size: int = 128
    prompts: Sequence[str] = ()
    guidance_scale: float = field(default=1.0, init=False)  # guidance would mix its own effects in

    def __post_init__(self):
        if self.pipe.is_text_conditional and not self.prompts:
            raise ValueError("`prompts` is empty, and this pipeline is conditioned on text: give some.")
        if self.pipe.num_classes != len(STRUCTURES) * len(TEXTURES):
            self.world = None  # images of the world, but no labels that say what they should show

    @property
    def is_conditional(self) -> bool:
        """Whether there are class labels that can be exchanged."""
        return self.pipe.num_classes is not None

    @property
    def has_null_condition(self) -> bool:
        return self.is_conditional and self.pipe.has_null_condition

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        return self.pipe.scheduler.alphas_cumprod.cpu()

    @property
    def labels(self) -> list[int]:
        return [index % self.pipe.num_classes for index in range(self.num_images)]

    def diverse(self, count: int) -> list[int]:
        """Images to look at, by index: of the built-in data, whose class is 8 x structure + texture, another structure
        and another texture each."""
        step = len(TEXTURES) + 1 if self.world is not None else 1
        return [step * index for index in range(count)]

    def name_of(self, index: int) -> str:
        """What image `index` is to show, in lines."""
        if self.pipe.is_text_conditional:
            return textwrap.fill(textwrap.shorten(self.prompts[index % len(self.prompts)], 60), 20)
        if not self.is_conditional:
            return str(index)
        label = index % self.pipe.num_classes
        return str(self.pipe.id2label.get(label, label)).replace(" ", "\n")

    def other_label(self, labels):
        """Another class for each; of the built-in data one that differs in structure and in texture."""
        classes = self.pipe.num_classes
        return (labels + (classes // 2 + 3 if self.world else 1)) % classes

    @property
    def image_size(self) -> int:
        return self.pipe.transformer.config.sample_size * self.pipe.vae_scale_factor

    @cached_property
    def classifier(self):
        """Judge of the built-in data's factors, and its accuracies on held-out real images."""
        with torch.enable_grad():
            return train_factor_classifier(world=self.world, image_size=self.image_size, progress=False)

    @torch.no_grad()
    def to_model_space(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(N, 3, H, W)` in [-1, 1] as the model sees them."""
        vae = self.pipe.vae
        return images if vae is None else encode_to_latent_moments(vae, images.to(vae.device))[0].cpu()

    def real_images(self, count: int, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Images of the world, as the model sees them, and their labels."""
        data = ShapesTextures(count, self.image_size, self.world, split=split)
        return self.to_model_space(scaled(data.images(range(count)))), data.labels(range(count))

    @cached_property
    def held_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.real_images(512, "validation")

    @cached_property
    def data_information(self) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, float]]:
        """What a classifier of noisy images knows, `factor_information`, and the level of half of it by factor."""
        levels, curves = factor_information(self.world, self.image_size)
        return levels, curves, {name: half_level(levels, nats) for name, nats in curves.items()}

    @property
    def data_difference(self) -> float | None:
        """By how much more log-SNR half of the texture is known than half of the structure; `None` if untold."""
        if self.pipe.vae is not None:
            return None  # that classifier reads noisy images, and the noise is on latents
        half = self.data_information[2]
        difference = half["texture"] - half["structure"]
        return difference if np.isfinite(difference) else None

    @cached_property
    def data_spectrum(self) -> tuple[torch.Tensor, torch.Tensor, str] | None:
        """Mean image `(C, H, W)` and power of the octaves `(bands,)` of the training data in the model's space, and
        where they are from; of the built-in data measured, otherwise from what the pipeline keeps."""
        size = self.pipe.transformer.config.sample_size
        spectrum = self.pipe.scheduler.config.get("spectrum") or self.pipe.scheduler.config.get("_spectrum")
        own = self.pipe.transformer.spectrum
        if self.world is not None:
            statistics = SpectrumStatistics()
            statistics.update(self.real_images(1024, "train")[0])
            mean, power, source = statistics.mean, statistics.power, "1,024 images of the training data"
        elif own is not None:
            mean, power, source = own.mean.cpu().double(), own.power.cpu().double(), "the weights"
        elif spectrum:
            mean, power = spectral_mean(spectrum, size, size), spectral_power(spectrum, size, size)
            source = "the scheduler's configuration, which keeps means over rings: about right"
        else:
            return None
        power, bands = power.mean(0), octave_bands(size, size)
        octaves = torch.stack([power[bands == band].mean() for band in range(int(bands.max()) + 1)])
        return idct2(mean), octaves, source

    @torch.no_grad()
    def sample(self, **options) -> torch.Tensor:
        """Images `(num_images, 3, H, W)` in [-1, 1]; image i has the seed `seed + i`, whatever is changed."""
        images = []
        for batch in self.batches():
            images.append(self.pipe(**self.given(batch), **self.options(**options)).images)
        return 2 * torch.cat(images).float().cpu() - 1

    def given(self, indices: Sequence[int]) -> dict:
        """Condition and seeds of some of the images, as the pipeline takes them."""
        seeds = {"seed": [self.seed + index for index in indices]}
        if self.is_conditional:
            return {"class_labels": [self.labels[index] for index in indices], **seeds}
        if self.pipe.is_text_conditional:
            return {"prompt": [self.prompts[index % len(self.prompts)] for index in indices], **seeds}
        return {"num_images_per_label": len(indices), **seeds}

    def batches(self) -> Iterator[list[int]]:
        for start in range(0, self.num_images, self.batch_size):
            yield list(range(start, min(start + self.batch_size, self.num_images)))

    def options(self, **options) -> dict:
        fixed = {"num_inference_steps": self.steps, "guidance_scale": self.guidance_scale, "output_type": "pt"}
        return {**fixed, **options}


# -- traces -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def trace_section(subject: Subject) -> Section:
    """In which order the octaves are made."""
    mean, data, source = subject.data_spectrum or (None, None, None)
    spaces = ["latent"] if subject.pipe.vae is None else ["latent", "pixel"]
    section = Section("The order of denoising", [], shown=("arrival",))
    traces = {space: DenoisingTrace(space, mean=mean if space == "latent" else None) for space in spaces}

    count = min(subject.num_images, subject.batch_size)
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
        power = trace.predicted_power.mean((1, 2)).numpy()
        of_data = data.numpy() if data is not None and space == "latent" else None
        name = "trace" if len(spaces) == 1 else f"trace_of_{space}s"
        section.figures[name] = plots.trace_figure(trace.log_snr, trace.bands, power, of_data)
        section.tables[name] = trace.rows()
        groups = {"all": slice(None)}
        if subject.is_conditional and subject.pipe.num_classes <= MOST_CLASSES:
            names = subject.pipe.id2label
            for label in range(subject.pipe.num_classes):
                groups[names.get(label, str(label))] = [i for i in range(count) if subject.labels[i] == label]
        for group, images in groups.items():
            if images == []:
                continue
            for share in SHARES:
                row = {"space": "image" if space == "pixel" or len(spaces) == 1 else "latent", "class": group}
                row["share"] = share
                for band, level in zip(trace.bands, trace.arrival(share, images)):
                    row[f"{band} cycles"] = level
                section.tables.setdefault(f"arrival{'' if space == 'latent' else '_of_pixels'}", []).append(row)
        what = "latent" if space == "latent" and len(spaces) > 1 else "image"
        arrivals = [trace.arrival(share) for share in SHARES]
        orders = [order_of(arrival) for arrival in arrivals]
        told = "; ".join(
            f"{share:.0%}: {order} ({', '.join(f'{level:+.1f}' for level in arrival)})"
            for share, order, arrival in zip(SHARES, orders, arrivals)
        )
        section.reading.append(
            f"Mean over {count} images. Order in which the octaves of the predicted clean {what} "
            f"({', '.join(trace.bands)} cycles) reach a share of their final power, and the log-SNR of each: {told}. "
            "On data whose power falls with frequency any good denoiser goes from coarse to fine, whatever its "
            "conditioning: at a given noise level only the octaves that stand out of the noise can be told."
        )
        section.claim(
            f"The octaves of the {what} are made from coarse to fine (as by any good denoiser of such data), by half "
            "and by nine tenths of their power.",
            None if UNTOLD in orders else set(orders) == {COARSE_TO_FINE},
            f"{told}; log-SNR of {', '.join(trace.bands)} cycles",
        )
        if of_data is not None:
            ratio = power[-1] / of_data
            worst = int(np.abs(np.log(ratio)).argmax())
            section.reading.append(
                f"At the end the octaves have {', '.join(f'{value:.2f}' for value in ratio)} times the power of the "
                f"training data, as known from {source}; the largest gap is at {trace.bands[worst]} cycles per image."
            )
            # x_t after a step has the noise of the next one; its power is about zero, not about the data's mean.
            steps = torch.from_numpy(trace.timesteps[1:])
            whole = data + band_power(mean[None].float()).mean((0, 1)).double()
            forward = noised_power(whole, subject.alphas_cumprod, steps).numpy()
            sampled = trace.latent_power.mean((1, 2)).numpy()[:-1]
            section.figures["forward_process"] = plots.forward_figure(trace.log_snr[1:], trace.bands, sampled, forward)
            section.tables["forward_process"] = [
                {"timestep": float(step), "log_snr": float(level), "band": band, "power": a, "sampled_power": b}
                for step, level, row, own in zip(steps, trace.log_snr[1:], forward.tolist(), sampled.tolist())
                for band, a, b in zip(trace.bands, row, own)
            ]
            section.reading.append(
                "The spectrum of the noisy samples on the way is at most a factor of "
                f"{np.exp(np.abs(np.log(sampled / forward)).max()):.2f} from that of noised training data. The nearer "
                "to 1, the less it says of the network: noise schedule and data alone make it. So the order is read "
                "from the predicted image."
            )
    steps = np.unique(np.linspace(0, len(strip) - 1, 10).round().astype(int))
    images = [subject.pipe.postprocess(strip[step], "np") for step in steps]
    section.figures["predictions"] = plots.image_grid(
        list(zip(*images)),
        [subject.name_of(index) for index in shown],
        [f"{traces['latent'].log_snr[step]:+.1f}" for step in steps],
        "predicted clean image, columns: log-SNR",
    )
    if len(spaces) > 1:
        section.shown = ("arrival", "arrival_of_pixels")
    if data is None:
        section.reading.append(
            "The pipeline holds no spectrum of the training data, so there is nothing to compare with."
        )
    return section


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


# -- gates ------------------------------------------------------------------------------------------------------------


def gate_section(subject: Subject) -> Section:
    """What the gates are, over time; of the conditioning, and of the preconditioning where that is learned."""
    section = block_gate_section(subject)
    preconditioner = subject.pipe.transformer.preconditioner
    if preconditioner is not None and preconditioner.kind == "learned":
        levels, learned, wiener, rows = spectral_gate_table(subject.pipe.transformer)
        section.figures["spectral_gate"] = plots.spectral_gate_curves(levels, learned, wiener)
        section.tables["spectral_gate"] = rows
        shifts = np.array([row["half_open_shift"] for row in rows])
        slopes = np.array([row["slope"] for row in rows])
        section.reading.append(
            "The learned spectral gate is half open later than the Wiener gate by "
            f"{np.nanmean(shifts):+.2f} nats of log-SNR on average over rings and channels (from "
            f"{np.nanmin(shifts):+.2f} to {np.nanmax(shifts):+.2f}), with a slope of {slopes.mean():.2f} (Wiener's is "
            "1). Unlike a gate of the blocks it is tied to its frequencies. For Gaussian data it would not move."
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
        statistics = gate_statistics(gates, levels, wiener_gain(known[1].numpy(), levels) if known else None)
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
        figures = {"gate": plots.gate_curves(timesteps, gates)}
        tables = {"gates": statistics, "gate_means": rows, "gate_channels": channel_rows(gates, levels)}
        section = Section(title, [reading], figures, tables, ("gates",))
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
    timesteps, low, high = band_gain_table(transformer)
    levels = log_snr(subject.alphas_cumprod, torch.from_numpy(timesteps)).numpy()
    ratio = plots.decibel(low, high)  # (T, blocks, 2)
    visibility = band_visibility(transformer, timesteps)
    classes = range(min(subject.pipe.num_classes, MOST_GATED)) if subject.is_conditional else []
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
        f"Under the null condition and in noise the low band's gain exceeds the high band's by {in_noise:+.1f} dB on "
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
        reading,
        {"band_gains": plots.band_gain_curves(timesteps, low, high)},
        {"gains": rows, "gain_curves": curves},
        ("gains",),
    )
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
        "Under the null condition the low band gives way to the high one in every branch as noise falls"
        + ("." if is_frequency else " (bands of this control are random directions)."),
        all(row["correlation"] < -SAME_DIRECTION for row in rows),
        f"correlation with log-SNR {listed(rows, 'correlation', '+.2f')}",
    )
    return section


# -- interventions ----------------------------------------------------------------------------------------------------


def interventions_of(subject: Subject) -> dict[str, Callable[[], AbstractContextManager]]:
    """Name -> context in which the model is changed, of what can be done to it."""
    transformer, classes = subject.pipe.transformer, subject.pipe.num_classes
    found = {}
    if subject.has_null_condition:
        found["no condition"] = partial(labels_from, transformer, classes, -np.inf, subject.alphas_cumprod)
        paths = [
            path for path in ("low", "high") if getattr(transformer.transformer_blocks[0], path, None) is not None
        ]
        for path in paths:
            found[f"no condition in {path}"] = partial(labels_in_path, transformer, path, classes)
        for path in paths if len(paths) == 2 else []:
            found[f"other condition in {path}"] = partial(labels_in_path, transformer, path, subject.other_label)
    train_steps = subject.pipe.scheduler.config.num_train_timesteps
    for change in gate_changes(transformer):
        found[f"gate {change}"] = partial(changed_gate, transformer, change, train_steps)
    return found


def intervention_section(subject: Subject) -> Section:
    """What changes in images and in the loss, from the same noise, when a part of the mechanism is taken away."""
    title = "Interventions"
    found = interventions_of(subject)
    if not found:
        return Section(title, ["A model without null condition and gates has no part that could be taken away."])
    plain = subject.sample()
    bands = octave_labels(*plain.shape[-2:])
    reference = band_power(plain, plain.mean(0)).mean((0, 1))
    judged = subject.world is not None
    correct, of_other = {}, {}
    if judged:
        others = [subject.other_label(label) for label in subject.labels]
        correct["none"], of_other["none"] = judge(subject, plain, subject.labels), judge(subject, plain, others)
    losses = {"none": validate(subject).loss} if judged else {}
    effects, images = {}, {}
    for name, context in tqdm(found.items(), desc="interventions", unit="run"):
        with context():
            images[name] = subject.sample()
            if judged:
                losses[name] = validate(subject).loss
        effects[name] = (band_power(images[name] - plain).mean((0, 1)) / reference).tolist()
        if judged:
            correct[name] = judge(subject, images[name], subject.labels)
            of_other[name] = judge(subject, images[name], others)
    rows = []
    for name in ["none", *found]:
        row = {"intervention": name}
        if judged:
            row |= {f"{factor}_right": float(correct[name][factor].mean()) for factor in FACTORS}
            row |= {f"{factor}_of_other": float(of_other[name][factor].mean()) for factor in FACTORS}
            row["held_out_loss"] = losses[name]
        row |= {f"change_{band}": value for band, value in zip(bands, effects.get(name, [0.0] * len(bands)))}
        rows.append(row)
    section = Section(
        title, [], {"effects": plots.effect_figure(effects, bands)}, {"interventions": rows}, ("interventions",)
    )
    section.reading.append(
        f"{subject.num_images} images from the same noise, without guidance. Numbers are the power of the change over "
        "the power of the image, per octave: 0 is no effect, 2 as different as two unrelated images."
    )
    if judged:
        accuracy = subject.classifier[1]
        section.reading.append(
            "Structure and texture are read by a classifier that is right on "
            f"{accuracy['structure']:.1%} and {accuracy['texture']:.1%} of held-out real images; chance is 12.5%."
        )
    if "gate mean" in effects and judged:
        change = losses["gate mean"] / losses["none"] - 1
        section.reading.append(
            f"With the gates held at their mean over time the held-out loss changes by {change:+.2%}, with gates at "
            f"the "
            f"mirrored timestep by {losses['gate reversed'] / losses['none'] - 1:+.2%}: that much hangs on their "
            f"course."
        )
        section.claim(
            f"The model depends on the course of its gates: held at their mean over time, its held-out loss rises by "
            f"more than {SMALL_CHANGE:.0%}.",
            change > SMALL_CHANGE,
            f"{change:+.2%}, on the same 512 images and noise",
        )
    if judged and "other condition in low" in found:
        told = "; ".join(
            f"in {path.capitalize()} alone, {of_other[name]['structure'].mean():.0%} show B's structure "
            f"({correct[name]['structure'].mean():.0%} A's) and {of_other[name]['texture'].mean():.0%} B's texture "
            f"({correct[name]['texture'].mean():.0%} A's)"
            for path, name in (("low", "other condition in low"), ("high", "other condition in high"))
        )
        section.reading.append(f"Images of label A with another label B {told}.")
    if judged and "no condition in high" in found and "no condition in low" in found:
        index = dissociation(correct)
        section.tables["dissociation"] = [
            {"index": index.estimate, "low": index.low, "high": index.high, "standard_error": index.standard_error}
        ]
        section.shown += ("dissociation",)
        shown = {factor: correct["none"][factor].mean() for factor in FACTORS}
        serves = division(index)
        verdict = {
            1: "the path called Low serves structure more than texture, compared with High",
            -1: "the path called Low serves texture more than structure, compared with High",
            0: "structure and texture are hardly shared out between the two paths",
            None: "undecided, more images would tell",
        }[serves]
        if min(shown.values()) < LEAST_SHOWN:
            serves, verdict = (
                None,
                f"it says little, as the unchanged model is right in {shown['structure']:.0%} of structures and "
                f"{shown['texture']:.0%} of textures, and what is not there cannot be lost",
            )
        _claim_division(section, subject, index, correct, serves)
        section.reading.append(
            f"Double dissociation index {index.estimate:+.3f} (95 % {index.low:+.3f} to {index.high:+.3f}, over "
            f"images; "
            f"a perfect division of labour would be 0.875, as chance is right once in eight): {verdict}. It is of "
            f"this one model."
        )
    if {"no condition in low", "no condition in high"} <= found.keys() and subject.pipe.num_classes > 1:
        section.figures["hybrids"] = hybrid_figure(subject)
        section.reading.append(
            "Hybrids: rows of the last picture have the label of A in one path and of B in the other."
        )
    return section


def judge(subject: Subject, images: torch.Tensor, labels: Sequence[int]) -> dict[str, np.ndarray]:
    """Factor -> `(num_images,)` bool: the image shows it as its label of `labels` says."""
    with torch.no_grad():
        logits = subject.classifier[0](images)
    expected = factors(torch.tensor(labels))
    return {name: one.argmax(-1).numpy() == right for name, one, right in zip(FACTORS, logits, expected)}


def dissociation(correct: dict[str, dict[str, np.ndarray]], num_resamples: int = 500):
    """Double dissociation index: half of (loss of structure - loss of texture without Low's condition) minus the same
    without High's. 1: Low carries all of structure and nothing of texture, High the reverse."""

    def index(chosen: np.ndarray) -> float:
        def loss(path: str, factor: str) -> float:
            return correct["none"][factor][chosen].mean() - correct[f"no condition in {path}"][factor][chosen].mean()

        low, high = (loss(path, "structure") - loss(path, "texture") for path in ("low", "high"))
        return float(low - high) / 2

    return bootstrap(index, len(correct["none"]["structure"]), num_resamples=num_resamples)


def validate(subject: Subject, num_bins: int = 10, with_null: bool = False) -> ValidationResult:
    """Held-out error of the model's own prediction on 512 images of its world, always the same, noise too; without the
    condition too where asked."""
    pipe, device = subject.pipe, subject.pipe.device
    config = pipe.scheduler.config
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    scheduler = DDPMScheduler(**{name: config[name] for name in names})
    images, labels = subject.held_out
    null_label = pipe.num_classes if with_null else None
    data = CachedLatents(images[:, None], None, labels)
    validation = Validation(data, scheduler, len(images), 128, null_label=null_label, num_bins=num_bins)

    def denoise(noisy, timesteps, labels):
        inputs = noisy.to(device, pipe.transformer.dtype), timesteps.to(device)
        return pipe.transformer(*inputs, class_labels=labels.to(device)).sample.float().cpu()

    return validation.summarise(validation(denoise))


def division(index) -> int | None:
    """1: Low serves structure more than texture, compared with High; -1: the reverse; 0: neither; `None` undecided."""
    if index.low > SMALL_INDEX:
        return 1
    if index.high < -SMALL_INDEX:
        return -1
    return 0 if -SMALL_INDEX < index.low and index.high < SMALL_INDEX else None


def _claim_division(section: Section, subject: Subject, index, correct: dict, serves: int | None):
    """Whether the paths share out structure and texture: of Freq-Gate, whose names are arbitrary, either way round."""
    transformer = subject.pipe.transformer
    if "band" not in transformer.inspectable:
        claim, sides = "One of Low and High serves structure more, the other texture", (1, -1)
    else:
        claim, sides = "The condition in Low serves structure more than texture, compared with that in High", (1,)
        if transformer.config.band_basis == "random":
            claim += " (bands of this control are random directions)"
    losses = ", ".join(
        f"{correct['none'][factor].mean() - correct[f'no condition in {path}'][factor].mean():+.0%} {factor} in {path}"
        for path in ("low", "high")
        for factor in FACTORS
    )
    section.claim(
        f"{claim}.",
        None if serves is None else serves in sides,
        f"double dissociation index {index.estimate:+.3f} [{index.low:+.3f}, {index.high:+.3f}] of at most 0.875; "
        f"lost without the condition: {losses}",
    )


def hybrid_figure(subject: Subject, count: int = 6):
    """Images of label A, of label B, and with the label of B in one path alone, from the same noise."""
    pipe, transformer = subject.pipe, subject.pipe.transformer
    shown = subject.diverse(count)
    ours = [index % pipe.num_classes for index in shown]
    others = [subject.other_label(label) for label in ours]

    def images(labels, context):
        with context:
            seeds = [subject.seed + index for index in range(count)]
            return list(pipe(labels, seed=seeds, **subject.options(output_type="np")).images)

    other = torch.tensor(others)
    rows = {
        "A": images(ours, nullcontext()),
        "A, B in Low": images(ours, labels_in_path(transformer, "low", other)),
        "A, B in High": images(ours, labels_in_path(transformer, "high", other)),
        "B": images(others, nullcontext()),
    }
    b_names = [str(pipe.id2label.get(label, label)) for label in others]
    names = [f"{subject.name_of(index)}\nB: {name}" for index, name in zip(shown, b_names)]
    return plots.image_grid(list(rows.values()), list(rows), names, "columns: label A, label B")


# -- decisions --------------------------------------------------------------------------------------------------------


def decision_section(subject: Subject) -> Section:
    """When structure and texture are decided, by exchanging the label on the way."""
    title = "When structure and texture are decided"
    if subject.world is None:
        return Section(
            title,
            [
                "Left out: this needs labels whose factors are known, those of the built-in data (`dataset: "
                "shapes_textures`), and this pipeline was trained on other data, or lacks the training_config.yaml "
                "that would say so."
            ],
        )
    classifier = subject.classifier[0]
    section = Section(title, [])
    for kind in KINDS if subject.has_null_condition else KINDS[:1]:
        swaps = swap_labels(
            subject.pipe,
            classifier,
            subject.num_pairs,
            subject.num_levels,
            subject.steps,
            kind,
            subject.seed,
            subject.batch_size,
        )
        shown = {factor: swaps.shown(factor) for factor in FACTORS}
        if min(shown.values()) < LEAST_SHOWN:
            section.reading.append(
                f"No level can be given: only {shown['structure']:.0%} of the images show the structure of either "
                f"label, and {shown['texture']:.0%} the texture. Train for longer first."
            )
            break
        still = [factor for factor in FACTORS if swaps.change(factor) < LEAST_CHANGE]
        if still:
            section.reading.append(
                f"Label {kind}: no level can be given, as the {' and the '.join(still)} of the images is hardly moved "
                "by the noise level of the exchange."
            )
            continue
        levels = {factor: swaps.level(factor) for factor in FACTORS}
        shares = {factor: swaps.share(factor) for factor in FACTORS}
        difference = swaps.difference()
        section.figures[f"label_{kind}"] = plots.decision_figure(swaps.log_snr, shares, levels, f"Label {kind}")
        section.tables[f"label_{kind}"] = [
            {"log_snr": float(level), **{factor: float(shares[factor][i]) for factor in FACTORS}}
            for i, level in enumerate(swaps.log_snr)
        ]
        row = {
            "world": subject.world,
            "kind": kind,
            **levels,
            "difference": difference.estimate,
            "low": difference.low,
            "high": difference.high,
            "of_data": subject.data_difference,
        }
        section.tables.setdefault("levels", []).append(row)
        section.shown = ("levels",)
        if kind == "swap":
            _read_swap(section, subject, levels, difference)
    return section


def side(interval, centre: float, least: float = 0.0) -> int | None:
    """Of an interval: 1 above `centre` by more than `least`, -1 below it by more than that, otherwise 0 where it is
    within `SAME_DECISION` of it, `None` undecided."""
    low, high = interval.low - centre, interval.high - centre
    if low > least or high < -least:
        return 1 if low > least else -1
    return 0 if -SAME_DECISION < low and high < SAME_DECISION else None


def _read_swap(section: Section, subject: Subject, levels: dict, difference):
    predicted, of_data = PREDICTED[subject.world], subject.data_difference
    interval = f"{difference.estimate:+.2f} (95 % {difference.low:+.2f} to {difference.high:+.2f}, over pairs)"
    section.reading.append(
        f"{subject.num_pairs} pairs of labels, exchanged at {subject.num_levels} noise levels. Structure is decided "
        f"at a log-SNR of {levels['structure']:+.2f}, texture at {levels['texture']:+.2f}; difference {interval}. The "
        "interval is of this one model's samples, not of training."
    )
    # Where a sign is predicted, any difference of that sign will do; where none is, only one that is not small.
    found = side(difference, 0.0, 0.0 if predicted else SAME_DECISION)
    names = {1: "texture after structure", -1: "texture before structure", 0: "both at about the same level"}
    if found is None:
        verdict = "Undecided: more pairs would tell."
    else:
        verdict = (
            f"Found: {names[found]}. That is {'as' if found == predicted else 'other than'} predicted for the world "
            f"'{subject.world}' if lower frequencies are decided first ({names[predicted]})."
        )
    section.reading.append(verdict)
    first = "The factor of the lower frequency is decided first" if predicted else "Neither factor is decided first"
    section.claim(
        f"{first} (world '{subject.world}': {names[predicted]}).",
        None if found is None else found == predicted,
        f"texture minus structure {interval}",
    )
    if of_data is None:
        return
    beyond = side(difference, of_data, SAME_DECISION)
    compared = {
        1: "the model decides the texture later still, compared with the structure",
        -1: "the model decides the texture earlier than that, compared with the structure",
        0: "the model's order is the data's",
        None: "whether the model's order is the data's is undecided, more pairs would tell",
    }[beyond]
    section.reading.append(
        f"The noisy images themselves tell the two apart by {of_data:+.2f}, whatever the denoiser: {compared}. "
        "What goes beyond the data may be the model's own preference, or the difference of two measures: half of the "
        "images here, half of the information there."
    )
    section.claim(
        f"Structure and texture are decided as far apart as the noisy data tell them, to {SAME_DECISION} nats.",
        None if beyond is None else beyond == 0,
        f"texture minus structure {interval}; of the data {of_data:+.2f}",
    )


# -- information ------------------------------------------------------------------------------------------------------


def information_section(subject: Subject) -> Section:
    """At which noise level the condition can say anything, and whether the model's use of it is plausible."""
    title = "What the condition can say, and when"
    if subject.world is None:
        reading = (
            "Left out: held-out images of the training data are needed, and only the built-in data can be made anew."
        )
        return Section(title, [reading])
    section = Section(title, [])
    curve, factor_curves, half = None, {}, {}
    if subject.has_null_condition:
        result = validate(subject, num_bins=20, with_null=True)
        curve = information_density(result, subject.alphas_cumprod)
        section.tables["information_of_the_model"] = curve
        section.tables["ceiling"] = [
            {"nats": result.information, "standard_error": result.information_se, "entropy": result.label_entropy}
        ]
        section.shown += ("ceiling",)
        section.reading.append(_read_ceiling(result))
        low, high = information_interval(result)
        inside = 0 <= low and high <= result.label_entropy
        section.claim(
            "The information that the use of the label amounts to lies between nothing and the label's entropy.",
            True if inside else False if high < 0 or low > result.label_entropy else None,
            f"{result.information:.2f} [{low:.2f}, {high:.2f}] of {result.label_entropy:.2f} nats",
        )
    if subject.pipe.vae is None:
        levels, factor_curves, half = subject.data_information
        section.tables["information_of_the_data"] = [
            {"log_snr": float(level), **{name: float(nats[i]) for name, nats in factor_curves.items()}}
            for i, level in enumerate(levels)
        ]
        if subject.data_difference is None:
            section.reading.append(
                "A classifier of noisy images never knows half of one of the factors here, so it tells no levels."
            )
        else:
            section.tables["half"] = [{**half, "difference": subject.data_difference}]
            section.shown += ("half",)
            section.reading.append(
                "Of the data alone, whatever the model: half of what there is to know of the structure is known to a "
                f"classifier of noisy images at a log-SNR of {half['structure']:+.2f}, of the texture at "
                f"{half['texture']:+.2f}. A label exchanged well above that level comes too late for an ideal "
                "denoiser, so the levels of the last section should lie in this order."
            )
    else:
        section.reading.append(
            "When the data itself tells structure and texture is left out: the classifier reads noisy images, and "
            "this model's noise is on latents."
        )
    if curve or factor_curves:
        section.figures["information"] = plots.information_figure(
            curve, (levels, factor_curves, half) if factor_curves else None
        )
    return section


def information_density(result: ValidationResult, alphas_cumprod: torch.Tensor) -> list[dict]:
    """Information about the label that a model's predictions use, in nats per nat of log-SNR, by span of timesteps.

    Returns:
        per span, from clean to noise: its middle "log_snr", "density", and its part in each octave.
    """
    levels = span_levels(alphas_cumprod, len(result.num_images))
    table = result.information_table / (levels[:-1] - levels[1:])[:, None]
    return [
        {
            "log_snr": float(levels[i] + levels[i + 1]) / 2,
            "density": float(row.sum()),
            **{f"{band} cycles": float(value) for band, value in zip(result.bands, row, strict=True)},
        }
        for i, row in enumerate(table)
    ]


def information_interval(result: ValidationResult) -> tuple[float, float]:
    """Two standard errors around the information that a model's predictions use, in nats."""
    error = 2 * result.information_se
    return result.information - error, result.information + error


def _read_ceiling(result: ValidationResult) -> str:
    nats, entropy = result.information, result.label_entropy
    low, high = information_interval(result)
    if low > entropy:
        verdict = (
            "More than there is to know: without the label it predicts worse than it could, or uses the label in "
            "place of what the noisy image shows. So the shape of its curve is no evidence of when the label matters"
        )
    elif high < 0:
        verdict = "Less than nothing: with the label it predicts worse than without"
    else:
        verdict = "That is possible for an ideal denoiser, so the shape of its curve can be read"
    return (
        f"The model's predictions with the label are better than without by as much as {nats:.2f} "
        f"+- {high - nats:.2f} nats (two standard errors, 512 images) of information would allow; the labels have "
        f"{entropy:.2f}. {verdict}."
    )


SECTIONS = {
    "order": trace_section,
    "gates": gate_section,
    "interventions": intervention_section,
    "information": information_section,
    "decisions": decision_section,
}
