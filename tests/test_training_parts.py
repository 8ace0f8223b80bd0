"""Parts of the trainer: batches, cached latents, weight average, checkpoints, validation, metrics."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from components import tiny_transformer, tiny_vae_kl, tiny_vae_tiny
from diffusers import DDPMScheduler
from PIL import Image

from freqgate_dit.losses import DiffusionObjective, drop_labels, prediction_target
from freqgate_dit.pipelines.pipeline_freqgate_dit import encode_to_latent_moments
from freqgate_dit.training.batches import Batches, derived_seed
from freqgate_dit.training.checkpoints import (
    MANIFEST,
    Checkpoint,
    checkpoint_folders,
    complete_checkpoints,
    find_checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    why_incomplete,
)
from freqgate_dit.training.config import TrainConfig
from freqgate_dit.training.data import DataConfig, load_images
from freqgate_dit.training.ema import NamedEMA
from freqgate_dit.training.hardware import available_cores, use_all_cores
from freqgate_dit.training.latents import CachedLatents, load_or_encode
from freqgate_dit.training.report import Metrics, count_parameters, flops_per_forward
from freqgate_dit.training.train import learning_rate
from freqgate_dit.training.validation import Validation


# -- batches ----------------------------------------------------------------------------------------------------------


def numbered(count=10, views=1, std=None):
    """Data whose sample i is filled with i, and with i + 100 in the mirrored view."""
    mean = torch.arange(count).float()[:, None, None, None, None] + 100 * torch.arange(views)[:, None, None, None]
    mean = mean.expand(count, views, 2, 3, 3).contiguous()
    return CachedLatents(mean, None if std is None else torch.full_like(mean, std), torch.arange(count))


@pytest.mark.parametrize("size", [1, 4, 10, 25])
def test_every_epoch_shows_every_image_once(size):
    batches = Batches(numbered(10), size, seed=0)
    drawn = torch.cat([batches.indices(step) for step in range(100 // size)])
    epochs = drawn.view(10, 10)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(10).expand(10, 10))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 10


def test_batches_are_full_and_straddle_epochs():
    batches = Batches(numbered(10), 4, seed=0)
    assert torch.equal(batches.indices(2), torch.cat([batches.order(0)[8:], batches.order(1)[:2]]))
    assert all(len(batches.indices(step)) == 4 for step in range(20))


def fields(batch):
    return (batch.latents, batch.labels, batch.noise, batch.uniform, batch.dropout)


def assert_equal_batches(one, other):
    for a, b in zip(fields(one), fields(other), strict=True):
        assert torch.equal(a, b)


def test_batches_depend_on_seed_and_step_alone():
    forward = Batches(numbered(10, views=2, std=0.5), 4, seed=3)
    batches = {step: forward.draw(step) for step in range(8)}
    torch.manual_seed(99)
    backward = Batches(numbered(10, views=2, std=0.5), 4, seed=3)
    for step in (7, 0, 5, 5, 2):
        assert_equal_batches(backward.draw(step), batches[step])
    other = Batches(numbered(10, views=2, std=0.5), 4, seed=4).draw(0)
    assert not torch.equal(other.noise, batches[0].noise) and not torch.equal(other.dropout, batches[0].dropout)
    assert not torch.equal(batches[1].noise, batches[0].noise)


def test_labels_belong_to_their_images():
    batch = Batches(numbered(10, views=2), 8, seed=0).draw(3)
    assert torch.equal(batch.latents[:, 0, 0, 0].long() % 100, batch.labels)
    assert batch.latents.dtype == batch.noise.dtype == torch.float32


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_shards_make_up_the_global_batch(processes, accumulation):
    batch = Batches(numbered(10, views=2, std=0.1), 8, seed=0).draw(1)
    shards = [
        batch.shard(micro_step, process, processes, size=2)
        for micro_step in range(accumulation)
        for process in range(processes)
    ]
    assert all(len(shard) == 2 for shard in shards)
    for parts, whole in zip(zip(*map(fields, shards), strict=True), fields(batch), strict=True):
        assert torch.equal(torch.cat(parts), whole)


def test_half_of_the_images_are_mirrored():
    batches = Batches(numbered(10, views=2), 100, seed=0)
    values = torch.stack([batches.draw(step).latents[:, 0, 0, 0] for step in range(20)])
    mirrored = values >= 100
    # Four standard deviations of a fair coin thrown 2,000 times.
    assert abs(mirrored.float().mean() - 0.5) < 0.045
    # And no image is mirrored always or never.
    for image in range(10):
        assert 0.35 < mirrored[values % 100 == image].float().mean() < 0.65


def test_posterior_is_sampled_anew_with_its_own_spread():
    data = numbered(1, std=0.5)
    batches = Batches(data, 64, seed=0)
    first, second = batches.draw(0).latents, batches.draw(1).latents
    assert not torch.equal(first, second)
    both = torch.cat([first, second])
    assert abs(both.mean()) < 0.05 and abs(both.std() - 0.5) < 0.03
    correlation = torch.corrcoef(torch.stack([first.flatten(), batches.draw(0).noise.flatten()]))[0, 1]
    assert abs(correlation) < 0.15


def test_drawing_leaves_the_data_as_it_was():
    data = numbered(4, std=0.5)
    before = data.mean.clone()
    Batches(data, 8, seed=0).draw(0).latents.add_(1)
    assert torch.equal(data.mean, before)


def test_uniforms_are_stratified_over_the_global_batch_if_asked():
    uniform = Batches(numbered(10), 8, seed=0, stratified=True).draw(5).uniform
    assert torch.equal((uniform * 8).long(), torch.arange(8))
    uniform = Batches(numbered(10), 8, seed=0, stratified=False).draw(5).uniform
    assert not torch.equal((uniform * 8).long(), torch.arange(8)) and 0 <= uniform.min() and uniform.max() < 1


def test_dropout_rate_of_the_condition():
    dropout = torch.cat([Batches(numbered(10), 1000, seed=0).draw(step).dropout for step in range(4)])
    dropped = drop_labels(torch.zeros(4000, dtype=torch.long), 7, dropout, 0.3)
    assert abs((dropped == 7).float().mean() - 0.3) < 0.03


def test_derived_seeds_differ():
    seeds = {derived_seed(seed, purpose, step) for seed in range(5) for purpose in range(4) for step in range(5)}
    assert len(seeds) == 100 and all(0 <= seed < 2**63 for seed in seeds)


# -- latents ----------------------------------------------------------------------------------------------------------


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


# -- weight average ---------------------------------------------------------------------------------------------------


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@torch.no_grad()
def nudge(model, amount):
    for parameter in model.parameters():
        parameter.add_(amount)


def test_swapping_restores_the_weights_bit_for_bit():
    model = tiny_transformer()
    ema = NamedEMA(model, decay=0.5)
    nudge(model, 0.1)
    own, average = weights(model), {name: tensor.clone() for name, tensor in ema.tensors().items()}
    with ema.swapped_into(model) as swapped:
        assert swapped is model
        assert_same(weights(model), average)
    assert_same(weights(model), own)
    with pytest.raises(KeyboardInterrupt), ema.swapped_into(model):
        raise KeyboardInterrupt
    assert_same(weights(model), own)
    assert_same(ema.tensors(), average)


def test_average_follows_its_formula():
    model = tiny_transformer()
    ema = NamedEMA(model, decay=0.3)
    expected = weights(model)
    for n in range(8):
        nudge(model, 0.01 * (n + 1))
        ema.step(model.parameters())
        decay = 0.0 if n == 0 else min(0.3, (1 + n) / (10 + n))
        assert ema.cur_decay_value == pytest.approx(decay)
        expected = {name: decay * value + (1 - decay) * weights(model)[name] for name, value in expected.items()}
        for name, value in ema.tensors().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)
    assert ema.cur_decay_value == pytest.approx(0.3)


def test_average_is_float32_and_feels_small_changes():
    model = tiny_transformer().to(torch.bfloat16)
    ema = NamedEMA(model, decay=0.9999)
    assert {tensor.dtype for tensor in ema.tensors().values()} == {torch.float32}
    model = tiny_transformer()
    ema = NamedEMA(model, decay=0.999)
    ema.optimization_step = 10**6
    before = {name: tensor.clone() for name, tensor in ema.tensors().items()}
    nudge(model, 1e-4)
    for _ in range(100):
        ema.step(model.parameters())
    moved = torch.cat([(ema.tensors()[name] - before[name]).flatten() for name in before])
    # 1 - 0.999^100 of the way, to the rounding of 100 float32 steps.
    assert (moved > 0).float().mean() > 0.99
    assert moved.mean().item() == pytest.approx(1e-4 * (1 - 0.999**100), rel=0.1)


def test_average_goes_out_and_in_by_name():
    model = tiny_transformer()
    ema = NamedEMA(model, decay=0.9)
    for _ in range(3):
        nudge(model, 0.1)
        ema.step(model.parameters())
    assert ema.tensors().keys() == dict(model.named_parameters()).keys() == model.state_dict().keys()
    other = NamedEMA(tiny_transformer(seed=1), decay=0.9)
    # The order of a file's tensors does not matter.
    other.load(dict(reversed(list(ema.tensors().items()))), ema.optimization_step)
    assert_same(other.tensors(), ema.tensors())
    nudge(model, 0.1)
    ema.step(model.parameters())
    other.step(model.parameters())
    assert_same(other.tensors(), ema.tensors())


# -- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint(step, value=0.0):
    return Checkpoint({"model": {"w": torch.full((3, 2), value)}, "ema": {"w": torch.ones(2)}}, {"step": step})


def save(folder, *steps, keep=10):
    return [checkpoint(step).save(folder, keep) for step in steps]


def test_checkpoint_round_trip(tmp_path):
    tensors = {"model": {"a.b": torch.randn(3, 4), "c": torch.arange(3)}, "ema": {"a.b": torch.randn(4, 3).T}}
    path = Checkpoint(tensors, {"step": 12, "config": {"vae": None, "lr": 1e-4}}).save(tmp_path, keep=1)
    assert path == tmp_path / "step_00000012" and why_incomplete(path) is None
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name]
    loaded = load_checkpoint(path, "cpu")
    assert loaded.state == {"step": 12, "config": {"vae": None, "lr": 1e-4}}
    assert loaded.tensors.keys() == tensors.keys()
    for name, group in tensors.items():
        assert_same(loaded.tensors[name], group)


def test_folder_that_is_being_written_is_never_taken(tmp_path):
    (path,) = save(tmp_path, 1)
    # All of its files are there already, but it has not got its name yet.
    shutil.copytree(path, tmp_path / "step_00000002.tmp")
    assert checkpoint_folders(tmp_path) == complete_checkpoints(tmp_path) == [path]
    assert find_checkpoint("latest", tmp_path) == path
    # A later run of the same step replaces it.
    save(tmp_path, 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def damage_checkpoint(path, how):
    if how == "no manifest":
        (path / MANIFEST).unlink()
    elif how == "half a manifest":
        (path / MANIFEST).write_text((path / MANIFEST).read_text()[:40])
    elif how == "no file":
        (path / "ema.safetensors").unlink()
    elif how == "short file":
        (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-1])


DAMAGE = {
    "no manifest": ("no manifest.json",),
    "half a manifest": ("damaged manifest.json",),
    "no file": ("lacks ema.safetensors",),
    "short file": ("model.safetensors", "bytes instead of"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_incomplete_checkpoints_are_named_and_skipped(tmp_path, capsys, how):
    good, bad = save(tmp_path, 1, 2)
    damage_checkpoint(bad, how)
    assert complete_checkpoints(tmp_path) == [good]
    assert find_checkpoint("latest", tmp_path) == good
    printed = capsys.readouterr().out
    with pytest.raises(ValueError) as error:
        find_checkpoint(str(bad), tmp_path)
    for word in DAMAGE[how]:
        assert word in why_incomplete(bad) and word in printed and word in str(error.value)
    assert bad.name in printed and str(bad) in str(error.value) and good.name in str(error.value)
    assert "`resume`" in str(error.value) and "--resume latest" in str(error.value)


def test_flipped_bit_is_found_by_its_checksum(tmp_path):
    (path,) = save(tmp_path, 1)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    assert why_incomplete(path) is None
    with pytest.raises(ValueError, match="step_00000001/model.safetensors is damaged"):
        load_checkpoint(path, "cpu")


def test_nothing_to_resume_from(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match="no complete checkpoint: start without `--resume`"):
            find_checkpoint("latest", folder)
    with pytest.raises(ValueError, match="`resume` .*nowhere.* is not a folder"):
        find_checkpoint(str(tmp_path / "nowhere"), tmp_path)


def steps_in(folder):
    return [int(path.name.removeprefix("step_")) for path in complete_checkpoints(folder)]


def test_rotation_keeps_the_newest_by_number(tmp_path):
    save(tmp_path, 9, 10, 100, 1000, keep=3)
    assert steps_in(tmp_path) == [10, 100, 1000]
    assert find_checkpoint("latest", tmp_path).name == "step_00001000"


def test_rotation_does_not_count_incomplete_checkpoints(tmp_path):
    first, second = save(tmp_path, 1, 2)
    damage_checkpoint(second, "no manifest")
    save(tmp_path, 3, keep=2)
    assert steps_in(tmp_path) == [1, 3]


def test_rotation_after_resuming_from_an_earlier_checkpoint(tmp_path):
    save(tmp_path, 1000, 2000, 3000)
    # Resumed at 1000: what lies beyond is another course of the run, and not what "latest" should mean.
    save(tmp_path, 1500, keep=2)
    assert steps_in(tmp_path) == [1000, 1500]


def test_same_step_is_replaced(tmp_path):
    checkpoint(5, value=1.0).save(tmp_path, keep=2)
    path = checkpoint(5, value=2.0).save(tmp_path, keep=2)
    assert torch.equal(load_checkpoint(path, "cpu").tensors["model"]["w"], torch.full((3, 2), 2.0))


def descend(model, optimizer, seed):
    torch.manual_seed(seed)
    sample = torch.randn(2, 4, 8, 8)
    model(sample, torch.tensor([3.0, 500.0]), class_labels=torch.tensor([0, 2])).sample.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def test_optimizer_state_round_trip_is_exact(tmp_path):
    model = tiny_transformer("freq_gate")
    optimizer = adamw(model)
    for seed in range(3):
        descend(model, optimizer, seed)
    tensors = {"model": model.state_dict(), "optimizer": optimizer_tensors(optimizer, model)}
    loaded = load_checkpoint(Checkpoint(tensors, {"step": 3}).save(tmp_path, keep=1), "cpu")
    other = tiny_transformer("freq_gate", seed=1)
    other.load_state_dict(loaded.tensors["model"])
    other_optimizer = adamw(other)
    load_optimizer_tensors(other_optimizer, other, loaded.tensors["optimizer"])
    for seed in range(3, 6):
        descend(model, optimizer, seed)
        descend(other, other_optimizer, seed)
    assert_same(model.state_dict(), other.state_dict())
    assert_same(optimizer_tensors(optimizer, model), optimizer_tensors(other_optimizer, other))


# -- validation -------------------------------------------------------------------------------------------------------


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


# -- cost and metrics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"num_classes": None}, {"num_classes": None, "pooled_projection_dim": 16}])
def test_flops_are_those_of_a_real_forward_pass(arguments):
    model = tiny_transformer(**arguments)
    config, tokens, width = model.config, 16, 32
    block = tokens * (4 * width**2 + 2 * 4 * width**2) + 2 * tokens**2 * width + 6 * width**2
    inputs = tokens * config.in_channels * 4 * width + (256 * width + width**2)
    inputs += 16 * width if config.pooled_projection_dim else 0
    output = 2 * width**2 + tokens * width * 16
    assert flops_per_forward(model) == 2 * (2 * block + inputs + output)
    assert count_parameters(model) == sum(value.numel() for value in model.state_dict().values())


def test_metrics_go_on_where_the_run_does(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0)
    for step in (0, 10, 20, 30):
        metrics.add(step, {"loss": float(step), **({"val": 1.0} if step % 20 == 0 else {})})
    # Killed in the middle of a line.
    with path.open("a") as file:
        file.write('{"step": 40, "lo')
    metrics = Metrics(path, 20)
    metrics.add(30, {"loss": -1.0})
    assert metrics.series() == {"loss": [(0, 0.0), (10, 10.0), (20, 20.0), (30, -1.0)], "val": [(0, 1.0), (20, 1.0)]}
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 10, 20, 30]


# -- learning rate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate(schedule):
    config = TrainConfig(max_steps=100, learning_rate=2.0, warmup_steps=10, lr_schedule=schedule)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0
    if schedule == "constant":
        assert set(rates[10:]) == {2.0}
    else:
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.03


# -- hardware ---------------------------------------------------------------------------------------------------------


def test_threads_are_those_granted_and_shared_by_the_processes(monkeypatch):
    threads = torch.get_num_threads()
    try:
        # A batch system's grant on a larger machine; systems without affinity fall back to all cores.
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
        for processes, expected in ((1, 4), (2, 2), (8, 1)):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
            use_all_cores()
            assert torch.get_num_threads() == expected
        monkeypatch.delattr(os, "sched_getaffinity")
        assert available_cores() == os.cpu_count()
    finally:
        torch.set_num_threads(threads)
