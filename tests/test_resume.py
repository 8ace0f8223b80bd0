"""What a run may change when it is resumed, and what it may not."""

import dataclasses
import json

import pytest

from freqgate_dit.training.config import default_values, parse_config
from freqgate_dit.training.resume import refuse_other_run


READ = {"dataset": "cats", "vae": "sdxl", "text_encoder": None}


def state_of(config, **changes):
    """The state of a checkpoint, as it comes back from its file."""
    state = {"config": config.to_dict(), "fingerprints": READ, "global_batch_size": 96, **changes}
    return json.loads(json.dumps(state))


def resumed(*arguments):
    return parse_config(["--max_steps=100", "--ema", "power:0.1", "0.999", *arguments])


CHANGES = {
    "model": "--num_layers=3",
    "data": "--heldout_fraction=0.2",
    "objective": "--timestep_sampling=logit_normal",
    "condition": "--condition=none",
    "averages": "--ema=0.999",
    "seed": "--seed=1",
}


@pytest.mark.parametrize("argument", CHANGES.values(), ids=CHANGES.keys())
def test_another_run_is_refused(argument):
    name, value = argument.removeprefix("--").split("=")
    with pytest.raises(ValueError) as error:
        refuse_other_run(resumed(argument), "step_00000050", state_of(resumed()), READ, 96)
    message = str(error.value)
    assert f"`{name}`" in message and value in message and "step_00000050" in message and "same value" in message


def test_length_pace_and_learning_rate_may_change():
    changed = resumed(
        "--max_steps=200", "--learning_rate=1e-5", "--save_every=7", "--validate_every=3", "--keep_every=14"
    )
    refuse_other_run(changed, "step_00000050", state_of(resumed()), READ, 96)


def test_other_data_and_other_batches_are_refused():
    for name, words in (
        ("dataset", "other training or held-out images"),
        ("vae", "another autoencoder"),
        ("text_encoder", "other embeddings"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` .*{words}"):
            refuse_other_run(resumed(), "step_00000050", state_of(resumed()), {**READ, name: "other"}, 96)
    with pytest.raises(ValueError, match="48 images.*with 96"):
        refuse_other_run(resumed(), "step_00000050", state_of(resumed()), READ, 48)


def test_files_may_have_moved():
    moved = resumed("--dataset=elsewhere", "--vae=elsewhere/vae", "--output_dir=elsewhere/run")
    refuse_other_run(moved, "step_00000050", state_of(resumed()), READ, 96)


def test_an_option_younger_than_the_checkpoint_had_its_default():
    state = state_of(resumed())
    del state["config"]["norm_eps"]
    refuse_other_run(resumed(), "step_00000050", state, READ, 96)
    with pytest.raises(ValueError, match="`norm_eps` is 0.001, .* with 1e-06"):
        refuse_other_run(resumed("--norm_eps=1e-3"), "step_00000050", state, READ, 96)


def test_defaults_are_those_of_the_dataclasses():
    config = resumed()
    defaults = default_values()
    assert defaults.keys() == config.to_dict().keys()
    given = {"max_steps", "ema"}
    assert {name: value for name, value in config.to_dict().items() if name not in given} == {
        name: value for name, value in defaults.items() if name not in given
    }
    # A default that is a list is a new one each time.
    assert dataclasses.replace(config.train).ema is not default_values()["ema"]
