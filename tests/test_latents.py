"""Cached latents and pixels."""

import shutil

import numpy as np
import pytest
import torch
from components import tiny_vae_kl, tiny_vae_tiny
from PIL import Image

from freqgate_dit.pipelines.pipeline_freqgate_dit import encode_to_latent_moments
from freqgate_dit.training.data import DataConfig, load_images
from freqgate_dit.training.latents import load_or_encode


@pytest.fixture
def photos(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for index in range(4):
            pixels = np.random.default_rng([index, len(label), ord(label[0])]).integers(0, 256, (16, 16, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / label / f"{index}.png")
    return tmp_path / "photos"


def photos_of(folder):
    return load_images(DataConfig(dataset=str(folder), resolution=16))[0]


def pixels_of(images):
    return images.images(range(len(images))).float() / 127.5 - 1


@pytest.mark.parametrize("make_vae", [tiny_vae_kl, tiny_vae_tiny])
def test_cached_latents_equal_live_ones(photos, tmp_path, make_vae):
    images, vae = photos_of(photos), make_vae()
    with torch.no_grad():
        live = [encode_to_latent_moments(vae, view) for view in (pixels_of(images), pixels_of(images).flip(-1))]
    for _ in ("encoded", "from the cache"):
        cached = load_or_encode(images, vae, True, tmp_path / "cache", "cpu")
        assert cached.shape == (4, 8, 8) and torch.equal(cached.labels, images.labels)
        for view, (mean, std) in enumerate(live):
            torch.testing.assert_close(cached.mean[:, view], mean)
            if make_vae is tiny_vae_tiny:
                assert std is None and cached.std is None
            else:
                torch.testing.assert_close(cached.std[:, view], std)
                assert cached.std.min() > 0


def test_latents_carry_the_scale_of_the_autoencoder(photos, tmp_path):
    images = photos_of(photos)
    one = load_or_encode(images, tiny_vae_kl(scaling_factor=1.0), False, tmp_path, "cpu")
    other = load_or_encode(images, tiny_vae_kl(scaling_factor=0.5, shift_factor=0.25), False, tmp_path, "cpu")
    torch.testing.assert_close(other.mean, (one.mean - 0.25) * 0.5)
    torch.testing.assert_close(other.std, one.std * 0.5)


def test_without_posterior_noise_the_mean_is_drawn(photos, tmp_path):
    data = load_or_encode(photos_of(photos), tiny_vae_kl(), False, tmp_path, "cpu")
    sample, labels = data.draw(torch.tensor([3, 0]), torch.zeros(2), None)
    assert torch.equal(sample, data.mean[[3, 0], 0]) and torch.equal(labels, data.labels[[3, 0]])
    generator = torch.Generator().manual_seed(0)
    noisy, _ = data.draw(torch.tensor([3, 0]), torch.zeros(2), generator)
    noise = torch.randn(sample.shape, generator=generator.manual_seed(0))
    assert torch.equal(noisy, sample + data.std[[3, 0], 0] * noise)


def test_pixels_are_kept_exactly_and_drawn_in_minus_one_to_one(photos, tmp_path):
    images = photos_of(photos)
    for _ in ("made", "from the cache"):
        data = load_or_encode(images, None, True, tmp_path, "cpu")
        assert data.mean.dtype == torch.uint8 and data.std is None
        assert torch.equal(data.mean[:, 0], images.images(range(len(images))))
        assert torch.equal(data.mean[:, 1], data.mean[:, 0].flip(-1))
        sample, _ = data.draw(torch.arange(len(images)), torch.zeros(len(images)), None)
        assert torch.equal(sample, pixels_of(images))
        mirrored, _ = data.draw(torch.arange(len(images)), torch.full((len(images),), 0.999), None)
        assert torch.equal(mirrored, pixels_of(images).flip(-1))


def written(cache):
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}


def test_second_run_reads_the_cache(photos, tmp_path):
    cache = tmp_path / "cache"
    first = load_or_encode(photos_of(photos), tiny_vae_kl(), True, cache, "cpu")
    before = written(cache)
    # The same images in another place, the same weights in another object.
    moved = shutil.copytree(photos, tmp_path / "moved")
    second = load_or_encode(photos_of(moved), tiny_vae_kl(), True, cache, "cpu")
    assert written(cache) == before and len(before) == 1
    assert torch.equal(first.mean, second.mean) and torch.equal(first.std, second.std)
    assert not list(cache.rglob("*.tmp"))


def test_other_images_weights_or_views_get_another_cache(photos, tmp_path):
    cache = tmp_path / "cache"
    images, vae = photos_of(photos), tiny_vae_kl()
    load_or_encode(images, vae, False, cache, "cpu")
    load_or_encode(images, vae, True, cache, "cpu")
    load_or_encode(images, tiny_vae_kl(seed=1), False, cache, "cpu")
    load_or_encode(images, tiny_vae_kl(scaling_factor=1.0), False, cache, "cpu")
    load_or_encode(images, None, False, cache, "cpu")
    with torch.no_grad():
        vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-6
    load_or_encode(images, vae, False, cache, "cpu")
    Image.new("RGB", (16, 16)).save(photos / "cat" / "0.png")
    load_or_encode(photos_of(photos), tiny_vae_kl(), False, cache, "cpu")
    assert len(written(cache)) == 7


@pytest.mark.parametrize("damage", ["truncated", "no tensors", "no manifest"])
def test_damaged_or_interrupted_cache_is_redone(photos, tmp_path, damage):
    cache = tmp_path / "cache"
    first = load_or_encode(photos_of(photos), tiny_vae_kl(), False, cache, "cpu")
    (file,) = written(cache)
    before = written(cache)[file]
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "no tensors":
        file.unlink()
    else:
        (file.parent / "manifest.json").unlink()
    again = load_or_encode(photos_of(photos), tiny_vae_kl(), False, cache, "cpu")
    assert torch.equal(first.mean, again.mean) and torch.equal(first.std, again.std)
    assert written(cache).keys() == {file} and written(cache)[file] != before
    redone = written(cache)
    load_or_encode(photos_of(photos), tiny_vae_kl(), False, cache, "cpu")
    assert written(cache) == redone
