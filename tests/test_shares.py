"""Micro-batches whose samples are shared out among the views of a model."""

import dataclasses

import pytest
import torch
from components import tiny_transformer
from diffusers import DDPMScheduler
from test_batches import numbered
from test_freq_grid import ALL_TIMESTEPS, with_views

from freqgate_dit.ladder import timesteps_per_view
from freqgate_dit.losses import DiffusionObjective, sample_timesteps, timestep_distribution
from freqgate_dit.training.batches import Batches
from freqgate_dit.training.shares import ViewShares, share_out


SAMPLINGS = [{}, {"timestep_sampling": "logit_normal", "logit_mean": -0.4, "logit_std": 0.9}]


@pytest.fixture(params=SAMPLINGS, ids=["uniform", "logit_normal"])
def objective(request) -> DiffusionObjective:
    return DiffusionObjective(DDPMScheduler(), **request.param)


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_the_distribution_is_the_inverse_of_the_sampling(sampling):
    distribution = timestep_distribution(1000, sampling, 0.3, 1.2)
    assert distribution[0] == 0 and distribution[-1] == 1 and (distribution.diff() >= 0).all()
    # The middle of each timestep's part; float32 tells less in the far tails, which are clamped besides.
    middle = (distribution[1:] + distribution[:-1]) / 2
    middle, expected = (x[(middle > 1e-4) & (middle < 1 - 1e-4)] for x in (middle, ALL_TIMESTEPS.long()))
    assert torch.equal(sample_timesteps(middle.float(), 1000, sampling, 0.3, 1.2), expected)


@pytest.mark.parametrize("stratified", [True, False])
def test_weighted_timesteps_have_the_distribution_of_training(objective, stratified):
    shares = ViewShares.of(with_views(), objective, batch_size=7)
    count = 40_000
    uniform = torch.rand(count * 7, generator=torch.Generator().manual_seed(0))
    placed = shares.place(uniform, stratified).view(count, 7)
    timesteps = torch.stack([shares.timesteps(objective, row) for row in placed[:500]])
    assert torch.equal(timesteps.flatten(), shares.timesteps(objective, placed[:500]).flatten())
    timesteps = shares.timesteps(objective, placed)
    weights = shares.weights.double().expand(count, 7)
    histogram = torch.bincount(timesteps.flatten(), weights.flatten(), minlength=1000) / (count * 7)
    expected = objective.timestep_distribution()
    error = (histogram.cumsum(0) - expected[1:]).abs().max()
    assert error < (1e-4 if stratified else 5e-3)


def test_each_sample_is_at_a_timestep_of_its_view(objective):
    model = with_views()
    shares = ViewShares.of(model, objective, batch_size=8)
    for extreme in (0.0, 0.5, 1 - 2**-24):
        placed = shares.place(torch.full((16,), extreme), stratified=False).view(2, 8)
        for row in placed:
            views = model.views_of(shares.timesteps(objective, row))
            assert views.bincount(minlength=3).tolist() == list(shares.counts)
            assert torch.equal(views, views.sort().values)


def test_weights_are_probability_over_share(objective):
    model, distribution = with_views(), objective.timestep_distribution()
    shares = ViewShares.of(model, objective, batch_size=9)
    assert len(shares) == sum(shares.counts) == 9 and min(shares.counts) >= 1
    for part, (first, last) in zip(shares.weights.split(shares.counts), timesteps_per_view(model)):
        probability = (distribution[last + 1] - distribution[first]).item()
        assert part.sum().item() / 9 == pytest.approx(probability, rel=1e-6)


def test_strata_fill_each_views_part_over_the_global_batch(objective):
    shares = ViewShares.of(with_views(), objective, batch_size=6)
    placed = shares.place(torch.full((24,), 0.5), stratified=True).view(4, 6).double()
    for part, begin, end in zip(*(x.split(shares.counts, dim=-1) for x in (placed, shares.begin, shares.end))):
        within = ((part - begin) / (end - begin)).flatten().sort().values
        torch.testing.assert_close(within, (torch.arange(len(within)) + 0.5) / len(within), check_dtype=False)
        # Each micro-batch has its share of the early and of the late ones.
        assert (((part - begin) / (end - begin)).mean(dim=1) - 0.5).abs().max() <= 0.5 / part.shape[1]


def test_global_batches_do_not_depend_on_who_computes_them(objective):
    shares = ViewShares.of(with_views(), objective, batch_size=6)
    batches = Batches(numbered(30), 24, seed=3, shares=shares)
    batch, again = batches.draw(5), Batches(numbered(30), 24, seed=3, shares=shares).draw(5)
    assert torch.equal(batch.uniform, again.uniform)
    alone = [batch.shard(micro_step, 0, 1, 6) for micro_step in range(4)]
    in_two = [batch.shard(micro_step, process, 2, 6) for micro_step in range(2) for process in range(2)]
    for one, other in zip(alone, in_two, strict=True):
        assert torch.equal(one.uniform, other.uniform) and torch.equal(one.latents, other.latents)
    plain = Batches(numbered(30), 24, seed=3).draw(5)
    for name in ("latents", "labels", "noise", "dropout"):  # views change the timesteps alone
        assert torch.equal(getattr(batch, name), getattr(plain, name))
    others = {field.name for field in dataclasses.fields(batch)} - {"latents", "labels", "noise", "dropout"}
    assert others == {"uniform"}


@pytest.mark.parametrize(
    ("probabilities", "batch_size", "expected"),
    [
        ([0.2, 0.25, 0.55], 32, [6, 8, 18]),
        ([0.5, 0.5, 0.0], 5, [3, 2, 0]),
        ([0.98, 0.01, 0.01], 4, [2, 1, 1]),
        ([1.0], 3, [3]),
        ([0.0, 0.0, 1.0], 2, [0, 0, 2]),
    ],
)
def test_samples_are_shared_out(probabilities, batch_size, expected):
    assert share_out(probabilities, batch_size) == expected


def test_fewer_samples_than_views(objective):
    with pytest.raises(ValueError, match=r"`per_device_batch_size` \(2\).*3.*`grid_views`"):
        ViewShares.of(with_views(), objective, batch_size=2)
    model = tiny_transformer("adaln_zero")  # one view takes any number
    assert ViewShares.of(model, objective, batch_size=1).counts == (1,)
