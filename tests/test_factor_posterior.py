"""What noisy images of the built-in data tell of their factors, by Bayes' rule."""

import math

import pytest
import torch

from freqgate_dit.shapes_textures import WORLDS, ShapesTextures
from freqgate_dit.training.factor_classifier import factors_of, scaled
from freqgate_dit.training.factor_posterior import FactorPosterior
from freqgate_dit.training.information import noised


def real(world, count, split="test"):
    data = ShapesTextures(count, 32, world, split=split)
    return scaled(data.images(range(count))), *factors_of(data.labels(range(count)))


@pytest.fixture(scope="module", params=WORLDS)
def world(request):
    return request.param


@pytest.fixture(scope="module")
def posterior(world):
    return FactorPosterior(world, 32, num_draws=2048)


def test_it_is_a_distribution_and_even_without_a_signal(posterior):
    noise = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = posterior(noise, torch.tensor([-torch.inf, -40, 0]))
    assert found.shape == (3, 8, 8) and torch.allclose(found.exp().sum((1, 2)), torch.ones(3))
    assert torch.allclose(found[:2], torch.tensor(-math.log(64)), atol=1e-4)


@pytest.mark.parametrize("level", [-4.5, -3.0])
def test_it_is_as_sure_as_it_is_right(posterior, world, level):
    """The true value has the probability that the posterior expects of it: E p(f) = E sum p^2 of the exact one."""
    torch.manual_seed(0)
    images, *right = real(world, 512)
    levels = torch.full((512,), level)
    both = posterior(noised(images, levels), levels).exp()
    for probability, values in zip((both.sum(2), both.sum(1)), right, strict=True):
        surplus = probability[torch.arange(512), values] - probability.square().sum(1)
        assert abs(surplus.mean()) < 3.5 * surplus.std() / 512**0.5
        assert probability.max() > 0.3  # so that there is something to be sure of


def test_clear_images_tell_both_factors(posterior, world):
    torch.manual_seed(0)
    images, structures, textures = real(world, 256)
    levels = torch.full((256,), 1.0)
    both = posterior(noised(images, levels), levels)
    assert (both.logsumexp(2).argmax(1) == structures).float().mean() > 0.97
    assert (both.logsumexp(1).argmax(1) == textures).float().mean() > 0.97


def test_the_texture_says_nothing_of_the_structure(posterior, world):
    parts = ShapesTextures(64, 32, world, split="test").components(range(64))
    levels = torch.full((64,), -2.0)
    images = parts.structure + torch.stack([parts.texture, parts.texture.roll(1, 0)])
    one, other = (posterior(noisy.float(), levels).logsumexp(2) for noisy in images)
    assert torch.allclose(one, other, atol=1e-2) and one.std() > 0.5


def test_the_likelihood_is_that_of_gaussian_noise(posterior):
    torch.manual_seed(0)
    noisy, levels = torch.randn(4, 3, 32, 32), torch.tensor([-3.0, -1.0, 0.0, 2.0])
    alpha = levels.sigmoid()
    for likelihood in posterior.likelihoods:
        seen, draws = likelihood.view(noisy).double(), likelihood.signals[:50].double()
        variance = alpha * likelihood.noise + 1 - alpha
        distance = (seen[:, None] - alpha.sqrt()[:, None, None] * draws).square().sum(2)
        expected = (seen.square().sum(1, keepdim=True) - distance) / (2 * variance[:, None])
        torch.testing.assert_close(likelihood(noisy, levels)[:, :50].double(), expected, rtol=1e-4, atol=1e-2)


def test_a_view_keeps_what_its_factor_has(posterior, world):
    """Each factor is seen whole: its energy is that of its coefficients (Parseval), but for the finest outlines."""
    parts = ShapesTextures(64, 32, world, split="train").components(range(64))
    for likelihood, part in zip(posterior.likelihoods, (parts.structure, parts.texture), strict=True):
        kept = likelihood.view(part).double().square().sum() / part.square().sum()
        assert 0.95 < kept < 1 + 1e-6


def test_a_masked_texture_is_one_inside_its_structure():
    """p(t | x, s) reads the texture off draws of s alone: with those of another structure it changes."""
    torch.manual_seed(0)
    posterior, (images, structures, textures) = FactorPosterior("mod", 32, num_draws=2048), real("mod", 128)
    levels, rows = torch.full((128,), -1.0), torch.arange(128)
    noisy = noised(images, levels)
    of_texture = posterior(noisy, levels).log_softmax(2)
    likelihood = posterior.likelihoods[1]
    in_blocks = likelihood.signals.view(8, -1, likelihood.signals.shape[1])
    likelihood.signals = in_blocks.roll(1, 0).flatten(0, 1)
    likelihood.energy = likelihood.signals.square().sum(1)
    of_others = posterior(noisy, levels).log_softmax(2)
    torch.testing.assert_close(of_others, of_texture.roll(1, 1), rtol=1e-4, atol=1e-3)
    right, wrong = (found[rows, structures, textures].mean() for found in (of_texture, of_others))
    assert right > wrong + 0.1


def test_half_precision_and_extreme_levels():
    posterior = FactorPosterior("same", 32, num_draws=640)
    images = real("same", 4, split="train")[0]
    levels = torch.tensor([-torch.inf, 0.0, 12.0, torch.inf])
    exact = posterior(images, levels)
    assert exact.isfinite().all() and exact.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        found = posterior(images.to(dtype), levels.to(dtype))
        assert found.dtype == torch.float32 and torch.allclose(found[:2], exact[:2], rtol=0.02, atol=0.5)
        assert torch.equal(found.flatten(1).argmax(1)[2:], exact.flatten(1).argmax(1)[2:])


def test_the_noise_of_the_images_is_counted(posterior, world):
    parts = ShapesTextures(512, 32, world, split="test").components(range(512))
    for likelihood in posterior.likelihoods:
        assert likelihood.noise == pytest.approx(likelihood.view(parts.noise).square().mean().item(), rel=0.05)


def test_larger_images():
    images = ShapesTextures(8, 48, "reversed", split="train")
    found = FactorPosterior("reversed", 48, num_draws=64)(scaled(images.images(range(8))), torch.full((8,), 9.0))
    assert torch.equal(found.flatten(1).argmax(1), images.labels(range(8)))  # its own draws


@pytest.mark.parametrize("num_draws", [0, 63, 100])
def test_unequal_draws_are_refused(num_draws):
    with pytest.raises(ValueError, match=f"num_draws is {num_draws}"):
        FactorPosterior("mod", 32, num_draws=num_draws)
