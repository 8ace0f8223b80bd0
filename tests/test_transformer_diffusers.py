"""The DiT variants as diffusers models: files, compilation, checkpointing, recording, adapters."""

import pytest
import torch
from components import randomize, tiny_transformer
from diffusers.models.attention_dispatch import attention_backend
from safetensors.torch import load_file
from test_preconditioning import preconditioned
from torch._dynamo.testing import CompileCounter
from transformer_cases import assert_differ, inputs, ref_linear, ref_silu, run

from freqgate_dit import VARIANTS
from freqgate_dit.transformer_freqgate_dit import (
    DiTAttention,
    DiTAttnProcessor,
    DiTMatmulAttnProcessor,
)


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
# torch.compile, export, gradient checkpointing


# Every variant, each with something else that is traced.
EXPORTED = {
    "in_context": {"use_rope": True, "qk_norm": True, "activation_fn": "swiglu"},
    "cross_attention": {"kind": "scalar"},
    "adaln_zero": {"kind": "learned"},
    "freq_gate": {"kind": "mask"},
    "band_gate": {"modulation_rank": 4},
}


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
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for timestep in (999.0, 936.5, 0.0):
            kwargs = {**inputs(model), "timestep": torch.tensor(timestep)}
            torch.testing.assert_close(compiled(**kwargs).sample, model(**kwargs).sample)
    assert counter.frame_count == 1


def test_compiled_once_more_for_all_other_sizes(dynamo):
    model = tiny_transformer(num_layers=1, preconditioning="mask", prediction_type="epsilon")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for height, width in ((8, 8), (12, 12), (16, 20)):
            kwargs = inputs(model, height=height, width=width)
            torch.testing.assert_close(compiled(**kwargs).sample, model(**kwargs).sample)
    assert counter.frame_count == 2


def exportable(variant: str):
    """A model of `EXPORTED` with weights of a trained model's size, and how to export it for any batch size."""
    model = randomize(preconditioned("v_prediction", variant, num_layers=1, **EXPORTED[variant]), std=0.05).eval()
    dynamic_shapes = {name: {0: torch.export.Dim.DYNAMIC} for name in inputs(model)}
    return model, dynamic_shapes


def test_exported_for_any_batch_size(variant):
    model, dynamic_shapes = exportable(variant)
    exported = torch.export.export(model, (), inputs(model, 3), dynamic_shapes=dynamic_shapes)
    for batch_size in (1, 5):
        given = inputs(model, batch_size)
        torch.testing.assert_close(exported.module()(**given).sample, run(model, **given))


def test_onnx_for_any_batch_size(variant, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, dynamic_shapes = exportable(variant)
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (), file, kwargs=inputs(model, 3), dynamic_shapes=dynamic_shapes, dynamo=True)
    session = onnxruntime.InferenceSession(file)
    for batch_size in (1, 5):
        given = inputs(model, batch_size)
        (output,) = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        expected = run(model, **given)
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_compiled_repeated_blocks(variant, dynamo):
    model = tiny_transformer(variant, num_layers=3)
    expected = run(model)
    counter = CompileCounter()
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
# inspect()


def trace_free(model) -> bool:
    hooks = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return not hooks and all(type(p) is DiTAttnProcessor for p in model.attn_processors.values())


def test_inspect_changes_nothing_and_leaves_nothing(model):
    kinds = (*model.inspectable, "attention")
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
    with pytest.raises(ValueError, match=r"`kind` \('gaet'\) is not recorded: choose from modulation, gate"):
        recorder.select("gaet")
    with pytest.raises(ValueError, match=r"`block` \(2\): the model has blocks 0 to 1"):
        recorder.select("gate", block=2)


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
    if "gate" not in model.inspectable:
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


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offload(offload_type, tmp_path):
    """To files, which empties the tensors in memory also where there is no other device."""
    model = tiny_transformer("band_gate", preconditioning="learned", prediction_type="epsilon")
    expected = run(model)
    model.enable_group_offload("cpu", offload_type=offload_type, num_blocks_per_group=1, offload_to_disk_path=tmp_path)
    for _ in range(2):
        torch.testing.assert_close(run(model), expected)


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
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out"]))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    attentions = sum(isinstance(m, DiTAttention) for m in model.modules())
    assert len(trainable) == 8 * attentions and all("lora_" in name for name in trainable)
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


def test_inspect_records_something_on_every_variant(variant):
    model = tiny_transformer(variant)
    with model.inspect() as recorder:
        run(model)
    assert recorder.records
