"""Tiny real components with random weights for tests: models of this package, autoencoders, a CLIP text model.

Nothing is downloaded. Weights depend on `seed` alone.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, EulerDiscreteScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from freqgate_dit import VARIANTS, FreqGateDiTPipeline
from freqgate_dit.samplers import make_sampler
from freqgate_dit.transformer_freqgate_dit import ConditionedDiTTransformer2DModel


LABELS = {0: "cat", 1: "dog", 2: "wild"}
TEXT_DIM = 16


def randomize(module: torch.nn.Module, seed: int = 0, std: float = 0.2) -> torch.nn.Module:
    """Add noise to every parameter: the untrained models predict 0, and a test on zeros shows nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return module


def tiny_transformer(variant: str = "adaln_zero", seed: int = 0, **kwargs) -> ConditionedDiTTransformer2DModel:
    """A DiT of width 32 and 2 blocks on 4 x 8 x 8 inputs with 3 classes, all of its weights random.

    `num_classes=None` makes it unconditional, `num_classes=None, pooled_projection_dim=TEXT_DIM` text-conditional.
    """
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "num_classes": len(LABELS),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = VARIANTS[variant](**{**config, **kwargs})
    return randomize(transformer, seed).eval()


def tiny_vae_kl(seed: int = 0, **kwargs) -> AutoencoderKL:
    """`AutoencoderKL` with 4 latent channels that halves the image once; SDXL's scaling factor."""
    config = {
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 16,
        "scaling_factor": 0.13025,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(**{**config, **kwargs}).eval()


def tiny_vae_tiny(seed: int = 0, **kwargs) -> AutoencoderTiny:
    """`AutoencoderTiny` with 4 latent channels that halves the image once."""
    config = {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
        "latent_channels": 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderTiny(**{**config, **kwargs}).eval()


def tiny_text_encoder(seed: int = 0, **kwargs) -> CLIPTextModel:
    """A CLIP text model of width `TEXT_DIM`, for the vocabulary of `tiny_tokenizer`."""
    config = {
        "vocab_size": len(_vocabulary()),
        "hidden_size": TEXT_DIM,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomize(CLIPTextModel(CLIPTextConfig(**{**config, **kwargs})), seed).eval()


def tiny_tokenizer(folder: str | Path) -> CLIPTokenizer:
    """A CLIP tokenizer of single letters and a few merges, from vocabulary files written to `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(_vocabulary())}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in _MERGES)]) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 16})
    )
    return CLIPTokenizer.from_pretrained(folder)


_MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]


def _vocabulary() -> list[str]:
    letters = list("abcdefghijklmnopqrstuvwxyz")
    merged = ["".join(pair) for pair in _MERGES]
    return ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters), *merged]


def euler(timestep_spacing: str = "linspace", **kwargs) -> EulerDiscreteScheduler:
    """The scheduler of the source experiment: 1000 steps, linear betas 1e-4 to 0.02, epsilon."""
    return EulerDiscreteScheduler(timestep_spacing=timestep_spacing, **kwargs)


# Of latents with four channels.
SPECTRUM = {"height": 8, "width": 8, "power": [[4.0, 1.0, 0.5]] * 4, "mean": [[[0.1]]] * 4}


def spectral(**kwargs):
    """The spectral sampler on the noise of `euler`."""
    return make_sampler("spectral", euler(**kwargs).config, SPECTRUM)


VAES = {"kl": tiny_vae_kl, "tiny": tiny_vae_tiny}


def make_pipeline(transformer=None, scheduler=None, class_dropout_prob=0.1, **kwargs) -> FreqGateDiTPipeline:
    transformer = transformer if transformer is not None else tiny_transformer()
    if transformer.config.num_classes is not None:
        kwargs.setdefault("id2label", LABELS)
    pipe = FreqGateDiTPipeline(
        transformer, scheduler or euler("trailing"), class_dropout_prob=class_dropout_prob, **kwargs
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_pipeline(variant: str, kind: str, folder: Path, scheduler=None) -> FreqGateDiTPipeline:
    """Of class labels on pixels ("pixel") or latents ("kl", "tiny"), or of prompts ("text", files in `folder`)."""
    conditional = {"num_classes": None, "pooled_projection_dim": TEXT_DIM} if kind == "text" else {}
    transformer = tiny_transformer(variant, in_channels=3 if kind == "pixel" else 4, **conditional)
    components = {"vae": VAES["kl" if kind == "text" else kind]()} if kind != "pixel" else {}
    if kind == "text":
        components |= {"text_encoder": tiny_text_encoder(), "tokenizer": tiny_tokenizer(folder / "vocabulary")}
    return make_pipeline(transformer, scheduler, **components)


def sample(pipe, *args, **kwargs) -> torch.Tensor:
    """Latents of a call with three steps from a fixed seed, unless told otherwise."""
    if not {"seed", "generator", "latents"} & kwargs.keys():
        kwargs["seed"] = 0
    return pipe(*args, **{"num_inference_steps": 3, "output_type": "latent", **kwargs}).images


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]):
    """The same names, and the same bits under each."""
    assert one.keys() == other.keys() and one
    for name in one:
        assert torch.equal(one[name], other[name]), name
