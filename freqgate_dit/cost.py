"""Size of a model: parameters, and FLOPs of a forward pass."""

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_forward(model: torch.nn.Module) -> int:
    """Floating point operations (2 per multiply-add) of matrix products and attention in a forward pass of one image.

    Counted on the meta device: nothing is computed.
    """
    config = model.config
    with torch.device("meta"):
        copy = type(model)(**{key: value for key, value in config.items() if not key.startswith("_")})
        arguments = {}
        if config.num_classes:
            arguments["class_labels"] = torch.zeros(1, dtype=torch.long)
        if config.pooled_projection_dim:
            arguments["pooled_projections"] = torch.zeros(1, config.pooled_projection_dim)
        sample = torch.zeros(1, config.in_channels, config.sample_size, config.sample_size)
        with FlopCounterMode(display=False) as counter:
            copy(sample, torch.zeros(1), **arguments)
    return counter.get_total_flops()
