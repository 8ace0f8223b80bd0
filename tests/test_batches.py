"""Global batches as functions of (seed, step)."""

import pytest
import torch

from freqgate_dit.losses import drop_labels
from freqgate_dit.training.batches import Batches, derived_seed
from freqgate_dit.training.latents import CachedLatents, MappedRows


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


def test_mapped_and_prefetched_batches_are_the_same():
    data = numbered(10, views=2, std=0.5)
    mapped = CachedLatents(*(MappedRows(list(x.split(3)), x.device) for x in (data.mean, data.std)), data.labels)
    plain = Batches(data, 4, seed=3, prefetch=False)
    for other in (
        Batches(data, 4, seed=3, prefetch=True),
        *(Batches(mapped, 4, 3, prefetch=p) for p in (False, True)),
    ):
        # In order, then as resuming, going back and repeating ask for them.
        for step in (0, 1, 2, 3, 4, 9, 2, 2, 0, 1):
            assert_equal_batches(other.draw(step), plain.draw(step))


def test_prefetched_batch_may_be_changed_and_its_error_is_raised():
    batches = Batches(numbered(10), 4, seed=0, prefetch=True)
    expected = Batches(numbered(10), 4, seed=0).draw(1)
    batches.draw(0).latents.zero_()
    assert_equal_batches(batches.draw(1), expected)
    batches.data.labels = batches.data.labels[:0]
    with pytest.raises(IndexError):
        batches.draw(5)


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
