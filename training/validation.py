"""Validation on fixed images, noise and timesteps: the same for every variant, so that differences are paired."""

from collections.abc import Callable

import torch

from freqgate_dit.losses import prediction_target, sample_timesteps, stratified_uniform
from freqgate_dit.training.batches import VALIDATION, derived_seed
from freqgate_dit.training.latents import CachedLatents


class Validation:
    """Mean squared error on held-out data, timesteps spread evenly over the schedule whatever training draws.

    Args:
        data: held-out latents; the first `num_images` of a fixed shuffle are used, mirrored ones not.
        scheduler: the `DDPMScheduler` of training.
        num_images: how many.
        batch_size: images of a forward pass.
        process, num_processes: this process computes every `num_processes`-th batch.
    """

    NUM_BINS = 4

    def __init__(self, data: CachedLatents, scheduler, num_images: int, batch_size: int, process=0, num_processes=1):
        self.scheduler = scheduler
        # The seed is fixed and no part of the run: runs with different seeds are validated on the same numbers.
        generator = torch.Generator().manual_seed(derived_seed(0, VALIDATION))
        indices = torch.randperm(len(data), generator=generator)[:num_images]
        count = len(indices)
        noise = torch.randn((count, *data.shape), generator=generator)
        uniform = stratified_uniform(torch.rand(count, generator=generator), torch.arange(count), count)
        timesteps = sample_timesteps(uniform, scheduler.config.num_train_timesteps)
        samples, labels = data.draw(indices, torch.zeros(count, device=data.device), generator=None)
        self.device = data.device
        self.batches = [
            (
                samples[start : start + batch_size],
                None if labels is None else labels[start : start + batch_size],
                noise[start : start + batch_size].to(data.device),
                timesteps[start : start + batch_size].to(data.device),
            )
            for start in list(range(0, count, batch_size))[process::num_processes]
        ]

    @torch.no_grad()
    def __call__(self, denoise: Callable) -> torch.Tensor:
        """Sums over this process's images: `(1 + NUM_BINS, 2)`, squared error and count, over all timesteps and per
        quarter of the schedule. `denoise(noisy, timesteps, labels) -> prediction`."""
        total = torch.zeros(1 + self.NUM_BINS, 2, device=self.device)
        num_timesteps = self.scheduler.config.num_train_timesteps
        for sample, labels, noise, timesteps in self.batches:
            noisy = self.scheduler.add_noise(sample, noise, timesteps)
            target = prediction_target(self.scheduler, sample, noise, timesteps)
            error = (denoise(noisy, timesteps, labels).float() - target).square().flatten(1).mean(dim=1)
            bins = timesteps * self.NUM_BINS // num_timesteps
            contribution = torch.stack([error, torch.ones_like(error)], dim=1)
            total[0] += contribution.sum(dim=0)
            total[1:].index_add_(0, bins, contribution)
        return total

    @classmethod
    def summarise(cls, total: torch.Tensor) -> dict[str, float]:
        """Means by name, from the sum of all processes' results."""
        means = (total[:, 0] / total[:, 1].clamp(min=1)).tolist()
        return {"loss": means[0], **{f"loss_t{i + 1}of{cls.NUM_BINS}": mean for i, mean in enumerate(means[1:])}}
