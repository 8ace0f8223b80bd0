"""Train a DiT variant and save it as a pipeline folder.

    accelerate launch training/train.py --config training/configs/demo.yaml
    accelerate launch training/train.py --dataset path/to/images --resolution 64 --max_steps 20000

Every option can stand in the YAML file or on the command line, under the same name. `--dry_run` shows what a run would
do and stops; `--resume latest` goes on with the newest complete checkpoint of `output_dir`.
"""

import contextlib
import math
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.tracking import get_available_trackers
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler
from diffusers.utils import make_image_grid
from tqdm.auto import tqdm


# An uninstalled checkout: `accelerate launch training/train.py` puts this folder, not the root, on the path.
if (Path(__file__).resolve().parents[1] / "setup.py").is_file():
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from freqgate_dit import plots
from freqgate_dit.losses import DiffusionObjective, drop_labels
from freqgate_dit.pipelines.pipeline_freqgate_dit import FreqGateDiTPipeline, vae_scale_factor
from freqgate_dit.training.batches import DROPOUT, Batches, derived_seed
from freqgate_dit.training.checkpoints import (
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
)
from freqgate_dit.training.conditions import load_condition
from freqgate_dit.training.config import ObjectiveConfig, TrainConfig, TrainingRun, parse_config
from freqgate_dit.training.data import BUILT_IN, LabelledImages, describe, load_images
from freqgate_dit.training.ema import NamedEMA
from freqgate_dit.training.hardware import bf16_is_fast, use_all_cores
from freqgate_dit.training.latents import load_or_encode, load_vae
from freqgate_dit.training.report import Metrics, describe_cost
from freqgate_dit.training.validation import Validation
from freqgate_dit.transformer_freqgate_dit import DiTMatmulAttnProcessor


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of `step` (from 0), in optimiser steps: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    decay = 1 - progress if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * decay


def make_schedulers(config: ObjectiveConfig, timestep_spacing: str) -> tuple[DDPMScheduler, EulerDiscreteScheduler]:
    """The scheduler that adds noise in training and the one that samples, from one set of betas."""
    shared = {
        name: getattr(config, name)
        for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    }
    training = DDPMScheduler(**shared)
    # Spacing is set here because `from_config` of a DDPM scheduler would silently fall back to "linspace".
    sampling = EulerDiscreteScheduler(**shared, timestep_spacing=timestep_spacing)
    if not torch.equal(training.alphas_cumprod, sampling.alphas_cumprod):
        raise RuntimeError(
            "DDPMScheduler and EulerDiscreteScheduler disagree on the noise schedule; please report it."
        )
    return training, sampling


# Tokens up to which plain matrix products beat PyTorch's fused attention in training on a CPU, with its maps in memory
# for the backward pass (benchmarks/cpu_attention.py).
SHORT_SEQUENCE = 256


class Trainer:
    """A run: data, model, optimiser, average, and what is done with them at the steps where it is due."""

    def __init__(self, config: TrainingRun):
        self.config = config
        train = config.train
        self.output_dir = Path(train.output_dir)
        self._start_accelerator()
        if train.dry_run:
            self.print(config.to_yaml())
        if (self.output_dir / "config.yaml").exists() and not train.resume and not train.dry_run:
            raise ValueError(
                f"`output_dir` ({self.output_dir}) holds another run: choose another folder, delete it, or go on with "
                "`--resume latest`."
            )
        images, heldout_images = self._load_images()
        self.condition = load_condition(config.condition, images.class_names, self.device)
        self.vae = load_vae(config.latents)
        self.total_steps = train.max_steps or math.ceil(train.num_epochs * len(images) / self.global_batch_size)
        self._build_model()
        self._describe(len(images))
        if train.dry_run:
            return

        self._encode(images, heldout_images)
        self.step, self.stop_requested = 0, False
        self.ema = NamedEMA(self.model, train.ema_decay)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=train.learning_rate,
            betas=(0.9, train.adam_beta2),
            weight_decay=train.weight_decay,
            fused=True,
        )
        if train.resume:
            self._resume()
        self._open_output_dir()
        self._prepare()

    # -- setting up -------------------------------------------------------------------------------------------------

    def print(self, *lines: str, **kwargs):
        self.accelerator.print(*lines, **kwargs)

    def _start_accelerator(self):
        train = self.config.train
        trackers = ("none", *(tracker.value for tracker in get_available_trackers()))
        if train.report_to not in trackers:
            # Accelerate leaves a tracker that is not installed out without a word.
            raise ValueError(f"`report_to` ({train.report_to!r}) is not installed: choose from {trackers}.")
        self.accelerator = Accelerator(
            mixed_precision=self._mixed_precision(),
            log_with=None if train.report_to == "none" else train.report_to,
            project_dir=str(self.output_dir / "logs"),
        )
        use_all_cores(train.cpu_threads)
        supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        if self.accelerator.distributed_type not in supported:
            raise ValueError(
                f"`accelerate launch` is set to {self.accelerator.distributed_type.value}, which this trainer "
                "does not support (the weight average needs whole parameters): use one process or plain --multi_gpu."
            )
        self.device = self.accelerator.device
        self.is_main = self.accelerator.is_main_process
        self.global_batch_size = (
            train.per_device_batch_size * self.accelerator.num_processes * train.gradient_accumulation_steps
        )

    def _load_images(self) -> tuple[LabelledImages, LabelledImages]:
        images, heldout_images = load_images(self.config.data)
        if not len(heldout_images):
            raise ValueError(
                "no image is held out, so there is nothing to validate on: set `heldout_fraction` (say 0.1) or "
                "`heldout_per_class` above 0."
            )
        note = " (built in; train on your own with --dataset FOLDER)" if self.config.data.dataset == BUILT_IN else ""
        self.print(f"data set {self.config.data.dataset}{note}, made {images.resolution} px by --resolution")
        self.print(describe(images, heldout_images))
        self.data_fingerprint = images.fingerprint
        return images, heldout_images

    def _describe(self, num_images: int):
        train, processes = self.config.train, self.accelerator.num_processes
        seen = self.total_steps * self.global_batch_size
        self.print(
            describe_cost(self.model, self._data_bytes(num_images), seen),
            f"batch           {train.per_device_batch_size} per process x {processes} processes x "
            f"{train.gradient_accumulation_steps} accumulation = {self.global_batch_size}; "
            f"{self.total_steps} steps = {seen / num_images:.1f} epochs",
            f"output          {self.output_dir}",
            f"device          {self.device}, mixed precision {self.accelerator.mixed_precision}, "
            f"compile {'on' if train.compile else 'off'}",
            sep="\n",
        )

    def _encode(self, images: LabelledImages, heldout_images: LabelledImages):
        config, accelerator = self.config, self.accelerator
        with accelerator.main_process_first():
            encode = partial(load_or_encode, vae=self.vae, cache_dir=config.latents.cache_dir, device=self.device)
            data = encode(images, flip=config.data.horizontal_flip)
            heldout = encode(heldout_images, flip=False)
        self.batches = Batches(data, self.global_batch_size, config.train.seed, config.objective.stratified)
        self.validation = Validation(
            heldout,
            self.objective.scheduler,
            config.train.num_validation_images,
            config.train.per_device_batch_size,
            accelerator.process_index,
            accelerator.num_processes,
        )

    def _prepare(self):
        """The model as it is trained: attention for this device, checkpointing, compilation, processes."""
        train = self.config.train
        tokens = (self.model.config.sample_size // self.model.config.patch_size) ** 2
        if self.device.type == "cpu" and tokens <= SHORT_SEQUENCE:
            self.model.set_attn_processor(DiTMatmulAttnProcessor())
        if train.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        if train.compile:
            self.model.compile_repeated_blocks(fullgraph=True)
        self.prepared_model, self.prepared_optimizer = self.accelerator.prepare(self.model, self.optimizer)

    def _mixed_precision(self) -> str:
        choice = self.config.train.mixed_precision
        if choice != "auto":
            return choice
        device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        return "bf16" if bf16_is_fast(device) else "no"

    def _build_model(self):
        config = self.config
        channels, size = 3, config.data.resolution
        if self.vae is not None:
            channels = self.vae.config.latent_channels
            factor = vae_scale_factor(self.vae)
            if size % (factor * config.model.patch_size):
                raise ValueError(
                    f"`resolution` ({size}) must be a multiple of {factor * config.model.patch_size}: autoencoder "
                    f"factor {factor} x `patch_size` {config.model.patch_size}."
                )
            size //= factor
        elif size % config.model.patch_size:
            raise ValueError(f"`resolution` ({size}) must be a multiple of `patch_size` ({config.model.patch_size}).")
        torch.manual_seed(config.train.seed)
        self.model = config.model.build(channels, size, self.condition.model_arguments()).to(self.device)
        training, self.sampling_scheduler = make_schedulers(config.objective, config.sampling.timestep_spacing)
        self.objective = DiffusionObjective(
            training,
            config.objective.timestep_sampling,
            config.objective.logit_mean,
            config.objective.logit_std,
            config.objective.min_snr_gamma,
            config.objective.spectral_weight,
        )

    def _data_bytes(self, count: int) -> int:
        config = self.model.config
        sample = config.in_channels * config.sample_size**2
        views = 2 if self.config.data.horizontal_flip else 1
        if self.vae is None:
            return count * views * sample
        moments = 2 if isinstance(self.vae, AutoencoderKL) else 1
        return 4 * count * views * moments * sample

    def _open_output_dir(self):
        """Create the output folder and start what is written into it during the run."""
        self.accelerator.wait_for_everyone()
        if self.is_main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self.config.save(self.output_dir / "config.yaml")
            self.metrics = Metrics(self.output_dir / "metrics.jsonl", self.step)
        if self.config.train.report_to != "none":
            # Trackers take numbers, strings and booleans only.
            settings = {key: "none" if value is None else value for key, value in self.config.to_dict().items()}
            self.accelerator.init_trackers("freqgate_dit", config=settings)

    def _resume(self):
        folder = find_checkpoint(self.config.train.resume, self.output_dir / "checkpoints")
        checkpoint = load_checkpoint(folder, self.device)
        sections = ("data", "model", "condition", "objective")
        fixed = [name for section in sections for name in vars(getattr(self.config, section))]
        now, then = self.config.to_dict(), checkpoint.state["config"]
        for name in (*fixed, "vae", "vae_subfolder", "vae_revision", "seed"):
            if then.get(name) != now[name]:
                raise ValueError(
                    f"`{name}` is {now[name]!r}, but the checkpoint {folder.name} was trained with "
                    f"{then.get(name)!r}: resume with the same value."
                )
        # A path says nothing about what lies there by now: order and labels are those of this data alone.
        if checkpoint.state["data_fingerprint"] != self.data_fingerprint:
            raise ValueError(
                f"`dataset` ({self.config.data.dataset}) holds other training images, names or classes than when the "
                f"checkpoint {folder.name} was saved: restore them, or start a new run in another `output_dir`."
            )
        # A step's place in the data is counted in global batches.
        size = checkpoint.state["global_batch_size"]
        if self.global_batch_size != size:
            raise ValueError(
                f"the global batch is {self.global_batch_size} images, but the checkpoint {folder.name} was trained "
                f"with {size}: choose `per_device_batch_size` and `gradient_accumulation_steps` to match."
            )
        self.model.load_state_dict(checkpoint.tensors["model"])
        self.ema.load(checkpoint.tensors["ema"], checkpoint.state["ema_updates"])
        load_optimizer_tensors(self.optimizer, self.model, checkpoint.tensors["optimizer"])
        self.step = checkpoint.state["step"]
        self.print(f"resuming from {folder.name}")

    # -- the loop ---------------------------------------------------------------------------------------------------

    def train(self):
        config, accelerator = self.config.train, self.accelerator
        progress = tqdm(
            total=self.total_steps, initial=self.step, unit="step", disable=not self.is_main, smoothing=0.05
        )
        self.prepared_model.train()
        if self.step == self.total_steps:
            self.print(
                f"already at step {self.step} of {self.total_steps}: raise `max_steps` or `num_epochs` to go on"
            )
        if self.step == 0:
            self.validate()
        terms_sum, steps_since_log, clock = {}, 0, time.perf_counter()
        while self.step < self.total_steps:
            # Dropout draws from the global generator; all else from (seed, step).
            torch.manual_seed(derived_seed(config.seed, DROPOUT, self.step, accelerator.process_index))
            lr = learning_rate(config, self.step, self.total_steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            global_batch = self.batches.draw(self.step)
            for micro_step in range(config.gradient_accumulation_steps):
                last = micro_step == config.gradient_accumulation_steps - 1
                batch = global_batch.shard(
                    micro_step, accelerator.process_index, accelerator.num_processes, config.per_device_batch_size
                )
                with contextlib.nullcontext() if last else accelerator.no_sync(self.prepared_model):
                    terms = self.loss_terms(batch)
                    accelerator.backward(self.objective.total(terms) / config.gradient_accumulation_steps)
                for name, term in terms.items():
                    terms_sum[name] = terms_sum.get(name, 0) + term.detach().mean()
            grad_norm = accelerator.clip_grad_norm_(self.prepared_model.parameters(), config.max_grad_norm)
            self.prepared_optimizer.step()
            self.prepared_optimizer.zero_grad(set_to_none=True)
            self.ema.step(self.model.parameters())
            self.step += 1
            steps_since_log += 1
            progress.update()

            if self.due(config.log_every):
                self.report(progress, terms_sum, steps_since_log, time.perf_counter() - clock, lr, grad_norm)
                terms_sum, steps_since_log, clock = {}, 0, time.perf_counter()
            # Read once: a signal may come at any moment, and a step that is the last must be saved.
            stopping, pause = self.stop_requested, time.perf_counter()
            if self.due(config.validate_every):
                self.validate()
            if self.due(config.preview_every):
                self.preview()
            if self.due(config.save_every) or stopping:
                # Weights after a gradient that is not finite are lost: they must not push out good checkpoints.
                self.require_finite("gradient norm", grad_norm.item())
                self.save()
            # Validation, previews and saving do not count as training time.
            clock += time.perf_counter() - pause
            if stopping:
                break
        progress.close()
        if self.step < self.total_steps:
            self.print(f"\nstopped and saved at step {self.step} of {self.total_steps}: go on with `--resume latest`")
            self.accelerator.end_training()
            return
        self.finish()

    def report(self, progress, terms_sum: dict, steps: int, seconds: float, lr: float, grad_norm: torch.Tensor):
        """Mean loss terms of the last `steps`, to trackers and progress bar; the only wait for the device."""
        count = steps * self.config.train.gradient_accumulation_steps
        losses = {name: self.accelerator.reduce(value / count, "mean").item() for name, value in terms_sum.items()}
        images_per_second = steps * self.global_batch_size / seconds
        values = {f"train/{name}": value for name, value in losses.items()}
        values |= {"train/lr": lr, "train/grad_norm": grad_norm.item(), "images_per_second": images_per_second}
        self.log(values)
        progress.set_postfix(loss=f"{losses['mse']:.4f}", img_s=f"{images_per_second:.0f}")
        self.require_finite("loss", losses["mse"])

    def require_finite(self, name: str, value: float):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the {name} is {value} at step {self.step}: lower `learning_rate` "
                f"({self.config.train.learning_rate}) and resume with `--resume latest`."
            )

    def stop_on_signal(self, number, frame):
        """Ctrl-C or SIGTERM: finish the step, save, leave. A second one ends the process at once."""
        self.stop_requested = True
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.total_steps

    def loss_terms(self, batch) -> dict[str, torch.Tensor]:
        """Loss terms of a batch, timesteps and dropped conditions taken from its uniforms."""
        labels = batch.labels
        if not self.condition.is_none:
            probability = self.config.objective.class_dropout_prob
            labels = drop_labels(labels, self.condition.null_label, batch.dropout, probability)
        denoise = partial(self.denoise, self.prepared_model, labels=labels)
        return self.objective.terms(denoise, batch.latents, batch.noise, self.objective.timesteps(batch.uniform))

    def denoise(self, model, noisy, timesteps, labels) -> torch.Tensor:
        return model(noisy, timesteps, **self.condition.forward_arguments(labels), return_dict=False)[0]

    # -- what is done on the way ------------------------------------------------------------------------------------

    def log(self, values: dict[str, float]):
        if self.is_main:
            self.metrics.add(self.step, values)
        self.accelerator.log(values, step=self.step)

    def validate(self):
        """Validation loss of the raw and of the averaged weights."""
        self.model.eval()
        values = {}
        for name, context in (("raw", contextlib.nullcontext()), ("ema", self.ema.swapped_into(self.model))):
            with context:
                total = self.validation(partial(self.denoise, self.model))
            summary = self.validation.summarise(self.accelerator.reduce(total, "sum"))
            values |= {f"val_{name}/{key}": value for key, value in summary.items()}
        self.model.train()
        self.log(values)
        if self.is_main:
            raw, ema = values["val_raw/loss"], values["val_ema/loss"]
            tqdm.write(f"step {self.step}: validation loss {raw:.4f} (EMA {ema:.4f})")

    @contextlib.contextmanager
    def ema_pipeline(self):
        """The pipeline as it is published: averaged weights, the scheduler of the same betas, class names."""
        names = self.condition.class_names
        with self.ema.swapped_into(self.model):
            self.model.eval()
            pipeline = FreqGateDiTPipeline(
                self.model,
                EulerDiscreteScheduler.from_config(self.sampling_scheduler.config),
                vae=self.vae,
                text_encoder=self.condition.text_encoder,
                tokenizer=self.condition.tokenizer,
                id2label=dict(enumerate(names)),
                class_dropout_prob=None if self.condition.is_none else self.config.objective.class_dropout_prob,
            )
            # The autoencoder is still on the CPU if the latents came from the cache.
            yield pipeline.to(self.device)
            self.model.train()

    def preview(self):
        """A grid of samples, always of the same labels and seeds."""
        if not self.is_main:
            return
        sampling = self.config.sampling
        count, classes = sampling.num_previews, max(1, len(self.condition.class_names))
        labels = [index * classes // count if classes > count else index % classes for index in range(count)]
        with self.ema_pipeline() as pipeline:
            pipeline.set_progress_bar_config(disable=True)
            images = pipeline(
                **self.condition.pipeline_arguments(labels),
                num_inference_steps=sampling.num_inference_steps,
                guidance_scale=sampling.guidance_scale if pipeline.has_null_condition else 1.0,
                seed=0,
            ).images
        columns = math.ceil(math.sqrt(count))
        rows = math.ceil(count / columns)
        side = max(64, images[0].width)
        images += [images[0].copy().point(lambda _: 255)] * (rows * columns - count)
        grid = make_image_grid([image.resize((side, side), resample=0) for image in images], rows, columns)
        folder = self.output_dir / "previews"
        folder.mkdir(exist_ok=True)
        grid.save(folder / f"step_{self.step:08d}.png")

    def save(self):
        """A checkpoint that `--resume` continues from."""
        if self.is_main:
            Checkpoint(
                tensors={
                    "model": self.model.state_dict(),
                    "ema": self.ema.tensors(),
                    "optimizer": optimizer_tensors(self.optimizer, self.model),
                },
                state={
                    "step": self.step,
                    "ema_updates": self.ema.optimization_step,
                    "global_batch_size": self.global_batch_size,
                    "data_fingerprint": self.data_fingerprint,
                    "config": self.config.to_dict(),
                },
            ).save(self.output_dir / "checkpoints", self.config.train.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def finish(self):
        """The pipeline folder with averaged weights, and the curves."""
        if self.is_main:
            folder = self.output_dir / "pipeline"
            with self.ema_pipeline() as pipeline:
                pipeline.save_pretrained(folder)
            self.config.save(folder / "training_config.yaml")
            plots.loss_curves(self.metrics.series()).savefig(self.output_dir / "loss.png")
            self.print(
                f"\npipeline  {folder}\ncurves    {self.output_dir / 'loss.png'}"
                f"\npreviews  {self.output_dir / 'previews'}"
                f"\n\n  from freqgate_dit import FreqGateDiTPipeline\n"
                f'  pipe = FreqGateDiTPipeline.from_pretrained("{folder}")'
            )
        # No process leaves the group while another needs it, and no model holds it longer than Python does: freed from
        # inside DistributedDataParallel, gloo waits for threads that wait for the interpreter's lock, now and then.
        self.accelerator.wait_for_everyone()
        self.prepared_model = self.prepared_optimizer = None
        self.accelerator.free_memory()
        self.accelerator.end_training()


def main(arguments: list[str] | None = None):
    try:
        config = parse_config(arguments, description=__doc__)
        trainer = Trainer(config)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    if config.train.dry_run:
        trainer.print("dry run: nothing was trained or written")
        return
    # Several processes would have to agree on the step to stop at.
    signals = (signal.SIGINT, signal.SIGTERM) if trainer.accelerator.num_processes == 1 else ()
    previous = {number: signal.signal(number, trainer.stop_on_signal) for number in signals}
    try:
        trainer.train()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
