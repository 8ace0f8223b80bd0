"""Guards of a long run: updates that would destroy the weights are skipped, losses that jump are written down."""

import math

import torch


class UpdateGuard:
    """Skips the optimiser updates whose gradient is not finite, and counts them.

    All of it happens on the device, through the `found_inf` that PyTorch's fused optimisers take from a gradient
    scaler: the host need not wait for a step's gradient to know whether to take the step. A skipped one leaves
    weights, moments and the optimiser's own counters as they were.

    Args:
        optimizer: one of `make_optimizer`.
        device: where its parameters lie.
        patience: skipped steps in a row after which the run is lost.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, patience: int):
        self.optimizer = optimizer
        self.patience = patience
        # Skipped steps: of all, of the current row, of the longest row.
        self._counts = torch.zeros(3, device=device)

    def check(self, grad_norm: torch.Tensor) -> torch.Tensor:
        """Call between clipping and `optimizer.step()`. Returns 1.0 if the step will be skipped, else 0.0 (scalar)."""
        skip = (~torch.isfinite(grad_norm)).float()
        self.optimizer.found_inf = skip
        total, row, longest = self._counts
        row = (row + 1) * skip
        self._counts = torch.stack([total + skip, row, torch.maximum(longest, row)])
        return skip

    def counts(self) -> tuple[int, int, int]:
        """Skipped steps since the run was started: all, the row that the last step belongs to, the longest row.

        Waits for the device.
        """
        return tuple(int(count) for count in self._counts.tolist())

    def stop_if_lost(self, step: int, learning_rate: float):
        """Raise if the gradient was not finite for `patience` steps in a row.

        Raises:
            FloatingPointError: says what to do.
        """
        longest = self.counts()[2]
        if longest >= self.patience:
            raise FloatingPointError(
                f"the gradient was not finite in {longest} steps in a row, seen at step {step}. They were skipped and "
                f"not saved: lower `learning_rate` ({learning_rate:g}) and go on from the newest checkpoint with "
                "`--resume auto`, or start anew with `qk_norm`."
            )


class SpikeDetector:
    """Finds losses that jump out of their usual spread: mean and variance of the logarithm, averaged over steps.

    Args:
        memory: steps of the average; nothing is reported before as many steps have been seen.
        deviations: a spike is this many standard deviations above the mean, and 1.5 times the mean at least.
    """

    def __init__(self, memory: int = 100, deviations: float = 6.0):
        self.memory = memory
        self.deviations = deviations
        self.mean = 0.0
        self.variance = 0.0
        self.seen = 0

    def add(self, loss: float) -> float | None:
        """Take the loss of the next step; how many times the usual loss it is if it is a spike, else `None`."""
        value = math.log(max(loss, 1e-30))
        deviation = value - self.mean
        limit = max(self.deviations * math.sqrt(self.variance), math.log(1.5))
        spike = self.seen >= self.memory and deviation > limit
        # A spike counts as its limit: it must not hide the next one, yet a loss that stays up becomes the usual one.
        counted = limit if spike else deviation
        self.seen += 1
        weight = max(1 / self.seen, 1 / self.memory)
        self.mean += weight * counted
        self.variance = (1 - weight) * (self.variance + weight * counted**2)
        return math.exp(deviation) if spike else None
