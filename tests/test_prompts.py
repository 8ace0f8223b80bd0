"""Prompts: pooled text embeddings as the condition."""

import pytest
import torch
from accelerate import cpu_offload
from components import TEXT_DIM, make_pipeline, sample, tiny_text_encoder, tiny_tokenizer, tiny_transformer

from freqgate_dit import FreqGateDiTPipeline
from freqgate_dit.pipelines.pipeline_freqgate_dit import encode_pooled_text


# Rounding differs between batch sizes; a guided random network amplifies it over the steps.
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def test_prompts_condition_through_the_text_encoder(text_pipe):
    results = sample(text_pipe, prompt=["cat", "dog"], seed=[3, 3])
    assert not torch.allclose(results[0], results[1], atol=0.1)
    embeds = text_pipe.encode_prompt(["cat", "dog"])
    assert embeds.shape == (2, TEXT_DIM)
    null = text_pipe.encode_prompt("")
    by_embeds = sample(
        text_pipe, pooled_prompt_embeds=embeds, negative_pooled_prompt_embeds=null, num_images_per_label=1, seed=[3, 3]
    )
    torch.testing.assert_close(by_embeds, results, **CLOSE)
    assert torch.equal(sample(text_pipe, pooled_prompt_embeds=embeds, seed=[3, 3]), by_embeds)
    # The negative prompt is the null condition.
    torch.testing.assert_close(
        sample(text_pipe, prompt="cat", negative_prompt="dog", guidance_scale=0, seed=3),
        sample(text_pipe, prompt="dog", guidance_scale=1, seed=3),
        **CLOSE,
    )


def test_pooled_text_is_the_text_models_own_and_independent_of_the_batch(tmp_path):
    tokenizer, text_encoder = tiny_tokenizer(tmp_path), tiny_text_encoder()
    prompts = ["a photo of cat", "", "a very long prompt that does not fit into the context"]
    embeds = encode_pooled_text(tokenizer, text_encoder, prompts)
    for prompt, embed in zip(prompts, embeds, strict=True):
        # The text model alone, without padding.
        ids = tokenizer(prompt, truncation=True, max_length=16, return_tensors="pt").input_ids
        with torch.no_grad():
            torch.testing.assert_close(text_encoder(ids).pooler_output[0], embed, rtol=1e-4, atol=1e-4)


def test_embeds_without_a_text_encoder():
    pipe = make_pipeline(tiny_transformer(num_classes=None, pooled_projection_dim=TEXT_DIM))
    embeds = torch.randn(2, TEXT_DIM, generator=torch.Generator().manual_seed(0))
    assert sample(pipe, pooled_prompt_embeds=embeds, guidance_scale=1).shape == (2, 4, 8, 8)
    null = torch.zeros(1, TEXT_DIM)
    assert torch.equal(
        sample(pipe, pooled_prompt_embeds=embeds, negative_pooled_prompt_embeds=null),
        sample(pipe, pooled_prompt_embeds=embeds, negative_pooled_prompt_embeds=null.expand(2, -1)),
    )
    with pytest.raises(ValueError, match="needs `negative_pooled_prompt_embeds`"):
        sample(pipe, pooled_prompt_embeds=embeds)
    with pytest.raises(ValueError, match="`prompt` .* needs a text encoder"):
        sample(pipe, prompt="cat")
    with pytest.raises(ValueError, match="`negative_prompt` .'blur'. needs a text encoder"):
        sample(pipe, pooled_prompt_embeds=embeds, negative_prompt="blur")
    with pytest.raises(ValueError, match="`pooled_prompt_embeds` is empty"):
        sample(pipe, pooled_prompt_embeds=embeds[:0])
    for wrong in (torch.zeros(3, TEXT_DIM), torch.zeros(1, 5)):
        with pytest.raises(ValueError, match=r"`negative_pooled_prompt_embeds` .* \(1, 16\), .*\(2, 16\)"):
            sample(pipe, pooled_prompt_embeds=embeds, negative_pooled_prompt_embeds=wrong)
    for wrong in (embeds[0], embeds[:, :5]):
        with pytest.raises(ValueError, match=r"`pooled_prompt_embeds` has shape .* expected \(prompts, 16\)"):
            sample(pipe, pooled_prompt_embeds=wrong)


def test_no_negative_prompt_is_the_empty_one(text_pipe):
    expected = sample(text_pipe, prompt=["cat", "dog"])
    for nothing in (None, "", ["", ""]):
        assert torch.equal(sample(text_pipe, prompt=["cat", "dog"], negative_prompt=nothing), expected)


def test_a_prompt_that_is_cut_is_told(text_pipe, caplog):
    whole = "cat " * 14  # and a token at each end
    text_pipe.encode_prompt(["dog", whole])
    assert not caplog.messages
    text_pipe.encode_prompt(["dog", whole + "dog cat"])
    (message,) = caplog.messages
    assert "'dog cat'" in message and "16 tokens" in message


def test_prompts_of_an_offloaded_text_encoder(text_pipe):
    """Its weights lie on no device then."""
    expected = sample(text_pipe, prompt="cat")
    for name in ("text_encoder", "transformer"):
        cpu_offload(getattr(text_pipe, name), torch.device("cpu"), offload_buffers=True)
    assert text_pipe.text_encoder.device.type == "meta"
    assert torch.equal(sample(text_pipe, prompt="cat"), expected)


def test_a_pipeline_without_transformer_encodes(text_pipe, tmp_path):
    text_pipe.save_pretrained(tmp_path)
    encoder = FreqGateDiTPipeline.from_pretrained(tmp_path, transformer=None, scheduler=None)
    embeds, null = (encoder.encode_prompt(prompt) for prompt in ("cat", ""))
    assert torch.equal(embeds, text_pipe.encode_prompt("cat"))
    with pytest.raises(ValueError, match="`transformer` is None"):
        encoder(prompt="cat")
    with pytest.raises(ValueError, match="`transformer` is None"):
        encoder.save_pretrained(tmp_path)
    assert encoder.num_classes is None and not encoder.has_null_condition
    with pytest.raises(ValueError, match="`prompt` .'cat'. needs a text encoder"):
        FreqGateDiTPipeline.from_pretrained(tmp_path, tokenizer=None).encode_prompt("cat")
    denoiser = FreqGateDiTPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    result = sample(denoiser, pooled_prompt_embeds=embeds, negative_pooled_prompt_embeds=null)
    assert torch.equal(result, sample(text_pipe, prompt="cat"))
