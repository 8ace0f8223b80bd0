"""Warm starts: adaLN-Zero DiTs of other origin as models of this package, and from any of them a Freq-Gate model.

What is converted computes what its original computes: `from_diffusers` diffusers' `DiTTransformer2DModel`,
`from_official` and `load_official` the checkpoints of DiT (Peebles & Xie 2023, github.com/facebookresearch/DiT),
`from_dit_pipeline` a whole `DiTPipeline`, `freq_gate_from_adaln_zero` any adaLN-Zero model, with gates. Models come in
evaluation mode, with tensors of their own on the original's device.
"""

import argparse
import math
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, EulerDiscreteScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file

from freqgate_dit.pipelines.pipeline_freqgate_dit import FreqGateDiTPipeline
from freqgate_dit.transformer_freqgate_dit import (
    AdaLNZeroDiTTransformer2DModel,
    FreqGateDiTTransformer2DModel,
    sincos_position_embedding,
)


# -- Freq-Gate from adaLN-Zero ----------------------------------------------------------------------------------------


def freq_gate_from_adaln_zero(model: AdaLNZeroDiTTransformer2DModel) -> FreqGateDiTTransformer2DModel:
    """A Freq-Gate model with `gate_residual` that computes bit for bit what `model` computes, until it is trained.

    Low and High are zero. The gate, without effect as long as they are, is initialised anew from torch's global
    generator. Device and dtype are those of `model`.

    Raises:
        ValueError: if `model` is another variant.
    """
    if not isinstance(model, AdaLNZeroDiTTransformer2DModel):
        raise ValueError(
            f"`model` is a {type(model).__name__}: only an AdaLNZeroDiTTransformer2DModel computes something that a "
            "Freq-Gate model can start from."
        )
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    gated = FreqGateDiTTransformer2DModel(**{**config, "gate_residual": True})
    fresh = {name: tensor.to(model.device, model.dtype) for name, tensor in gated.state_dict().items()}
    given = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gated.load_state_dict({**fresh, **given}, assign=True)
    return gated.eval()


# -- diffusers --------------------------------------------------------------------------------------------------------


def from_diffusers(transformer: DiTTransformer2DModel, keep_variance: bool = False) -> AdaLNZeroDiTTransformer2DModel:
    """The model that computes what diffusers' `DiTTransformer2DModel` computes on inputs of its `sample_size`.

    (At other sizes diffusers stretches its positions, this package does not. Dropout is taken over in the MLP only,
    where the models of this package have it.)

    Args:
        transformer: of any size, device and dtype, which are kept.
        keep_variance: with twice as many output as input channels, the second half predicts the variance ("learned
            sigma"), which Euler and its family do not use: by default it is left out, and the output is the first
            half. `True` keeps all channels.

    Raises:
        ValueError: for what models of this package cannot express: a time or class embedder that differs between
            blocks (after training with diffusers' class, which has one in each), affine norms, upcast attention.
    """
    config = transformer.config
    for name in ("norm_elementwise_affine", "upcast_attention"):
        if config[name]:
            raise ValueError(
                f"`{name}` ({config[name]}) of the transformer has no counterpart in this package, whose adaLN-Zero "
                "model is DiT's: only transformers without it can be converted."
            )
    blocks = transformer.transformer_blocks
    _refuse_unequal_embedders([block.norm1.emb.state_dict() for block in blocks])
    embedders = blocks[0].norm1.emb
    parts = {
        "patch_embed": transformer.pos_embed.proj,
        "time_embed": embedders.timestep_embedder,
        "class_embed": embedders.class_embedder.embedding_table,
        "modulation_out.linear": transformer.proj_out_1,
        "proj_out": transformer.proj_out_2,
    }
    for index, block in enumerate(blocks):
        here = {
            "modulation.linear": block.norm1.linear,
            "attn.to_q": block.attn1.to_q,
            "attn.to_k": block.attn1.to_k,
            "attn.to_v": block.attn1.to_v,
            "attn.to_out": block.attn1.to_out[0],
            "ff": block.ff,
        }
        parts |= {f"transformer_blocks.{index}.{name}": part for name, part in here.items()}
    tensors = {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()}
    same = ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size", "patch_size")
    arguments = {
        **{name: config[name] for name in (*same, "activation_fn", "attention_bias", "dropout")},
        "out_channels": transformer.out_channels,
        "num_classes": config.num_embeds_ada_norm,
        # Only the norms before the MLPs obey `norm_eps` there.
        "norm_eps": blocks[0].norm1.norm.eps,
        "mlp_norm_eps": config.norm_eps,
        "freq_shift": embedders.time_proj.downscale_freq_shift,
    }
    return _build(arguments, tensors, keep_variance)


def _refuse_unequal_embedders(embedders: list[dict[str, torch.Tensor]]):
    for index, embedder in enumerate(embedders):
        for name, tensor in embedder.items():
            if not torch.equal(tensor, embedders[0][name]):
                raise ValueError(
                    f"`transformer` has other time and class embedders in block {index} than in block 0 ({name}): "
                    "a model of this package has one for all blocks, so this one cannot be converted."
                )


def from_dit_pipeline(pipeline: DiTPipeline) -> FreqGateDiTPipeline:
    """The pipeline with a converted transformer (without predicted variance) and the same autoencoder object.

    The scheduler is Euler's with the original's betas and prediction type, and trailing timesteps. Classes are named
    by their full texts ("tench, Tinca tinca"), which diffusers leaves in the folder or cached repository that the
    pipeline was loaded from; where that is not to be found, by the words of `pipeline.labels`.

    Raises:
        ValueError: as `from_diffusers`.
    """
    noise = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    scheduler = EulerDiscreteScheduler(
        **{name: pipeline.scheduler.config[name] for name in noise},
        rescale_betas_zero_snr=pipeline.scheduler.config.get("rescale_betas_zero_snr", False),
        timestep_spacing="trailing",
    )
    return FreqGateDiTPipeline(
        from_diffusers(pipeline.transformer),
        scheduler,
        pipeline.vae,
        id2label=unique_names(_class_texts(pipeline)),
        class_dropout_prob=0.1,  # DiT's
    )


def _class_texts(pipeline: DiTPipeline) -> dict[int, str]:
    """Of its origin, for the pipeline itself keeps single words, sorted, and of two classes' common word only one."""
    if "_name_or_path" in pipeline.config:
        with suppress(OSError):
            index = pipeline.load_config(pipeline.config["_name_or_path"], local_files_only=True)
            if index.get("id2label"):
                return index["id2label"]
    words: dict[int, list[str]] = {}
    for word, row in pipeline.labels.items():
        words.setdefault(row, []).append(word)
    return {row: ", ".join(found) for row, found in words.items()}


def unique_names(texts: dict[int | str, str]) -> dict[int, str]:
    """Class id -> name. What several classes are called gets the id behind it: ImageNet has two kinds of "crane"."""
    count = Counter(texts.values())
    return {int(row): text if count[text] == 1 else f"{text} ({row})" for row, text in texts.items()}


# -- the official checkpoints -----------------------------------------------------------------------------------------


# Width -> heads of DiT-S, B, L and XL.
OFFICIAL_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
# Layer there -> layer here.
OFFICIAL_LAYERS = {
    "x_embedder.proj": "patch_embed",
    "t_embedder.mlp.0": "time_embed.linear_1",
    "t_embedder.mlp.2": "time_embed.linear_2",
    "final_layer.adaLN_modulation.1": "modulation_out.linear",
    "final_layer.linear": "proj_out",
}
OFFICIAL_BLOCK = {
    "adaLN_modulation.1": "modulation.linear",
    "attn.proj": "attn.to_out",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
OFFICIAL_LABELS = "y_embedder.embedding_table.weight"


def load_official(path: str | Path, **options) -> AdaLNZeroDiTTransformer2DModel:
    """The model of a DiT checkpoint: a file of `torch.save`, of which no code is run, or `.safetensors`.

    Of a training checkpoint the weight average ("ema") is taken, otherwise "model".

    Args:
        path: of the file.
        **options: as of `from_official`.

    Raises:
        ValueError: if the file holds something else, or as `from_official`.
        OSError: if it cannot be read.
    """
    return from_official(read_official(path), **options)


def read_official(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in a DiT checkpoint (see `load_official`), on the CPU, mapped rather than read if possible."""
    path = Path(path)
    content = _load(path)
    if not isinstance(content, dict):
        raise ValueError(
            f"`path` ({path.name}) holds a {type(content).__name__}; expected a state dict, or a training checkpoint "
            'with one under "ema" or "model".'
        )
    return content.get("ema") or content.get("model") or content


def _load(path: Path):
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options of DiT's own training script
            return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        # Not in torch's words, which advise to run the file's code.
        raise ValueError(
            f"`path` ({path.name}) is damaged, or no checkpoint, or holds objects that only code of the file could "
            "make: copy it again, or save its state dict alone."
        ) from error


def from_official(
    state_dict: dict[str, torch.Tensor],
    num_attention_heads: int | None = None,
    sample_size: int = 32,
    keep_variance: bool = False,
    num_classes: int | None = None,
) -> AdaLNZeroDiTTransformer2DModel:
    """The model that computes what the official DiT with these weights computes. Sizes are read from the shapes.

    Args:
        state_dict: with DiT's names, all of them and no others; `pos_embed`, which is fixed there and computed here,
            may be missing. Device and dtype are kept.
        num_attention_heads: known for the widths of DiT-S, B, L and XL (384, 768, 1024, 1152); needed for others.
        sample_size: height and width in latents, where `pos_embed` does not tell.
        keep_variance: as in `from_diffusers`.
        num_classes: by default one less than the label table has rows, the last being the null condition. A DiT built
            with `class_dropout_prob=0` has no such row: if the table has just `num_classes` rows, the null row is new
            and zero, and guidance means nothing before it is trained.

    Raises:
        ValueError: for missing, unknown or misshapen tensors, other position tables, and what cannot be inferred.
    """
    depth = 1 + max((int(name.split(".")[1]) for name in state_dict if re.match(r"blocks\.\d+\.", name)), default=0)
    layers = dict(OFFICIAL_LAYERS)
    for index in range(depth):
        layers |= {f"blocks.{index}.{at}": f"transformer_blocks.{index}.{to}" for at, to in OFFICIAL_BLOCK.items()}
    fused = [f"blocks.{index}.attn.qkv" for index in range(depth)]
    _refuse_other_names(state_dict, (*layers, *fused))

    tensors = {}
    for kind in ("weight", "bias"):
        tensors |= {f"{to}.{kind}": state_dict[f"{at}.{kind}"] for at, to in layers.items()}
        for index, layer in enumerate(fused):
            query_key_value = state_dict[f"{layer}.{kind}"].chunk(3)
            names = (f"transformer_blocks.{index}.attn.to_{letter}.{kind}" for letter in "qkv")
            tensors |= dict(zip(names, query_key_value))
    width, in_channels, patch_size, _ = tensors["patch_embed.weight"].shape
    heads = _heads(width, num_attention_heads)
    labels = state_dict[OFFICIAL_LABELS]
    num_classes = len(labels) - 1 if num_classes is None else num_classes
    tensors["class_embed.weight"] = _with_null_row(labels, num_classes)
    if "pos_embed" in state_dict:
        sample_size = patch_size * _side_of_positions(state_dict["pos_embed"], width)
    arguments = {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": in_channels,
        "out_channels": len(tensors["proj_out.weight"]) // patch_size**2,
        "num_layers": depth,
        "sample_size": sample_size,
        "patch_size": patch_size,
        "mlp_ratio": len(state_dict["blocks.0.mlp.fc1.weight"]) / width,
        "num_classes": num_classes,
    }
    return _build(arguments, tensors, keep_variance)


def _refuse_other_names(names: Iterable[str], layers: Iterable[str]):
    names = set(names)
    expected = {OFFICIAL_LABELS, *(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))}
    problems = {"lacks": expected - names, "has, beside a DiT's,": names - expected - {"pos_embed"}}
    for problem, found in problems.items():
        if found:
            raise ValueError(
                f"`state_dict` {problem} {', '.join(sorted(found)[:5])}{', ...' if len(found) > 5 else ''} "
                f"({len(found)} tensors): give the weights of a DiT under their names in facebookresearch/DiT."
            )


def _heads(width: int, heads: int | None) -> int:
    if heads is None and width not in OFFICIAL_HEADS:
        raise ValueError(
            f"`num_attention_heads` is not in a checkpoint, and known only for the widths {list(OFFICIAL_HEADS)}: "
            f"give it for this one of width {width}."
        )
    heads = heads or OFFICIAL_HEADS[width]
    if width % heads:
        raise ValueError(f"`num_attention_heads` ({heads}) must divide the width of the checkpoint ({width}).")
    return heads


def _with_null_row(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """The label table `(num_classes + 1, D)` of one with or without a last row for the null condition."""
    if len(labels) not in (num_classes, num_classes + 1):
        raise ValueError(
            f"`num_classes` ({num_classes}) does not fit a label table of {len(labels)} rows: one row each, and one "
            "for the null condition if there is any."
        )
    return labels if len(labels) > num_classes else torch.cat([labels, torch.zeros_like(labels[:1])])


def _side_of_positions(table: torch.Tensor, width: int) -> int:
    """Tokens along a side of the fixed position table `(1, side * side, D)`; raises for any other table."""
    side = math.isqrt(table.shape[1])
    fixed = sincos_position_embedding(side, side, width, table.device)[None].to(table.dtype)
    tolerance = max(1e-4, torch.finfo(table.dtype).eps)
    if table.shape != fixed.shape or (table - fixed).abs().max() > tolerance:
        raise ValueError(
            f"`pos_embed` {tuple(table.shape)} in `state_dict` is not DiT's fixed table of sines and cosines for "
            f"{side} x {side} tokens, the only one that models of this package have: it cannot be converted."
        )
    return side


# -- building ---------------------------------------------------------------------------------------------------------


def _build(arguments: dict, tensors: dict[str, torch.Tensor], keep_variance: bool) -> AdaLNZeroDiTTransformer2DModel:
    """The model of these arguments and copies of these tensors, whose device and dtype stay as they are."""
    arguments, tensors = dict(arguments), dict(tensors)
    if not keep_variance and arguments["out_channels"] == 2 * arguments["in_channels"]:
        for name in ("proj_out.weight", "proj_out.bias"):
            rows = tensors[name].unflatten(0, (-1, arguments["out_channels"]))  # (p * p, 2 * C, ...)
            tensors[name] = rows[:, : arguments["in_channels"]].flatten(0, 1)
        arguments["out_channels"] = arguments["in_channels"]
    if arguments["out_channels"] == arguments["in_channels"]:
        arguments["out_channels"] = None
    with torch.device("meta"):
        model = AdaLNZeroDiTTransformer2DModel(**arguments)
    for name, parameter in model.state_dict().items():
        if tensors[name].shape != parameter.shape:
            raise ValueError(
                f"`state_dict` is not of a DiT: what would be {name} has shape {tuple(tensors[name].shape)}, but "
                f"beside the others it must have {tuple(parameter.shape)}."
            )
    model.load_state_dict({name: tensor.detach().clone() for name, tensor in tensors.items()}, assign=True)
    return model.eval()
