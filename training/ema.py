"""The average of the weights over training: diffusers' `EMAModel`, with its weights in and out of a model by name.

The decay warms up as min(decay, (1 + n) / (10 + n)), so a short run is not averaged with its initial weights.
"""

from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import nn


class NamedEMA(EMAModel):
    """`EMAModel` in float32 whose weights are saved and loaded by parameter name."""

    def __init__(self, model: nn.Module, decay: float):
        self.names = [name for name, _ in model.named_parameters()]
        super().__init__(model.parameters(), decay=decay, foreach=True)
        self.to(dtype=torch.float32)

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self.shadow_params, strict=True))

    def load(self, tensors: dict[str, torch.Tensor], num_updates: int):
        for name, shadow in self.tensors().items():
            shadow.copy_(tensors[name])
        self.optimization_step = num_updates

    @contextmanager
    def swapped_into(self, model: nn.Module):
        """Inside, `model` has the averaged weights; afterwards its own again, bit for bit."""
        own = [parameter.detach().clone() for parameter in model.parameters()]
        self.copy_to(model.parameters())
        try:
            yield model
        finally:
            for parameter, value in zip(model.parameters(), own, strict=True):
                parameter.data.copy_(value)
