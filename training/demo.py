"""Look at a model trained on the built-in data: samples beside real ones, what the gate does, and are they right?

    python training/demo.py --pipeline demo/run/pipeline --out demo

Loads the pipeline folder with `from_pretrained`, as any user would, and writes pictures and `accuracy.json`.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm


# An uninstalled checkout: `python training/demo.py` puts this folder, not the root, on the path.
if (Path(__file__).resolve().parents[1] / "setup.py").is_file():
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from freqgate_dit import FreqGateDiTPipeline, ShapesTextures, plots
from freqgate_dit.analysis import mechanism_figures
from freqgate_dit.devices import choose_dtype
from freqgate_dit.evaluations import Evaluation, add_evaluation
from freqgate_dit.model_card import card_in_words
from freqgate_dit.samplers import describe_sampler
from freqgate_dit.shapes_textures import NUM_CLASSES, STRUCTURES, TEXTURES
from freqgate_dit.training.config import load_yaml
from freqgate_dit.training.factor_classifier import factor_accuracy, train_factor_classifier
from freqgate_dit.training.hardware import use_all_cores


STEPS = 20
REAL = "held-out real images"


def sample(
    pipe: FreqGateDiTPipeline, labels: list[int], guidance_scale: float, batch_size: int = 128, steps: int = STEPS
) -> np.ndarray:
    """Images `(N, H, W, 3)` in [0, 1] of `labels`; image i has seed i."""
    images = []
    for start in tqdm(range(0, len(labels), batch_size), desc=f"sampling, guidance {guidance_scale:g}", unit="batch"):
        batch = labels[start : start + batch_size]
        seeds = list(range(start, start + len(batch)))
        options = {"guidance_scale": guidance_scale, "num_inference_steps": steps, "output_type": "np"}
        images.append(pipe(batch, seed=seeds, **options).images)
    return np.concatenate(images)


def score(classifier, images: np.ndarray, labels: list[int]) -> dict[str, float]:
    """Share of images `(N, H, W, 3)` whose structure, and whose texture, the classifier reads as `labels` say."""
    images = torch.from_numpy(images).permute(0, 3, 1, 2).float() * 2 - 1
    labels = torch.tensor(labels)
    return factor_accuracy(classifier, images, labels // len(TEXTURES), labels % len(TEXTURES))


def samples_figure(real: ShapesTextures, images: np.ndarray, title: str):
    """All classes, a row per structure: real images at the left, samples at the right."""
    real_images = real.images(range(NUM_CLASSES)).permute(0, 2, 3, 1).numpy()
    real_by_label = dict(zip(real.labels(range(NUM_CLASSES)).tolist(), real_images, strict=True))
    rows = []
    for row in range(len(STRUCTURES)):
        labels = range(row * len(TEXTURES), (row + 1) * len(TEXTURES))
        rows.append([*(real_by_label[label] for label in labels), None, *(images[label] for label in labels)])
    names = [name.replace("-", "\n") for name in TEXTURES]
    columns = [*(f"real\n{name}" for name in names), "", *(f"sample\n{name}" for name in names)]
    return plots.image_grid(rows, STRUCTURES, columns, title)


def denoising_strip(pipe: FreqGateDiTPipeline, labels: list[int], guidance_scale: float):
    """Predicted x0 after each step, a row per label."""
    steps, levels = [], []

    def keep(pipe, step, timestep, tensors):
        steps.append(pipe.postprocess(tensors["pred_original_sample"], "np"))
        levels.append(f"t={float(timestep):.0f}")
        return {}

    pipe(
        labels,
        guidance_scale=guidance_scale,
        num_inference_steps=STEPS,
        seed=0,
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["pred_original_sample"],
    )
    kept = [*range(0, len(steps) - 1, 2), len(steps) - 1]
    rows = [[steps[step][row] for step in kept] for row in range(len(labels))]
    names = [pipe.id2label[label].replace(" ", "\n") for label in labels]
    return plots.image_grid(
        rows,
        names,
        [levels[step] for step in kept],
        "predicted clean image after each step",
    )


def publish(folder: Path, accuracy: dict, settings: dict, pictures: list[Path]):
    """Put what was measured and drawn into the pipeline folder."""
    reference = accuracy[REAL]
    metrics = [
        {"name": f"{factor} of {name}", "type": "accuracy", "value": value, "format": "percent"}
        for name, values in accuracy.items()
        if name != REAL
        for factor, value in values.items()
    ]
    protocol = {
        **settings,
        "seeds": f"0 to {settings['images'] - 1}, one per image",
        "classes": "all, equally often",
        **{f"share of held-out real images whose {factor} is read rightly": reference[factor] for factor in reference},
    }
    evaluation = Evaluation(
        title="Structure and texture as a classifier reads them",
        dataset={"name": "shapes_textures", "hub_id": None, "split": "all classes"},
        metrics=metrics,
        protocol=protocol,
        command="python training/demo.py --pipeline FOLDER --out demo",
        notes="The classifier was trained on real images (training/factor_classifier.py).",
    )
    add_evaluation(folder, "factor_accuracy", evaluation)
    (folder / "figures").mkdir(exist_ok=True)
    for picture in pictures:
        shutil.copyfile(picture, folder / "figures" / picture.name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", default="demo/run/pipeline", help="pipeline folder trained on the built-in data")
    parser.add_argument("--out", default="demo", help="folder for pictures and accuracy.json")
    parser.add_argument("--images_per_class", type=int, default=8, help="samples per class that are scored")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="guidance of the guided samples")
    arguments = parser.parse_args()
    folder, out = Path(arguments.pipeline), Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    use_all_cores()

    dtype = choose_dtype("auto", torch.device("cpu"))
    pipe = FreqGateDiTPipeline.from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    world = load_yaml(folder / "training_config.yaml")["world"]
    size = pipe.transformer.config.sample_size

    print("training a classifier of structure and texture on real images")
    start = time.perf_counter()
    classifier, real_accuracy = train_factor_classifier(world=world, image_size=size)
    accuracy = {REAL: real_accuracy}
    print(f"classifier trained in {time.perf_counter() - start:.0f} s")

    labels = list(range(NUM_CLASSES)) * arguments.images_per_class
    guided = sample(pipe, labels, arguments.guidance_scale)
    accuracy[f"samples, guidance {arguments.guidance_scale:g}"] = score(classifier, guided, labels)
    accuracy["samples, unguided"] = score(classifier, sample(pipe, labels, 1.0), labels)

    real = ShapesTextures(NUM_CLASSES, image_size=size, world=world, split="test")
    title = f"real images and samples of all classes, guidance {arguments.guidance_scale:g}"
    samples_figure(real, guided, title).savefig(out / "samples.png")
    strip_labels = [row * len(TEXTURES) + (3 * row) % len(TEXTURES) for row in (0, 1, 4, 6)]
    denoising_strip(pipe, strip_labels, arguments.guidance_scale).savefig(out / "denoising.png")
    written = ["samples.png", "denoising.png"]
    for name, figure in mechanism_figures(pipe).items():
        figure.savefig(out / f"{name}.png")
        written.append(f"{name}.png")
    if (folder.parent / "loss.png").is_file():
        shutil.copyfile(folder.parent / "loss.png", out / "loss.png")
        written.append("loss.png")
    settings = {
        "images": len(labels),
        "steps": STEPS,
        "sampler": describe_sampler(type(pipe.scheduler).__name__, pipe.scheduler.config),
        "dtype": str(dtype).removeprefix("torch."),
    }
    (out / "accuracy.json").write_text(json.dumps({"accuracy": accuracy, "settings": settings}, indent=2) + "\n")
    written.append("accuracy.json")
    publish(folder, accuracy, settings, [out / "samples.png", out / "denoising.png"])

    print(f"\n{'':24}structure  texture")
    for name, values in accuracy.items():
        print(f"{name:24}{values['structure']:9.1%}{values['texture']:9.1%}")
    print("\nwrote " + ", ".join(str(out / name) for name in written))
    print(f"wrote the accuracies and pictures into the pipeline's folder; {card_in_words(folder)}")


if __name__ == "__main__":
    main()
