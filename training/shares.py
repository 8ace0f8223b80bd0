"""How the samples of a micro-batch are shared out among the views of a model with Freq-Grid.

Every micro-batch has the same number of samples on each view, whatever was drawn: shapes are static, all processes do
the same work, and every parameter is used in every step. A view's timesteps are drawn from its own part of the
distribution, stratified over the global batch, and its samples are weighted by that part's probability over their
share of the batch: the weighted loss has the expectation that it has without views.
"""

from dataclasses import dataclass

import torch
from diffusers.utils import logging

from freqgate_dit.ladder import timesteps_per_view
from freqgate_dit.losses import DiffusionObjective, stratified_uniform
from freqgate_dit.transformer_freqgate_dit import ConditionedDiTTransformer2DModel


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ViewShares:
    """The layout of a micro-batch of B samples, which are sorted by view, the full grid first.

    Args:
        counts: samples of each view.
        begin, end: `(B,)` float32, part of the distribution function of the timesteps that is each sample's.
        first, last: `(B,)` int64, the timesteps of that part.
        weights: `(B,)` float32, of each sample's loss; their mean is 1.
    """

    counts: tuple[int, ...]
    begin: torch.Tensor
    end: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(
        cls, model: ConditionedDiTTransformer2DModel, objective: DiffusionObjective, batch_size: int
    ) -> "ViewShares":
        """For micro-batches of `batch_size`, on the device of the model.

        Raises:
            ValueError: if there are fewer samples than views that are used.
        """
        distribution = objective.timestep_distribution()
        ranges = timesteps_per_view(model)
        parts = [
            (0.0, 0.0) if r is None else (distribution[r[0]].item(), distribution[r[1] + 1].item()) for r in ranges
        ]
        probabilities = [end - begin for begin, end in parts]
        counts = share_out(probabilities, batch_size)
        views = torch.arange(len(ranges)).repeat_interleave(torch.tensor(counts))  # (B,)
        begin, end = torch.tensor(parts, dtype=torch.float64)[views].unbind(dim=1)
        if any(r and probability < 1e-4 for r, probability in zip(ranges, probabilities)):
            logger.warning(
                "of the timesteps drawn in training, the views' shares are "
                f"{', '.join(f'{probability:.2g}' for probability in probabilities)}: a view below 0.0001 is "
                "hardly trained, and will be sampled all the same. Choose another `logit_mean` or `logit_std`."
            )
        first, last = torch.tensor([r or (0, 0) for r in ranges])[views].unbind(dim=1)
        weights = (end - begin) * batch_size / torch.tensor(counts)[views]
        tensors = (begin.float(), end.float(), first, last, weights.float())
        tensors = (tensor.to(model.device) for tensor in tensors)
        return cls(tuple(counts), *tensors)

    def __len__(self) -> int:
        return sum(self.counts)

    def place(self, uniform: torch.Tensor, stratified: bool) -> torch.Tensor:
        """Uniforms of a global batch of whole micro-batches, in this layout, for `DiffusionObjective.timesteps`.

        Args:
            uniform: `(M * B,)` independent and uniform on [0, 1).
            stratified: spread the samples of a view evenly over its part of the distribution.
        """
        rows = uniform.view(-1, len(self))  # (M, B): a micro-batch each
        if stratified:
            count = torch.arange(len(rows), device=uniform.device)[:, None]
            columns = []
            for part in rows.split(self.counts, dim=1):
                samples = part.shape[1]
                # Neighbouring strata go to different micro-batches.
                stratum = torch.arange(samples, device=uniform.device) * len(rows) + count
                columns.append(stratified_uniform(part, stratum, max(1, samples * len(rows))))
            rows = torch.cat(columns, dim=1)
        placed = self.begin + (self.end - self.begin) * rows
        return placed.clamp(max=1 - 2**-24).flatten()

    def timesteps(self, objective: DiffusionObjective, uniform: torch.Tensor) -> torch.Tensor:
        """Timesteps `(B,)` int64 of a micro-batch for its placed uniforms `(B,)`, each of its own view."""
        return objective.timesteps(uniform).clamp(self.first, self.last)  # float32 may fall on the other side


def share_out(probabilities: list[float], batch_size: int) -> list[int]:
    """Whole numbers of samples, in sum `batch_size`, near to the probabilities: at least 1 where one is above 0.

    Raises:
        ValueError: if there are more of those than samples.
    """
    used = [probability > 0 for probability in probabilities]
    if sum(used) > batch_size:
        raise ValueError(
            f"`per_device_batch_size` ({batch_size}) is smaller than the number of views in use ({sum(used)}), each "
            f"of which takes part in every step: use at least {sum(used)}, or fewer `grid_views`."
        )
    counts = [int(one) for one in used]
    for _ in range(batch_size - sum(counts)):
        # To the view that lacks most of its share (d'Hondt's way gives small views less than theirs).
        missing = [p * batch_size - count for p, count in zip(probabilities, counts, strict=True)]
        counts[missing.index(max(missing))] += 1
    return counts
