# Copyright 2026 The freqgate_dit authors. Licensed under the Apache License, Version 2.0.
"""`FreqGateDiTPipeline`: images from classes or prompts with any of the DiT variants, Euler and guidance.

The file is self-contained (torch, diffusers, transformers and the standard library only), because it travels with
every model repository. As part of the package it asks the package (`hub`, `pipeline_folder`), which loads repositories
without running their code; as a repository's copy it leaves loading to diffusers.
"""

import copy
import difflib
import importlib
import inspect
import json
import logging
import math
import numbers
import os
import shutil
import sys
import tempfile
import threading
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import EulerDiscreteScheduler
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import create_repo
from transformers import PreTrainedModel


# Of the package that this file belongs to; written into what it saves.
__version__ = "0.1.0"

SOURCE_GUIDANCE_SCALE = 2.5
# Solvers that divide by the distance of noise levels.
NEED_DISTANCE = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
)
WHY_BROKEN = (
    "Of what can be changed in a call the likely causes are a number type that is too narrow (try float32), a "
    "`guidance_scale` far too large and more steps than the sampler can take; otherwise the weights are damaged, or "
    "their training has diverged."
)

NO_NULL_EMBEDS = (
    'guidance on `pooled_prompt_embeds` needs `negative_pooled_prompt_embeds`: pass the embedding of "", or '
    "`guidance_scale=1`."
)
# Autoencoders that compute in float32 for a while -> in how many threads, and what their type is otherwise.
UPCAST: dict[ModelMixin, tuple[int, torch.dtype]] = {}
UPCASTING = threading.Lock()

logger = logging.getLogger(__name__)


def _package(module: str):
    """A module of the package, or `None` in a repository's copy of this file."""
    return importlib.import_module(f"freqgate_dit.{module}") if __name__.startswith("freqgate_dit.") else None


@contextmanager
def _upcast(vae: ModelMixin):
    """A float16 autoencoder that is known to overflow (`force_upcast`) computes in float32 and is put back."""
    with UPCASTING:
        threads, dtype = UPCAST.get(vae, (0, vae.dtype))
        upcast = dtype == torch.float16 and vae.config.get("force_upcast", False)
        if upcast:
            vae.to(torch.float32)
            UPCAST[vae] = threads + 1, dtype
    try:
        yield
    finally:
        if upcast:
            with UPCASTING:
                threads, dtype = UPCAST.pop(vae)
                if threads > 1:
                    UPCAST[vae] = threads - 1, dtype
                else:
                    vae.to(dtype)


def encode_to_latent_moments(vae: ModelMixin, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean and standard deviation of the scaled latents of `images`.

    The one place that encodes: training, caching and evaluation all come here, so the scaling cannot differ.

    Args:
        vae: `AutoencoderKL`, or a deterministic autoencoder such as `AutoencoderTiny`.
        images: `(B, 3, H, W)` in [-1, 1].

    Returns:
        mean `(B, C, h, w)` float32; standard deviation of the same shape, `None` for a deterministic autoencoder.
    """
    with _upcast(vae):
        encoded = vae.encode(images.to(vae.dtype))
    scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
    if hasattr(encoded, "latent_dist"):
        return (encoded.latent_dist.mean.float() - shift) * scale, encoded.latent_dist.std.float() * scale
    return (encoded.latents.float() - shift) * scale, None


def decode_from_latents(vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """Images `(B, 3, H, W)` in about [-1, 1] of scaled latents `(B, C, h, w)`: inverts `encode_to_latent_moments`."""
    scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
    with _upcast(vae):
        return vae.decode((latents / scale + shift).to(vae.dtype)).sample.float()


def broken_images(images: torch.Tensor) -> list[int]:
    """Which of `images (B, C, H, W)` have NaN or infinity in them."""
    return (~images.isfinite()).flatten(1).any(dim=1).nonzero()[:, 0].tolist()


def vae_scale_factor(vae: ModelMixin) -> int:
    """Pixels per latent, in each direction."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode_pooled_text(
    tokenizer, text_encoder: PreTrainedModel, prompts: Sequence[str], device: torch.device | None = None
) -> torch.Tensor:
    """Pooled embeddings `(len(prompts), P)` by a CLIP text model: `pooler_output`, or `text_embeds` if it projects.

    Warns of prompts of which it reads only the beginning. `device` is that of the inputs of an offloaded model, whose
    weights lie nowhere.
    """
    max_length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    for prompt, tokens in zip(prompts, tokenizer(list(prompts), verbose=False).input_ids):
        if len(tokens) > max_length:
            cut = tokenizer.decode(tokens[max_length - 1 : -1])
            logger.warning(f"the end of the prompt {prompt!r}, {cut!r}, is cut: {max_length} tokens are read.")
    tokens = tokenizer(
        list(prompts), padding="max_length", max_length=max_length, truncation=True, return_tensors="pt"
    ).to(device if text_encoder.device.type == "meta" else text_encoder.device)
    output = text_encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    return output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output


def _uses_null_condition(guider) -> bool:
    """Whether a guider asks for predictions without the condition; all of diffusers' do."""
    return getattr(guider, "uses_null_condition", True)


def _plain(value):
    """A tensor, array or NumPy scalar as Python's numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_integer(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_finite(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def forget_origin(config_file: Path):
    """Take out of a component's configuration where it was loaded from, often a local path, which libraries add."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name not in ("_name_or_path", "name_or_path")}
    if kept != config:
        config_file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class FreqGateDiTPipeline(DiffusionPipeline):
    r"""
    Class- or text-conditional (or unconditional) image generation with a Diffusion Transformer.

    Parameters:
        transformer (`ModelMixin`): one of the DiT variants of this package.
        scheduler (`EulerDiscreteScheduler`): or any scheduler of its family (DPM-Solver++, Heun, UniPC, DDIM, ...)
            that works on variance-preserving noise and has the prediction type the transformer was trained for.
        vae (`AutoencoderKL` or `AutoencoderTiny`, *optional*): decodes latents; without it the model works on pixels.
        text_encoder (`CLIPTextModel`, *optional*): pooled text embeddings, for models conditioned on text.
        tokenizer (`CLIPTokenizer`, *optional*): of the text encoder.
        id2label (`dict[int, str]`, *optional*): names of the classes.
        prediction_type (`str`, *optional*): what the transformer predicts; taken from `scheduler` when not given.
        class_dropout_prob (`float`, *optional*): how often training dropped the condition. At 0 the null condition
            was never trained and guidance is refused.

    Example:

    ```py
    >>> from freqgate_dit import FreqGateDiTPipeline

    >>> pipe = FreqGateDiTPipeline.from_pretrained("demo/run/pipeline")
    >>> image = pipe("ring fine-horizontal", guidance_scale=2.0, seed=0).images[0]
    ```
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents", "noise_pred", "pred_original_sample", "prompt_embeds"]

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: EulerDiscreteScheduler,
        vae: ModelMixin | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer=None,
        id2label: dict | None = None,
        prediction_type: str | None = None,
        class_dropout_prob: float | None = None,
    ):
        super().__init__()
        # `OtherScheduler.from_config` drops what is marked as a default and takes its own (Heun: other betas; DDIM and
        # DDPM: x0 clipped to [-1, 1]). Swapping must keep this noise schedule, so every value counts as given; but
        # `None` is none.
        schedule = {} if scheduler is None else scheduler.config
        if scheduler is not None:
            unset = [name for name, value in schedule.items() if value is None]
            scheduler.register_to_config(_use_default_values=unset, clip_sample=schedule.get("clip_sample", False))
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        # Without transformer or scheduler (`from_pretrained(folder, transformer=None)`) it encodes and decodes.
        known = {} if transformer is None else transformer.config
        num_classes = self.num_classes
        if id2label and num_classes is not None and not all(0 <= int(key) < num_classes for key in id2label):
            raise ValueError(
                f"`id2label` names the ids {sorted(map(int, id2label))}, but the transformer has {num_classes} "
                f"classes: name ids from 0 to {num_classes - 1} only."
            )
        output, expected = known.get("prediction_type"), schedule.get("prediction_type")
        if output is not None and expected is not None and output != expected:
            raise ValueError(
                f"`scheduler` expects prediction_type {expected!r}, but the transformer was built to output "
                f"{output!r}: make the scheduler with `from_config(scheduler.config, prediction_type={output!r})`."
            )
        self.register_to_config(
            # JSON turns integer keys into strings, and diffusers sorts those ("10" before "2").
            id2label=dict(sorted((int(key), label) for key, label in (id2label or {}).items())),
            prediction_type=prediction_type or schedule.get("prediction_type"),
            class_dropout_prob=class_dropout_prob,
        )
        self._alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
        self.vae_scale_factor = vae_scale_factor(vae) if vae is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        # Calls under way (see `_call_of_its_own`), and of the last one what diffusers' pipelines tell of theirs.
        self._called: FreqGateDiTPipeline | None = None
        self._calls: list[FreqGateDiTPipeline] = []
        self._interrupted, self._guidance_scale, self._num_timesteps, self._current_timestep = False, None, 0, None
        self._step, self._cached_shape = None, None

    # -- files and the Hub ------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "FreqGateDiTPipeline":
        r"""
        Load from a folder or a Hub repository; arguments are those of `DiffusionPipeline.from_pretrained` (`revision`,
        `variant`, `dtype`, `token`, `cache_dir`, `local_files_only`, `device_map`, components, ...).

        With the package installed, its own classes are used: no code of a repository is downloaded or run, and no flag
        is needed. Without it, this file came with a repository, and diffusers loads (`trust_remote_code=True`).

        Raises:
            ValueError: if there is no pipeline of this package, or it was made by a newer version of the package.
            OSError: if a repository cannot be had, or files are missing or damaged.
        """
        # diffusers takes what is no folder for a repository, whose name it expects as text.
        pretrained_model_name_or_path = os.fspath(pretrained_model_name_or_path)
        pipeline_folder = _package("pipeline_folder")
        if pipeline_folder and os.path.isdir(pretrained_model_name_or_path):
            pipeline_folder.check_folder(
                pretrained_model_name_or_path, kwargs.get("variant"), without=kwargs, class_name=cls.__name__
            )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name, **kwargs) -> str | os.PathLike:
        """Folder of a repository's files, which `from_pretrained` then loads.

        With the package its code is not among them, unless `trust_remote_code` asks for that.
        """
        hub = _package("hub")
        return (
            hub.download(pretrained_model_name, **kwargs) if hub else super().download(pretrained_model_name, **kwargs)
        )

    @classmethod
    def load_config(cls, pretrained_model_name_or_path, *args, **kwargs):
        """`model_index.json` as a dictionary; with the package, classes are the package's and not the repository's."""
        loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        pipeline_folder = _package("pipeline_folder")
        if pipeline_folder:
            pipeline_folder.use_package_classes(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        **kwargs,
    ) -> str | None:
        r"""
        Save weights, configurations and the code that they need, so that the folder loads, here and from the Hub, with
        the package (`FreqGateDiTPipeline.from_pretrained(folder)`) and without it
        (`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`).

        Args:
            save_directory: folder, made if it is not there.
            safe_serialization, variant, max_shard_size, **kwargs: as in `DiffusionPipeline.save_pretrained`.
            push_to_hub (`bool`, defaults to `False`): then upload the folder.
            repo_id (`str`, *optional*): where to; by default a repository of the folder's name under your own.
            commit_message, private, token, create_pr: of the upload.

        Returns:
            Address of what was uploaded, or `None`.

        Raises:
            ValueError: if there is no transformer, or it has a LoRA adapter, with which its weights would not load.
        """
        self._require_parts("a pipeline that is saved without one does not load")
        if any(".base_layer." in name for name in self.transformer.state_dict()):
            raise ValueError(
                "the transformer has LoRA adapters, or had, with whose names its weights would not load: make them "
                "part of it by `fuse_lora()` and `unload_lora()`, or save the adapter alone by "
                "`save_lora_adapter(folder)`."
            )
        folder = Path(save_directory)
        super().save_pretrained(folder, safe_serialization, variant, max_shard_size, **kwargs)
        for name in self.components:
            for config_file in (folder / name).glob("*config.json"):
                forget_origin(config_file)
        self._ship_code(folder)
        if not push_to_hub:
            return None
        options = {"commit_message": commit_message, "token": token, "create_pr": create_pr}
        repo_id, hub = repo_id or folder.resolve().name, _package("hub")
        if hub:
            return hub.push_folder(folder, repo_id, private=private, **options)
        repo_id = create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
        if not (folder / "README.md").exists():
            populate_model_card(load_or_create_model_card(repo_id, token=token, is_pipeline=True)).save(
                folder / "README.md"
            )
        return str(self._upload_folder(folder, repo_id, **options))

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        **kwargs,
    ) -> str:
        """Save and upload: arguments as in `save_pretrained`; returns the address of what was uploaded."""
        if subfolder:
            raise ValueError(f"`subfolder` ({subfolder!r}): a pipeline is loaded from the root of a repository only.")
        options = {"commit_message": commit_message, "private": private, "token": token, "create_pr": create_pr}
        with tempfile.TemporaryDirectory() as folder:
            return self.save_pretrained(
                folder, safe_serialization, variant, push_to_hub=True, repo_id=repo_id, **options, **kwargs
            )

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "FreqGateDiTPipeline":
        """As in `DiffusionPipeline`, which compares exact types and would leave transformer and autoencoder behind.

        Unless `dtype` is given, numbers keep their types. `DiffusionPipeline` makes float32 of all, in `pipeline` too,
        which has the same components.
        """
        components = {name: part for name, part in pipeline.components.items() if part is not None}
        parts = {**components, **kwargs}
        if {"dtype", "torch_dtype"} & kwargs.keys():
            return super().from_pipe(pipeline, **parts)
        modules = [module for part in parts.values() if isinstance(part, torch.nn.Module) for module in part.modules()]
        kept = [
            (
                module,
                {name: one.data for name, one in module._parameters.items() if one is not None},
                dict(module._buffers),
            )
            for module in modules
        ]
        new = super().from_pipe(pipeline, **parts)
        for module, parameters, buffers in kept:
            for name, data in parameters.items():
                module._parameters[name].data = data
            module._buffers.update(buffers)
        return new

    def _require_parts(self, why: str):
        for name in ("transformer", "scheduler"):
            if getattr(self, name) is None:
                raise ValueError(f"`{name}` is None: {why}.")

    def _ship_code(self, folder: Path):
        """Copy the files of custom classes into the folder, and name them in its index as diffusers looks for them.

        diffusers itself writes module paths, which load nowhere but in a process that has imported them.
        """
        index_file = folder / self.config_name
        index = json.loads(index_file.read_text(encoding="utf-8"))
        index.pop("_name_or_path", None)
        index["_freqgate_dit_version"] = __version__
        # Of a scheduler that another one has replaced.
        (folder / "scheduler" / "scheduling_spectral_euler.py").unlink(missing_ok=True)
        for name, value in index.items():
            # Ours are the package's modules, or copies of them that came with a repository.
            if isinstance(value, list) and str(value[0]).split(".")[0] in ("freqgate_dit", "diffusers_modules"):
                source = Path(sys.modules[value[0]].__file__)
                shutil.copyfile(source, folder / name / source.name)
                index[name] = [source.stem, value[1]]
        if type(self).__module__ == __name__:
            source = Path(__file__)
            shutil.copyfile(source, folder / source.name)
            index["_class_name"] = [source.stem, type(self).__name__]
        index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    # -- what the model is ------------------------------------------------------------------------------------------

    @property
    def id2label(self) -> dict[int, str]:
        """Class id -> name; empty if the classes have no names."""
        return {int(key): label for key, label in self.config.id2label.items()}

    @property
    def num_classes(self) -> int | None:
        return None if self.transformer is None else self.transformer.config.num_classes

    @property
    def is_text_conditional(self) -> bool:
        return self.transformer is not None and self.transformer.config.pooled_projection_dim is not None

    @property
    def _can_encode_prompts(self) -> bool:
        return self.text_encoder is not None and self.tokenizer is not None

    @property
    def is_conditional(self) -> bool:
        return self.num_classes is not None or self.is_text_conditional

    @property
    def has_null_condition(self) -> bool:
        """Whether guidance is possible: the model is conditional and has seen the null condition in training."""
        return self.is_conditional and self.config.class_dropout_prob != 0

    @property
    def default_guidance_scale(self) -> float:
        """2.5 where the model is known to have a null condition; otherwise guidance could mean nothing."""
        is_known = self.has_null_condition and self.config.class_dropout_prob is not None
        return SOURCE_GUIDANCE_SCALE if is_known else 1.0

    # -- what a call is doing ---------------------------------------------------------------------------------------

    @contextmanager
    def _call_of_its_own(self):
        """The pipeline as one call, and its callback, see it: the same components, but a scheduler and a state of its
        own, so that calls in several threads, or of a callback, leave each other alone."""
        call, called = copy.copy(self), self._called or self
        # Not by assignment, for which diffusers would write the configuration anew.
        call.__dict__.update(scheduler=copy.deepcopy(self.scheduler), _called=called, _calls=[], _interrupted=False)
        called._calls.append(call)
        try:
            if len(called._calls) > 1 and getattr(self.transformer, "is_cache_enabled", False):
                raise ValueError(
                    "the transformer has a cache, which serves one call at a time: let the other call end, or switch "
                    "the cache off (`pipe.transformer.disable_cache()`)."
                )
            yield call
        finally:
            called._calls.remove(call)
            for name in ("_guidance_scale", "_num_timesteps", "_current_timestep"):
                setattr(called, name, getattr(call, name))

    def _latest(self) -> "FreqGateDiTPipeline":
        """Of a pipeline, what was begun last of the calls under way."""
        return next(reversed(self._calls), self)

    @property
    def guidance_scale(self) -> float | None:
        """That of the call. A callback may set `_guidance_scale`; 0 and 1 both switch guidance off there."""
        return self._latest()._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Evaluations that the call takes (of the scheduler's timesteps; with guiders each may take several)."""
        return self._latest()._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._latest()._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether the call is to stop after its step. A callback sets `_interrupt` for its own call; set on the
        pipeline, from another thread, it stops all calls that are under way."""
        return self._latest()._interrupted

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool):
        for call in [self] if self._called else list(self._calls):
            call._interrupted = value

    # -- inputs -----------------------------------------------------------------------------------------------------

    def get_label_ids(self, labels: str | int | Sequence[str | int]) -> list[int]:
        """Class ids of names or ids, one or several.

        Raises:
            ValueError: for an unknown name or an id out of range; names what exists, and what is nearest.
        """
        labels = _plain(labels)
        if isinstance(labels, (str, int, float)):
            labels = [labels]
        labels = list(map(_plain, labels))
        # One name can be written in several ways: "é" as a letter, or as a letter and an accent.
        ids = {unicodedata.normalize("NFC", name): index for index, name in self.id2label.items()}
        return [self._get_label_id(label, ids) for label in labels]

    def _get_label_id(self, label: str | int, ids: dict[str, int]) -> int:
        if isinstance(label, str):
            label = unicodedata.normalize("NFC", label)
            if label in ids:
                return ids[label]
            if not ids:
                raise ValueError(
                    f"`class_labels` has the name {label!r}, but the classes of this model have no names: use ids "
                    f"from 0 to {self.num_classes - 1}."
                )
            containing = [name for name in ids if label.lower() in name.lower()]
            near = (containing or difflib.get_close_matches(label, ids, n=3, cutoff=0.4))[:3]
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            known = ", ".join(map(repr, list(ids)[:10]))
            more = f" and {len(ids) - 10} more (`pipe.id2label`)" if len(ids) > 10 else ""
            raise ValueError(f"`class_labels` has the unknown label {label!r}.{hint} This model knows {known}{more}.")
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < self.num_classes:
            raise ValueError(
                f"`class_labels` has {label!r}; ids of this model are the integers from 0 to {self.num_classes - 1}."
            )
        return label

    def check_inputs(
        self,
        class_labels,
        prompt,
        pooled_prompt_embeds,
        negative_prompt,
        negative_pooled_prompt_embeds,
        num_images_per_label: int,
        num_inference_steps: int,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        height: int | None,
        width: int | None,
        guidance_scale: float | None,
        guidance_interval: tuple[float, float],
        guider,
        seed,
        generator,
        latents,
        output_type: str,
        callback_on_step_end,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ):
        """Raise `ValueError`, naming argument, value and remedy, for a call that cannot be served."""
        self._require_parts("this pipeline can encode prompts and decode latents, but not sample")
        self._check_condition(
            class_labels, prompt, pooled_prompt_embeds, negative_prompt, negative_pooled_prompt_embeds
        )
        self._check_guidance(guidance_scale, guidance_interval, guider)
        self._check_scheduler()
        counts = {"num_images_per_label": num_images_per_label}
        if timesteps is None and sigmas is None:
            counts["num_inference_steps"] = num_inference_steps
        for name, count in counts.items():
            if not _is_integer(count) or count < 1:
                raise ValueError(f"`{name}` ({count!r}) must be an integer, at least 1.")
        self._check_steps(timesteps, sigmas)

        multiple = self.vae_scale_factor * self.transformer.config.patch_size
        for name, side in (("height", height), ("width", width)):
            if side is not None and (not _is_integer(side) or side <= 0 or side % multiple):
                nearest = max(multiple, round(side / multiple) * multiple) if _is_finite(side) else multiple
                raise ValueError(
                    f"`{name}` ({side!r}) must be a multiple of {multiple} (autoencoder factor "
                    f"{self.vae_scale_factor} x patch size {self.transformer.config.patch_size}), such as {nearest}."
                )
        for name, value, kind in (("generator", generator, torch.Generator), ("latents", latents, torch.Tensor)):
            values = value if name == "generator" and isinstance(value, (list, tuple)) else [value]
            if value is not None and not all(isinstance(one, kind) for one in values):
                raise ValueError(f"`{name}` ({value!r}) must be of the type `torch.{kind.__name__}`.")
        if seed is not None and generator is not None:
            raise ValueError(f"`seed` ({seed}) and `generator` were both given: give only one of them.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` ({output_type!r}) must be 'pil', 'np', 'pt' or 'latent'.")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"`callback_on_step_end` ({callback_on_step_end!r}) cannot be called.")
        names = callback_on_step_end_tensor_inputs
        if not isinstance(names, (list, tuple)):
            raise ValueError(f"`callback_on_step_end_tensor_inputs` ({names!r}) must be a list of names.")
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown}; choose from {self._callback_tensor_inputs}."
            )

    def _check_steps(self, timesteps, sigmas):
        own = {"timesteps": timesteps, "sigmas": sigmas}
        own = {name: values for name, values in own.items() if values is not None}
        if len(own) > 1:
            raise ValueError("`timesteps` and `sigmas` were both given: give only one of them.")
        for name, values in own.items():
            least, most = (1, self.scheduler.config.num_train_timesteps) if name == "timesteps" else (2, math.inf)
            if (
                not isinstance(values, (list, tuple))
                or len(values) < least
                or not all(_is_finite(value) and 0 <= value < most for value in values)
                or any(after >= before for before, after in zip(values, values[1:]))
            ):
                raise ValueError(
                    f"`{name}` ({values!r}) must be a list of {least} or more falling numbers from 0 to below {most}."
                )
            if name not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(
                    f"`{name}` was given, but {type(self.scheduler).__name__} chooses its own: use "
                    "`num_inference_steps`, or another scheduler."
                )

    def _check_condition(
        self, class_labels, prompt, pooled_prompt_embeds, negative_prompt, negative_pooled_prompt_embeds
    ):
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            texts = text if isinstance(text, (list, tuple)) else [text]
            if text is not None and not all(isinstance(one, str) for one in texts):
                raise ValueError(f"`{name}` ({text!r}) must be text, or a list of texts.")
        for name, embeds in (
            ("pooled_prompt_embeds", pooled_prompt_embeds),
            ("negative_pooled_prompt_embeds", negative_pooled_prompt_embeds),
        ):
            if embeds is not None and not torch.is_tensor(embeds):
                raise ValueError(f"`{name}` ({embeds!r}) must be a tensor.")
        conditions = {"class_labels": class_labels, "prompt": prompt, "pooled_prompt_embeds": pooled_prompt_embeds}
        given = [name for name, value in conditions.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(f'`{name}`' for name in given)} were both given: give only one of them.")
        if prompt is not None and not self._can_encode_prompts:
            labels = f" Use `class_labels`: {list(self.id2label.values())[:20]}." if self.id2label else ""
            raise ValueError(f"`prompt` ({prompt!r}) needs a text encoder, which this pipeline does not have.{labels}")
        if self.num_classes is not None and "class_labels" not in given:
            known = list(self.id2label.values()) or f"ids from 0 to {self.num_classes - 1}"
            raise ValueError(f"`class_labels` is missing; this model knows: {known}.")
        if self.is_text_conditional and (not given or "class_labels" in given):
            got = f"got `class_labels` ({class_labels!r})" if given else "got no condition"
            raise ValueError(
                f"this model is conditioned on text and {got}: pass `prompt` (or `pooled_prompt_embeds`)."
            )
        if not self.is_conditional and given:
            raise ValueError(f"`{given[0]}` was given, but this model is unconditional: leave it out.")
        if pooled_prompt_embeds is not None:
            dim = self.transformer.config.pooled_projection_dim
            if pooled_prompt_embeds.ndim != 2 or pooled_prompt_embeds.shape[1] != dim:
                raise ValueError(
                    f"`pooled_prompt_embeds` has shape {tuple(pooled_prompt_embeds.shape)}; expected (prompts, {dim})."
                )
        # Left aside without a word, these would look as if they had no influence.
        negative = {"negative_prompt": negative_prompt or None}
        negative["negative_pooled_prompt_embeds"] = negative_pooled_prompt_embeds
        negative = [name for name, value in negative.items() if value is not None]
        if negative and not self.is_text_conditional:
            raise ValueError(f"`{negative[0]}` was given, but this model is not conditioned on text: leave it out.")
        if len(negative) > 1:
            raise ValueError("`negative_prompt` and `negative_pooled_prompt_embeds` were both given: give only one.")
        if negative_prompt and not self._can_encode_prompts:
            raise ValueError(
                f"`negative_prompt` ({negative_prompt!r}) needs a text encoder, which this pipeline does not have: "
                "use `negative_pooled_prompt_embeds`."
            )
        for name, values in conditions.items():
            if (isinstance(values, (list, tuple)) and not values) or 0 in getattr(values, "shape", ()):
                raise ValueError(f"`{name}` is empty: give at least one.")

    def _check_guidance(self, guidance_scale: float | None, guidance_interval: tuple[float, float], guider):
        is_pair = isinstance(guidance_interval, (list, tuple)) and len(guidance_interval) == 2
        numeric = is_pair and all(map(_is_finite, guidance_interval))
        if not numeric or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
            raise ValueError(
                f"`guidance_interval` ({guidance_interval}) must be (start, stop) with 0 <= start <= stop <= 1, as "
                "fractions of the steps."
            )
        if guider is not None and not hasattr(guider, "prepare_inputs"):
            raise ValueError(f"`guider` ({guider!r}) is no guider of diffusers or `freqgate_dit.guidance`.")
        if guider is not None and guidance_scale is not None:
            raise ValueError(
                f"`guider` and `guidance_scale` ({guidance_scale}) were both given: the guider has its own scale."
            )
        if guider is not None and tuple(guidance_interval) != (0, 1):
            raise ValueError(
                f"`guider` and `guidance_interval` ({guidance_interval}) were both given: the guider has its own "
                "`start` and `stop`."
            )
        if guider is not None and hasattr(
            getattr(self.transformer, "_cache_config", None), "current_timestep_callback"
        ):
            raise ValueError(
                "`guider` was given, whose passes pyramid attention broadcast would take for one another: use "
                "`guidance_scale`, or another cache."
            )
        if guidance_scale is not None and not _is_finite(guidance_scale):
            raise ValueError(f"`guidance_scale` ({guidance_scale!r}) must be a finite number.")
        guided = _uses_null_condition(guider) if guider else guidance_scale is not None and guidance_scale != 1
        if guided and not self.has_null_condition:
            why = (
                "was trained with `class_dropout_prob` 0, so its null condition means nothing"
                if self.is_conditional
                else "is unconditional"
            )
            what = "`guider`" if guider is not None else f"`guidance_scale` ({guidance_scale})"
            raise ValueError(f"{what} needs a null condition, but this model {why}: use `guidance_scale=1`.")
        if guided and self.config.class_dropout_prob is None:
            logger.warning(
                "`class_dropout_prob` of this pipeline is not known (None), so guidance may mean nothing: give it, or "
                "copy pipelines by `FreqGateDiTPipeline.from_pipe(pipe)`, which keeps it."
            )

    def _check_scheduler(self):
        if "step" in vars(self.scheduler):
            raise ValueError(
                "`scheduler.step` was replaced in the object, of which every call makes a copy: write a subclass, or "
                "look at the steps in `callback_on_step_end`."
            )
        kind, alphas_cumprod = type(self.scheduler).__name__, getattr(self.scheduler, "alphas_cumprod", None)
        prediction_type = self.scheduler.config.get("prediction_type")
        has_other_noise = self._alphas_cumprod is not None and alphas_cumprod is None
        if prediction_type is None or self.scheduler.config.get("use_flow_sigmas") or has_other_noise:
            raise ValueError(
                f"the scheduler ({kind}) is for flow matching, EDM's noise or the like, but the transformer was "
                "trained on variance-preserving noise: use `EulerDiscreteScheduler` or one of its family ("
                "`DPMSolverMultistepScheduler`, `HeunDiscreteScheduler`, `UniPCMultistepScheduler`, "
                "`DDIMScheduler`)."
            )
        if prediction_type != self.config.prediction_type:
            raise ValueError(
                f"the scheduler's `prediction_type` is {prediction_type!r}, but the transformer predicts "
                f"{self.config.prediction_type!r}: build it with `{kind}.from_config("
                f"pipe.scheduler.config, prediction_type={self.config.prediction_type!r})`."
            )
        # `step` takes prediction, timestep and sample.
        parameters = list(inspect.signature(self.scheduler.step).parameters.values())[3:]
        needs_more = any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
        if needs_more or "Inverse" in kind:
            raise ValueError(
                f"the scheduler ({kind}) does not make images of noise alone: use `EulerDiscreteScheduler` or one of "
                "its family."
            )
        if self._alphas_cumprod is not None and not (
            alphas_cumprod.shape == self._alphas_cumprod.shape
            and torch.allclose(alphas_cumprod.cpu(), self._alphas_cumprod.cpu())
        ):
            raise ValueError(
                f"the scheduler ({kind}) has other betas than the one this pipeline was made "
                "with, so the transformer would see noise levels under wrong timesteps: build it with "
                f"`{kind}.from_config(...)` from the config of the pipeline's own scheduler."
            )

    def encode_prompt(self, prompt: str | Sequence[str]) -> torch.Tensor:
        """Pooled text embeddings `(len(prompt), P)` of one prompt or several."""
        if not self._can_encode_prompts:
            raise ValueError(
                f"`prompt` ({prompt!r}) needs a text encoder and its tokenizer: load the pipeline with them."
            )
        prompts = [prompt] if isinstance(prompt, str) else prompt
        return encode_pooled_text(self.tokenizer, self.text_encoder, prompts, self._execution_device)

    def prepare_conditions(
        self, class_labels, prompt, negative_prompt, pooled_prompt_embeds, negative_pooled_prompt_embeds, device
    ) -> tuple[str | None, torch.Tensor | None, torch.Tensor | None]:
        """Name of the transformer's argument, its conditional values `(K, ...)` and its null values `(K, ...)`."""
        if self.num_classes is not None:
            ids = torch.tensor(self.get_label_ids(class_labels), dtype=torch.long, device=device)
            return "class_labels", ids, torch.full_like(ids, self.num_classes)
        if self.is_text_conditional:
            if pooled_prompt_embeds is None:
                pooled_prompt_embeds = self.encode_prompt(prompt)
            if negative_pooled_prompt_embeds is None and self._can_encode_prompts:
                negative_pooled_prompt_embeds = self.encode_prompt(negative_prompt or "")
            if negative_pooled_prompt_embeds is not None:
                negative_pooled_prompt_embeds = negative_pooled_prompt_embeds.to(device)
                count, dim = pooled_prompt_embeds.shape
                if tuple(negative_pooled_prompt_embeds.shape) not in ((1, dim), (count, dim)):
                    raise ValueError(
                        "`negative_prompt` or `negative_pooled_prompt_embeds` gives embeddings of shape "
                        f"{tuple(negative_pooled_prompt_embeds.shape)}; expected one for all, (1, {dim}), or one for "
                        f"each prompt, ({count}, {dim})."
                    )
                negative_pooled_prompt_embeds = negative_pooled_prompt_embeds.expand_as(pooled_prompt_embeds)
            return "pooled_projections", pooled_prompt_embeds.to(device), negative_pooled_prompt_embeds
        return None, None, None

    def prepare_timesteps(self, num_inference_steps: int, timesteps, sigmas, device):
        """Set the scheduler's timesteps: `num_inference_steps` of its own choice, or those that are given."""
        name, given = "num_inference_steps", num_inference_steps
        if timesteps is not None:
            name, given = "timesteps", timesteps
        elif sigmas is not None:
            name, given = "sigmas", sigmas
        kind = type(self.scheduler).__name__
        try:
            self.scheduler.set_timesteps(**{name: given}, device=device)
        except (IndexError, ValueError) as error:
            raise ValueError(f"`{name}` ({given}) is nothing that {kind} can take: {error}") from error
        levels = getattr(self.scheduler, "sigmas", None)
        if kind in NEED_DISTANCE and levels is not None and (levels.diff() == 0).any():
            raise ValueError(
                f"`{name}` ({given}) gives two steps one noise level, by the distance of which {kind} divides: take "
                "fewer, or others."
            )

    def prepare_generators(
        self,
        batch_size: int,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Generator | list[torch.Generator]:
        """The source of all noise of a call: `generator`, or for image i one of its own on the CPU, of seed s + i.

        Without either, the seed comes from torch's global generator, so that `torch.manual_seed` is obeyed.
        """
        if generator is not None:
            if isinstance(generator, (list, tuple)) and len(generator) != batch_size:
                raise ValueError(f"`generator` has {len(generator)} generators for {batch_size} images: one each.")
            return list(generator) if isinstance(generator, (list, tuple)) else generator
        if seed is None:
            seed = torch.randint(2**48, ()).item()
        seed = _plain(seed)
        if not _is_integer(seed) and not isinstance(seed, (list, tuple, range)):
            raise ValueError(f"`seed` ({seed!r}) must be an int, or a list of one int for each image.")
        seeds = [seed + index for index in range(batch_size)] if _is_integer(seed) else list(seed)
        if len(seeds) != batch_size:
            raise ValueError(f"`seed` has {len(seeds)} seeds for {batch_size} images: give one each, or one int.")
        for one in seeds:
            if not _is_integer(one) or not -(2**63) <= one < 2**64:
                raise ValueError(f"`seed` has {one!r}: seeds are integers from -2**63 to 2**64 - 1.")
        return [torch.Generator("cpu").manual_seed(int(one)) for one in seeds]

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Unit noise `(B, C, h, w)` in float32, given or drawn, times the scheduler's `init_noise_sigma`."""
        shape = (
            batch_size,
            self.transformer.config.in_channels,
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise ValueError(
                    f"`latents` has shape {tuple(latents.shape)}; expected unit noise of shape {shape} (images, "
                    "channels, height, width)."
                )
            latents = latents.to(device, torch.float32)
        else:
            latents = randn_tensor(shape, generator=generator, device=torch.device(device), dtype=torch.float32)
        return latents * self.scheduler.init_noise_sigma

    # -- one network evaluation -------------------------------------------------------------------------------------

    def _denoise(self, latents, timestep, name, condition, context: str = "cond", network=None) -> torch.Tensor:
        """The prediction in float32, by the transformer or another `network`, in a `context` for caches. The timestep
        stays as the scheduler made it, fractional."""
        if name == "pooled_projections":
            condition = condition.to(self.transformer.dtype)
        arguments = {} if name is None else {name: condition}
        network = network or self.transformer
        with self._cache_context(context, latents, timestep):
            return network(latents.to(self.transformer.dtype), timestep, **arguments).sample.float()

    def _cache_context(self, name: str, latents, timestep):
        """What diffusers' caches (`transformer.enable_cache`) are told of a pass. They begin anew with every call, and
        where the number of samples or of tokens changes."""
        transformer = self.transformer
        if not getattr(transformer, "is_cache_enabled", False):
            return nullcontext()
        has_views = transformer.config.get("grid_views", 1) > 1
        shape = len(latents), transformer.views_of(timestep[None]).item() if has_views else 0
        if shape != self._cached_shape:
            if self._cached_shape is not None and hasattr(transformer._cache_config, "mag_ratios"):
                raise ValueError(
                    "MagCache counts the steps of a call, and cannot begin anew where guidance or a view of the model "
                    "begins or ends: guide all steps or none, or use another cache."
                )
            transformer._reset_stateful_cache()
            self._cached_shape = shape
        return transformer.cache_context(
            name, step_index=self._step, num_inference_steps=self._num_timesteps, timestep=timestep
        )

    def _guided_prediction(self, latents, timestep, name, condition, null_condition) -> torch.Tensor:
        """Classifier-free guidance `uncond + s * (cond - uncond)` on all channels, both halves in one batch."""
        if null_condition is None:  # and a callback has asked for guidance
            raise ValueError(NO_NULL_EMBEDS)
        conditions = torch.cat([condition, null_condition])
        both = self._denoise(torch.cat([latents, latents]), timestep, name, conditions, "cond_uncond")
        cond, uncond = both.chunk(2)
        return uncond + self._guidance_scale * (cond - uncond)

    def _guider_prediction(self, guider, latents, timestep, name, condition, null_condition):
        """Prediction of a diffusers guider, which asks for its passes one by one."""
        guider.set_state(step=self._step, num_inference_steps=self._num_timesteps, timestep=timestep)
        batches = guider.prepare_inputs({} if name is None else {name: (condition, null_condition)})
        # Of the package's guiders some have another network answer.
        network_of_pass = getattr(guider, "network_of_pass", lambda transformer, device: transformer)
        for batch in batches:
            given, context = getattr(batch, name) if name else None, getattr(batch, guider._identifier_key)
            try:
                guider.prepare_models(self.transformer)
                network = network_of_pass(self.transformer, latents.device)
                batch.noise_pred = self._denoise(latents, timestep, name, given, context, network)
            finally:
                guider.cleanup_models(self.transformer)
        return guider(batches).pred

    # -- the loop ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        class_labels: str | int | Sequence[str | int] | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        num_images_per_label: int = 1,
        num_inference_steps: int = 20,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guider=None,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["FreqGateDiTPipeline", int, float, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        r"""
        Args:
            class_labels: names or ids of classes, one or several, for a class-conditional model.
            prompt: one or several, for a text-conditional model with text encoder.
            negative_prompt (`str` or list, *optional*): the null condition of a text-conditional model, by default "".
            pooled_prompt_embeds (`torch.Tensor` of shape `(K, P)`, *optional*): instead of `prompt`.
            negative_pooled_prompt_embeds (`torch.Tensor` of shape `(1, P)` or `(K, P)`, *optional*): the null.
            num_images_per_label (`int`, defaults to `1`): images for each label or prompt. Images of one label follow
                each other.
            num_inference_steps (`int`, defaults to `20`): steps of the scheduler.
            timesteps, sigmas (list, *optional*): timesteps, or noise levels and last of all where they end (0), in
                place of `num_inference_steps`, for schedulers whose `set_timesteps` takes them. They fall.
            guidance_scale (`float`, *optional*): s in `uncond + s * (cond - uncond)`. 1 is the conditional model, in
                one pass per step. Defaults to 2.5 where the model is known to have learnt a null condition
                (`class_dropout_prob` above 0), otherwise to 1.
            guidance_interval (`tuple`, defaults to `(0, 1)`): fractions of the steps between which guidance acts.
            guider (`diffusers.guiders.BaseGuidance`, *optional*): instead of `guidance_scale`. The call works on a
                copy of it.
            height, width (`int`, *optional*): pixels; default to the size that the model was trained at.
            seed (`int` or list, *optional*): image i is a function of seed + i (or of its own seed in a list), on
                every device and, up to rounding, in every batch size.
            generator (`torch.Generator` or list, *optional*): instead of `seed`.
            latents (`torch.Tensor` of shape `(images, C, h, w)`, *optional*): unit normal noise to start from.
            output_type (`str`, defaults to `"pil"`): "pil", "np" `(N, H, W, 3)` in [0, 1], "pt" `(N, 3, H, W)` in
                [0, 1], or "latent".
            return_dict (`bool`, defaults to `True`): an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: called after each step as `callback(pipe, step, timestep, tensors)`; may return a
                dict with new `latents`. `pipe` is the pipeline as this call sees it: its `scheduler` and its state are
                the call's own, and no call touches those of the pipeline itself. With `pipe._interrupt = True` the
                call stops, with `pipe._guidance_scale = s` it goes on with another scale (0 or 1: without guidance).
                diffusers' `PipelineCallback`s name their own tensors.
            callback_on_step_end_tensor_inputs: of "latents", "noise_pred", "pred_original_sample" (`None` with
                schedulers that do not compute it) and "prompt_embeds" (class ids or text embeddings, to read only).

        Raises:
            ValueError: for input that cannot be served, naming the argument, its value and the remedy.
        """
        # 1. Check and default
        guidance_scale, guidance_interval = _plain(guidance_scale), _plain(guidance_interval)
        timesteps, sigmas = _plain(timesteps), _plain(sigmas)
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            class_labels,
            prompt,
            pooled_prompt_embeds,
            negative_prompt,
            negative_pooled_prompt_embeds,
            num_images_per_label,
            num_inference_steps,
            timesteps,
            sigmas,
            height,
            width,
            guidance_scale,
            guidance_interval,
            guider,
            seed,
            generator,
            latents,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        sample_size = self.transformer.config.sample_size * self.vae_scale_factor
        height = sample_size if height is None else height
        width = sample_size if width is None else width
        if guidance_scale is None:
            guidance_scale = self.default_guidance_scale
        device = self._execution_device

        with self._call_of_its_own() as call:
            # 2. Conditions, repeated for each image
            name, condition, null_condition = self.prepare_conditions(
                class_labels, prompt, negative_prompt, pooled_prompt_embeds, negative_pooled_prompt_embeds, device
            )
            batch_size = num_images_per_label
            if name is not None:
                condition = condition.repeat_interleave(num_images_per_label, dim=0)
                batch_size = condition.shape[0]
                if null_condition is not None:
                    null_condition = null_condition.repeat_interleave(num_images_per_label, dim=0)
                elif _uses_null_condition(guider) if guider else guidance_scale != 1:
                    raise ValueError(NO_NULL_EMBEDS)

            # 3. Timesteps and noise
            call.prepare_timesteps(num_inference_steps, timesteps, sigmas, device)
            generator = call.prepare_generators(batch_size, seed, generator)
            latents = call.prepare_latents(batch_size, height, width, device, generator, latents)

            # 4. Denoise
            call._guidance_scale = None if guider else guidance_scale
            latents = call._denoise_all(
                latents,
                (name, condition, null_condition),
                guidance_interval,
                copy.copy(guider),  # it counts steps and passes
                generator,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
            )

        # 5. Decode
        images = self.postprocess(latents, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)

    def _denoise_all(
        self, latents, conditions, guidance_interval, guider, generator, callback, callback_tensor_inputs
    ) -> torch.Tensor:
        """From noise to clean latents, at the timesteps of the scheduler."""
        # Stochastic schedulers draw from the same source at every step.
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generator} if takes_generator else {}
        timesteps = self.scheduler.timesteps
        self._num_timesteps, self._cached_shape = len(timesteps), None
        first_guided, last_guided = (int(fraction * len(timesteps)) for fraction in guidance_interval)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                self._step, self._current_timestep = i, t
                model_input = self.scheduler.scale_model_input(latents, t)
                if guider is not None:
                    noise_pred = self._guider_prediction(guider, model_input, t, *conditions)
                elif self._guidance_scale != 1 and first_guided <= i < last_guided:
                    noise_pred = self._guided_prediction(model_input, t, *conditions)
                else:
                    noise_pred = self._denoise(model_input, t, *conditions[:2])
                step = self.scheduler.step(noise_pred, t, latents, **step_kwargs)
                latents = step.prev_sample

                if callback is not None:
                    tensors = {
                        "latents": latents,
                        "noise_pred": noise_pred,
                        "pred_original_sample": step.get("pred_original_sample"),
                        "prompt_embeds": conditions[1],
                    }
                    tensors = {key: tensors[key] for key in callback_tensor_inputs}
                    latents = self._call_back(callback, i, t, tensors).get("latents", latents)
                progress_bar.update()
                if self._interrupted:
                    break
        return latents

    def _call_back(self, callback, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        """What the callback returns. Its guidance scale is checked as that of a call is."""
        before = self._guidance_scale
        returned = callback(self, step, timestep, tensors) or {}
        scale = _plain(self._guidance_scale)
        if scale != before:
            if before is None:
                raise ValueError(f"a callback set `_guidance_scale` ({scale}), but the call has a guider.")
            self._guidance_scale = scale or 1.0  # 0 is how diffusers' callbacks switch guidance off
            self._check_guidance(self._guidance_scale, (0, 1), None)
        return returned

    @torch.no_grad()
    def postprocess(self, latents: torch.Tensor, output_type: str = "pil"):
        """Images of latents `(B, C, h, w)` (or of predicted x0 on the way), as `output_type` says.

        Warns of images that would come out black, because a number in them is not finite.
        """
        if output_type == "latent":
            return latents
        images = self.decode(latents)
        broken = len(broken_images(images))
        if broken:
            logger.warning(f"{broken} of {len(images)} images have NaN or infinity in them. {WHY_BROKEN}")
        return self.image_processor.postprocess(images, output_type=output_type)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)`, about [-1, 1], of latents `(B, C, h, w)`, which are images already without a VAE."""
        return latents if self.vae is None else decode_from_latents(self.vae, latents)
