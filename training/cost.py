"""What a run will cost and what it did: parameters, FLOPs and memory before step 1, metrics as JSON lines."""

import json
from pathlib import Path

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


# What `make demo` reached on two CPU cores with AMX: 216 images/s (results/demo_run.json) x 3 x 0.43 GFLOP.
CPU_SPEED = 0.28e12


def describe_cost(model: torch.nn.Module, data_bytes: int, images_seen: int) -> str:
    """Parameters, FLOPs of an image and of a run over `images_seen`, and the memory that does not depend on the batch
    size, as lines of text."""
    parameters, flops = count_parameters(model), flops_per_forward(model)
    run_flops = 3 * flops * images_seen
    # float32 weights, gradients, two AdamW moments, EMA.
    state_bytes = 4 * 5 * parameters
    return (
        f"parameters      {parameters / 1e6:.2f} M ({type(model).__name__})\n"
        f"FLOPs per image {flops / 1e9:.2f} G forward, {3 * flops / 1e9:.2f} G in training\n"
        f"whole run       {run_flops / 1e12:,.1f} TFLOP; at the {CPU_SPEED / 1e12:g} TFLOP/s that the demo reaches on "
        f"two CPU cores with AMX {run_flops / CPU_SPEED / 3600:,.1f} hours\n"
        f"memory          {state_bytes / 2**30:.2f} GiB weights, gradients, AdamW, EMA; "
        f"{data_bytes / 2**30:.2f} GiB data; activations come on top"
    )


class Metrics:
    """`metrics.jsonl`: a line per report, `{"step": ..., name: number, ...}`.

    Args:
        path: the file; lines after `step` (from a run that went further before it was resumed) are dropped.
        step: where the run stands.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        if path.is_file():
            # A last line without its end is what a killed run was writing.
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))

    def add(self, step: int, values: dict[str, float]):
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def series(self) -> dict[str, list[tuple[int, float]]]:
        """Each metric as `[(step, value), ...]`."""
        series: dict[str, list[tuple[int, float]]] = {}
        for line in self.path.read_text().splitlines():
            values = json.loads(line)
            step = values.pop("step")
            for name, value in values.items():
                series.setdefault(name, []).append((step, value))
        return series
