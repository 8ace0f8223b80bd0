"""Size of a model: parameters, and FLOPs of a forward pass."""

import functools
import json

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_forward(model: torch.nn.Module, view: int = 0) -> int:
    """Floating point operations (2 per multiply-add) of matrix products and attention in a forward pass of one image.

    Counted on the meta device, nothing is computed; and once per process for models of the same configuration.

    Args:
        view: of a model with several (`grid_views`); 0 is the full grid.
    """
    arguments = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return _count_flops(type(model), json.dumps(arguments), view)


@functools.lru_cache
def _count_flops(model_class: type, arguments: str, view: int) -> int:
    with torch.device("meta"):
        model = model_class(**json.loads(arguments))
        config, inputs = model.config, {}
        if config.num_classes:
            inputs["class_labels"] = torch.zeros(1, dtype=torch.long)
        if config.pooled_projection_dim:
            inputs["pooled_projections"] = torch.zeros(1, config.pooled_projection_dim)
        sample = torch.zeros(1, config.in_channels, config.sample_size, config.sample_size)
        samples_per_view = [int(view == other) for other in range(config.grid_views)]
        with FlopCounterMode(display=False) as counter:
            model(sample, torch.zeros(1), samples_per_view=samples_per_view, **inputs)
    return counter.get_total_flops()
