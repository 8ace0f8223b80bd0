"""What the second-order spectral sampler loses where Freq-Grid changes its view, and what mends it.

    python benchmarks/freq_grid_switches.py --pipeline runs/mine/pipeline --out results/freq_grid_switches_mine.json

A step of second order extrapolates the network's F from the step before. After a switch that one was of another grid
of tokens, and 0 in the frequencies that the grid lacks; besides, its step went on with it beyond the switch. Compared
are ways to take the first step on a new view, and first order throughout. All take the same noise levels and start
from the same noise. The error is that to a fine solution of the same network: root mean square of a value, and of a
coefficient in each octave of frequency.
"""

import argparse
import math
from pathlib import Path

import freq_grid_models  # noqa: F401 (diffusers loads pipelines of the controls only where it has been imported)
import torch
from compared_samplers import SECOND, SPECTRAL_GRID, joined
from output import print_table, write_result
from samplers import Network
from tqdm.auto import tqdm

from freqgate_dit.ladder import switch_sigmas, timesteps_per_view
from freqgate_dit.samplers import configure
from freqgate_dit.scheduling_spectral_euler import SpectralEulerDiscreteScheduler
from freqgate_dit.spectral import dct2, octave_bands, octave_labels
from freqgate_dit.training.hardware import use_all_cores


class EvenScheduler(SpectralEulerDiscreteScheduler):
    """With the same noise levels, whether the switches are known or not."""

    _density_per_switch = 1.0


class FirstOrderAfterSwitches(EvenScheduler):
    """Extrapolates nothing across a switch."""

    def _ahead(self, frequencies, step):
        return None if self._crossed_switch(step) else super()._ahead(frequencies, step)


class FirstOrderInNewFrequencies(EvenScheduler):
    """Extrapolates only the frequencies that both views have."""

    def _ahead(self, frequencies, step):
        ahead = self._extrapolation(frequencies, step)
        if ahead is not None and self._crossed_switch(step):
            view = sum(self.sigmas[step - 1].item() >= sigma for sigma in self.config._switch_sigmas)
            common = torch.zeros_like(ahead)
            common[:, : ahead.shape[1] >> view, : ahead.shape[2] >> view] = 1
            ahead = common * ahead
        return ahead


AS_IT_IS, CORRECTED = "second order", "corrected after switches"
IGNORED = {**SECOND, "switch_sigmas": None}
# By default the switches are those of the model.
SAMPLERS = {
    AS_IT_IS: (EvenScheduler, IGNORED),
    "first-order step after switches": (FirstOrderAfterSwitches, SECOND),
    "the same in new frequencies only": (FirstOrderInNewFrequencies, SECOND),
    CORRECTED: (EvenScheduler, SECOND),
    "first order": (EvenScheduler, {}),
}
# Fine solutions: sampler and steps. Errors are measured against the first; the others show how well it is known.
FINE = ((CORRECTED, 400), (AS_IT_IS, 400), ("first order", 500))


class Solver:
    """Samples of a pipeline's network, always from the same noise and labels."""

    def __init__(self, folder: Path, samples: int, batch_size: int):
        self.network = Network(folder, samples, batch_size)
        self.transformer = self.network.pipe.transformer
        if getattr(self.transformer.config, "grid_views", 1) == 1:
            raise SystemExit(f"`pipeline` ({folder}) has one view and no switches: train with `--grid_views` above 1.")
        size = self.transformer.config.sample_size
        self.bands, self.labels = octave_bands(size, size), octave_labels(size, size)

    def scheduler(self, name: str) -> SpectralEulerDiscreteScheduler:
        kind, arguments = SAMPLERS[name]
        known = {"switch_sigmas": switch_sigmas(self.transformer)}
        return configure(kind, self.network.config, **{**SPECTRAL_GRID, **known, **arguments})

    def sample(self, name: str, steps: int, guidance_scale: float) -> torch.Tensor:
        """DCT coefficients `(samples, C, H, W)`, float64."""
        return dct2(self.network.sample(self.scheduler(name), steps, guidance_scale).double())

    def steps_on_views(self, steps: int) -> list[int]:
        """How many of the steps are on each view, the full grid first."""
        scheduler = self.scheduler(AS_IT_IS)
        scheduler.set_timesteps(steps)
        views = self.transformer.views_of(scheduler.timesteps)
        return views.bincount(minlength=self.transformer.config.grid_views).tolist()

    def rms(self, coefficients: torch.Tensor) -> dict:
        """Of a value, and of a coefficient in each octave."""
        squares = coefficients.square()
        bands = [squares[..., self.bands == band].mean().sqrt().item() for band in range(len(self.labels))]
        return {"all": squares.mean().sqrt().item(), "bands": bands}


def ratio(errors: torch.Tensor, others: torch.Tensor) -> list[float]:
    """Geometric mean over samples of the ratio of their errors `(samples, C, H, W)`, and its relative standard error.

    The samples are paired by their noise, which so does not count.
    """
    logs = (errors.square().flatten(1).mean(1) / others.square().flatten(1).mean(1)).log() / 2
    return [logs.mean().exp().item(), logs.std().item() / math.sqrt(len(logs))]


def study(arguments: argparse.Namespace) -> dict:
    solver = Solver(arguments.pipeline, arguments.samples, arguments.batch_size)
    scales = arguments.guidance_scale or ([1.0, 2.0] if solver.network.pipe.has_null_condition else [1.0])
    result = {
        "torch": torch.__version__,
        "pipeline": arguments.pipeline.parent.name,
        "prediction_type": solver.network.pipe.config.prediction_type,
        "samples": arguments.samples,
        "timesteps_of_views": timesteps_per_view(solver.transformer),
        "evaluations": arguments.evaluations,
        "steps_on_views": {count: solver.steps_on_views(count) for count in arguments.evaluations},
        "fine": FINE,
        "bands": solver.labels,
        "guidance": {},
    }
    with tqdm(total=len(scales) * (len(FINE) + len(SAMPLERS) * len(arguments.evaluations)), unit="run") as progress:

        def sample(name: str, count: int, scale: float) -> torch.Tensor:
            progress.set_postfix_str(f"{name}, {count} evaluations, guidance {scale}")
            coefficients = solver.sample(name, count, scale)
            progress.update()
            return coefficients

        for scale in scales:
            fine = sample(*FINE[0], scale)
            others = {f"{name}, {count}": solver.rms(sample(name, count, scale) - fine) for name, count in FINE[1:]}
            rows = {"fine": solver.rms(fine), "uncertainty": others, "samplers": {name: {} for name in SAMPLERS}}
            result["guidance"][scale] = rows
            for count in arguments.evaluations:
                errors = {name: sample(name, count, scale) - fine for name in SAMPLERS}
                for name, error in errors.items():
                    cell = {**solver.rms(error), "ratio": ratio(error, errors[AS_IT_IS])}
                    rows["samplers"][name][count] = cell
                write_result(result, arguments.out)
    return result


def print_study(result: dict):
    columns = [
        f"{count} evaluations ({' + '.join(map(str, result['steps_on_views'][count]))})"
        for count in result["evaluations"]
    ]
    for scale, rows in result["guidance"].items():
        known = ", ".join(f"{error['all']:.4f} to {name}" for name, error in rows["uncertainty"].items())
        samplers = rows["samplers"]
        table = {
            name: [f"{cell['all']:.4f} (x {cell['ratio'][0]:.2f} ± {cell['ratio'][1]:.0%})" for cell in row.values()]
            for name, row in samplers.items()
        }
        print_table(f"Guidance {scale}: error of a value (the fine solution is known to: {known})", columns, table)
        table = {name: [joined(cell["bands"], 3) for cell in row.values()] for name, row in samplers.items()}
        size = joined(rows["fine"]["bands"], 2)
        title = f"of a coefficient at {', '.join(result['bands'])} cycles per image, which are of size {size}"
        print_table(f"Guidance {scale}: error {title}", columns, table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="folder of a pipeline with Freq-Grid")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[10, 20, 50], help="network evaluations")
    parser.add_argument("--guidance_scale", type=float, nargs="+", help="by default 1, and 2 where the model can")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--cpu_threads", type=int, help="by default all cores")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    use_all_cores(arguments.cpu_threads)
    print_study(study(arguments))


if __name__ == "__main__":
    main()
