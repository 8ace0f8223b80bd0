"""Freq-Grid's ladder: which view serves which timesteps, at what cost and price."""

import json

import pytest
import torch
from test_freq_grid import ALL_TIMESTEPS, ALPHAS_CUMPROD, LOG_SNR, WIENER, steep_spectrum, with_views
from transformer_cases import untrained

from freqgate_dit.cost import flops_per_forward
from freqgate_dit.ladder import Ladder, price_of, priced_switches, timesteps_per_view
from freqgate_dit.losses import timestep_distribution
from freqgate_dit.samplers import make_sampler


UNIFORM = torch.full((1000,), 1 / 1000, dtype=torch.float64)
TOKENS = (16, 4, 1)


def gains_outside(model) -> torch.Tensor:
    """Sum of the Wiener gains `(views, T)` of the coefficients that each view does not see."""
    power = model.spectrum.power.double()
    gains = torch.sigmoid(LOG_SNR[:, None, None, None] + power.log())
    inside = (gains[..., : 8 >> view, : 8 >> view].sum(dim=(1, 2, 3)) for view in range(3))
    return torch.stack([gains.sum(dim=(1, 2, 3)) - part for part in inside])


def test_rungs_are_what_the_model_does():
    model, density = with_views(), timestep_distribution(1000, "logit_normal").diff()
    ladder, views = Ladder.of(model, density), model.views_of(ALL_TIMESTEPS)
    for view, rung in enumerate(ladder.rungs):
        assert (rung.size, rung.tokens) == (8 >> view, TOKENS[view])
        assert torch.equal((views == view).nonzero()[[0, -1], 0], torch.tensor(rung.timesteps))
        assert rung.share == pytest.approx(density[views == view].sum().item())
        assert rung.flops == flops_per_forward(model, view)
    assert ladder.mean_tokens == pytest.approx((density * torch.tensor(TOKENS)[views]).sum().item())
    assert ladder.rungs[0].flops > 2 * ladder.rungs[1].flops > 2 * ladder.rungs[2].flops
    assert flops_per_forward(model) == ladder.rungs[0].flops
    assert ladder.rungs[2].flops < ladder.mean_flops < ladder.rungs[0].flops
    assert Ladder.from_json(json.loads(json.dumps(ladder.to_json()))) == ladder


def test_the_price_is_the_integral_of_half_the_gains_outside():
    model = with_views()
    outside, views = gains_outside(model), model.views_of(ALL_TIMESTEPS)
    outside[0] = 0
    coarser = views[1:]  # of each two neighbours
    start, stop = (outside[:, part].gather(0, coarser[None])[0] for part in (slice(0, -1), slice(1, None)))
    trapezoids = (start + stop) / 4 * (LOG_SNR[:-1] - LOG_SNR[1:])
    assert price_of(model) == pytest.approx(trapezoids.sum().item(), rel=1e-3)
    assert price_of(with_views(grid_tolerance=0)) == 0
    assert price_of(with_views(grid_tolerance=0.01)) < price_of(model) < price_of(with_views(grid_tolerance=0.2))


@pytest.mark.parametrize("density", [UNIFORM, timestep_distribution(1000, "logit_normal", -1, 0.5).diff()])
def test_priced_switches_are_the_cheapest_of_all(density):
    """Of all pairs of switches that do not rise, at every price."""
    model = with_views()
    outside = gains_outside(model)
    steps = (LOG_SNR[:-1] - LOG_SNR[1:]) / 2
    widths = torch.cat([steps, steps[-1:]]) + torch.cat([steps[:1], steps])
    widths[[0, -1]] = steps[[0, -1]]
    for price in (0.05, 1.0, 20.0):
        cost = outside / 2 * widths + price * density * torch.tensor(TOKENS)[:, None]  # (views, T)
        below = torch.cat([torch.zeros(3, 1), cost.cumsum(dim=1)], dim=1)  # of timesteps below t
        # Full grid below t = i, the second view from there to j, the third from j on.
        total = below[0][:, None] + (below[1][None] - below[1][:, None]) + (below[2][-1] - below[2])[None]
        total = total + torch.where(torch.arange(1001)[:, None] > torch.arange(1001), torch.inf, 0)
        least = total.min().item()
        model.set_spectrum(*steep_spectrum(), ALPHAS_CUMPROD, priced_switches(model, density, price))
        views = model.views_of(ALL_TIMESTEPS)
        assert cost.gather(0, views[None]).sum().item() == pytest.approx(least, rel=1e-5)


def test_prices_at_both_ends():
    model = with_views()
    assert priced_switches(model, UNIFORM, 1e-9).isinf().all()  # tokens cost nothing
    model.set_spectrum(*steep_spectrum(), ALPHAS_CUMPROD, priced_switches(model, UNIFORM, 1e9))
    assert timesteps_per_view(model) == [None, None, (0, 999)]


def test_a_flat_spectrum_has_no_switch():
    model = untrained("adaln_zero", **WIENER, grid_views=3, grid_tolerance=1e-6)
    model.set_spectrum(torch.zeros(4, 8, 8), torch.ones(4, 8, 8), ALPHAS_CUMPROD)
    ladder = Ladder.of(model, UNIFORM)
    assert not ladder.has_switch and ladder.price == 0
    assert ladder.mean_flops == pytest.approx(ladder.rungs[0].flops)
    assert "no switch" in ladder.describe() and "full grid" in ladder.describe()


def test_what_people_are_told():
    ladder = Ladder.of(with_views(), UNIFORM)
    text = ladder.describe()
    for rung in ladder.rungs:
        first, last = rung.timesteps
        assert f"{rung.tokens} tokens" in text and f"{first} to {last}" in text and f"{rung.share:.1%}" in text
        assert f"{rung.tokens} tokens at t = {first} to {last}" in ladder.describe_briefly()
    assert f"{ladder.mean_tokens:.1f}" in text and f"{ladder.price:.3g} nats" in text


def test_the_cost_of_sampling_is_that_of_the_samplers_levels():
    model = with_views()
    ladder = Ladder.of(model, UNIFORM)
    scheduler = make_sampler("dpm", {"prediction_type": "epsilon"})
    sampled = ladder.sampled_by(model, scheduler)
    scheduler.set_timesteps(20)
    views = model.views_of(scheduler.timesteps)
    assert len(views.unique()) == 3
    expected = sum(ladder.rungs[view].flops for view in views) / 20
    assert sampled.sampling_flops == pytest.approx(expected) and ladder.sampling_flops is None
