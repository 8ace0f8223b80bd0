"""Resuming goes on with the same run, or refuses."""

import dataclasses

from freqgate_dit.training.config import TrainingRun, default_values


FIXED_SECTIONS = ("data", "model", "condition", "objective")


def refuse_other_run(config: TrainingRun, name: str, state: dict, data_fingerprint: str, global_batch_size: int):
    """Raise if going on with the checkpoint `name` of `state` under `config` would not be the run that it is of.

    Data, model, condition, objective, autoencoder, averages and seed have to be the same; the rest (length, learning
    rate, what is done how often, batch size per device) may change.

    Raises:
        ValueError: names the option, both values and what to do.
    """
    fixed = [field.name for section in FIXED_SECTIONS for field in dataclasses.fields(getattr(config, section))]
    now, then = config.to_dict(), state["config"]
    defaults = default_values()
    for knob in (*fixed, "vae", "vae_subfolder", "vae_revision", "ema", "seed"):
        # An option that is younger than the checkpoint had its default then.
        before = then.get(knob, defaults[knob])
        if before != now[knob]:
            raise ValueError(
                f"`{knob}` is {now[knob]!r}, but the checkpoint {name} was trained with {before!r}: resume with the "
                "same value."
            )
    # A path says nothing about what lies there by now: order and labels are those of this data alone.
    if state["data_fingerprint"] != data_fingerprint:
        raise ValueError(
            f"`dataset` ({config.data.dataset}) holds other training images, names or classes than when the "
            f"checkpoint {name} was saved: restore them, or start a new run in another `output_dir`."
        )
    # A step's place in the data is counted in global batches.
    if state["global_batch_size"] != global_batch_size:
        raise ValueError(
            f"the global batch is {global_batch_size} images, but the checkpoint {name} was trained with "
            f"{state['global_batch_size']}: choose `per_device_batch_size` and `gradient_accumulation_steps` to match."
        )
