"""Validation on fixed images, noise and timesteps."""

import json
import math

import numpy as np
import pytest
import torch
from components import tiny_transformer
from diffusers import DDPMScheduler

from freqgate_dit.losses import DiffusionObjective, prediction_target
from freqgate_dit.spectral import idct2, octave_bands
from freqgate_dit.training.latents import CachedLatents
from freqgate_dit.training.validation import Validation, information_weights


NULL = 3
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def validation(num_images=20, batch_size=8, process=0, num_processes=1, prediction_type="epsilon", **kwargs):
    generator = torch.Generator().manual_seed(1)
    data = CachedLatents(torch.randn(30, 2, 4, 8, 8, generator=generator), None, torch.arange(30) % 3)
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, prediction_type=prediction_type)
    return Validation(data, scheduler, num_images, batch_size, process, num_processes, **kwargs)


@torch.no_grad()
def predictor(seed=0):
    model = tiny_transformer(seed=seed)
    return lambda noisy, timesteps, labels: model(noisy, timesteps, class_labels=labels).sample


def result(checked, denoise):
    return checked.summarise(checked(denoise))


def assert_same_totals(one, other):
    assert one.keys() == other.keys()
    for name in one:
        # Networks round differently in batches of another size.
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5 * one[name].abs().max().item())


# -- loss -------------------------------------------------------------------------------------------------------------


def test_validation_is_the_plain_mean_squared_error():
    losses, tenths = [], [[] for _ in range(10)]
    checked, denoise = validation(), predictor()
    objective = DiffusionObjective(checked.scheduler)
    for sample, labels, noise, timesteps in checked.batches:
        terms = objective.terms(lambda x, t, labels=labels: denoise(x, t, labels), sample, noise, timesteps)
        losses += terms["mse"].tolist()
        for loss, timestep in zip(terms["mse"].tolist(), timesteps.tolist(), strict=True):
            tenths[timestep // 100].append(loss)
    summary = result(checked, denoise).scalars()
    assert len(losses) == 20 and [len(tenth) for tenth in tenths] == [2] * 10
    assert summary["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    for index, tenth in enumerate(tenths):
        assert summary[f"loss_t{index + 1}of10"] == pytest.approx(np.mean(tenth), rel=1e-5)


def test_validation_is_repeatable_and_ignores_batch_size_and_processes():
    denoise = predictor()
    torch.manual_seed(5)
    whole = validation(null_label=NULL)(denoise)
    again = validation(null_label=NULL)(denoise)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert_same_totals(whole, validation(batch_size=3, null_label=NULL)(denoise))
    # 16 images in a batch: more processes than batches, some have nothing to do.
    for batch_size in (3, 16):
        shards = [validation(batch_size=batch_size, process=p, num_processes=4, null_label=NULL) for p in range(4)]
        parts = [shard(denoise) for shard in shards]
        total = {name: sum(part[name] for part in parts) for name in whole}
        assert_same_totals(whole, total)
        one, several = (validation(null_label=NULL).summarise(totals).scalars() for totals in (whole, total))
        assert several == pytest.approx(one, rel=1e-3)
    assert not torch.equal(whole["energy"], validation()(predictor(seed=1))["energy"])


def test_validation_takes_what_there_is():
    assert validation(num_images=1000)(predictor())["count"].sum() == 30


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_right_answer_has_no_loss(prediction_type):
    checked = validation(prediction_type=prediction_type)
    answers = iter([prediction_target(checked.scheduler, x, noise, t) for x, _, noise, t in checked.batches])
    assert result(checked, lambda *_: next(answers)).loss == 0


def test_tables_average_to_the_loss():
    summary = result(validation(num_images=25, null_label=NULL), predictor())
    share = summary.coefficients.double() / summary.coefficients.sum()
    assert summary.coefficients.sum() == 4 * 8 * 8 and summary.num_images.sum() == 25
    for prefix in ("", "null_"):
        loss, by_timestep, by_band, table = (
            getattr(summary, prefix + name) for name in ("loss", "loss_by_timestep", "loss_by_band", "table")
        )
        torch.testing.assert_close(table @ share, by_timestep)
        torch.testing.assert_close(summary.num_images.double() @ table / 25, by_band)
        assert (by_timestep @ summary.num_images.double() / 25).item() == pytest.approx(loss)
        assert (by_band @ share).item() == pytest.approx(loss)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_errors_of_the_noise_are_those_of_the_noise_that_the_prediction_implies(prediction_type):
    """The same wrong sample, told as noise, velocity or sample, is the same error of the noise."""
    checked = validation(prediction_type=prediction_type)
    alphas = checked.scheduler.alphas_cumprod.double()
    answers, errors = [], []
    for sample, _, noise, timesteps in checked.batches:
        a, s = (x[timesteps].sqrt().view(-1, 1, 1, 1) for x in (alphas, 1 - alphas))
        wrong = sample + 0.1 * torch.randn(sample.shape, generator=torch.Generator().manual_seed(1))
        implied = (a * (sample - wrong) + s * noise) / s
        answers.append({"epsilon": implied, "v_prediction": a * implied - s * wrong, "sample": wrong}[prediction_type])
        errors.append((implied - noise).square().flatten(1).mean(1))
    answers = iter(answers)
    summary = result(checked, lambda *_: next(answers))
    assert summary.epsilon_loss == pytest.approx(torch.cat(errors).mean().item(), rel=1e-4)
    share = summary.coefficients.double() / summary.coefficients.sum()
    torch.testing.assert_close(summary.epsilon_table @ share, summary.epsilon_loss_by_timestep)
    assert (prediction_type == "epsilon") == (summary.epsilon_loss == summary.loss)


@pytest.mark.parametrize("size", [(8, 8), (6, 16)])
def test_error_of_one_frequency_lands_in_its_band(size):
    data = CachedLatents(torch.zeros(12, 1, 2, *size))
    checked = Validation(data, DDPMScheduler(), num_images=12, batch_size=5, num_bins=3)
    bands = octave_bands(*size)
    for row, column in ((0, 0), (0, 2), (3, 4), (5, 7)):
        wave = torch.zeros(size)
        wave[row, column] = 2.0
        noises = iter([noise for _, _, noise, _ in checked.batches])
        summary = result(checked, lambda *_, noises=noises, wave=wave: next(noises) + idct2(wave))
        band = bands[row, column]
        expected = torch.zeros(3, len(summary.bands), dtype=torch.float64)
        expected[:, band] = 4 / (bands == band).sum()
        torch.testing.assert_close(summary.table, expected, rtol=1e-5, atol=1e-9)


def test_empty_timestep_bins_are_left_out():
    summary = result(validation(num_images=2, null_label=NULL), predictor())
    filled = [index for index, count in enumerate(summary.num_images.tolist()) if count]
    assert len(filled) == 2
    timestep_keys = [key for key in summary.scalars() if key.startswith("loss_t")]
    assert timestep_keys == [f"loss_t{index + 1}of10" for index in filled]
    # One image in a bin says nothing about the spread.
    assert "information_nats_se" not in summary.scalars()
    plain = json.loads(json.dumps(summary.to_json(), allow_nan=False))
    assert [loss is not None for loss in plain["loss_by_timestep"]] == [bool(count) for count in plain["num_images"]]


def test_names_of_scalars_and_json():
    with_null, without = (result(validation(null_label=null), predictor()) for null in (NULL, None))
    bins, bands = [f"loss_t{index}of10" for index in range(1, 11)], ["loss_band_0-1", "loss_band_1-2", "loss_band_2-4"]
    assert list(without.scalars()) == ["loss", *bins, *bands]
    assert list(with_null.scalars())[14:] == ["null_loss", "information_nats", "information_nats_se"]
    plain = json.loads(json.dumps(with_null.to_json(), allow_nan=False))
    assert plain["table"] == with_null.table.tolist() and plain["bands"] == ["0-1", "1-2", "2-4"]
    assert plain["information"] == with_null.information and plain["label_entropy"] == pytest.approx(math.log(3))
    assert without.to_json()["null_table"] is None and without.to_json()["table"] == plain["table"]


def test_errors():
    with pytest.raises(ValueError, match="`num_bins` \\(0\\)"):
        validation(num_bins=0)
    with pytest.raises(ValueError, match="`null_label` is 3"):
        Validation(CachedLatents(torch.zeros(4, 1, 1, 2, 2)), DDPMScheduler(), 4, 2, null_label=3)


# -- null condition and information -----------------------------------------------------------------------------------


def test_true_and_null_condition_see_the_same_inputs():
    calls = []
    denoise = predictor()

    def record(noisy, timesteps, labels):
        calls.append((noisy.clone(), timesteps, labels))
        return denoise(noisy, timesteps, labels)

    checked = validation(null_label=NULL)
    summary = result(checked, record)
    assert len(calls) == 2 * len(checked.batches)
    for (noisy, timesteps, labels), (null_noisy, null_timesteps, null_labels), batch in zip(
        calls[::2], calls[1::2], checked.batches, strict=True
    ):
        assert torch.equal(noisy, null_noisy) and torch.equal(timesteps, null_timesteps)
        assert torch.equal(labels, batch[1]) and set(null_labels.tolist()) == {NULL}
    # What is said of the true condition does not depend on the null condition, and each is what it would be alone.
    alone = result(validation(), denoise)
    null_alone = result(validation(), lambda x, t, y: denoise(x, t, torch.full_like(y, NULL)))
    assert alone.loss == summary.loss and torch.equal(null_alone.table, summary.null_table)
    assert alone.null_table is None and alone.information is None


class Mixture:
    """K equal Gaussians of standard deviation `std`, and the exact denoisers with and without the class."""

    CLASSES = 4

    def __init__(self, num_images, std, prediction_type, null_label=CLASSES, **schedule):
        generator = torch.Generator().manual_seed(2)
        self.std = std
        self.means = 3 * torch.randn(self.CLASSES, 4, generator=generator)
        self.scheduler = DDPMScheduler(prediction_type=prediction_type, **schedule)
        labels = torch.arange(num_images) % self.CLASSES
        sample = self.means[labels] + std * torch.randn(num_images, 4, generator=generator)
        data = CachedLatents(sample.view(num_images, 1, 1, 2, 2), None, labels)
        self.validation = Validation(data, self.scheduler, num_images, 4000, null_label=null_label)

    def __call__(self, noisy, timesteps, labels):
        z = noisy.flatten(1).double()
        alpha_bar = self.scheduler.alphas_cumprod.double()[timesteps, None]
        a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        means = self.means.double()
        variance = a**2 * self.std**2 + s**2
        log_likelihood = -(z[:, None] - a[..., None] * means).square().sum(-1) / (2 * variance)  # (B, K)
        known = torch.nn.functional.one_hot(labels, self.CLASSES + 1)[:, :-1]
        posterior = torch.where(labels[:, None] < self.CLASSES, known, log_likelihood.softmax(-1))
        mean = posterior @ means
        sample = mean + a * self.std**2 / variance * (z - a * mean)
        epsilon = (z - a * sample) / s.clamp(min=1e-9)
        prediction = {"epsilon": epsilon, "sample": sample, "v_prediction": a * epsilon - s * sample}
        return prediction[self.scheduler.config.prediction_type].view_as(noisy)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("std", [0.0, 0.2])
def test_information_of_exact_denoisers_is_the_entropy_of_the_class(prediction_type, std):
    mixture = Mixture(100_000, std, prediction_type)
    summary = result(mixture.validation, mixture)
    assert summary.information == pytest.approx(math.log(4), rel=0.02)
    assert abs(summary.information - math.log(4)) < 3 * summary.information_se
    assert summary.label_entropy == pytest.approx(math.log(4))
    assert summary.information_table.sum().item() == pytest.approx(summary.information)
    assert summary.null_loss > summary.loss


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_information_with_zero_terminal_snr(prediction_type):
    mixture = Mixture(50_000, 0.0, prediction_type, rescale_betas_zero_snr=True)
    assert mixture.scheduler.alphas_cumprod[-1] == 0
    assert mixture.validation.information_weights[-1] == 0
    assert result(mixture.validation, mixture).information == pytest.approx(math.log(4), rel=0.03)


def test_weights_of_information_integrate_over_the_log_snr():
    scheduler = DDPMScheduler()
    weights = information_weights(scheduler)
    log_snr = torch.logit(scheduler.alphas_cumprod.double())
    assert weights.mean().item() == pytest.approx((log_snr[0] - log_snr[-1]).item() / 2)
    assert (weights * log_snr).mean().item() == pytest.approx((log_snr[0] ** 2 - log_snr[-1] ** 2).item() / 4)


def test_ignored_condition_carries_no_information():
    mixture = Mixture(400, 0.2, "epsilon")
    unconditional = result(mixture.validation, lambda x, t, y: mixture(x, t, torch.full_like(y, mixture.CLASSES)))
    assert unconditional.information == 0 and unconditional.information_se == 0
    assert torch.equal(unconditional.information_table, torch.zeros(10, 1, dtype=torch.float64))


def test_standard_error_is_that_of_repeated_estimates():
    mixture = Mixture(40_000, 0.2, "epsilon")
    whole = [torch.cat(parts) for parts in zip(*mixture.validation.batches, strict=True)]
    estimates, errors = [], []
    # Every 40th image: the timesteps of each part are spread over the schedule.
    for start in range(40):
        mixture.validation.batches = [[x[start::40] for x in whole]]
        summary = result(mixture.validation, mixture)
        estimates.append(summary.information)
        errors.append(summary.information_se)
    assert np.mean(errors) == pytest.approx(np.std(estimates, ddof=1), rel=0.25)
    mixture.validation.batches = [whole]
    assert result(mixture.validation, mixture).information_se == pytest.approx(np.mean(errors) / 40**0.5, rel=0.05)
