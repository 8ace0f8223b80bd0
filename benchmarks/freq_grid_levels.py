"""How dense noise levels should be where Freq-Grid's steps are cheaper: error against cost, by density.

    python benchmarks/freq_grid_levels.py --pipeline runs/mine/pipeline --out results/freq_grid_levels_mine.json

Second-order spectral steps of one network from the same noise, with noise levels that are denser by a factor from each
switch to a coarser view on. Cost is in evaluations of the full grid, by FLOPs; the error is that to a fine solution,
root mean square of a value.
"""

import argparse
from pathlib import Path

import torch
from compared_samplers import SECOND, SPECTRAL_GRID
from output import print_table, write_result
from samplers import Network

from freqgate_dit.cost import flops_per_forward
from freqgate_dit.ladder import switch_sigmas
from freqgate_dit.samplers import configure
from freqgate_dit.scheduling_spectral_euler import SpectralEulerDiscreteScheduler
from freqgate_dit.training.hardware import use_all_cores


DENSITIES = (1.0, 2**0.5, 2 ** (2 / 3), 2.0)


def scheduler(network: Network, density: float) -> SpectralEulerDiscreteScheduler:
    known = {"switch_sigmas": switch_sigmas(network.pipe.transformer)}
    made = configure(SpectralEulerDiscreteScheduler, network.config, **{**SPECTRAL_GRID, **SECOND, **known})
    made._density_per_switch = density
    return made


def study(options: argparse.Namespace) -> dict:
    network = Network(options.pipeline, options.samples, options.samples)
    transformer = network.pipe.transformer
    num_views = transformer.config.grid_views
    flops = torch.tensor([flops_per_forward(transformer, view) for view in range(num_views)])
    fine = network.sample(scheduler(network, 1.0), options.fine, options.guidance_scale).double()
    rows = []
    for density in DENSITIES:
        for steps in options.evaluations:
            made = scheduler(network, density)
            made.set_timesteps(steps)
            views = transformer.views_of(made.timesteps).bincount(minlength=num_views)
            samples = network.sample(made, steps, options.guidance_scale).double()
            rows.append(
                {
                    "density": density,
                    "evaluations": steps,
                    "views": views.tolist(),
                    "cost": (views * flops / flops[0]).sum().item(),
                    "error": (samples - fine).square().mean().sqrt().item(),
                }
            )
            print(rows[-1], flush=True)
    return {
        "pipeline": options.pipeline.parent.name,
        "samples": options.samples,
        "guidance_scale": options.guidance_scale,
        "fine": options.fine,
        "torch": torch.__version__,
        "rows": rows,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="folder of a pipeline with Freq-Grid")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[12, 16, 20, 24, 28, 34, 40])
    parser.add_argument("--fine", type=int, default=300, help="evaluations of the fine solution")
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--cpu_threads", type=int, help="by default all cores")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    use_all_cores(options.cpu_threads)
    result = study(options)
    table = {
        f"{row['density']:.2f}, {row['evaluations']}": [
            " + ".join(map(str, row["views"])),
            f"{row['cost']:.1f}",
            f"{row['error']:.4f}",
        ]
        for row in sorted(result["rows"], key=lambda row: row["cost"])
    }
    print_table("Error by cost", ["on each view", "cost", "error"], table, "density, evaluations")
    write_result(result, options.out)


if __name__ == "__main__":
    main()
