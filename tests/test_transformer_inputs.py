"""What the DiT variants take: timesteps, conditions, sizes, switches; and what they refuse."""

import math

import pytest
import torch
import torch.nn.functional as F
from components import LABELS, randomize, tiny_transformer
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from transformer_cases import (
    ADALN_VARIANTS,
    NO_CLASSES,
    SOURCE_STYLE,
    TEXT,
    assert_differ,
    inputs,
    ref_linear,
    ref_silu,
    run,
    untrained,
)

from freqgate_dit import VARIANTS
from freqgate_dit.transformer_freqgate_dit import (
    ACTIVATIONS,
    ConditionedDiTTransformer2DModel,
    DiTAttention,
    rotary_position_embedding,
    sincos_position_embedding,
)


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
        ("adaln_zero", {"gate_residual": True}, ["`gate_residual` (True)", "AdaLNZeroDiT", "False"]),
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
    saved = 32 * 192 - 32 * 3 - 3 * 192
    if variant == "band_gate":  # 2 more vectors, and two adapters
        saved += (32 * 64 - 32 * 3 - 3 * 64) + 2 * (2 * 32 * 32 - 2 * 32 * 3)
    assert full.num_parameters() - low_rank.num_parameters() == 2 * saved
    weights = low_rank.state_dict()
    for name in weights:
        if name.endswith(("low.down.weight", "high.down.weight")):
            weights[name] = torch.nn.functional.pad(weights[name], (0, 0, 0, 29))
        if name.endswith(("low.up.weight", "high.up.weight")):
            weights[name] = torch.nn.functional.pad(weights[name], (0, 29))
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


def test_epsilon_of_the_norms_before_the_mlps(variant):
    block = tiny_transformer(variant, norm_eps=1e-3, mlp_norm_eps=1e-2).transformer_blocks[0]
    assert (block.norm1.eps, block.norm2.eps) == (1e-3, 1e-2)
    assert tiny_transformer(variant, norm_eps=1e-3).transformer_blocks[0].norm2.eps == 1e-3


@pytest.mark.parametrize("freq_shift", [0, 1])
def test_frequencies_of_the_timestep(freq_shift):
    """The shift of diffusers' UNets: it makes the last of the 128 frequencies 1/10000."""
    sinusoid = tiny_transformer(freq_shift=freq_shift).time_proj(torch.tensor([3.0]))
    angles = 3 * 10000.0 ** (-torch.arange(128) / (128 - freq_shift))
    torch.testing.assert_close(sinusoid, torch.cat([angles.cos(), angles.sin()])[None], rtol=0, atol=1e-5)


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
