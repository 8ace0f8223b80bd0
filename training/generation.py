"""Exactly N images of a pipeline, over any number of processes.

Image i is a function of the seed and of i alone, up to rounding: not of the batch size, nor of the number of
processes. So work that was interrupted goes on where it stopped.
"""

import difflib
import hashlib
import inspect
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator
from diffusers.schedulers import SchedulerMixin
from tqdm.auto import tqdm

import freqgate_dit
from freqgate_dit import FreqGateDiTPipeline
from freqgate_dit.devices import choose_dtype
from freqgate_dit.hub import download
from freqgate_dit.image_folder import as_text
from freqgate_dit.pipelines.pipeline_freqgate_dit import WHY_BROKEN, broken_images
from freqgate_dit.samplers import SAMPLERS, configure, describe_sampler, make_sampler
from freqgate_dit.summary import PipelineSummary, read_summary
from freqgate_dit.training.sample_folder import SampleFolder


# Of a variant, such as float16, the name has one more part.
WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors")


# -- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A pipeline as it is evaluated.

    Args:
        name: last name of its folder, or id of its repository.
        folder: where its files are.
        summary: what they say about it.
        weights: SHA-256 of the file of weights of each part, or of the digests of several; `None` for parts that it
            does not have.
        dtype: of the transformer; everything else computes in float32.
    """

    pipe: FreqGateDiTPipeline
    name: str
    folder: Path
    summary: PipelineSummary
    weights: dict[str, str | None]
    dtype: str


def load_model(pipeline: str, sampler: str | None, dtype: str, device: torch.device) -> Model:
    """The pipeline of a folder or a Hub repository, on `device`.

    Args:
        sampler: as `choose_scheduler` takes it; by default the pipeline's own scheduler.
        dtype: of the transformer, as `choose_dtype` takes it.

    Raises:
        ValueError: if there is no such pipeline or sampler, or it does not make RGB images.
        OSError: if a repository cannot be had, or files are missing or damaged.
    """
    folder = Path(pipeline).expanduser()
    is_local = folder.is_dir()
    if not is_local:
        folder = Path(FreqGateDiTPipeline.download(pipeline))
        download(pipeline, weights=False)
    summary = read_summary(folder)
    if not summary.makes_pixels:
        raise ValueError(
            f"`pipeline` ({pipeline}) makes {summary.size}, and the reference has RGB images: evaluate one that makes "
            "those, or give it the autoencoder that it was trained with."
        )
    number_type = choose_dtype(dtype, device)
    pipe = FreqGateDiTPipeline.from_pretrained(folder, dtype={"transformer": number_type, "default": torch.float32})
    pipe.set_progress_bar_config(disable=True)
    if sampler is not None:
        pipe.scheduler = choose_scheduler(sampler, pipe.scheduler.config)
    pipe.to(device)
    if pipe.vae is not None:
        pipe.vae.to(memory_format=torch.channels_last)
    parts = {"checkpoint": "transformer", "autoencoder": "vae", "text_encoder": "text_encoder"}
    weights = {name: weights_digest(folder / part) for name, part in parts.items()}
    name = folder.resolve().name if is_local else pipeline
    return Model(pipe, name, folder, summary, weights, str(number_type).removeprefix("torch."))


def check_card_folder(pipeline: str):
    """Refuse `update_card` where there is no folder whose card could be updated.

    Raises:
        ValueError: if `pipeline` is no folder of this machine.
    """
    if not Path(pipeline).expanduser().is_dir():
        raise ValueError(
            f"`update_card` needs a pipeline folder, and `pipeline` ({pipeline}) is none: download it, or push "
            "the card by `freqgate-dit push` afterwards."
        )


def weights_digest(folder: Path) -> str | None:
    """SHA-256 of the file of weights in a folder, or of the digests of its shards; `None` if there are none."""
    digests = []
    for path in sorted(folder.glob("*.safetensors")):
        if WEIGHTS.fullmatch(path.name):
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(digests) < 2:
        return digests[0] if digests else None
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def choose_scheduler(name: str, config: dict) -> SchedulerMixin:
    """The sampler of that name, or the scheduler class of this package or of diffusers, from another one's config.

    Raises:
        ValueError: if there is none; names those that are spelled like it.
    """
    if name in SAMPLERS:
        return make_sampler(name, config)
    found = getattr(freqgate_dit, name, None) or getattr(diffusers, name, None)
    if isinstance(found, type) and issubclass(found, SchedulerMixin):
        return configure(found, config)
    known = [other for other in {*dir(freqgate_dit), *dir(diffusers)} if other.endswith("Scheduler")]
    near = difflib.get_close_matches(name, [*SAMPLERS, *known], n=3, cutoff=0.4)
    raise ValueError(
        f"`sampler` ({name}) must be one of {', '.join(SAMPLERS)}, or a scheduler class of diffusers or this package"
        + (f": did you mean {' or '.join(near)}?" if near else ", such as DPMSolverMultistepScheduler.")
    )


def scheduler_arguments(scheduler: SchedulerMixin) -> dict:
    """What a scheduler was made with, as JSON can hold it; of the spectrum of the data a digest."""
    names = inspect.signature(type(scheduler)).parameters
    config = {name: scheduler.config.get(name, scheduler.config.get(f"_{name}")) for name in names}
    if config.get("spectrum") is not None:
        config["spectrum"] = hashlib.sha256(json.dumps(config["spectrum"], sort_keys=True).encode()).hexdigest()
    # Numbers of NumPy and tensors among them.
    return json.loads(json.dumps(config, default=lambda value: value.tolist()))


# -- which classes ----------------------------------------------------------------------------------------------------


def class_sequence(weights: Sequence[int], count: int) -> list[int]:
    """Class of each of `count` images, a function of the arguments alone.

    Class k gets its share `weights[k] / sum(weights)` by the largest remainder, of equal ones the first. Classes are
    interleaved, so that every part of the sequence has about the same mix.
    """
    total = sum(weights)
    numbers = [count * weight // total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda k: -(count * weights[k] % total))
    for k in by_remainder[: count - sum(numbers)]:
        numbers[k] += 1
    places = [((place + 0.5) / number, k) for k, number in enumerate(numbers) for place in range(number)]
    return [k for _, k in sorted(places)]


@dataclass(frozen=True)
class Classes:
    """What is sampled.

    Args:
        argument: of the pipeline's call, "class_labels" or "prompt"; `None` for an unconditional pipeline.
        values: what the call takes for each class.
        names: of the classes.
        mix: "reference", "uniform" or, where there are no classes, "none".
        weights: the share of each class, as whole numbers.
    """

    argument: str | None
    values: tuple
    names: tuple[str, ...]
    mix: str
    weights: tuple[int, ...]


UNCONDITIONAL = Classes(None, (None,), ("all",), "none", (1,))


def choose_classes(
    pipe: FreqGateDiTPipeline,
    mix: str,
    class_names: Sequence[str],
    class_counts: Sequence[int],
    prompt_template: str | None,
) -> Classes:
    """The classes of a pipeline, or of the data where it takes prompts, and how often each is sampled.

    Args:
        mix: "reference" for the shares that the classes have in the reference data, "uniform" for equal ones.
        class_names, class_counts: of the reference data; empty if it has no classes.
        prompt_template: prompt of a class with `{label}` in it, for a pipeline that takes prompts.

    Raises:
        ValueError: if the classes of the pipeline and of the data do not fit; names those that are missing.
    """
    if not pipe.is_conditional:
        return UNCONDITIONAL
    if pipe.is_text_conditional:
        if prompt_template is None or not class_names:
            missing = (
                "`reference` has no classes" if prompt_template else "it does not say which prompts it was trained on"
            )
            raise ValueError(
                f"the pipeline takes prompts, and {missing}: give a `reference` with classes, and `prompt_template`, "
                'such as "A photo of {label}".'
            )
        values = tuple(prompt_template.replace("{label}", name) for name in class_names)
        weights = tuple(class_counts) if mix == "reference" else (1,) * len(values)
        return Classes("prompt", values, tuple(class_names), mix, weights)
    ids = tuple(range(pipe.num_classes))
    names = tuple(as_text(pipe.id2label.get(k, f"class {k}")) for k in ids)  # as those of the data
    if mix == "uniform":
        return Classes("class_labels", ids, names, mix, (1,) * len(ids))
    counts = dict(zip(class_names, class_counts, strict=True))
    for what, absent in (
        ("has no image of classes of the pipeline", [name for name in names if not counts.get(name)]),
        ("has classes that the pipeline does not know", [name for name in counts if name not in names]),
    ):
        if absent:
            listed = ", ".join(absent[:10]) + (f" and {len(absent) - 10} more" if len(absent) > 10 else "")
            raise ValueError(
                f"`reference` {what} ({listed}): give one with the same classes, or sample all classes of the "
                "pipeline equally often by `class_mix` uniform."
            )
    return Classes("class_labels", ids, names, mix, tuple(counts[name] for name in names))


# -- images -----------------------------------------------------------------------------------------------------------


def to_uint8(images: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Images as files hold them: uint8 `(B, 3, H, W)` on the CPU, of images in about [-1, 1].

    Also how many pixels were clipped, that is darker than black or brighter than white by more than rounding.
    """
    levels = ((images.float() * 0.5 + 0.5) * 255).round()
    clipped = ((levels < 0) | (levels > 255)).any(dim=1).sum().item()
    return levels.clamp(0, 255).to(torch.uint8).cpu().contiguous(), clipped


@dataclass(frozen=True)
class Sampler:
    """Images of a model by their numbers: image i is of class `sequence[i]` and has the seed `seed + i`."""

    model: Model
    classes: Classes
    sequence: list[int]
    seed: int
    steps: int
    guidance_scale: float

    def protocol(self) -> dict:
        """What decides about the images beside rounding, as JSON can hold it."""
        scheduler = self.model.pipe.scheduler
        counts = torch.tensor(self.sequence).bincount(minlength=len(self.classes.names)).tolist()
        return {
            "pipeline": self.model.name,
            **self.model.weights,
            "num_images": len(self.sequence),
            "class_mix": self.classes.mix,
            "class_counts": dict(zip(self.classes.names, counts, strict=True)),
            "seed": self.seed,
            "scheduler": type(scheduler).__name__,
            "sampler": describe_sampler(type(scheduler).__name__, scheduler.config),
            "scheduler_config": scheduler_arguments(scheduler),
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "resolution": self.model.summary.resolution,
            "dtype": self.model.dtype,
        }

    @torch.no_grad()
    def images(self, indices: range) -> tuple[torch.Tensor, int]:
        """Images `indices`, uint8 `(B, 3, H, W)`, and how many of their pixels were clipped.

        Raises:
            ValueError: if an image has NaN or infinity in it, or the pipeline refuses the call.
        """
        values = [self.classes.values[self.sequence[index]] for index in indices]
        given = {"num_images_per_label": len(values)}
        if self.classes.argument is not None:
            given = {self.classes.argument: values}
        pipe = self.model.pipe
        latents = pipe(
            **given,
            seed=[self.seed + index for index in indices],
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            output_type="latent",
        ).images
        images = pipe.decode(latents)
        broken = broken_images(images)
        if broken:
            raise ValueError(f"image {indices[broken[0]]} of the pipeline has NaN or infinity in it. {WHY_BROKEN}")
        return to_uint8(images)


def generate(samples: SampleFolder, sampler: Sampler, accelerator: Accelerator, batch_size: int, label: str):
    """Make the images that are missing, shared over the processes.

    Raises:
        ValueError: if the folder holds other images, or the pipeline refuses the call.
    """
    samples.check()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        samples.open()
    accelerator.wait_for_everyone()
    missing = samples.missing(batch_size)
    accelerator.wait_for_everyone()  # all have looked before the first one writes
    count, process, processes = sum(map(len, missing)), accelerator.process_index, accelerator.num_processes
    if accelerator.is_main_process and count < len(samples):
        print(f"{label}: {len(samples) - count} of {len(samples)} images are there already")
    quiet = {} if accelerator.is_main_process else {"disable": True}  # not False, which would overrule TQDM_DISABLE
    start = time.perf_counter()
    with tqdm(total=len(samples), initial=len(samples) - count, desc=label, unit="image", **quiet) as progress:
        for first in range(0, len(missing), processes):
            group = missing[first : first + processes]
            if process < len(group):
                samples.write(group[process], *sampler.images(group[process]))
            progress.update(sum(map(len, group)))  # as all go on at about the same speed
    accelerator.wait_for_everyone()
    seconds = time.perf_counter() - start
    if count:
        accelerator.print(f"{label}: {count} images in {seconds:.1f} s, {count / seconds:.3g} images/s")
