"""Samplers against a trained network's own accurate solution from the same noise, and against data.

    python benchmarks/samplers.py --pipeline runs/mine/pipeline --latents CACHE_FOLDER --guidance_scale 1 2 \
        --reference images.parquet --features networks.py:load --out results/samplers_mine.json

For each sampler and number of network evaluations: the error of a value (root mean square) against Heun with many
steps, and the variance per band over that of the data; with `--reference` also distances between the decoded samples
and real images. All start from the same noise and labels. The error is the solver's. (diffusers' DPM-Solver++ and
UniPC ask the network at whole timesteps, also on grids that lie between them; at 20 evaluations that is less than a
twentieth of their error.) A distance is the network's as well, and on an under-trained network variance that a solver
loses can flatter it.

`--latents` is the folder of the trainer's cache that holds the training latents.
"""

import argparse
import time
from pathlib import Path

import torch
from compared_samplers import COMPARED, compared_scheduler, joined, steps_for
from output import print_table, write_result
from safetensors.torch import load_file
from tqdm.auto import tqdm

from freqgate_dit import FreqGateDiTPipeline
from freqgate_dit.features import CACHE_DIR, load_extractor
from freqgate_dit.metrics import FeatureStatistics, frechet_distance, kernel_distance
from freqgate_dit.pipelines.pipeline_freqgate_dit import decode_from_latents
from freqgate_dit.references import reference_statistics
from freqgate_dit.spectral import SpectrumStatistics, dct2, octave_bands, octave_labels
from freqgate_dit.summary import read_summary
from freqgate_dit.training.generation import to_uint8
from freqgate_dit.training.hardware import use_all_cores
from freqgate_dit.training.references import load_reference


# Accurate solutions, of which the first is what errors are measured against; the others show how well it is known.
ACCURATE = ("Heun, Karras", "DPM-Solver++(2M), Lu", "spectral, own grid, 2nd order")


class Network:
    """A pipeline that starts every sampler from the same: sample i has the seed i, and the classes alternate."""

    def __init__(self, folder: Path, samples: int, batch_size: int):
        self.pipe = FreqGateDiTPipeline.from_pretrained(folder)
        self.pipe.set_progress_bar_config(disable=True)
        self.config = dict(self.pipe.scheduler.config)
        self.samples, self.batch_size = samples, batch_size

    @property
    def shape(self) -> tuple[int, int, int, int]:
        config = self.pipe.transformer.config
        return self.batch_size, config.in_channels, config.sample_size, config.sample_size

    @property
    def resolution(self) -> int:
        return self.pipe.transformer.config.sample_size * self.pipe.vae_scale_factor

    def sample(self, scheduler, steps: int, guidance_scale: float) -> torch.Tensor:
        """Latents `(samples, C, H, W)`."""
        self.pipe.scheduler = scheduler
        parts = []
        for seeds in torch.arange(self.samples).split(self.batch_size):
            given = {"num_images_per_label": len(seeds)}
            if self.pipe.num_classes is not None:
                given = {"class_labels": (seeds % self.pipe.num_classes).tolist()}
            options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "latent"}
            parts.append(self.pipe(**given, seed=seeds.tolist(), **options).images)
        return torch.cat(parts)

    @torch.no_grad()
    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """As files hold them, uint8 `(N, 3, H, W)`."""
        vae = self.pipe.vae
        return torch.cat([to_uint8(x if vae is None else decode_from_latents(vae, x))[0] for x in latents.split(32)])


class Distances:
    """Distances of samples to real images in the features of a network."""

    def __init__(self, arguments: argparse.Namespace, resolution: int):
        summary = read_summary(arguments.pipeline)
        reference = load_reference(arguments.reference, None, resolution, summary, CACHE_DIR)
        self.extractor = load_extractor(arguments.features)
        self.real = reference_statistics(reference.images, self.extractor, reference.split).features
        self.statistics = FeatureStatistics.of(self.real)
        self.name = f"{self.extractor.name}_{{}}_vs_{reference.label}"

    def __call__(self, pictures: torch.Tensor) -> dict:
        features = torch.cat([self.extractor(batch) for batch in pictures.split(32)])
        kernel = kernel_distance(self.real, features)
        return {
            "frechet": frechet_distance(self.statistics, FeatureStatistics.of(features)),
            "kernel_1e3": 1e3 * kernel.value,
        }


def read_statistics(folder: Path) -> SpectrumStatistics:
    """Of all views of a trainer's cache folder, without the noise that a KL autoencoder's posterior adds."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SystemExit(f"`latents` ({folder}) has no .safetensors files: name a folder of the trainer's cache.")
    statistics = SpectrumStatistics()
    for file in files:
        latents = load_file(file)["mean"].flatten(0, 1)
        for batch in (latents.float() / 127.5 - 1 if latents.dtype == torch.uint8 else latents).split(1024):
            statistics.update(batch)
    return statistics


def milliseconds_of_step(scheduler, shape: tuple, steps: int = 20) -> float:
    """Median time of the scheduler's own part of a step."""
    scheduler.set_timesteps(steps)
    x, times = torch.randn(shape) * scheduler.init_noise_sigma, []
    for t in scheduler.timesteps:
        output = scheduler.scale_model_input(x, t)
        start = time.perf_counter()
        x = scheduler.step(output, t, x).prev_sample
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[len(times) // 2]


def variance_per_octave(latents: torch.Tensor, power: torch.Tensor) -> list[float]:
    """Variance of the samples' coefficients over power of the data, mean over each octave."""
    ratio = dct2(latents.double()).var(0) / power
    bands = octave_bands(*power.shape[-2:])
    return [ratio[:, bands == band].mean().item() for band in range(int(bands.max()) + 1)]


def rmse(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.double() - other.double()).square().mean().sqrt().item()


def study(arguments: argparse.Namespace) -> dict:
    network = Network(arguments.pipeline, arguments.samples, arguments.batch_size)
    statistics = read_statistics(arguments.latents)
    spectrum, power = statistics.spectrum(), statistics.power
    distances = Distances(arguments, network.resolution) if arguments.reference else None
    names = [name for name in COMPARED if name in (arguments.samplers or COMPARED)]
    schedulers = {name: compared_scheduler(name, network.config, spectrum) for name in COMPARED}
    result = {
        "torch": torch.__version__,
        "pipeline": arguments.pipeline.parent.name,
        "prediction_type": network.pipe.config.prediction_type,
        "samples": arguments.samples,
        "latents": statistics.count,
        "spectrum": spectrum,
        "evaluations": arguments.evaluations,
        "reference_steps": arguments.reference_steps,
        "distance": distances and distances.name.format(arguments.samples),
        "bands": octave_labels(*power.shape[-2:]),
        "milliseconds_of_step": {name: milliseconds_of_step(schedulers[name], network.shape) for name in names},
        "guidance": {},
    }
    runs = len(arguments.guidance_scale) * (len(ACCURATE) + len(names) * len(arguments.evaluations))
    with tqdm(total=runs, desc="sampling", unit="run") as progress:

        def measure(name: str, count: int, scale: float, accurate: torch.Tensor | None) -> tuple[dict, torch.Tensor]:
            progress.set_postfix_str(f"{name}, {count} evaluations, guidance {scale}")
            latents = network.sample(schedulers[name], steps_for(name, count), scale)
            row = {"variance": variance_per_octave(latents, power)}
            if accurate is not None:
                row = {"error": rmse(latents, accurate), **row}
            if distances and (accurate is None or count in arguments.distance_evaluations):
                row |= distances(network.pictures(latents))
            progress.update()
            return row, latents

        for scale in arguments.guidance_scale:
            first, *others = ACCURATE
            row, accurate = measure(first, 2 * arguments.reference_steps, scale, None)
            rows = {"accurate": row, "uncertainty": {}, "samplers": {name: {} for name in names}}
            result["guidance"][scale] = rows
            for name in others:
                other, _ = measure(name, 2 * arguments.reference_steps, scale, accurate)
                rows["uncertainty"][name] = other["error"]
            for name in names:
                for count in arguments.evaluations:
                    rows["samplers"][name][count] = measure(name, count, scale, accurate)[0]
                write_result(result, arguments.out)  # hours of work: what is measured is kept
    return result


def print_study(result: dict):
    columns = [f"{count} evaluations" for count in result["evaluations"]]
    bands = ", ".join(result["bands"])
    for scale, rows in result["guidance"].items():
        known = " and ".join(f"{error:.4f} to {name}" for name, error in rows["uncertainty"].items())
        samplers = rows["samplers"]
        errors = {name: [f"{cell['error']:.4f}" for cell in row.values()] for name, row in samplers.items()}
        print_table(f"Guidance {scale}: error of a value (accurate solutions: {known})", columns, errors)
        table = {**samplers, "accurate": dict.fromkeys(columns, rows["accurate"])}
        variances = {name: [joined(cell["variance"], 2) for cell in row.values()] for name, row in table.items()}
        print_table(f"Guidance {scale}: variance / power of the data ({bands} cycles per image)", columns, variances)
        if result["distance"]:
            shown = {
                name: [
                    f"{cell['frechet']:.3f}, {cell['kernel_1e3']:.2f}" if "frechet" in cell else ""
                    for cell in row.values()
                ]
                for name, row in table.items()
            }
            title = f"Guidance {scale}: fd_{result['distance']}, and 1,000 x kd"
            print_table(title, columns, shown)
    times = {name: [f"{value:.2f}"] for name, value in result["milliseconds_of_step"].items()}
    print_table("The scheduler's own part of a step", ["milliseconds"], times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="folder of a pipeline")
    parser.add_argument("--latents", type=Path, required=True, help="folder of the trainer's cache with the latents")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[5, 10, 20, 50], help="network evaluations")
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[1.0])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--reference_steps", type=int, default=100, help="of Heun; the others take twice that")
    parser.add_argument("--samplers", nargs="+", choices=COMPARED, metavar="NAME", help=f"of: {'; '.join(COMPARED)}")
    parser.add_argument("--reference", help="real images for distances, as `training/evaluation.py` takes them")
    parser.add_argument("--features", default="inception", help="network for distances, likewise")
    parser.add_argument("--distance_evaluations", type=int, nargs="+", default=[10, 20], help="where to measure them")
    parser.add_argument("--cpu_threads", type=int, help="by default all cores")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    use_all_cores(arguments.cpu_threads)
    result = study(arguments)
    print_study(result)


if __name__ == "__main__":
    main()
