"""When noisy images tell of a factor, and what a model's predictions use of its label."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from components import euler, make_pipeline, tiny_transformer, tiny_vae_tiny
from diffusers import DDPMScheduler
from torch.testing import assert_close

from freqgate_dit.shapes_textures import STRUCTURES, TEXTURES
from freqgate_dit.traces import log_snr
from freqgate_dit.training import information
from freqgate_dit.training.factor_posterior import FactorPosterior
from freqgate_dit.training.information import (
    factor_information,
    half_level,
    noised,
    without_factor,
)
from freqgate_dit.training.latents import CachedLatents
from freqgate_dit.training.report import Subject, information_section
from freqgate_dit.training.report.information import _read_ceiling, half_of_use, information_density, is_possible
from freqgate_dit.training.validation import Validation


def test_noised_images_have_the_level():
    torch.manual_seed(0)
    levels = torch.tensor([-3.0, 0.0, 3.0]).repeat_interleave(2000)
    images = torch.full((6000, 3, 4, 4), 2.0)
    for level, noisy in zip((-3.0, 0.0, 3.0), noised(images, levels).split(2000)):
        alpha = 1 / (1 + math.exp(-level))
        assert noisy.mean() == pytest.approx(2 * math.sqrt(alpha), abs=0.02)
        assert noisy.var() == pytest.approx(1 - alpha, rel=0.03)


def test_the_level_of_half_the_information():
    levels = np.linspace(-4, 4, 9)
    assert half_level(levels, np.where(levels < 0, 0.0, math.log(8))) == pytest.approx(-0.5)
    assert half_level(levels, np.linspace(0, 2, 9), whole=2.0) == pytest.approx(0)
    # What is forgotten again was not known.
    assert half_level(levels, np.array([0, 2, 0, 0, 0, 2, 2, 2, 2.0]), whole=2.0) == pytest.approx(0.5)
    # Where all of it is never known, half is not thereby known earlier.
    assert half_level(levels, np.linspace(0, 2, 9).clip(max=1.5), whole=2.0) == pytest.approx(0)
    assert math.isnan(half_level(levels, np.full(9, 1.0)))  # half of ln 8 is known at no level
    assert half_level(levels, np.full(9, 2.0)) == -4


def test_what_a_factor_has_is_known_of_clear_images_and_nothing_of_noise(monkeypatch):
    monkeypatch.setattr(information, "TEST_IMAGES", 256)
    monkeypatch.setattr(information, "LOG_SNR_RANGE", (-30.0, 1.0))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    levels, nats = factor_information(FactorPosterior("add", 32, num_draws=2048), "add", 32, num_levels=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert levels.tolist() == [-30, -14.5, 1] and set(nats) == {
        *("structure", "texture"),
        *("structure, the other factor known", "texture, the other factor known"),
    }
    for values in nats.values():
        assert abs(values[0]) < 1e-3 and abs(values[1]) < 0.01 and 1.8 < values[2] <= math.log(8)


class TestWithoutAFactor:
    """Images of patterns whose ideal denoiser and posterior are known.

    Independent: A_s + B_t, all orthogonal. Dependent: t chooses among patterns of s alone, so that p(t | x) and
    p(t | x, s) differ.
    """

    shape, strength = (3, 16, 16), 3.0
    scheduler = DDPMScheduler()

    def patterns(self, dependent):
        """Of all labels: `(64, 768)`."""
        structures, textures = torch.arange(64) // 8, torch.arange(64) % 8
        images = torch.zeros(64, 768)
        images[torch.arange(64), structures] = self.strength
        images[torch.arange(64), 64 + (torch.arange(64) if dependent else textures)] = self.strength
        return images

    def denoiser(self, patterns):
        def denoise(noisy, timesteps, labels):
            alpha = self.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
            return (noisy - alpha.sqrt() * patterns[labels].view(-1, *self.shape)) / (1 - alpha).sqrt()

        return denoise

    def posterior(self, patterns):
        def log_probabilities(noisy, timesteps):
            alpha = self.scheduler.alphas_cumprod[timesteps][:, None]
            logits = alpha.sqrt() * (noisy.flatten(1) @ patterns.T) - 0.5 * alpha * patterns.square().sum(1)
            return (logits / (1 - alpha)).log_softmax(1).view(-1, 8, 8)

        return log_probabilities

    @pytest.mark.parametrize("factor", ["structure", "texture"])
    @pytest.mark.parametrize("dependent", [False, True])
    def test_the_use_of_an_ideal_denoiser_is_the_entropy(self, factor, dependent):
        torch.manual_seed(0)
        labels, patterns = torch.randint(64, (2048,)), self.patterns(dependent)
        data = CachedLatents(patterns[labels].view(-1, 1, *self.shape), None, labels)
        validation = Validation(data, self.scheduler, len(labels), 512, num_bins=20)
        denoise = self.denoiser(patterns)
        without = without_factor(denoise, self.posterior(patterns), factor)
        result = validation.summarise(validation(denoise, without))
        assert result.information_se < 0.15
        assert abs(result.information - math.log(8)) < 3 * result.information_se

    def test_it_is_the_mean_over_the_values_and_knows_the_other_factor_alone(self):
        torch.manual_seed(0)
        noisy, timesteps = torch.randn(5, *self.shape), torch.full((5,), 500)
        labels = torch.tensor([0, 9, 18, 27, 63])
        denoise = self.denoiser(self.patterns(dependent=True))
        undecided = without_factor(denoise, lambda noisy, timesteps: torch.zeros(5, 8, 8), "structure")
        found = undecided(noisy, timesteps, labels)
        values = [denoise(noisy, timesteps, 8 * value + labels % 8) for value in range(8)]
        assert torch.allclose(found, torch.stack(values).mean(0), atol=1e-6)
        assert torch.equal(found, undecided(noisy, timesteps, labels % 8))
        certain = 1e4 * torch.nn.functional.one_hot(labels, 64).view(5, 8, 8).float()
        told = without_factor(denoise, lambda noisy, timesteps: certain, "texture")
        assert torch.allclose(told(noisy, timesteps, labels), denoise(noisy, timesteps, labels), atol=1e-6)


@pytest.mark.parametrize(
    "low, high, possible", [(1.8, 2.2, True), (1.8, 3.0, None), (-0.1, 2.0, None), (2.6, 3.0, False), (-2, -1, False)]
)
def test_what_use_of_a_factor_is_possible(low, high, possible):
    assert is_possible(low, high, math.log(8)) is possible


class TestDensity:
    @pytest.fixture
    def subject(self, tmp_path):
        classes = len(STRUCTURES) * len(TEXTURES)
        transformer = tiny_transformer("adaln_zero", num_classes=classes, in_channels=3, sample_size=32, patch_size=8)
        with torch.no_grad():
            transformer.proj_out.weight.normal_(std=0.5)
        return Subject(make_pipeline(transformer), "mod", cache_dir=tmp_path)

    def test_its_integral_is_the_information(self, subject):
        result = subject.validate(num_bins=5, with_null=True)
        rows = information_density(result, subject.alphas_cumprod)
        limits = log_snr(subject.alphas_cumprod, torch.linspace(0, 999, 6).round())
        widths = (limits[:-1] - limits[1:]).tolist()
        total = sum(row["density"] * width for row, width in zip(rows, widths))
        assert result.information != 0 and total == pytest.approx(result.information)
        for row in rows:
            bands = sum(value for name, value in row.items() if name.endswith("cycles"))
            assert bands == pytest.approx(row["density"])

    def test_half_of_the_use_lies_below_its_level(self, subject):
        result = subject.validate(num_bins=5, with_null=True)
        limits = log_snr(subject.alphas_cumprod, torch.linspace(0, 999, 6).round()).flip(0)
        table = torch.zeros_like(result.information_table)
        table[2, 1], table[3, 0] = 1.0, 1.0  # spans from clean to noise
        level = half_of_use(replace(result, information_table=table), subject.alphas_cumprod)
        assert level == pytest.approx(limits[2].item())
        assert half_of_use(replace(result, information_table=-table), subject.alphas_cumprod) is None

    def test_the_ceiling_is_what_the_labels_have(self, subject, monkeypatch):
        monkeypatch.setattr(information, "TEST_IMAGES", 32)
        few_draws = partial(FactorPosterior, num_draws=64)
        monkeypatch.setattr("freqgate_dit.training.report.subject.FactorPosterior", few_draws)
        section = information_section(subject)
        ceiling, structure, texture = section.tables["ceiling"]
        assert structure["entropy"] == texture["entropy"] == math.log(8)
        assert f"{structure['nats']:.2f} [" in section.reading[1] and "of structure" in section.claims[1]["evidence"]
        by_factor = section.tables["information_of_the_model_by_factor"]
        assert [row["of"] for row in by_factor] == ["structure"] * 20 + ["texture"] * 20
        for row in by_factor:
            bands = sum(value for name, value in row.items() if name.endswith("cycles"))
            assert bands == pytest.approx(row["density"], rel=1e-6, abs=1e-6)
        for use in (ceiling, structure, texture):
            spread = 2 * use["standard_error"]
            told = is_possible(use["nats"] - spread, use["nats"] + spread, use["entropy"])
            assert told is not False or use["half_at_log_snr"] is None
        assert structure["of"] == "structure, the other factor known" and ceiling["of"] == "label"
        assert ceiling["entropy"] == pytest.approx(math.log(64), abs=0.1)
        assert ("possible for an ideal denoiser" in section.reading[0]) == (
            abs(ceiling["nats"] - ceiling["entropy"] / 2) <= ceiling["entropy"] / 2 + 2 * ceiling["standard_error"]
        )
        assert set(section.figures) == {"information"} and len(section.tables["information_of_the_data"]) == 25

    @pytest.mark.parametrize(
        "nats, verdict",
        [(2.0, "possible for an ideal denoiser"), (9.0, "More than there is"), (-3.0, "Less than nothing")],
    )
    def test_what_is_said_of_the_ceiling(self, subject, nats, verdict):
        result = subject.validate(with_null=True)
        assert verdict in _read_ceiling(replace(result, information=nats, information_se=0.5))

    @pytest.mark.parametrize(
        "schedule", [{"rescale_betas_zero_snr": True}, {"trained_betas": torch.linspace(1e-3, 1e-2, 1000).tolist()}]
    )
    def test_every_schedule_is_validated_as_it_is(self, schedule):
        transformer = tiny_transformer("adaln_zero", num_classes=64, in_channels=3, sample_size=32, patch_size=16)
        scheduler = euler("trailing", prediction_type="v_prediction", **schedule)
        subject = Subject(make_pipeline(transformer, scheduler), "mod")
        posterior, asked = FactorPosterior("mod", 32, num_draws=64), []

        def recorded(noisy, log_snr):
            asked.append(log_snr)
            return posterior(noisy, log_snr)

        subject.factor_posterior = recorded
        result = subject.validate(num_bins=5, factor="structure")
        asked, own = torch.cat(asked), log_snr(subject.alphas_cumprod, torch.arange(1000)).float()
        assert_close(asked.max(), own.max(), rtol=0, atol=1e-3)
        assert_close(asked.min(), own.min(), rtol=0, atol=1e-3)
        assert math.isfinite(result.information) and result.information_table.isfinite().all()

    def test_a_schedule_without_terminal_signal_has_finite_densities(self, subject):
        alphas_cumprod = subject.alphas_cumprod.clone()
        alphas_cumprod[-1] = 0
        rows = information_density(subject.validate(with_null=True), alphas_cumprod)
        assert all(math.isfinite(value) for row in rows for value in row.values())

    def test_a_latent_model_has_its_own_curve_alone(self):
        classes = len(STRUCTURES) * len(TEXTURES)
        pipe = make_pipeline(tiny_transformer("adaln_zero", num_classes=classes, sample_size=16), vae=tiny_vae_tiny())
        section = information_section(Subject(pipe, "mod"))
        assert {"ceiling", "information_of_the_model"} == section.tables.keys() and set(section.figures) == {
            "information"
        }
        assert "this model's noise is on latents" in section.reading[-1]
