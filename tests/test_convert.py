"""Warm starts: converted models compute what their originals compute; what cannot be converted is refused."""

import argparse
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from components import assert_same_tensors, randomize, sample, tiny_transformer, tiny_vae_kl
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from safetensors.torch import save_file
from transformer_cases import NO_CLASSES, TEXT, assert_differ, inputs, run, tiny_dit

from freqgate_dit import AdaLNZeroDiTTransformer2DModel, FreqGateDiTPipeline
from freqgate_dit.convert import (
    freq_gate_from_adaln_zero,
    from_diffusers,
    from_dit_pipeline,
    from_official,
    load_official,
    unique_names,
)


# Between float32 outputs of order 1 to 10.
ROUNDING = {"rtol": 0, "atol": 1e-5}


def noisy(in_channels: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, timesteps and labels: every one of three classes, and the null label."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(4, in_channels, size, size, generator=generator)
    return images, torch.tensor([0, 7, 500, 999]), torch.tensor([0, 1, 2, 3])


# -- diffusers --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("keep_variance", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"out_channels": 4},
        {"out_channels": None},
        {"out_channels": 6},
        {"in_channels": 3, "out_channels": 6, "patch_size": 4, "sample_size": 16},
        {"num_attention_heads": 3, "attention_head_dim": 12, "num_layers": 3, "sample_size": 12},
        {"attention_bias": False, "activation_fn": "swiglu", "norm_eps": 1e-2},
    ],
    ids=lambda value: "-".join(f"{name}={argument}" for name, argument in value.items()) or "plain",
)
def test_a_dit_of_diffusers(changes, keep_variance):
    theirs = tiny_dit(**changes)
    ours = from_diffusers(theirs, keep_variance=keep_variance)
    images, timestep, labels = noisy(theirs.config.in_channels, theirs.config.sample_size)
    expected = theirs(images, timestep, labels).sample
    if not keep_variance and theirs.out_channels == 2 * theirs.config.in_channels:
        expected = expected.chunk(2, dim=1)[0]
    output = ours(images, timestep, labels).sample
    assert output.shape == expected.shape and expected.abs().max() > 1
    torch.testing.assert_close(output, expected, **ROUNDING)
    assert not ours.training and ours.out_channels == expected.shape[1]


def test_a_converted_model_keeps_dtype_and_shares_nothing():
    theirs = tiny_dit().to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    ours = from_diffusers(theirs, keep_variance=True)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in ours.parameters())
    randomize(ours)
    assert_same_tensors(theirs.state_dict(), before)


@pytest.mark.parametrize("keep_variance", [False, True])
def test_a_converted_model_is_saved_and_loaded(keep_variance, tmp_path):
    ours = from_diffusers(tiny_dit(), keep_variance=keep_variance)
    ours.save_pretrained(tmp_path)
    loaded = AdaLNZeroDiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(run(loaded), run(ours))
    assert (loaded.config.freq_shift, loaded.config.mlp_norm_eps) == (1, 1e-5)
    assert loaded.config.out_channels == (8 if keep_variance else None)


def test_embedders_that_differ_between_blocks_are_refused():
    theirs = tiny_dit(num_layers=3)
    with torch.no_grad():
        theirs.transformer_blocks[1].norm1.emb.timestep_embedder.linear_2.bias[5] += 1e-3
    with pytest.raises(ValueError, match=r"in block 1 than in block 0 \(timestep_embedder.linear_2.bias\)"):
        from_diffusers(theirs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_elementwise_affine": True}, "`norm_elementwise_affine` (True)"),
        ({"upcast_attention": True}, "`upcast_attention` (True)"),
        ({"num_attention_heads": 4, "attention_head_dim": 6, "in_channels": 4}, "`attention_head_dim` (6)"),
    ],
)
def test_what_cannot_be_expressed_is_refused(changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        from_diffusers(tiny_dit(**changes))


# -- a pipeline of diffusers ------------------------------------------------------------------------------------------


TEXTS = {0: "tench, Tinca tinca", 1: "crane", 2: "crane"}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def dit_pipeline(**scheduler) -> DiTPipeline:
    return DiTPipeline(tiny_dit(), tiny_vae_kl(), DDIMScheduler(**scheduler), id2label=TEXTS)


@torch.no_grad()
def test_a_pipeline_samples_what_the_original_transformer_does():
    theirs = dit_pipeline(**BETAS)
    pipe = from_dit_pipeline(theirs)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae is theirs.vae and pipe.config.class_dropout_prob == 0.1
    noise = torch.randn(2, 4, 8, 8)
    latents, labels = noise * pipe.scheduler.init_noise_sigma, torch.tensor([0, 2])
    output = sample(pipe, labels, latents=noise, guidance_scale=3.0)
    pipe.scheduler.set_timesteps(3)
    for t in pipe.scheduler.timesteps:
        model_input = pipe.scheduler.scale_model_input(latents, t).repeat(2, 1, 1, 1)
        prediction = theirs.transformer(model_input, t.expand(4), torch.cat([labels, torch.full((2,), 3)])).sample
        cond, uncond = prediction[:, :4].chunk(2)
        latents = pipe.scheduler.step(uncond + 3 * (cond - uncond), t, latents).prev_sample
    torch.testing.assert_close(output, latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, BETAS, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}])
def test_the_scheduler_has_the_noise_of_the_original(options):
    theirs = DDIMScheduler(**options)
    pipe = from_dit_pipeline(dit_pipeline(**options))
    # Where the original ends in pure noise, Euler needs a rest of signal.
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod, theirs.alphas_cumprod, rtol=0, atol=1e-7)
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    assert pipe.config.prediction_type == options.get("prediction_type", "epsilon")


def test_classes_have_their_full_texts(tmp_path):
    dit_pipeline().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    # As in facebook/DiT-XL-2-256; diffusers reads it and does not write it.
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": TEXTS}))
    pipe = from_dit_pipeline(DiTPipeline.from_pretrained(tmp_path))
    assert pipe.id2label == {0: "tench, Tinca tinca", 1: "crane (1)", 2: "crane (2)"}
    pipe.save_pretrained(tmp_path / "ours")
    loaded = FreqGateDiTPipeline.from_pretrained(tmp_path / "ours")
    assert loaded.id2label == pipe.id2label
    images = [sample(one, "crane (2)") for one in (pipe, loaded)]
    assert torch.equal(*images)


def test_classes_of_a_pipeline_without_origin_are_named_by_its_words():
    assert from_dit_pipeline(dit_pipeline()).id2label == {0: "Tinca tinca, tench", 2: "crane"}
    unnamed = dit_pipeline()
    unnamed.labels = {}
    assert from_dit_pipeline(unnamed).id2label == {}


def test_names_are_unique():
    assert unique_names({"2": "b", "10": "a", "3": "b"}) == {2: "b (2)", 10: "a", 3: "b (3)"}


# -- official checkpoints ---------------------------------------------------------------------------------------------


def official_shapes(width: int, depth: int, patch_size=2, in_channels=4, out_channels=8, rows=4, mlp=4) -> dict:
    """Name -> shape of everything that DiT's training saves, but for `pos_embed`."""
    linear = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (patch_size**2 * out_channels, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for index in range(depth):
        linear[f"blocks.{index}.attn.qkv"] = (3 * width, width)
        linear[f"blocks.{index}.attn.proj"] = (width, width)
        linear[f"blocks.{index}.mlp.fc1"] = (mlp * width, width)
        linear[f"blocks.{index}.mlp.fc2"] = (width, mlp * width)
        linear[f"blocks.{index}.adaLN_modulation.1"] = (6 * width, width)
    linear["x_embedder.proj"] = (width, in_channels, patch_size, patch_size)
    shapes = {"y_embedder.embedding_table.weight": (rows, width)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def official_weights(width: int = 32, depth: int = 2, side: int | None = 4, **kwargs) -> dict[str, torch.Tensor]:
    """Random weights with DiT's names; `pos_embed` for `side` x `side` tokens."""
    generator = torch.Generator().manual_seed(5)
    weights = {
        name: torch.randn(shape, generator=generator) * (0.2 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5)
        for name, shape in official_shapes(width, depth, **kwargs).items()
    }
    if side:
        table = get_2d_sincos_pos_embed(width, side, base_size=side, output_type="pt")
        weights["pos_embed"] = table.float()[None]
    return weights


def official_forward(w, heads: int, images, timestep, labels):
    """DiT with adaLN-Zero blocks (the paper's section 3.2 and figure 3), from the names of its checkpoints."""

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def modulated(x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    width, _, p, _ = w["x_embedder.proj.weight"].shape
    patches = F.unfold(images, p, stride=p).transpose(1, 2)  # (B, N, C * p * p)
    x = F.linear(patches, w["x_embedder.proj.weight"].flatten(1), w["x_embedder.proj.bias"]) + w["pos_embed"]
    angles = timestep.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    t = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], -1))))
    c = F.silu(t + w["y_embedder.embedding_table.weight"][labels])
    for index in range(sum(name.endswith("attn.qkv.weight") for name in w)):
        block = f"blocks.{index}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{block}.adaLN_modulation.1", c).split(width, dim=-1)
        qkv = linear(f"{block}.attn.qkv", modulated(x, shift1, scale1)).unflatten(-1, (3, heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, width / heads)
        scores = query @ key.transpose(-1, -2) / math.sqrt(width / heads)
        attended = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = x + gate1[:, None] * linear(f"{block}.attn.proj", attended)
        hidden = F.gelu(linear(f"{block}.mlp.fc1", modulated(x, shift2, scale2)), approximate="tanh")
        x = x + gate2[:, None] * linear(f"{block}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=-1)
    x = linear("final_layer.linear", modulated(x, shift, scale)).unflatten(-1, (p * p, -1))  # (B, N, p * p, C)
    return F.fold(x.transpose(-1, -2).flatten(2).transpose(1, 2), images.shape[-2:], p, stride=p)


@torch.no_grad()
@pytest.mark.parametrize("keep_variance", [False, True])
@pytest.mark.parametrize(
    ("heads", "changes"),
    [
        (2, {}),
        (3, {"width": 36, "depth": 3, "in_channels": 3, "out_channels": 3}),
        (4, {"patch_size": 4, "mlp": 3, "side": 3}),
    ],
    ids=["plain", "odd", "patch_4"],
)
def test_an_official_checkpoint(heads, changes, keep_variance):
    weights = official_weights(**changes)
    model = from_official(weights, num_attention_heads=heads, sample_size=99, keep_variance=keep_variance)
    config = model.config
    assert config.sample_size == config.patch_size * math.isqrt(weights["pos_embed"].shape[1])
    images, timestep, labels = noisy(config.in_channels, config.sample_size)
    expected = official_forward(weights, heads, images, timestep, labels)
    output = model(images, timestep, labels).sample
    assert output.shape[1] == (expected.shape[1] if keep_variance else config.in_channels)
    assert expected.abs().max() > 1
    torch.testing.assert_close(output, expected[:, : output.shape[1]], **ROUNDING)
    assert not model.training and config.num_classes == 3


@pytest.mark.parametrize(
    ("width", "depth", "heads"),
    [(384, 12, 6), (768, 12, 12), (1024, 24, 16), (1152, 28, 16)],
    ids=["S", "B", "L", "XL"],
)
def test_official_sizes(width, depth, heads):
    """Names, shapes and number of parameters, beside diffusers' own class; nothing is allocated."""
    shapes = official_shapes(width, depth, rows=1001)
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in shapes.items()}
        theirs = DiTTransformer2DModel(heads, width // heads, out_channels=8, num_layers=depth)
    model = from_official(weights, keep_variance=True)
    assert model.device.type == "meta" and model.config.num_attention_heads == heads
    assert (model.config.num_classes, model.config.sample_size, model.config.mlp_ratio) == (1000, 32, 4)
    embedder = theirs.transformer_blocks[0].norm1.emb
    repeated = (depth - 1) * sum(parameter.numel() for parameter in embedder.parameters())
    assert model.num_parameters() == theirs.num_parameters() - repeated == sum(map(math.prod, shapes.values()))
    without = from_official(weights)
    assert model.num_parameters() - without.num_parameters() == 4 * 4 * (width + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_official_checkpoint_in_half_precision(dtype):
    weights = {name: tensor.to(dtype) for name, tensor in official_weights().items()}
    # The last bit of a rounded table may be another.
    weights["pos_embed"] *= 1 - torch.finfo(dtype).eps / 2
    model = from_official(weights, 2)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype} and model.config.sample_size == 8


def test_a_label_table_without_null_row():
    weights = official_weights()
    table = weights["y_embedder.embedding_table.weight"]
    model = from_official(weights, 2, num_classes=4)
    assert torch.equal(model.class_embed.weight, torch.cat([table, torch.zeros(1, 32)]))
    assert torch.equal(from_official(weights, 2, num_classes=3).class_embed.weight, table)
    with pytest.raises(ValueError, match=re.escape("`num_classes` (5) does not fit a label table of 4 rows")):
        from_official(weights, 2, num_classes=5)


def without(*names):
    return {name: tensor for name, tensor in official_weights().items() if name not in names}


@pytest.mark.parametrize(
    ("weights", "heads", "words"),
    [
        (without("blocks.1.attn.qkv.bias"), 2, ["lacks blocks.1.attn.qkv.bias (1 tensors)"]),
        ({**without(), "blocks.0.attn.q_norm.weight": torch.ones(16)}, 2, ["blocks.0.attn.q_norm.weight (1 tensors)"]),
        ({"a": torch.ones(1)}, 2, ["lacks blocks.0.adaLN_modulation.1.bias", ", ... (21 tensors)"]),
        ({f"module.{name}": tensor for name, tensor in without().items()}, 2, ["lacks blocks.0.", "(21 tensors)"]),
        (without(), None, ["`num_attention_heads`", "[384, 768, 1024, 1152]", "width 32"]),
        (without(), 3, ["`num_attention_heads` (3)", "(32)"]),
        ({**without(), "pos_embed": official_weights()["pos_embed"] + 1e-3}, 2, ["`pos_embed` (1, 16, 32)", "4 x 4"]),
        ({**without(), "pos_embed": torch.zeros(1, 17, 32)}, 2, ["`pos_embed` (1, 17, 32)"]),
        ({**without(), "blocks.1.mlp.fc2.weight": torch.ones(32, 64)}, 2, ["(32, 64)", "(32, 128)"]),
    ],
    ids=["missing", "unknown", "nothing", "prefixed", "heads", "heads_3", "positions", "not_square", "shape"],
)
def test_other_checkpoints_are_refused(weights, heads, words):
    with pytest.raises(ValueError) as refused:
        from_official(weights, heads)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_a_checkpoint_file_is_read(tmp_path):
    weights = official_weights()
    other = {name: tensor + 1 for name, tensor in weights.items()}
    state = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict()
    options = argparse.Namespace(model="DiT-XL/2", image_size=256, global_seed=0, ckpt=None)
    torch.save(weights, tmp_path / "plain.pt")
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"model": other, "ema": weights, "opt": state, "args": options}, tmp_path / "training.pt")
    torch.save({"model": weights, "opt": state, "args": options}, tmp_path / "raw.pt")
    save_file(weights, tmp_path / "plain.safetensors")
    expected = from_official(weights, num_attention_heads=2, keep_variance=True).state_dict()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 5
    for file in files:
        model = load_official(file, num_attention_heads=2, keep_variance=True)
        file.unlink()  # it is mapped while it is read, and not needed afterwards
        assert_same_tensors(model.state_dict(), expected)


def test_other_files_are_refused(tmp_path):
    class Runs:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").mkdir, ())

    save_file(official_weights(), tmp_path / "cut.safetensors")
    torch.save(official_weights(), tmp_path / "cut.pt")
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    (tmp_path / "empty.pt").touch()
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    torch.save({"model": Runs()}, tmp_path / "code.pt")
    for file in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=rf"`path` \({file.name}\) is damaged, or no checkpoint"):
            load_official(file)
    assert not (tmp_path / "ran").exists()
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match=r"`path` \(tensor.pt\) holds a Tensor; expected a state dict"):
        load_official(tmp_path / "tensor.pt")
    for name in ("nothing.pt", "nothing.safetensors"):
        with pytest.raises(FileNotFoundError):
            load_official(tmp_path / name)


# -- Freq-Gate from adaLN-Zero ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [{}, {"modulation_rank": 4}, {"freq_shift": 1, "mlp_norm_eps": 1e-3, "out_channels": 8}, NO_CLASSES, TEXT],
    ids=["plain", "low_rank", "as_in_diffusers", "unconditional", "text"],
)
def test_a_freq_gate_model_starts_as_an_adaln_zero_model(changes, dtype):
    model = tiny_transformer("adaln_zero", **changes).to(dtype)
    gated = freq_gate_from_adaln_zero(model)
    assert gated.config.gate_residual and not gated.training
    assert {parameter.dtype for parameter in gated.parameters()} == {dtype}
    for timestep in (0, 937.5, 999):
        expected = run(model, timestep=timestep)
        assert expected.abs().max() > 1 and torch.equal(run(gated, timestep=timestep), expected)
    assert_differ(run(randomize(gated), timestep=999), expected)
    assert torch.equal(run(model, timestep=999), expected)


def test_a_freq_gate_model_starts_as_an_adaln_zero_model_under_autocast():
    model = tiny_transformer("adaln_zero")
    gated = freq_gate_from_adaln_zero(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(gated), run(model))


def test_a_freq_gate_model_is_saved_and_loaded(tmp_path):
    model = tiny_transformer("adaln_zero")
    gated = freq_gate_from_adaln_zero(model)
    gated.save_pretrained(tmp_path)
    assert torch.equal(run(type(gated).from_pretrained(tmp_path)), run(model))


def test_a_warm_start_learns():
    """Low and High get a gradient at once; the gate, which weighs their difference, after the first step."""
    model = freq_gate_from_adaln_zero(tiny_transformer("adaln_zero"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def gradients():
        optimizer.zero_grad()
        model(**inputs(model, batch_size=4)).sample.square().mean().backward()
        parts = {"low": [], "high": [], "gate.1": []}
        for block in model.transformer_blocks:
            for name, found in parts.items():
                found.append(block.get_submodule(name).weight.grad.abs().max())
        return {name: torch.stack(found) for name, found in parts.items()}

    first = gradients()
    assert (first["low"] > 1e-4).all() and (first["high"] > 1e-4).all() and not first["gate.1"].any()
    optimizer.step()
    assert (gradients()["gate.1"] > 1e-6).all()


def test_only_adaln_zero_models_become_freq_gate_models():
    with pytest.raises(ValueError, match="`model` is a FreqGateDiTTransformer2DModel"):
        freq_gate_from_adaln_zero(tiny_transformer("freq_gate"))
