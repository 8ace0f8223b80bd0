"""What a run will cost: parameters, FLOPs and memory, before step 1."""

import torch

from freqgate_dit.cost import count_parameters, flops_per_forward
from freqgate_dit.ladder import Ladder


# What `make demo` reached on two CPU cores with AMX: 216 images/s x 3 x 0.43 GFLOP (the first version of
# results/demo_run.json; the present one is of a machine without AMX).
CPU_SPEED = 0.28e12


def describe_cost(model: torch.nn.Module, data_bytes: int, images_seen: int, num_averages: int = 1) -> str:
    """Parameters, FLOPs of an image and of a run over `images_seen`, and the memory that does not depend on the batch
    size, as lines of text. Of a model with views FLOPs are those of the full grid; `describe_ladder` has the run's."""
    parameters, flops = count_parameters(model), flops_per_forward(model)
    views = model.config.grid_views > 1
    run = " on the full grid" if views else f"\nwhole run       {_run(model, flops, images_seen)}"
    # float32 weights, gradients, two moments (Muon has one), averages.
    state_bytes = 4 * (4 + num_averages) * parameters
    return (
        f"parameters      {parameters / 1e6:.2f} M ({type(model).__name__})\n"
        f"FLOPs per image {flops / 1e9:.2f} G forward, {3 * flops / 1e9:.2f} G in training{run}\n"
        f"memory          {state_bytes / 2**30:.2f} GiB weights, gradients, moments, averages; "
        f"{data_bytes / 2**30:.2f} GiB data; activations come on top"
    )


def describe_ladder(model: torch.nn.Module, ladder: Ladder, counts: tuple[int, ...], images_seen: int) -> str:
    """The views of a model with Freq-Grid, and what a run over `images_seen` takes by them, as lines of text.

    Args:
        counts: samples of a micro-batch on each view.
    """
    flops = ladder.flops_of(counts)
    return (
        f"{ladder.describe()}\n"
        f"{'':16}of each {sum(counts)} samples {' + '.join(map(str, counts))} are on these views\n"
        f"FLOPs per image {flops / 1e9:.2f} G forward, {3 * flops / 1e9:.2f} G in training, on average\n"
        f"whole run       {_run(model, flops, images_seen)}"
    )


def _run(model: torch.nn.Module, flops: float, images_seen: int) -> str:
    run_flops = 3 * flops * images_seen
    hours = ""
    if next(model.parameters()).device.type == "cpu":
        hours = (
            f"; at the {CPU_SPEED / 1e12:g} TFLOP/s that the demo reaches on two CPU cores with AMX "
            f"{run_flops / CPU_SPEED / 3600:,.1f} hours"
        )
    return f"{run_flops / 1e12:,.1f} TFLOP{hours}"
