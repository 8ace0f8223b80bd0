import ast
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from components import LABELS, build_pipeline, make_pipeline, sample, tiny_transformer
from safetensors.torch import load_file, save_file

from freqgate_dit import VARIANTS, FreqGateDiTPipeline
from freqgate_dit.hub import push_folder
from freqgate_dit.summary import read_summary


ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("kind", ["pixel", "kl", "tiny", "text"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load(variant, kind, tmp_path, caplog):
    pipe = build_pipeline(variant, kind, tmp_path)
    run = {"prompt" if kind == "text" else "class_labels": ["dog", "cat"], "output_type": "np", "seed": 0}
    pipe.save_pretrained(tmp_path / "pipeline")
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        loaded = FreqGateDiTPipeline.from_pretrained(tmp_path / "pipeline")
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    # `AutoencoderTiny` of diffusers 0.42 complains about its own config.
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [message for message in messages if "AutoencoderTiny" not in message] == []
    # What was loaded saves the same again (before a call: tokenizers keep the padding of their last one).
    loaded.save_pretrained(tmp_path / "again")
    for file in (tmp_path / "pipeline").rglob("*.*"):
        assert (tmp_path / "again" / file.relative_to(tmp_path / "pipeline")).read_bytes() == file.read_bytes()
        assert str(tmp_path).encode() not in file.read_bytes()
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.transformer) is VARIANTS[variant]
    assert {name: part is None for name, part in loaded.components.items()} == {
        name: part is None for name, part in pipe.components.items()
    }
    assert np.array_equal(loaded(num_inference_steps=2, **run).images, pipe(num_inference_steps=2, **run).images)
    assert loaded.id2label == ({} if kind == "text" else LABELS)
    for name in ("id2label", "prediction_type", "class_dropout_prob"):
        assert loaded.config[name] == pipe.config[name]


def test_load_in_bfloat16(tmp_path):
    pipe = build_pipeline("freq_gate", "kl", tmp_path)
    pipe.save_pretrained(tmp_path)
    loaded = FreqGateDiTPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.transformer.dtype == loaded.vae.dtype == torch.bfloat16
    exact, rounded = (sample(p, "cat", guidance_scale=1) for p in (pipe, loaded))
    assert 0 < (exact - rounded).norm() / exact.norm() < 0.1
    assert loaded("cat", num_inference_steps=2).images[0].size == (16, 16)


def test_more_than_ten_labels_keep_their_order_and_ids(tmp_path):
    labels = {i: f"class {i}" for i in range(12)}
    pipe = make_pipeline(tiny_transformer(num_classes=12), id2label=labels)
    pipe.save_pretrained(tmp_path)
    loaded = FreqGateDiTPipeline.from_pretrained(tmp_path)
    assert list(loaded.id2label.items()) == list(labels.items())
    assert loaded.get_label_ids(list(labels.values())) == list(labels)


def test_optional_components_can_be_left_out_on_loading(tmp_path):
    build_pipeline("adaln_zero", "kl", tmp_path).save_pretrained(tmp_path)
    loaded = FreqGateDiTPipeline.from_pretrained(tmp_path, vae=None)
    assert loaded.vae is None and sample(loaded, "cat").shape == (1, 4, 8, 8)


def test_a_fresh_process_loads_and_prints_nothing_strange(tmp_path):
    pipe = build_pipeline("freq_gate", "text", tmp_path)
    pipe.save_pretrained(tmp_path / "pipeline")
    expected = pipe(prompt="cat", num_inference_steps=2, seed=0, output_type="np").images
    script = (
        "import numpy, sys\n"
        "from freqgate_dit import FreqGateDiTPipeline\n"
        "pipe = FreqGateDiTPipeline.from_pretrained(sys.argv[1])\n"
        "images = pipe(prompt='cat', num_inference_steps=2, seed=0, output_type='np').images\n"
        "numpy.save(sys.argv[2], images)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "pipeline"), str(tmp_path / "images.npy")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), expected, rtol=0, atol=1e-5)
    # Progress bars only.
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    assert lines == [] and done.stdout == ""


def change_weights(folder, change):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_config(folder, **options):
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda folder: change_weights(folder, lambda w: w.pop("proj_out.weight")), "no proj_out.weight"),
        (
            lambda folder: change_weights(folder, lambda w: w.update({"proj_out.bias": w["proj_out.bias"][1:]})),
            r"proj_out.bias of shape \(15,\) in place of \(16,\)",
        ),
        *(
            (
                lambda folder, dtype=dtype: change_weights(
                    folder, lambda w: w.update({"proj_out.bias": w["proj_out.bias"].to(dtype)})
                ),
                f"proj_out.bias of type {name} in place of floating-point numbers",
            )
            for dtype, name in ((torch.int8, "I8"), (torch.bool, "BOOL"), (torch.complex64, "C64"))
        ),
        (lambda folder: change_weights(folder, lambda w: w.update({"more": torch.zeros(1)})), "more besides"),
        *(
            (lambda folder, number=number: change_config(folder, num_layers=number), f"2 blocks, where .* is {number}")
            for number in (1, 0, -1, 10**9)
        ),
    ],
)
def test_weights_that_do_not_fit_their_config_are_refused(spoil, problem, tmp_path, hub):
    make_pipeline().save_pretrained(tmp_path / "pipe")
    spoil(tmp_path / "pipe")
    for use in (FreqGateDiTPipeline.from_pretrained, read_summary, lambda folder: push_folder(folder, "ana/dit")):
        with pytest.raises(OSError, match=f"weights of the transformer .* do not fit its config.json: .*{problem}"):
            use(tmp_path / "pipe")


def test_a_config_alone_is_not_believed_everything(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    change_config(tmp_path, num_layers=10**9)
    with pytest.raises(ValueError, match="claims 1000000000 blocks"):
        read_summary(tmp_path)


def test_a_part_of_a_download_is_described(tmp_path):
    make_pipeline().save_pretrained(tmp_path, max_shard_size="20KB")
    next((tmp_path / "transformer").glob("*00002-of*.safetensors")).unlink()
    assert read_summary(tmp_path).parameters
    with pytest.raises(OSError, match="lacks a piece of the weights"):
        FreqGateDiTPipeline.from_pretrained(tmp_path)


def test_an_adapter_is_not_saved_in_a_pipeline(tmp_path):
    pytest.importorskip("peft")
    from peft import LoraConfig

    pipe = make_pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"LoRA adapters.*`unload_lora\(\)`"):
        pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    pipe.transformer.fuse_lora()
    pipe.transformer.unload_lora()
    pipe.save_pretrained(tmp_path)
    FreqGateDiTPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "file",
    [
        "pipelines/pipeline_freqgate_dit.py",
        "freqgate_dit/transformer_freqgate_dit.py",
        "freqgate_dit/scheduling_spectral_euler.py",
    ],
)
def test_shipped_files_stand_alone(file):
    allowed = {*sys.stdlib_module_names, "torch", "diffusers", "transformers", "huggingface_hub", "numpy", "PIL"}
    imported = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            imported.add(node.module.split(".")[0])
    assert "torch" in imported and imported <= allowed
