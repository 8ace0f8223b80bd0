"""Which images an evaluation samples, and how they are kept until all are there."""

import hashlib
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from components import (
    LABELS,
    build_pipeline,
    make_pipeline,
    tiny_transformer,
)
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from freqgate_dit.scheduling_spectral_euler import SpectralEulerDiscreteScheduler
from freqgate_dit.training.generation import (
    UNCONDITIONAL,
    Classes,
    Sampler,
    choose_classes,
    choose_scheduler,
    class_sequence,
    generate,
    load_model,
    to_uint8,
    weights_digest,
)
from freqgate_dit.training.sample_folder import PROTOCOL, SampleFolder


CPU = torch.device("cpu")
SHARES = (5, 1, 4)  # of the three classes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline folder: 3 classes, RGB images of 8 px."""
    folder = tmp_path_factory.mktemp("model") / "pipe"
    make_pipeline(tiny_transformer(in_channels=3)).save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder):
    return load_model(str(folder), None, "float32", CPU)


def sampler_of(model, count=10, seed=0, steps=2, guidance_scale=2.0):
    classes = Classes("class_labels", (0, 1, 2), tuple(LABELS.values()), "reference", SHARES)
    return Sampler(model, classes, class_sequence(SHARES, count), seed, steps, guidance_scale)


def folder_of(path, sampler, device="cpu"):
    return SampleFolder(path, sampler.protocol(), len(sampler.sequence), 8, device)


def run(samples, sampler, batch_size=4):
    generate(samples, sampler, Accelerator(cpu=True), batch_size, "sampling")


def contents(folder):
    return {path.name: path.read_bytes() for path in (folder / "samples").iterdir()}


# -- classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "count", "numbers"),
    [
        ((1, 1, 1), 9, (3, 3, 3)),
        ((1, 1, 1), 10, (4, 3, 3)),  # of equal remainders the first
        ((5, 1, 4), 10, (5, 1, 4)),
        ((5, 1, 4), 12, (6, 1, 5)),  # 6, 1.2, 4.8
        ((1, 2, 4), 3, (0, 1, 2)),  # 0.43, 0.86, 1.71
        ((1700, 0, 1), 5100, (5097, 0, 3)),
        ((1,), 7, (7,)),
    ],
)
def test_classes_have_their_shares_by_the_largest_remainder(weights, count, numbers):
    sequence = class_sequence(weights, count)
    assert Counter(sequence) == Counter({k: number for k, number in enumerate(numbers) if number})
    assert sequence == class_sequence(weights, count)


@pytest.mark.parametrize("weights", [(1,) * 64, (500, 20, 3, 77), (9, 1)])
def test_every_part_of_the_sequence_has_about_the_same_mix(weights):
    count = 1000
    sequence = np.array(class_sequence(weights, count))
    for k, weight in enumerate(weights):
        so_far = np.cumsum(sequence == k)
        expected = np.arange(1, count + 1) * weight / sum(weights)
        assert np.abs(so_far - expected).max() <= 2


def test_the_mix_of_the_reference_goes_by_name():
    pipe = make_pipeline()
    classes = choose_classes(pipe, "reference", ["wild", "cat", "dog"], [7, 5, 6], None)
    assert classes == Classes("class_labels", (0, 1, 2), ("cat", "dog", "wild"), "reference", (5, 6, 7))
    assert choose_classes(pipe, "uniform", [], [], None).weights == (1, 1, 1)
    unnamed = make_pipeline(id2label={})
    assert choose_classes(unnamed, "uniform", [], [], None).names == ("class 0", "class 1", "class 2")


def test_classes_go_by_name_in_any_unicode_form():
    pipe = make_pipeline(id2label={0: "cafe\u0301", 1: "dog", 2: "wild"})
    classes = choose_classes(pipe, "reference", ["caf\u00e9", "dog", "wild"], [5, 6, 7], None)
    assert classes.weights == (5, 6, 7)


@pytest.mark.parametrize(
    ("names", "counts", "message"),
    [
        (["cat", "wild"], [5, 6], r"has no image of classes of the pipeline \(dog\).*`class_mix` uniform"),
        (["cat", "dog", "wild"], [5, 0, 6], r"has no image of classes of the pipeline \(dog\)"),
        (["cat", "dog", "fox", "wild"], [5, 6, 7, 8], r"has classes that the pipeline does not know \(fox\)"),
        ([], [], r"has no image of classes of the pipeline \(cat, dog, wild\)"),
    ],
)
def test_classes_that_the_reference_lacks_are_named(names, counts, message):
    with pytest.raises(ValueError, match=f"`reference` {message}"):
        choose_classes(make_pipeline(), "reference", names, counts, None)


def test_prompts_and_no_classes(tmp_path):
    pipe = build_pipeline("adaln_zero", "text", tmp_path)
    classes = choose_classes(pipe, "reference", ["cat", "dog"], [3, 4], "a {label}")
    assert classes == Classes("prompt", ("a cat", "a dog"), ("cat", "dog"), "reference", (3, 4))
    assert choose_classes(pipe, "uniform", ["cat", "dog"], [3, 4], "a {label}").weights == (1, 1)
    for names, template in (([], "a {label}"), (["cat"], None)):
        with pytest.raises(ValueError, match="takes prompts.*`prompt_template`"):
            choose_classes(pipe, "reference", names, [3] * len(names), template)
    unconditional = make_pipeline(tiny_transformer(num_classes=None))
    assert choose_classes(unconditional, "reference", ["cat"], [3], None) == UNCONDITIONAL


# -- images -----------------------------------------------------------------------------------------------------------


def test_images_are_those_of_the_pipeline_with_their_own_seeds(model):
    """Anyone can make image i again: its class, and seed + i."""
    sampler = sampler_of(model, seed=100)
    images, _ = sampler.images(range(3, 9))
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}
    for index, image in zip(range(3, 9), images, strict=True):
        alone = model.pipe(sampler.sequence[index], seed=100 + index, **options).images[0]
        difference = image.permute(1, 2, 0).numpy().astype(int) - (alone * 255).round().astype(int)
        assert np.abs(difference).max() <= 1 and np.abs(difference).mean() < 0.01
    assert len(images.flatten(1).unique(dim=0)) == 6


def test_pixels_are_rounded_as_the_pipeline_does_and_clipped_ones_counted(model):
    generator = torch.Generator().manual_seed(0)
    raw = 1.5 * torch.randn(4, 3, 8, 8, generator=generator).clamp(-1, 1)
    images, clipped = to_uint8(raw)
    theirs = model.pipe.image_processor.postprocess(raw, output_type="pil")
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), np.stack([np.asarray(image) for image in theirs]))
    exact = torch.zeros(1, 3, 2, 2)
    exact[0, 1, 0, 0], exact[0, :, 1, 1], exact[0, 2, 0, 1] = 1.1, -1.2, 1.003  # the last is rounding
    assert to_uint8(exact)[1] == 2 and 0 < clipped < 4 * 64


@pytest.mark.parametrize("kind", ["kl", "tiny", "text"])
def test_latents_are_decoded_and_prompts_taken(kind, tmp_path):
    pipe = build_pipeline("adaln_zero", kind, tmp_path)
    pipe.save_pretrained(tmp_path / "pipe")
    model = load_model(str(tmp_path / "pipe"), None, "float32", CPU)
    classes = choose_classes(model.pipe, "uniform", ["cat", "dog"], [1, 1], "{label}")
    sampler = Sampler(model, classes, class_sequence(classes.weights, 4), 0, 2, 1.0)
    images, _ = sampler.images(range(4))
    values = [classes.values[k] for k in sampler.sequence]
    expected = pipe(**{classes.argument: values}, seed=0, num_inference_steps=2, guidance_scale=1).images
    assert images.shape == (4, 3, 16, 16)
    difference = images.permute(0, 2, 3, 1).numpy().astype(int) - np.stack([np.array(image) for image in expected])
    assert np.abs(difference).max() <= 1
    protocol = sampler.protocol()
    assert protocol["autoencoder"] != protocol["checkpoint"] and (protocol["text_encoder"] is None) == (kind != "text")
    json.dumps(protocol)


def test_an_unconditional_pipeline_and_its_guidance(tmp_path):
    make_pipeline(tiny_transformer(num_classes=None, in_channels=3)).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), None, "float32", CPU)
    assert model.pipe.default_guidance_scale == 1 and make_pipeline().default_guidance_scale == 2.5
    images, _ = Sampler(model, UNCONDITIONAL, [0] * 3, 5, 2, 1.0).images(range(3))
    expected = model.pipe(num_images_per_label=3, seed=5, num_inference_steps=2, output_type="np").images
    assert np.abs(images.permute(0, 2, 3, 1).numpy() - expected * 255).max() <= 1


def test_images_that_are_not_finite_are_refused(folder):
    model = load_model(str(folder), None, "float32", CPU)
    with torch.no_grad():
        model.pipe.transformer.proj_out.weight[0] = torch.nan
    with pytest.raises(ValueError, match="image 4 of the pipeline has NaN or infinity.*try float32"):
        sampler_of(model).images(range(4, 6))


# -- the model --------------------------------------------------------------------------------------------------------


def test_the_checkpoint_is_known_by_the_digest_of_its_file(folder, model, tmp_path):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert model.weights["checkpoint"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert model.weights["autoencoder"] is None
    shards = make_pipeline(tiny_transformer(in_channels=3))
    shards.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    files = sorted((tmp_path / "shards" / "transformer").glob("*.safetensors"))
    digests = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    assert len(files) > 1
    assert weights_digest(tmp_path / "shards" / "transformer") == hashlib.sha256(digests.encode()).hexdigest()
    shards.save_pretrained(tmp_path / "shards", variant="fp16")  # which is not what is loaded
    assert weights_digest(tmp_path / "shards" / "transformer") == hashlib.sha256(digests.encode()).hexdigest()


def test_only_the_transformer_computes_in_less_than_float32(tmp_path):
    build_pipeline("adaln_zero", "kl", tmp_path).save_pretrained(tmp_path / "pipe")
    model = load_model(str(tmp_path / "pipe"), None, "bfloat16", CPU)
    assert (model.dtype, model.pipe.transformer.dtype, model.pipe.vae.dtype) == (
        "bfloat16",
        torch.bfloat16,
        torch.float32,
    )


def test_another_scheduler_keeps_the_noise_schedule(folder):
    model = load_model(str(folder), "DPMSolverMultistepScheduler", "float32", CPU)
    assert isinstance(model.pipe.scheduler, DPMSolverMultistepScheduler)
    protocol = sampler_of(model).protocol()
    assert protocol["scheduler"] == "DPMSolverMultistepScheduler"
    assert protocol["scheduler_config"]["beta_end"] == 0.02 and protocol["scheduler_config"]["solver_order"] == 2
    config = model.pipe.scheduler.config
    assert isinstance(choose_scheduler("DDIMScheduler", config), DDIMScheduler)
    for name in ("EulerDiscretScheduler", "UNet2DModel", "load_model"):
        with pytest.raises(ValueError, match=rf"`sampler` \({name}\) must be one of spectral, .*scheduler class"):
            choose_scheduler(name, config)
    with pytest.raises(ValueError, match="did you mean EulerDiscreteScheduler"):
        choose_scheduler("EulerDiscretScheduler", config)


def test_a_sampler_by_name(folder):
    protocol = sampler_of(load_model(str(folder), "dpm", "float32", CPU)).protocol()
    assert protocol["sampler"] == "DPMSolverMultistepScheduler, Lu's noise levels"
    assert protocol["scheduler_config"]["use_lu_lambdas"] is True and protocol["scheduler_config"]["beta_end"] == 0.02
    with pytest.raises(ValueError, match="needs the spectrum of the training data"):
        load_model(str(folder), "spectral", "float32", CPU)


def test_the_protocol_tells_spectra_and_orders_apart(folder):
    model = load_model(str(folder), None, "float32", CPU)
    seen = set()
    for power, order in ((1.0, 1), (1.0, 2), (2.0, 1)):
        spectrum = {"height": 8, "width": 8, "power": [[power]] * 3, "mean": [[[0.0]]] * 3}
        model.pipe.scheduler = SpectralEulerDiscreteScheduler.from_config(
            model.pipe.scheduler.config, spectrum=spectrum, spectral_order=order
        )
        config = sampler_of(model).protocol()["scheduler_config"]
        assert config["spectral_order"] == order and len(config["spectrum"]) == 64
        seen.add(json.dumps(config))
    assert len(seen) == 3


def test_a_pipeline_that_makes_no_rgb_images_is_refused(tmp_path):
    for channels in (1, 4):
        make_pipeline(tiny_transformer(in_channels=channels)).save_pretrained(tmp_path / str(channels))
        with pytest.raises(ValueError, match=f"latents of {channels} x 8 x 8.*RGB.*autoencoder"):
            load_model(str(tmp_path / str(channels)), None, "float32", CPU)


# -- the folder -------------------------------------------------------------------------------------------------------


def test_exactly_as_many_as_asked_for_in_any_batch_size(model, tmp_path):
    sampler = sampler_of(model, count=10)
    folders = {size: folder_of(tmp_path / str(size), sampler) for size in (1, 4, 10, 64)}
    for size, samples in folders.items():
        run(samples, sampler, size)
        assert len(samples.files()) == -(-10 // size) and samples.missing(3) == []
    whole = folders[64].images(range(10))
    assert whole.shape == (10, 3, 8, 8) and len(whole.flatten(1).unique(dim=0)) == 10
    order = [7, 0, 9, 3, 3]
    for samples in folders.values():
        difference = samples.images(range(10)).int() - whole.int()
        assert difference.abs().max() <= 1 and difference.float().abs().mean() < 0.01
        assert torch.equal(samples.images(order), samples.images(range(10))[order])
    assert folders[4].clipped() == sum(sampler.images(range(i, min(i + 4, 10)))[1] for i in (0, 4, 8))
    assert len({samples.fingerprint for samples in folders.values()}) == 1


def test_interrupted_work_goes_on_with_the_same_bytes(model, tmp_path, monkeypatch, capsys):
    sampler = sampler_of(model, count=14)
    straight = folder_of(tmp_path / "straight", sampler)
    run(straight, sampler)
    images, made = Sampler.images, []

    def interrupted(self, indices):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(indices)
        return images(self, indices)

    monkeypatch.setattr(Sampler, "images", interrupted)
    samples = folder_of(tmp_path / "run", sampler)
    with pytest.raises(KeyboardInterrupt):
        run(samples, sampler)
    assert samples.missing(4) == [range(8, 12), range(12, 14)]
    # What a kill at the worst moment, or a disk that lost power, leaves behind.
    (samples.samples / "images_0000008_0000012.safetensors.1234abcd.tmp").write_bytes(b"half")
    damaged = samples.samples / "images_0000000_0000004.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    monkeypatch.setattr(Sampler, "images", lambda self, indices: (made.append(indices), images(self, indices))[1])
    capsys.readouterr()
    run(samples, sampler)
    assert made[2:] == [range(0, 4), range(8, 12), range(12, 14)]
    assert "4 of 14 images are there already" in capsys.readouterr().out
    assert contents(samples.folder) == contents(straight.folder)
    run(samples, sampler)  # nothing is left to do
    assert len(made) == 5


def test_work_goes_on_in_another_batch_size(model, tmp_path):
    sampler = sampler_of(model, count=10)
    samples = folder_of(tmp_path, sampler)
    samples.open()
    samples.write(range(4, 6), *sampler.images(range(4, 6)))
    assert samples.missing(3) == [range(0, 3), range(3, 4), range(6, 9), range(9, 10)]
    run(samples, sampler, 3)
    assert len(samples.files()) == 5
    assert (samples.images(range(10)).int() - sampler.images(range(10))[0].int()).abs().max() <= 1


def test_images_of_another_protocol_are_never_mixed_in(model, tmp_path):
    sampler = sampler_of(model)
    samples = folder_of(tmp_path, sampler)
    samples.open()
    folder_of(tmp_path, sampler_of(model, steps=3)).check()  # as long as there are no images
    samples.write(range(0, 4), *sampler.images(range(0, 4)))
    others = {
        r"steps 2, here 3": {"steps": 3},
        r"seed 0, here 1": {"seed": 1},
        r"num_images 10, here 11": {"count": 11},
        r"guidance_scale 2.0, here 1.0": {"guidance_scale": 1.0},
    }
    for message, change in others.items():
        with pytest.raises(
            ValueError, match=rf"`out` .* holds another evaluation \(.*{message}.*choose another folder"
        ):
            folder_of(tmp_path, sampler_of(model, **change)).check()
    other = sampler_of(replace(model, weights={**model.weights, "checkpoint": "0" * 64}))
    with pytest.raises(ValueError, match="checkpoint"):
        folder_of(tmp_path, other).check()
    (tmp_path / PROTOCOL).unlink()
    with pytest.raises(ValueError, match=f"without a {PROTOCOL}"):
        samples.check()


def test_a_part_is_finished_on_the_same_device_and_versions(model, tmp_path):
    sampler = sampler_of(model, count=6)
    samples = folder_of(tmp_path, sampler)
    samples.open()
    samples.write(range(0, 4), *sampler.images(range(0, 4)))
    with pytest.raises(ValueError, match="made elsewhere \\(device cpu, here cuda\\)"):
        folder_of(tmp_path, sampler, "cuda").check()
    run(samples, sampler)
    later = folder_of(tmp_path, sampler, "cuda")  # only to measure
    later.check()
    assert later.made_with["device"] == "cpu"
