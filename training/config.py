"""Every knob of a training run, in one typed place: dataclasses, filled from YAML and the command line.

A field's name is its YAML key and its command-line flag. `parse_config` merges defaults, the YAML file and the command
line, in this order; `TrainingRun.save` writes what came out, and that file starts the same run again. `preset_for` is
the file of those who give none.
"""

import argparse
import dataclasses
import difflib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import HfArgumentParser

from freqgate_dit.band_weights import BAND_WEIGHTS
from freqgate_dit.losses import PREDICTION_TYPES, TIMESTEP_SAMPLING
from freqgate_dit.samplers import SAMPLERS
from freqgate_dit.training.data import BUILT_IN, DataConfig
from freqgate_dit.training.ema import EMAProfile
from freqgate_dit.transformer_freqgate_dit import (
    ACTIVATIONS,
    BAND_OPTIONS,
    PRECONDITIONING,
    PRECONDITIONING_AT,
    VARIANTS,
)


BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def knob(default, help: str):
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def check_choice(name: str, value, choices):
    if value not in choices:
        raise ValueError(f"`{name}` ({value!r}) must be one of {tuple(choices)}.")


def check_range(config, *names: str, least: float):
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"`{name}` ({value}) must be at least {least}.")


@dataclass(frozen=True)
class ModelConfig:
    _argument_group_name = "model"

    variant: str = knob("freq_gate", f"Conditioning mechanism: {', '.join(VARIANTS)}.")
    num_layers: int = knob(12, "Transformer blocks.")
    num_attention_heads: int = knob(8, "Attention heads; the width is heads x attention_head_dim.")
    attention_head_dim: int = knob(64, "Channels of a head.")
    patch_size: int = knob(2, "Side of a patch, in latents or pixels.")
    mlp_ratio: float = knob(4.0, "Hidden width of the MLP over the model's width.")
    activation_fn: str = knob("gelu-approximate", f"Of the MLP: {', '.join(ACTIVATIONS)}.")
    norm_elementwise_affine: bool = knob(False, "Learned scale and shift in the LayerNorms.")
    norm_eps: float = knob(1e-6, "Epsilon of the LayerNorms.")
    mlp_norm_eps: float | None = knob(None, "Epsilon of the LayerNorms before the MLPs; norm_eps if unset.")
    output_modulation: bool | None = knob(None, "Final adaLN; by default on for adaLN-type variants only.")
    modulation_rank: int | None = knob(None, "Rank of the modulation, adaLN-type variants; full if unset.")
    gate_residual: bool = knob(False, "freq_gate: add the gated mixture to the condition, to start as adaLN-Zero.")
    band_branches: str = knob("both", "band_gate: which branches have band gates: both, attention, mlp, none.")
    band_drive: str = knob("both", "band_gate: what the band gates depend on: both, time, class.")
    band_gates: str = knob(
        "vector", "band_gate: vector, or scalar (SpectralDiT's two numbers; with band_adapters false)."
    )
    band_adapters: bool = knob(True, "band_gate: whether Low and High are views of the condition of their own.")
    band_clock: bool = knob(True, "band_gate: whether the gates see how visible each band of the data is.")
    band_basis: str = knob("dct", "band_gate: dct; random (no frequency: the control); binomial (as in SpectralDiT).")
    band_cutoff: float = knob(0.3125, "band_gate: end of the low band as a fraction of the token grid's Nyquist.")
    num_condition_tokens: int = knob(2, "Memory of cross-attention: 2 (time, condition) or 1 (their sum).")
    qk_norm: bool = knob(False, "RMSNorm of queries and keys.")
    use_rope: bool = knob(False, "Rotary positions besides the sin-cos table.")
    freq_shift: int = knob(0, "Of the timestep's sinusoid: 0, or 1 as in diffusers' DiT.")
    dropout: float = knob(0.0, "Dropout in the MLP.")
    preconditioning: str | None = knob(
        None, f"Spectral gates of input, skip and output, by the data's statistics: {', '.join(PRECONDITIONING)}."
    )
    preconditioning_at: str = knob("both", "Where: both, input, or output (skip and output).")
    grid_views: int = knob(
        1,
        "Freq-Grid, with preconditioning wiener: grids of tokens to work on, the full one, and from 2 on half of it, "
        "a quarter, ..., where noise hides the frequencies that they lack.",
    )
    grid_tolerance: float = knob(0.03, "A coarser grid is used where no frequency beyond it has a larger Wiener gain.")

    def __post_init__(self):
        check_choice("variant", self.variant, VARIANTS)
        check_choice("activation_fn", self.activation_fn, ACTIVATIONS)
        check_choice("freq_shift", self.freq_shift, (0, 1))
        check_choice("preconditioning", self.preconditioning, (None, *PRECONDITIONING))
        check_choice("preconditioning_at", self.preconditioning_at, PRECONDITIONING_AT)
        for name, choices in BAND_OPTIONS.items():
            check_choice(name, getattr(self, name), choices)
        check_range(
            self, "num_layers", "num_attention_heads", "attention_head_dim", "patch_size", "grid_views", least=1
        )
        if self.mlp_ratio <= 0:
            raise ValueError(f"`mlp_ratio` ({self.mlp_ratio}) must be positive; 4 is usual.")

    def build(self, in_channels: int, sample_size: int, condition_arguments: dict, objective: "ObjectiveConfig"):
        """The model, for inputs `(B, in_channels, sample_size, sample_size)`."""
        arguments = dataclasses.asdict(self)
        variant = VARIANTS[arguments.pop("variant")]
        if self.preconditioning or variant.needs_spectrum:  # other models need not know what they predict
            names = ("prediction_type", "num_train_timesteps")
            arguments |= {name: getattr(objective, name) for name in names}
        return variant(in_channels=in_channels, sample_size=sample_size, **arguments, **condition_arguments)


@dataclass(frozen=True)
class ConditionConfig:
    _argument_group_name = "condition"

    condition: str = knob("auto", "class, text, none, or auto: class where the data has classes, else none.")
    prompt_template: str = knob("A photo of {label}", "Prompt of a class, for condition=text.")
    text_encoder: str | None = knob(None, "CLIP text model, folder or Hub id, for condition=text.")
    tokenizer: str | None = knob(None, "Tokenizer of the text encoder; the text encoder's own if unset.")

    def __post_init__(self):
        check_choice("condition", self.condition, ("auto", "class", "text", "none"))
        if self.condition == "text" and not self.text_encoder:
            raise ValueError("`condition` is 'text' but `text_encoder` is unset: name a CLIP text model.")
        if "{label}" not in self.prompt_template:
            raise ValueError(f"`prompt_template` ({self.prompt_template!r}) must contain {{label}}.")


@dataclass(frozen=True)
class LatentConfig:
    _argument_group_name = "latents"

    vae: str | None = knob(None, "AutoencoderKL or AutoencoderTiny, folder or Hub id; unset trains on pixels.")
    vae_subfolder: str | None = knob(None, "Subfolder of the autoencoder in its repository.")
    vae_revision: str | None = knob(None, "Branch, tag or commit of the autoencoder's repository.")
    cache_dir: str = knob("~/.cache/freqgate_dit", "Where encoded data is kept; shared by all runs.")
    data_on_device: bool | None = knob(
        None, "Hold the encoded data on the GPU; by default if that takes no more than half of its free memory."
    )


@dataclass(frozen=True)
class ObjectiveConfig:
    _argument_group_name = "objective"

    prediction_type: str = knob("epsilon", f"What the network predicts: {', '.join(PREDICTION_TYPES)}.")
    num_train_timesteps: int = knob(1000, "Steps of the noise schedule.")
    beta_schedule: str = knob("linear", f"{', '.join(BETA_SCHEDULES)}.")
    beta_start: float = knob(1e-4, "First beta.")
    beta_end: float = knob(0.02, "Last beta.")
    timestep_sampling: str = knob("uniform", f"Distribution of training timesteps: {', '.join(TIMESTEP_SAMPLING)}.")
    stratified: bool = knob(True, "Spread the timesteps of a batch evenly over their distribution.")
    logit_mean: float = knob(0.0, "Mean of the logit-normal distribution of t/T.")
    logit_std: float = knob(1.0, "Standard deviation of the logit-normal distribution of t/T.")
    min_snr_gamma: float | None = knob(None, "Min-SNR weighting with this clip (5 is usual); unset: unweighted.")
    spectral_weight: float = knob(0.0, "Weight of the source experiment's L1 loss on Fourier magnitudes.")
    band_weights: str | None = knob(
        None, f"Weigh the squared error per frequency: {', '.join(BAND_WEIGHTS)}; unset: all alike."
    )
    band_blind: bool = knob(False, "The control of band_weights: the mean weight of each noise level instead.")
    grid_price: float | None = knob(
        None,
        "Freq-Grid: choose where to switch by price, so many nats per token of the mean grid, in place of "
        "grid_tolerance.",
    )
    class_dropout_prob: float = knob(0.1, "How often the condition is dropped; 0 rules out guidance.")

    def __post_init__(self):
        check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        check_choice("timestep_sampling", self.timestep_sampling, TIMESTEP_SAMPLING)
        check_choice("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        check_choice("band_weights", self.band_weights, (None, *BAND_WEIGHTS))
        if self.band_blind and not self.band_weights:
            raise ValueError(
                f"`band_blind` (True) is the control of `band_weights`, which is unset: one of {BAND_WEIGHTS}."
            )
        check_range(self, "num_train_timesteps", least=1)
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"`beta_start` ({self.beta_start}) and `beta_end` ({self.beta_end}) must satisfy "
                "0 < beta_start <= beta_end < 1."
            )
        if self.grid_price is not None and not 0 < self.grid_price < math.inf:
            raise ValueError(f"`grid_price` ({self.grid_price}) must be above 0 nats per token and finite, or unset.")
        if self.logit_std <= 0:
            raise ValueError(f"`logit_std` ({self.logit_std}) must be positive.")
        if not 0 <= self.class_dropout_prob < 1:
            raise ValueError(f"`class_dropout_prob` ({self.class_dropout_prob}) must be in [0, 1).")


@dataclass(frozen=True)
class SamplingConfig:
    _argument_group_name = "sampling (previews, and the scheduler saved with the pipeline)"

    sampler: str = knob("spectral", f"{'; '.join(f'{name}: {sampler.help}' for name, sampler in SAMPLERS.items())}.")
    num_inference_steps: int = knob(20, "Steps of previews.")
    guidance_scale: float = knob(2.5, "Guidance of previews; 1 where the model has no null condition.")
    num_previews: int = knob(16, "Images of a preview grid.")

    def __post_init__(self):
        check_choice("sampler", self.sampler, SAMPLERS)
        check_range(self, "num_inference_steps", "num_previews", least=1)


@dataclass(frozen=True)
class TrainConfig:
    _argument_group_name = "training"

    output_dir: str = knob("runs/freq_gate", "Folder of this run: checkpoints, metrics, previews, pipeline.")
    seed: int = knob(0, "Of initialisation, data order, noise, timesteps and dropout of the condition.")
    max_steps: int | None = knob(None, "Optimiser steps; set this or num_epochs.")
    num_epochs: int | None = knob(None, "Passes over the data; set this or max_steps.")
    per_device_batch_size: int = knob(96, "Images per process and forward pass.")
    gradient_accumulation_steps: int = knob(1, "Forward passes per optimiser step.")
    optimizer: str = knob("adamw", "adamw, or muon: Muon for the matrices of attention and MLP, AdamW for the rest.")
    learning_rate: float = knob(1e-4, "Peak learning rate.")
    lr_schedule: str = knob("constant", "After warm-up: constant, or cosine or linear decay to 0.")
    warmup_steps: int = knob(0, "Optimiser steps of linear warm-up.")
    adam_beta2: float = knob(0.999, "Second moment decay of AdamW.")
    weight_decay: float = knob(0.01, "Decoupled weight decay, on matrices and vectors alike.")
    max_grad_norm: float = knob(1.0, "Gradient norm is clipped to this.")
    ema: list[str] = knob(
        ["power:0.1", "power:0.05"],
        "Weight averages, side by side; the first is sampled, validated and published. 'power:S' averages over the "
        "last part of the run, S of its length wide, whatever that is (EDM2); a number such as 0.9999 is a decay.",
    )
    ema_snapshots: int = knob(
        8,
        "Snapshots of the power averages, spread over the run, from which `posthoc_ema.py` makes averages of other "
        "widths afterwards; 0 for none.",
    )
    mixed_precision: str = knob(
        "auto", "bf16 (autocast over float32 weights), no, or auto: bf16 where it is fast; not read from `accelerate`."
    )
    cpu_threads: int | None = knob(
        None,
        "CPU threads per process; by default OMP_NUM_THREADS if above 1, else all cores.",
    )
    gradient_checkpointing: bool = knob(False, "Recompute activations in the backward pass to save memory.")
    compile: bool = knob(False, "torch.compile the repeated blocks.")
    log_every: int = knob(50, "Steps between log lines.")
    validate_every: int = knob(500, "Steps between validations.")
    preview_every: int = knob(1000, "Steps between preview grids.")
    save_every: int = knob(1000, "Steps between checkpoints.")
    keep_checkpoints: int = knob(2, "Newest checkpoints that are kept.")
    keep_every: int | None = knob(None, "Also keep every checkpoint whose step is a multiple of this.")
    num_validation_images: int = knob(1024, "Held-out images in the validation loss.")
    max_skipped_steps: int = knob(10, "Steps in a row without a finite gradient (they are skipped) that end the run.")
    resume: str | None = knob(
        None,
        "'latest', a checkpoint folder of this run, or 'auto': latest, or from step 0 where nothing was saved yet.",
    )
    init_from: str | None = knob(
        None,
        "Start from these weights: a pipeline, model, checkpoint or run folder, or a Hub id; also diffusers' DiT, or "
        "a file of the official DiT. What fits is taken.",
    )
    init_revision: str | None = knob(None, "Branch, tag or commit of the repository of init_from.")
    report_to: str = knob("tensorboard", "Accelerate tracker: tensorboard, wandb, trackio, ...; or none.")
    dry_run: bool = knob(False, "Print configuration, data, parameters, FLOPs and memory, then stop.")

    def __post_init__(self):
        if (self.max_steps is None) == (self.num_epochs is None):
            raise ValueError(
                "say how long to train, by exactly one of `--max_steps N` and `--num_epochs N` (now "
                f"`max_steps` {self.max_steps}, `num_epochs` {self.num_epochs})."
            )
        check_choice("optimizer", self.optimizer, ("adamw", "muon"))
        check_choice("lr_schedule", self.lr_schedule, ("constant", "cosine", "linear"))
        check_choice("mixed_precision", self.mixed_precision, ("auto", "bf16", "no"))
        check_range(
            self,
            "max_steps",
            "num_epochs",
            "per_device_batch_size",
            "gradient_accumulation_steps",
            "log_every",
            "validate_every",
            "preview_every",
            "save_every",
            "keep_checkpoints",
            "keep_every",
            "max_skipped_steps",
            "num_validation_images",
            "cpu_threads",
            least=1,
        )
        check_range(self, "seed", "warmup_steps", "learning_rate", "weight_decay", "ema_snapshots", least=0)
        if self.max_grad_norm <= 0:
            raise ValueError(
                f"`max_grad_norm` ({self.max_grad_norm}) must be positive; use a large one for no clipping."
            )
        names = [EMAProfile.parse(profile).name for profile in self.ema]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"`ema` ({self.ema}) must name at least one weight average, and each once.")
        if not 0 <= self.adam_beta2 < 1:
            raise ValueError(f"`adam_beta2` ({self.adam_beta2}) must be in [0, 1).")
        if self.keep_every and self.keep_every % self.save_every:
            raise ValueError(
                f"`keep_every` ({self.keep_every}) must be a multiple of `save_every` ({self.save_every}): no other "
                "step has a checkpoint to keep."
            )


@dataclass(frozen=True)
class HubConfig:
    _argument_group_name = "Hub and model card"

    push_to_hub: bool = knob(
        False,
        "Upload the pipeline of every kept checkpoint while training goes on, and at the end the finished one. The "
        "token is that of `hf auth login`, or HF_TOKEN; what it may write is checked before step 1.",
    )
    hub_model_id: str | None = knob(
        None, "Repository, user/name; name alone is one of yours. By default the last name of output_dir."
    )
    hub_private: bool = knob(False, "Make a new repository private.")
    license: str | None = knob(None, "Of the weights, for the model card; an id of the Hub such as apache-2.0.")
    data_license: str | None = knob(None, "Of the images, for the model card, in your words.")

    def __post_init__(self):
        if self.hub_model_id is not None:
            try:
                validate_repo_id(self.hub_model_id)
            except HFValidationError as error:
                raise ValueError(
                    f"`hub_model_id` ({self.hub_model_id!r}) cannot be the name of a repository, which looks like "
                    f"user/name ({error})."
                ) from error


SECTIONS = {
    "data": DataConfig,
    "model": ModelConfig,
    "condition": ConditionConfig,
    "latents": LatentConfig,
    "objective": ObjectiveConfig,
    "sampling": SamplingConfig,
    "train": TrainConfig,
    "hub": HubConfig,
}


# Knobs that change none of a run's numbers.
ASIDE = "output_dir cache_dir cpu_threads resume log_every save_every preview_every num_previews".split()
# Knobs that hold a path, or may.
LOCAL = ("dataset", "cache_dir", "output_dir", "vae", "text_encoder", "tokenizer", "init_from", "resume")


def is_run_folder(folder: Path) -> bool:
    """Whether a folder is that of a run, by its config.yaml: other programs have files of this name, too."""
    try:
        values = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(values, dict) and {"output_dir", "variant", "ema"} <= values.keys()


def refuse_moved_run(file: Path, output_dir: str):
    """Raise if `file` is the config.yaml of a run that was copied or moved: its `output_dir` is where it was before.

    Raises:
        ValueError: names both folders and what to do.
    """
    folder = file.parent
    has_begun = any((folder / name).exists() for name in ("checkpoints", "metrics.jsonl"))
    if has_begun and is_run_folder(folder) and folder.resolve() != Path(output_dir).resolve():
        raise ValueError(
            f"`--config` ({file}) is of a run that was copied or moved, or of another working directory: its "
            f"`output_dir` ({output_dir}) is not the folder that it lies in. Add `--output_dir {folder}` to go on "
            "there."
        )


def is_local(path: str) -> bool:
    """Whether a value is a path on this machine; a Hub id or the built-in set is not."""
    return path.startswith(("/", "~", ".")) or Path(path).exists() or path.count("/") > 1


@dataclass(frozen=True)
class TrainingRun:
    """The whole configuration of a run. `to_dict` is flat: one name for YAML, command line and card."""

    data: DataConfig
    model: ModelConfig
    condition: ConditionConfig
    latents: LatentConfig
    objective: ObjectiveConfig
    sampling: SamplingConfig
    train: TrainConfig
    hub: HubConfig

    def __post_init__(self):
        views, price, size = self.model.grid_views, self.objective.grid_price, self.train.per_device_batch_size
        if price is not None and views == 1:
            raise ValueError(f"`grid_price` ({price}) is for models with views: set `grid_views` (1) above 1.")
        if size < views:
            raise ValueError(
                f"`per_device_batch_size` ({size}) is smaller than the number of views, each of which takes part in "
                f"every step: use at least `grid_views` ({views}), or fewer views."
            )

    def to_dict(self) -> dict:
        return {name: value for section in dataclasses.asdict(self).values() for name, value in section.items()}

    def to_yaml(self) -> str:
        sections = []
        for name, section in dataclasses.asdict(self).items():
            sections.append(f"# {name}\n" + yaml.safe_dump(section, sort_keys=False, allow_unicode=True))
        return "\n".join(sections)

    def shareable(self) -> "TrainingRun":
        """The same run without a word on this machine: of local paths only the last name is left."""
        sections = {}
        for name, section in vars(self).items():
            paths = {knob_name: getattr(section, knob_name) for knob_name in LOCAL if hasattr(section, knob_name)}
            names = {knob_name: Path(path).name for knob_name, path in paths.items() if path and is_local(path)}
            sections[name] = dataclasses.replace(section, **names)
        return TrainingRun(**sections)

    def save(self, path: Path):
        """Write what starts this run again, from its first step."""
        fresh = dataclasses.replace(self, train=dataclasses.replace(self.train, resume=None))
        path.write_text(fresh.to_yaml(), encoding="utf-8")


def field_types() -> dict[str, type]:
    """Name -> type of every knob; names are unique over the sections."""
    types = {}
    for section in SECTIONS.values():
        hints = get_type_hints(section)
        for knob_field in dataclasses.fields(section):
            assert knob_field.name not in types, f"two sections have a knob {knob_field.name}"
            types[knob_field.name] = hints[knob_field.name]
    return types


def default_values() -> dict:
    """Name -> default of every knob."""
    knobs = [knob_field for section in SECTIONS.values() for knob_field in dataclasses.fields(section)]
    return {
        knob_field.name: knob_field.default
        if knob_field.default_factory is dataclasses.MISSING
        else knob_field.default_factory()
        for knob_field in knobs
    }


RETIRED = {"timestep_spacing": "give `sampler` in its place, euler for trailing, source for linspace."}


# What diffusers' training scripts, and others, call it -> here.
HABITS = {
    "adam_weight_decay": "weight_decay",
    "batch_size": "per_device_batch_size",
    "checkpointing_steps": "save_every",
    "checkpoints_total_limit": "keep_checkpoints",
    "dataset_config_name": "dataset_config",
    "dataset_name": "dataset",
    "ddpm_beta_schedule": "beta_schedule",
    "ddpm_num_inference_steps": "num_inference_steps",
    "ddpm_num_steps": "num_train_timesteps",
    "ema_decay": "ema",
    "ema_max_decay": "ema",
    "epochs": "num_epochs",
    "gradient_clip": "max_grad_norm",
    "image_size": "resolution",
    "logger": "report_to",
    "lr": "learning_rate",
    "lr_scheduler": "lr_schedule",
    "lr_warmup_steps": "warmup_steps",
    "max_train_steps": "max_steps",
    "num_train_epochs": "num_epochs",
    "per_device_train_batch_size": "per_device_batch_size",
    "pretrained_model_name_or_path": "init_from",
    "pretrained_vae_model_name_or_path": "vae",
    "proportion_empty_prompts": "class_dropout_prob",
    "random_flip": "horizontal_flip",
    "resume_from_checkpoint": "resume",
    "save_images_epochs": "preview_every",
    "save_model_epochs": "save_every",
    "save_steps": "save_every",
    "snr_gamma": "min_snr_gamma",
    "train_batch_size": "per_device_batch_size",
    "train_data_dir": "dataset",
    "use_ema": "ema",
    "validation_steps": "validate_every",
    "wandb": "report_to",
}


def check_known(names, where: str):
    known = field_types()
    for name in names:
        if name in HABITS:
            ours = HABITS[name]
            help = next(
                knob_field.metadata["help"]
                for section in SECTIONS.values()
                for knob_field in dataclasses.fields(section)
                if knob_field.name == ours
            )
            raise ValueError(f"{name!r} in {where} is `{ours}` here: {help}")
        if name in RETIRED:
            raise ValueError(f"configuration key {name!r} in {where} is of an earlier version: {RETIRED[name]}")
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`--help` lists all of them."
            raise ValueError(f"unknown configuration key {name!r} in {where}: {hint}")


def convert(name: str, value, where: str):
    """A YAML value as the knob's type. YAML reads 1e-4 as a string, and 1 for a float as an int."""
    hint = field_types()[name]
    allowed = get_args(hint) or (hint,)
    if value is None and type(None) in allowed:
        return None
    if get_origin(hint) is list:
        # `ema: 0.9999` and `ema: [0.9999, power:0.1]` alike.
        return [str(item) for item in (value if isinstance(value, list) else [value])]
    target = next(kind for kind in allowed if kind is not type(None))
    if target is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, target) and not (target is int and isinstance(value, bool)):
        return value
    hint = " (YAML reads no, yes, on and off as booleans: put them in quotes)" if isinstance(value, bool) else ""
    raise ValueError(f"`{name}` in {where} is {value!r}; expected {target.__name__}{hint}.")


def load_yaml(path: str | Path) -> dict:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`--config` ({path}) is not a file; presets lie in training/configs/.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"`--config` ({path}) is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"`--config` ({path}) must hold `name: value` lines, but holds a {type(values).__name__}.")
    check_known(values, str(path))
    return {name: convert(name, value, str(path)) for name, value in values.items()}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Options with their defaults, the description line by line as it was written."""


def none_or(convert: Callable, text: str):
    """A command-line value of a knob that may be unset."""
    return None if text.lower() == "none" else convert(text)


PRESETS = Path(__file__).parent / "configs"


def preset_for(given: argparse.Namespace, named: set[str]) -> Path | None:
    """The file of those who give no `--config`: to go on with a run its own, for one's own images in pixels a preset;
    `None` for other data and for fine-tuning, whose model is the source's.

    Args:
        given: the command line's options, defaults among them.
        named: which of them it has.
    """
    run = Path(given.output_dir)
    if given.resume and "output_dir" in named and is_run_folder(run):
        return run / "config.yaml"
    if given.vae or given.init_from or given.dataset == BUILT_IN:
        return None
    preset = PRESETS / ("photos64.yaml" if given.resolution < 128 else "photos128.yaml")
    run = Path(load_yaml(preset)["output_dir"])
    goes_on = given.resume and "output_dir" not in named and is_run_folder(run)
    return run / "config.yaml" if goes_on else preset


def parse_config(
    arguments: list[str] | None = None,
    description: str | None = None,
    preset: Callable[[argparse.Namespace, set[str]], Path | None] | None = None,
) -> TrainingRun:
    """Defaults, then the YAML file of `--config`, then the command line.

    Args:
        preset: gives the file in place of `--config`, where that is not given (`--config none` does without), from the
            options of the command line.

    Raises:
        ValueError: for an unknown key or a value out of range; names the key and what to do.
    """
    # A short usage line: argparse prints it before every error.
    usage = "%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]"
    parser = HfArgumentParser(
        list(SECTIONS.values()),
        usage=usage,
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        type=os.path.expanduser,
        help="YAML file of these options; the command line overrides it. Without one, images of your own are trained "
        "in pixels by the preset photos64.yaml, from 128 px on photos128.yaml; 'none' for the defaults below.",
    )
    types = field_types()
    for action in parser._actions:
        # A shell expands `--vae ~/x` but not `--vae=~/x`, and nobody what stands in a file. (The cache is the same for
        # whoever takes over a config.yaml, and is expanded where it is used.)
        if action.dest in LOCAL and action.dest != "cache_dir":
            action.type = os.path.expanduser
        # `--vae none` takes back what a YAML file has set.
        if type(None) in get_args(types.get(action.dest)):
            action.type = partial(none_or, action.type)
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parser.parse_known_args(arguments)[0]
    file = given.config
    named = {word.lstrip("-").split("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
    if file is None and preset and (file := preset(given, named)) and os.environ.get("RANK", "0") == "0":
        print(
            f"no --config is given: options are those of {file.parent.name}/{file.name}; '--config none' does without"
        )
    if file and str(file).lower() != "none":
        defaults = load_yaml(file)
        if given.max_steps is not None or given.num_epochs is not None:
            # Two spellings of one thing: the command line's replaces the file's.
            defaults = {name: value for name, value in defaults.items() if name not in ("max_steps", "num_epochs")}
        parser.set_defaults(**defaults)
    namespace, unknown = parser.parse_known_args(arguments)
    check_known(
        [flag.lstrip("-").split("=")[0].replace("-", "_") for flag in unknown if flag[:2] == "--"], "the command line"
    )
    if unknown:
        raise ValueError(f"the command line has {unknown} without an option that takes them.")
    values = vars(namespace)
    if file and values["resume"] and "output_dir" not in named:
        refuse_moved_run(Path(file), values["output_dir"])
    return TrainingRun(
        **{
            name: section(**{knob_field.name: values[knob_field.name] for knob_field in dataclasses.fields(section)})
            for name, section in SECTIONS.items()
        }
    )
