"""The DiT variants against restatements in plain torch operations, and against themselves (symmetries, round trips).

Most tests run over `VARIANTS`: a new variant is tested by being in it, plus its block's restatement in `REFERENCE`.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from components import LABELS, TEXT_DIM, randomize, tiny_transformer
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from safetensors.torch import load_file

from freqgate_dit import VARIANTS
from freqgate_dit.transformer_freqgate_dit import (
    ACTIVATIONS,
    AdaLNZeroDiTBlock,
    ConditionedDiTTransformer2DModel,
    DiTAttention,
    DiTAttnProcessor,
    DiTMatmulAttnProcessor,
    Modulation,
    rotary_position_embedding,
    sincos_position_embedding,
)


ADALN_VARIANTS = [name for name, cls in VARIANTS.items() if issubclass(cls.block_class, AdaLNZeroDiTBlock)]
SOURCE_STYLE = {"activation_fn": "linear-silu", "norm_elementwise_affine": True, "output_modulation": False}
NO_CLASSES = {"num_classes": None}
TEXT = {"num_classes": None, "pooled_projection_dim": TEXT_DIM}

# Every variant plainly, then every switch on one variant that it is most likely to break.
CONFIGURATIONS = {
    **{name: (name, {}) for name in VARIANTS},
    "unconditional": ("cross_attention", NO_CLASSES),
    "text": ("in_context", TEXT),
    "one_memory_token": ("cross_attention", {"num_condition_tokens": 1}),
    "low_rank": ("freq_gate", {"modulation_rank": 4}),
    "source_style": ("freq_gate", {**TEXT, **SOURCE_STYLE}),
    "rope_qk_norm_swiglu": ("in_context", {"use_rope": True, "qk_norm": True, "activation_fn": "swiglu"}),
    "out_channels_no_bias": ("adaln_zero", {"out_channels": 6, "attention_bias": False, "patch_size": 4}),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    return request.param


@pytest.fixture(params=CONFIGURATIONS)
def model(request) -> ConditionedDiTTransformer2DModel:
    name, kwargs = CONFIGURATIONS[request.param]
    return tiny_transformer(name, **kwargs)


def untrained(variant: str, **kwargs) -> ConditionedDiTTransformer2DModel:
    """The tiny model as a user's first line of code gives it: freshly initialised, through `from_config`."""
    return VARIANTS[variant].from_config(tiny_transformer(variant, **kwargs).config)


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


# ---------------------------------------------------------------------------------------------------------------------
# Restatement in plain torch operations. `w` is a block's state dict; x is (B, N, D); t, y, c are (B, D).


def ref_linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


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


def ref_silu(x):
    return x / (1 + (-x).exp())


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


REFERENCE = {
    "in_context": ref_plain,
    "cross_attention": ref_cross_attention,
    "adaln_zero": ref_adaln_zero,
    "freq_gate": ref_freq_gate,
}


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
    torch.testing.assert_close(block(x, t, y), expected, rtol=1e-9, atol=1e-9)
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
        assert torch.equal(block(x, t, y), x)


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


# ---------------------------------------------------------------------------------------------------------------------
# Timestep and condition


def test_fractional_timesteps_differ(variant):
    model = tiny_transformer(variant)
    a, b, c = (run(model, timestep=t) for t in (936.0, 936.5, 937.0))
    for x, y in ((a, b), (b, c), (a, c)):
        assert_differ(x, y, by=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model_sees_the_exact_timestep(variant, dtype):
    model = tiny_transformer(variant).to(dtype)
    seen = []
    model.time_proj.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    timesteps = torch.tensor([937, 936], dtype=torch.int64)
    run(model, timestep=timesteps)
    run(model, timestep=torch.tensor([936.5, 937.0]))
    assert torch.equal(seen[0][0], torch.tensor([937.0, 936.0])) and seen[0][0].dtype == torch.float32
    assert torch.equal(seen[1][0], torch.tensor([936.5, 937.0]))
    for timestep, sinusoid in seen:
        angles = timestep.double()[:, None] * 10000.0 ** (-torch.arange(128) / 128)
        expected = torch.cat([angles.cos(), angles.sin()], -1).float()
        torch.testing.assert_close(sinusoid, expected, rtol=0, atol=2e-4)
    # bfloat16 has no 937: through it both samples would be the same.
    embedding = model.embed_timestep(timesteps, 2, "cpu", dtype)
    assert embedding.dtype == dtype and not torch.equal(embedding[0], embedding[1])


def test_timestep_shapes_agree(variant):
    model = tiny_transformer(variant)
    expected = run(model, timestep=torch.tensor([937, 937]))
    for timestep in (937, 937.0, torch.tensor(937), torch.tensor(937.0), torch.tensor([937]), torch.full((2,), 937.0)):
        assert torch.equal(run(model, timestep=timestep), expected)


def test_null_id_is_num_classes(variant):
    model = tiny_transformer(variant)
    assert model.class_embed.weight.shape == (len(LABELS) + 1, 32)
    outputs = [run(model, class_labels=torch.full((2,), label)) for label in range(len(LABELS) + 1)]
    for i in range(len(outputs)):
        for j in range(i):
            assert_differ(outputs[i], outputs[j])
    with pytest.raises(IndexError):
        run(model, class_labels=torch.full((2,), len(LABELS) + 1))


def test_samples_of_a_batch_do_not_mix(model):
    kwargs = inputs(model, batch_size=3)
    together = run(model, **kwargs)
    for i in range(3):
        torch.testing.assert_close(
            run(model, **{k: v[i : i + 1] for k, v in kwargs.items()}), together[i : i + 1], rtol=1e-4, atol=1e-4
        )


def test_pooled_text(variant):
    """The embedding of a class in text form: a text model with the rows of the class table behaves as that table."""
    by_class, by_text = tiny_transformer(variant), tiny_transformer(variant, **{**TEXT, "pooled_projection_dim": 4})
    weights = {k: v for k, v in by_class.state_dict().items() if k != "class_embed.weight"}
    weights["text_embed.weight"] = by_class.class_embed.weight.T.contiguous()
    weights["text_embed.bias"] = torch.zeros(32)
    by_text.load_state_dict(weights)
    labels = torch.tensor([3, 1])
    one_hot = F.one_hot(labels, 4).float()
    expected = run(by_class, class_labels=labels)
    torch.testing.assert_close(run(by_text, pooled_projections=one_hot), expected, rtol=1e-4, atol=1e-4)
    assert_differ(run(by_text, pooled_projections=one_hot.flip(0)), expected)


def test_unconditional_is_a_zero_condition(variant):
    model, conditional = tiny_transformer(variant, **NO_CLASSES), tiny_transformer(variant)
    weights = model.state_dict()
    conditional.load_state_dict({**weights, "class_embed.weight": torch.zeros(4, 32)})
    assert torch.equal(run(model), run(conditional, class_labels=torch.tensor([0, 1])))


# ---------------------------------------------------------------------------------------------------------------------
# Errors: each names the argument and its value


@pytest.mark.parametrize(
    "variant, kwargs, words",
    [
        ("adaln_zero", {"pooled_projection_dim": 16}, ["`num_classes` (3)", "`pooled_projection_dim` (16)"]),
        ("adaln_zero", {"num_classes": 0}, ["`num_classes` (0)"]),
        ("adaln_zero", {"num_classes": -1}, ["`num_classes` (-1)"]),
        ("in_context", {"num_classes": None, "pooled_projection_dim": 0}, ["`pooled_projection_dim` (0)"]),
        ("freq_gate", {"modulation_rank": 0}, ["`modulation_rank` (0)"]),
        ("in_context", {"modulation_rank": 4}, ["`modulation_rank` (4)", "InContextDiT", "None"]),
        ("adaln_zero", {"num_condition_tokens": 1}, ["`num_condition_tokens` (1)", "AdaLNZeroDiT", "2"]),
        ("cross_attention", {"num_condition_tokens": 3}, ["`num_condition_tokens` (3)"]),
        ("adaln_zero", {"attention_head_dim": 6}, ["`attention_head_dim` (6)", "multiple of 4"]),
        ("adaln_zero", {"activation_fn": "relu"}, ["`activation_fn` ('relu')", "linear-silu"]),
    ],
)
def test_constructor_errors(variant, kwargs, words):
    with pytest.raises(ValueError) as error:
        tiny_transformer(variant, **kwargs)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_base_class_refuses():
    with pytest.raises(TypeError, match="freq_gate"):
        ConditionedDiTTransformer2DModel()


@pytest.mark.parametrize(
    "model_kwargs, kwargs, words",
    [
        ({}, {"hidden_states": torch.zeros(2, 3, 8, 8)}, ["`hidden_states`", "(2, 3, 8, 8)", "4"]),
        ({}, {"hidden_states": torch.zeros(4, 8, 8)}, ["`hidden_states`", "(4, 8, 8)"]),
        ({}, {"hidden_states": torch.zeros(2, 4, 8, 9)}, ["`hidden_states`", "8 x 9", "`patch_size` 2"]),
        ({"patch_size": 4}, {"hidden_states": torch.zeros(2, 4, 6, 8)}, ["`hidden_states`", "6 x 8", "4"]),
        ({}, {"timestep": torch.zeros(3)}, ["`timestep`", "(3,)", "(2,)"]),
        ({}, {"timestep": torch.zeros(2, 1)}, ["`timestep`", "(2, 1)"]),
        ({}, {"class_labels": None}, ["`class_labels`", "[0, 3]", "null"]),
        ({}, {"pooled_projections": torch.zeros(2, 16)}, ["`class_labels`", "`pooled_projections`"]),
        ({}, {"class_labels": torch.tensor([0])}, ["`class_labels`", "(1,)", "(2,)"]),
        ({}, {"class_labels": torch.tensor(0)}, ["`class_labels`", "()", "(2,)"]),
        (TEXT, {"pooled_projections": None}, ["`pooled_projections`", "(batch, 16)"]),
        (TEXT, {"class_labels": torch.tensor([0, 1])}, ["`class_labels`", "`pooled_projections`"]),
        (TEXT, {"pooled_projections": torch.zeros(2, 8)}, ["`pooled_projections`", "(2, 8)", "(2, 16)"]),
        (NO_CLASSES, {"class_labels": torch.tensor([0, 1])}, ["unconditional", "`class_labels`"]),
        (NO_CLASSES, {"pooled_projections": torch.zeros(2, 16)}, ["unconditional", "`pooled_projections`"]),
    ],
)
def test_forward_errors(variant, model_kwargs, kwargs, words):
    with pytest.raises(ValueError) as error:
        run(tiny_transformer(variant, **model_kwargs), **kwargs)
    assert all(word in str(error.value) for word in words), str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Positions and sizes


def test_position_table_is_the_one_of_diffusers():
    for size in (4, 8, 16):
        expected = get_2d_sincos_pos_embed(32, size, base_size=size)
        torch.testing.assert_close(sincos_position_embedding(size, size, 32), expected.float(), rtol=0, atol=1e-5)


def test_position_table_of_a_rectangle_is_a_cut_of_the_square():
    square = sincos_position_embedding(8, 8, 32).view(8, 8, 32)
    torch.testing.assert_close(sincos_position_embedding(3, 8, 32).view(3, 8, 32), square[:3])
    torch.testing.assert_close(sincos_position_embedding(8, 5, 32).view(8, 5, 32), square[:, :5])


@pytest.mark.parametrize("size", [(8, 12), (12, 4), (4, 4)])
def test_sizes(variant, size):
    model = tiny_transformer(variant, use_rope=True, out_channels=6)
    output = model(**inputs(model, height=size[0], width=size[1]), return_dict=False)
    assert isinstance(output, tuple) and output[0].shape == (2, 6, *size) and output[0].isfinite().all()


@torch.no_grad()
def test_height_and_width_stay_apart():
    """With blocks that do nothing the output at a place depends on that place alone."""
    model = untrained("adaln_zero")
    torch.nn.init.normal_(model.proj_out.weight)
    hidden_states = torch.randn(1, 4, 8, 12)
    changed = hidden_states.clone()
    changed[:, :, 2:4, 10:12] += 1
    difference = (run(model, hidden_states=changed, class_labels=torch.tensor([0]), timestep=1)) - run(
        model, hidden_states=hidden_states, class_labels=torch.tensor([0]), timestep=1
    )
    assert difference[:, :, 2:4, 10:12].abs().min() > 0
    difference[:, :, 2:4, 10:12] = 0
    torch.testing.assert_close(difference, torch.zeros_like(difference), rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Saving and loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_and_load(model, dtype, tmp_path):
    model = model.to(dtype)
    expected = run(model)
    assert expected.dtype == dtype and expected.isfinite().all()
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (True, False):
        loaded = type(model).from_pretrained(tmp_path, torch_dtype=dtype, low_cpu_mem_usage=low_cpu_mem_usage)
        assert loaded.dtype == dtype and not loaded.training
        assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
            k: v for k, v in model.config.items() if k[0] != "_"
        }
        assert torch.equal(run(loaded), expected)


def test_float32_weights_load_in_half_precision(variant, tmp_path):
    model = tiny_transformer(variant)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(run(loaded), run(model.to(torch.bfloat16)))


def test_compiled_blocks_leave_no_trace_in_the_keys(variant, tmp_path):
    model = tiny_transformer(variant)
    keys = set(model.state_dict())
    model.compile_repeated_blocks(backend="eager")
    model.compile(backend="eager")
    assert set(model.state_dict()) == keys and not any("_orig_mod" in key for key in keys)
    torch.compile(model, backend="eager").save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "diffusion_pytorch_model.safetensors")) == keys


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile, gradient checkpointing


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model, forward) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = forward(**inputs(model, height=4, width=8)).sample.square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_compiled_equals_eager(model, dynamo):
    """One graph, as `fullgraph` raises on any break; the loss and the gradients of training."""
    loss, expected = gradients(model, model)
    compiled_loss, compiled = gradients(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(compiled, expected, rtol=1e-3, atol=1e-4 * loss.item())


def test_compiled_once_for_all_timesteps(variant, dynamo):
    model = tiny_transformer(variant, num_layers=1)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for timestep in (999.0, 936.5, 0.0):
            kwargs = {**inputs(model), "timestep": torch.tensor(timestep)}
            torch.testing.assert_close(compiled(**kwargs).sample, model(**kwargs).sample)
    assert counter.frame_count == 1


def test_compiled_repeated_blocks(variant, dynamo):
    model = tiny_transformer(variant, num_layers=3)
    expected = run(model)
    counter = torch._dynamo.testing.CompileCounter()
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    torch.testing.assert_close(run(model), expected)
    assert counter.frame_count == 1  # the three blocks share one compilation


def test_blocks_are_declared(variant):
    name = VARIANTS[variant].block_class.__name__
    assert name in VARIANTS[variant]._repeated_blocks and name in VARIANTS[variant]._no_split_modules


def test_gradient_checkpointing(model):
    model.train()
    loss, expected = gradients(model, model)
    model.enable_gradient_checkpointing()
    calls = []
    # Before the block: the recomputation stops early, once the backward pass has what it needs.
    handle = model.transformer_blocks[0].register_forward_pre_hook(lambda *args: calls.append(1))
    checkpointed_loss, checkpointed = gradients(model, model)
    handle.remove()
    assert len(calls) == 2  # it was recomputed
    assert torch.equal(checkpointed_loss, loss)
    torch.testing.assert_close(checkpointed, expected, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Switches


@torch.no_grad()
def test_qk_norm_takes_the_length_out_of_queries_and_keys(variant):
    for qk_norm in (True, False):
        model = tiny_transformer(variant, qk_norm=qk_norm)
        expected = run(model)
        for module in model.modules():
            if isinstance(module, DiTAttention):
                module.to_q.weight.mul_(3), module.to_q.bias.mul_(3)
                module.to_k.weight.mul_(5), module.to_k.bias.mul_(5)
        if qk_norm:
            torch.testing.assert_close(run(model), expected, rtol=1e-3, atol=1e-3)
        else:
            assert_differ(run(model), expected)


@torch.no_grad()
def test_rope_logits_depend_on_relative_position():
    rows, columns = 4, 6
    attn = randomize(DiTAttention(32, 2, 16))
    tokens = torch.randn(1, 1, 32).expand(1, rows * columns, 32)  # the same content everywhere
    query, key, _ = attn.project(tokens, None, rotary_position_embedding(rows, columns, 16))
    logits = torch.einsum("bnhd,bmhd->bhnm", query, key).view(2, rows, columns, rows, columns)
    torch.testing.assert_close(logits[:, 1:, :, 1:], logits[:, :-1, :, :-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[:, :, 1:, :, 1:], logits[:, :, :-1, :, :-1], rtol=1e-4, atol=1e-4)
    assert_differ(logits[:, 0, 0, 1:, 0], logits[:, 0, 0, :1, 0])  # rows matter
    assert_differ(logits[:, 0, 0, 0, 1:], logits[:, 0, 0, 0, :1])  # columns matter
    assert_differ(logits[:, 0, 0, 0, 1:4], logits[:, 0, 0, 1:4, 0])  # and are told apart
    query, key, _ = attn.project(tokens)
    logits = torch.einsum("bnhd,bmhd->bhnm", query, key)
    torch.testing.assert_close(logits, logits[..., :1, :1].expand_as(logits))  # without it nothing depends on position


@torch.no_grad()
def test_rope_leaves_appended_tokens_alone():
    attn = randomize(DiTAttention(32, 2, 16))
    tokens = torch.randn(2, 14, 32)
    cos, sin = rotary_position_embedding(3, 4, 16, num_extra_tokens=2)
    assert cos.shape == sin.shape == (14, 16)
    plain, rotated = attn.project(tokens), attn.project(tokens, None, (cos, sin))
    for before, after in zip(plain[:2], rotated[:2]):
        assert torch.equal(after[:, 12:], before[:, 12:])
        assert_differ(after[:, 1:12], before[:, 1:12])
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
    assert torch.equal(rotated[2], plain[2])


def test_rope_reaches_the_attention(variant):
    model = tiny_transformer(variant)
    rotary = tiny_transformer(variant, use_rope=True)
    rotary.load_state_dict(model.state_dict())
    assert_differ(run(rotary), run(model), by=1e-4)


@torch.no_grad()
def test_activations():
    x = torch.randn(2, 5, 32)
    for activation, hidden, expected in (
        ("linear-silu", 128, ref_silu),
        ("swiglu", 85, lambda h: h[..., :85] * ref_silu(h[..., 85:])),
        ("gelu", 128, lambda h: h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))),
    ):
        ratio = 8 / 3 if activation == "swiglu" else 4.0
        ff = tiny_transformer(activation_fn=activation, mlp_ratio=ratio).transformer_blocks[0].ff
        w = ff.state_dict()
        assert w["net.2.weight"].shape == (32, hidden)
        torch.testing.assert_close(ff(x), ref_linear(w, "net.2", expected(ref_linear(w, "net.0.proj", x))))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_runs(activation):
    assert run(tiny_transformer(activation_fn=activation)).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("variant", ADALN_VARIANTS)
def test_low_rank_modulation_is_a_factorised_matrix(variant):
    low_rank, full = tiny_transformer(variant, modulation_rank=3), tiny_transformer(variant)
    # 32 x 192 against 32 x 3 + 3 x 192, in two blocks; the output's modulation stays as it is.
    assert full.num_parameters() - low_rank.num_parameters() == 2 * (32 * 192 - 32 * 3 - 3 * 192)
    weights = low_rank.state_dict()
    for name in [name for name in weights if name.endswith("modulation.down.weight")]:
        linear = name.replace("down", "linear")
        weights[linear] = weights[linear] @ weights.pop(name)
    full.load_state_dict(weights)
    torch.testing.assert_close(run(full), run(low_rank), rtol=1e-4, atol=1e-4)


def test_affine_norms_with_unit_weights_are_plain_norms(variant):
    plain, affine = tiny_transformer(variant), tiny_transformer(variant, norm_elementwise_affine=True)
    missing = affine.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all("norm" in name for name in missing)
    assert_differ(run(affine), run(plain))
    for name in missing:
        torch.nn.init.constant_(affine.get_parameter(name), name.endswith("weight"))
    torch.testing.assert_close(run(affine), run(plain))


def test_output_modulation(variant):
    on, off = (tiny_transformer(variant, output_modulation=value) for value in (True, False))
    default = tiny_transformer(variant)
    assert off.modulation_out is None and (default.modulation_out is not None) == (variant in ADALN_VARIANTS)
    on.load_state_dict(off.state_dict(), strict=False)
    assert_differ(run(on), run(off))
    for parameter in on.modulation_out.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(run(on), run(off))


def test_dropout_is_of_training_only():
    model = tiny_transformer(dropout=0.5)
    assert torch.equal(run(model), run(model))
    model.train()
    assert_differ(run(model), run(model))


@pytest.mark.parametrize(
    "variant, layers, source_parameters", [("freq_gate", 12, 68_318_224), ("adaln_zero", 14, 68_582_416)]
)
def test_parameters_of_the_source_experiment(variant, layers, source_parameters):
    """The source projects the text embedding in every block, we once per model; nothing else differs in size."""
    with torch.device("meta"):
        model = VARIANTS[variant](num_layers=layers, pooled_projection_dim=256, **SOURCE_STYLE)
    assert model.num_parameters() + layers * (256 * 512 + 512) == source_parameters


# ---------------------------------------------------------------------------------------------------------------------
# inspect()


def trace_free(model) -> bool:
    hooks = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return not hooks and all(type(p) is DiTAttnProcessor for p in model.attn_processors.values())


def test_inspect_changes_nothing_and_leaves_nothing(model):
    kinds = (*model.block_class.inspectable, "attention")
    expected = run(model)
    processors = model.attn_processors
    with model.inspect(*kinds) as recorder:
        assert torch.equal(run(model), expected)
        assert not trace_free(model)
    assert trace_free(model) and model.attn_processors == processors
    assert [(r.kind, r.block) for r in recorder.records if r.kind == "attention"] == [
        ("attention", 0),
        ("attention", 1),
    ]
    count = len(recorder.records)
    assert count == 2 * len(kinds) and not recorder.truncated
    assert torch.equal(run(model), expected) and len(recorder.records) == count
    with pytest.raises(KeyError), model.inspect(*kinds):
        raise KeyError("of the user's code")
    assert trace_free(model)


def test_inspect_counts_calls_and_timesteps():
    model = tiny_transformer("freq_gate")
    with model.inspect() as recorder:
        run(model, timestep=900.5)
        run(model, timestep=torch.tensor([7, 3]))
        hidden_states, timestep, labels = inputs(model).values()
        model(hidden_states, timestep, labels)
    assert {r.kind for r in recorder.records} == {"gate", "modulation"}
    timesteps = [r.timestep.tolist() for r in recorder.select("gate", 1)]
    assert timesteps == [[900.5, 900.5], [7.0, 3.0], timestep.tolist()]
    assert [(r.call, r.block) for r in recorder.select("gate")] == [(c, b) for c in range(3) for b in range(2)]
    assert not any(r.value.requires_grad for r in recorder.records)


@torch.no_grad()
def test_inspected_gates_and_modulation_are_the_formula():
    model = tiny_transformer("freq_gate")
    kwargs = inputs(model)
    with model.inspect("gate", "modulation") as recorder:
        run(model)
    t = model.embed_timestep(kwargs["timestep"], 2, "cpu", torch.float32)
    y = model.embed_condition(kwargs["class_labels"], None, t)
    for index, block in enumerate(model.transformer_blocks):
        w = block.state_dict()
        (gate,), (modulation,) = recorder.select("gate", index), recorder.select("modulation", index)
        g = torch.sigmoid(ref_linear(w, "gate.1", ref_silu(t)))
        assert gate.value.shape == (2, 32) and gate.value.min() >= 0 and gate.value.max() <= 1
        torch.testing.assert_close(gate.value, g)
        c = g * ref_linear(w, "low", ref_silu(y)) + (1 - g) * ref_linear(w, "high", ref_silu(y))
        expected = ref_linear(w, "modulation.linear", ref_silu(c + t))[:, None]
        torch.testing.assert_close(modulation.value, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_inspected_attention_is_the_map_in_use(model):
    seen = []
    for block in model.transformer_blocks:
        attn = getattr(block, "cross_attn", block.attn)
        attn.register_forward_hook(lambda m, args, out: seen.append((m, args, out)))
    with model.inspect("attention") as recorder:
        run(model)
    assert len(seen) == len(recorder.records) == 2
    for (attn, args, output), record in zip(seen, recorder.records):
        assert record.value.min() >= 0
        torch.testing.assert_close(record.value.sum(-1), torch.ones(record.value.shape[:-1]))
        value = attn.project(*args)[2]
        expected = attn.to_out(torch.einsum("bhnm,bmhd->bnhd", record.value, value).flatten(2))
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_inspect_is_bounded():
    model = tiny_transformer("freq_gate")
    # One pass: two blocks of a gate (2 x 32) and a modulation (2 x 192), float32.
    for max_bytes, kinds, truncated in (
        (2 * (64 + 384) * 4, ["gate", "modulation"] * 2, False),
        (2 * (64 + 384) * 4 - 1, ["gate", "modulation", "gate"], True),
        # Recording stops for good: the second gate would fit, but a record with holes misleads.
        (2 * 64 * 4, ["gate"], True),
        (0, [], True),
    ):
        with model.inspect(max_bytes=max_bytes) as recorder:
            expected = run(model)
        assert sorted(r.kind for r in recorder.records) == sorted(kinds)
        assert recorder.truncated == truncated
        assert sum(r.value.numel() * 4 for r in recorder.records) <= max_bytes
        assert torch.equal(run(model), expected)


def test_inspect_refuses_unknown_kinds(variant):
    model = tiny_transformer(variant)
    with pytest.raises(ValueError, match="'gates'.*attention"), model.inspect("gates"):
        pass
    if "gate" not in model.block_class.inspectable:
        with pytest.raises(ValueError, match=type(model).__name__), model.inspect("gate"):
            pass
    assert trace_free(model)


# ---------------------------------------------------------------------------------------------------------------------
# What diffusers offers


def test_matmul_processor_is_the_default_one(model):
    loss, expected = gradients(model, model)
    model.set_attn_processor(DiTMatmulAttnProcessor())
    assert all(type(p) is DiTMatmulAttnProcessor for p in model.attn_processors.values())
    matmul_loss, matmul = gradients(model, model)
    torch.testing.assert_close(matmul_loss, loss)
    torch.testing.assert_close(matmul, expected, rtol=1e-3, atol=1e-4 * loss.item())


def test_processors_in_half_precision(variant):
    model = tiny_transformer(variant, qk_norm=True, use_rope=True).to(torch.bfloat16)
    expected = run(model)
    model.set_attn_processor(DiTMatmulAttnProcessor())
    output = run(model)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=0.1, atol=0.1 * expected.abs().max().item())


@pytest.mark.parametrize("processor", [DiTAttnProcessor, DiTMatmulAttnProcessor])
def test_autocast(model, processor):
    model.set_attn_processor(processor())
    expected = run(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(model)
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1 * expected.abs().max().item())


def test_attention_backend(variant):
    model = tiny_transformer(variant)
    expected = run(model)
    with attention_backend("native"):  # restores the process-wide choice that `set_attention_backend` makes
        model.set_attention_backend("_native_math")
        assert {p._attention_backend for p in model.attn_processors.values()} == {"_native_math"}
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="nonsense"):
            model.set_attention_backend("nonsense")
    model.reset_attention_backend()
    assert torch.equal(run(model), expected)


def test_layerwise_casting(model):
    model = model.to(torch.bfloat16)
    # float8 has 3 bits of mantissa: weights on its grid are stored without loss, and the output must not change.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.float8_e4m3fn))
    expected = run(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    block = model.transformer_blocks[0]
    assert block.attn.to_q.weight.dtype == block.ff.net[2].weight.dtype == torch.float8_e4m3fn
    assert model.patch_embed.weight.dtype == model.proj_out.weight.dtype == torch.bfloat16
    output = model(**inputs(model, dtype=torch.bfloat16)).sample.detach()
    assert torch.equal(output, expected)


def test_lora(variant, tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_transformer(variant)
    expected = run(model)
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    attentions = sum(isinstance(m, DiTAttention) for m in model.modules())
    assert len(trainable) == 4 * attentions and all("lora_" in name for name in trainable)
    assert torch.equal(run(model), expected)
    model(**inputs(model)).sample.square().mean().backward()
    assert all((model.get_parameter(name).grad is not None) for name in trainable)
    randomize(model.transformer_blocks[0].attn.to_q.lora_B)
    changed = run(model)
    assert_differ(changed, expected, by=1e-4)
    model.save_lora_adapter(tmp_path)
    other = tiny_transformer(variant)
    other.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix=None)
    torch.testing.assert_close(run(other), changed)
