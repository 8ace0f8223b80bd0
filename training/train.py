"""Train a DiT variant and save it as a pipeline folder.

    python training/train.py --dataset path/to/images
    accelerate launch --multi_gpu training/train.py --config training/configs/demo.yaml    # on several GPUs

Every option can stand in the YAML file or on the command line, under the same name. Without a file your own images are
trained in pixels by the preset photos64.yaml, from `--resolution 128` on by photos128.yaml. `--dry_run` shows what a
run would do and stops; `--resume latest` goes on with the newest complete checkpoint of `output_dir`.
"""

import contextlib
import math
import os
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError


# An uninstalled checkout: `accelerate launch training/train.py` puts this folder, not the root, on the path.
if (Path(__file__).resolve().parents[1] / "setup.py").is_file():
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from freqgate_dit.devices import is_out_of_memory
from freqgate_dit.files import replace_file
from freqgate_dit.hub import prepare_repository
from freqgate_dit.ladder import Ladder, switch_sigmas
from freqgate_dit.losses import drop_labels
from freqgate_dit.pipelines.pipeline_freqgate_dit import FreqGateDiTPipeline
from freqgate_dit.training.batches import DROPOUT, Batches, derived_seed
from freqgate_dit.training.checkpoints import (
    Checkpoint,
    CheckpointError,
    average_group,
    checkpoint_folders,
    find_checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    step_of,
)
from freqgate_dit.training.conditions import load_condition
from freqgate_dit.training.config import TrainingRun, parse_config, preset_for
from freqgate_dit.training.cost import describe_cost, describe_ladder
from freqgate_dit.training.data import BUILT_IN, LabelledImages, describe, load_images
from freqgate_dit.training.ema import WeightAverages
from freqgate_dit.training.guards import UpdateGuard
from freqgate_dit.training.hardware import memory_bytes, wait_for
from freqgate_dit.training.initialise import initialise, read_source
from freqgate_dit.training.latents import (
    LatentCache,
    data_bytes,
    data_statistics,
    estimated_statistics,
    load_vae,
    sample_shape,
    scale_warning,
)
from freqgate_dit.training.launching import resume_command, start_accelerator
from freqgate_dit.training.lock import lock, unlock_all
from freqgate_dit.training.logbook import Logbook
from freqgate_dit.training.optimizers import make_optimizer
from freqgate_dit.training.posthoc_ema import save_snapshot
from freqgate_dit.training.preflight import check_disk, gib, refuse_other_folder, refuse_writing_into_data, run_bytes
from freqgate_dit.training.previews import preview_grid
from freqgate_dit.training.publishing import training_summary, write_pipeline
from freqgate_dit.training.pushes import Pushes
from freqgate_dit.training.resume import fingerprints_of, refuse_other_run
from freqgate_dit.training.schedules import (
    is_spread,
    learning_rate,
    make_band_weights,
    make_objective,
    make_sampling_scheduler,
    make_scheduler,
    tell_spectrum,
)
from freqgate_dit.training.shares import ViewShares
from freqgate_dit.training.stopping import StopRequest
from freqgate_dit.training.validation import Validation, ValidationResult
from freqgate_dit.transformer_freqgate_dit import DiTMatmulAttnProcessor


# Tokens up to which plain matrix products beat PyTorch's fused attention in training on a CPU, with its maps in memory
# for the backward pass (benchmarks/cpu_attention.py).
SHORT_SEQUENCE = 256


class Trainer:
    """A run: data, model, optimiser, averages, and what is done with them at the steps where it is due."""

    def __init__(self, config: TrainingRun):
        self.config = config
        train = config.train
        self.output_dir = Path(train.output_dir)
        self.accelerator = start_accelerator(train)
        self.device = self.accelerator.device
        self.is_main = self.accelerator.is_main_process
        self.global_batch_size = (
            train.per_device_batch_size * self.accelerator.num_processes * train.gradient_accumulation_steps
        )
        if train.dry_run:
            self.print(config.to_yaml())
        refuse_writing_into_data(config)
        if not train.dry_run:
            refuse_other_folder(self.output_dir, train.resume)
            if self.is_main and self.output_dir.exists():
                lock(self.output_dir)
        images, heldout_images = self._load_images()
        self.condition = load_condition(config.condition, images.class_names, self.device)
        self.can_guide = not self.condition.is_none and config.objective.class_dropout_prob > 0
        self._refuse_untrained_guidance()
        self.vae = load_vae(config.latents)
        self.total_steps = self._steps(train.max_steps, train.num_epochs, len(images))
        self.checkpoint = self._find_checkpoint()
        self._build_model()
        self._describe(len(images))
        if train.dry_run:
            self._estimate_ladder(images)
            return

        check_disk(self.output_dir, self._run_bytes())
        self.repo_id = self._prepare_repository()
        self.data_sets = images, heldout_images
        self.step = 0
        self.fingerprints = fingerprints_of(self.data_sets, self.vae, self.condition)
        self.averages = WeightAverages(self.model, train.ema)
        self.optimizer = make_optimizer(self.model, train)
        self.guard = UpdateGuard(self.optimizer, self.device, train.max_skipped_steps)
        if self.checkpoint is not None:
            self._resume()
        self._encode(images, heldout_images)
        check_disk(self.output_dir, self._run_bytes())  # again, as encoded data may have filled it
        self._open_output_dir()
        self._prepare()

    # -- setting up -------------------------------------------------------------------------------------------------

    def print(self, *lines: str, **kwargs):
        self.accelerator.print(*lines, **kwargs)

    def _prepare_repository(self) -> str | None:
        """In the main process: the repository to push to, which is there and can be written to; or `None`."""
        hub, train = self.config.hub, self.config.train
        if not hub.push_to_hub or train.dry_run or not self.is_main:
            return None
        repo_id = prepare_repository(hub.hub_model_id or self.output_dir.resolve().name, hub.hub_private or None)
        self.print(f"pushing to {repo_id} on the Hub, every {train.save_every} steps and at the end")
        return repo_id

    def _load_images(self) -> tuple[LabelledImages, LabelledImages]:
        # A dry run leaves nothing behind, not even an index of the images.
        index_dir = None if self.config.train.dry_run else self.config.latents.cache_dir
        with self.accelerator.local_main_process_first():  # it reads every image; the others take its index
            images, heldout_images = load_images(self.config.data, index_dir)
        note = " (built in; train on your own with --dataset FOLDER)" if self.config.data.dataset == BUILT_IN else ""
        self.print(f"data set {self.config.data.dataset}{note}, made {images.resolution} px by --resolution")
        self.print(describe(images, heldout_images))
        if not len(heldout_images):
            self.print(
                "note: no image is held out (`heldout_fraction`, `heldout_per_class`): validation is on the training "
                "images, and says how well they are fitted, not what the model makes of others"
            )
        return images, heldout_images

    def _steps(self, max_steps: int | None, num_epochs: int | None, num_images: int) -> int:
        return max_steps or math.ceil(num_epochs * num_images / self.global_batch_size)

    def _refuse_untrained_guidance(self):
        scale = self.config.sampling.guidance_scale
        if scale != 1 and not self.condition.is_none and not self.can_guide:
            raise ValueError(
                f"`guidance_scale` is {scale:g}, but with `class_dropout_prob` 0 the model never learns the null "
                "condition that guidance needs: set `class_dropout_prob` (0.1 is usual), or `guidance_scale` 1."
            )

    def _build_model(self):
        config = self.config
        channels, size = sample_shape(self.vae, config.data.resolution, config.model.patch_size)
        self.model = config.model.build(channels, size, self.condition.model_arguments(), config.objective)
        self.model.initialize_weights(config.train.seed)
        self.model.to(self.device)
        self.objective = make_objective(config.objective, make_scheduler(config.objective))
        # A resumed run has weights of its own; what it once started from may be gone by now.
        if config.train.init_from and self.checkpoint is None:
            self._initialise()

    def _initialise(self):
        with self.accelerator.main_process_first():  # it downloads, the others find it in the cache
            source = read_source(self.config.train.init_from, self.config.train.init_revision)
        self.print(initialise(self.model, source, self.condition.class_names))
        ours = self.config.objective.prediction_type
        if source.prediction_type not in (None, ours):
            self.print(
                f"  note: the source predicts {source.prediction_type}, this run {ours} (`prediction_type`): its last "
                "layers will have to be learned anew"
            )

    def _describe(self, num_images: int):
        train, processes = self.config.train, self.accelerator.num_processes
        seen = self.total_steps * self.global_batch_size
        self.print(
            describe_cost(
                self.model,
                data_bytes(num_images, self.config.data.resolution, self.vae, self.config.data.horizontal_flip),
                seen,
                len(train.ema),
            ),
            f"batch           {train.per_device_batch_size} per process x {processes} processes x "
            f"{train.gradient_accumulation_steps} accumulation = {self.global_batch_size}; "
            f"{self.total_steps} steps = {seen / num_images:.1f} epochs",
            f"output          {self.output_dir}, {gib(self._run_bytes())} at most",
            f"device          {self.device}, mixed precision {self.accelerator.mixed_precision}, "
            f"compile {'on' if train.compile else 'off'}",
            sep="\n",
        )
        if train.warmup_steps >= self.total_steps:
            self.print(
                f"note: warm-up (`warmup_steps` {train.warmup_steps}) takes all {self.total_steps} steps: the "
                "learning rate never reaches its peak"
            )

    def _estimate_ladder(self, images: LabelledImages):
        if self.config.model.grid_views == 1:
            return
        statistics = estimated_statistics(images, self.vae, self.config.data.horizontal_flip, self.device)
        tell_spectrum(self.model, statistics, self.objective, self.config.objective.grid_price)
        self._make_shares()
        self.print(f"{'':16}(by the spectrum of {statistics.count} images; a run measures it by more of them)")

    def _make_shares(self):
        """Of a model with views: the ladder by the spectrum that it knows, and each view's share of a micro-batch."""
        self.ladder = self.shares = None
        if self.config.model.grid_views == 1:
            return
        self.ladder = Ladder.of(self.model, self.objective.timestep_distribution().diff())
        self.shares = ViewShares.of(self.model, self.objective, self.config.train.per_device_batch_size)
        model, counts = self.model, self.shares.counts
        embeds = model.patch_embed, *model.coarse_patch_embeds
        heads = model.proj_out, *model.coarse_proj_outs
        for embed, head, count in zip(embeds, heads, counts, strict=True):
            embed.requires_grad_(count > 0)  # processes would wait for gradients of what is not used
            head.requires_grad_(count > 0)
        self.print(describe_ladder(model, self.ladder, counts, self.total_steps * self.global_batch_size))

    def _run_bytes(self) -> int:
        others = self.vae, self.condition.text_encoder
        pushed = self.config.hub.push_to_hub
        return run_bytes(self.model, self.total_steps, self.config.train, *others, pushed=pushed)

    def _find_checkpoint(self) -> Path | None:
        resume = self.config.train.resume
        if not resume:
            return None
        found = find_checkpoint(resume, self.output_dir / "checkpoints", tell=self.print)
        if found is None:
            self.print("nothing to resume yet: starting at step 0")
        return found

    def _resume(self):
        checkpoint = load_checkpoint(self.checkpoint, self.device)
        state, name = checkpoint.state, self.checkpoint.name
        refuse_other_run(self.config, name, state, self.fingerprints, self.global_batch_size)
        self.model.load_state_dict(checkpoint.tensors["model"])
        averages = {name: checkpoint.tensors[average_group(name)] for name in state["ema"]}
        self.averages.load(averages, state["averages"])
        load_optimizer_tensors(self.optimizer, self.model, checkpoint.tensors["optimizer"])
        self.step = state["step"]
        self.print(f"resuming from {name}")
        now, before = self.accelerator.mixed_precision, state.get("mixed_precision")
        if before not in (None, now):
            self.print(
                f"  note: it was trained with mixed precision {before}, this machine goes on with {now}: say "
                f"`--mixed_precision {before}` to go on as before"
            )
        size, before = self.config.train.per_device_batch_size, state["config"]["per_device_batch_size"]
        if self.config.model.grid_views > 1 and size != before:
            self.print(
                f"  note: it was trained with `per_device_batch_size` {before}. With {size} the views have other "
                "shares of a batch, so noise levels will be others than there: as good, but not the same run"
            )
        self._compare_lengths(name, state["config"])
        later = [path.name for path in checkpoint_folders(self.output_dir / "checkpoints") if path.name > name]
        if later:
            self.print(f"  the first save deletes what lies beyond it: {', '.join(later)}")

    def _compare_lengths(self, name: str, before: dict):
        """Refuse to end before the checkpoint `name`, and tell what another length does to the learning rate."""
        train, total = self.config.train, self.total_steps
        option = "max_steps" if train.max_steps else "num_epochs"
        if self.step > total:
            raise ValueError(
                f"`{option}` ({getattr(train, option)}) ends the run at step {total}, and the checkpoint {name} is "
                f"beyond that: raise it to go on, or name an earlier checkpoint, if one is kept, as `--resume FOLDER`."
            )
        total_before = self._steps(before["max_steps"], before["num_epochs"], len(self.data_sets[0]))
        if total_before != total and train.lr_schedule != "constant" and self.step < total:
            last, next_ = (
                learning_rate(train, step, steps)
                for step, steps in ((self.step - 1, total_before), (self.step, total))
            )
            self.print(
                f"  note: the learning rate goes on at {next_:.3g} after {last:.3g}, because `lr_schedule` "
                f"{train.lr_schedule} is laid over the whole run, which had {total_before} steps and now has {total}"
            )

    def _encode(self, images: LabelledImages, heldout_images: LabelledImages):
        config, accelerator = self.config, self.accelerator
        train_cache = LatentCache(images, self.vae, config.data.horizontal_flip, config.latents.cache_dir)
        heldout_cache = train_cache
        if len(heldout_images):
            heldout_cache = LatentCache(heldout_images, self.vae, False, config.latents.cache_dir)
        # The processes of a machine share the work; each machine may have a disk of its own.
        share = accelerator.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        caches = dict.fromkeys((train_cache, heldout_cache))
        for cache in caches:
            cache.encode(self.device, *share)
        accelerator.wait_for_everyone()
        resident = config.latents.data_on_device
        loaded = {cache: cache.load(self.device, resident) for cache in caches}
        data, heldout = loaded[train_cache], loaded[heldout_cache]
        statistics = data_statistics(data)
        if self.vae is not None:
            warning = scale_warning(statistics.std)
            if warning:
                self.print(warning)
        if self.model.spectrum is not None and self.checkpoint is None:  # a checkpoint brings its own
            tell_spectrum(self.model, statistics, self.objective, config.objective.grid_price)
        self._make_shares()
        self.objective.band_weights = make_band_weights(
            config.objective, self.objective.scheduler, statistics.power, data, self.vae
        )
        # Images that are all alike have no spectrum, which is an error only of a sampler that needs one.
        spectrum = statistics.spectrum() if statistics.power.any() else None
        name, training = config.sampling.sampler, self.objective.scheduler
        self.sampler = make_sampling_scheduler(name, training, spectrum, switch_sigmas(self.model))
        self.batches = Batches(
            data, self.global_batch_size, config.train.seed, config.objective.stratified, self.shares
        )
        self.validation = Validation(
            heldout,
            self.objective.scheduler,
            config.train.num_validation_images,
            config.train.per_device_batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            null_label=self.condition.null_label if self.can_guide else None,
        )

    def _open_output_dir(self):
        """Create the output folder and start what is written into it during the run."""
        self.accelerator.wait_for_everyone()
        if self.is_main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            lock(self.output_dir)
            # Another job may have begun, and ended, since this one looked for a checkpoint.
            refuse_other_folder(self.output_dir, self.config.train.resume)
            if self.checkpoint is None and checkpoint_folders(self.output_dir / "checkpoints"):
                raise ValueError(
                    f"`output_dir` ({self.output_dir}) got checkpoints of another job meanwhile: go on with them by "
                    "`--resume auto`, or choose another folder."
                )
            replace_file(self.output_dir / "config.yaml", self.config.save)
        self.accelerator.wait_for_everyone()
        validated_on = "held-out" if len(self.data_sets[1]) else "training"
        self.logbook = Logbook(
            self.accelerator, self.config, self.step, self.total_steps, self.objective.names, validated_on
        )
        self.pushes = None
        if self.repo_id:
            self.pushes = Pushes(self.repo_id, self.output_dir / "pushing", self.total_steps, self.logbook.tell)

    def _prepare(self):
        """The model as it is trained: attention for this device, checkpointing, compilation, processes."""
        train = self.config.train
        tokens = (self.model.config.sample_size // self.model.config.patch_size) ** 2
        if self.device.type == "cpu" and tokens <= SHORT_SEQUENCE:
            self.model.set_attn_processor(DiTMatmulAttnProcessor())
        if train.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        if train.compile:
            # A graph per view and kind of batch, each of static shape, by one code for all blocks.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            self.model.compile_repeated_blocks(fullgraph=True, dynamic=None if self.shares is None else False)
        self.prepared_model, self.prepared_optimizer = self.accelerator.prepare(self.model, self.optimizer)

    # -- the loop ---------------------------------------------------------------------------------------------------

    def train(self):
        """Every step until the end of the run, or until it is asked to stop. Then a resumable checkpoint is saved.

        Raises:
            FloatingPointError: after too many steps in a row without a finite gradient.
            CheckpointError: if the last state of the run could not be saved.
        """
        self.prepared_model.train()
        if self.step == self.total_steps:
            self.print(f"already at step {self.step} of {self.total_steps}: raise `max_steps` or `num_epochs`")
        if self.step == 0:
            self.validate()
        self.window, self.unsaved = [], None
        try:
            self._loop()
        except FloatingPointError:
            self.logbook.draw(self.step)
            self.close()
            raise
        self.finish()

    def _loop(self):
        config, watch = self.config.train, self.logbook.watch
        stopping = save_due = False
        watch.restart()
        with StopRequest(self.accelerator) as request, self.logbook.bar as bar:
            while self.step < self.total_steps and not stopping:
                with watch.waiting():
                    batch = self.batches.draw(self.step)
                self.window.append(self.update(batch))
                self.step += 1
                bar.update()
                if self.due(config.log_every):
                    self.report()
                stopping = request.agreed(self.step)
                save_due |= stopping or self.due(config.save_every)
                snapshot_due = is_spread(self.step, config.ema_snapshots, self.total_steps)
                validate_due, preview_due = self.due(config.validate_every), self.due(config.preview_every)
                if save_due or snapshot_due or validate_due or preview_due:
                    wait_for(self.device)  # what it has queued is training, and no part of the pause
                    with watch.pause():
                        # Saved first: what comes after may fail, or take longer than a launcher waits after SIGTERM.
                        saved = save_due and self.save(stopping)
                        save_due = save_due and not saved
                        if snapshot_due:
                            self.snapshot()
                        if validate_due and not stopping:
                            self.validate()
                        if preview_due and not stopping:
                            self.preview()
                        if saved and not stopping and self.step < self.total_steps:
                            self.push()

    def update(self, global_batch) -> torch.Tensor:
        """One optimiser step; the mean loss terms, gradient norm and whether it was skipped, on the device."""
        config, accelerator = self.config.train, self.accelerator
        # Dropout draws from the global generator; all else from (seed, step).
        torch.manual_seed(derived_seed(config.seed, DROPOUT, self.step, accelerator.process_index))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step, self.total_steps)
        means = []
        for micro_step in range(config.gradient_accumulation_steps):
            last = micro_step == config.gradient_accumulation_steps - 1
            batch = global_batch.shard(
                micro_step, accelerator.process_index, accelerator.num_processes, config.per_device_batch_size
            )
            with contextlib.nullcontext() if last else accelerator.no_sync(self.prepared_model):
                terms = self.loss_terms(batch)
                accelerator.backward(self.objective.total(terms) / config.gradient_accumulation_steps)
            means.append(torch.stack([term.detach().mean() for term in terms.values()]))
        grad_norm = accelerator.clip_grad_norm_(self.prepared_model.parameters(), config.max_grad_norm)
        skipped = self.guard.check(grad_norm)
        self.prepared_optimizer.step()
        self.prepared_optimizer.zero_grad(set_to_none=True)
        self.averages.update()
        return torch.cat([torch.stack(means).mean(dim=0), torch.stack([grad_norm, skipped])])

    def loss_terms(self, batch) -> dict[str, torch.Tensor]:
        """Loss terms of a batch, timesteps and dropped conditions taken from its uniforms."""
        labels = batch.labels
        if not self.condition.is_none:
            probability = self.config.objective.class_dropout_prob
            labels = drop_labels(labels, self.condition.null_label, batch.dropout, probability)
        denoise = partial(self.denoise, self.prepared_model, labels=labels)
        if self.shares is None:
            return self.objective.terms(denoise, batch.latents, batch.noise, self.objective.timesteps(batch.uniform))
        timesteps = self.shares.timesteps(self.objective, batch.uniform)
        denoise = partial(denoise, samples_per_view=self.shares.counts)
        terms = self.objective.terms(denoise, batch.latents, batch.noise, timesteps)
        return {name: self.shares.weights * term for name, term in terms.items()}

    def denoise(self, model, noisy, timesteps, labels, **arguments) -> torch.Tensor:
        arguments |= self.condition.forward_arguments(labels)
        return model(noisy, timesteps, **arguments, return_dict=False)[0]

    def due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.total_steps

    # -- what is done on the way ------------------------------------------------------------------------------------

    def report(self):
        """The steps since the last report; the only wait for the device between validations."""
        # (steps, terms + 2), the terms averaged over processes; the gradient and its fate are the same in all.
        window = self.accelerator.reduce(torch.stack(self.window), "mean").cpu()
        self.window = []
        values = {
            "train/lr": self.optimizer.param_groups[0]["lr"],
            "train/skipped_steps": self.guard.counts()[0],
            "memory_gib": memory_bytes(self.device) / 2**30,
            **{f"ema_age/{name}": age for name, age in self.averages.mean_age().items()},
        }
        self.logbook.report(self.step, window, self.global_batch_size, values)
        self.guard.stop_if_lost(self.step, self.config.train.learning_rate)

    def validate(self):
        """Held-out loss of the raw weights and of the published average, for the true and for the null condition."""
        raw = self.held_out()
        with self.averages.swapped_into(self.model):
            averaged = self.held_out()
        self.logbook.report_validation(self.step, raw, averaged)

    def held_out(self) -> ValidationResult:
        """Validation of the weights that the model has now, over all processes."""
        self.model.eval()
        totals = self.accelerator.reduce(self.validation(partial(self.denoise, self.model)), "sum")
        self.model.train()
        return self.validation.summarise(totals)

    @contextlib.contextmanager
    def published_pipeline(self):
        """The pipeline as it is published: averaged weights, the scheduler of the same betas, class names."""
        names = self.condition.class_names
        with self.averages.swapped_into(self.model):
            self.model.eval()
            pipeline = FreqGateDiTPipeline(
                self.model,
                type(self.sampler).from_config(self.sampler.config),
                vae=self.vae,
                text_encoder=self.condition.text_encoder,
                tokenizer=self.condition.tokenizer,
                id2label=dict(enumerate(names)),
                class_dropout_prob=None if self.condition.is_none else self.config.objective.class_dropout_prob,
            )
            try:
                # The autoencoder is still on the CPU if the latents came from the cache.
                yield pipeline.to(self.device)
            finally:
                self.model.train()

    def preview(self):
        """A grid of samples, always of the same labels and seeds."""
        if not self.is_main:
            return
        with self.logbook.spare("the preview", self.step):
            with self.published_pipeline() as pipeline:
                grid = preview_grid(pipeline, self.condition, self.config.sampling, self.can_guide)
            folder = self.output_dir / "previews"
            folder.mkdir(exist_ok=True)
            grid.save(folder / f"step_{self.step:08d}.png")
            self.logbook.log_image(self.step, "preview", grid)

    def snapshot(self):
        """The power averages as they are now, for averages of other widths after the run."""
        if self.is_main and any(profile.is_power for profile in self.averages.profiles.values()):
            with self.logbook.spare("a snapshot of the weight averages", self.step):
                save_snapshot(self.output_dir / "ema_snapshots", self.averages, self.step)

    def save(self, stopping: bool) -> bool:
        """A checkpoint that `--resume` continues from; whether one was written, or failed to be.

        After a step that was skipped the weights may be lost, and must not push out good checkpoints: it waits for the
        next good step, unless there is none. If it cannot be written, the run goes on to the next one.
        """
        bad_row = self.guard.counts()[1]
        if bad_row and not stopping and self.step < self.total_steps:
            return False
        self.unsaved = None
        if bad_row and not stopping and not math.isfinite(self.held_out().loss):
            self.unsaved = f"step {self.step} is not saved: its gradient is not finite, nor is the held-out loss"
        elif self.is_main:
            config = self.config.train
            try:
                # A stop in a bad row: what is saved may be lost, so it comes on top of what is kept.
                keep = config.keep_checkpoints + (bad_row > 0)
                self._checkpoint().save(self.output_dir / "checkpoints", keep, config.keep_every)
            except OSError as error:
                self.unsaved = str(error)
        if self.unsaved:
            self.logbook.tell(self.unsaved)
        self.accelerator.wait_for_everyone()
        return True

    def _checkpoint(self) -> Checkpoint:
        groups = {average_group(name): self.averages.tensors(name) for name in self.averages.profiles}
        return Checkpoint(
            tensors={
                "model": self.model.state_dict(),
                "optimizer": optimizer_tensors(self.optimizer, self.model),
                **groups,
            },
            state={
                "step": self.step,
                "ema": list(self.averages.profiles),
                "averages": self.averages.state(),
                "global_batch_size": self.global_batch_size,
                "mixed_precision": self.accelerator.mixed_precision,
                "fingerprints": self.fingerprints,
                "class_names": list(self.condition.class_names),
                "config": self.config.to_dict(),
            },
        )

    def finish(self):
        """At the end of the run the pipeline folder; curves; and a word on how to go on."""
        finished = self.step == self.total_steps
        self.logbook.draw(self.step)
        if self.is_main and finished and not self.unsaved:
            self.publish()
        self.close()
        if self.pushes:  # last, as the other processes must not wait for the network
            self.finish_pushes(finished)
        unlock_all()
        has_checkpoint = checkpoint_folders(self.output_dir / "checkpoints")
        again = resume_command(self.accelerator, self.output_dir, "latest" if has_checkpoint else "auto")
        if self.unsaved:
            where = "Go on from the newest checkpoint" if has_checkpoint else "No step was saved: start again"
            raise CheckpointError(f"{self.unsaved}. {where} with:\n  {again}")
        if not finished:
            self.print(f"\nstopped and saved at step {self.step} of {self.total_steps}; go on with:\n  {again}")

    def publish(self):
        folder = self.output_dir / "pipeline"
        try:
            self.write_pipeline(folder)
        except (OSError, SafetensorError) as error:
            self.unsaved = f"the pipeline could not be written ({error})"
            return
        self.print(
            f"\npipeline    {folder}"
            f"\ncurves      {self.output_dir / 'loss.png'}"
            f"\nvalidation  {self.output_dir / 'validation.png'}, by timestep and frequency"
            f"\npreviews    {self.output_dir / 'previews'}"
            f"\n\n  from freqgate_dit import FreqGateDiTPipeline\n"
            f'  pipe = FreqGateDiTPipeline.from_pretrained("{folder}")'
        )

    def write_pipeline(self, folder: Path):
        """The pipeline of this step, with its numbers, pictures and card."""
        progress = {"step": self.step, "total_steps": self.total_steps, "global_batch_size": self.global_batch_size}
        validations = self.logbook.validations.records()
        ladder = self.ladder and self.ladder.sampled_by(self.model, self.sampler)
        summary = training_summary(self.config, self.accelerator, *self.data_sets, progress, validations, ladder)
        previews = sorted((self.output_dir / "previews").glob("step_*.png"))
        pictures = {name: self.output_dir / name for name in ("loss.png", "validation.png")}
        pictures |= {"preview.png": previews[-1]} if previews else {}
        with self.published_pipeline() as pipeline:
            spare = self.logbook.spare("the model card", self.step)
            write_pipeline(pipeline, folder, self.config, summary, pictures, self.repo_id, spare)

    def push(self):
        """Hand the pipeline of this step, whose checkpoint is kept, to the upload that runs beside the training."""
        if self.pushes is None or self.unsaved:
            return
        kept = [step_of(folder) for folder in checkpoint_folders(self.output_dir / "checkpoints")]
        with self.logbook.spare("the pipeline to push", self.step):
            self.logbook.draw(self.step)
            self.write_pipeline(self.pushes.place(self.step))
            self.pushes.add(self.step, kept)

    def finish_pushes(self, finished: bool):
        """The finished pipeline to the Hub; of a run that was stopped, word of what is not there yet."""
        if not finished or self.unsaved:
            self.pushes.abandon()
            return
        address = self.pushes.push_last(self.output_dir / "pipeline", self.step)
        if address:
            self.print(f"pushed      {address}")

    def close(self):
        # No process leaves the group while another needs it, and no model holds it longer than Python does: freed from
        # inside DistributedDataParallel, gloo waits for threads that wait for the interpreter's lock, now and then.
        self.accelerator.wait_for_everyone()
        self.prepared_model = self.prepared_optimizer = None
        self.accelerator.free_memory()
        self.logbook.close(self.step)


def main(arguments: list[str] | None = None):
    try:
        config = parse_config(arguments, description=__doc__, preset=preset_for)
        trainer = Trainer(config)
        if config.train.dry_run:
            trainer.print("dry run: nothing was trained or written")
        else:
            trainer.train()
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise SystemExit(f"error: {out_of_memory(config, error)}") from error
    except KeyboardInterrupt:
        raise SystemExit("stopped at once; what was saved and encoded so far is kept") from None
    finally:
        unlock_all()


def out_of_memory(config: TrainingRun, error: RuntimeError) -> str:
    """What failed, and the options that lower it, those first that change no number of the run."""
    train, what = config.train, str(error).splitlines()[0]
    checkpointing = "" if train.gradient_checkpointing else "`--gradient_checkpointing true` (slower), or "
    return (
        f"out of memory ({what}). {checkpointing}`per_device_batch_size` below {train.per_device_batch_size} and "
        f"`gradient_accumulation_steps` as many times above {train.gradient_accumulation_steps} train the same with "
        "less; `--data_on_device false` leaves the images off the GPU; a smaller model or `resolution` is another "
        "run. What was saved is kept: add `--resume auto`."
    )


if __name__ == "__main__":
    main()
