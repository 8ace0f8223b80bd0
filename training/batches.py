"""Which images, noise and noise levels a training step sees: a function of (seed, step) alone.

Nothing here has state to save. Resuming is asking for the next step, and any number of processes sees the same global
batch, because each draws all of it and takes its part.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from freqgate_dit.losses import stratified_uniform
from freqgate_dit.training.latents import CachedLatents
from freqgate_dit.training.shares import ViewShares


def derived_seed(seed: int, *keys: int) -> int:
    """A 63-bit seed for a purpose: different keys give unrelated streams."""
    return int(np.random.SeedSequence([seed, *keys]).generate_state(1, np.uint64)[0] >> 1)


# Streams of `derived_seed`.
ORDER, NOISE, DROPOUT, VALIDATION = range(4)


@dataclass
class Batch:
    """Part of a global batch. `uniform` and `dropout` are uniform on [0, 1)."""

    latents: torch.Tensor  # (B, C, H, W) float32
    labels: torch.Tensor | None  # (B,) int64
    noise: torch.Tensor  # (B, C, H, W) float32
    uniform: torch.Tensor  # (B,) for the timestep
    dropout: torch.Tensor  # (B,) for dropping the condition

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, part: slice) -> "Batch":
        labels = None if self.labels is None else self.labels[part]
        return Batch(self.latents[part], labels, self.noise[part], self.uniform[part], self.dropout[part])

    def shard(self, micro_step: int, process: int, num_processes: int, size: int) -> "Batch":
        """What `process` computes of this global batch in accumulation step `micro_step`: `size` images."""
        start = (micro_step * num_processes + process) * size
        return self[start : start + size]


class Batches:
    """Global batches of `size` images out of `data`.

    Epochs are shuffled one by one and laid end to end, so every batch is full and no image is left out.

    Args:
        data: the training set, which draws on the device where the batches are wanted.
        size: images of a global batch, over all processes and accumulation steps.
        seed: of the run.
        stratified: spread the timesteps' uniforms evenly over the global batch.
        shares: of models with views, how a micro-batch is shared out among them; `size` is a multiple of its samples.
        prefetch: whether to make the batch of the next step in a thread while the step runs; the batches are the same.
            By default on CUDA, if the data lies on the host. (On a CPU the thread would take the step's cores.)
    """

    def __init__(
        self,
        data: CachedLatents,
        size: int,
        seed: int,
        stratified: bool = True,
        shares: ViewShares | None = None,
        prefetch: bool | None = None,
    ):
        self.shares = shares
        self.data = data
        self.size = size
        self.seed = seed
        self.stratified = stratified
        self._orders: dict[int, torch.Tensor] = {}
        if prefetch is None:
            prefetch = data.device.type == "cuda" and not data.resident
        self._worker = ThreadPoolExecutor(1) if prefetch else None
        self._prefetched: dict[int, Future] = {}
        self._stream = None
        if prefetch and data.device.type == "cuda":
            # In the main stream the thread's kernels and copies would queue behind the step.
            self._stream = torch.cuda.Stream(data.device)
            self._stream.wait_stream(torch.cuda.current_stream(data.device))

    def order(self, epoch: int) -> torch.Tensor:
        """The permutation `(N,)` of an epoch."""
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, ORDER, epoch))
            # Only neighbours are ever needed: a batch can straddle epochs.
            self._orders = {key: value for key, value in self._orders.items() if key == epoch - 1}
            self._orders[epoch] = torch.randperm(len(self.data), generator=generator)
        return self._orders[epoch]

    def indices(self, step: int) -> torch.Tensor:
        """Images `(size,)` of the global batch of `step` (from 0)."""
        position, end = step * self.size, (step + 1) * self.size
        parts = []
        while position < end:
            epoch, offset = divmod(position, len(self.data))
            parts.append(self.order(epoch)[offset : offset + end - position])
            position += len(parts[-1])
        return torch.cat(parts)

    def draw(self, step: int) -> Batch:
        """The global batch of `step`."""
        if self._worker is None:
            return self._make(step, self.indices(step))
        coming = self._prefetched.pop(step, None) or self._submit(step)
        self._prefetched = {step + 1: self._submit(step + 1)}
        batch = coming.result()
        if self._stream is not None:
            # Else the allocator would give their memory to the thread's next batch while the step still reads it.
            for tensor in (batch.latents, batch.labels, batch.noise, batch.uniform, batch.dropout):
                if tensor is not None:
                    tensor.record_stream(torch.cuda.current_stream(self.data.device))
        return batch

    def _submit(self, step: int) -> Future:
        # The indices are found here, so that the thread shares nothing that changes.
        return self._worker.submit(self._make_aside, step, self.indices(step))

    def _make_aside(self, step: int, indices: torch.Tensor) -> Batch:
        if self._stream is None:
            return self._make(step, indices)
        with torch.cuda.stream(self._stream):
            batch = self._make(step, indices)
        self._stream.synchronize()
        return batch

    def _make(self, step: int, indices: torch.Tensor) -> Batch:
        device = self.data.device
        generator = torch.Generator(device).manual_seed(derived_seed(self.seed, NOISE, step))
        uniform, dropout, flip = torch.rand(3, self.size, generator=generator, device=device)
        noise = torch.randn((self.size, *self.data.shape), generator=generator, device=device)
        latents, labels = self.data.draw(indices, flip, generator)
        if self.shares is not None:
            uniform = self.shares.place(uniform, self.stratified)
        elif self.stratified:
            uniform = stratified_uniform(uniform, torch.arange(self.size, device=device), self.size)
        return Batch(latents, labels, noise, uniform, dropout)
