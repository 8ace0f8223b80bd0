# Copyright 2026 The freqgate_dit authors. Licensed under the Apache License, Version 2.0.
"""Diffusion Transformers that differ only in how a block is conditioned.

The file is self-contained (torch and diffusers only), because it travels with every model repository.
Read top to bottom: embeddings, frequencies (transform, spectrum of the data, preconditioning), attention, blocks (one
per conditioning mechanism), recorder, models.

Notation: B batch, C channels, H x W input size, p patch size, N = (H/p)(W/p) tokens, D width, P text embedding size;
x = a x0 + s e is the noisy input, a^2 = sigmoid(l) and s^2 = sigmoid(-l) with the log-SNR l.

Sources: DiT (Peebles & Xie 2023, arXiv 2212.09748, section 3.2) for in-context, cross-attention and adaLN-Zero
conditioning; the Freq-Gate-adaLN block is described in `FreqGateDiTBlock`.
"""

import functools
import inspect
import math
import os
import shutil
import zlib
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, apply_rotary_emb
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import RMSNorm
from diffusers.utils import logging
from torch import nn


logger = logging.get_logger(__name__)


# ---------------------------------------------------------------------------------------------------------------------
# Positions


def token_positions(count: int, full: int | None = None, device=None) -> torch.Tensor:
    """Places `(count,)` float32 of the centres of `count` tokens along an axis, in units of the full grid's `full`
    tokens: a place in the image has one position on every grid."""
    index = torch.arange(count, dtype=torch.float32, device=device)
    return index if full in (None, count) else (index + 0.5) * (full / count) - 0.5


def sincos_position_embedding(
    height: int, width: int, dim: int, device=None, full_grid: tuple[int, int] = (None, None)
) -> torch.Tensor:
    """Fixed 2-D sin-cos positions: the first D/2 channels encode the column, the last D/2 the row (as in DiT and MAE).

    Computed from the grid's size at every call, so any grid works and no buffer has to survive loading.

    Args:
        height, width: tokens of the grid.
        full_grid: those of the image's full grid, if this one is coarser (see `token_positions`).

    Returns:
        `torch.Tensor` of shape `(height * width, dim)`, float32.
    """
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float32, device=device) / (dim // 4))
    rows = token_positions(height, full_grid[0], device)[:, None] * omega  # (h, D/4)
    columns = token_positions(width, full_grid[1], device)[:, None] * omega  # (w, D/4)
    rows = torch.cat([rows.sin(), rows.cos()], dim=-1)[:, None].expand(height, width, -1)
    columns = torch.cat([columns.sin(), columns.cos()], dim=-1)[None].expand(height, width, -1)
    return torch.cat([columns, rows], dim=-1).reshape(height * width, dim)


def rotary_position_embedding(
    height: int,
    width: int,
    head_dim: int,
    num_extra_tokens: int = 0,
    device=None,
    full_grid: tuple[int, int] = (None, None),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Axial 2-D rotary positions (RoPE): half of a head's channel pairs turn with the row, half with the column.

    Extra tokens (appended conditions) have no place on the grid and are not rotated. `full_grid` is that of
    `sincos_position_embedding`.

    Returns:
        `(cos, sin)`, each of shape `(height * width + num_extra_tokens, head_dim)`, float32.
    """
    omega = 10000.0 ** (-torch.arange(head_dim // 4, dtype=torch.float32, device=device) / (head_dim // 4))
    rows = (token_positions(height, full_grid[0], device)[:, None] * omega)[:, None].expand(-1, width, -1)
    columns = (token_positions(width, full_grid[1], device)[:, None] * omega)[None].expand(height, -1, -1)
    angles = torch.cat([rows, columns], dim=-1).reshape(height * width, head_dim // 2)
    angles = F.pad(angles, (0, 0, 0, num_extra_tokens)).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


# ---------------------------------------------------------------------------------------------------------------------
# Frequencies


def dct_matrix(n: int, device=None) -> torch.Tensor:
    """Orthonormal DCT-II `(n, n)`, float32: row k is the basis function with k / 2 cycles over the n samples."""
    index = torch.arange(n, dtype=torch.float32, device=device)
    matrix = torch.cos(math.pi / n * index[:, None] * (index + 0.5)) * math.sqrt(2 / n)
    return torch.cat([matrix[:1] * math.sqrt(0.5), matrix[1:]])


def dct2(images: torch.Tensor) -> torch.Tensor:
    """Orthonormal 2-D DCT-II of `(..., H, W)`, as matrix products: complex FFTs would break compiled graphs."""
    return dct_matrix(images.shape[-2], images.device) @ images @ dct_matrix(images.shape[-1], images.device).T


def idct2(coefficients: torch.Tensor) -> torch.Tensor:
    """Inverse of `dct2`."""
    height, width = coefficients.shape[-2:]
    return dct_matrix(height, coefficients.device).T @ coefficients @ dct_matrix(width, coefficients.device)


def radial_index(height: int, width: int, device=None) -> torch.Tensor:
    """Frequency of every DCT coefficient `(H, W)` as a fraction of Nyquist's: index k of n is k/n."""
    rows = torch.arange(height, dtype=torch.float32, device=device) / height
    columns = torch.arange(width, dtype=torch.float32, device=device) / width
    return (rows.square()[:, None] + columns.square()).sqrt()  # `torch.hypot` has no ONNX operator


class DataSpectrum(nn.Module):
    """What the training data and the noise schedule are like: mean M and power S of every DCT coefficient of a sample
    `(C, H, W)`, and the log-SNR of every training timestep.

    Set once by [`~ConditionedDiTTransformer2DModel.set_spectrum`]; until then white data of unit variance, and the
    linear schedule of DDPM. Buffers, saved with the weights, and float32 in every dtype of the model.

    A model with views (`grid_views`) also keeps its `switches`: the log-SNR at and below which each coarser view is
    used, finest first; NaN until they are set, minus infinity for never.
    """

    def __init__(self, channels: int, size: int, num_train_timesteps: int, num_views: int = 1):
        super().__init__()
        # Not `torch.linspace`: after transformers has patched it, it may ignore an enclosing `torch.device("meta")`.
        progress = torch.arange(num_train_timesteps, dtype=torch.float32) / max(1, num_train_timesteps - 1)
        alphas_cumprod = torch.cumprod(1 - (1e-4 + (0.02 - 1e-4) * progress), dim=0)
        self.register_buffer("mean", torch.zeros(channels, size, size, dtype=torch.float32))
        self.register_buffer("power", torch.ones(channels, size, size, dtype=torch.float32))
        self.register_buffer("log_snr", torch.logit(alphas_cumprod))
        if num_views > 1:
            self.register_buffer("switches", torch.full((num_views - 1,), math.nan, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        # bfloat16 has three digits: it would blur the noise level by several steps of the schedule.
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            if self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def log_snr_at(self, timestep: torch.Tensor) -> torch.Tensor:
        """Log-SNR `(B,)` at `timestep (B,)`, which may be fractional."""
        timestep = timestep.float().clamp(0, len(self.log_snr) - 1)
        below = timestep.long().clamp(max=max(0, len(self.log_snr) - 2))
        above = (below + 1).clamp(max=len(self.log_snr) - 1)
        return torch.lerp(self.log_snr[below], self.log_snr[above], timestep - below)

    def forward(self, timestep: torch.Tensor, height: int | None = None, width: int | None = None):
        """Of samples of any size, at `timestep (B,)`; without a size, what decides on their view.

        A forward pass of the model reads the buffers here alone, and gets no buffer itself: of an offloaded model they
        are there only while this runs, and are emptied afterwards.

        Returns:
            log-SNR `(B, 1, 1, 1)`; mean and power `(C, height, width)`. At another size than the data's, the power
            is that of the same cycles per pixel, the mean that of the resized mean image. Without a size: log-SNR
            `(B,)` and the switches `(num_views - 1,)`.
        """
        log_snr = self.log_snr_at(timestep)
        if height is None:
            return log_snr, self.switches.detach()
        mean, power = self.mean.detach(), self.power.detach()
        if (height, width) != tuple(power.shape[-2:]):
            rows = torch.arange(height, device=power.device) * power.shape[-2] // height
            columns = torch.arange(width, device=power.device) * power.shape[-1] // width
            power = power[:, rows[:, None], columns]
            mean = dct2(F.interpolate(idct2(mean)[None], (height, width), mode="bilinear", antialias=True)[0])
        return log_snr[:, None, None, None], mean, power


def low_pass_gains(index: torch.Tensor, cutoff: float) -> torch.Tensor:
    """Gains of a soft low-pass at `radial_index`: sigmoid(32 (cutoff - index)), and 0 where that is below 0.01."""
    gains = torch.sigmoid(32 * (cutoff - index))
    return torch.where(gains < 0.01, 0, gains)


def dct_low_pass(
    rows: int, columns: int, cutoff: float, device=None, full_grid: tuple[int, int] | None = None
) -> tuple[torch.Tensor, ...]:
    """The low-pass of a grid of tokens, for `apply_low_pass`.

    Args:
        cutoff: as a fraction of Nyquist's frequency of the grid, or of the `full_grid`, if this one is coarser.

    Returns:
        The DCT's kept rows `(k, rows)` and columns `(l, columns)`, and their gains `(k, l)`; float32.
    """
    full_grid = full_grid or (rows, columns)
    gains = low_pass_gains(radial_index(*full_grid, device)[:rows, :columns], cutoff)
    last = cutoff + math.log(99) / 32  # where the gain falls to 0.01
    kept_rows, kept_columns = (min(n, math.ceil(full * last)) for n, full in zip((rows, columns), full_grid))
    return (
        dct_matrix(rows, device)[:kept_rows],
        dct_matrix(columns, device)[:kept_columns],
        gains[:kept_rows, :kept_columns],
    )


def binomial_low_pass(rows: int, columns: int, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The low-pass (1, 4, 6, 4, 1) / 16 along rows and columns, past whose ends the last value goes on.

    Returns:
        Matrices `(rows, rows)` and `(columns, columns)`, float32.
    """

    def matrix(n: int) -> torch.Tensor:
        index = torch.arange(n, device=device)
        offset = torch.arange(-2, 3, device=device)
        taps = (index[:, None] + offset).clamp(0, n - 1)  # (n, 5)
        weights = (6 - 1.5 * offset.abs() - 0.5 * offset.square()) / 16  # (1, 4, 6, 4, 1) / 16
        return torch.zeros(n, n, device=device).scatter_add(1, taps, weights.expand(n, 5))

    return matrix(rows), matrix(columns)


def random_low_pass(rows: int, columns: int, cutoff: float) -> torch.Tensor:
    """A projector `(N, N)`, float32, with the gains of `dct_low_pass` on random directions, always the same, which
    have no frequency: the control."""
    gains = low_pass_gains(radial_index(rows, columns, "cpu"), cutoff).flatten()
    gains = gains[gains > 0].sort(descending=True).values
    shape, generator = (rows * columns, rows * columns), torch.Generator().manual_seed(0)
    # `from_pretrained(torch_dtype=...)` changes the default type, and there is no QR in half precision.
    noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    directions = torch.linalg.qr(noise)[0][: len(gains)]
    return directions.T @ (gains[:, None] * directions)


def apply_low_pass(tokens: torch.Tensor, low_pass: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """P_low of tokens `(B, N, D)`, row by row of the grid. What is left, `tokens - P_low(tokens)`, is P_high.

    Args:
        low_pass: one matrix that filters the tokens, two that filter rows and columns, or what `dct_low_pass` gives.
    """
    low_pass = [part.to(tokens.dtype) for part in low_pass]
    if len(low_pass) == 1:
        return low_pass[0] @ tokens
    rows, columns = low_pass[:2]
    width, dim = columns.shape[1], tokens.shape[2]
    low = rows @ tokens.unflatten(1, (-1, width)).flatten(2)  # (B, k, w * D)
    low = columns @ low.unflatten(2, (width, dim))  # (B, k, l, D)
    if len(low_pass) == 3:
        gains = low_pass[2]
        low = columns.T @ (gains[..., None] * low)  # (B, k, w, D)
        low = (rows.T @ low.flatten(2)).unflatten(2, (width, dim))
    return low.flatten(1, 2)


def _without_autocast(device_type: str):
    # The "meta" device, where costs are counted, has no autocast to switch off.
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def precise_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """`torch.sigmoid` in operations that every runtime computes to the last digit. onnxruntime's own is wrong by 1e-7,
    where gains may be smaller, and are divided by."""
    return 1 / (1 + torch.exp(-x))


# Rings of radial frequency in which a learned gate may leave the Wiener gate.
NUM_RINGS = 8


def radial_ring(height: int, width: int, device=None) -> torch.Tensor:
    """Ring of every DCT coefficient `(H, W)`, int64 from 0 to `NUM_RINGS - 1`; the last one also has the corner.

    `NUM_RINGS * radial_index`, rounded down; in whole numbers, as many coefficients lie exactly between two rings.
    """
    rows = torch.arange(height, device=device) * width
    columns = torch.arange(width, device=device) * height
    borders = torch.arange(1, NUM_RINGS, device=device) * height * width
    squares = NUM_RINGS**2 * (rows.square()[:, None] + columns.square())
    return (squares[..., None] >= borders.square()).sum(dim=-1)


class SpectralPreconditioner(nn.Module):
    """Input, skip and output of the network, gated per frequency by the Wiener gain G = sigmoid(l + ln S).

    G is the share of the signal in the power of a coefficient of the noisy input, and G z / a its best linear
    estimate, z = DCT(x) - a M. With F the network's output,

        input    u  = DCT^-1( sqrt(G + 0.02) z ), at unit power:   shows the signal and hides the noise
        sample   x0 = DCT^-1( M + (G / a) z + (s sqrt(G) / a) DCT(F) )
        epsilon  e  = DCT^-1( ((1 - G) / s) z - sqrt(G) DCT(F) )
        v        a e - s x0

    so that F = 0 is the optimal denoiser of Gaussian data, and F's target has unit variance at every frequency and
    noise level: EDM's preconditioning (Karras et al. 2022, arXiv 2206.00364, section 5) with a sigma_data per
    coefficient. At the input its full whitening would drown the strong low frequencies among many noisy ones.

    On a coarse view of n x n the network sees and answers the n x n coefficients of lowest frequency alone, as an
    image of that size; F is 0 in the others, which so get their best linear estimate.

    Args:
        kind: "wiener"; "scalar", one S for all coefficients (EDM's, the control); "learned", where each of 8 rings of
            radial frequency has a learned G = sigmoid((1 + alpha) l + ln S + c) per channel, alpha and c zero at
            first; "mask", Spectral Forcing (Fan et al. 2026, arXiv 2606.15236): a low-pass of the input alone, without
            statistics, that opens with the signal.
        at: "both", or only "input" or "output" (skip and output).
    """

    def __init__(self, kind: str, at: str, prediction_type: str, channels: int):
        super().__init__()
        self.kind = kind
        self.at = at
        self.prediction_type = prediction_type
        if kind == "learned":
            self.slope = nn.Parameter(torch.zeros(channels, NUM_RINGS))
            self.offset = nn.Parameter(torch.zeros(channels, NUM_RINGS))

    def forward(
        self,
        noisy: torch.Tensor,
        log_snr: torch.Tensor,
        mean: torch.Tensor,
        power: torch.Tensor,
        view_size: tuple[int, int] | None = None,
    ):
        """Args: `noisy (B, C, H, W)` float32, log-SNR `(B, 1, 1, 1)`, mean and power `(C, H, W)`; `view_size (h, w)`
        of a coarse view, by default `(H, W)`.

        Returns:
            The network's input `(B, C, h, w)`; coefficients `skip (B, C, H, W)` and `output (B, C, h, w)` of the
            prediction, or `None` where that is the network's: prediction = DCT^-1( skip + output DCT(F) ).
        """
        a, s = precise_sigmoid(log_snr).sqrt(), precise_sigmoid(-log_snr).sqrt()
        if self.kind == "mask":
            # The rectified flow of the same SNR is at time a / (a + s).
            cutoff = 0.05 + 0.95 * a / (a + s)
            # From 0 to 1. Not `torch.linspace`, for which a compiled model would be compiled anew at every size.
            rows, columns = (
                torch.arange(side, dtype=torch.float32, device=noisy.device) / max(1, side - 1)
                for side in noisy.shape[-2:]
            )
            index = (rows.square()[:, None] + columns.square()).sqrt()
            return idct2(dct2(noisy) * torch.sigmoid(30 * (cutoff - index / math.sqrt(2)))), None

        if self.kind == "scalar":
            power = power.mean().expand_as(power)
        logit = self.gate_logit(log_snr, power)
        gain, rest = precise_sigmoid(logit), precise_sigmoid(-logit)
        z = dct2(noisy) - a * mean
        rows, columns = view_size or noisy.shape[-2:]
        seen = gain if gain.shape[-2:] == (rows, columns) else gain[..., :rows, :columns]
        inputs, coefficients = noisy, None
        if self.at in ("both", "input"):
            shown = seen + 0.02
            variance = a.square() * power[:, :rows, :columns] + s.square()
            scale = (shown * variance).mean(dim=(1, 2, 3), keepdim=True).rsqrt()
            inputs = idct2(shown.sqrt() * z[..., :rows, :columns]) * scale
        if self.at in ("both", "output"):
            x0 = mean + gain / a * z, s / a * seen.sqrt()
            epsilon = rest / s * z, -seen.sqrt()
            coefficients = {
                "sample": x0,
                "epsilon": epsilon,
                "v_prediction": (a * epsilon[0] - s * x0[0], a * epsilon[1] - s * x0[1]),
            }[self.prediction_type]
        return inputs, coefficients

    def gate_logit(self, log_snr: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
        """Logit of the gain `(B, C, H, W)` at log-SNR `(B, 1, 1, 1)`, for power `(C, H, W)`."""
        logit = log_snr + power.log()
        if self.kind == "learned":
            ring = radial_ring(*power.shape[-2:], power.device)
            logit = logit + self.slope.float()[:, ring] * log_snr + self.offset.float()[:, ring]
        return logit


# ---------------------------------------------------------------------------------------------------------------------
# Attention


class DiTAttnProcessor:
    """Scaled dot-product attention through diffusers' backend switch (`model.set_attention_backend`)."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "DiTAttention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        query, key, value = attn.project(hidden_states, encoder_hidden_states, image_rotary_emb)
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )  # (B, N, heads, head_dim)
        return attn.to_out(hidden_states.flatten(2, 3))


class DiTMatmulAttnProcessor:
    """Attention as two plain matrix products and a softmax, for training short sequences on a CPU.

    PyTorch's fused CPU kernel is slow in the backward pass (measured by `benchmarks/cpu_attention.py`). The maps are
    kept in memory; on a GPU, and for long sequences, use the default processor.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "DiTAttention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        qkv = attn.project(hidden_states, encoder_hidden_states, image_rotary_emb)
        query, key, value = (x.transpose(1, 2) for x in qkv)  # (B, heads, N, head_dim)
        weights = (query @ key.transpose(-1, -2) * attn.head_dim**-0.5).softmax(dim=-1)  # (B, heads, N, M)
        hidden_states = weights @ value
        return attn.to_out(hidden_states.transpose(1, 2).flatten(2, 3))


class DiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention, or cross-attention when `encoder_hidden_states` is given."""

    _default_processor_cls = DiTAttnProcessor
    _available_processors = [DiTAttnProcessor, DiTMatmulAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        bias: bool = True,
        qk_norm: bool = False,
        is_cross_attention: bool = False,
    ):
        super().__init__()
        self.is_cross_attention = is_cross_attention
        self.heads = heads
        self.head_dim = head_dim
        inner_dim = heads * head_dim
        self.to_q = nn.Linear(dim, inner_dim, bias=bias)
        self.to_k = nn.Linear(dim, inner_dim, bias=bias)
        self.to_v = nn.Linear(dim, inner_dim, bias=bias)
        self.norm_q = RMSNorm(head_dim, eps=1e-6) if qk_norm else None
        self.norm_k = RMSNorm(head_dim, eps=1e-6) if qk_norm else None
        self.to_out = nn.Linear(inner_dim, dim)
        self.set_processor(self._default_processor_cls())

    def project(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query `(B, N, heads, head_dim)`, key and value `(B, M, heads, head_dim)`; normalised, rotated if so set."""
        memory = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = self.to_q(hidden_states).unflatten(-1, (self.heads, self.head_dim))
        key = self.to_k(memory).unflatten(-1, (self.heads, self.head_dim))
        value = self.to_v(memory).unflatten(-1, (self.heads, self.head_dim))
        if self.norm_q is not None:
            query = self.norm_q(query)
            key = self.norm_k(key)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        # Norm and rotation compute in float32.
        return query.to(value.dtype), key.to(value.dtype), value

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, encoder_hidden_states, image_rotary_emb)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks: one class per conditioning mechanism


class Modulation(nn.Module):
    """`num_vectors` modulation vectors of `size` channels from one embedding: `Linear(silu(c))`, zero at first.

    With `rank` the matrix is a product `D -> rank -> num_vectors * size`; its second factor starts at zero.
    """

    def __init__(self, dim: int, num_vectors: int, rank: int | None = None, size: int | None = None):
        super().__init__()
        self.num_vectors = num_vectors
        self.down = nn.Linear(dim, rank, bias=False) if rank else None
        self.linear = nn.Linear(rank or dim, num_vectors * (size or dim))

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:  # (B, D) -> (B, 1, num_vectors * size)
        conditioning = F.silu(conditioning)
        if self.down is not None:
            conditioning = self.down(conditioning)
        return self.linear(conditioning)[:, None]


def modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`hidden_states * (1 + scale) + shift` in the dtype of `shift`: `(B, N, D)`, `(B, 1, D)`, `(B, 1, D)`.

    Under autocast the norm's output is float32, the modulation has the dtype of the products that follow: casting here
    is done once, not once for each of query, key and value.
    """
    return torch.addcmul(shift, hidden_states.to(shift.dtype), 1 + scale)


class DiTBlock(nn.Module):
    """Pre-norm transformer block: self-attention and MLP, no conditioning of its own. Base of the variants.

    A block is called as `block(hidden_states, temb, cond, image_rotary_emb, *block_inputs)` with `hidden_states
    (B, N, D)`, the time embedding `temb (B, D)`, the condition embedding `cond (B, D)` and what its model's
    `block_inputs` returns, by default nothing. It returns `(B, N, D)`.
    """

    # What `inspect()` can read off a block: kind -> name of the submodule whose output is recorded.
    inspectable: dict[str, str] = {}

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        mlp_ratio: float = 4.0,
        activation_fn: str = "gelu-approximate",
        attention_bias: bool = True,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        mlp_norm_eps: float | None = None,
        dropout: float = 0.0,
        qk_norm: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=norm_elementwise_affine)
        self.attn = DiTAttention(dim, num_attention_heads, attention_head_dim, bias=attention_bias, qk_norm=qk_norm)
        mlp_norm_eps = norm_eps if mlp_norm_eps is None else mlp_norm_eps
        self.norm2 = nn.LayerNorm(dim, eps=mlp_norm_eps, elementwise_affine=norm_elementwise_affine)
        self.ff = FeedForward(dim, mult=mlp_ratio, activation_fn=activation_fn, dropout=dropout)

    def forward(self, hidden_states, temb, cond, image_rotary_emb=None):
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), None, image_rotary_emb)
        return hidden_states + self.ff(self.norm2(hidden_states))


class InContextDiTBlock(DiTBlock):
    """In-context conditioning: time and condition are tokens of the sequence, so the block is a plain one."""


class CrossAttentionDiTBlock(DiTBlock):
    """Self-attention, cross-attention to the condition tokens, MLP.

    Softmax over a single key is the constant 1: with one memory token (the sum of time and condition, the source
    experiment's choice) the map cannot depend on the image, so two tokens are the default.
    """

    def __init__(
        self,
        dim,
        num_attention_heads,
        attention_head_dim,
        attention_bias: bool = True,
        qk_norm: bool = False,
        num_condition_tokens: int = 2,
        **kwargs,
    ):
        super().__init__(
            dim, num_attention_heads, attention_head_dim, attention_bias=attention_bias, qk_norm=qk_norm, **kwargs
        )
        self.num_condition_tokens = num_condition_tokens
        self.norm_cross = nn.LayerNorm(dim, eps=self.norm1.eps, elementwise_affine=self.norm1.elementwise_affine)
        self.cross_attn = DiTAttention(
            dim,
            num_attention_heads,
            attention_head_dim,
            bias=attention_bias,
            qk_norm=qk_norm,
            is_cross_attention=True,
        )

    def forward(self, hidden_states, temb, cond, image_rotary_emb=None):
        memory = torch.stack([temb, cond], dim=1)  # (B, 2, D)
        if self.num_condition_tokens == 1:
            memory = memory.sum(dim=1, keepdim=True)
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), None, image_rotary_emb)
        hidden_states = hidden_states + self.cross_attn(self.norm_cross(hidden_states), memory)
        return hidden_states + self.ff(self.norm2(hidden_states))


class AdaLNZeroDiTBlock(DiTBlock):
    """adaLN-Zero (DiT, section 3.2): shift, scale and residual gate of both branches regressed from time + condition.

    The regression starts at zero, so the block is the identity at initialisation.
    """

    inspectable = {"modulation": "modulation"}

    def __init__(self, dim, num_attention_heads, attention_head_dim, modulation_rank: int | None = None, **kwargs):
        super().__init__(dim, num_attention_heads, attention_head_dim, **kwargs)
        self.modulation = Modulation(dim, num_vectors=6, rank=modulation_rank)

    def mix(self, temb: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """The vector `(B, D)` that drives the modulation."""
        return temb + cond

    def forward(self, hidden_states, temb, cond, image_rotary_emb=None):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.modulation(self.mix(temb, cond)).chunk(
            6, dim=-1
        )  # each (B, 1, D)
        residual = self.attn(modulate(self.norm1(hidden_states), shift_msa, scale_msa), None, image_rotary_emb)
        hidden_states = hidden_states + gate_msa * residual
        residual = self.ff(modulate(self.norm2(hidden_states), shift_mlp, scale_mlp))
        return hidden_states + gate_mlp * residual


class FreqGateDiTBlock(AdaLNZeroDiTBlock):
    """Freq-Gate-adaLN: a gate that depends on time mixes two views of the condition before adaLN-Zero.

        g = sigmoid(W_g silu(t)),   c = g * Low(y) + (1 - g) * High(y),   modulation from c + t

    per channel, with `Low, High = Linear(silu(y))`. The names state the hypothesis of the source experiment (the gate
    prefers Low early in denoising, High late); nothing in the function ties Low to low frequencies: swapping the two
    and negating `W_g` gives the same function.

    With `gate_residual` the mixture is added to the condition, `c = y + g * Low(y) + (1 - g) * High(y)`, and Low and
    High start at zero: with the weights of an adaLN-Zero model the block is that model's until it is trained. The
    plain form cannot start there: Low and High see silu(y), and in general no linear map takes that back to y.
    """

    inspectable = {"modulation": "modulation", "gate": "gate"}

    def __init__(self, dim, num_attention_heads, attention_head_dim, gate_residual: bool = False, **kwargs):
        super().__init__(dim, num_attention_heads, attention_head_dim, **kwargs)
        self.gate_residual = gate_residual
        self.gate = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim), nn.Sigmoid())
        self.low = nn.Linear(dim, dim)
        self.high = nn.Linear(dim, dim)

    def mix(self, temb: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        gate = self.gate(temb)
        view = F.silu(cond)
        mixed = gate * self.low(view) + (1 - gate) * self.high(view)
        if self.gate_residual:
            mixed = cond + mixed
        return mixed + temb


class ConditionAdapter(nn.Module):
    """A low-rank view of the condition, `y + up(down(silu(y)))`; `up` starts at zero, so the view at y."""

    def __init__(self, dim: int, rank: int | None):
        super().__init__()
        self.down = nn.Linear(dim, rank or dim, bias=False)
        self.up = nn.Linear(rank or dim, dim)

    def forward(self, cond: torch.Tensor) -> torch.Tensor:  # (B, D) -> (B, D)
        return cond + self.up(self.down(F.silu(cond)))


class ScalarGates(Modulation):
    """`num_vectors` numbers from one embedding by an MLP of a quarter of its width, zero at first: SpectralDiT's."""

    def __init__(self, dim: int, num_vectors: int):
        super().__init__(dim // 4, num_vectors, size=1)
        self.down = nn.Linear(dim, dim // 4)

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:  # (B, D) -> (B, 1, num_vectors)
        return self.linear(F.silu(self.down(conditioning)))[:, None]


class BandGateDiTBlock(AdaLNZeroDiTBlock):
    """Band-Gate: adaLN-Zero whose residual gates differ between low and high frequencies of the token grid.

        x = x + g * r + d * P_low r = x + (g + d) * P_low r + g * P_high r

    for both branches r, with a fixed low-pass P_low + P_high = 1 (`dct_low_pass`). A plain gate multiplies all tokens
    alike, so it has no way to favour a frequency. Shift, scale and g come from `t + h + High(y)`, the band gates d
    from `t + l + Low(y)`, where h and l embed how much of the signal is visible in each band at this noise level.
    d, h and l start at zero and Low(y) and High(y) at y: with the weights of an adaLN-Zero model the block is that
    model's until it is trained.

    Args:
        band_branches: "both", or only the "attention" or the "mlp" branch has band gates; "none": what is left without
            them, the control.
        band_drive: what d depends on: "both", "time" or "class".
        band_gates: "vector", a d per channel; "scalar", two numbers a_low and a_high = 0.2 tanh(.) per branch,
            `x + g * ((1 + a_high) r + (a_low - a_high) P_low r)`, as in SpectralDiT (arXiv 2606.18765).
        band_adapters: whether Low and High are views of their own; without, both are y. Two numbers that drive both
            bands cannot have both views.

    SpectralDiT's own network is full-rank, with scalar gates on the MLP branch from `t + y`, a binomial low-pass, and
    neither clock nor views: "mlp", "scalar", no `band_adapters`, and the model's `band_basis` "binomial" and no
    `band_clock`.
    """

    inspectable = {"modulation": "modulation", "band": "band_modulation"}

    def __init__(
        self,
        dim,
        num_attention_heads,
        attention_head_dim,
        modulation_rank: int | None = None,
        band_branches: str = "both",
        band_drive: str = "both",
        band_gates: str = "vector",
        band_adapters: bool = True,
        **kwargs,
    ):
        super().__init__(dim, num_attention_heads, attention_head_dim, modulation_rank=modulation_rank, **kwargs)
        self.branches = {"both": ("attention", "mlp"), "none": ()}.get(band_branches, (band_branches,))
        self.drive = band_drive
        self.scalar = band_gates == "scalar"

        def view() -> nn.Module:
            return ConditionAdapter(dim, modulation_rank) if band_adapters else nn.Identity()

        self.high = view()
        if not self.branches:
            self.inspectable = AdaLNZeroDiTBlock.inspectable
            return
        self.low = view() if band_drive != "time" else None
        if self.scalar:
            self.band_modulation = ScalarGates(dim, num_vectors=2 * len(self.branches))
        else:
            self.band_modulation = Modulation(dim, num_vectors=len(self.branches), rank=modulation_rank)

    def drive_band(self, temb: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """The vector `(B, D)` that drives the band gates."""
        if self.drive == "time":
            return temb
        return self.low(cond) if self.drive == "class" else temb + self.low(cond)

    def band_gains(self, gate: torch.Tensor, band: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gain `(..., D)` of a branch's high band, and by how much that of its low band exceeds it (`None`: not).

        Args: g, and what `band_modulation` gives for the branch.
        """
        if band is None or not self.scalar:
            return gate, band
        at_low, at_high = (0.2 * torch.tanh(band)).chunk(2, dim=-1)  # each (..., 1)
        return gate * (1 + at_high), gate * (at_low - at_high)

    def add_residual(self, hidden_states, residual, gate, band, low_pass):
        gate, excess = self.band_gains(gate, band)
        hidden_states = hidden_states + gate * residual
        if excess is None:
            return hidden_states
        return hidden_states + excess * apply_low_pass(residual, low_pass)

    def forward(self, hidden_states, temb, cond, image_rotary_emb, clocks, low_pass):
        """Besides the other blocks' arguments: `clocks`, embeddings `(B, D)` of the low and the high band's
        visibility (or 0), and `low_pass`, P_low of this grid."""
        clock_low, clock_high = clocks
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.modulation(
            self.mix(temb + clock_high, self.high(cond))
        ).chunk(6, dim=-1)  # each (B, 1, D)
        bands = {}
        if self.branches:
            bands = self.band_modulation(self.drive_band(temb + clock_low, cond)).chunk(len(self.branches), dim=-1)
            bands = dict(zip(self.branches, bands))
        residual = self.attn(modulate(self.norm1(hidden_states), shift_msa, scale_msa), None, image_rotary_emb)
        hidden_states = self.add_residual(hidden_states, residual, gate_msa, bands.get("attention"), low_pass)
        residual = self.ff(modulate(self.norm2(hidden_states), shift_mlp, scale_mlp))
        return self.add_residual(hidden_states, residual, gate_mlp, bands.get("mlp"), low_pass)


# ---------------------------------------------------------------------------------------------------------------------
# Recorder


@dataclass
class Record:
    """One observed tensor, on the CPU: `kind` is "attention" or in `inspectable`, `call` counts forward passes. (One
    whose samples are on several views has a record for each of these groups.)"""

    kind: str
    block: int
    call: int
    timestep: torch.Tensor  # (B,) float32
    value: torch.Tensor  # gate (B, D); modulation, band (B, 1, k * D); attention (B, heads, N, M)


@dataclass
class Recorder:
    """What `inspect()` yields: `records`, filled while the model runs, and `truncated` once `max_bytes` is reached."""

    max_bytes: int
    kinds: tuple[str, ...]
    num_blocks: int
    records: list[Record] = field(default_factory=list)
    truncated: bool = False
    _call: int = -1
    _bytes: int = 0
    _timestep: torch.Tensor | None = None

    def start_call(self, timestep, batch_size: int):
        self._call += 1
        self._timestep = torch.as_tensor(timestep).detach().float().cpu().expand(batch_size)

    def add(self, kind: str, block: int, value: torch.Tensor, rows: slice | torch.Tensor = slice(None)):
        size = value.numel() * value.element_size()
        if self.truncated or self._bytes + size > self.max_bytes:
            if not self.truncated:
                logger.warning(
                    f"inspect() stops recording at `max_bytes` ({self.max_bytes}); record less or raise it."
                )
            self.truncated = True
            return
        self._bytes += size
        timestep = self._timestep[rows if isinstance(rows, slice) else rows.cpu()]
        self.records.append(Record(kind, block, self._call, timestep, value.detach().to("cpu", copy=True)))

    def select(self, kind: str, block: int | None = None) -> list[Record]:
        """The records of one kind (and block), in the order in which they were made.

        Raises:
            ValueError: for a kind that is not recorded, or a block that the model does not have.
        """
        if kind not in self.kinds:
            raise ValueError(f"`kind` ({kind!r}) is not recorded: choose from {', '.join(self.kinds)}.")
        if block is not None and block not in range(self.num_blocks):
            raise ValueError(f"`block` ({block!r}): the model has blocks 0 to {self.num_blocks - 1}.")
        return [r for r in self.records if r.kind == kind and block in (None, r.block)]


class _AttentionMapProcessor:
    """Runs the wrapped processor unchanged and, beside it, computes the attention map for the recorder."""

    def __init__(self, processor, add: Callable[[torch.Tensor], None]):
        self.processor = processor
        self.add = add

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, image_rotary_emb=None):
        with torch.no_grad():
            query, key, _ = attn.project(hidden_states, encoder_hidden_states, image_rotary_emb)
            scores = torch.einsum("bnhd,bmhd->bhnm", query.float(), key.float()) / math.sqrt(attn.head_dim)
            self.add(scores.softmax(dim=-1))
        return self.processor(attn, hidden_states, encoder_hidden_states, image_rotary_emb)


# ---------------------------------------------------------------------------------------------------------------------
# Models


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
PRECONDITIONING = ("wiener", "scalar", "learned", "mask")
PRECONDITIONING_AT = ("both", "input", "output")
BAND_OPTIONS = {
    "band_branches": ("both", "attention", "mlp", "none"),
    "band_drive": ("both", "time", "class"),
    "band_gates": ("vector", "scalar"),
    "band_basis": ("dct", "random", "binomial"),
}
# What diffusers' `FeedForward` knows; on any other name it fails with an UnboundLocalError.
ACTIVATIONS = ("gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu")


class ConditionedDiTTransformer2DModel(ModelMixin, ConfigMixin, AttentionMixin, CacheMixin, PeftAdapterMixin):
    r"""
    Base of the DiT variants: patchify, embed time and condition once, run the blocks, unpatchify. A variant sets
    `block_class`, and overrides `append_condition` if its condition travels as tokens. Do not instantiate the base.

    The condition is a class (`num_classes`), a pooled text embedding (`pooled_projection_dim`), or nothing.

    For LoRA, attention has the linear layers `to_q`, `to_k`, `to_v` and `to_out`. (Recipes for other models of
    diffusers name `to_out.0`, which peft would leave aside here without a word.)

    `torch.export.export` and `torch.onnx.export(..., dynamo=True)` take every model, for any batch size and one size
    of the samples; a model with views needs `samples_per_view`. A compiled model is compiled once more when it first
    sees another size than before; one with a spectrum (`preconditioning`, or Band-Gate's `band_clock`) even with
    `dynamic=True`, as its statistics are for `sample_size` and must be resampled.

    Parameters:
        num_attention_heads (`int`, defaults to `8`): heads; the width D is `num_attention_heads * attention_head_dim`.
        attention_head_dim (`int`, defaults to `64`): channels of a head.
        in_channels (`int`, defaults to `4`): channels of the input.
        out_channels (`int`, *optional*): channels of the output, defaults to `in_channels`.
        num_layers (`int`, defaults to `12`): blocks.
        sample_size (`int`, defaults to `16`): height and width of the samples the model is made for. Other sizes,
            square or not, work at run time.
        patch_size (`int`, defaults to `2`): side of a patch.
        mlp_ratio (`float`, defaults to `4.0`): hidden width of the MLP over D. (SwiGLU has a third matrix: 8/3 gives
            the same number of parameters as 4 without it.)
        activation_fn (`str`, defaults to `"gelu-approximate"`): of diffusers' `FeedForward`; `"linear-silu"` is the
            source experiment's SiLU, `"swiglu"` SwiGLU.
        attention_bias (`bool`, defaults to `True`): bias of query, key and value.
        norm_elementwise_affine (`bool`, defaults to `False`): learned scale and shift in the LayerNorms.
        norm_eps (`float`, defaults to `1e-6`): epsilon of the LayerNorms.
        mlp_norm_eps (`float`, *optional*): epsilon of the LayerNorms before the MLPs, defaults to `norm_eps`.
            (diffusers' `DiTTransformer2DModel` has another one there.)
        dropout (`float`, defaults to `0.0`): dropout in the MLP.
        num_classes (`int`, *optional*): classes; label `num_classes` is the null condition of guidance.
        pooled_projection_dim (`int`, *optional*): size P of the pooled text embedding.
        output_modulation (`bool`, *optional*): final adaLN before the output projection; by default on in the
            adaLN-type variants and off in the token variants.
        modulation_rank (`int`, *optional*): low-rank modulation, adaLN-type variants only; `None` is full rank.
        gate_residual (`bool`, defaults to `False`): Freq-Gate only; adds the gated mixture to the condition instead
            of replacing it, so that the model can start as an adaLN-Zero model (see `FreqGateDiTBlock`).
        band_branches, band_drive, band_gates (`str`), band_adapters (`bool`): Band-Gate only, see `BandGateDiTBlock`.
        band_clock (`bool`, defaults to `True`): Band-Gate only; whether the gates see how visible each band is.
        band_basis (`str`, defaults to `"dct"`): Band-Gate only; "random" has the low-pass act on random directions
            instead of low frequencies, for grids of `sample_size` only: the control without frequency. "binomial" is
            SpectralDiT's low-pass (1, 4, 6, 4, 1) / 16.
        band_cutoff (`float`, defaults to `0.3125`): Band-Gate only; half-gain frequency of the low-pass as a fraction
            of the token grid's Nyquist frequency. The default is radius 2.5 on a grid of 8 x 8.
        num_condition_tokens (`int`, defaults to `2`): memory of the cross-attention variant. 2 is time and condition,
            1 their sum (the source experiment's).
        qk_norm (`bool`, defaults to `False`): RMSNorm of queries and keys.
        use_rope (`bool`, defaults to `False`): axial rotary positions, in addition to the sin-cos table.
        freq_shift (`int`, defaults to `0`): of the timestep's sinusoid, as in diffusers' UNets; 0 is DiT's, 1 that of
            diffusers' `DiTTransformer2DModel`.
        preconditioning (`str`, *optional*): gates of the input, skip and output per frequency, by the statistics of
            [`~ConditionedDiTTransformer2DModel.set_spectrum`]: "wiener", "scalar" (the control without frequencies),
            "learned", or "mask" (see `SpectralPreconditioner`).
        preconditioning_at (`str`, defaults to `"both"`): "both", "input", or "output" (skip and output).
        prediction_type (`str`, *optional*): what the output is, "epsilon", "v_prediction" or "sample". Without
            preconditioning the model need not know; with it, this is the scheduler's.
        num_train_timesteps (`int`, defaults to `1000`): steps of the noise schedule, for preconditioning and
            `band_clock`.
        grid_views (`int`, defaults to `1`): Freq-Grid, with "wiener" preconditioning. The views of the image that the
            transformer may work on: the full grid of tokens, and from 2 on half of it, a quarter, ... Each has its own
            input and output projection, the blocks are shared. Where noise hides the frequencies that a coarser view
            lacks, it is used, and the Wiener filter predicts the rest. Samples of another size switch at the same
            noise levels, which are about cycles per pixel.
        grid_tolerance (`float`, defaults to `0.03`): a view is used where no frequency that it lacks, a ring of
            coefficients, has a Wiener gain above this for its mean power. (Switches of another rule can be given to
            `set_spectrum`.) 0 is the full grid always.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = [
        "InContextDiTBlock",
        "CrossAttentionDiTBlock",
        "AdaLNZeroDiTBlock",
        "FreqGateDiTBlock",
        "BandGateDiTBlock",
    ]
    _repeated_blocks = _no_split_modules
    _skip_layerwise_casting_patterns = [
        "patch_embed", "time_embed", "class_embed", "text_embed", "clock_embed", "norm", "proj_out", "spectrum",
        "preconditioner",
    ]  # fmt: skip

    block_class: type[DiTBlock] = DiTBlock
    modulates_output = False
    # Whether the mechanism itself, not preconditioning alone, may need to know the data's spectrum.
    needs_spectrum = False
    # The arguments that only some variants understand: of their blocks, and of the model around them.
    variant_options: tuple[str, ...] = ()
    model_options: tuple[str, ...] = ()

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 8,
        attention_head_dim: int = 64,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 12,
        sample_size: int = 16,
        patch_size: int = 2,
        mlp_ratio: float = 4.0,
        activation_fn: str = "gelu-approximate",
        attention_bias: bool = True,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        mlp_norm_eps: float | None = None,
        dropout: float = 0.0,
        num_classes: int | None = None,
        pooled_projection_dim: int | None = None,
        output_modulation: bool | None = None,
        modulation_rank: int | None = None,
        gate_residual: bool = False,
        band_branches: str = "both",
        band_drive: str = "both",
        band_gates: str = "vector",
        band_adapters: bool = True,
        band_clock: bool = True,
        band_basis: str = "dct",
        band_cutoff: float = 0.3125,
        num_condition_tokens: int = 2,
        qk_norm: bool = False,
        use_rope: bool = False,
        freq_shift: int = 0,
        preconditioning: str | None = None,
        preconditioning_at: str = "both",
        prediction_type: str | None = None,
        num_train_timesteps: int = 1000,
        grid_views: int = 1,
        grid_tolerance: float = 0.03,
    ):
        super().__init__()
        self._check_arguments()
        dim = num_attention_heads * attention_head_dim
        self.out_channels = out_channels or in_channels

        self.patch_embed = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=freq_shift)
        self.time_embed = TimestepEmbedding(256, dim)
        self.class_embed = nn.Embedding(num_classes + 1, dim) if num_classes else None
        self.text_embed = nn.Linear(pooled_projection_dim, dim) if pooled_projection_dim else None

        variant_options = {name: self.config[name] for name in self.variant_options}
        self.transformer_blocks = nn.ModuleList(
            self.block_class(
                dim,
                num_attention_heads,
                attention_head_dim,
                mlp_ratio=mlp_ratio,
                activation_fn=activation_fn,
                attention_bias=attention_bias,
                norm_elementwise_affine=norm_elementwise_affine,
                norm_eps=norm_eps,
                mlp_norm_eps=mlp_norm_eps,
                dropout=dropout,
                qk_norm=qk_norm,
                **variant_options,
            )
            for _ in range(num_layers)
        )

        modulates_output = self.modulates_output if output_modulation is None else output_modulation
        self.norm_out = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=norm_elementwise_affine)
        self.modulation_out = Modulation(dim, num_vectors=2) if modulates_output else None
        self.proj_out = nn.Linear(dim, patch_size**2 * self.out_channels)

        # Of the coarser views, finest first.
        self.coarse_patch_embeds = nn.ModuleList(
            nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size) for _ in range(grid_views - 1)
        )
        self.coarse_proj_outs = nn.ModuleList(
            nn.Linear(dim, patch_size**2 * self.out_channels) for _ in range(grid_views - 1)
        )

        self.spectrum = self.preconditioner = None
        if preconditioning or (self.needs_spectrum and band_clock):
            self.spectrum = DataSpectrum(in_channels, sample_size, num_train_timesteps, grid_views)
        if preconditioning:
            self.preconditioner = SpectralPreconditioner(
                preconditioning, preconditioning_at, prediction_type, in_channels
            )

        self.add_parts(dim)
        self.gradient_checkpointing = False
        # Which samples of a batch are going through the blocks, for hooks: by default all, on several views a group.
        self.rows_of_pass: slice | torch.Tensor = slice(None)
        self.initialize_weights()

    def _check_arguments(self):
        config = self.config
        if type(self).block_class is DiTBlock:
            raise TypeError(f"{type(self).__name__} is the base of the variants: instantiate one of {list(VARIANTS)}.")
        defaults = {name: choices[0] for name, choices in BAND_OPTIONS.items()} | {
            "modulation_rank": None,
            "gate_residual": False,
            "num_condition_tokens": 2,
            "band_adapters": True,
            "band_clock": True,
            "band_cutoff": 0.3125,
        }
        for name, default in defaults.items():
            if name not in (*self.variant_options, *self.model_options) and config[name] != default:
                raise ValueError(
                    f"`{name}` ({config[name]}) does not apply to {type(self).__name__}: leave it at {default}."
                )
        for name in (
            "num_layers",
            "num_attention_heads",
            "attention_head_dim",
            "in_channels",
            "patch_size",
            "sample_size",
        ):
            if config[name] < 1:
                raise ValueError(f"`{name}` ({config[name]}) must be at least 1.")
        for name in ("num_classes", "pooled_projection_dim", "modulation_rank"):
            if config[name] is not None and config[name] < 1:
                raise ValueError(f"`{name}` ({config[name]}) must be at least 1, or None to do without.")
        if config.num_classes and config.pooled_projection_dim:
            raise ValueError(
                f"`num_classes` ({config.num_classes}) and `pooled_projection_dim` ({config.pooled_projection_dim}) "
                "are two kinds of condition: give one of them, or neither for an unconditional model."
            )
        if config.num_condition_tokens not in (1, 2):
            raise ValueError(
                f"`num_condition_tokens` ({config.num_condition_tokens}) must be 2 (time, condition) or 1 (their sum)."
            )
        for name, choices in BAND_OPTIONS.items():
            if config[name] not in choices:
                raise ValueError(f"`{name}` ({config[name]!r}) must be one of {choices}.")
        if config.band_branches == "none":
            for name in ("band_drive", "band_gates", "band_basis", "band_cutoff"):
                if config[name] != defaults[name]:
                    raise ValueError(
                        f"`{name}` ({config[name]}) is of band gates, and `band_branches` is 'none': leave it at "
                        f"{defaults[name]}."
                    )
        if config.band_gates == "scalar" and config.band_adapters and config.band_drive != "time":
            raise ValueError(
                f"`band_gates` ('scalar') with `band_drive` {config.band_drive!r} would have Low drive the high band "
                "too: set `band_adapters` to False, or `band_drive` to 'time'."
            )
        if config.band_basis == "binomial" and config.band_cutoff != defaults["band_cutoff"]:
            raise ValueError(
                f"`band_cutoff` ({config.band_cutoff}) does not apply to `band_basis` 'binomial': leave it at "
                f"{defaults['band_cutoff']}."
            )
        if not 0 < config.band_cutoff <= 1:
            raise ValueError(
                f"`band_cutoff` ({config.band_cutoff}) must be in (0, 1], a fraction of the Nyquist frequency."
            )
        if config.activation_fn not in ACTIVATIONS:
            raise ValueError(f"`activation_fn` ({config.activation_fn!r}) must be one of {ACTIVATIONS}.")
        if config.preconditioning not in (None, *PRECONDITIONING):
            raise ValueError(
                f"`preconditioning` ({config.preconditioning!r}) must be one of {PRECONDITIONING}, or None."
            )
        if config.preconditioning_at not in PRECONDITIONING_AT:
            raise ValueError(
                f"`preconditioning_at` ({config.preconditioning_at!r}) must be one of {PRECONDITIONING_AT}."
            )
        if config.preconditioning_at != "both" and config.preconditioning in (None, "mask"):
            raise ValueError(
                f"`preconditioning_at` ({config.preconditioning_at!r}) does not apply to `preconditioning` "
                f"{config.preconditioning!r}: leave it at 'both'."
            )
        if config.prediction_type not in (None, *PREDICTION_TYPES):
            raise ValueError(f"`prediction_type` ({config.prediction_type!r}) must be one of {PREDICTION_TYPES}.")
        if config.preconditioning and not config.prediction_type:
            raise ValueError(
                f"`preconditioning` ({config.preconditioning!r}) needs a `prediction_type` (None): "
                f"give the scheduler's, one of {PREDICTION_TYPES}."
            )
        if config.preconditioning and config.out_channels not in (None, config.in_channels):
            raise ValueError(
                f"`preconditioning` ({config.preconditioning!r}) relates every output to its input, so `out_channels` "
                f"({config.out_channels}) must equal `in_channels` ({config.in_channels})."
            )
        if config.num_train_timesteps < 1:
            raise ValueError(f"`num_train_timesteps` ({config.num_train_timesteps}) must be at least 1.")
        self._check_views()
        if config.attention_head_dim % 4:
            raise ValueError(
                f"`attention_head_dim` ({config.attention_head_dim}) must be a multiple of 4: positions are sines and "
                "cosines of two coordinates."
            )

    def _check_views(self):
        config = self.config
        if not isinstance(config.grid_views, int) or config.grid_views < 1:
            raise ValueError(f"`grid_views` ({config.grid_views}) must be at least 1, the full grid alone.")
        if not isinstance(config.grid_tolerance, (int, float)) or not 0 <= config.grid_tolerance < 1:
            raise ValueError(f"`grid_tolerance` ({config.grid_tolerance}) must be in [0, 1): it bounds a Wiener gain.")
        if config.grid_views == 1:
            return
        if config.preconditioning != "wiener" or config.preconditioning_at != "both":
            name, wanted = (
                ("preconditioning", "wiener")
                if config.preconditioning_at == "both"
                else ("preconditioning_at", "both")
            )
            raise ValueError(
                f"`grid_views` ({config.grid_views}) needs the Wiener filter for what a coarse view does not see: set "
                f"`{name}` ({config[name]!r}) to {wanted!r}, or `grid_views` to 1."
            )
        tokens = config.sample_size / config.patch_size
        if tokens % 2 ** (config.grid_views - 1):
            sizes = ", ".join(f"{tokens / 2**view:g}" for view in range(config.grid_views))
            most = next(n for n in range(config.grid_views - 1, 0, -1) if n == 1 or tokens % 2 ** (n - 1) == 0)
            raise ValueError(
                f"`grid_views` ({config.grid_views}): samples of {config.sample_size} in patches of "
                f"{config.patch_size} would make views of {sizes} tokens a side, which must all be whole numbers from "
                f"1 on: use `grid_views` {most}, or a smaller `patch_size`, or images whose size is a multiple of "
                f"`patch_size` x {2 ** (config.grid_views - 1)}."
            )
        if config.band_basis != "dct":
            raise ValueError(
                f"`band_basis` ({config.band_basis!r}) is made for one grid of tokens: with `grid_views` "
                f"({config.grid_views}) use 'dct'."
            )

    def initialize_weights(self, seed: int | None = None):
        """Initialise as DiT does: zero modulation and output, so that the untrained model predicts 0 everywhere.

        Args:
            seed: with one, what is drawn for a tensor depends on the seed and the tensor's name alone, so variants
                start alike wherever they have the same tensors. By default torch's own generator draws.
        """

        def draw(fill, weight: torch.Tensor, name: str, **options):
            if seed is None:
                fill(weight, **options)
                return
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            values = torch.empty(weight.shape, device="cpu")  # the same on every device
            with torch.no_grad():
                weight.copy_(fill(values, generator=generator, **options))

        embedders = ("time_embed.linear_1", "time_embed.linear_2", "class_embed", "text_embed")
        for name, module in self.named_modules():
            if name in embedders:  # normal(0.02)
                draw(nn.init.normal_, module.weight, name, std=0.02)
            elif isinstance(module, nn.Conv2d):  # of patches: a linear layer on the flattened ones
                draw(nn.init.xavier_uniform_, module.weight.view(module.out_channels, -1), name)
            elif isinstance(module, nn.Linear):
                draw(nn.init.xavier_uniform_, module.weight, name)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        # Modulation and output projection: zero, so that every adaLN-type block starts as the identity.
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
            # A residual mixture starts at zero, so that the condition goes through as it is.
            if isinstance(module, FreqGateDiTBlock) and module.gate_residual:
                nn.init.zeros_(module.low.weight)
                nn.init.zeros_(module.high.weight)
            if isinstance(module, ConditionAdapter):
                nn.init.zeros_(module.up.weight)
        for head in (self.proj_out, *self.coarse_proj_outs):
            nn.init.zeros_(head.weight)

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, resolved_model_file, name, loaded_keys, *args, **kwargs):
        # Neither full-grid weights on coarse views nor the reverse is a model that was trained.
        saved = 1 + sum(key.startswith("coarse_proj_outs.") and key.endswith(".bias") for key in loaded_keys)
        if saved != model.config.grid_views:
            raise ValueError(
                f"`grid_views` is {model.config.grid_views}, but the weights in {name} are of a model with {saved}: "
                f"load them with `grid_views` {saved}, as their own config has it; the trainer's `--init_from` starts "
                "one kind from the other."
            )
        # `_keep_in_fp32_modules` would do this too, but makes diffusers refuse `low_cpu_mem_usage=False`, its only way
        # to load where accelerate is not installed.
        kwargs["keep_in_fp32_modules"] = ["spectrum"]
        return super()._load_pretrained_model(
            model, state_dict, resolved_model_file, name, loaded_keys, *args, **kwargs
        )

    @functools.wraps(ModelMixin.save_pretrained)  # by whose arguments pipelines know which they may pass
    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        # After `register_for_auto_class()` the config names this file (`auto_map`), which then has to lie beside it.
        if self._auto_class or "auto_map" in self.config:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            source = Path(inspect.getfile(type(self)))
            shutil.copyfile(source, Path(save_directory) / source.name)
        super().save_pretrained(save_directory, *args, **kwargs)

    @torch.no_grad()
    def set_spectrum(
        self,
        mean: torch.Tensor,
        power: torch.Tensor,
        alphas_cumprod: torch.Tensor,
        switches: torch.Tensor | list[float] | None = None,
    ):
        """Tell a model with preconditioning or band gates what its data and noise are like, as the trainer does.

        What is set is saved with the weights.

        Args:
            mean, power: mean and variance of the orthonormal DCT-II coefficients of the samples, `(C, sample_size,
                sample_size)`. Power below a thousandth of its mean is raised to that, so that a coefficient that is
                constant in the data does not make the gates degenerate.
            alphas_cumprod: the scheduler's, `(num_train_timesteps,)`, in (0, 1).
            switches (`torch.Tensor` or list): of a model with views, log-SNR `(grid_views - 1,)` at and below which
                each coarser view is used, falling from the finest on; minus infinity for never. By default those of
                `grid_tolerance`.

        Raises:
            ValueError: for other shapes, values out of range, or a model that knows no spectrum.
        """
        if self.spectrum is None:
            raise ValueError(
                "this model knows no spectrum: build it with `preconditioning`, or as Band-Gate with `band_clock`."
            )
        own = self.spectrum
        for name, given, buffer in (
            ("mean", mean, own.mean),
            ("power", power, own.power),
            ("alphas_cumprod", alphas_cumprod, own.log_snr),
        ):
            self._check_shape(name, given, buffer.shape)
            if not given.isfinite().all():
                raise ValueError(f"`{name}` has values that are not finite.")
        if power.min() < 0 or power.max() <= 0:
            raise ValueError(f"`power` has a minimum of {power.min():.3g} and a maximum of {power.max():.3g}; it is a "
                             "variance, at least 0 everywhere and more somewhere.")  # fmt: skip
        if alphas_cumprod.min() <= 0 or alphas_cumprod.max() >= 1:
            raise ValueError(
                f"`alphas_cumprod` is in [{alphas_cumprod.min():.3g}, {alphas_cumprod.max():.3g}], but must be inside "
                "(0, 1): a schedule that ends at pure noise (zero terminal SNR) has no finite log-SNR there."
            )
        if switches is not None:
            if self.config.grid_views == 1:
                raise ValueError("`switches` were given, but this model has no views: build it with `grid_views`.")
            switches = torch.as_tensor(switches)
            self._check_shape("switches", switches, own.switches.shape)
            if not (switches < math.inf).all() or (switches.diff() > 0).any():
                raise ValueError(
                    f"`switches` ({switches.tolist()}) must be log-SNRs, finite or minus infinity for never, that do "
                    "not rise."
                )
        own.mean.copy_(mean)
        own.power.copy_(power.clamp(min=1e-3 * power.mean()))
        own.log_snr.copy_(torch.logit(alphas_cumprod.double()))
        if self.config.grid_views > 1:
            own.switches.copy_(self._tolerated_switches() if switches is None else switches)

    def _tolerated_switches(self) -> torch.Tensor:
        """Log-SNR `(grid_views - 1,)` below which the Wiener gain of no frequency that a coarser view lacks exceeds
        `grid_tolerance`.

        A frequency is a ring of coefficients, of mean power: a few striped images can make one coefficient a hundred
        times as strong as its neighbours, and would keep all images on the full grid.
        """
        # On the CPU, where sums are the same in every process.
        power, tolerance = self.spectrum.power.cpu(), self.config.grid_tolerance
        size = power.shape[-1]
        index = torch.arange(size)
        ring = torch.hypot(index[:, None].float(), index.float()).add(0.5).long().flatten()
        rings = (
            power.new_zeros(len(power), int(ring.max()) + 1).index_add_(1, ring, power.flatten(1)) / ring.bincount()
        )
        limit = math.log(tolerance) - math.log1p(-tolerance) if tolerance else -math.inf
        first = (self.view_size(view, size, size)[0] for view in range(1, self.config.grid_views))
        return torch.stack([limit - rings[:, ring:].max().log() for ring in first])

    def add_parts(self, dim: int):
        """What a variant has beyond its blocks, built before the weights are initialised."""

    # -- the parts of a forward pass --------------------------------------------------------------------------------

    def token_grid(self, hidden_states: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of tokens that an input `(B, C, H, W)` is cut into."""
        patch_size = self.config.patch_size
        if hidden_states.ndim != 4 or hidden_states.shape[1] != self.config.in_channels:
            raise ValueError(
                f"`hidden_states` has shape {tuple(hidden_states.shape)}; expected (batch, {self.config.in_channels}, "
                "height, width)."
            )
        height, width = hidden_states.shape[-2:]
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"`hidden_states` is {height} x {width}, which does not divide into patches of `patch_size` "
                f"{patch_size}: use a multiple of {patch_size} in both directions."
            )
        return height // patch_size, width // patch_size

    def view_size(self, view: int, height: int, width: int) -> tuple[int, int]:
        """Size of a view of samples of `height x width`: a half, a quarter, ... of each side, in whole patches, where
        need be one more.

        A switch is at the same noise level at every size: it is about cycles per pixel, which halving a side halves.
        """
        patch_size = self.config.patch_size
        return tuple(patch_size * math.ceil(side / (patch_size * 2**view)) for side in (height, width))

    def views_of(self, timestep: torch.Tensor) -> torch.Tensor:
        """The view `(B,)` int64 that samples at `timestep (B,)` are denoised on: 0 is the full grid.

        Raises:
            ValueError: if the switches between the views were never set.
        """
        if self.config.grid_views == 1:
            return torch.zeros_like(timestep, dtype=torch.long)
        log_snr, switches = self.spectrum(timestep)
        if switches.isnan().any():
            raise ValueError(
                f"this model has `grid_views` {self.config.grid_views}, but knows no spectrum that says where to use "
                "them: call `set_spectrum` with the training data's, as the trainer does."
            )
        return (log_snr[:, None] <= switches).sum(dim=1)

    def _group_by_view(self, timestep: torch.Tensor, samples_per_view) -> tuple[torch.Tensor | None, list[int]]:
        """Order `(B,)` that sorts the samples by view, `None` if they are, and how many there are of each view."""
        if samples_per_view is not None:
            counts = list(samples_per_view)
            if len(counts) != self.config.grid_views or sum(counts) != len(timestep) or min(counts) < 0:
                raise ValueError(
                    f"`samples_per_view` ({tuple(counts)}) must share out the {len(timestep)} samples among the "
                    f"{self.config.grid_views} views of this model."
                )
            return None, counts
        if self.config.grid_views == 1:
            return None, [timestep.shape[0]]
        if torch.compiler.is_exporting():
            raise ValueError(
                "`samples_per_view` (None): an exported model cannot choose views by the timesteps that it will see. "
                f"Export it for fixed numbers of samples on its {self.config.grid_views} views, the full grid first."
            )
        views = self.views_of(timestep)
        counts = views.bincount(minlength=self.config.grid_views).tolist()
        is_sorted = max(counts) == len(timestep)
        return None if is_sorted else views.argsort(stable=True), counts

    @staticmethod
    def expand_timestep(timestep, batch_size: int, device) -> torch.Tensor:
        """`timestep` of all samples, `(B,)` float32 in every dtype of the model: bfloat16 would turn 937 into 936."""
        timestep = torch.as_tensor(timestep, device=device)
        if timestep.shape not in ((), (1,), (batch_size,)):
            raise ValueError(f"`timestep` has shape {tuple(timestep.shape)}; expected a scalar or ({batch_size},).")
        return timestep.to(torch.float32).expand(batch_size)

    def embed_timestep(self, timestep, batch_size: int, device, dtype: torch.dtype) -> torch.Tensor:
        """Time embedding `(B, D)`, by a sinusoid in float32."""
        timestep = self.expand_timestep(timestep, batch_size, device)
        return self.time_embed(self.time_proj(timestep).to(dtype))

    def embed_condition(self, class_labels, pooled_projections, temb: torch.Tensor) -> torch.Tensor:
        """Condition embedding `(B, D)`; zero for an unconditional model, so that its blocks see the time alone."""
        if self.class_embed is not None:
            if class_labels is None or pooled_projections is not None:
                raise ValueError(
                    f"this model is conditioned on classes: pass `class_labels` of shape (batch,) with values in "
                    f"[0, {self.config.num_classes}] ({self.config.num_classes} is the null condition), and no "
                    "`pooled_projections`."
                )
            self._check_shape("class_labels", class_labels, temb.shape[:1])
            return self.class_embed(class_labels).to(temb.dtype)
        if self.text_embed is not None:
            if pooled_projections is None or class_labels is not None:
                raise ValueError(
                    "this model is conditioned on pooled text: pass `pooled_projections` of shape "
                    f"(batch, {self.config.pooled_projection_dim}), and no `class_labels`."
                )
            self._check_shape(
                "pooled_projections", pooled_projections, (temb.shape[0], self.config.pooled_projection_dim)
            )
            return self.text_embed(pooled_projections.to(temb.dtype))
        if class_labels is not None or pooled_projections is not None:
            raise ValueError("this model is unconditional: pass neither `class_labels` nor `pooled_projections`.")
        return torch.zeros_like(temb)

    @staticmethod
    def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]):
        # A wrong batch size would broadcast in some variants, and fail far from its cause in others.
        if tensor.shape != shape:
            raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}; expected {tuple(shape)}.")

    def append_condition(self, tokens: torch.Tensor, temb: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """The token sequence that enters the blocks: by default the image's tokens `(B, N, D)` alone."""
        return tokens

    def known_of(self, hidden_states: torch.Tensor, timestep):
        """What is known of the data at this noise level and size: log-SNR, mean and power (see `DataSpectrum`); `None`
        for a model without a spectrum. The log-SNR is `(1, 1, 1, 1)` where all samples have one timestep."""
        if self.spectrum is None:
            return None
        timestep = torch.as_tensor(timestep, device=hidden_states.device).to(torch.float32)
        is_one = timestep.ndim == 0 or timestep.stride(0) == 0  # a number, or what `expand_timestep` makes of one
        return self.spectrum(timestep.flatten()[:1] if is_one else timestep, *hidden_states.shape[-2:])

    def precondition(self, hidden_states: torch.Tensor, known: tuple[torch.Tensor, ...], view: int = 0):
        """The network's input, and how its output becomes the prediction (see `SpectralPreconditioner`)."""
        view_size = self.view_size(view, *hidden_states.shape[-2:])
        # Gates span many orders of magnitude, and the skip must keep the sample's digits: float32 under autocast too.
        with _without_autocast(hidden_states.device.type):
            inputs, coefficients = self.preconditioner(hidden_states.float(), *known, view_size)
        return inputs.to(hidden_states.dtype), coefficients

    def block_inputs(
        self, hidden_states: torch.Tensor, known: tuple[torch.Tensor, ...] | None, view: int = 0
    ) -> tuple:
        """What the blocks are given besides tokens, embeddings and positions; from the noisy input `(B, C, H, W)`."""
        return ()

    @staticmethod
    def compose(output: torch.Tensor, coefficients: tuple[torch.Tensor, torch.Tensor] | None, dtype: torch.dtype):
        """The prediction `(B, C, H, W)` from the network's output and `precondition`'s coefficients.

        In the input's dtype even under autocast: rounding the skip to bfloat16 would hide the network's part.
        """
        if coefficients is None:
            return output
        with _without_autocast(output.device.type):
            skip, gain = coefficients
            answer = gain * dct2(output.float())
            if answer.shape != skip.shape:  # of a coarse view: nothing beyond its frequencies
                rows, columns = (full - own for full, own in zip(skip.shape[-2:], answer.shape[-2:]))
                answer = F.pad(answer, (0, columns, 0, rows))
            return idct2(skip + answer).to(dtype)

    def unpatchify(self, patches: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """`(B, rows * columns, p * p * C)` to `(B, C, rows * p, columns * p)`."""
        p, channels = self.config.patch_size, self.out_channels
        patches = patches.reshape(-1, rows, columns, p, p, channels).permute(0, 5, 1, 3, 2, 4)
        return patches.reshape(-1, channels, rows * p, columns * p)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None,
        return_dict: bool = True,
        samples_per_view: tuple[int, ...] | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, in_channels, height, width)`): the noisy input.
            timestep (`torch.Tensor` of shape `(batch,)`, or a scalar): in [0, 999], may be fractional.
            class_labels (`torch.LongTensor` of shape `(batch,)`, *optional*): in [0, num_classes].
            pooled_projections (`torch.Tensor` of shape `(batch, pooled_projection_dim)`, *optional*): text embedding.
            return_dict (`bool`, defaults to `True`): return a `Transformer2DModelOutput` instead of a tuple.
            samples_per_view (`tuple`, *optional*): of a model with views, the number of samples to denoise on each
                view, the full grid first, where the samples are sorted by it. By default the timesteps decide, which
                waits for the device, and which neither `torch.compile` of the whole model nor an export can trace.
                An export is made for one batch size and one such tuple, say `(0, 8)`; for any batch size export a
                module whose `forward` calls `denoise_on` with one view.

        Returns:
            `sample (batch, out_channels, height, width)`, of the scheduler's prediction type.
        """
        self.token_grid(hidden_states)  # refuses other shapes
        batch_size = hidden_states.shape[0]
        timestep = self.expand_timestep(timestep, batch_size, hidden_states.device)
        order, counts = self._group_by_view(timestep, samples_per_view)
        given = hidden_states, timestep, class_labels, pooled_projections
        if max(counts) == batch_size:
            sample = self.denoise_on(counts.index(batch_size), *given)
        else:
            sample = self._denoise_mixed(order, counts, given)

        if not return_dict:
            return (sample,)
        return Transformer2DModelOutput(sample=sample)

    def _denoise_mixed(self, order: torch.Tensor | None, counts: list[int], given: tuple) -> torch.Tensor:
        """The prediction for a batch on several views, one after the other; `given` is what `denoise_on` takes."""
        for name, tensor in zip(("class_labels", "pooled_projections"), given[2:]):
            if tensor is not None and len(tensor) != len(given[0]):
                raise ValueError(f"`{name}` has shape {tuple(tensor.shape)} for {len(given[0])} samples.")
        parts, start = [], 0
        try:
            for view, count in enumerate(counts):
                if count:
                    rows = slice(start, start + count) if order is None else order[start : start + count]
                    self.rows_of_pass = rows
                    parts.append(
                        self.denoise_on(view, *(tensor if tensor is None else tensor[rows] for tensor in given))
                    )
                    start += count
        finally:
            self.rows_of_pass = slice(None)
        sample = torch.cat(parts)
        return sample if order is None else sample[order.argsort()]

    def denoise_on(
        self,
        view: int,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None,
        pooled_projections: torch.Tensor | None,
    ) -> torch.Tensor:
        """The prediction `(B, C, H, W)` by the tokens of one view; arguments are those of `forward`."""
        # 1. Input
        device, dtype = hidden_states.device, hidden_states.dtype
        full_grid = self.token_grid(hidden_states)
        temb = self.embed_timestep(timestep, timestep.shape[0], device, dtype)  # (B, D)
        known = self.known_of(hidden_states, timestep)
        block_inputs = self.block_inputs(hidden_states, known, view)
        coefficients = None
        if self.preconditioner is not None:
            hidden_states, coefficients = self.precondition(hidden_states, known, view)
        rows, columns = self.token_grid(hidden_states)
        patch_embed = self.coarse_patch_embeds[view - 1] if view else self.patch_embed
        tokens = patch_embed(hidden_states).flatten(2).transpose(1, 2)  # (B, N, D)
        # The residual stream keeps this memory order through all blocks, where norms would have to undo the transpose.
        tokens = tokens.contiguous()
        positions = sincos_position_embedding(rows, columns, tokens.shape[-1], device, full_grid)
        tokens = tokens + positions.to(dtype)
        cond = self.embed_condition(class_labels, pooled_projections, temb)  # (B, D)

        # 2. Blocks
        num_patches = tokens.shape[1]
        tokens = self.append_condition(tokens, temb, cond)  # (B, N + appended, D)
        image_rotary_emb = None
        if self.config.use_rope:
            num_appended = tokens.shape[1] - num_patches
            image_rotary_emb = rotary_position_embedding(
                rows, columns, self.config.attention_head_dim, num_appended, device, full_grid
            )
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, temb, cond, image_rotary_emb, *block_inputs)
            else:
                tokens = block(tokens, temb, cond, image_rotary_emb, *block_inputs)

        # 3. Output
        tokens = self.norm_out(tokens[:, :num_patches])  # (B, N, D)
        if self.modulation_out is not None:
            shift, scale = self.modulation_out(temb + cond).chunk(2, dim=-1)  # (B, 1, D)
            tokens = modulate(tokens, shift, scale)
        proj_out = self.coarse_proj_outs[view - 1] if view else self.proj_out
        output = self.unpatchify(proj_out(tokens), rows, columns)  # (B, C, h, w) of the view
        return self.compose(output, coefficients, dtype)

    # -- caches -----------------------------------------------------------------------------------------------------

    def enable_cache(self, config):
        """Switch on a cache of diffusers: first-block, TaylorSeer, Mag or pyramid attention broadcast.

        In a pipeline, where they serve one call at a time, they begin anew with every call, where guidance begins or
        ends, and with every view of a model with views.

        Raises:
            ValueError: for one that needs another kind of model.
        """
        why = {
            "FasterCacheConfig": "expects the null condition before the condition in a guided batch, which has them "
            "the other way round here",
            "SeaCacheConfig": "is for flow matching",
            "TextKVCacheConfig": "keeps keys of text tokens, which these models do not have",
        }.get(type(config).__name__)
        if why:
            raise ValueError(
                f"`config`: {type(config).__name__.removesuffix('Config')} {why}. Use `FirstBlockCacheConfig`, "
                "`TaylorSeerCacheConfig`, `MagCacheConfig` or `PyramidAttentionBroadcastConfig`."
            )
        super().enable_cache(config)

    # -- looking inside ---------------------------------------------------------------------------------------------

    @property
    def inspectable(self) -> dict[str, str]:
        """What `inspect()` can read off the blocks besides "attention": kind -> name of a block's submodule."""
        return self.transformer_blocks[0].inspectable

    @contextmanager
    def inspect(self, *kinds: str, max_bytes: int = 2**30):
        r"""
        Record what the blocks compute while the context is open. The model's output stays bit-identical, and outside
        of the context nothing is left behind. Use it on the eager model: a compiled one does not run the hooks.

        Args:
            *kinds (`str`): of "gate" (Freq-Gate), "modulation" (adaLN types), "attention" (large; the map of
                cross-attention where the block has one, else of self-attention). By default all kinds that the
                variant has, "attention" only where it is the only one.
            max_bytes (`int`, defaults to 1 GiB): recording stops, with a warning, once the records take this much.

        Yields:
            `Recorder`: its `records` hold one `Record` per kind, block and forward pass.
        """
        inspectable = self.inspectable
        available = (*inspectable, "attention")
        for kind in kinds:
            if kind not in available:
                raise ValueError(f"{type(self).__name__} has no {kind!r} to inspect: choose from {available}.")
        kinds = kinds or tuple(inspectable) or available
        recorder = Recorder(max_bytes, kinds, len(self.transformer_blocks))
        handles, processors = [], []

        def start_call(module, args, kwargs):
            hidden_states = args[0] if args else kwargs["hidden_states"]
            recorder.start_call(args[1] if len(args) > 1 else kwargs["timestep"], hidden_states.shape[0])

        def add_of(kind, index):
            return lambda output: recorder.add(kind, index, output, self.rows_of_pass)

        def add_output(kind, index):
            add = add_of(kind, index)
            return lambda module, args, output: add(output)

        try:
            handles.append(self.register_forward_pre_hook(start_call, with_kwargs=True))
            for index, block in enumerate(self.transformer_blocks):
                for kind in kinds:
                    if kind != "attention":
                        module = block.get_submodule(inspectable[kind])
                        handles.append(module.register_forward_hook(add_output(kind, index)))
                        continue
                    attn = getattr(block, "cross_attn", block.attn)
                    processors.append((attn, attn.processor))
                    attn.processor = _AttentionMapProcessor(attn.processor, add_of("attention", index))
            yield recorder
        finally:
            for handle in handles:
                handle.remove()
            for attn, processor in processors:
                attn.processor = processor


class InContextDiTTransformer2DModel(ConditionedDiTTransformer2DModel):
    """DiT with in-context conditioning: condition tokens join the sequence and leave it before the output."""

    block_class = InContextDiTBlock

    def append_condition(self, tokens, temb, cond):
        return torch.cat([tokens, torch.stack([temb, cond], dim=1)], dim=1)


class CrossAttentionDiTTransformer2DModel(ConditionedDiTTransformer2DModel):
    """DiT whose blocks cross-attend to the time and condition tokens."""

    block_class = CrossAttentionDiTBlock
    variant_options = ("num_condition_tokens",)


class AdaLNZeroDiTTransformer2DModel(ConditionedDiTTransformer2DModel):
    """DiT with adaLN-Zero conditioning, the standard DiT; low-rank with `modulation_rank`."""

    block_class = AdaLNZeroDiTBlock
    modulates_output = True
    variant_options = ("modulation_rank",)


class FreqGateDiTTransformer2DModel(ConditionedDiTTransformer2DModel):
    """DiT with Freq-Gate-adaLN conditioning (see `FreqGateDiTBlock`)."""

    block_class = FreqGateDiTBlock
    modulates_output = True
    variant_options = ("modulation_rank", "gate_residual")


class BandGateDiTTransformer2DModel(ConditionedDiTTransformer2DModel):
    """DiT whose residual gates differ between low and high frequencies (see `BandGateDiTBlock`).

    By `set_spectrum`, as the trainer does, it learns how visible the data is in each band at each noise level.
    """

    block_class = BandGateDiTBlock
    modulates_output = True
    needs_spectrum = True
    variant_options = ("modulation_rank", "band_branches", "band_drive", "band_gates", "band_adapters")
    model_options = ("band_basis", "band_cutoff", "band_clock")

    def add_parts(self, dim: int):
        self.clock_embed = nn.Linear(2, 2 * dim) if self.config.band_clock else None
        if self.config.band_basis == "random":
            grid = self.config.sample_size // self.config.patch_size
            projector = random_low_pass(grid, grid, self.config.band_cutoff)
            self.register_buffer("projector", projector.to(torch.get_default_device()))

    def initialize_weights(self, seed: int | None = None):
        super().initialize_weights(seed)
        if self.clock_embed is not None:
            nn.init.zeros_(self.clock_embed.weight)

    def low_pass(
        self, rows: int, columns: int, device, full_grid: tuple[int, int] | None = None
    ) -> tuple[torch.Tensor, ...]:
        """P_low of a grid of tokens, as `apply_low_pass` takes it; on a coarse view of the `full_grid` it passes the
        same cycles per image."""
        if self.config.band_basis == "dct":
            return dct_low_pass(rows, columns, self.config.band_cutoff, device, full_grid)
        if self.config.band_basis == "binomial":
            return binomial_low_pass(rows, columns, device)
        grid = self.config.sample_size // self.config.patch_size
        if (rows, columns) != (grid, grid):
            raise ValueError(
                f"`hidden_states` makes a grid of {rows} x {columns} tokens, but the directions of `band_basis` "
                f"'random' are those of {grid} x {grid}: use 'dct' for other sizes than `sample_size` "
                f"({self.config.sample_size})."
            )
        return (self.projector,)

    def band_clocks(self, known: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Visibility of the low and the high band `(B, 2)` in (0, 1): mean Wiener gain sigmoid(l + ln S) of the
        sample's coefficients that the band passes. What is finer than the token grid counts as high."""
        log_snr, _, power = known
        index = radial_index(*power.shape[-2:], power.device) * self.config.patch_size
        low = low_pass_gains(index, self.config.band_cutoff)
        gains = torch.sigmoid(log_snr + power.log()).mean(dim=1)  # (B, H, W)
        return torch.stack([(band * gains).sum(dim=(1, 2)) / band.sum() for band in (low, 1 - low)], dim=1)

    def block_inputs(self, hidden_states, known, view=0):
        clocks = 0, 0
        if self.clock_embed is not None:
            visible = self.band_clocks(known).to(hidden_states.dtype).expand(hidden_states.shape[0], -1)
            clocks = self.clock_embed(visible).chunk(2, dim=-1)  # 2 of (B, D)
        if self.config.band_branches == "none":
            return clocks, None
        grid = (side // self.config.patch_size for side in self.view_size(view, *hidden_states.shape[-2:]))
        return clocks, self.low_pass(*grid, hidden_states.device, self.token_grid(hidden_states))


# Short name, as configs and tables use it -> class.
VARIANTS: dict[str, type[ConditionedDiTTransformer2DModel]] = {
    "in_context": InContextDiTTransformer2DModel,
    "cross_attention": CrossAttentionDiTTransformer2DModel,
    "adaln_zero": AdaLNZeroDiTTransformer2DModel,
    "freq_gate": FreqGateDiTTransformer2DModel,
    "band_gate": BandGateDiTTransformer2DModel,
}


def _register_with_hooks():
    """Tell diffusers' hooks (caches, guiders that leave out layers) how to skip our blocks and attentions.

    The registries are private: where they are not as they were, the rest works without those hooks.
    """
    try:
        from diffusers.hooks import _helpers as hooks

        for model in VARIANTS.values():
            metadata = hooks.TransformerBlockMetadata(return_hidden_states_index=0, _cls=model.block_class)
            # Not by `register`, which first imports every model of diffusers that it knows.
            hooks.TransformerBlockRegistry._registry[model.block_class] = metadata
        # Of this one alone: in others diffusers finds no attention scores to leave out, and would leave them in.
        hooks.AttentionProcessorRegistry._registry[DiTAttnProcessor] = hooks.AttentionProcessorMetadata(
            skip_processor_output_fn=lambda attn, hidden_states, *args, **kwargs: hidden_states
        )
    except (ImportError, AttributeError, TypeError) as error:
        logger.debug(f"diffusers' hooks do not know these blocks: {error}")


_register_with_hooks()
