"""Size of a model: parameters, and FLOPs of a forward pass."""

import functools
import json

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_forward(model: torch.nn.Module) -> int:
    """Floating point operations (2 per multiply-add) of matrix products and attention in a forward pass of one image.

    Counted on the meta device, nothing is computed; and once per process for models of the same configuration.
    """
    arguments = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return _count_flops(type(model), json.dumps(arguments))


@functools.lru_cache
def _count_flops(model_class: type, arguments: str) -> int:
    with torch.device("meta"):
        model = model_class(**json.loads(arguments))
        config, inputs = model.config, {}
        if config.num_classes:
            inputs["class_labels"] = torch.zeros(1, dtype=torch.long)
        if config.pooled_projection_dim:
            inputs["pooled_projections"] = torch.zeros(1, config.pooled_projection_dim)
        sample = torch.zeros(1, config.in_channels, config.sample_size, config.sample_size)
        with FlopCounterMode(display=False) as counter:
            model(sample, torch.zeros(1), **inputs)
    return counter.get_total_flops()
