# Copyright 2026 The freqgate_dit authors. Licensed under the Apache License, Version 2.0.
"""`SpectralEulerDiscreteScheduler`: Euler steps that every spatial frequency takes in a clock of its own.

In Euler's state x = x0 + sigma e, a DCT coefficient with mean M and power S over the training data has the clock
phi(sigma) = arctan(sigma / sqrt(S)), from pi/2 (noise) to 0 (clean). With w = (x - M) / sqrt(S + sigma^2), which has
unit variance at every frequency and noise level, the probability-flow ODE is dw/dphi = -F, where

    F = (x0_hat - M - S / (S + sigma^2) (x - M)) sqrt(S + sigma^2) / (sigma sqrt(S))

is what the network knows beyond the Gaussian: 0 for Gaussian data of that mean and power, which are hence sampled
exactly in any number of steps. A step is w' = w + (phi - phi') F, and x' = M + sqrt(S + sigma'^2) w'. With one S for
all frequencies it is the Euler step of TrigFlow (Lu and Song 2024, arXiv 2410.11081).

The file is self-contained (torch, numpy, diffusers and the standard library only), because it travels with the model
repositories that use it.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from diffusers.schedulers import (
    EulerDiscreteScheduler,
    SchedulerMixin,  # noqa: F401 (by which diffusers, looking into the module of a component, tells how to load it)
)
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.utils import logging


logger = logging.get_logger(__name__)

# Under these names, with an underscore before them, the arguments that only this class has stand in its config. Of a
# public name another scheduler's `from_config` would warn, with all of its numbers; a private one it keeps in silence.
OWN_ARGUMENTS = ("spectrum", "spectral_order", "use_spectral_sigmas", "temperature", "switch_sigmas")
# Noise levels between which the way of the image is measured.
LEVELS = 2000
# Pieces of the integral over a step of second order.
PIECES = 8
# Lists of noise levels for which the factors of steps are kept, each a few times the size of an image.
MAX_KEPT = 4


def spectral_power(spectrum: dict, height: int, width: int) -> torch.Tensor:
    """Power of every DCT coefficient of images of a size, by the table of a spectrum.

    A coefficient's power belongs to its frequency in cycles per **pixel**: an orthonormal DCT of a stationary field
    has it at every size, so that a larger image shows more at the same scale. (Under the f^-2 law of natural images it
    is also that of the same content in finer pixels.) Between rings log power is interpolated over log frequency. The
    mean of an image counts as a quarter of a cycle per training image, an octave below the first ring; beyond its ends
    the table is constant.

    Args:
        spectrum: see [`SpectralEulerDiscreteScheduler`].
        height, width: of the image, in pixels (of the latents).

    Returns:
        `(C, height, width)` float64 on the CPU.
    """
    radius = _radius(spectrum, height, width).numpy()
    log_power = np.log(np.array(spectrum["power"], dtype=np.float64))
    rings = np.log([0.5, *range(1, log_power.shape[1])])
    where = np.log(np.maximum(radius, 0.5))
    return torch.from_numpy(np.exp([np.interp(where, rings, row) for row in log_power]))


def spectral_mean(spectrum: dict, height: int, width: int) -> torch.Tensor:
    """Mean of every DCT coefficient of images of a size: that of the training data, stretched to the frame.

    Args and returns are those of `spectral_power`. Coefficients above the stored block have mean 0.
    """
    block = torch.tensor(spectrum["mean"], dtype=torch.float64)[:, :height, :width]
    mean = torch.zeros(len(block), height, width, dtype=torch.float64)
    mean[:, : block.shape[1], : block.shape[2]] = block * math.sqrt(height * width)
    return mean


class SpectralEulerDiscreteScheduler(EulerDiscreteScheduler):
    r"""
    Euler's method in the clock of each spatial frequency. Takes the place of `EulerDiscreteScheduler`: the same config
    and one argument more, the spectrum of the training data.

    `from_config` works both ways with diffusers' other schedulers, which keep the spectrum in their config (under
    private names, `_spectrum` and so on), though they have no use for it.

    Parameters:
        spectrum (`dict`): of the training data, as `freqgate_dit.spectral.SpectrumStatistics.spectrum()` makes it:

            - "height", "width": size of the training data (of the latents, for a latent model).
            - "power": a list per channel. Entry j is the mean power (variance) of the orthonormal DCT-II coefficients
              at j half-cycles over the longer side, rounded; entry 0 is that of the image's mean.
            - "mean": `(C, K, K)` as nested lists: means of the coefficients of lowest frequency, divided by
              `sqrt(height * width)`, so that entry (0, 0) is the mean of the channel.

        spectral_order (`int`, defaults to 1): 2 extrapolates F from the step before, linearly in log sigma; it takes
            one network evaluation per step as well.
        use_spectral_sigmas (`bool`, defaults to `False`): noise levels at equal steps of u / U + log(sigma) / L, in
            place of `timestep_spacing`. u is the length of the image's way, sqrt(sum over frequencies of S dphi^2), U
            and L are the ranges of u and log(sigma): the steps cover as much of the way as of the scales.
        temperature (`float` or list, defaults to 1): factor on the variance of the result about the data's mean; a
            list has an entry per octave of frequency, from the lowest (below 1 cycle per image, 1 to 2, 2 to 4, ...),
            the last one for all above. Exact for Gaussian data.
        switch_sigmas (`list[float]`, *optional*): noise levels below which the network is another one, as a model with
            views (Freq-Grid) is on another grid of tokens. A second-order step that follows one extrapolates nothing:
            F is taken for that of before down to the switch, and for that of now from there on. And spectral noise
            levels are denser by sqrt(2) from each switch on, as a step on a grid of a quarter of the tokens costs
            about a quarter: with few steps that has the smaller error at equal cost
            (`benchmarks/freq_grid_levels.py`).
        **: the others are those of `EulerDiscreteScheduler`.

    Raises:
        ValueError: without a spectrum, or with one that is not as above.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: str = "epsilon",
        interpolation_type: str = "linear",
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        timestep_spacing: str = "linspace",
        timestep_type: str = "discrete",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        final_sigmas_type: str = "zero",
        spectrum: dict | None = None,
        spectral_order: int = 1,
        use_spectral_sigmas: bool = False,
        temperature: float | Sequence[float] = 1.0,
        switch_sigmas: Sequence[float] | None = None,
    ):
        _check_spectrum(spectrum)
        if spectral_order not in (1, 2):
            raise ValueError(f"`spectral_order` ({spectral_order}) must be 1 or 2.")
        if use_spectral_sigmas and (use_karras_sigmas or use_exponential_sigmas or use_beta_sigmas):
            raise ValueError(
                "`use_spectral_sigmas` cannot be combined with `use_karras_sigmas`, `use_exponential_sigmas` or "
                "`use_beta_sigmas`: choose one."
            )
        if not all(value > 0 for value in _as_list(temperature)) or not _as_list(temperature):
            raise ValueError(f"`temperature` ({temperature}) must be positive, for each octave.")
        if not all(0 < sigma < math.inf for sigma in switch_sigmas or ()):
            raise ValueError(f"`switch_sigmas` ({switch_sigmas}) must be positive and finite.")
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            prediction_type=prediction_type,
            interpolation_type=interpolation_type,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            timestep_spacing=timestep_spacing,
            timestep_type=timestep_type,
            steps_offset=steps_offset,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
            final_sigmas_type=final_sigmas_type,
        )
        own = {
            "spectrum": spectrum,
            "spectral_order": spectral_order,
            "use_spectral_sigmas": use_spectral_sigmas,
            "temperature": temperature,
            "switch_sigmas": None if switch_sigmas is None else list(switch_sigmas),
        }
        self.register_to_config(**{f"_{name}": own[name] for name in OWN_ARGUMENTS})
        self._least_sigma = self.sigmas[-2].item()
        self._sizes = SharedByCopies()
        self._known = SharedByCopies()
        self._previous = None
        self._levels = tuple(self.sigmas.tolist())

    # Of noise levels, from each of `switch_sigmas` on. If a step of length h costs c and errs by h^3, the least error
    # at equal cost has steps as c^(1/3), so 1.6 for a quarter; what was measured is as good from 1.4 to 1.6.
    _density_per_switch = math.sqrt(2)

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """Of diffusers: the arguments of `__init__` among those of a config."""
        config_dict = dict(config_dict)
        own = {name: config_dict.pop(f"_{name}") for name in OWN_ARGUMENTS if f"_{name}" in config_dict}
        return super().extract_init_dict(config_dict, **{**own, **kwargs})

    # -- noise levels -----------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
    ):
        """Noise levels and timesteps of a run; arguments are those of `EulerDiscreteScheduler.set_timesteps`."""
        self._previous = None
        if (
            self.config._use_spectral_sigmas
            and num_inference_steps is not None
            and timesteps is None
            and sigmas is None
        ):
            num_inference_steps, sigmas = None, self._spectral_sigmas(num_inference_steps)
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas)
        self._levels = tuple(self.sigmas.tolist())

    def _spectral_sigmas(self, steps: int) -> list[float]:
        greatest = self.config.sigma_max or ((1 - self.alphas_cumprod[-1]) / self.alphas_cumprod[-1]).sqrt().item()
        least = self.config.sigma_min or self._least_sigma
        sigmas = np.geomspace(least, greatest, LEVELS)
        way = _way(self.config._spectrum, sigmas)
        progress = way / way[-1] + np.linspace(0, 1, LEVELS)
        if self.config._switch_sigmas:
            crossed = sum((sigmas[1:] >= switch).astype(float) for switch in self.config._switch_sigmas)
            progress = np.concatenate([[0], np.cumsum(np.diff(progress) * self._density_per_switch**crossed)])
        levels = np.exp(np.interp(np.linspace(progress[-1], 0, steps), progress, np.log(sigmas)))
        return [*levels.tolist(), least if self.config.final_sigmas_type == "sigma_min" else 0.0]

    # -- a step -----------------------------------------------------------------------------------------------------

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> EulerDiscreteSchedulerOutput | tuple:
        """
        One step to the next noise level.

        Args:
            model_output: `(B, C, H, W)`, the network's prediction.
            timestep: one of `timesteps`.
            sample: `(B, C, H, W)`, the state. It is computed in float32, or in float64 if it is float64.
            s_churn, s_tmin, s_tmax, s_noise: of Euler's stochastic steps, which there are none of here.
            generator: not used, for nothing is random.
            return_dict: an output object instead of a tuple.

        Returns:
            `prev_sample`, of the type of `sample`, and `pred_original_sample`, of the type of the computation.

        Raises:
            ValueError: for an index in place of a timestep, churn, or another number of channels than the spectrum's.
        """
        if (s_churn, s_tmin, s_tmax, s_noise) != (0, 0, math.inf, 1):
            raise ValueError(
                f"`s_churn` ({s_churn}), `s_tmin` ({s_tmin}), `s_tmax` ({s_tmax}) and `s_noise` ({s_noise}) add noise "
                "to steps, which this scheduler does not: leave them out, or use `EulerDiscreteScheduler`."
            )
        if isinstance(timestep, int) or (torch.is_tensor(timestep) and not timestep.is_floating_point()):
            raise ValueError(f"`timestep` ({timestep}) is an integer: pass one of `scheduler.timesteps`.")
        channels = len(self.config._spectrum["power"])
        if sample.ndim < 3 or sample.shape[-3] != channels:
            raise ValueError(
                f"`sample` has shape {tuple(sample.shape)}, but the spectrum of this scheduler has {channels} "
                "channels: expected (batch, channels, height, width)."
            )
        if not self.is_scale_input_called:
            logger.warning("`scale_model_input` should be called before `step`, or the model sees the wrong scale.")
        if self.step_index is None:
            self._init_step_index(timestep)

        sigma = self.sigmas[self.step_index].item()
        dtype = torch.promote_types(sample.dtype, torch.float32)
        # float16 and bfloat16 would bury the weak frequencies in the rounding of the strong ones.
        with torch.autocast(sample.device.type, enabled=False):
            state = sample.to(dtype)
            pred_original_sample = self._predict_original(model_output.to(dtype), state, sigma)
            prev_sample = self._turn_clocks(state, pred_original_sample).to(sample.dtype)
        self._step_index += 1
        if not return_dict:
            return prev_sample, pred_original_sample
        return EulerDiscreteSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def _predict_original(self, model_output: torch.Tensor, state: torch.Tensor, sigma: float) -> torch.Tensor:
        prediction_type = self.config.prediction_type
        if prediction_type in ("sample", "original_sample"):
            return model_output
        if prediction_type == "epsilon":
            return state - sigma * model_output
        if prediction_type == "v_prediction":
            return state / (sigma**2 + 1) - model_output * (sigma / math.sqrt(sigma**2 + 1))
        raise ValueError(f"`prediction_type` ({prediction_type!r}) must be 'epsilon', 'v_prediction' or 'sample'.")

    def _turn_clocks(self, state: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        """The next state, from state and predicted original, in the notation of the head of this file."""
        size, step = tuple(state.shape[-2:]), self.step_index
        follows = self._previous is not None and self._previous[0] == step - 1
        if size not in self._sizes:
            self._sizes[size] = self.frequencies(*size)
        frequencies = self._sizes[size]
        is_last = step + 2 == len(self.sigmas)
        frame = self._kept(state, "frame", lambda: frequencies.frame)
        turn = self._kept(state, (step, follows), lambda: self._turn(frequencies, step, follows))

        deviation, predicted = frame.rows @ torch.stack([state, original]) @ frame.columns.T - frame.mean
        velocity = (predicted - turn.wiener * deviation) * turn.gain
        w = deviation * turn.whitening + turn.angle * velocity
        if turn.ahead is not None:
            w = w + turn.ahead * (velocity - self._previous[1])
        self._previous = None if is_last or self.config._spectral_order == 1 else (step, velocity)
        return frame.rows.T @ (frame.mean + turn.spread * w) @ frame.columns

    def _kept(self, state: torch.Tensor, what, compute: Callable[[], NamedTuple]) -> NamedTuple:
        """What `compute` returns, on the device of `state`, kept for the next calls at these noise levels."""
        key = (self._levels, tuple(state.shape[-2:]), state.device, state.dtype)
        if key not in self._known:
            for oldest in list(self._known)[: 1 - MAX_KEPT]:
                self._known.pop(oldest, None)
        kept = self._known.setdefault(key, {})
        if what not in kept:
            tensors = compute()
            kept[what] = type(tensors)(*(None if tensor is None else tensor.to(state) for tensor in tensors))
        return kept[what]

    def frequencies(self, height: int, width: int) -> "Frequencies":
        """What steps take of the spectrum for images of a size."""
        return Frequencies(self.config._spectrum, height, width)

    def _turn(self, frequencies: "Frequencies", step: int, follows: bool) -> "Turn":
        sigma, next_sigma = self.sigmas[step : step + 2].tolist()
        power, root = frequencies.power, frequencies.root
        spread, next_spread = ((power + level**2).sqrt() for level in (sigma, next_sigma))
        if step + 2 == len(self.sigmas):
            next_spread = next_spread * frequencies.octave_scale(self.config._temperature)
        return Turn(
            whitening=1 / spread,
            wiener=power / spread**2,
            gain=spread / (sigma * root),
            angle=frequencies.angle(sigma, next_sigma),
            ahead=self._ahead(frequencies, step) if follows else None,
            spread=next_spread,
        )

    def _ahead(self, frequencies: "Frequencies", step: int) -> torch.Tensor | None:
        """Weight of F's change since the last step."""
        switch = self._crossed_switch(step)
        if switch is None:
            return self._extrapolation(frequencies, step)
        # The last step took its F down to this level; from the switch on it should have been this one.
        return frequencies.angle(switch, self.sigmas[step].item())

    def _crossed_switch(self, step: int) -> float | None:
        """The first of the switches that the last step has crossed."""
        before, here = self.sigmas[step - 1 : step + 1].tolist()
        return max((sigma for sigma in self.config._switch_sigmas or () if here < sigma <= before), default=None)

    def _extrapolation(self, frequencies: "Frequencies", step: int) -> torch.Tensor | None:
        """Weight of F's change since the last step: (l_n - l) / max(dl_(n-1), dl_n / 2), integrated over phi.

        l is log sigma, below the least noise of training that of the least. Where a step is more than twice the one
        before, such as the last one of trailing timesteps, F is extrapolated by twice its change only. `None` where
        there is nothing to extrapolate from, as l has not changed.
        """
        sigmas = self.sigmas[step - 1 : step + 2].tolist()
        before, here, there = (math.log(max(level, self._least_sigma)) for level in sigmas)
        if before <= here:
            return None
        logs = np.linspace(here, there, PIECES + 1)
        levels = [sigmas[1], *np.exp(logs[1:-1]).tolist(), sigmas[2]]
        covered = (here - (logs[:-1] + logs[1:]) / 2) / max(before - here, (here - there) / 2)
        return sum(
            share * frequencies.angle(start, stop)
            for share, start, stop in zip(covered.tolist(), levels[:-1], levels[1:], strict=True)
        )


class SharedByCopies(dict):
    """What is computed from the configuration of a scheduler alone: its copies, one for each call of a pipeline, need
    not compute it again."""

    def __deepcopy__(self, memo):
        return self


class Frame(NamedTuple):
    """Orthonormal DCT matrices `(H, H)` and `(W, W)`, and the mean of the coefficients `(C, H, W)`."""

    rows: torch.Tensor
    columns: torch.Tensor
    mean: torch.Tensor


class Turn(NamedTuple):
    """Factors of a step, each `(C, H, W)`: w = whitening dx, F = gain (dx0_hat - wiener dx), w' = w + angle F, and of
    second order + ahead (F - F_before); dx' = spread w'.
    """

    whitening: torch.Tensor
    wiener: torch.Tensor
    gain: torch.Tensor
    angle: torch.Tensor
    ahead: torch.Tensor | None
    spread: torch.Tensor


class Frequencies:
    """The frequencies of an image size, in float64 on the CPU."""

    def __init__(self, spectrum: dict, height: int, width: int):
        self.power = spectral_power(spectrum, height, width)
        self.root = self.power.sqrt()
        self.frame = Frame(_dct_matrix(height), _dct_matrix(width), spectral_mean(spectrum, height, width))

    def angle(self, sigma: float, next_sigma: float) -> torch.Tensor:
        """phi(sigma) - phi(next_sigma) of every coefficient, without the cancellation of two arcs near pi/2."""
        return torch.atan2(self.root * (sigma - next_sigma), self.power + sigma * next_sigma)

    def octave_scale(self, temperature: float | Sequence[float]) -> torch.Tensor:
        """Square root of the temperature of every coefficient's octave, `(height, width)`."""
        temperatures = torch.tensor(_as_list(temperature), dtype=torch.float64)
        height, width = self.power.shape[-2:]
        cycles = torch.hypot(torch.arange(height)[:, None] / 2.0, torch.arange(width)[None, :] / 2.0)
        octaves = (cycles.clamp(min=0.5).log2().floor().long() + 1).clamp(max=len(temperatures) - 1)
        return temperatures[octaves].sqrt()


def _dct_matrix(n: int) -> torch.Tensor:
    """Orthonormal DCT-II, float64: row k is the basis function of k half-cycles."""
    index = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi / n * index[:, None] * (index[None, :] + 0.5)) * math.sqrt(2.0 / n)
    matrix[0] *= math.sqrt(0.5)
    return matrix


def _radius(spectrum: dict, height: int, width: int) -> torch.Tensor:
    """Frequency of every DCT index in half-cycles per longer side of the training data, `(height, width)`."""
    side = max(spectrum["height"], spectrum["width"])
    rows = torch.arange(height, dtype=torch.float64) * (side / height)
    columns = torch.arange(width, dtype=torch.float64) * (side / width)
    return torch.hypot(rows[:, None], columns[None, :])


def _way(spectrum: dict, sigmas: np.ndarray) -> np.ndarray:
    """Length of the image's way up to each of the noise levels, from the first one: sqrt(sum of S dphi^2)."""
    power = spectral_power(spectrum, spectrum["height"], spectrum["width"]).numpy().ravel()
    # Coefficients whose powers differ by less than a per cent are counted together.
    log_power, counts = np.unique(np.log(power).round(2), return_counts=True)
    power = np.exp(log_power)
    # dphi / dsigma = -sqrt(S) / (S + sigma^2)
    speeds = np.sqrt([np.sum(counts * (power / (power + sigma**2)) ** 2) for sigma in sigmas])
    steps = (speeds[1:] + speeds[:-1]) / 2 * np.diff(sigmas)
    return np.concatenate([[0], np.cumsum(steps)])


def _as_list(value: float | Sequence[float]) -> list[float]:
    return [value] if isinstance(value, (int, float)) else list(value)


def _check_spectrum(spectrum: dict | None):
    if spectrum is None:
        raise ValueError(
            "`spectrum` is missing: pass `spectrum=statistics.spectrum()`, made by "
            "`freqgate_dit.spectral.SpectrumStatistics` from the training data, or start from the config of a "
            "scheduler that was saved with it. Without one, use `EulerDiscreteScheduler`."
        )
    missing = [name for name in ("height", "width", "power", "mean") if name not in spectrum]
    if missing:
        raise ValueError(f"`spectrum` lacks {missing}: it has {list(spectrum)}.")
    for name in ("height", "width"):
        if type(spectrum[name]) is not int or spectrum[name] < 1:
            raise ValueError(f"`spectrum` has the {name} {spectrum[name]!r}: give the size of the data in pixels.")
    try:
        power, mean = (np.array(spectrum[name], dtype=np.float64) for name in ("power", "mean"))
    except ValueError as error:
        raise ValueError(f"`spectrum` has rows of unequal lengths ({error}): give all channels as many.") from error
    if power.ndim != 2 or mean.ndim != 3 or 0 in power.shape + mean.shape or len(power) != len(mean):
        raise ValueError(
            f"`spectrum` has power of shape {power.shape} and the mean of shape {mean.shape}; expected (channels, "
            "rings) and (channels, rows, columns)."
        )
    for name, values, good in (
        ("power", power, np.isfinite(power) & (power > 0)),
        ("mean", mean, np.isfinite(mean)),
    ):
        if not good.all():
            where = tuple(np.argwhere(~good)[0].tolist())
            kind = "positive" if name == "power" else "finite"
            raise ValueError(f"`spectrum` has the {name} {values[where]} at {where}, which must be {kind}.")
