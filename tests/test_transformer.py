"""The DiT variants against restatements in plain torch operations, and against themselves (symmetries, round trips).

Most tests run over `VARIANTS`: a new variant is tested by being in it, plus its block's restatement in `REFERENCE`.
"""

import copy
import math

import pytest
import torch
from components import tiny_transformer
from transformer_cases import (
    ADALN_VARIANTS,
    assert_differ,
    inputs,
    ref_linear,
    ref_silu,
    run,
    untrained,
)

from freqgate_dit import VARIANTS
from freqgate_dit.transformer_freqgate_dit import (
    Modulation,
    dct_low_pass,
)


# ---------------------------------------------------------------------------------------------------------------------
# Restatement in plain torch operations. `w` is a block's state dict; x is (B, N, D); t, y, c are (B, D).


def ref_norm(w, name, x, eps=1e-6):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * w.get(f"{name}.weight", 1) + w.get(f"{name}.bias", 0)


def ref_attention(w, name, x, memory, heads=2):
    head_dim = x.shape[-1] // heads
    outputs = []
    for head in range(heads):
        q, k, v = (
            ref_linear(w, f"{name}.to_{letter}", z)[..., head * head_dim : (head + 1) * head_dim]
            for letter, z in (("q", x), ("k", memory), ("v", memory))
        )
        scores = (q @ k.transpose(1, 2) / math.sqrt(head_dim)).exp()
        outputs.append(scores / scores.sum(-1, keepdim=True) @ v)
    return ref_linear(w, f"{name}.to_out", torch.cat(outputs, -1))


def ref_mlp(w, x):
    x = ref_linear(w, "ff.net.0.proj", x)
    x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return ref_linear(w, "ff.net.2", x)


def ref_plain(w, x, t, y):
    n = ref_norm(w, "norm1", x)
    x = x + ref_attention(w, "attn", n, n)
    return x + ref_mlp(w, ref_norm(w, "norm2", x))


def ref_cross_attention(w, x, t, y):
    n = ref_norm(w, "norm1", x)
    x = x + ref_attention(w, "attn", n, n)
    x = x + ref_attention(w, "cross_attn", ref_norm(w, "norm_cross", x), torch.stack([t, y], 1))
    return x + ref_mlp(w, ref_norm(w, "norm2", x))


def ref_adaln_zero(w, x, t, y):
    return ref_adaln(w, x, y + t)


def ref_freq_gate(w, x, t, y):
    g = 1 / (1 + (-ref_linear(w, "gate.1", ref_silu(t))).exp())
    c = g * ref_linear(w, "low", ref_silu(y)) + (1 - g) * ref_linear(w, "high", ref_silu(y))
    return ref_adaln(w, x, c + t)


def ref_adaln(w, x, c):
    shift1, scale1, gate1, shift2, scale2, gate2 = ref_linear(w, "modulation.linear", ref_silu(c))[:, None].chunk(
        6, -1
    )
    n = ref_norm(w, "norm1", x) * (1 + scale1) + shift1
    x = x + gate1 * ref_attention(w, "attn", n, n)
    return x + gate2 * ref_mlp(w, ref_norm(w, "norm2", x) * (1 + scale2) + shift2)


def ref_low_pass(grid, cutoff=0.3125):
    """P_low `(N, N)`, the sum over basis images of gain times projector."""
    projector = torch.zeros(grid[0] * grid[1], grid[0] * grid[1], dtype=torch.float64)
    for u in range(grid[0]):
        for v in range(grid[1]):
            gain = 1 / (1 + math.exp(-32 * (cutoff - math.hypot(u / grid[0], v / grid[1]))))
            rows = torch.tensor([math.cos(math.pi * u * (i + 0.5) / grid[0]) for i in range(grid[0])])
            columns = torch.tensor([math.cos(math.pi * v * (j + 0.5) / grid[1]) for j in range(grid[1])])
            image = (rows[:, None] * columns).double().flatten()
            projector += (gain if gain >= 0.01 else 0) * image[:, None] * image / image.square().sum()
    return projector


def ref_band_gate(w, x, t, y, clocks=(0, 0), grid=None):
    def adapter(name):
        return y + ref_linear(w, f"{name}.up", ref_linear(w, f"{name}.down", ref_silu(y)))

    def add(x, r, g, d):
        low = (ref_low_pass(grid) if grid else projector).to(r) @ r
        return x + (g + d) * low + g * (r - low)

    projector = ref_low_pass((1, x.shape[1]))
    c = t + clocks[1] + adapter("high")
    shift1, scale1, gate1, shift2, scale2, gate2 = ref_linear(w, "modulation.linear", ref_silu(c))[:, None].chunk(
        6, -1
    )
    c = t + clocks[0] + adapter("low")
    band1, band2 = ref_linear(w, "band_modulation.linear", ref_silu(c))[:, None].chunk(2, -1)
    n = ref_norm(w, "norm1", x) * (1 + scale1) + shift1
    x = add(x, ref_attention(w, "attn", n, n), gate1, band1)
    return add(x, ref_mlp(w, ref_norm(w, "norm2", x) * (1 + scale2) + shift2), gate2, band2)


def ref_clocks(w, timestep):
    """Of a model that was told no spectrum: unit power at every frequency, so both bands are equally visible."""
    visible = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    below = timestep.long()
    log_snr = torch.logit(visible)
    log_snr = log_snr[below] + (timestep - below) * (log_snr[(below + 1).clamp(max=999)] - log_snr[below])
    clocks = torch.sigmoid(log_snr)[:, None].expand(-1, 2)
    return ref_linear(w, "clock_embed", clocks.to(w["clock_embed.weight"])).chunk(2, -1)


REFERENCE = {
    "in_context": ref_plain,
    "cross_attention": ref_cross_attention,
    "adaln_zero": ref_adaln_zero,
    "freq_gate": ref_freq_gate,
    "band_gate": ref_band_gate,
}


def block_inputs(variant: str, num_tokens: int) -> tuple:
    """What a block of that variant needs besides tokens, time and condition: no clocks, a grid of one row."""
    return (None, (0, 0), dct_low_pass(1, num_tokens, 0.3125)) if variant == "band_gate" else ()


def ref_model(model, reference, hidden_states, timestep, class_labels):
    """A whole forward pass on patches of 2, with the appended tokens of the in-context variant."""
    w = model.state_dict()
    B, C, H, W = hidden_states.shape
    D = model.config.num_attention_heads * model.config.attention_head_dim
    x = torch.empty(B, H // 2 * (W // 2), D, dtype=hidden_states.dtype)
    for i in range(H // 2):
        for j in range(W // 2):
            patch = hidden_states[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(B, -1)
            x[:, i * (W // 2) + j] = patch @ w["patch_embed.weight"].reshape(D, -1).T + w["patch_embed.bias"]
            for k in range(D // 4):
                omega = 10000 ** (-k / (D // 4))
                waves = (math.sin(j * omega), math.cos(j * omega), math.sin(i * omega), math.cos(i * omega))
                x[:, i * (W // 2) + j, k :: D // 4] += torch.tensor(waves, dtype=x.dtype)
    angles = timestep.double()[:, None] * 10000.0 ** (-torch.arange(128) / 128)
    t = ref_linear(w, "time_embed.linear_1", torch.cat([angles.cos(), angles.sin()], -1))
    t = ref_linear(w, "time_embed.linear_2", ref_silu(t))
    y = w["class_embed.weight"][class_labels]
    N = x.shape[1]
    if reference is ref_plain:
        x = torch.cat([x, t[:, None], y[:, None]], 1)
    for block in model.transformer_blocks:
        if reference is ref_band_gate:
            x = reference(block.state_dict(), x, t, y, ref_clocks(w, timestep.double()), (H // 2, W // 2))
        else:
            x = reference(block.state_dict(), x, t, y)
    x = ref_norm(w, "norm_out", x[:, :N])
    if model.modulation_out is not None:
        shift, scale = ref_linear(w, "modulation_out.linear", ref_silu(t + y))[:, None].chunk(2, -1)
        x = x * (1 + scale) + shift
    x = ref_linear(w, "proj_out", x)
    output = torch.empty_like(hidden_states)
    for i in range(H // 2):
        for j in range(W // 2):
            patch = x[:, i * (W // 2) + j].reshape(B, 2, 2, C).permute(0, 3, 1, 2)
            output[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = patch
    return output


@torch.no_grad()
@pytest.mark.parametrize("affine", [False, True])
def test_block_is_its_restatement(variant, affine):
    block = tiny_transformer(variant, norm_elementwise_affine=affine).transformer_blocks[0].double()
    x, t, y = (torch.randn(*shape, 32, dtype=torch.float64) for shape in ((2, 7), (2,), (2,)))
    expected = REFERENCE[variant](block.state_dict(), x, t, y)
    # The low-pass itself is float32.
    tolerance = 1e-5 if variant == "band_gate" else 1e-9
    actual = block(x, t, y, *block_inputs(variant, 7))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert_differ(expected, x)


@torch.no_grad()
def test_model_is_its_restatement(variant):
    model = tiny_transformer(variant).double()
    kwargs = inputs(model, height=8, width=12, dtype=torch.float64)
    expected = ref_model(model, REFERENCE[variant], **kwargs)
    # The sinusoid of a timestep near 1000 is exact to 1e-4 in float32.
    torch.testing.assert_close(model(**kwargs).sample, expected, rtol=1e-3, atol=1e-3)
    # Bounds what the loose tolerance above could hide: at timestep 0 the sinusoid is exact.
    kwargs["timestep"] = torch.zeros(2)
    expected = ref_model(model, REFERENCE[variant], **kwargs)
    torch.testing.assert_close(model(**kwargs).sample, expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Initialisation


def test_untrained_model_predicts_zero(variant):
    model = untrained(variant)
    assert torch.equal(run(model), torch.zeros(2, 4, 8, 8))
    assert model.proj_out.weight.requires_grad and not torch.equal(model.patch_embed.weight, torch.zeros(32, 4, 2, 2))


@torch.no_grad()
@pytest.mark.parametrize("variant", ADALN_VARIANTS)
@pytest.mark.parametrize("rank", [None, 4])
def test_adaln_block_is_the_identity_untrained(variant, rank):
    x, t, y = torch.randn(2, 7, 32), torch.randn(2, 32), torch.randn(2, 32)
    for block in untrained(variant, modulation_rank=rank).transformer_blocks:
        assert torch.equal(block(x, t, y, *block_inputs(variant, 7)), x)


@pytest.mark.parametrize("variant", ADALN_VARIANTS)
def test_adaln_variants_agree_untrained(variant):
    """With the same embedders and any output layer, not only because an output layer of zeros hides the rest."""
    baseline, model = untrained("adaln_zero"), untrained(variant)
    torch.nn.init.normal_(baseline.proj_out.weight)
    shared = {k: v for k, v in baseline.state_dict().items() if not k.startswith("transformer_blocks.")}
    model.load_state_dict(shared, strict=False)
    assert torch.equal(run(model), run(baseline))
    assert run(model).abs().max() > 0.1


@pytest.mark.parametrize("variant", ADALN_VARIANTS)
def test_zero_initialised_weights_learn(variant):
    """Zero weights are no dead end: output weights get a gradient at step 0, then the modulation does."""
    model = untrained(variant)
    for parameter in (model.proj_out.weight, model.transformer_blocks[0].modulation.linear.weight):
        model(**inputs(model)).sample.sub(1).square().mean().backward()
        assert parameter.grad.abs().max() > 0
        with torch.no_grad():
            model.proj_out.weight.sub_(model.proj_out.weight.grad)
        model.zero_grad()


def test_initialisation_scale(variant):
    model = untrained(variant)
    assert 0.018 < model.time_embed.linear_1.weight.std() < 0.022
    assert 0.014 < model.class_embed.weight.std() < 0.026
    to_q = model.transformer_blocks[0].attn.to_q
    assert to_q.weight.abs().max() <= math.sqrt(6 / 64) and to_q.weight.std() > 0.8 * math.sqrt(2 / 64)
    # As of a linear layer on flattened patches of 4 * 2 * 2 values, not as of a convolution.
    bound = math.sqrt(6 / (32 + 16))
    assert 0.9 * bound < model.patch_embed.weight.abs().max() <= bound
    for name, parameter in model.named_parameters():
        assert not name.endswith("bias") or not parameter.any(), name


def test_initialisation_survives_a_round_trip(variant, tmp_path):
    model = untrained(variant)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(run(loaded), torch.zeros(2, 4, 8, 8))
    for module in loaded.modules():
        if isinstance(module, Modulation):
            assert not module.linear.weight.any()


# ---------------------------------------------------------------------------------------------------------------------
# What each mechanism promises


@torch.no_grad()
def test_gate_residual_adds_the_mixture_to_the_condition():
    block = tiny_transformer("freq_gate", gate_residual=True).transformer_blocks[0].double()
    x, t, y = (torch.randn(*shape, 32, dtype=torch.float64) for shape in ((2, 7), (2,), (2,)))
    w = block.state_dict()
    g = 1 / (1 + (-ref_linear(w, "gate.1", ref_silu(t))).exp())
    c = y + g * ref_linear(w, "low", ref_silu(y)) + (1 - g) * ref_linear(w, "high", ref_silu(y))
    torch.testing.assert_close(block(x, t, y), ref_adaln(w, x, c + t), rtol=1e-9, atol=1e-9)


def test_a_residual_mixture_starts_at_zero_and_nothing_else_does():
    plain, residual = (untrained("freq_gate", gate_residual=value) for value in (False, True))
    for ours, theirs in zip(residual.transformer_blocks, plain.transformer_blocks):
        for name in ("low", "high"):
            assert not ours.get_submodule(name).weight.any() and theirs.get_submodule(name).weight.any()
        assert ours.gate[1].weight.any()


@torch.no_grad()
def test_swapping_low_and_high_and_negating_the_gate_changes_nothing():
    model = tiny_transformer("freq_gate").double()
    swapped = copy.deepcopy(model)
    for block in swapped.transformer_blocks:
        block.low, block.high = block.high, block.low
    assert_differ(run(swapped), run(model))
    for block in swapped.transformer_blocks:
        block.gate[1].weight.neg_()
        block.gate[1].bias.neg_()
    torch.testing.assert_close(run(swapped), run(model), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tokens", [1, 2])
def test_cross_attention_over_one_token_is_constant(tokens):
    model = tiny_transformer("cross_attention", num_condition_tokens=tokens)
    with model.inspect("attention") as recorder:
        run(model)
    for record in recorder.records:
        assert record.value.shape == (2, 2, 16, tokens)
        if tokens == 1:
            assert torch.equal(record.value, torch.ones(2, 2, 16, 1))
        else:
            assert record.value.std(dim=2).max() > 1e-3  # the map differs between the image's tokens


@torch.no_grad()
def test_in_context_tokens_join_and_leave():
    model = tiny_transformer("in_context")
    shapes = []
    handles = [b.register_forward_hook(lambda m, a, out: shapes.append(out.shape)) for b in model.transformer_blocks]
    handles.append(model.norm_out.register_forward_hook(lambda m, a, out: shapes.append(out.shape)))
    kwargs = inputs(model, height=8, width=12)
    temb = model.embed_timestep(kwargs["timestep"], 2, "cpu", torch.float32)
    cond = model.embed_condition(kwargs["class_labels"], None, temb)
    tokens = torch.randn(2, 24, 32)
    extended = model.append_condition(tokens, temb, cond)
    assert torch.equal(extended[:, :24], tokens) and torch.equal(extended[:, 24:], torch.stack([temb, cond], 1))
    assert run(model, **kwargs).shape == (2, 4, 8, 12)
    assert shapes == [(2, 26, 32), (2, 26, 32), (2, 24, 32)]
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("variant", ["adaln_zero", "freq_gate"])
def test_autocast_casts_what_query_key_and_value_share_once(variant):
    model = VARIANTS[variant](num_layers=1, num_attention_heads=2, attention_head_dim=8, num_classes=3)
    seen = []
    model.transformer_blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.transformer_blocks[0].attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 4, 16, 16), torch.tensor([1.0, 900.0]), torch.tensor([0, 3]))
    residual, attention = seen
    # The residual stream stays float32, in the memory order that norms read.
    assert residual.dtype == torch.float32 and residual.is_contiguous()
    assert attention.dtype == torch.bfloat16


def test_variants_of_a_seed_start_alike():
    """Wherever they have the same tensors; so a comparison is not one of initialisations."""
    options = {"modulation_rank": 4}
    models = {name: untrained(name, **(options if name in ADALN_VARIANTS else {})) for name in VARIANTS}
    for model in models.values():
        model.initialize_weights(seed=7)
    baseline = dict(models["adaln_zero"].named_parameters())
    for name, model in models.items():
        own = dict(model.named_parameters())
        shared = [key for key in own if key in baseline and own[key].shape == baseline[key].shape]
        drawn = [key for key in shared if own[key].any()]
        assert len(drawn) >= 14 and all(torch.equal(own[key], baseline[key]) for key in shared), name
    # As random as without a seed: other seeds, other layers and torch's own generator give other values.
    again = untrained("adaln_zero", **options)
    weights = [dict(model.named_parameters()) for model in (models["adaln_zero"], again)]
    again.initialize_weights(seed=8)
    for key in ("transformer_blocks.0.attn.to_q.weight", "patch_embed.weight", "class_embed.weight"):
        first, second = (values[key] for values in weights)
        assert_differ(first, second)
        assert first.std().item() == pytest.approx(second.std().item(), rel=0.15)
    first, second = (baseline[f"transformer_blocks.{block}.attn.to_q.weight"] for block in (0, 1))
    assert_differ(first, second)
