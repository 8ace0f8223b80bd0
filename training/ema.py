"""Averages of the weights over training, several at once: constant decay, or power-function profiles.

A constant decay forgets at a fixed pace, whatever the length of the run. A power-function profile (Karras et al. 2024,
arXiv 2312.02696, section 3.1) averages over a fixed share of it, and any other width can be made of stored averages
afterwards: see `posthoc_ema.py`.
"""

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn


# The width of the plain mean over all of training, gamma = 0. Wider profiles would favour the first weights.
WIDEST_SIGMA_REL = 12**-0.5


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """Exponent of the power-function profile whose standard deviation is `sigma_rel` of the training time.

    Solves sigma_rel^2 = (gamma + 1) (gamma + 2)^-2 (gamma + 3)^-1 (arXiv 2312.02696, section 3.1) for gamma > 0.

    Raises:
        ValueError: if `sigma_rel` is not in (0, 12^-0.5).
    """
    if not 0 < sigma_rel < WIDEST_SIGMA_REL:
        raise ValueError(
            f"`sigma_rel` ({sigma_rel}) must be above 0 and below {WIDEST_SIGMA_REL:.4f}, the width of the plain mean "
            "over all of training; 0.05 to 0.2 is usual."
        )
    square = sigma_rel**-2
    roots = np.roots([1, 7, 16 - square, 12 - square])
    # One root is above 0, the real parts of the other two are below.
    return float(roots.real.max())


def gamma_to_sigma_rel(gamma: float) -> float:
    """Inverse of `sigma_rel_to_gamma`."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


@dataclass(frozen=True)
class EMAProfile:
    """How an average weighs the past: average <- beta(n) * average + (1 - beta(n)) * weights at the n-th update.

    `name` is the canonical text. A constant decay has `decay`, a power-function profile `gamma`; the other is `None`.
    """

    name: str
    decay: float | None = None
    gamma: float | None = None

    @classmethod
    def parse(cls, text: str) -> "EMAProfile":
        """ "0.9999" is a constant decay, "power:0.1" a power-function profile of relative width sigma_rel = 0.1.

        Raises:
            ValueError: for anything else.
        """
        kind, colon, number = text.rpartition(":")
        try:
            value = float(number)
            if kind == "power":
                return cls(f"power:{value!r}", gamma=sigma_rel_to_gamma(value))
            if not colon and 0 <= value < 1:
                return cls(repr(value), decay=value)
        except ValueError:
            pass
        raise ValueError(
            f"`ema` has {text!r}: write a decay in [0, 1), such as 0.9999, or power:SIGMA_REL with SIGMA_REL in "
            f"(0, {WIDEST_SIGMA_REL:.4f}), such as power:0.1."
        ) from None

    @property
    def is_power(self) -> bool:
        return self.gamma is not None

    def beta(self, n: int) -> float:
        """Share of the average that the n-th update keeps, n from 1; at n = 1 the initial weights are dropped.

        A power-function profile has beta(n) = (1 - 1/n)^(gamma + 1) (arXiv 2312.02696, section 3.1). A constant decay
        warms up as in diffusers' `EMAModel`: min(decay, (1 + m) / (10 + m)) with m = n - 1.
        """
        if n == 1:
            return 0.0
        if self.is_power:
            return (1 - 1 / n) ** (self.gamma + 1)
        return min(self.decay, n / (n + 9))


class WeightAverages:
    """Averages of a model's weights under several profiles, in float32, each with the model's parameter names.

    Not a subclass of diffusers' `EMAModel`, which is one average with a decay of its own making and copies all weights
    at every update; what is left of it here is one line.

    Args:
        model: whose parameters are averaged; they may be of any floating dtype.
        profiles: texts for `EMAProfile.parse`. The first is the one that is published.

    Raises:
        ValueError: if there is no profile, one occurs twice, or one cannot be read.
    """

    def __init__(self, model: nn.Module, profiles: Sequence[str]):
        parsed = [EMAProfile.parse(text) for text in profiles]
        names = [profile.name for profile in parsed]
        if not names:
            raise ValueError("`ema` is empty: name at least one profile, such as 0.9999 or power:0.1.")
        if len(set(names)) < len(names):
            raise ValueError(f"`ema` ({', '.join(names)}) has a profile twice: name each once.")
        self.profiles = dict(zip(names, parsed, strict=True))
        self.published = names[0]
        self.updates = 0
        self._parameters = dict(model.named_parameters())
        self._averages = {
            name: [parameter.detach().float().clone() for parameter in self._parameters.values()] for name in names
        }
        self._mean_age = dict.fromkeys(names, 0.0)

    @torch.no_grad()
    def update(self):
        """Take the model's present weights into every average; the device is not waited for."""
        self.updates += 1
        # Float32 weights are used as they are; others are converted once for all averages.
        weights = [parameter.float() for parameter in self._parameters.values()]
        for name, profile in self.profiles.items():
            beta = profile.beta(self.updates)
            torch._foreach_lerp_(self._averages[name], weights, 1 - beta)
            self._mean_age[name] = beta * (self._mean_age[name] + 1)

    def mean_age(self) -> dict[str, float]:
        """Profile -> by how many updates its average lags behind the weights, in the mean over what it averages.

        Exact, as the profile's weights on all past updates; about 1 / (1 - decay) at a constant decay after warm-up,
        n / (gamma + 2) after n updates of a power-function profile.
        """
        return dict(self._mean_age)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The average of profile `name`, float32, by parameter name; not a copy."""
        if name not in self.profiles:
            raise ValueError(f"`name` ({name!r}) is not a profile of these averages: choose from {[*self.profiles]}.")
        return dict(zip(self._parameters, self._averages[name], strict=True))

    def state(self) -> dict:
        """What `load` needs besides the tensors, for JSON: number of updates, mean age per profile."""
        return {"updates": self.updates, "mean_age": self.mean_age()}

    @torch.no_grad()
    def load(self, tensors: dict[str, dict[str, torch.Tensor]], state: dict):
        """Go on from `tensors(name)` of every profile and `state()`, bit for bit.

        Raises:
            ValueError: if they are of other profiles than these.
        """
        if tensors.keys() != self.profiles.keys():
            raise ValueError(
                f"`ema` is {[*self.profiles]}, but what is to be loaded was saved with {sorted(tensors)}: use the "
                "same profiles (the order may differ), or start a new run."
            )
        for profile, saved in tensors.items():
            for name, average in self.tensors(profile).items():
                average.copy_(saved[name])
        self.updates = state["updates"]
        self._mean_age = {name: state["mean_age"][name] for name in self.profiles}

    @contextmanager
    def swapped_into(self, model: nn.Module, name: str | None = None):
        """Inside, `model` has the average of profile `name` (by default the published one); afterwards its own
        weights again, bit for bit."""
        averages = self.tensors(self.published if name is None else name)
        own = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
        try:
            _copy_into(model, averages)
            yield model
        finally:
            _copy_into(model, own)


@torch.no_grad()
def _copy_into(model: nn.Module, values: dict[str, torch.Tensor]):
    for name, parameter in model.named_parameters():
        parameter.copy_(values[name])
