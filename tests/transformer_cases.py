"""Configurations and inputs that the tests of the DiT variants share."""

import torch
from components import TEXT_DIM, randomize, tiny_transformer
from diffusers import DiTTransformer2DModel

from freqgate_dit import VARIANTS
from freqgate_dit.transformer_freqgate_dit import (
    AdaLNZeroDiTBlock,
    ConditionedDiTTransformer2DModel,
)


ADALN_VARIANTS = [name for name, cls in VARIANTS.items() if issubclass(cls.block_class, AdaLNZeroDiTBlock)]
SOURCE_STYLE = {"activation_fn": "linear-silu", "norm_elementwise_affine": True, "output_modulation": False}
NO_CLASSES = {"num_classes": None}
SPECTRALDIT = {
    "band_branches": "mlp",
    "band_gates": "scalar",
    "band_basis": "binomial",
    "band_adapters": False,
    "band_clock": False,
}
TEXT = {"num_classes": None, "pooled_projection_dim": TEXT_DIM}

# Every variant plainly, then every switch on one variant that it is most likely to break.
CONFIGURATIONS = {
    **{name: (name, {}) for name in VARIANTS},
    "unconditional": ("cross_attention", NO_CLASSES),
    "text": ("in_context", TEXT),
    "one_memory_token": ("cross_attention", {"num_condition_tokens": 1}),
    "low_rank": ("freq_gate", {"modulation_rank": 4}),
    "gate_residual": ("freq_gate", {"gate_residual": True}),
    "source_style": ("freq_gate", {**TEXT, **SOURCE_STYLE}),
    "rope_qk_norm_swiglu": ("in_context", {"use_rope": True, "qk_norm": True, "activation_fn": "swiglu"}),
    "out_channels_no_bias": ("adaln_zero", {"out_channels": 6, "attention_bias": False, "patch_size": 4}),
    "preconditioned": ("freq_gate", {"preconditioning": "learned", "prediction_type": "v_prediction"}),
    "band_gate_low_rank": ("band_gate", {**TEXT, "modulation_rank": 4, "band_drive": "class"}),
    "band_gate_scalar": ("band_gate", {"band_gates": "scalar", "band_branches": "mlp", "band_drive": "time"}),
    "band_gate_spectraldit": ("band_gate", SPECTRALDIT),
    "band_gate_none": ("band_gate", {"band_branches": "none"}),
    "as_in_diffusers": ("adaln_zero", {"freq_shift": 1, "mlp_norm_eps": 1e-5}),
}


def untrained(variant: str, **kwargs) -> ConditionedDiTTransformer2DModel:
    """The tiny model as a user's first line of code gives it: freshly initialised, through `from_config`."""
    return VARIANTS[variant].from_config(tiny_transformer(variant, **kwargs).config)


def tiny_dit(seed: int = 0, **kwargs) -> DiTTransformer2DModel:
    """diffusers' DiT of width 32 and 2 blocks with learned sigma, all weights random, one embedder in all blocks."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 8,
        "num_embeds_ada_norm": 3,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = DiTTransformer2DModel(**{**config, **kwargs})
    transformer = randomize(transformer, seed, std=0.1).eval()
    first, *others = (block.norm1.emb for block in transformer.transformer_blocks)
    for emb in others:
        emb.load_state_dict(first.state_dict())
    return transformer


def inputs(model, batch_size: int = 2, height: int = 8, width: int = 8, dtype=torch.float32) -> dict:
    """Random keyword arguments of `forward` for the model's kind of condition; the timestep is fractional."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch_size, model.config.in_channels, height, width)
    result = {
        "hidden_states": torch.randn(shape, generator=generator).to(dtype),
        "timestep": torch.linspace(936.5, 12.25, batch_size),
    }
    if model.config.num_classes:
        result["class_labels"] = torch.arange(batch_size) % (model.config.num_classes + 1)
    if model.config.pooled_projection_dim:
        shape = (batch_size, model.config.pooled_projection_dim)
        result["pooled_projections"] = torch.randn(shape, generator=generator).to(dtype)
    return result


@torch.no_grad()
def run(model, **kwargs) -> torch.Tensor:
    return model(**{**inputs(model, dtype=model.dtype), **kwargs}).sample


def assert_differ(a: torch.Tensor, b: torch.Tensor, by: float = 1e-3):
    """They differ by more than rounding. (Outputs of the random models are of order 1 and more.)"""
    assert (a - b).abs().max() > by * a.abs().max()


def ref_linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def ref_silu(x):
    return x / (1 + (-x).exp())
