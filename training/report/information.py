"""At which noise level the condition can say anything, and whether the model's use of it is plausible."""

import torch

from freqgate_dit import plots
from freqgate_dit.traces import span_levels
from freqgate_dit.training.report.page import Section
from freqgate_dit.training.report.subject import Subject
from freqgate_dit.training.validation import ValidationResult


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
        result = subject.validate(num_bins=20, with_null=True)
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
