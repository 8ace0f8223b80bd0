"""The trainer from end to end, on tiny models and real files."""

import itertools
import json
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml
from components import assert_same_tensors, tiny_text_encoder, tiny_tokenizer, tiny_vae_kl, tiny_vae_tiny
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import ROOT, TINY, is_drawn, metrics, photos, refusal, reset_accelerate, run, state, train

from freqgate_dit import VARIANTS, FreqGateDiTPipeline
from freqgate_dit.samplers import SAMPLERS, describe_sampler, make_sampler
from freqgate_dit.shapes_textures import ShapesTextures
from freqgate_dit.spectral import SpectrumStatistics
from freqgate_dit.summary import read_summary
from freqgate_dit.training import posthoc_ema
from freqgate_dit.training.batches import Batches
from freqgate_dit.training.config import ObjectiveConfig, parse_config
from freqgate_dit.training.data import load_images
from freqgate_dit.training.schedules import make_sampling_scheduler, make_scheduler
from freqgate_dit.training.train import Trainer, main
from freqgate_dit.transformer_freqgate_dit import DiTAttnProcessor, DiTMatmulAttnProcessor


pytestmark = pytest.mark.usefixtures("unrendered")


CONFIGS = ROOT / "training" / "configs"
PRESETS = sorted(set(CONFIGS.glob("*.yaml")) - set(CONFIGS.glob("compare_*.yaml")))


# -- a whole run ------------------------------------------------------------------------------------------------------


def test_run_learns_and_leaves_everything_behind(tmp_path, options, monkeypatch):
    monkeypatch.undo()  # its pictures are real ones
    run = tmp_path / "run"
    arguments = options(max_steps=40, validate_every=20, preview_every=20, save_every=10, keep_checkpoints=2)
    main(arguments)

    # Held-out loss falls, for the weights and for their average; metrics at the steps that were asked for.
    lines = metrics(run)
    validated = [line for line in lines if "val_ema/loss" in line]
    assert [line["step"] for line in validated] == [0, 20, 40]
    for name in ("val_raw/loss", "val_ema/loss"):
        losses = [line[name] for line in validated]
        assert losses[2] < losses[1] < losses[0] and losses[2] < 0.9 * losses[0]
    logged = [line for line in lines if "train/mse" in line]
    assert [line["step"] for line in logged] == list(range(4, 41, 4))
    assert all(line["train/grad_norm"] > 0 and line["images_per_second"] > 0 for line in logged)

    # The same numbers are in the tensorboard log.
    (events,) = (run / "logs" / "freqgate_dit").glob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events)).Reload()
    for name, source in (("train/mse", logged), ("val_ema/loss", validated)):
        scalars = [(event.step, event.value) for event in accumulator.Scalars(name)]
        assert scalars == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in source]

    # Checkpoints, previews, curves, configuration.
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000030", "step_00000040"]
    for step in (20, 40):
        assert Image.open(run / "previews" / f"step_{step:08d}.png").size == (128, 128)
    for picture in (run / "loss.png", run / "validation.png", run / "pipeline" / "figures" / "gate.png"):
        assert Image.open(picture).size[0] > 100 and is_drawn(picture)
    config = parse_config(arguments)
    assert parse_config(["--config", str(run / "config.yaml")]) == config
    published = parse_config(["--config", str(run / "pipeline" / "training_config.yaml")])
    assert published == config.shareable() and published.train.output_dir == "run"
    # Nothing that is shared says where it was made.
    for path in (run / "pipeline").rglob("*"):
        assert path.suffix == ".safetensors" or path.is_dir() or str(tmp_path).encode() not in path.read_bytes(), path

    # The pipeline has the averaged weights of the last step, which are not the raw ones.
    last = state(run, 40)
    pipeline = FreqGateDiTPipeline.from_pretrained(run / "pipeline")
    assert_same_tensors(pipeline.transformer.state_dict(), last["ema-0.9"])
    assert not torch.equal(last["ema-0.9"]["proj_out.weight"], last["model"]["proj_out.weight"])
    classes = ShapesTextures(1, image_size=32).class_names
    assert pipeline.id2label == dict(enumerate(classes))
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert describe_sampler(type(pipeline.scheduler).__name__, pipeline.scheduler.config) == (
        "SpectralEulerDiscreteScheduler, second order, spectral noise levels"
    )

    # It knows the spectrum of what it was trained on.
    train_images, _ = load_images(config.data)
    pixels = train_images.images(range(len(train_images))).float() / 127.5 - 1
    statistics = SpectrumStatistics()
    statistics.update(pixels)
    assert pipeline.scheduler.config._spectrum == statistics.spectrum()
    assert make_sampler("euler", pipeline.scheduler.config).config._spectrum == statistics.spectrum()

    # Its samples are the preview.
    pipeline.set_progress_bar_config(disable=True)
    labels = [index * len(classes) // 4 for index in range(4)]
    images = pipeline(labels, num_inference_steps=2, guidance_scale=2.5, seed=0).images
    preview = Image.open(run / "previews" / "step_00000040.png")
    for index, image in enumerate(images):
        left, top = 64 * (index % 2), 64 * (index // 2)
        shown = preview.crop((left, top, left + 64, top + 64)).resize((32, 32), resample=0)
        difference = np.asarray(image, dtype=int) - np.asarray(shown, dtype=int)
        # The trainer's attention is the same function in another order of operations.
        assert abs(difference).max() <= 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains(variant, tmp_path, options):
    main(options(variant=variant, max_steps=4, report_to="none", spectral_weight=0.1, stratified="false"))
    assert isinstance(FreqGateDiTPipeline.from_pretrained(tmp_path / "run/pipeline").transformer, VARIANTS[variant])
    first, second = (line for line in metrics(tmp_path / "run") if "val_raw/loss" in line)
    assert first["val_raw/loss"] != second["val_raw/loss"]
    assert [line["train/spectral"] > 0 for line in metrics(tmp_path / "run") if "train/mse" in line] == [True]
    assert not (tmp_path / "run" / "logs").exists()


@pytest.fixture(scope="session")
def animals(tmp_path_factory):
    return photos(tmp_path_factory.mktemp("animals") / "photos")


@pytest.fixture(scope="session")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "clip"
    tiny_tokenizer(folder)
    tiny_text_encoder().save_pretrained(folder)
    return folder


def on_animals(animals, **changes):
    return {"num_images": None, "dataset": animals, "resolution": 16, "heldout_per_class": 2, **changes}


def test_unconditional_run(tmp_path, options):
    main(options(condition="none", max_steps=2))
    pipeline = FreqGateDiTPipeline.from_pretrained(tmp_path / "run/pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer.config.num_classes is None and pipeline.id2label == {}
    images = pipeline(num_images_per_label=2, num_inference_steps=2, seed=0, output_type="np").images
    assert images.shape == (2, 32, 32, 3)


@pytest.mark.parametrize("make_vae", [tiny_vae_kl, tiny_vae_tiny])
def test_run_on_latents(make_vae, tmp_path, options, animals):
    make_vae().save_pretrained(tmp_path / "vae")
    changes = on_animals(animals, vae=tmp_path / "vae", patch_size=2, horizontal_flip="true", max_steps=3)
    main(options(**changes))
    # The second run finds the latents in the cache.
    main(options(**changes, output_dir=tmp_path / "again"))
    assert_same_tensors(state(tmp_path / "run", 3)["model"], state(tmp_path / "again", 3)["model"])
    pipeline = FreqGateDiTPipeline.from_pretrained(tmp_path / "run/pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert_same_tensors(pipeline.vae.state_dict(), make_vae().state_dict())
    assert not any(str(tmp_path) in path.read_text() for path in (tmp_path / "run" / "pipeline").rglob("*.json"))
    assert (pipeline.transformer.config.in_channels, pipeline.transformer.config.sample_size) == (4, 8)
    assert pipeline("dog", num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    assert pipeline.id2label == {0: "cat", 1: "dog", 2: "wild"}


def test_run_on_text(tmp_path, options, animals, text_model):
    changes = on_animals(animals, condition="text", text_encoder=text_model, prompt_template="a {label}")
    arguments = options(**changes, max_steps=2)
    main(arguments)
    pipeline = FreqGateDiTPipeline.from_pretrained(tmp_path / "run/pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert_same_tensors(pipeline.text_encoder.state_dict(), tiny_text_encoder().state_dict())
    for path in (tmp_path / "run" / "pipeline").rglob("*.json"):
        assert str(text_model).encode() not in path.read_bytes(), path
    # What training saw of a class is what the pipeline makes of its prompt.
    table = Trainer(parse_config([*arguments, "--dry_run"])).condition.table
    call = {"num_inference_steps": 2, "guidance_scale": 2.0, "seed": 0, "output_type": "np"}
    by_prompt = pipeline(prompt=["a dog"], **call).images
    by_table = pipeline(pooled_prompt_embeds=table[1:2], negative_pooled_prompt_embeds=table[3:], **call).images
    assert abs(by_prompt - by_table).max() < 1e-5
    assert abs(by_prompt - pipeline(prompt=["a cat"], **call).images).max() > 0


def test_a_text_encoder_that_gives_nan_is_named(tmp_path, options, animals, text_model):
    folder = shutil.copytree(text_model, tmp_path / "clip")
    model = tiny_text_encoder()
    with torch.no_grad():
        next(model.parameters()).view(-1)[:] = float("nan")
    model.save_pretrained(folder)
    changes = on_animals(animals, condition="text", text_encoder=folder)
    assert "`text_encoder`" in (message := refusal(options(**changes))) and "NaN" in message


@pytest.mark.parametrize("one_image", [False, True])
def test_without_a_held_out_part_validation_is_on_training_images_and_says_so(
    one_image, tmp_path, options, animals, capsys, monkeypatch
):
    """Training on everything, and the usual first check: to overfit one image, of which nothing varies."""
    titles = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: titles.extend(a.get_title() for a in self.axes))
    changes = {"max_steps": 30, "learning_rate": 1e-2, "variant": "adaln_zero", "preconditioning": "wiener"}
    if one_image:
        (tmp_path / "one").mkdir()
        shutil.copy(animals / "cat" / "0.png", tmp_path / "one")
        data = on_animals(tmp_path / "one", heldout_per_class=None)
    else:
        data = on_animals(animals, heldout_per_class=0)
    main(options(**data, **changes))
    printed = capsys.readouterr().out
    assert "`heldout_fraction`" in printed and "step 30: loss on training images" in printed
    losses = [line["val_raw/loss"] for line in metrics(tmp_path / "run") if "val_raw/loss" in line]
    assert losses[-1] < (0.8 if one_image else 1) * losses[0]
    assert "Training images, averaged weights, by timestep" in titles
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text()
    count, name = (1, "one") if one_image else (18, "photos")
    assert f"{name}: {count} training and 0 held-out images" in card and "loss on training images" in card
    assert "eld-out loss" not in card and "eld-out error" not in card
    assert "loss on training images" in read_summary(tmp_path / "run" / "pipeline").describe()


def test_bf16_keeps_weights_in_float32(tmp_path, options):
    main(options(mixed_precision="bf16", max_steps=4))
    for group in state(tmp_path / "run", 4).values():
        assert {tensor.dtype for tensor in group.values()} == {torch.float32}
    train(options(mixed_precision="no", max_steps=4, output_dir=tmp_path / "float32"))
    half, full = (metrics(tmp_path / name)[-1]["val_raw/loss"] for name in ("run", "float32"))
    assert half != full and half == pytest.approx(full, rel=0.02)


def test_another_precision_than_before_is_told(options, capsys):
    for step, precision, told in ((2, "bf16", None), (4, "no", "bf16"), (5, "no", None), (6, "bf16", "no")):
        train(options(mixed_precision=precision, max_steps=step, resume="auto"))
        printed = capsys.readouterr().out
        words = f"trained with mixed precision {told}, this machine goes on with {precision}"
        assert (words in printed) if told else ("this machine goes on" not in printed)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_blocks_train_validate_and_sample_alike(tmp_path, options):
    """29 images are no multiple of the batch, and previews are guided: several shapes through one compiled block."""
    changes = {"num_layers": 1, "max_steps": 2, "log_every": 1, "validate_every": 1, "num_validation_images": 29}
    main(options(**changes))
    main(options(**changes, compile="true", output_dir=tmp_path / "compiled"))
    torch._dynamo.reset()
    for one, other in zip(metrics(tmp_path / "run"), metrics(tmp_path / "compiled"), strict=True):
        losses = [name for name in one if name.endswith(("/loss", "mse", "grad_norm"))]
        assert [one[name] for name in losses] == pytest.approx([other[name] for name in losses], rel=1e-4)
    one, other = state(tmp_path / "run", 2), state(tmp_path / "compiled", 2)
    assert {group: tensors.keys() for group, tensors in one.items()} == {
        group: tensors.keys() for group, tensors in other.items()
    }
    previews = [
        np.asarray(Image.open(tmp_path / name / "previews/step_00000002.png"), int) for name in ("run", "compiled")
    ]
    assert abs(previews[0] - previews[1]).max() <= 1


def test_gradient_checkpointing_changes_nothing(tmp_path, options):
    main(options(max_steps=2))
    main(options(max_steps=2, gradient_checkpointing="true", output_dir=tmp_path / "other"))
    one, other = state(tmp_path / "run", 2)["model"], state(tmp_path / "other", 2)["model"]
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


def test_clipping_bounds_the_step(tmp_path, options):
    # AdamW ignores the gradient's scale, so clipping shows in its first moment: 0.1 x clipped gradient after a step.
    main(options(max_steps=1, max_grad_norm=1e-3))
    moments = [value for name, value in state(tmp_path / "run", 1)["optimizer"].items() if name.endswith("/exp_avg")]
    norm = torch.cat([moment.flatten() for moment in moments]).norm().item()
    assert metrics(tmp_path / "run")[-2]["train/grad_norm"] > 1e-3
    assert norm == pytest.approx(1e-4, rel=1e-2)


def test_lost_weights_are_neither_saved_nor_published(tmp_path, options):
    """A learning rate that loses the weights in the first step: from the second on no gradient is finite."""
    message = refusal(options(max_steps=6, learning_rate=1e30, log_every=1000, save_every=2))
    assert "step 6 is not saved: its gradient is not finite, nor is the held-out loss" in message
    assert "No step was saved" in message and "--resume auto" in message
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "pipeline").exists()


def test_a_run_whose_gradient_stays_lost_ends(tmp_path, options):
    message = refusal(options(max_steps=60, learning_rate=1e30, log_every=5, save_every=2, max_skipped_steps=7))
    assert "not finite in 9 steps in a row, seen at step 10" in message
    assert "`learning_rate` (1e+30)" in message and "--resume auto" in message and "`qk_norm`" in message
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert [line["train/skipped_steps"] for line in metrics(tmp_path / "run") if "train/lr" in line] == [4, 9]


def poison(trainer, *steps):
    """Make the latents of `steps` (from 0) NaN, as a damaged cache or a faulty chip would."""
    draw = trainer.batches.draw

    def poisoned(step):
        batch = draw(step)
        if step in steps:
            batch.latents.fill_(float("nan"))
        return batch

    trainer.batches.draw = poisoned


def test_steps_without_a_finite_gradient_change_nothing(tmp_path, options, capsys):
    """Two bad steps at the end of a run: weights and moments are those of the good steps before, bit for bit."""
    main(options(max_steps=6))
    reset_accelerate()
    trainer = Trainer(parse_config(options(max_steps=8, output_dir=tmp_path / "bad", log_every=1)))
    poison(trainer, 6, 7)
    trainer.train()
    for group in ("model", "optimizer"):
        assert_same_tensors(state(tmp_path / "bad", 8)[group], state(tmp_path / "run", 6)[group])
    assert "step 7: skipped, its gradient is nan" in capsys.readouterr().out
    # The weights are good: the run has a result.
    assert (tmp_path / "bad" / "pipeline").is_dir()


def test_one_bad_part_of_a_batch_spoils_the_whole_step(tmp_path, options):
    """With accumulation, a gradient that is not finite in one forward pass only."""
    changes = {"per_device_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 3}
    main(options(**changes))
    reset_accelerate()
    trainer = Trainer(parse_config(options(**{**changes, "max_steps": 4}, output_dir=tmp_path / "bad")))
    draw = trainer.batches.draw

    def poisoned(step):
        batch = draw(step)
        if step == 3:
            batch.latents[2:4] = float("inf")
        return batch

    trainer.batches.draw = poisoned
    trainer.train()
    assert_same_tensors(state(tmp_path / "bad", 4)["model"], state(tmp_path / "run", 3)["model"])


def test_a_checkpoint_waits_for_a_good_step(tmp_path, options):
    trainer = Trainer(parse_config(options(max_steps=9, save_every=3, keep_checkpoints=9)))
    poison(trainer, 2, 3)
    trainer.train()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step_00000005", "step_00000006", "step_00000009"]


def test_skipped_steps_are_counted_and_the_run_goes_on(tmp_path, options):
    trainer = Trainer(parse_config(options(max_steps=8, log_every=4)))
    poison(trainer, 1, 2, 6)
    trainer.train()
    reports = [line for line in metrics(tmp_path / "run") if "train/lr" in line]
    assert [line["train/skipped_steps"] for line in reports] == [2, 3]
    # Means are over the steps that were taken.
    assert all(0 < line["train/mse"] < 10 and line["train/grad_norm"] > 0 for line in reports)
    assert all(value.isfinite().all() for group in state(tmp_path / "run", 8).values() for value in group.values())
    assert (tmp_path / "run" / "pipeline").is_dir()


def test_a_jump_of_the_loss_is_written_down(tmp_path, options, capsys):
    trainer = Trainer(parse_config(options(max_steps=24, log_every=8)))
    trainer.logbook.spikes.memory = 10
    draw = trainer.batches.draw

    def too_large(step):
        batch = draw(step)
        if step == 17:
            batch.latents.mul_(10)
        return batch

    trainer.batches.draw = too_large
    trainer.train()
    (spike,) = [line for line in metrics(tmp_path / "run") if "spike/loss" in line]
    assert spike["step"] == 18 and spike["spike/times_usual"] > 2 and spike["spike/grad_norm"] > 0
    assert f"step 18: the loss jumps to {spike['spike/loss']:.4g}" in capsys.readouterr().out
    assert [line["train/spikes"] for line in metrics(tmp_path / "run") if "train/lr" in line] == [0, 0, 1]


def test_numbers_of_a_run(tmp_path, options):
    """What DESIGN 5 asks to be logged, and that the pieces belong together."""
    main(options(max_steps=4, ema=["power:0.1", "0.5"], validate_every=2))
    reports = [line for line in metrics(tmp_path / "run") if "train/lr" in line]
    for line in reports:
        assert 0 <= line["data_wait"] < 1 and line["memory_gib"] > 0.05
        # Four updates: a power average lags by less than the run, a constant decay of 0.5 by about its warm-up.
        assert 0 < line["ema_age/power:0.1"] < 1 and 0 < line["ema_age/0.5"] < 2
    validations = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in validations] == [0, 2, 4]
    scalars = [line for line in metrics(tmp_path / "run") if "val_raw/loss" in line]
    for tables, line in zip(validations, scalars, strict=True):
        for weights in ("raw", "ema"):
            assert tables[weights]["loss"] == line[f"val_{weights}/loss"]
            assert tables[weights]["information"] == line[f"val_{weights}/information_nats"]
            assert len(tables[weights]["table"]) == len(tables[weights]["null_table"]) == 10
            assert f"val_{weights}/loss_t1of10" in line and f"val_{weights}/loss_band_0-1" in line
    # The untrained model knows nothing of its condition.
    assert (
        validations[0]["raw"]["information"] == 0
        and validations[0]["raw"]["loss"] == validations[0]["raw"]["null_loss"]
    )
    assert validations[-1]["raw"]["information"] != 0
    for name in ("loss.png", "validation.png"):
        assert Image.open(tmp_path / "run" / name).size[0] > 100


def test_averages_of_other_widths_come_out_of_a_run(tmp_path, options):
    from freqgate_dit.training.posthoc_ema import posthoc_average

    main(options(max_steps=20, ema=["power:0.1", "power:0.05"], ema_snapshots=5))
    snapshots = tmp_path / "run" / "ema_snapshots"
    assert [path.name for path in sorted(snapshots.iterdir())] == [
        f"step_{n:08d}.safetensors" for n in (4, 8, 12, 16, 20)
    ]
    # A width that was stored comes out as it was, and it is what the pipeline has.
    published = FreqGateDiTPipeline.from_pretrained(tmp_path / "run/pipeline").transformer.state_dict()
    for name, tensor in posthoc_average(snapshots, 0.1).items():
        torch.testing.assert_close(tensor, published[name], rtol=1e-5, atol=1e-6)
    # Another one lies elsewhere.
    wide = posthoc_average(snapshots, 0.2)
    assert max((wide[name] - published[name]).abs().max() for name in wide) > 1e-3


@pytest.mark.parametrize(("patch_size", "processor"), [(2, DiTMatmulAttnProcessor), (1, DiTAttnProcessor)])
def test_long_sequences_keep_the_fused_attention(patch_size, processor, options):
    trainer = Trainer(parse_config(options(max_steps=1, patch_size=patch_size)))
    assert {type(one) for one in trainer.model.attn_processors.values()} == {processor}


def test_warm_up_is_what_the_optimizer_uses(tmp_path, options):
    main(options(max_steps=4, log_every=1, warmup_steps=4, learning_rate=0.004))
    rates = [line["train/lr"] for line in metrics(tmp_path / "run") if "train/lr" in line]
    assert rates == pytest.approx([0.001, 0.002, 0.003, 0.004])


def test_epochs_count_images(tmp_path, options):
    trainer = Trainer(parse_config(options(max_steps=None, num_epochs=3, dry_run="true")))
    assert trainer.total_steps == 3 * 96 // 8


def test_accumulation_gives_the_step_of_the_whole_batch(tmp_path, options):
    main(options(max_steps=3))
    changes = {"per_device_batch_size": 2, "gradient_accumulation_steps": 4, "output_dir": tmp_path / "accumulated"}
    main(options(max_steps=3, **changes))
    one, other = state(tmp_path / "run", 3)["model"], state(tmp_path / "accumulated", 3)["model"]
    distance = torch.cat([(one[name] - other[name]).flatten() for name in one]).norm()
    assert distance < 1e-3 * torch.cat([value.flatten() for value in one.values()]).norm()
    losses = [
        [line["train/mse"] for line in metrics(tmp_path / name) if "train/mse" in line]
        for name in ("run", "accumulated")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_training_and_sampling_share_their_betas(prediction_type, beta_schedule):
    objective = parse_config(
        ["--max_steps=1", f"--prediction_type={prediction_type}", f"--beta_schedule={beta_schedule}"]
    ).objective
    training = make_scheduler(objective)
    spectrum = {"height": 4, "width": 4, "power": [[1.0, 0.5]], "mean": [[[0.0]]]}
    for name in SAMPLERS:
        sampling = make_sampling_scheduler(name, training, spectrum)
        assert torch.equal(training.betas, sampling.betas)
        assert training.config.prediction_type == sampling.config.prediction_type == prediction_type
        assert sampling.config._spectrum == spectrum


# -- resuming ---------------------------------------------------------------------------------------------------------


def test_a_preconditioned_run_keeps_the_spectrum_of_its_data(tmp_path, options):
    changes = {"preconditioning": "learned", "ema": ["power:0.1", "power:0.05"], "ema_snapshots": 3}
    main(options(**changes, max_steps=6, output_dir=tmp_path / "straight"))
    main(options(**changes, max_steps=3))
    main(options(**changes, max_steps=6, resume="latest"))
    straight, resumed = state(tmp_path / "straight", 6)["model"], state(tmp_path / "run", 6)["model"]
    assert_same_tensors(straight, resumed)
    assert straight["preconditioner.slope"].any() and straight["preconditioner.offset"].any()

    images, _ = load_images(parse_config(options(**changes)).data)
    statistics = SpectrumStatistics()
    statistics.update(images.images(range(len(images))).float() / 127.5 - 1)
    power = statistics.power.clamp(min=1e-3 * statistics.power.mean())
    log_snr = torch.logit(make_scheduler(ObjectiveConfig()).alphas_cumprod)
    posthoc_ema.main(["--run", str(tmp_path / "run"), "--sigma_rel", "0.08"])
    for name in ("pipeline", "pipeline_ema_0.08"):
        transformer = FreqGateDiTPipeline.from_pretrained(tmp_path / "run" / name).transformer
        assert transformer.config.prediction_type == "v_prediction"
        spectrum = dict(transformer.spectrum.named_buffers())
        torch.testing.assert_close(spectrum["log_snr"], log_snr)
        torch.testing.assert_close(spectrum["mean"], statistics.mean.float())
        torch.testing.assert_close(spectrum["power"], power.float())


def test_a_band_gate_run_knows_its_data_and_shows_its_gains(tmp_path, options):
    changes = {"variant": "band_gate", "modulation_rank": 4}
    main(options(**changes, max_steps=4, output_dir=tmp_path / "straight"))
    main(options(**changes, max_steps=2))
    main(options(**changes, max_steps=4, resume="latest"))
    straight, resumed = state(tmp_path / "straight", 4)["model"], state(tmp_path / "run", 4)["model"]
    assert_same_tensors(straight, resumed)
    assert straight["transformer_blocks.0.band_modulation.linear.weight"].any()
    assert straight["spectrum.power"].std() > 0  # not the white default

    pipeline = tmp_path / "run" / "pipeline"
    assert (pipeline / "figures" / "band_gains.png").is_file()
    assert "figures/band_gains.png" in (pipeline / "README.md").read_text()
    transformer = FreqGateDiTPipeline.from_pretrained(pipeline).transformer
    assert torch.equal(transformer.spectrum.power, straight["spectrum.power"])


@pytest.mark.parametrize("kind", ["octave", "bump", "decoder"])
def test_a_run_with_band_weights_differs_from_its_blind_control_and_resumes(kind, tmp_path, options, animals):
    tiny_vae_kl().save_pretrained(tmp_path / "vae")
    changes = {"band_weights": kind, "vae": tmp_path / "vae", "cache_dir": tmp_path / "cache"}
    main(options(**changes, max_steps=4, output_dir=tmp_path / "straight"))
    main(options(**changes, max_steps=2))
    main(options(**changes, max_steps=4, resume="latest"))
    straight = state(tmp_path / "straight", 4)["model"]
    assert_same_tensors(straight, state(tmp_path / "run", 4)["model"])
    main(options(**changes, band_blind=True, max_steps=4, output_dir=tmp_path / "blind"))
    assert not torch.equal(straight["proj_out.weight"], state(tmp_path / "blind", 4)["model"]["proj_out.weight"])


def test_decoder_weights_need_a_decoder(options):
    with pytest.raises(SystemExit, match="`band_weights` is 'decoder', but there is no `vae`"):
        main(options(band_weights="decoder", max_steps=1))


def test_resumed_run_equals_a_straight_one_bit_for_bit(tmp_path, options, animals):
    tiny_vae_kl().save_pretrained(tmp_path / "vae")
    changes = on_animals(
        animals,
        vae=tmp_path / "vae",
        patch_size=2,
        horizontal_flip="true",
        dropout=0.1,
        ema=["0.9", "power:0.1", "power:0.05"],
        gradient_accumulation_steps=2,
        warmup_steps=3,
        per_device_batch_size=5,
        log_every=2,
        validate_every=5,
    )
    main(options(**changes, max_steps=10, output_dir=tmp_path / "straight"))
    main(options(**changes, max_steps=5))
    torch.manual_seed(123)
    main(options(**changes, max_steps=10, resume="latest"))
    straight, resumed = state(tmp_path / "straight", 10), state(tmp_path / "run", 10)
    averages = {"ema-0.9", "ema-power-0.1", "ema-power-0.05"}
    assert straight.keys() == resumed.keys() == {"model", "optimizer", *averages}
    for group in straight:
        assert_same_tensors(straight[group], resumed[group])
    ends = [metrics(tmp_path / run)[-1] for run in ("straight", "run")]
    assert ends[0] == ends[1] and ends[0]["step"] == 10 and "val_ema/loss" in ends[0]
    # A run that is at its end only writes its pipeline again.
    shutil.rmtree(tmp_path / "run" / "pipeline")
    main(options(**changes, max_steps=10, resume="latest"))
    pipeline = FreqGateDiTPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert_same_tensors(pipeline.transformer.state_dict(), resumed["ema-0.9"])


def test_runs_of_a_seed_start_alike(options):
    """Whatever their variant, and whatever was drawn before."""
    starts = []
    for noise, variant, seed in ((1, "adaln_zero", 0), (2, "freq_gate", 0), (1, "adaln_zero", 1)):
        torch.manual_seed(noise)
        trainer = Trainer(parse_config(options(variant=variant, seed=seed, dry_run="true")))
        starts.append(trainer.model.state_dict())
    first, other_variant, other_seed = starts
    shared = first.keys() & other_variant.keys()
    assert len(shared) > 20 and all(torch.equal(first[key], other_variant[key]) for key in shared)
    assert not torch.equal(first["patch_embed.weight"], other_seed["patch_embed.weight"])


def test_a_job_that_is_started_again_and_again(tmp_path, options):
    """`--resume auto` in an empty folder, after a kill before the first checkpoint, and with a checkpoint."""
    main(options(max_steps=4, output_dir=tmp_path / "straight"))
    main(options(max_steps=2, resume="auto"))
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints)
    main(options(max_steps=2, resume="auto"))
    assert [line["step"] for line in metrics(tmp_path / "run") if "val_raw/loss" in line] == [0, 2]
    main(options(max_steps=4, resume="auto"))
    assert_same_tensors(state(tmp_path / "run", 4)["model"], state(tmp_path / "straight", 4)["model"])
    # What is there but damaged is not thrown away.
    for path in checkpoints.iterdir():
        (path / "manifest.json").unlink()
    assert "no complete checkpoint" in refusal(options(max_steps=6, resume="auto"))


def test_a_run_that_fails_before_its_first_checkpoint_can_be_started_again(tmp_path, options):
    """By what its message says, whichever way one tries first."""
    lost = refusal(options(max_steps=3, learning_rate=1e30, log_every=1, max_skipped_steps=1))
    for message in (lost, refusal(options(max_steps=3)), refusal(options(max_steps=3, resume="latest"))):
        assert "`--resume auto`" in message
    main(options(max_steps=3, resume="auto"))
    reported = metrics(tmp_path / "run")
    assert reported[-1]["step"] == 3 and "train/lr" in reported[1]


def test_a_job_that_began_before_another_ended_does_not_start_anew_over_it(tmp_path, options, monkeypatch):
    """The folder is free by then, and was not there when this one looked for a checkpoint."""

    def encode(trainer, *words, encode=Trainer._encode):
        monkeypatch.undo()
        main(options(max_steps=2, resume="auto"))
        return encode(trainer, *words)

    monkeypatch.setattr(Trainer, "_encode", encode)
    assert "checkpoints of another job" in refusal(options(max_steps=2, resume="auto"))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]


def test_another_length_is_refused_below_the_checkpoint_and_told_above(tmp_path, options, capsys):
    main(options(max_steps=4, lr_schedule="cosine", log_every=1))
    message = refusal(options(max_steps=3, resume="latest"))
    assert "`max_steps` (3) ends the run at step 3" in message and "step_00000004" in message
    capsys.readouterr()
    main(options(max_steps=8, lr_schedule="cosine", log_every=1, resume="latest"))
    printed = capsys.readouterr().out
    rates = [line["train/lr"] for line in metrics(tmp_path / "run") if "train/lr" in line]
    assert f"goes on at {rates[4]:.3g} after {rates[3]:.3g}" in printed and "had 4 steps and now has 8" in printed


def test_out_of_memory_names_the_options_that_take_less(options, monkeypatch):
    monkeypatch.setattr(Batches, "draw", lambda self, step: torch.empty(2**55))  # more than there are addresses for
    message = refusal(options())
    assert "can't allocate memory" in message and "`per_device_batch_size` below 8" in message
    for option in ("gradient_accumulation_steps", "--gradient_checkpointing true", "--data_on_device false"):
        assert f"`{option}`" in message


def test_what_resume_refuses(tmp_path, options):
    run = tmp_path / "run"
    message = refusal(options(resume="latest"))
    assert "has no checkpoint yet" in message and str(run) in message
    main(options(max_steps=4, save_every=2))

    for name, value, was in (
        ("num_layers", 3, 2),
        ("prediction_type", "'epsilon'", "'v_prediction'"),
        ("condition", "'none'", "'auto'"),
        ("num_images", 100, 96),
        ("seed", 1, 0),
    ):
        message = refusal(options(resume="latest", **{name: str(value).strip("'")}))
        assert f"`{name}` is {value}" in message and str(was) in message and "same value" in message
    message = refusal(options(resume="latest", per_device_batch_size=4))
    assert "4 images" in message and "with 8" in message and "gradient_accumulation_steps" in message

    # The same number of images per step in other portions is the same run.
    main(options(resume="latest", per_device_batch_size=4, gradient_accumulation_steps=2, max_steps=5))

    last = run / "checkpoints" / "step_00000005"
    (last / "manifest.json").unlink()
    message = refusal(options(resume=last))
    assert "`resume`" in message and str(last) in message and "manifest.json" in message
    assert "--resume latest" in message and "step_00000004" in message
    model = run / "checkpoints" / "step_00000004" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    assert "the oldest, step_00000004, has a damaged model.safetensors" in refusal(options(resume="latest"))


def test_resume_refuses_a_folder_whose_content_has_changed(tmp_path, options):
    data = tmp_path / "data"
    for name in ("cat", "dog"):
        (data / name).mkdir(parents=True)
        for index in range(6):
            Image.new("RGB", (32, 32), (40 * index, 0, 0)).save(data / name / f"{index}.png")
    run = {"dataset": data, "num_images": None}
    main(options(**run, max_steps=1))
    (data / "cat").rename(data / "eel")
    message = refusal(options(**run, resume="latest", max_steps=2))
    assert (
        "`dataset`" in message
        and str(data) in message
        and "other training or held-out images, names or classes" in message
    )
    (data / "eel").rename(data / "cat")
    main(options(**run, resume="latest", max_steps=2))
    assert state(tmp_path / "run", 2)


def test_pauses_do_not_count_as_training_time(tmp_path, options, monkeypatch):
    now = itertools.count()
    monkeypatch.setattr("freqgate_dit.training.logbook.time.perf_counter", lambda: float(next(now)))
    # A preview between two log lines that takes 100 seconds.
    monkeypatch.setattr(Trainer, "preview", lambda self: [next(now) for _ in range(100)])
    main(options(max_steps=4, log_every=4, preview_every=2))
    speed = next(line["images_per_second"] for line in metrics(tmp_path / "run") if "images_per_second" in line)
    assert speed > 4 * TINY["per_device_batch_size"] / 100


def test_folder_of_another_run_is_refused(tmp_path, options):
    main(options(max_steps=1))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    message = refusal(options(max_steps=1))
    assert "`output_dir`" in message and str(tmp_path / "run") in message and "--resume latest" in message
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_fine_tuning_may_be_started_again_and_again(tmp_path, options):
    """`--resume auto` with nothing saved yet starts from `--init_from`, not from scratch."""
    main(options(max_steps=20, output_dir=tmp_path / "source"))
    main(options(max_steps=2, init_from=tmp_path / "source", resume="auto"))
    first = metrics(tmp_path / "run")[0]
    last = [line for line in metrics(tmp_path / "source") if "val_ema/loss" in line][-1]
    assert first["step"] == 0 and first["val_raw/loss"] == pytest.approx(last["val_ema/loss"], rel=1e-5)


def test_a_pipeline_is_replaced_whole(tmp_path, options):
    folder = tmp_path / "run" / "pipeline"
    main(options(max_steps=1))
    shutil.rmtree(folder)
    folder.mkdir()  # nobody's, and in nobody's way
    main(options(max_steps=2, resume="latest"))
    (folder / "transformer" / "left_over.json").write_text("of an older version")
    main(options(max_steps=3, resume="latest"))
    assert not (folder / "transformer" / "left_over.json").exists()
    published = FreqGateDiTPipeline.from_pretrained(folder).transformer.state_dict()
    assert_same_tensors(published, state(tmp_path / "run", 3)["ema-0.9"])
    assert not list(folder.parent.glob("pipeline.*"))


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resolution": 36}, ("`resolution`", "36", "`patch_size`", "8")),
        ({"attention_head_dim": 10}, ("`attention_head_dim`", "10", "multiple of 4")),
        ({"variant": "in_context", "modulation_rank": 4}, ("`modulation_rank`", "4")),
        ({"spectral_weight": -1}, ("`spectral_weight`", "-1")),
        ({"vae": "no/such-folder/vae"}, ("`vae`", "no/such-folder/vae", "config.json")),
        ({"condition": "text", "text_encoder": "./no-such-folder"}, ("`text_encoder`", "no-such-folder")),
        ({"dataset": "no such data", "num_images": None}, ("dataset", "no such data", "folder")),
        ({"horizontal_flip": "true"}, ("horizontal_flip",)),
        ({"max_steps": None}, ("max_steps", "num_epochs")),
        ({"report_to": "notes"}, ("`report_to`", "notes", "tensorboard")),
        ({"class_dropout_prob": 0}, ("`guidance_scale` is 2.5", "`class_dropout_prob` 0", "`guidance_scale` 1")),
        ({"ema": ["power:0.5"]}, ("`ema`", "power:0.5")),
        ({"save_every": 10, "keep_every": 25}, ("`keep_every` (25)", "`save_every` (10)")),
    ],
)
def test_refusals_name_argument_value_and_remedy(changes, words, tmp_path, options, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(options(**changes))
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


def test_resolution_must_fit_autoencoder_and_patch(tmp_path, options, animals):
    tiny_vae_kl().save_pretrained(tmp_path / "vae")
    message = refusal(options(**on_animals(animals, vae=tmp_path / "vae", patch_size=2, resolution=18)))
    assert all(word in message for word in ("`resolution`", "18", "multiple of 4", "factor 2", "`patch_size` 2"))


def test_classes_must_exist_for_a_class_condition(options, tmp_path, animals):
    flat = tmp_path / "flat"
    shutil.copytree(animals / "cat", flat)
    message = refusal(options(**on_animals(flat, condition="class")))
    assert "`condition`" in message and "'class'" in message and "none" in message


# -- dry runs of the presets ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def local_parts(tmp_path_factory):
    """What the presets take from the Hub, in small: three classes as parquet, an 8x autoencoder, a CLIP text model."""
    import datasets

    folder = tmp_path_factory.mktemp("parts")
    pictures = photos(folder / "photos", count=5)
    files = sorted(pictures.glob("*/*.png"))
    names = ["cat", "dog", "wild"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": [str(file) for file in files], "label": [names.index(file.parent.name) for file in files]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "animals.parquet"))
    tiny_vae_kl(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
    ).save_pretrained(folder / "vae")
    tiny_tokenizer(folder / "tokenizer")
    tiny_text_encoder().save_pretrained(folder / "text_encoder")
    return {
        "dataset": folder / "animals.parquet",
        "heldout_per_class": 2,
        "vae": folder / "vae",
        "text_encoder": folder / "text_encoder",
        "tokenizer": folder / "tokenizer",
    }


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_dry_run_of_preset(preset, tmp_path, monkeypatch, capsys, local_parts):
    monkeypatch.chdir(tmp_path)
    text = yaml.safe_load(preset.read_text())
    named = {"dataset": "a folder of one's own", **text}
    local = {name: value for name, value in local_parts.items() if named.get(name) not in (None, "shapes_textures")}
    arguments = ["--config", str(preset), "--dry_run", "--cpu_threads=1", "--mixed_precision=no"]
    main([*arguments, *(f"--{name}={value}" for name, value in local.items())])
    printed = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    for word in ("parameters", "FLOPs per image", "memory", "training and", "held-out images", "samples:", "dry run"):
        assert word in printed
    assert f"variant: {text['variant']}\n" in printed and VARIANTS[text["variant"]].__name__ in printed
    assert f"learning_rate: {text['learning_rate']}\n" in printed
    if "heldout_per_class" in local:
        assert "  cat: 3 + 2\n  dog: 3 + 2\n  wild: 3 + 2\n" in printed
    # The number that is printed is the number of parameters of a model built from the preset alone.
    config = parse_config(arguments)
    classes = {"num_classes": 3 if "dataset" in local else 64}
    condition = {"pooled_projection_dim": 16} if text.get("condition") == "text" else classes
    channels, size = (4, 16) if "vae" in text else (3, config.data.resolution)
    with torch.device("meta"):
        model = config.model.build(channels, size, condition, config.objective)
    assert f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M" in printed


def test_images_of_ones_own_are_trained_by_the_preset(tmp_path, capsys):
    words = ["--dataset", str(photos(tmp_path / "photos")), "--dry_run", "--cpu_threads=1", "--mixed_precision=no"]
    main(words)
    printed = capsys.readouterr().out
    for name, value in yaml.safe_load((ROOT / "training/configs/photos64.yaml").read_text()).items():
        assert f"{name}: {str(value).lower() if value is True else value}\n" in printed


@pytest.mark.parametrize(("steps", "told"), [(7, True), (8, False)])
def test_a_warm_up_that_never_ends_is_told(options, capsys, steps, told):
    main([*options(warmup_steps=7, max_steps=steps), "--dry_run"])
    assert ("`warmup_steps` 7" in capsys.readouterr().out) == told


@pytest.mark.parametrize("resume", [None, "auto"])
@pytest.mark.parametrize("name", ["pipeline", "checkpoints", "previews", "metrics.jsonl", "config.yaml"])
def test_a_folder_with_something_else_is_refused(name, resume, options, tmp_path):
    place = tmp_path / "run" / name / "mine.txt" if "." not in name else tmp_path / "run" / name
    place.parent.mkdir(parents=True)
    place.write_text("mine: 1")
    message = refusal(options(resume=resume))
    assert "`output_dir`" in message and f"holds {name}, which a run would replace" in message
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [place] and place.read_text() == "mine: 1"


@pytest.mark.parametrize("name", ["config.yaml", "checkpoints/step_00000001/manifest.json"])
def test_another_programs_files_do_not_make_a_folder_that_of_a_run(name, options, tmp_path):
    """Beside them its reports, which lack nothing of ours."""
    theirs = {"metrics.jsonl": '{"step": 1, "loss": 2}\n', name: "{}"}
    for file, text in theirs.items():
        (tmp_path / "run" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / file).write_text(text)
    assert "metrics.jsonl, which a run would replace" in refusal(options(resume="auto"))
    assert {file: (tmp_path / "run" / file).read_text() for file in theirs} == theirs


def test_a_checkpoint_does_not_go_on_in_the_folder_of_another_run(options, tmp_path):
    for name in ("run", "other"):
        main(options(max_steps=1, output_dir=tmp_path / name))
    message = refusal(options(max_steps=2, resume=tmp_path / "other" / "checkpoints" / "step_00000001"))
    assert "`output_dir`" in message and "`resume`" in message and f"copy it to {tmp_path / 'run'}" in message


def test_damage_outside_the_state_does_not_stop_a_run_from_going_on(options, tmp_path, capsys):
    run = tmp_path / "run"
    main(options(max_steps=1, preview_every=1))
    lines = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "validation.jsonl")}
    for name, content in lines.items():
        (run / name).write_bytes(b'{"step": \xff\n' + content)
    for picture in ("loss.png", "previews/step_00000001.png", "pipeline/README.md"):
        (run / picture).write_bytes(b"\xff")
    main(options(max_steps=2, resume="latest"))
    printed = capsys.readouterr().out
    for name, content in lines.items():
        assert f"{name} has 1 damaged lines" in printed and (run / name).read_bytes().startswith(content)
        (damaged,) = run.glob(f"{name}.damaged_*")
        assert damaged.read_bytes().endswith(content)


@pytest.mark.parametrize("option", ["output_dir", "cache_dir"])
def test_pictures_of_a_run_do_not_become_its_images(option, options, tmp_path, animals):
    (tmp_path / "link").symlink_to(animals)
    for place in (animals, animals / "runs" / "mine", tmp_path / "link" / "cat"):
        message = refusal(options(**on_animals(animals, **{option: place})))
        assert f"`{option}` ({place})" in message and f"`dataset` {animals}" in message
    assert sorted(path.name for path in animals.iterdir()) == ["cat", "dog", "wild"]


def test_what_others_put_into_the_pipeline_stays(options, tmp_path):
    main(options(max_steps=1))
    pipeline = tmp_path / "run" / "pipeline"
    card = (pipeline / "README.md").read_text(encoding="utf-8") + "mine\n"
    (pipeline / "README.md").write_text(card, encoding="utf-8")
    mine = [pipeline / name for name in ("notes/a.md", "LICENSE", "figures/mine.png")]
    (pipeline / "notes").mkdir()
    for file in mine:
        file.write_text("mine")
    (pipeline / "gone.md").symlink_to(tmp_path / "nowhere")
    beside = [tmp_path / "run" / name for name in ("pipeline.tmp", "pipeline.replaced")]
    for folder in beside:
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
    main(options(max_steps=2, resume="latest"))
    assert (pipeline / "README.md").read_text(encoding="utf-8") == card
    assert all(file.read_text() == "mine" for file in mine) and (pipeline / "gone.md").is_symlink()
    assert all((folder / "mine.txt").read_text() == "mine" for folder in beside)
    assert (
        json.loads((pipeline / "training_summary.json").read_text())["images_seen"]
        == 2 * TINY["per_device_batch_size"]
    )
    (pipeline / "model_index.json").unlink()
    assert "pipeline would be replaced, but was not written" in refusal(options(max_steps=3, resume="latest"))


# -- as a command -----------------------------------------------------------------------------------------------------


def test_accelerate_launch_from_a_checkout(tmp_path, options, checkout):
    launch = ("accelerate", "launch", "--cpu", "--num_processes", "1", "training/train.py")
    done = run(*launch, *options(max_steps=2, variant="adaln_zero"), cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert f'from_pretrained("{tmp_path / "run" / "pipeline"}")' in done.stdout
    # It is the run that `main` does in this process.
    main(options(max_steps=2, variant="adaln_zero", output_dir=tmp_path / "here"))
    assert_same_tensors(state(tmp_path / "run", 2)["model"], state(tmp_path / "here", 2)["model"])


def test_two_processes_train_as_one(tmp_path, options, checkout):
    main(options(max_steps=3, log_every=1))
    two = options(max_steps=3, log_every=1, per_device_batch_size=4, output_dir=tmp_path / "two")
    # `accelerate launch --cpu` starts one process whatever --num_processes says; torchrun is what it calls for GPUs.
    launch = ("torchrun", "--standalone", "--nproc_per_node", "2", "training/train.py")
    done = run(*launch, *two, cwd=checkout, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert "4 per process x 2 processes x 1 accumulation = 8" in done.stdout
    for one, other in zip(metrics(tmp_path / "run"), metrics(tmp_path / "two"), strict=True):
        for values in (one, other):
            for name in ("images_per_second", "data_wait", "memory_gib"):
                values.pop(name, None)
        assert one == pytest.approx(other, rel=1e-4)
    one, other = state(tmp_path / "run", 3)["optimizer"], state(tmp_path / "two", 3)["optimizer"]
    for entry in ("exp_avg", "exp_avg_sq"):
        names = [name for name in one if name.endswith(f"/{entry}")]
        whole = torch.cat([one[name].flatten() for name in names]).norm()
        for name in names:
            # By a tensor's own size, as squares are tiny; a key's bias has no gradient but rounding.
            assert (one[name] - other[name]).norm() <= 2e-3 * one[name].norm() + 1e-6 * whole, name


def test_a_signal_saves_and_resume_goes_on(tmp_path, options, capsys):
    """Ctrl-C in the third step: it is finished and saved, and the resumed run ends as if nothing had happened."""
    trainer = Trainer(parse_config(options(max_steps=6)))
    draw = trainer.batches.draw

    def interrupted_draw(step):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return draw(step)

    handler = signal.getsignal(signal.SIGINT)
    trainer.batches.draw = interrupted_draw
    trainer.train()
    assert signal.getsignal(signal.SIGINT) is handler
    assert "stopped and saved at step 3 of 6" in capsys.readouterr().out
    assert not (tmp_path / "run" / "pipeline").exists()

    train(options(max_steps=6, resume="latest"))
    train(options(max_steps=6, output_dir=tmp_path / "straight"))
    for name, tensors in state(tmp_path / "straight", 6).items():
        assert_same_tensors(tensors, state(tmp_path / "run", 6)[name])
