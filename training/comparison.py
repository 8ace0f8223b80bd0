"""What an evaluation compares: samples of a pipeline, or a folder of images, with reference data."""

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator

from freqgate_dit.features import Images, load_extractor
from freqgate_dit.image_folder import ImageFolder, read_images
from freqgate_dit.metrics import FeatureStatistics, frechet_distance
from freqgate_dit.references import ReferenceCache
from freqgate_dit.training.generation import (
    Sampler,
    choose_classes,
    class_sequence,
    generate,
    load_model,
)
from freqgate_dit.training.references import Reconstructed, band_powers, halves, load_reference, reference_spectrum
from freqgate_dit.training.sample_folder import SampleFolder, check_folder, write_protocol
from freqgate_dit.training.scores import Measured, check_count, compare, counted, frechet_name, memorisation


SWEPT = "guidance_scale"


@dataclass
class Results:
    """The numbers of an evaluation.

    Args:
        images: the images that they are of.
        sampler: of them, or `None` for a folder of images.
        count: number of the real images that they were compared with.
        metrics: of `images`, as `Evaluation` takes them.
        floors: kind of the images in their place -> the same metrics of those.
        sweep: by which the guidance scale was chosen: "distances", value -> distance, their "name", and "chosen".
    """

    images: Images
    sampler: Sampler | None
    count: int
    metrics: list[dict]
    floors: dict[str, list[dict]] = field(default_factory=dict)
    sweep: dict | None = None


class Comparison:
    """Everything is checked when it is made; then all processes [`prepare`], and the main one can [`measure`].

    Args:
        given: the arguments of `evaluation.py`, checked.

    Raises:
        ValueError, OSError, ImportError: if something that was named is not there, or does not fit the rest.
    """

    def __init__(self, given: argparse.Namespace, accelerator: Accelerator):
        self.given, self.accelerator, self.device = given, accelerator, accelerator.device
        self.model = self.folder = None
        with accelerator.local_main_process_first():  # it downloads, and reads every image
            if given.pipeline:
                self.model = load_model(given.pipeline, given.sampler, given.dtype, self.device)
            else:
                self.folder = _read_folder(given)
            self.extractor = load_extractor(
                given.features, given.inception_path, self.device, given.features_dtype, given.cache_dir
            )
            self.resolution = self._resolution()
            summary = self.model.summary if self.model else None
            self.reference = load_reference(given.reference, given.split, self.resolution, summary, given.cache_dir)
            self.train = self._training_images()
        self._check_counts()
        self.samplers = self._make_samplers() if self.model else {}
        self.samples = {scale: self._sample_folder(scale) for scale in self.samplers}
        self._claim_folder()

    def _resolution(self) -> int:
        resolution = self.model.summary.resolution if self.model else self.folder.resolution
        if self.given.resolution not in (None, resolution):
            raise ValueError(
                f"`resolution` ({self.given.resolution}) is not that of the images that are evaluated, {resolution}: "
                "leave it out, or evaluate images of that size."
            )
        return resolution

    def _training_images(self) -> Images | None:
        """Images of which copies are looked for."""
        wanted = self.given.train_reference
        if wanted:
            return load_reference(wanted, "all", self.resolution, cache_dir=self.given.cache_dir).images
        if wanted == "" and self.reference.train is None:
            raise ValueError(
                "`train_reference` without a value is the training part of `reference`, of which the held-out part "
                f"must then be compared (now `split` {self.reference.split}): name the training images."
            )
        return self.reference.train if wanted == "" else None

    def _check_counts(self):
        force, real = self.given.force, len(self.reference.images)
        what, count = (
            ("`num_images` is", self.given.num_images) if self.model else ("`images` holds", len(self.folder))
        )
        check_count(what, count, force)
        check_count("`reference` holds", real, force)
        if self.given.sweep or (self.given.floors and self.reference.train is None):
            check_count("half of `reference` holds", real // 2, force)
        elif self.given.floors:
            check_count("the training part of `reference` holds", len(self.reference.train), force)

    def _make_samplers(self) -> dict[float, Sampler]:
        """By guidance scale."""
        given, pipe = self.given, self.model.pipe
        config = self.model.summary.training_config or {}
        template = given.prompt_template or config.get("prompt_template")
        names = self.reference.images.class_names
        classes = choose_classes(pipe, given.class_mix, names, self.reference.class_counts, template)
        sequence = class_sequence(classes.weights, given.num_images)
        scales = given.sweep or [pipe.default_guidance_scale if given.guidance_scale is None else given.guidance_scale]
        return {scale: Sampler(self.model, classes, sequence, given.seed, given.steps, scale) for scale in scales}

    def _sample_folder(self, scale: float) -> SampleFolder:
        folder = self.given.out / f"{SWEPT}={scale:g}" if self.given.sweep else self.given.out
        protocol = self.samplers[scale].protocol()
        samples = SampleFolder(folder, protocol, self.given.num_images, self.resolution, self.device.type)
        samples.check()
        return samples

    def _claim_folder(self):
        """Refuse a folder with another evaluation, and say in it whose it is."""
        if self.model and not self.given.sweep:
            return  # generation does
        if self.model:
            protocol = {**next(iter(self.samples.values())).protocol, SWEPT: list(self.samples)}
        else:
            protocol = {"images": Path(self.given.images).resolve().name, "fingerprint": self.folder.fingerprint}
        check_folder(self.given.out, protocol)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_protocol(self.given.out, protocol)

    # -- by all processes ---------------------------------------------------------------------------------------------

    def prepare(self):
        """Make the samples, and the features of all that is compared."""
        given, reference = self.given, self.reference
        for scale, samples in self.samples.items():
            label = f"sampling, guidance {scale:g}" if given.sweep else "sampling"
            generate(samples, self.samplers[scale], self.accelerator, given.batch_size, label)
        self.caches = {"reference": self._extract(reference.images, reference.split)}
        if self.train is not None:
            self.caches["copied"] = self._extract(self.train, "train")
        if given.floors and reference.train is not None:
            self.caches["train"] = self._extract(reference.train, "train")
        if given.floors and self.model and self.model.pipe.vae is not None:
            self.reconstructed = Reconstructed(
                reference.images, self.model.pipe.vae, self.model.weights["autoencoder"]
            )
            self.caches["reconstructed"] = self._extract(self.reconstructed, f"{reference.split}, reconstructed")
        for scale, samples in self.samples.items():
            self.caches[scale] = self._extract(samples, "samples", samples.samples)
        if not self.model:
            self.caches[None] = self._extract(self.folder, "images")

    def _extract(self, images: Images, split: str, folder: Path | None = None) -> ReferenceCache:
        """Features in the cache of this machine, or in `folder` on a disk that all processes share."""
        cache = ReferenceCache(images, self.extractor, split, folder or self.given.cache_dir)
        share = self.accelerator.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if folder is not None:
            share = self.accelerator.process_index, self.accelerator.num_processes
        cache.extract(*share, self.given.batch_size)
        self.accelerator.wait_for_everyone()
        return cache

    # -- by the main process ------------------------------------------------------------------------------------------

    def measure(self) -> Results:
        """All numbers, of the best guidance scale if there are several."""
        reference = self.reference
        self.mean, powers = reference_spectrum(reference.images, self.caches["reference"].folder, reference.split)
        self.whole = Measured(self.caches["reference"].load().features, powers)
        scale, label, sweep = next(iter(self.samples), None), reference.label, None
        rows = torch.arange(len(self.whole))
        if self.given.sweep:
            first, rows = halves(reference.images)
            sweep = self._choose(self.whole.features[first])
            scale, label = sweep["chosen"], f"{label}_half_b"
        real = self.whole.rows(rows)
        images = self.samples[scale] if self.model else self.folder
        fake = self._measured(scale, images, "samples")
        number = counted(len(fake), len(real))
        strata = self.samplers[scale].sequence if self.model else None
        metrics = self._compare(real, fake, number, label, strata=strata, resamples=self.given.bootstrap)
        if self.train is not None:
            train = self.caches["copied"].load().features
            name = self.extractor.name
            metrics += memorisation(fake.features, train, real.features, name, number, self.device)
        floors = self._floors(real, rows, label, len(fake)) if self.given.floors else {}
        return Results(images, self.samplers.get(scale), len(real), metrics, floors, sweep)

    def _compare(self, real: Measured, fake: Measured, number: str, label: str, **more) -> list[dict]:
        return compare(real, fake, self.extractor.name, number, label, self.resolution, self.device, **more)

    def _measured(self, key, images: Images, label: str) -> Measured:
        return Measured(self.caches[key].load().features, band_powers(images, self.mean, label=label))

    def _choose(self, real: torch.Tensor) -> dict:
        """The guidance scale whose samples are nearest to one half of the reference."""
        statistics = FeatureStatistics.of(real)
        distances = {
            scale: frechet_distance(statistics, self.caches[scale].load().statistics()) for scale in self.samples
        }
        number = counted(self.given.num_images, len(real))
        name = frechet_name(self.extractor.name, number, f"{self.reference.label}_half_a")
        return {"name": name, "distances": distances, "chosen": min(distances, key=distances.get)}

    def _floors(self, real: Measured, rows: torch.Tensor, label: str, count: int) -> dict[str, list[dict]]:
        """Real images, and the autoencoder's reconstructions, in place of samples.

        Args:
            rows: which images of the reference are `real`.
            label: name of `real`.
            count: number of the samples: as many training images, or as many as there are.
        """
        floors = {}
        if self.reference.train is not None:
            train = self.reference.train
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:count].sort().values
            powers = band_powers(train, self.mean, order.tolist(), "train")
            fake = Measured(self.caches["train"].load().features[order], powers)
            floors["train"] = self._compare(real, fake, counted(len(fake), len(real), "train"), label)
        else:
            first, second = halves(self.reference.images)
            fake, other = self.whole.rows(first), self.whole.rows(second)
            number = counted(len(fake), len(other), "half_a")
            floors["half"] = self._compare(other, fake, number, f"{self.reference.label}_half_b")
        if "reconstructed" in self.caches:
            fake = self._measured("reconstructed", self.reconstructed, "reconstructions").rows(rows)
            number = counted(len(fake), len(real), "reconstructed")
            floors["reconstructed"] = self._compare(real, fake, number, label)
        return floors


def _read_folder(given: argparse.Namespace) -> ImageFolder:
    try:
        return read_images(given.images, given.resolution, refuse_jpeg=not given.force)
    except ValueError as error:
        raise ValueError(f"`images` ({given.images}) cannot be evaluated: {error}") from error
