"""Guiders besides those of diffusers, for `FreqGateDiTPipeline(..., guider=...)`."""

import json
import math
from pathlib import Path

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput

from freqgate_dit.spectral import dct2, idct2, radial_frequency
from freqgate_dit.traces import span_levels


class WeakModelGuidance(BaseGuidance):
    r"""
    Autoguidance: away from what a weaker model of the same task predicts under the same condition (Karras et al. 2024,
    arXiv 2406.02507), `D = D_weak + s * (D_model - D_weak)`.

    The weaker model is an earlier or shorter average of the same run, or a smaller or less trained one. It needs no
    null condition, so models trained without dropout of the condition, and unconditional ones, can be guided too.
    (diffusers' `AutoGuidance` weakens the model itself, by leaving out layers.)

    Args:
        weak_model (`torch.nn.Module`): takes the same inputs as the pipeline's transformer.
        guidance_scale (`float`, defaults to `2.0`): s; 1 is the model alone, in one pass.
        start, stop (`float`, defaults to `0.0` and `1.0`): fractions of the steps between which guidance acts.

    Example:

    ```py
    >>> weak = AutoModel.from_pretrained("runs/mine/pipeline_ema_0.2", subfolder="transformer")
    >>> images = pipe("cat", guider=WeakModelGuidance(weak, guidance_scale=2.0)).images
    ```
    """

    _input_predictions = ["pred_cond", "pred_weak"]
    ignore_for_config = ["weak_model"]
    uses_null_condition = False

    @register_to_config
    def __init__(
        self,
        weak_model: torch.nn.Module,
        guidance_scale: float = 2.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(start, stop, enabled)
        self.weak_model = weak_model
        self._was_asked = False
        self.guidance_scale = guidance_scale

    def prepare_inputs(self, data):
        # Both models see the condition, which is the first of each pair.
        return [self._prepare_batch(data, 0, name) for name in self._input_predictions[: self.num_conditions]]

    def network_of_pass(self, denoiser: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        """The network that answers the pass that was prepared last, `denoiser` or the weaker one in its type."""
        if self.is_conditional:
            return denoiser
        self._was_asked = True
        return self.weak_model.to(device, denoiser.dtype)

    def forward(self, pred_cond: torch.Tensor, pred_weak: torch.Tensor | None = None) -> GuiderOutput:
        if pred_weak is None:
            return GuiderOutput(pred=pred_cond, pred_cond=pred_cond)
        if not self._was_asked:
            raise ValueError("the pipeline did not have the weaker model answer: this guider needs the package's own.")
        pred = pred_weak + self.guidance_scale * (pred_cond - pred_weak)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_weak)

    @property
    def is_conditional(self) -> bool:
        """Whether the model's own pass is the one that was prepared last."""
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        return 2 if self._acts() else 1

    def _acts(self) -> bool:
        if not self._enabled or math.isclose(self.guidance_scale, 1.0):
            return False
        if self._num_inference_steps is None:
            return True
        first, last = (int(fraction * self._num_inference_steps) for fraction in (self._start, self._stop))
        return first <= self._step < last


class BandGuidance(BaseGuidance):
    r"""
    Classifier-free guidance with a scale and an interval per frequency band, `uncond + sum_b w_b P_b (cond - uncond)`,
    where P_b keeps the DCT coefficients of band b (as Sadat et al. 2025, arXiv 2506.19713, do with a Laplacian
    pyramid; intervals after Kynkäänniemi et al. 2024, arXiv 2404.07724).

    Equal scales are plain guidance, to the bit. Where all scales are 1, in one pass, it is the conditional model.

    Args:
        guidance_scales (`list[float]`): w_b of each band, from low to high frequencies.
        edges (`list[float]`): limits between the bands in cycles per image, ascending; one fewer than scales.
        intervals (`list[tuple[float, float]]`, *optional*): fractions of the steps between which each band is guided;
            outside of its interval a band has scale 1. By default all bands are guided at all steps.

    Raises:
        ValueError: for numbers of scales, edges and intervals that do not fit, edges that do not ascend from above 0,
            or intervals outside `0 <= start <= stop <= 1`.

    Example:

    ```py
    >>> guider = BandGuidance(guidance_scales=[1.5, 3.0], edges=[2.0], intervals=[(0.0, 0.6), (0.2, 0.8)])
    >>> images = pipe("cat", guider=guider).images
    ```
    """

    _input_predictions = ["pred_cond", "pred_uncond"]

    @register_to_config
    def __init__(
        self,
        *,  # diffusers takes what is given by position for a default, and forgets it in `from_config`
        guidance_scales: list[float],
        edges: list[float],
        intervals: list[tuple[float, float]] | None = None,
        enabled: bool = True,
    ):
        super().__init__(enabled=enabled)
        if len(guidance_scales) != len(edges) + 1:
            raise ValueError(
                f"`edges` ({list(edges)}) makes {len(edges) + 1} bands, but `guidance_scales` "
                f"({list(guidance_scales)}) has {len(guidance_scales)}: give one scale per band."
            )
        if any(not low < high for low, high in zip([0, *edges], edges)):
            raise ValueError(f"`edges` ({list(edges)}) must ascend and be above 0; they are cycles per image.")
        if intervals is not None and len(intervals) != len(guidance_scales):
            raise ValueError(
                f"`intervals` ({list(intervals)}) has {len(intervals)} entries for {len(guidance_scales)} bands."
            )
        for interval in intervals or []:
            if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
                raise ValueError(
                    f"`intervals` has {tuple(interval)}; expected (start, stop) with 0 <= start <= stop <= 1."
                )
        self.guidance_scales = guidance_scales
        self.edges = edges
        self.intervals = intervals or [(0.0, 1.0)] * len(guidance_scales)

    def weights(self) -> list[float]:
        """Scale of each band at the current step."""
        if not self._enabled:
            return [1.0] * len(self.guidance_scales)
        if self._num_inference_steps is None:
            return list(self.guidance_scales)
        acts = [
            int(start * self._num_inference_steps) <= self._step < int(stop * self._num_inference_steps)
            for start, stop in self.intervals
        ]
        return [scale if act else 1.0 for scale, act in zip(self.guidance_scales, acts)]

    def prepare_inputs(self, data):
        return [
            self._prepare_batch(data, index, self._input_predictions[index]) for index in range(self.num_conditions)
        ]

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        if pred_uncond is None:
            return GuiderOutput(pred=pred_cond, pred_cond=pred_cond)
        weights, shift = self.weights(), pred_cond - pred_uncond
        if len(set(weights)) == 1:
            shift = weights[0] * shift
        else:
            limits = torch.tensor(self.edges, device=shift.device)
            frequency = radial_frequency(*shift.shape[-2:], shift.device)
            weights = torch.tensor(weights, device=shift.device)[torch.bucketize(frequency, limits, right=True)]
            shift = idct2(weights * dct2(shift)).to(shift.dtype)
        return GuiderOutput(pred=pred_uncond + shift, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        return 1 if all(math.isclose(weight, 1.0) for weight in self.weights()) else 2


class InformationGuidance(BandGuidance):
    r"""
    Guidance where the condition says something: at noise level l the scale of band b is
    `1 + (guidance_scale - 1) * j_b(l) / max j`, with the density j of the information about the condition that the
    model's own predictions use, as the trainer measures it on held-out data. It has no shape to tune.

    Args:
        guidance_scale (`float`): the largest scale, where the density is largest.
        density (`list[list[float]]`): j, in any unit, of equal spans of timesteps from clean to noise, each with one
            value per band; negative values, which are noise of the measurement, count as 0.
        edges (`list[float]`): limits between the bands in cycles per image, ascending.
        num_train_timesteps (`int`, defaults to `1000`): timesteps that the spans divide.

    Raises:
        ValueError: if no density is positive, or its rows do not have one value per band.
    """

    @register_to_config
    def __init__(
        self,
        *,
        guidance_scale: float,
        density: list[list[float]],
        edges: list[float],
        num_train_timesteps: int = 1000,
        enabled: bool = True,
    ):
        bands = len(edges) + 1
        if not density or any(len(row) != bands for row in density):
            raise ValueError(
                f"`density` has rows of {[len(row) for row in density]} values; `edges` ({list(edges)}) makes {bands} "
                "bands, so every row needs that many."
            )
        largest = max(max(row) for row in density)
        if not largest > 0:
            raise ValueError(
                f"`density` has a largest value of {largest}: nothing was learnt about the condition, so there is "
                "nowhere to guide."
            )
        # The parent would register its own arguments as this one's configuration.
        BaseGuidance.__init__(self, enabled=enabled)
        self.guidance_scale = guidance_scale
        self.shape = [[max(value, 0.0) / largest for value in row] for row in density]
        self.edges = edges
        self.num_train_timesteps = num_train_timesteps

    @classmethod
    def from_validation(cls, path: str | Path, scheduler, guidance_scale: float, **kwargs) -> "InformationGuidance":
        """From what the trainer measured last.

        Args:
            path: `validation.jsonl` of a run.
            scheduler: any with the run's noise schedule, such as the pipeline's.
            guidance_scale: the largest scale.

        Raises:
            ValueError: for a run without a null condition, which measures no information, or one of another number of
                timesteps than the scheduler's.
        """
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        if not lines:
            raise ValueError(f"`path` ({path}) is empty: the run has not validated yet.")
        last = json.loads(lines[-1])
        measured = last.get("ema") or last["raw"]
        if measured["information_table"] is None:
            raise ValueError(f"`path` ({path}) has no information: the run was trained without a null condition.")
        if len(scheduler.alphas_cumprod) != measured["num_train_timesteps"]:
            raise ValueError(
                f"`scheduler` has {len(scheduler.alphas_cumprod)} training timesteps, but the run of `path` ({path}) "
                f"{measured['num_train_timesteps']}."
            )
        table = measured["information_table"]  # nats, spans of timesteps x bands
        levels = span_levels(scheduler.alphas_cumprod, len(table))
        widths = (levels[:-1] - levels[1:]).tolist()
        density = [[(nats or 0.0) / width for nats in row] for row, width in zip(table, widths)]
        edges = [float(name.split("-")[1]) for name in measured["bands"][:-1]]
        return cls(
            guidance_scale=guidance_scale,
            density=density,
            edges=edges,
            num_train_timesteps=measured["num_train_timesteps"],
            **kwargs,
        )

    def weights(self) -> list[float]:
        if not self._enabled:
            return [1.0] * (len(self.edges) + 1)
        spans = len(self.shape)
        timestep = 0.0 if self._timestep is None else float(torch.as_tensor(self._timestep).flatten()[0])
        row = self.shape[min(spans - 1, max(0, int(timestep * spans / self.num_train_timesteps)))]
        return [1 + (self.guidance_scale - 1) * share for share in row]
