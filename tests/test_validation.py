"""Validation on fixed images, noise and timesteps."""

import numpy as np
import pytest
import torch
from components import tiny_transformer
from diffusers import DDPMScheduler

from freqgate_dit.losses import DiffusionObjective, prediction_target
from freqgate_dit.training.latents import CachedLatents
from freqgate_dit.training.validation import Validation


def validation(num_images=20, batch_size=8, process=0, num_processes=1, prediction_type="epsilon"):
    generator = torch.Generator().manual_seed(1)
    data = CachedLatents(torch.randn(30, 2, 4, 8, 8, generator=generator), None, torch.arange(30) % 3)
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, prediction_type=prediction_type)
    return Validation(data, scheduler, num_images, batch_size, process, num_processes)


@torch.no_grad()
def predictor(seed=0):
    model = tiny_transformer(seed=seed)
    return lambda noisy, timesteps, labels: model(noisy, timesteps, class_labels=labels).sample


def test_validation_is_the_plain_mean_squared_error():
    losses, quarters = [], [[], [], [], []]
    checked, denoise = validation(), predictor()
    objective = DiffusionObjective(checked.scheduler)
    for sample, labels, noise, timesteps in checked.batches:
        terms = objective.terms(lambda x, t, labels=labels: denoise(x, t, labels), sample, noise, timesteps)
        losses += terms["mse"].tolist()
        for loss, timestep in zip(terms["mse"].tolist(), timesteps.tolist(), strict=True):
            quarters[timestep // 250].append(loss)
    summary = Validation.summarise(checked(denoise))
    assert len(losses) == 20 and [len(quarter) for quarter in quarters] == [5, 5, 5, 5]
    assert summary["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    for index, quarter in enumerate(quarters):
        assert summary[f"loss_t{index + 1}of4"] == pytest.approx(np.mean(quarter), rel=1e-5)


def test_validation_is_repeatable_and_ignores_batch_size_and_processes():
    denoise = predictor()
    torch.manual_seed(5)
    whole = validation()(denoise)
    assert torch.equal(whole, validation()(denoise))
    torch.testing.assert_close(whole, validation(batch_size=3)(denoise))
    parts = [validation(batch_size=3, process=process, num_processes=4)(denoise) for process in range(4)]
    torch.testing.assert_close(whole, sum(parts))
    # More processes than batches: some have nothing to do.
    parts = [validation(batch_size=16, process=process, num_processes=4)(denoise) for process in range(4)]
    torch.testing.assert_close(whole, sum(parts))
    assert not torch.equal(whole, validation()(predictor(seed=1)))


def test_validation_takes_what_there_is():
    assert validation(num_images=1000)(predictor())[0, 1] == 30


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_right_answer_has_no_loss(prediction_type):
    checked = validation(prediction_type=prediction_type)
    answers = iter([prediction_target(checked.scheduler, x, noise, t) for x, _, noise, t in checked.batches])
    assert Validation.summarise(checked(lambda *_: next(answers)))["loss"] == 0
