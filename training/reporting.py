"""Files of an evaluation: all numbers with the whole protocol, a table of them, pictures, and the model card."""

import argparse
import json
import platform
import re
import shlex
from importlib.metadata import version
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from freqgate_dit import __version__
from freqgate_dit.evaluations import Evaluation, add_evaluation
from freqgate_dit.features import Images
from freqgate_dit.files import replace_file, replace_folder, write_text
from freqgate_dit.model_card import card_in_words, table
from freqgate_dit.sampling import make_picture
from freqgate_dit.summary import metric_text, plain
from freqgate_dit.training.comparison import SWEPT, Comparison, Results
from freqgate_dit.training.decoding import TRANSFORM
from freqgate_dit.training.references import short_name
from freqgate_dit.training.sample_folder import PROTOCOL
from freqgate_dit.training.scores import ENOUGH, INCEPTION


SHOWN = 64
SPLITS = {"heldout": "held-out", "train": "training", "all": "all"}
FLOORS = {
    "train": "training images in place of samples",
    "half": "one half of the reference against the other",
    "reconstructed": "reconstructions of the reference by the autoencoder",
}
# What a reader of the card needs; the rest is in evaluation.json.
OF_CARD = (
    "checkpoint",
    "weights",
    "num_images",
    "class_mix",
    "seeds",
    "sampler",
    "steps",
    "guidance_scale",
    "dtype",
    "resolution",
    "reference_images",
    "features",
    "features_precision",
    "resize",
)
# Arguments without influence on the numbers.
LEFT_OUT = ("out", "keep_images", "update_card", "cache_dir", "cpu_threads", "batch_size")


def write_results(results: Results, comparison: Comparison):
    """Write evaluation.json, evaluation.md and samples.png into `out`, and more if asked for; print the table."""
    given = comparison.given
    evaluation, details = make_evaluation(results, comparison)
    given.out.mkdir(parents=True, exist_ok=True)
    text = markdown(evaluation, results, details)
    content = {**evaluation.to_dict(), **details}
    write_text(given.out / "evaluation.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_text(given.out / "evaluation.md", text)
    picture = make_picture(to_pictures(results.images, range(min(SHOWN, len(results.images)))), 1)
    replace_file(given.out / "samples.png", lambda temporary: picture.save(temporary, "PNG"))
    if given.keep_images:
        write_pngs(results, given.out / "images")
    if given.update_card:
        update_card(evaluation, comparison)
    for samples in comparison.samples.values():
        if not given.keep_images:
            samples.delete()
    print(f"\n{text}\nwrote evaluation.json, evaluation.md and samples.png into {given.out}")


# -- what was done ----------------------------------------------------------------------------------------------------


def make_evaluation(results: Results, comparison: Comparison) -> tuple[Evaluation, dict]:
    """The evaluation, and what does not fit into its schema and is kept beside it."""
    reference, model = comparison.reference, comparison.model
    what = "Samples" if model else f"Images of {Path(comparison.given.images).resolve().name}"
    evaluation = Evaluation(
        title=f"{what} against {SPLITS[reference.split]} images of {reference.name}",
        dataset={"name": reference.name, "hub_id": reference.hub_id, "split": SPLITS[reference.split]},
        metrics=[*results.metrics, *(metric for metrics in results.floors.values() for metric in metrics)],
        protocol=protocol(results, comparison),
        command=command(comparison.given),
        notes=" ".join(notes(results, comparison)),
    )
    counts = dict(zip(reference.images.class_names, reference.class_counts, strict=True))
    details = {"reference_classes": counts, "sweep": results.sweep}
    if model:
        sampled = results.sampler.protocol()
        details |= {"classes": sampled["class_counts"], "scheduler_config": sampled["scheduler_config"]}
    return evaluation, details


def protocol(results: Results, comparison: Comparison) -> dict:
    """All that must be the same for another number to be comparable, and what it was made with."""
    reference, extractor = comparison.reference, comparison.extractor
    return {
        **(of_samples(results, comparison) if comparison.model else of_folder(comparison)),
        "resolution": comparison.resolution,
        "reference": reference.name,
        "reference_split": reference.split,
        "reference_images": results.count,
        "reference_fingerprint": reference.images.fingerprint,
        "reference_preprocessing": TRANSFORM,
        **extractor.describe(),
        "resize": "clean (clean-fid)" if extractor.name.startswith(INCEPTION) else "by the feature function",
        "seed_of_subsets": 0,
        "device": comparison.device.type,
        "processes": comparison.accelerator.num_processes,
        "freqgate_dit": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "Pillow")},
    }


def of_samples(results: Results, comparison: Comparison) -> dict:
    sampler, samples, training = results.sampler, results.images, comparison.model.summary.training
    sampled = sampler.protocol()
    short = {name: value for name, value in sampled.items() if not isinstance(value, dict) and name != "seed"}
    return {
        **short,
        "weights": training["weights"] if training else "not recorded",
        "training_steps": training["step"] if training else None,
        "seeds": f"{sampler.seed} to {sampler.seed + len(samples) - 1}, one per image",
        "prediction_type": sampled["scheduler_config"].get("prediction_type"),
        "pixels": "rounded to uint8",
        "clipped_pixels": samples.clipped() / (len(samples) * comparison.resolution**2),
        **{f"sampled_with_{name}": value for name, value in samples.made_with.items()},
    }


def of_folder(comparison: Comparison) -> dict:
    return {
        "images": Path(comparison.given.images).resolve().name,
        "images_fingerprint": comparison.folder.fingerprint,
        "num_images": len(comparison.folder),
    }


def command(given: argparse.Namespace) -> str:
    """The command that measures this again, without a path of this machine."""
    words = []
    for name, value in vars(given).items():
        if value is None or value is False or name in LEFT_OUT:
            continue
        if name == "sweep":
            value = f"{SWEPT}={','.join(f'{scale:g}' for scale in value)}"
        elif name == "features":
            source, colon, function = value.rpartition(":")
            value = f"{Path(source).name}{colon}{function}"
        elif name in ("reference", "train_reference"):
            value = short_name(value)
        elif name in ("pipeline", "images", "inception_path") and Path(value).expanduser().exists():
            value = Path(value).expanduser().resolve().name
        words += [f"--{name}"] if value is True or value == "" else [f"--{name}", shlex.quote(str(value))]
    return " ".join(["accelerate launch training/evaluation.py", *words])


def notes(results: Results, comparison: Comparison) -> list[str]:
    sentences = []
    smallest = min(len(results.images), results.count)
    if smallest < ENOUGH:
        sentences.append(
            f"Forced: {smallest} images are fewer than the {ENOUGH:,} from which on a Frechet distance says more "
            "about the images than about their number."
        )
    if results.sweep:
        values = ", ".join(f"{plain(value)} at {scale:g}" for scale, value in results.sweep["distances"].items())
        sentences.append(
            f"The guidance scale {results.sweep['chosen']:g} was chosen by the distance to one half of the reference "
            f"({results.sweep['name']}: {values}); the numbers are against the other half."
        )
    if comparison.given.bootstrap:
        sentences.append(
            "Standard errors are of sampling noise (other images of the same model), from a bootstrap over the "
            "images; they say nothing about training again."
        )
    return sentences


# -- as text ----------------------------------------------------------------------------------------------------------


def markdown(evaluation: Evaluation, results: Results, details: dict) -> str:
    """The numbers with their floors beside them, and the protocol."""
    header = ["metric", "value", "sampling noise", *(FLOORS[kind] for kind in results.floors)]
    rows = []
    for place, metric in enumerate(results.metrics):
        floors = [metrics[place : place + 1] for metrics in results.floors.values()]
        rows.append(
            (
                metric["name"],
                metric_text(metric),
                noise_text(metric),
                *(metric_text(floor[0]) if floor else "" for floor in floors),
            )
        )
    parts = [f"# {evaluation.title}", table(rows, tuple(header)), evaluation.notes]
    if results.sweep:
        distances = results.sweep["distances"].items()
        chosen = results.sweep["chosen"]
        rows = [(f"{scale:g}{' (chosen)' * (scale == chosen)}", plain(value)) for scale, value in distances]
        parts.append(table(rows, ("guidance scale", results.sweep["name"])))
    parts.append(
        table(
            [
                (name.replace("_", " "), "none" if value is None else str(value))
                for name, value in evaluation.protocol.items()
            ],
            ("protocol", ""),
        )
    )
    parts.append(f"```bash\n{evaluation.command}\n```")
    return "\n\n".join(filter(None, parts)) + "\n"


def noise_text(metric: dict) -> str:
    if "sampling_noise" in metric:
        return f"± {plain(metric['sampling_noise']['standard_error'])}"
    if "subset_std" in metric:
        return f"± {plain(metric['subset_std'])} for subsets of {metric['subset_size']}"
    return ""


# -- pictures and the card --------------------------------------------------------------------------------------------


def to_pictures(images: Images, indices) -> list[Image.Image]:
    return [Image.fromarray(image.numpy()) for image in images.images(indices).permute(0, 2, 3, 1)]


def write_pngs(results: Results, folder: Path):
    """Every image as `NUMBER_CLASS.png`, and which pipeline made them; in place of those of an earlier evaluation."""
    sampler, count = results.sampler, len(results.images)
    names = [re.sub(r"[^\w-]+", "_", name).strip("_") for name in sampler.classes.names]

    def write(temporary: Path):
        for start in tqdm(range(0, count, SHOWN), desc="writing PNG", unit="batch"):
            indices = range(start, min(start + SHOWN, count))
            for index, picture in zip(indices, to_pictures(results.images, indices), strict=True):
                picture.save(temporary / f"{index:07d}_{names[sampler.sequence[index]]}.png")

        write_text(temporary / PROTOCOL, json.dumps(sampler.protocol(), indent=2) + "\n")

    replace_folder(folder, write, PROTOCOL)


def update_card(evaluation: Evaluation, comparison: Comparison):
    """Put the evaluation into the pipeline's folder, and write its card anew."""
    folder = Path(comparison.given.pipeline).expanduser()
    short = {name: evaluation.protocol[name] for name in OF_CARD}
    short["checkpoint"] = short["checkpoint"][:12]
    metrics = [{name: metric[name] for name in ("name", "type", "value", "format")} for metric in evaluation.metrics]
    of_card = Evaluation(evaluation.title, evaluation.dataset, metrics, short, evaluation.command, evaluation.notes)
    path = add_evaluation(folder, evaluation.metrics[0]["name"], of_card)
    print(f"wrote the numbers into {path}; {card_in_words(folder)}")
