"""Freq-Grid's ladder: the views of a model, the timesteps that each serves, what it costs, and at what price.

A model with `grid_views` denoises on a coarser grid of tokens where noise hides the frequencies that this grid lacks
(see `ConditionedDiTTransformer2DModel`). Its switches are log-SNRs; this module reads them as timesteps, shares of a
density of timesteps, and FLOPs, and computes switches by their price.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from diffusers.schedulers import SchedulerMixin

from freqgate_dit.cost import flops_per_forward
from freqgate_dit.transformer_freqgate_dit import ConditionedDiTTransformer2DModel


SAMPLING_STEPS = 20  # the pipeline's own default


@dataclass(frozen=True)
class Rung:
    """A view.

    Args:
        size: its height and width, in pixels (of the latents).
        tokens: of its grid.
        timesteps: the first and the last that it serves, from clean to noise; `None` if it serves none.
        share: of the density of timesteps.
        flops: of a forward pass of one image.
    """

    size: int
    tokens: int
    timesteps: tuple[int, int] | None
    share: float
    flops: int


@dataclass(frozen=True)
class Ladder:
    """All views of a model, the full grid first.

    Args:
        rungs: a view each.
        price: at most so many nats are lost against ideal denoisers on the full grid (see `price_of`).
        dimensions: numbers of a sample, over which the price is spread.
        sampling_flops: of a forward pass, on average over `SAMPLING_STEPS` steps of the pipeline's sampler; `None` if
            there is none yet.
    """

    rungs: tuple[Rung, ...]
    price: float
    dimensions: int
    sampling_flops: float | None = None

    @classmethod
    def of(cls, model: ConditionedDiTTransformer2DModel, density: torch.Tensor) -> "Ladder":
        """Of a model whose spectrum is set.

        Args:
            density: probability `(num_train_timesteps,)` of each timestep.

        Raises:
            ValueError: if a view serves timesteps that do not follow each other.
        """
        config, views = model.config, timesteps_per_view(model)
        rungs = []
        for view, timesteps in enumerate(views):
            size, tokens = _size_and_tokens(model, view)
            rungs.append(
                Rung(
                    size=size,
                    tokens=tokens,
                    timesteps=timesteps,
                    share=0.0 if timesteps is None else density[timesteps[0] : timesteps[1] + 1].sum().item(),
                    flops=flops_per_forward(model, view),
                )
            )
        dimensions = config.in_channels * config.sample_size**2
        return cls(tuple(rungs), price_of(model), dimensions)

    def sampled_by(self, model: ConditionedDiTTransformer2DModel, scheduler: SchedulerMixin) -> "Ladder":
        """The ladder with the cost of sampling by a scheduler of the model's pipeline."""
        scheduler = type(scheduler).from_config(scheduler.config)
        scheduler.set_timesteps(SAMPLING_STEPS)
        views = model.views_of(scheduler.timesteps.to(model.device, torch.float32)).tolist()
        return replace(self, sampling_flops=sum(self.rungs[view].flops for view in views) / len(views))

    @classmethod
    def from_json(cls, values: dict) -> "Ladder":
        """Inverse of `to_json`.

        Raises:
            ValueError: for values that are of another version.
        """
        try:
            rungs = [{**rung, "timesteps": rung["timesteps"] and tuple(rung["timesteps"])} for rung in values["rungs"]]
            return cls(**{**values, "rungs": tuple(Rung(**rung) for rung in rungs)})
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"`ladder` in training_summary.json is not one of this version of the package ({error}): update the "
                "package, or remove the entry."
            ) from error

    def to_json(self) -> dict:
        return asdict(self)

    @property
    def mean_tokens(self) -> float:
        return sum(rung.share * rung.tokens for rung in self.rungs)

    @property
    def mean_flops(self) -> float:
        """Of a forward pass, over the density of timesteps."""
        return sum(rung.share * rung.flops for rung in self.rungs)

    def flops_of(self, counts: Sequence[int]) -> float:
        """Of a forward pass, over a batch with so many samples on each view."""
        return sum(count * rung.flops for count, rung in zip(counts, self.rungs, strict=True)) / sum(counts)

    @property
    def has_switch(self) -> bool:
        """Whether a coarser view is ever used."""
        return any(rung.timesteps for rung in self.rungs[1:])

    def describe(self) -> str:
        """As lines of text, for people."""
        full = self.rungs[0]
        if not self.has_switch:
            return (
                "Freq-Grid       no switch: by this rule, noise hides at no level of the schedule what a coarser grid "
                "lacks; the full grid is used always"
            )
        head = (
            f"Freq-Grid       {self.mean_tokens:.1f} of {full.tokens} tokens on average in training, "
            f"{self.mean_flops / full.flops:.3f} of the full grid's FLOPs ({full.flops / self.mean_flops:.1f}x saved)"
        )
        lines = [f"{'':16}{rung.size:4d} px, {rung.tokens:4d} tokens: {_served(rung)}" for rung in self.rungs]
        bits = self.price / self.dimensions / math.log(2)
        nats = f"{self.price:,.0f}" if self.price >= 100 else f"{self.price:.3g}"
        price = f"{'':16}price: at most {nats} nats ({bits:.3f} bits per value) with ideal denoisers"
        return "\n".join([head, *lines, price])

    def describe_briefly(self) -> str:
        """In a line: what serves which noise."""
        served = [rung for rung in self.rungs if rung.timesteps]
        return "; ".join(f"{rung.tokens} tokens at t = {rung.timesteps[0]} to {rung.timesteps[1]}" for rung in served)


def _served(rung: Rung) -> str:
    if rung.timesteps is None:
        return "never"
    first, last = rung.timesteps
    return f"t = {first} to {last}, {rung.share:.1%} of the timesteps drawn in training"


def timesteps_per_view(model: ConditionedDiTTransformer2DModel) -> list[tuple[int, int] | None]:
    """First and last training timestep of each view, the full grid first; `None` for a view that is never used.

    Raises:
        ValueError: if the timesteps of a view do not follow each other.
    """
    device = model.device
    views = model.views_of(torch.arange(model.config.num_train_timesteps, dtype=torch.float32, device=device)).cpu()
    ranges = []
    for view in range(model.config.grid_views):
        used = (views == view).nonzero().flatten()
        ranges.append((used[0].item(), used[-1].item()) if len(used) else None)
        if len(used) and used[-1] - used[0] + 1 != len(used):
            raise ValueError(f"view {view} serves {len(used)} timesteps of {ranges[-1]}, with others between them.")
    return ranges


def switch_sigmas(model: ConditionedDiTTransformer2DModel) -> list[float] | None:
    """Noise levels (standard deviation over the signal's factor) below which the next finer view is used, for
    `SpectralEulerDiscreteScheduler`; `None` for a model that is always on one."""
    if model.config.grid_views == 1:
        return None
    sigmas = torch.exp(-model.spectrum.switches.cpu().double() / 2)
    return sigmas[sigmas.isfinite()].tolist() or None


def _size_and_tokens(model: ConditionedDiTTransformer2DModel, view: int) -> tuple[int, int]:
    """Side of a view of the model's own samples, and the tokens of its grid."""
    size = model.view_size(view, model.config.sample_size, model.config.sample_size)[0]
    return size, (size // model.config.patch_size) ** 2


def _outside(model: ConditionedDiTTransformer2DModel, view: int) -> torch.Tensor:
    """Powers `(K,)` float64 on the CPU of the coefficients that a view does not see."""
    power = model.spectrum.power.cpu().double()  # some devices have no float64
    rows, columns = model.view_size(view, *power.shape[-2:])
    unseen = torch.ones(power.shape[-2:], dtype=torch.bool)
    unseen[:rows, :columns] = False
    return power[:, unseen].flatten()


def price_of(model: ConditionedDiTTransformer2DModel) -> float:
    """The most, in nats, that the views can cost an ideal denoiser against one of the full grid.

    It is the integral over log-SNR of half the Wiener gains outside the view, 1/2 sum_k ln(1 + e^l S_k) between the
    noise at the end of the schedule and the level where coefficient k is seen from on. It bounds what the views add to
    the negative ELBO, and the divergence of exact stochastic sampling, for any data of that spectrum: by the I-MMSE
    relation (Guo, Shamai, Verdu 2005, arXiv cs/0412108) errors inside and outside of the view integrate to
    information, and what is left out is no less than nothing. Real losses are several times smaller.
    """
    log_snr = model.spectrum.log_snr.cpu().double()
    total = 0.0
    for view, timesteps in enumerate(timesteps_per_view(model)):
        if view and timesteps:
            first, last = timesteps
            # Between the timesteps of two views the coarser one counts, as fractional ones may be on it.
            noisy, clean = log_snr[last], log_snr[max(first - 1, 0)]
            logs = _outside(model, view).log()
            gained = torch.nn.functional.softplus(clean + logs) - torch.nn.functional.softplus(noisy + logs)
            total += gained.sum().item() / 2
    return total


def priced_switches(
    model: ConditionedDiTTransformer2DModel, density: torch.Tensor, price_per_token: float
) -> torch.Tensor:
    """Switches of the least price in nats plus `price_per_token` times the mean number of tokens.

    At each noise level a view costs half its Wiener gains outside, integrated over the level's part of the log-SNR
    axis, and its tokens times the level's share of `density`. Each view serves timesteps that follow each other, from
    the full grid at the clean end to the coarsest.

    Args:
        model: with views, and a spectrum that is set (its switches do not matter).
        density: probability `(num_train_timesteps,)` of each timestep in training.
        price_per_token: in nats, above 0.

    Returns:
        Log-SNR `(grid_views - 1,)`, for `set_spectrum`.
    """
    config = model.config
    log_snr, density = model.spectrum.log_snr.cpu().double(), density.cpu().double()
    widths = torch.zeros_like(log_snr)
    steps = (log_snr[:-1] - log_snr[1:]) / 2
    widths[:-1] += steps
    widths[1:] += steps
    costs = []
    for view in range(config.grid_views):
        _, tokens = _size_and_tokens(model, view)
        gains = torch.sigmoid(log_snr[:, None] + _outside(model, view).log()).sum(dim=1)  # (T,)
        costs.append(gains / 2 * widths + price_per_token * density * tokens)
    # Halfway between two timesteps, so that no rounding decides on which side one is.
    edges = torch.cat([log_snr[:1] + 1, (log_snr[1:] + log_snr[:-1]) / 2, torch.tensor([-math.inf])])
    return torch.stack([edges[first] for first in _cheapest_ranges(costs)]).float()


def _cheapest_ranges(costs: list[torch.Tensor]) -> list[int]:
    """The first timestep of each view but the full grid for the least sum of costs `(T,)` of views in this order."""
    # least[t]: of all timesteps below t, by the views so far.
    least = torch.nn.functional.pad(costs[0].cumsum(0), (1, 0))
    starts = []
    for cost in costs[1:]:
        below = torch.nn.functional.pad(cost.cumsum(0), (1, 0))
        # From t' on this view: least[t'] + below[t] - below[t'], for the best t' up to each t.
        best, start = (least - below).cummin(0)
        least = best + below
        starts.append(start)
    firsts, end = [], len(costs[0])
    for start in reversed(starts):
        end = start[end].item()
        firsts.append(end)
    return firsts[::-1]
