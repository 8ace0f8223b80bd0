"""The peer of the ablation of Freq-Grid: diffusers' `DiTTransformer2DModel`, trained by a plain loop."""

from contextlib import contextmanager

import torch
from diffusers import DiTTransformer2DModel
from diffusers.training_utils import EMAModel

from freqgate_dit.training.schedules import learning_rate
from freqgate_dit.training.train import Trainer


class DiffusersLoop:
    """Steps as diffusers' training examples have them: bf16 autocast, AdamW, one average of the weights.

    Args:
        trainer: a run on the full grid, which is not trained: its data, order, noise, timesteps, dropped labels,
            learning rates and sizes are taken.
        seed: of the first weights.
    """

    def __init__(self, trainer: Trainer, seed: int):
        self.trainer, train = trainer, trainer.config.train
        config = trainer.model.config
        self.null_label = config.num_classes
        torch.manual_seed(seed)
        self.model = DiTTransformer2DModel(
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            in_channels=config.in_channels,
            out_channels=config.in_channels,
            num_layers=config.num_layers,
            sample_size=config.sample_size,
            patch_size=config.patch_size,
            num_embeds_ada_norm=config.num_classes or 1,
        )
        for block in self.model.transformer_blocks:
            # It drops labels by itself, in each block others; here they are dropped once, as in the trainer.
            block.norm1.emb.class_embedder.dropout_prob = 0.0
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), train.learning_rate, (0.9, train.adam_beta2), weight_decay=train.weight_decay
        )
        self.average = EMAModel(self.model.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
        self.model.train()

    def denoise(self, noisy: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        labels = torch.zeros(len(noisy), dtype=torch.long) if labels is None else labels
        with torch.autocast("cpu", torch.bfloat16):
            prediction = self.model(noisy, timestep=timesteps, class_labels=labels, return_dict=False)[0]
        return prediction.float()

    def step(self, index: int):
        """Step `index` (from 0) of the run."""
        trainer = self.trainer
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(trainer.config.train, index, trainer.total_steps)
        batch, scheduler = trainer.batches.draw(index), trainer.objective.scheduler
        labels = batch.labels
        if self.null_label is not None:
            dropped = batch.dropout < trainer.config.objective.class_dropout_prob
            labels = torch.where(dropped, self.null_label, labels)
        timesteps = trainer.objective.timesteps(batch.uniform)
        noisy = scheduler.add_noise(batch.latents, batch.noise, timesteps)
        target = scheduler.get_velocity(batch.latents, batch.noise, timesteps)
        loss = torch.nn.functional.mse_loss(self.denoise(noisy, timesteps, labels), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), trainer.config.train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.model.parameters())

    @contextmanager
    def averaged(self):
        """The averaged weights in the model."""
        is_training = self.model.training
        self.average.store(self.model.parameters())
        self.average.copy_to(self.model.parameters())
        self.model.eval()
        try:
            yield
        finally:
            self.average.restore(self.model.parameters())
            self.model.train(is_training)
