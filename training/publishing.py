"""The pipeline folder that is loaded and shared: whole or not there, with what its model card is made from."""

import json
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path

from accelerate import Accelerator

from freqgate_dit import FreqGateDiTPipeline, __version__
from freqgate_dit.analysis import mechanism_figures
from freqgate_dit.files import replace_folder
from freqgate_dit.findings import FILE as FINDINGS
from freqgate_dit.ladder import Ladder
from freqgate_dit.model_card import is_edited, write_card
from freqgate_dit.pipeline_folder import CARD, INDEX, split_strange
from freqgate_dit.training.config import TrainingRun, is_local
from freqgate_dit.training.data import BUILT_IN, LabelledImages


SUMMARY = "training_summary.json"


def write_pipeline(
    pipeline: FreqGateDiTPipeline,
    folder: Path,
    config: TrainingRun,
    summary: dict,
    pictures: Mapping[str, Path],
    repo_id: str | None = None,
    spare: AbstractContextManager = nullcontext(),
):
    """Save `pipeline` as `folder`, in place of one that is there already, with all that its card needs.

    Args:
        config: of the run; nothing of this machine's paths is written.
        summary: by `training_summary`.
        pictures: name in the folder's `figures/` -> file; what is not there is left out.
        repo_id: where the folder will be uploaded, for the card.
        spare: is open while figures and card are made, which are no reason to lose the pipeline.

    Raises:
        OSError, SafetensorError: if it cannot be written; what was there before is still there.
    """

    def write(temporary: Path):
        pipeline.save_pretrained(temporary)
        config.shareable().save(temporary / "training_config.yaml")
        _write_summary(temporary, summary)
        with spare:
            _draw_figures(pipeline, temporary / "figures", pictures)
            write_card(temporary, repo_id, folder.name)

    replace_folder(folder, write, INDEX, keep_strange)


def keep_strange(old: Path, new: Path) -> list[str]:
    """What others have put into the pipeline folder `old` and nothing in `new` replaces, and a card that they edited.

    Weights, settings and measurements are of the old weights and go.
    """
    known, strange = split_strange(old)
    added = [name for name in known if name.startswith(("LICENSE", "figures/")) and not (new / name).exists()]
    return [*strange, *added, *([CARD] if is_edited(old / CARD) else [])]


def _draw_figures(pipeline: FreqGateDiTPipeline, figures: Path, pictures: Mapping[str, Path]):
    figures.mkdir()
    for name, picture in pictures.items():
        if picture.is_file():
            shutil.copyfile(picture, figures / name)
    for name, figure in mechanism_figures(pipeline).items():
        figure.savefig(figures / f"{name}.png")


def describe_other_weights(folder: Path, pipeline: FreqGateDiTPipeline, weights: str, name: str):
    """Bring a copied pipeline folder up to its new weights: what was measured or drawn with the old ones goes.

    Args:
        weights: what they are, in words.
        name: that the folder will have.
    """
    (folder / FINDINGS).unlink(missing_ok=True)
    if not (folder / SUMMARY).is_file():
        return  # of an earlier version of the package, which described nothing
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    _write_summary(folder, {**summary, "weights": weights, "heldout": None})
    shutil.rmtree(folder / "evaluation", ignore_errors=True)
    shutil.rmtree(folder / "figures", ignore_errors=True)
    _draw_figures(pipeline, folder / "figures", {})
    (folder / CARD).unlink(missing_ok=True)  # also one that was edited: it is of the old ones
    write_card(folder, name=name)


def _write_summary(folder: Path, summary: dict):
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def training_summary(
    config: TrainingRun,
    accelerator: Accelerator,
    images: LabelledImages,
    heldout_images: LabelledImages,
    progress: dict[str, int],
    validations: list[dict],
    ladder: Ladder | None = None,
) -> dict:
    """What a run has done, for `training_summary.json`: numbers only that were counted or measured.

    Args:
        progress: "step", "total_steps" and "global_batch_size".
        validations: records of `validation.jsonl`.
        ladder: of a model with views.
    """
    dataset, shared = config.data.dataset, config.shareable()
    built_in = dataset == BUILT_IN
    first, last = (validations[0], validations[-1]) if validations else (None, None)
    return {
        **progress,
        "images_seen": progress["step"] * progress["global_batch_size"],
        "weights": config.train.ema[0],
        "mixed_precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "license": config.hub.license,
        **({} if ladder is None else {"ladder": ladder.to_json()}),
        "data": {
            "name": shared.data.dataset,
            "hub_id": None if built_in or is_local(dataset) else dataset,
            "built_in": built_in,
            "license": config.hub.data_license,
            "train_images": len(images),
            "heldout_images": len(heldout_images),
            "classes": len(images.class_names),
            "resolution": images.resolution,
            "fingerprints": [images.fingerprint, heldout_images.fingerprint],
        },
        "heldout": last
        and {
            "step": last["step"],
            "prediction_type": config.objective.prediction_type,
            "images": sum(last["ema"]["num_images"]),
            "loss_at_start": first["ema"]["loss"] if first["step"] == 0 else None,
            "loss": last["ema"]["loss"],
            "loss_null": last["ema"].get("null_loss"),
        },
        "versions": {
            "freqgate_dit": __version__,
            **{name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")},
        },
    }
