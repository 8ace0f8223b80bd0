"""Resuming goes on with the same run, or refuses."""

import dataclasses
from collections.abc import Sequence

import torch

from freqgate_dit.training.conditions import Condition
from freqgate_dit.training.config import TrainingRun, default_values
from freqgate_dit.training.data import LabelledImages
from freqgate_dit.training.latents import weights_fingerprint


FIXED_SECTIONS = ("data", "model", "condition", "objective")
# Names of things whose content is compared, wherever they lie now.
BY_CONTENT = ("dataset", "dataset_config", "dataset_revision", "text_encoder", "tokenizer")


def fingerprints_of(
    parts: Sequence[LabelledImages], vae: torch.nn.Module | None, condition: Condition
) -> dict[str, str | None]:
    """Of what a run reads: option -> digest of the content, wherever it lies."""
    return {
        "dataset": " ".join(part.fingerprint for part in parts),
        "vae": None if vae is None else weights_fingerprint(vae),
        "text_encoder": condition.fingerprint(),
    }


def refuse_other_run(
    config: TrainingRun, name: str, state: dict, fingerprints: dict[str, str], global_batch_size: int
):
    """Raise if going on with the checkpoint `name` of `state` under `config` would not be the run that it is of.

    Data, model, condition, objective, autoencoder, averages, optimiser and seed have to be the same; the rest (length,
    learning rate, what is done how often, batch size per device) may change, and files may have moved.

    Args:
        config: of the run that would go on.
        name: of the checkpoint, for messages.
        state: of the checkpoint.
        fingerprints: of what the run reads, as `state["fingerprints"]`: name of the option -> digest of the content.
        global_batch_size: images of a step.

    Raises:
        ValueError: names the option, both values and what to do.
    """
    fixed = [field.name for section in FIXED_SECTIONS for field in dataclasses.fields(getattr(config, section))]
    now, then = config.to_dict(), state["config"]
    defaults = default_values()
    for knob in (*(knob for knob in fixed if knob not in BY_CONTENT), "ema", "seed", "optimizer"):
        # An option that is younger than the checkpoint had its default then.
        before = then.get(knob, defaults[knob])
        if before != now[knob]:
            raise ValueError(
                f"`{knob}` is {now[knob]!r}, but the checkpoint {name} was trained with {before!r}: resume with the "
                "same value."
            )
    for knob, fingerprint in fingerprints.items():
        if state["fingerprints"].get(knob) != fingerprint:
            raise ValueError(
                f"`{knob}` ({now[knob]}) is not what it was when the checkpoint {name} was saved ({then.get(knob)}): "
                f"{CONTENT[knob]} Restore it, or start a new run in another `output_dir`."
            )
    # A step's place in the data is counted in global batches.
    if state["global_batch_size"] != global_batch_size:
        raise ValueError(
            f"the global batch is {global_batch_size} images, but the checkpoint {name} was trained with "
            f"{state['global_batch_size']}: choose `per_device_batch_size` and `gradient_accumulation_steps` to match."
        )


CONTENT = {
    "dataset": "it holds other training or held-out images, names or classes. (An earlier version may have read it "
    "otherwise: it held out copies of training images, sorted class 10 before 2, and knew fewer image formats "
    "and no metadata files with labels.)",
    "vae": "it is another autoencoder.",
    "text_encoder": "it makes other embeddings of the classes.",
}
