"""At which noise level the condition can say anything, and whether the model's use of it is plausible."""

import math

import numpy as np
import torch

from freqgate_dit import report_plots
from freqgate_dit.shapes_textures import STRUCTURES
from freqgate_dit.traces import last_crossing, span_levels
from freqgate_dit.training.decisions import FACTORS
from freqgate_dit.training.information import with_other
from freqgate_dit.training.report.page import Section
from freqgate_dit.training.report.subject import Subject
from freqgate_dit.training.validation import ValidationResult


MOST_USE = 1.2  # of what there is to know, for an estimate of it to be trusted


def information_section(subject: Subject) -> Section:
    """At which noise level the condition can say anything, and whether the model's use of it is plausible."""
    title = "What the condition can say, and when"
    if not subject.has_factors:
        reading = (
            "Left out: this needs the labels of held-out images, and only those of the built-in data can be made "
            f"anew; {subject.why_no_factors}."
        )
        return Section(title, [reading])
    section = Section(title, [])
    curve, by_factor, factor_curves, half = None, {}, {}, {}
    if subject.has_null_condition:
        result = subject.validate(num_bins=20, with_null=True)
        curve = information_density(result, subject.alphas_cumprod)
        section.tables["information_of_the_model"] = curve
        section.tables["ceiling"] = [use_row("label", result, subject, result.label_entropy)]
        section.reading.append(_read_ceiling(result))
        low, high = information_interval(result)
        inside = 0 <= low and high <= result.label_entropy
        section.claim(
            "The information that the use of the label amounts to lies between nothing and the label's entropy.",
            True if inside else False if high < 0 or low > result.label_entropy else None,
            f"{result.information:.2f} [{low:.2f}, {high:.2f}] of {result.label_entropy:.2f} nats",
        )
    if subject.pipe.vae is None:
        by_factor = _read_factors(section, subject)
        levels, factor_curves, half = subject.data_information
        section.tables["information_of_the_data"] = [
            {"log_snr": float(level), **{name: float(nats[i]) for name, nats in factor_curves.items()}}
            for i, level in enumerate(levels)
        ]
        if subject.data_difference is None:
            section.reading.append(
                "Of one of the factors even the clearest image here tells less than half, so there are no levels."
            )
        else:
            draws = subject.factor_posterior.num_draws
            section.tables["half"] = [{**half, "difference": subject.data_difference}]
            section.shown += ("half",)
            section.reading.append(
                "Of the data alone, whatever the model: half of what there is to know of the structure can be told "
                f"from a noisy image at a log-SNR of {half['structure']:+.2f}, of the texture at "
                f"{half['texture']:+.2f} (Bayes' rule over {draws:,} images). In this order an ideal denoiser "
                "is done with its label."
            )
    else:
        section.reading.append(
            "When the data itself tells structure and texture is left out: it is known of noisy images, and this "
            "model's noise is on latents."
        )
    if section.tables.get("ceiling"):
        section.shown += ("ceiling",)
    if curve or factor_curves:
        of_data = (levels, factor_curves, half) if factor_curves else None
        figure = report_plots.information_figure(curve, by_factor, of_data)
        section.show("information", figure, _caption(by_factor or {"the label": curve}))
    return section


def _caption(densities: dict[str, list[dict]]) -> str:
    """At which noise level and in which octave most is used of each, in words."""
    told = []
    for name, rows in densities.items():
        bands = [key for key in rows[0] if key.endswith("cycles")]
        peak = max(rows, key=lambda row: row["density"])
        told.append(
            f"of {name} at a log-SNR of {peak['log_snr']:+.1f}, there mostly in {max(bands, key=peak.get)} per image"
        )
    return (
        f"Most is used {'; '.join(told)}. The area under a curve of what is used is its information in nats; below 0 "
        "the label does harm."
    )


def _read_factors(section: Section, subject: Subject) -> dict[str, list[dict]]:
    """What the model's predictions use of one factor when the other is known: its `information_density` by factor."""
    entropy = math.log(len(STRUCTURES))
    results = {factor: subject.validate(num_bins=20, factor=factor) for factor in FACTORS}
    densities = {name: information_density(result, subject.alphas_cumprod) for name, result in results.items()}
    section.tables["information_of_the_model_by_factor"] = [
        {"of": name, **span} for name, spans in densities.items() for span in spans
    ]
    uses = [use_row(with_other(name), results[name], subject, entropy) for name in FACTORS]
    section.tables.setdefault("ceiling", []).extend(uses)
    told, halves, possible = [], [], []
    count = int(results[FACTORS[0]].num_images.sum())
    for name, use in zip(FACTORS, uses):
        low, high = information_interval(results[name])
        told.append(f"{use['nats']:.2f} [{low:.2f}, {high:.2f}] nats of {name}")
        possible.append(is_possible(low, high, entropy))
        if use["half_at_log_snr"] is not None:
            half_of_data = subject.data_information[2][with_other(name)]
            of_data = f" (the images tell half of it at {half_of_data:+.2f})" if np.isfinite(half_of_data) else ""
            halves.append(f"{use['half_at_log_snr']:+.2f} for {name}{of_data}")
    section.reading.append(
        f"Of one factor, the other being known, the predictions use {' and '.join(told)} (two standard errors, "
        f"{count:,} images), of {entropy:.2f} each. What they would be without it is their mean over its "
        "values, weighted by what the noisy image tells of it (Bayes' rule), in place of the null condition. "
        + (f"From noise to clean, half of this use is over at a log-SNR of {' and '.join(halves)}." if halves else "")
    )
    section.claim(
        f"Of each factor the predictions use something, and at most {MOST_USE:g} times what there is to know (1 for "
        "an ideal denoiser).",
        False if False in possible else None if None in possible else True,
        f"{', '.join(told)}; of {entropy:.2f} each",
    )
    return densities


def is_possible(low: float, high: float, entropy: float) -> bool | None:
    """Whether a use between `low` and `high` is more than nothing and about as much as there is to know, at most."""
    if high < 0 or low > MOST_USE * entropy:
        return False
    return True if 0 < low and high < MOST_USE * entropy else None


def use_row(name: str, result: ValidationResult, subject: Subject, entropy: float) -> dict:
    """What the predictions use of a condition of which there are `entropy` nats to know; and the levels below which
    half of their own use lies, and half of the entropy, `None` where there cannot be such a use."""
    possible = is_possible(*information_interval(result), entropy)
    return {
        "of": name,
        "nats": result.information,
        "standard_error": result.information_se,
        "entropy": entropy,
        "half_at_log_snr": half_of_use(result, subject.alphas_cumprod) if possible is not False else None,
        "half_of_entropy_at_log_snr": (
            half_of_use(result, subject.alphas_cumprod, entropy) if possible is not False else None
        ),
    }


def half_of_use(result: ValidationResult, alphas_cumprod: torch.Tensor, whole: float | None = None) -> float | None:
    """Log-SNR below which half of `whole`, by default of all `information`, is used, linear within a span; `None` if
    that much never is."""
    levels = span_levels(alphas_cumprod, len(result.num_images)).flip(0)
    known = torch.cat([torch.zeros(1), result.information_table.sum(1).flip(0).cumsum(0)])  # from noise to clean
    whole = float(known[-1]) if whole is None else whole
    return last_crossing(levels.numpy(), known.numpy(), whole / 2) if known[-1] > max(0.0, whole / 2) else None


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
