"""Runs of the trainer with views."""

import re

import pytest
import torch
from components import assert_same_tensors
from tiny_runs import metrics, refusal, run, state

from freqgate_dit import FreqGateDiTPipeline
from freqgate_dit.ladder import Ladder
from freqgate_dit.summary import read_summary
from freqgate_dit.training.config import parse_config
from freqgate_dit.training.matching import ModelSizes
from freqgate_dit.training.train import Trainer, main


# The built-in data's 32 px in patches of 4: 64, 16 and 4 tokens. (By tolerance the second view would never be used:
# the textures' frequencies are outside both it and the third.)
VIEWS = {"variant": "adaln_zero", "preconditioning": "wiener", "patch_size": 4, "grid_views": 3, "grid_price": 0.1}


@pytest.fixture
def views(options):
    def build(**changes):
        return options(**{**VIEWS, **changes})

    return build


def test_resumed_run_with_views_equals_a_straight_one_bit_for_bit(tmp_path, views, capsys):
    changes = {"per_device_batch_size": 5, "gradient_accumulation_steps": 2, "log_every": 2}
    main(views(**changes, max_steps=6, output_dir=tmp_path / "straight"))
    told = capsys.readouterr().out
    main(views(**changes, max_steps=3))
    torch.manual_seed(123)
    main(views(**changes, max_steps=6, resume="latest"))
    straight, resumed = state(tmp_path / "straight", 6), state(tmp_path / "run", 6)
    for group in straight:
        assert_same_tensors(straight[group], resumed[group])
    # All views were trained, and what the run has told is what its pipeline does and records.
    pipeline = FreqGateDiTPipeline.from_pretrained(tmp_path / "run/pipeline")
    heads = pipeline.transformer.proj_out, *pipeline.transformer.coarse_proj_outs
    assert len(heads) == 3 and all(head.weight.any() for head in heads)
    summary = read_summary(tmp_path / "run/pipeline")
    ladder = summary.ladder
    assert ladder == Ladder.from_json(read_summary(tmp_path / "straight/pipeline").training["ladder"])
    assert ladder.describe() in told and summary.mean_flops == ladder.mean_flops < summary.flops
    assert ladder.rungs[2].flops < ladder.sampling_flops < ladder.rungs[0].flops
    assert ladder.describe_briefly() in summary.describe() and f"{ladder.mean_flops / 1e9:.3g}" in summary.describe()
    card = (tmp_path / "run/pipeline/README.md").read_text()
    assert ladder.describe_briefly() in card and f"{ladder.sampling_flops / 1e9:.3g}" in card
    # With micro-batches of another size the views have other shares.
    capsys.readouterr()
    main(views(per_device_batch_size=10, max_steps=7, resume="latest"))
    assert "`per_device_batch_size` 5" in capsys.readouterr().out


def test_a_step_without_weights_has_the_gradient_of_a_plain_loop(views):
    """The gradient of a step is that of the weighted mean of the samples' losses, each at its view, one by one."""
    trainer = Trainer(parse_config(views(max_steps=2, max_grad_norm=1e9)))
    model, objective, shares = trainer.model, trainer.objective, trainer.shares
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    batch = trainer.batches.draw(0)
    trainer.objective.total(trainer.loss_terms(batch)).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    model.zero_grad()
    timesteps = shares.timesteps(objective, batch.uniform)
    labels = torch.where(batch.dropout < 0.1, 64, batch.labels)
    for index, weight in enumerate(shares.weights):
        one = slice(index, index + 1)
        noisy = objective.scheduler.add_noise(batch.latents[one], batch.noise[one], timesteps[one])
        target = objective.scheduler.get_velocity(batch.latents[one], batch.noise[one], timesteps[one])
        prediction = model(noisy, timesteps[one], class_labels=labels[one]).sample
        (weight * (prediction - target).square().mean() / len(shares)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)
    trainer.close()


def test_a_dry_run_tells_the_ladder(views, tmp_path, capsys):
    main(views(dry_run="true", per_device_batch_size=6))
    dry = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    main(views(max_steps=1, per_device_batch_size=6))
    ladder = read_summary(tmp_path / "run/pipeline").ladder
    # It reads all of the 96 images, without mirrored ones, as the run does.
    assert ladder.describe() in dry and "96 images" in dry
    shared = re.search(r"of each 6 samples (\d+) \+ (\d+) \+ (\d+)", dry)
    assert sum(map(int, shared.groups())) == 6


def test_switches_by_price(views, tmp_path):
    for price in (1e-6, 1e6):
        main(views(max_steps=1, grid_price=price, output_dir=tmp_path / f"{price}"))
    cheap, dear = (read_summary(tmp_path / f"{price}/pipeline").ladder for price in (1e-6, 1e6))
    assert [rung.timesteps for rung in dear.rungs] == [None, None, (0, 999)]
    assert dear.mean_tokens == 4 < cheap.mean_tokens
    with pytest.raises(SystemExit, match=r"`grid_price` \(1.0\).*`grid_views`"):
        main(views(max_steps=1, grid_price=1, grid_views=1, output_dir=tmp_path / "none"))


def test_views_that_are_never_used_are_left_alone(views, tmp_path, capsys):
    main(views(max_steps=2, grid_tolerance=0, grid_price=None))
    assert "no switch" in capsys.readouterr().out
    model = FreqGateDiTPipeline.from_pretrained(tmp_path / "run/pipeline").transformer
    assert model.proj_out.weight.any() and not any(head.weight.any() for head in model.coarse_proj_outs)


def test_two_processes_leave_alone_what_both_do_not_use(views, tmp_path, checkout):
    """A second step would wait for gradients of the full grid."""
    arguments = views(max_steps=2, grid_price=1e6)
    launch = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "training/train.py"]
    run(*launch, *arguments, cwd=checkout, ACCELERATE_USE_CPU="true").check_returncode()
    model = FreqGateDiTPipeline.from_pretrained(tmp_path / "run/pipeline").transformer
    assert model.coarse_proj_outs[1].weight.any() and not model.proj_out.weight.any()


def test_two_processes_train_the_views_of_one(tmp_path, views, checkout):
    """With the same micro-batches; neither waits for a gradient that the other does not have."""
    main(views(max_steps=3, gradient_accumulation_steps=2, log_every=1))
    launch = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "training/train.py"]
    two = views(max_steps=3, log_every=1, output_dir=tmp_path / "two")
    run(*launch, *two, cwd=checkout, ACCELERATE_USE_CPU="true").check_returncode()
    for one, other in zip(metrics(tmp_path / "run"), metrics(tmp_path / "two"), strict=True):
        for key in one.keys() & {"train/mse", "val_raw/loss", "val_ema/loss", "train/grad_norm"}:
            assert one[key] == pytest.approx(other[key], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"per_device_batch_size": 2}, ["`per_device_batch_size` (2)", "3", "`grid_views`"]),
        ({"grid_views": 5}, ["`grid_views` (5)", "`grid_views` 4"]),
        ({"patch_size": 16}, ["`grid_views` (3)", "`grid_views` 2"]),
        ({"patch_size": 32, "grid_views": 2}, ["`grid_views` (2)", "`grid_views` 1"]),
        ({"preconditioning": None}, ["`grid_views` (3)", "`preconditioning`"]),
        ({"preconditioning": "scalar"}, ["`grid_views` (3)", "'scalar'"]),
        ({"grid_tolerance": 1}, ["`grid_tolerance` (1.0)"]),
        ({"grid_price": -1}, ["`grid_price` (-1.0)"]),
        ({"grid_price": "inf"}, ["`grid_price` (inf)"]),
        ({"beta_end": 0.9}, ["`beta_end` (0.9)", "`preconditioning`"]),
    ],
)
def test_views_that_cannot_be_trained(changes, words, views):
    message = refusal(views(max_steps=1, **changes))
    assert all(word in message for word in words)


def test_a_comparison_counts_the_mean_over_a_micro_batch(views):
    config = parse_config(views(max_steps=1, num_layers=3))
    trainer = Trainer(config)
    trainer.close()
    expected = trainer.ladder.flops_of(trainer.shares.counts)
    assert ModelSizes(config)(config) == {
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "flops": pytest.approx(expected),
    }
