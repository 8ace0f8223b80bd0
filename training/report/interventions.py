"""What changes when a part of the mechanism is taken away, from the same noise."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import torch
from tqdm.auto import tqdm

from freqgate_dit import plots, report_plots
from freqgate_dit.interventions import changed_gate, gate_changes, labels_from, labels_in_path
from freqgate_dit.metrics import band_power
from freqgate_dit.spectral import octave_labels
from freqgate_dit.statistics import bootstrap
from freqgate_dit.training.decisions import FACTORS, factors
from freqgate_dit.training.report.page import Section
from freqgate_dit.training.report.subject import LEAST_SHOWN, Subject


SMALL_INDEX = 0.1
SMALL_CHANGE = 0.01  # of the held-out loss


def interventions_of(subject: Subject) -> dict[str, Callable[[], AbstractContextManager]]:
    """Name -> context in which the model is changed, of what can be done to it."""
    transformer, classes = subject.pipe.transformer, subject.pipe.num_classes
    found = {}
    paths = [path for path in ("low", "high") if getattr(transformer.transformer_blocks[0], path, None) is not None]
    if subject.has_null_condition:
        found["no condition"] = partial(labels_from, transformer, classes, -np.inf, subject.alphas_cumprod)
        for path in paths:
            found[f"no condition in {path}"] = partial(labels_in_path, transformer, path, classes)
    if subject.is_conditional and classes > 1 and len(paths) == 2:
        for path in paths:
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
        reading = (
            f"Left out: this model has no gates, and {_why_no_null(subject)}, so no part of it can be taken away."
        )
        return Section(title, [reading])
    effects, correct, of_other, losses = measure(subject, found)
    judged = subject.has_factors
    rows = []
    for name, effect in effects.items():
        row = {"intervention": name}
        if judged:
            row |= {f"{factor}_right": float(correct[name][factor].mean()) for factor in FACTORS}
            row |= {f"{factor}_of_other": float(of_other[name][factor].mean()) for factor in FACTORS}
            row["held_out_loss"] = losses[name]
        rows.append(row | {f"change_{band}": value for band, value in effect.items()})
    bands = list(effects["none"])
    changes = {name: list(effect.values()) for name, effect in effects.items() if name != "none"}
    section = Section(title, [], tables={"interventions": rows}, shown=("interventions",))
    parts = {name: values for name, values in changes.items() if name != "no condition"}
    caption = (
        f"{subject.num_images} images from the same noise, without guidance. Numbers are the power of the change over "
        "the power of the image, per octave: 0 is no effect, 2 as different as two unrelated images."
    )
    if parts:
        strongest = max(parts, key=lambda name: max(parts[name]))
        most = max(parts[strongest])
        band = bands[parts[strongest].index(most)]
        caption += f" Of a part alone '{strongest}' changes most, {most:.2f} at {band} cycles per image."
    section.show("effects", report_plots.effect_figure(changes, bands), caption)
    if not subject.has_null_condition:
        section.reading.append(f"Interventions that take the condition away are left out: {_why_no_null(subject)}.")
    both_paths = {"other condition in low", "other condition in high"} <= found.keys()
    if judged:
        accuracy = subject.classifier[1]
        section.reading.append(
            "Structure and texture are read by a classifier that is right on "
            f"{accuracy['structure']:.1%} and {accuracy['texture']:.1%} of held-out real images; chance is 12.5%."
        )
        if "gate mean" in found:
            _read_course(section, losses)
        if both_paths:
            _read_exchange(section, correct, of_other)
            _read_division(section, subject, correct, of_other)
    if both_paths:
        near = {path: float(np.mean(list(effects[f"other condition in {path}"].values()))) for path in ("low", "high")}
        section.show(
            "hybrids",
            hybrid_figure(subject),
            "Labels of A in one path and of B in the other, from the same noise. With B in Low images change by "
            f"{near['low']:.2f} of their power, with B in High by {near['high']:.2f} (mean over octaves).",
        )
    return section


def _why_no_null(subject: Subject) -> str:
    if subject.pipe.is_text_conditional:
        return "this pipeline is conditioned on text, and they are made for classes"
    return "the model was trained without a null condition" if subject.is_conditional else "the model has none"


def measure(subject: Subject, found: dict[str, Callable[[], AbstractContextManager]]):
    """Of the unchanged model, "none", and under each intervention: the power of the change of the images by octave,
    over theirs; and of the built-in data which images show the factors of their label, and of another one (`judge`),
    and the held-out loss."""
    plain = subject.sample()
    bands = octave_labels(*plain.shape[-2:])
    reference = band_power(plain, plain.mean(0)).mean((0, 1))
    effects, correct, of_other, losses = {}, {}, {}, {}
    for name, context in tqdm({"none": nullcontext, **found}.items(), desc="interventions", unit="run"):
        with context():
            images = plain if name == "none" else subject.sample()
            if subject.has_factors:
                losses[name] = subject.validate().loss
        effects[name] = dict(zip(bands, (band_power(images - plain).mean((0, 1)) / reference).tolist()))
        if subject.has_factors:
            correct[name] = judge(subject, images, subject.labels)
            of_other[name] = judge(subject, images, [subject.other_label(label) for label in subject.labels])
    return effects, correct, of_other, losses


def _read_course(section: Section, losses: dict[str, float]):
    """What hangs on the course of the gates over time."""
    held, mirrored = (losses[f"gate {change}"] / losses["none"] - 1 for change in ("mean", "reversed"))
    section.reading.append(
        f"With the gates held at their mean over time the held-out loss changes by {held:+.2%}, with gates at the "
        f"mirrored timestep by {mirrored:+.2%}: that much hangs on their course."
    )
    section.claim(
        f"The model depends on the course of its gates: held at their mean over time, its held-out loss rises by "
        f"more than {SMALL_CHANGE:.0%}.",
        held > SMALL_CHANGE,
        f"{held:+.2%}, on the same 512 images and noise",
    )


def _read_exchange(section: Section, correct: dict, of_other: dict):
    """Whose structure and texture images show that have the label of B in one path alone."""
    told = "; ".join(
        f"in {path.capitalize()} alone, {of_other[name]['structure'].mean():.0%} show B's structure "
        f"({correct[name]['structure'].mean():.0%} A's) and {of_other[name]['texture'].mean():.0%} B's texture "
        f"({correct[name]['texture'].mean():.0%} A's)"
        for path, name in (("low", "other condition in low"), ("high", "other condition in high"))
    )
    section.reading.append(f"Images of label A with another label B {told}.")


def _read_division(section: Section, subject: Subject, correct: dict, of_other: dict):
    """Whether the two paths share out structure and texture: the double dissociation index, by labels that were
    exchanged in one path and, with a null condition, by labels that were taken away there."""
    taken = {
        "other": {
            path: difference(of_other[f"other condition in {path}"], of_other["none"]) for path in ("low", "high")
        }
    }
    if subject.has_null_condition:
        taken["no"] = {
            path: difference(correct["none"], correct[f"no condition in {path}"]) for path in ("low", "high")
        }
    indices = {name: dissociation(effects) for name, effects in taken.items()}
    section.tables["dissociation"] = [
        {
            "by": f"{name} condition",
            "index": index.estimate,
            "low": index.low,
            "high": index.high,
            "standard_error": index.standard_error,
        }
        for name, index in indices.items()
    ]
    section.shown += ("dissociation",)
    shown = {factor: correct["none"][factor].mean() for factor in FACTORS}
    index = indices["other"]
    serves = division(index)
    verdict = {
        1: "the path called Low serves structure more than texture, compared with High",
        -1: "the path called Low serves texture more than structure, compared with High",
        0: "structure and texture are hardly shared out between the two paths",
        None: "undecided, more images would tell",
    }[serves]
    if min(shown.values()) < LEAST_SHOWN:
        serves = None
        verdict = (
            f"it says little, as the unchanged model is right in {shown['structure']:.0%} of structures and "
            f"{shown['texture']:.0%} of textures, and what it cannot show cannot be taken over"
        )
    told = f"double dissociation index {interval_of(index)} of at most 1, by labels exchanged in one path"
    if "no" in indices:
        told += f"; {interval_of(indices['no'])} of at most 0.875 by labels taken away there"
    effects = ", ".join(
        f"{taken['other'][path][factor].mean():.0%} {factor} by {path.capitalize()}"
        for path in ("low", "high")
        for factor in FACTORS
    )
    _claim_division(section, subject, f"{told}; of the other label is taken over: {effects}", serves)
    second = " The second hangs on the null condition and how well it was trained." if "no" in indices else ""
    section.reading.append(
        f"{told[0].upper()}{told[1:]} (95 %, over images of this one model). By "
        f"{'the first' if second else 'that'}: {verdict}.{second}"
    )


def interval_of(index) -> str:
    return f"{index.estimate:+.3f} [{index.low:+.3f}, {index.high:+.3f}]"


def difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By factor `(num_images,)` of -1, 0, 1: what images show in the one case and not in the other."""
    return {factor: one[factor].astype(int) - other[factor] for factor in FACTORS}


def judge(subject: Subject, images: torch.Tensor, labels: Sequence[int]) -> dict[str, np.ndarray]:
    """Factor -> `(num_images,)` bool: the image shows it as its label of `labels` says."""
    with torch.no_grad():
        logits = subject.classifier[0](images)
    expected = factors(torch.tensor(labels))
    return {name: one.argmax(-1).numpy() == right for name, one, right in zip(FACTORS, logits, expected)}


def dissociation(effects: dict[str, dict[str, np.ndarray]], num_resamples: int = 2000):
    """Double dissociation index: half of (effect on structure - effect on texture) of the condition in Low minus the
    same in High. 1: Low carries all of structure and nothing of texture, High the reverse.

    Args:
        effects: path -> factor -> `(num_images,)` of -1, 0, 1, from `difference`.
    """
    contrast = [effects[path]["structure"] - effects[path]["texture"] for path in ("low", "high")]
    by_image = (contrast[0] - contrast[1]) / 2
    return bootstrap(lambda chosen: float(by_image[chosen].mean()), len(by_image), num_resamples=num_resamples)


def division(index) -> int | None:
    """1: Low serves structure more than texture, compared with High; -1: the reverse; 0: neither; `None` undecided."""
    if index.low > SMALL_INDEX:
        return 1
    if index.high < -SMALL_INDEX:
        return -1
    return 0 if -SMALL_INDEX < index.low and index.high < SMALL_INDEX else None


def _claim_division(section: Section, subject: Subject, evidence: str, serves: int | None):
    """Whether the paths share out structure and texture: of Freq-Gate, whose names are arbitrary, either way round."""
    transformer = subject.pipe.transformer
    if "band" not in transformer.inspectable:
        claim, sides = "One of Low and High serves structure more, the other texture", (1, -1)
    else:
        claim, sides = "The condition in Low serves structure more than texture, compared with that in High", (1,)
        if transformer.config.band_basis == "random":
            claim += " (bands of this control are random directions)"
    section.claim(f"{claim}.", None if serves is None else serves in sides, evidence)


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
    names = [f"{subject.name_of(index)}\nB: {subject.class_name(label)}" for index, label in zip(shown, others)]
    return plots.image_grid(list(rows.values()), list(rows), names, "columns: label A, label B")
