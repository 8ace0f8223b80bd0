"""Cached latents and pixels."""

import dataclasses
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from components import tiny_vae_kl, tiny_vae_tiny
from PIL import Image
from safetensors.torch import save_file

from freqgate_dit.pipelines.pipeline_freqgate_dit import encode_to_latent_moments
from freqgate_dit.training.data import DataConfig, load_images
from freqgate_dit.training.latents import (
    CachedLatents,
    LatentCache,
    MappedRows,
    data_bytes,
    data_statistics,
    load_or_encode,
    scale_warning,
)


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


def in_memory(images, vae, flip, cache):
    """As tensors that a test can compare, and that outlive the files."""
    return load_or_encode(images, vae, flip, cache, "cpu", resident=True)


def counted(images, stop_after=None):
    """The same images, and a list that grows by every index that is decoded; `stop_after` images decoding fails."""
    decoded = []

    def load(indices):
        if stop_after is not None and len(decoded) >= stop_after:
            raise KeyboardInterrupt
        decoded.extend(indices)
        return images.load(indices)

    return dataclasses.replace(images, load=load), decoded


def pixels_of(images):
    return images.images(range(len(images))).float() / 127.5 - 1


@pytest.mark.parametrize("make_vae", [tiny_vae_kl, tiny_vae_tiny])
def test_cached_latents_equal_live_ones(photos, tmp_path, make_vae):
    images, vae = photos_of(photos), make_vae()
    with torch.no_grad():
        live = [encode_to_latent_moments(vae, view) for view in (pixels_of(images), pixels_of(images).flip(-1))]
    for _ in ("encoded", "from the cache"):
        cached = in_memory(images, vae, True, tmp_path / "cache")
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
    one = in_memory(images, tiny_vae_kl(scaling_factor=1.0), False, tmp_path)
    other = in_memory(images, tiny_vae_kl(scaling_factor=0.5, shift_factor=0.25), False, tmp_path)
    torch.testing.assert_close(other.mean, (one.mean - 0.25) * 0.5)
    torch.testing.assert_close(other.std, one.std * 0.5)


def test_without_posterior_noise_the_mean_is_drawn(photos, tmp_path):
    data = in_memory(photos_of(photos), tiny_vae_kl(), False, tmp_path)
    sample, labels = data.draw(torch.tensor([3, 0]), torch.zeros(2), None)
    assert torch.equal(sample, data.mean[[3, 0], 0]) and torch.equal(labels, data.labels[[3, 0]])
    generator = torch.Generator().manual_seed(0)
    noisy, _ = data.draw(torch.tensor([3, 0]), torch.zeros(2), generator)
    noise = torch.randn(sample.shape, generator=generator.manual_seed(0))
    assert torch.equal(noisy, sample + data.std[[3, 0], 0] * noise)


def test_pixels_are_kept_exactly_and_drawn_in_minus_one_to_one(photos, tmp_path):
    images = photos_of(photos)
    for _ in ("made", "from the cache"):
        data = in_memory(images, None, True, tmp_path)
        assert data.mean.dtype == torch.uint8 and data.std is None
        # One view: the mirror image is made when it is drawn.
        assert torch.equal(data.mean, images.images(range(len(images)))[:, None])
        sample, _ = data.draw(torch.arange(len(images)), torch.zeros(len(images)), None)
        assert torch.equal(sample, pixels_of(images))
        mirrored, _ = data.draw(torch.arange(len(images)), torch.full((len(images),), 0.999), None)
        assert torch.equal(mirrored, pixels_of(images).flip(-1))


def written(cache):
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}


def test_second_run_reads_the_cache(photos, tmp_path):
    cache = tmp_path / "cache"
    first = in_memory(photos_of(photos), tiny_vae_kl(), True, cache)
    before = written(cache)
    # The same images in another place, the same weights in another object.
    moved = shutil.copytree(photos, tmp_path / "moved")
    second = in_memory(photos_of(moved), tiny_vae_kl(), True, cache)
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
    load_or_encode(images, None, True, cache, "cpu")  # the same pixels
    with torch.no_grad():
        vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-6
    load_or_encode(images, vae, False, cache, "cpu")
    Image.new("RGB", (16, 16)).save(photos / "cat" / "0.png")
    load_or_encode(photos_of(photos), tiny_vae_kl(), False, cache, "cpu")
    assert len(written(cache)) == 7


# Shards


def assert_same(one, other):
    assert torch.equal(one.mean, other.mean) and torch.equal(one.labels, other.labels)
    assert (one.std is None) == (other.std is None)
    assert one.std is None or torch.equal(one.std, other.std)


@pytest.mark.parametrize("make_vae", [tiny_vae_kl, lambda: None])
def test_shards_make_up_the_whole(photos, tmp_path, make_vae):
    images = photos_of(photos)
    whole = in_memory(images, make_vae(), True, tmp_path / "one")
    for size, shards in ((1, 6), (2, 3), (4, 2), (6, 1), (100, 1)):
        cache = LatentCache(images, make_vae(), True, tmp_path / "cache", size)
        assert cache.num_shards == shards and cache.missing() == list(range(shards))
        with pytest.raises(RuntimeError, match=f"{shards} of {shards} shards of the cache .* are missing"):
            cache.load("cpu")
        cache.encode("cpu")
        data = cache.load("cpu", resident=True)
        # Convolutions of another batch size differ by rounding.
        torch.testing.assert_close(data.mean, whole.mean)
        manifest = json.loads((cache.folder / "manifest.json").read_text())
        assert manifest["identity"] == cache.identity and manifest["images"] == len(images)
        assert manifest["bytes"] == {path.name: path.stat().st_size for path in sorted(written(cache.folder))}
        assert str(tmp_path) not in json.dumps(manifest)


@pytest.mark.parametrize("make_vae", [tiny_vae_kl, tiny_vae_tiny, lambda: None])
def test_interrupted_encoding_goes_on_where_it_stopped(photos, tmp_path, make_vae, capsys):
    images = photos_of(photos)
    straight = LatentCache(images, make_vae(), True, tmp_path / "straight", 2)
    straight.encode("cpu")
    failing, decoded = counted(images, stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        LatentCache(failing, make_vae(), True, tmp_path / "cache", 2).encode("cpu")
    again, rest = counted(images)
    cache = LatentCache(again, make_vae(), True, tmp_path / "cache", 2)
    assert len(decoded) == 4 and sorted(decoded + [*cache._rows(*cache.missing())]) == [*range(6)]
    # What a killed process leaves.
    name = cache._path(*cache.missing()).name
    for age in (0, 7200):
        half = cache.folder / f"{name}.{age}.tmp"
        half.write_bytes((straight.folder / name).read_bytes()[:100])
        os.utime(half, (half.stat().st_mtime - age,) * 2)
    capsys.readouterr()
    cache.encode("cpu")
    assert sorted(decoded + rest) == [*range(6)]
    assert f"cache {cache.folder.name}: going on after 2 of 3 shards\n" in capsys.readouterr().out
    assert_same(cache.load("cpu", resident=True), straight.load("cpu", resident=True))
    # Only the abandoned one: the other may belong to a run that is writing it.
    assert [path.name for path in cache.folder.glob("*.tmp")] == [f"{name}.0.tmp"]


@pytest.mark.parametrize("damage", ["truncated", "longer", "empty", "no header", "other rows", "missing"])
def test_damaged_shard_is_redone_alone(photos, tmp_path, damage, capsys):
    images, decoded = counted(photos_of(photos))
    cache = LatentCache(images, tiny_vae_kl(), False, tmp_path, 2)
    cache.encode("cpu")
    first, before = cache.load("cpu", resident=True), written(tmp_path)
    file, content = cache.folder / "shard_00001.safetensors", (cache.folder / "shard_00001.safetensors").read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "other rows":
        save_file({"mean": torch.zeros(1, 1, 4, 8, 8), "std": torch.zeros(1, 1, 4, 8, 8)}, file)
    else:
        changes = {"truncated": content[:-100], "longer": content + b"x", "empty": b"", "no header": bytes(100)}
        file.write_bytes(changes[damage])
    decoded.clear()
    capsys.readouterr()
    cache.encode("cpu")
    assert decoded == [2, 3] and "encoding 1 damaged of 3 shards again" in capsys.readouterr().out
    assert_same(cache.load("cpu", resident=True), first)
    after = written(tmp_path)
    assert after.keys() == before.keys() and [path for path in after if after[path] != before[path]] == [file]
    cache.encode("cpu")
    assert written(tmp_path) == after and decoded == [2, 3]


def test_lost_manifest_is_written_again_without_encoding(photos, tmp_path):
    images, decoded = counted(photos_of(photos))
    cache = LatentCache(images, None, False, tmp_path)
    cache.encode("cpu")
    manifest = (cache.folder / "manifest.json").read_text()
    (cache.folder / "manifest.json").unlink()
    cache.encode("cpu")
    assert (cache.folder / "manifest.json").read_text() == manifest and len(decoded) == len(images)


def test_processes_share_the_work(photos, tmp_path):
    one = LatentCache(photos_of(photos), tiny_vae_kl(), True, tmp_path / "one", 1)
    one.encode("cpu")
    caches, parts = [], []
    for process in range(4):
        images, decoded = counted(photos_of(photos))
        caches.append(LatentCache(images, tiny_vae_kl(), True, tmp_path / "shared", 1))
        assert not (caches[0].folder / "manifest.json").exists()
        caches[-1].encode("cpu", process, num_processes=4)
        parts.append(sorted(decoded))
    assert parts == [[0, 4], [1, 5], [2], [3]]
    assert (caches[0].folder / "manifest.json").is_file()
    for cache in caches:
        assert_same(cache.load("cpu", resident=True), one.load("cpu", resident=True))


def test_runs_that_encode_the_same_at_once_do_not_harm_each_other(photos, tmp_path):
    one = LatentCache(photos_of(photos), None, True, tmp_path / "one", 1)
    one.encode("cpu")

    def run(_):
        cache = LatentCache(photos_of(photos), None, True, tmp_path / "shared", 1)
        cache.encode("cpu")
        return cache.load("cpu", resident=True)

    with ThreadPoolExecutor(4) as pool:
        for data in pool.map(run, range(8)):
            assert_same(data, one.load("cpu", resident=True))


def test_runs_at_once_share_the_work(photos, tmp_path):
    images, done = photos_of(photos), []
    other, done_by_other = counted(images)

    def load(indices):
        if not done_by_other:  # another run does all, while this one is at its first shard
            LatentCache(other, None, True, tmp_path / "shared", 1).encode("cpu")
        done.extend(indices)
        return images.load(indices)

    LatentCache(dataclasses.replace(images, load=load), None, True, tmp_path / "shared", 1).encode("cpu")
    assert len(done) == 1 and sorted(done_by_other) == [*range(len(images))]
    orders = set()
    for run in range(4):
        counting, order = counted(images)
        LatentCache(counting, None, True, tmp_path / f"run{run}", 1).encode("cpu")
        orders.add(tuple(order))
    assert len(orders) > 1  # runs that begin together do not all take the same shard next


def test_full_disk_is_an_error_before_anything_is_encoded(photos, tmp_path, monkeypatch):
    images, decoded = counted(photos_of(photos))
    cache = LatentCache(images, None, False, tmp_path, 2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=cache.num_bytes - 1))
    with pytest.raises(ValueError, match=r"`cache_dir` \(.*\) needs 0.00 GiB .* 0.00 GiB free: make room"):
        cache.encode("cpu")
    assert not decoded
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=cache.num_bytes))
    cache.encode("cpu")
    # What is there needs no room.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    cache.encode("cpu")


@pytest.mark.parametrize("make_vae", [tiny_vae_kl, tiny_vae_tiny])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_autoencoder_that_gives_nan_is_named_and_nothing_is_kept(photos, tmp_path, make_vae, value):
    vae = make_vae()
    with torch.no_grad():
        next(vae.encoder.parameters()).view(-1)[0] = value
    cache = LatentCache(photos_of(photos), vae, False, tmp_path, 2)
    with pytest.raises(ValueError, match=r"autoencoder \(`vae`\) makes NaN or infinity of 2 of 2 images.*'(cat|dog)/"):
        cache.encode("cpu")
    assert not written(tmp_path) and cache.missing() == [0, 1, 2]


def test_a_cache_that_cannot_be_written_is_named(photos, tmp_path):
    images, decoded = counted(photos_of(photos))
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match=r"`cache_dir`: .*file.*`--cache_dir`"):
        load_or_encode(images, None, False, tmp_path / "file" / "cache", "cpu")
    with pytest.raises(ValueError, match=r"`cache_dir` \(~no-such-user\).*`--cache_dir`"):
        load_or_encode(images, None, False, "~no-such-user", "cpu")
    assert not decoded


# Residence


def rows_and_shards(views=2, std=True):
    """The same data in one tensor and in shards of 4, 4 and 3."""
    mean = torch.randn(11, views, 2, 3, 3)
    spread = mean.square() if std else None
    labels = torch.arange(11)

    def mapped(tensor):
        return None if tensor is None else MappedRows(list(tensor.split(4)), torch.device("cpu"))

    return CachedLatents(mean, spread, labels), CachedLatents(mapped(mean), mapped(spread), labels)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("std", [True, False])
def test_mapped_draw_equals_resident_draw(views, std):
    resident, mapped = rows_and_shards(views, std)
    assert resident.resident and not mapped.resident
    assert len(mapped) == len(resident) and mapped.shape == resident.shape and mapped.device == resident.device
    indices = torch.tensor([10, 3, 4, 0, 7, 8, 3, 3, 10])  # unsorted, doubled, at the borders
    flip = torch.rand(len(indices))
    for seed in (None, 0):
        generators = [None if seed is None else torch.Generator().manual_seed(seed) for _ in range(2)]
        drawn = [data.draw(indices, flip, g) for data, g in zip((resident, mapped), generators, strict=True)]
        for one, other in zip(*drawn, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("make_vae", [tiny_vae_kl, tiny_vae_tiny, lambda: None])
def test_files_are_mapped_on_a_cpu_and_give_the_same(photos, tmp_path, make_vae):
    cache = LatentCache(photos_of(photos), make_vae(), True, tmp_path, 4)
    cache.encode("cpu")
    mapped, resident = cache.load("cpu"), cache.load("cpu", resident=True)
    assert not mapped.resident and resident.resident
    if Path("/proc/self/maps").is_file():
        maps = Path("/proc/self/maps").read_text()
        assert all(str(path) in maps for path in written(cache.folder))
    indices, flip = torch.tensor([5, 0, 3, 4, 4]), torch.tensor([0.9, 0.1, 0.6, 0.5, 0.49])
    drawn = [data.draw(indices, flip, torch.Generator().manual_seed(0)) for data in (mapped, resident)]
    for one, other in zip(*drawn, strict=True):
        assert torch.equal(one, other)
    # What is drawn may be changed, what is stored not.
    drawn[0][0].zero_()
    assert torch.equal(mapped.draw(indices, flip, torch.Generator().manual_seed(0))[0], drawn[1][0])


@pytest.mark.parametrize("make_vae", [tiny_vae_kl, lambda: None])
def test_flipped_views_are_those_of_the_mirror_image(photos, tmp_path, make_vae):
    images, vae = photos_of(photos), make_vae()
    data = load_or_encode(images, vae, True, tmp_path, "cpu")
    everything = torch.arange(len(images))
    for flip, pixels in ((0.0, pixels_of(images)), (0.999, pixels_of(images).flip(-1))):
        sample, _ = data.draw(everything, torch.full((len(images),), flip), None)
        with torch.no_grad():
            live = pixels if vae is None else encode_to_latent_moments(vae, pixels)[0]
        torch.testing.assert_close(sample, live)
    # Without flips there is one view, whatever is drawn.
    plain = load_or_encode(images, vae, False, tmp_path, "cpu")
    one, other = (plain.draw(everything, torch.full((len(images),), flip), None)[0] for flip in (0.0, 0.999))
    assert torch.equal(one, other)


@pytest.mark.parametrize("make_vae", [tiny_vae_kl, tiny_vae_tiny, lambda: None])
@pytest.mark.parametrize("flip", [True, False])
def test_data_bytes_are_those_of_the_data(photos, tmp_path, make_vae, flip):
    images, vae = photos_of(photos), make_vae()
    data = in_memory(images, vae, flip, tmp_path)
    held = sum(tensor.nbytes for tensor in (data.mean, data.std) if tensor is not None)
    assert data_bytes(len(images), images.resolution, vae, flip) == held


# Statistics


def test_statistics_of_the_data_are_those_of_what_training_draws():
    scale, shift = torch.tensor([1.0, 3.0]).view(2, 1, 1), torch.tensor([0.5, -1.0]).view(2, 1, 1)
    mean = torch.randn(2000, 2, 2, 8, 8) * scale + shift
    mean[:, 1] = mean[:, 0] + 4  # the mirrored view, as half of what is drawn
    without = data_statistics(CachedLatents(mean))
    within = data_statistics(CachedLatents(mean, torch.full_like(mean, 2.0)))
    # White noise: the same power at every frequency, but for the view, which only moves the mean.
    assert without.mean[:, 0, 0].div(8).tolist() == pytest.approx([2.5, 1.0], abs=0.3)
    for statistics, power in ((without, [1, 9]), (within, [5, 13])):
        assert statistics.count == 2000
        powers = statistics.power.flatten(1)
        assert powers[:, 1:].mean(1).tolist() == pytest.approx(power, rel=0.02)
        assert powers[:, 0].tolist() == pytest.approx([value + 8**2 * 4 for value in power], rel=0.1)
    assert torch.equal(data_statistics(CachedLatents(mean)).power, without.power)
    few = data_statistics(CachedLatents(mean), num_samples=100)
    assert few.count == 100 and few.std == pytest.approx(without.std, rel=0.05) and few.std != without.std
    pixels = torch.randint(0, 256, (300, 1, 3, 4, 4), dtype=torch.uint8)
    expected = (pixels.double() / 127.5 - 1).std(correction=0).item()
    assert data_statistics(CachedLatents(pixels, mirror=True)).std == pytest.approx(expected, rel=1e-6)


def test_scale_warning_outside_half_to_two():
    assert all(scale_warning(std) is None for std in (0.5, 0.9, 1.0, 2.0))
    assert "standard deviation of 0.2" in scale_warning(0.2) and "multiply it by 5" in scale_warning(0.2)
    assert "standard deviation of 8" in scale_warning(8.0) and "multiply it by 0.125" in scale_warning(8.0)
    for std in (0.0, 0.2, 8.0, float("nan")):
        assert "`scaling_factor`" in scale_warning(std)
