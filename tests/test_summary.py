"""What a pipeline folder says about itself, and the files of measurements in it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from components import TEXT_DIM, VAES, euler, make_pipeline, tiny_text_encoder, tiny_tokenizer, tiny_transformer

from freqgate_dit import VARIANTS
from freqgate_dit.cost import count_parameters, flops_per_forward
from freqgate_dit.evaluations import Evaluation, add_evaluation
from freqgate_dit.summary import bytes_text, metric_text, plain, read_summary
from freqgate_dit.training.config import parse_config


# As the trainer writes it.
TRAINING = {
    "step": 2000,
    "total_steps": 2000,
    "global_batch_size": 64,
    "images_seen": 128000,
    "weights": "power:0.1",
    "mixed_precision": "bf16",
    "processes": 1,
    "device": "cpu",
    "license": None,
    "data": {
        "name": "shapes_textures",
        "hub_id": None,
        "built_in": True,
        "license": None,
        "train_images": 1800,
        "heldout_images": 200,
        "classes": 64,
        "resolution": 32,
    },
    "heldout": {
        "prediction_type": "epsilon",
        "images": 1024,
        "loss_at_start": 0.97315,
        "loss": 0.13246,
        "loss_null": 0.14128,
    },
    "versions": {"freqgate_dit": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.1"},
}
EVALUATION = Evaluation(
    title="structure and texture",
    dataset={"name": "shapes_textures", "hub_id": None, "split": "test"},
    metrics=[
        {"name": "structure accuracy, guidance 2", "type": "accuracy", "value": 0.97265625, "format": "percent"},
        {"name": "nats per image", "type": "nats", "value": 3.14159, "format": "number"},
    ],
    protocol={"samples": 512, "scheduler": "EulerDiscreteScheduler", "num_steps": 20, "seeds": "0..511"},
    command="python training/demo.py --pipeline demo/run/pipeline",
    notes="Read by a classifier of 3 layers.",
)


def save_pipeline(folder, kind="names", variant="freq_gate", **options):
    """A pipeline folder of random weights; class names, ids, text, pooled (text without encoder), or unconditional."""
    text = {"num_classes": None, "pooled_projection_dim": TEXT_DIM}
    arguments = {"text": text, "pooled": text, "unconditional": {"num_classes": None}}.get(kind, {})
    if kind == "text":
        options |= {"text_encoder": tiny_text_encoder(), "tokenizer": tiny_tokenizer(folder.parent / "vocabulary")}
    if kind == "ids":
        options |= {"id2label": {}}
    if kind == "unconditional":
        options |= {"class_dropout_prob": None}
    transformer = tiny_transformer(variant, **arguments) if "vae" in options else None
    pipe = make_pipeline(transformer or tiny_transformer(variant, in_channels=3, **arguments), **options)
    pipe.save_pretrained(folder)
    return pipe


def record_training(folder, *options, **changes):
    """What a run of the trainer adds to a pipeline folder; keywords change the summary of its training."""
    (folder / "training_summary.json").write_text(json.dumps({**TRAINING, **changes}))
    parse_config(["--max_steps=2000", *options]).shareable().save(folder / "training_config.yaml")


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# -- pipelines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["names", "ids", "text", "unconditional"])
def test_facts_are_the_pipeline_s(kind, variant, tmp_path):
    pipe = save_pipeline(tmp_path / "pipeline", kind, variant)
    summary = read_summary(tmp_path / "pipeline")
    assert (summary.variant, summary.class_name) == (variant, VARIANTS[variant].__name__)
    assert summary.parameters == count_parameters(pipe.transformer)
    assert summary.flops == flops_per_forward(pipe.transformer) > 0
    assert (summary.width, summary.tokens, summary.resolution) == (32, 16, 8)
    conditions = {"text": f"text, {TEXT_DIM}-d", "unconditional": "none"}
    assert summary.condition == conditions.get(kind, "3 classes")
    assert (summary.id2label, summary.is_conditional) == (pipe.id2label, pipe.is_conditional)
    assert summary.is_text_conditional == pipe.is_text_conditional
    assert summary.class_dropout_prob == pipe.config.class_dropout_prob
    assert (summary.text_encoder, summary.vae) == ("CLIPTextModel" if kind == "text" else None, None)
    assert summary.prediction_type == "epsilon" and summary.scheduler["_class_name"] == "EulerDiscreteScheduler"
    assert summary.dtypes == ("float32",) and summary.options == {}
    assert summary.training is summary.training_config is None and summary.evaluations == {}


@pytest.mark.parametrize("vae", VAES)
def test_an_autoencoder_enlarges(vae, tmp_path):
    pipe = save_pipeline(tmp_path, vae=VAES[vae]())
    summary = read_summary(tmp_path)
    (image,) = pipe("cat", num_inference_steps=1).images
    assert summary.resolution == image.width == 16 and summary.vae == type(pipe.vae).__name__
    assert f"16 x 16 pixels, by latents of 4 x 8 x 8 and {summary.vae}" in summary.describe()
    deep = {f"{part}_block_out_channels": (8,) * 4 for part in ("encoder", "decoder")}
    deep |= {f"num_{part}_blocks": (1,) * 4 for part in ("encoder", "decoder")}
    pipe = save_pipeline(tmp_path / "deep", vae=VAES["tiny"](**deep))
    (image,) = pipe("cat", num_inference_steps=1).images
    assert read_summary(tmp_path / "deep").resolution == image.width == 64
    make_pipeline().save_pretrained(tmp_path / "latents")
    assert read_summary(tmp_path / "latents").size == "latents of 4 x 8 x 8"


def test_weights_need_not_be_there(tmp_path):
    save_pipeline(tmp_path)
    whole = read_summary(tmp_path)
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    size = weights.stat().st_size
    assert whole.files["transformer/diffusion_pytorch_model.safetensors"] == size
    assert list(whole.files) == sorted(whole.files) and "model_index.json" in whole.files
    weights.unlink()
    # As of a repository of which only the small files were downloaded, and the Hub told the sizes.
    assert read_summary(tmp_path, files=whole.files) == replace(whole, dtypes=())
    assert weights.name not in " ".join(read_summary(tmp_path).files)


def test_dtypes_of_all_weights_are_told(tmp_path):
    pipe = save_pipeline(tmp_path)
    pipe.transformer.to(torch.bfloat16).save_pretrained(tmp_path / "transformer", variant="bf16")
    assert read_summary(tmp_path).dtypes == ("bfloat16", "float32")


def test_hidden_files_are_left_out(tmp_path):
    save_pipeline(tmp_path)
    before = read_summary(tmp_path).files
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "download.json").write_text("{}")
    assert read_summary(tmp_path).files == before


def test_folders_of_the_first_release_are_read(tmp_path):
    save_pipeline(tmp_path, variant="cross_attention")
    now = read_summary(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index.pop("_freqgate_dit_version", None)
    index["transformer"] = ["freqgate_dit.transformer_freqgate_dit", index["transformer"][1]]
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "FreqGateDiTPipeline"}))
    files = read_summary(tmp_path).files
    assert read_summary(tmp_path) == replace(now, version=None, files=files)


def test_labels_are_in_the_order_of_their_ids(tmp_path):
    labels = {index: f"class {index}" for index in range(12)}
    make_pipeline(tiny_transformer(num_classes=12), id2label=labels).save_pretrained(tmp_path)
    summary = read_summary(tmp_path)
    assert list(summary.id2label.items()) == list(labels.items())
    assert "12 classes: class 0, class 1, class 2, class 3, class 4, ...\n" in summary.describe()


def test_options_other_than_the_defaults_are_told(tmp_path):
    make_pipeline(tiny_transformer(qk_norm=True, modulation_rank=4, mlp_ratio=2.0)).save_pretrained(tmp_path)
    assert read_summary(tmp_path).options == {"mlp_ratio": 2.0, "modulation_rank": 4, "qk_norm": True}


def test_what_a_run_and_measurements_add(tmp_path):
    save_pipeline(tmp_path)
    record_training(tmp_path)
    path = add_evaluation(tmp_path, "demo", EVALUATION)
    summary = read_summary(tmp_path)
    assert summary.training == TRAINING and summary.evaluations == {"demo": EVALUATION}
    assert summary.training_config == parse_config(["--max_steps=2000"]).shareable().to_dict()
    assert path == tmp_path / "evaluation" / "demo.json" and "evaluation/demo.json" in summary.files


def test_description(tmp_path):
    save_pipeline(tmp_path, scheduler=euler("trailing", prediction_type="v_prediction"))
    assert "training        not recorded\n" in read_summary(tmp_path).describe()
    record_training(tmp_path, step=1500)
    add_evaluation(tmp_path, "demo", EVALUATION)
    summary = read_summary(tmp_path)
    lines = summary.describe().splitlines()
    for part in (
        f"FreqGateDiTTransformer2DModel (freq_gate), {summary.parameters / 1e6:.2f} M parameters, float32",
        "2 blocks, width 32, 2 heads, patch 2 (16 tokens)",
        "8 x 8 pixels",
        "3 classes: cat, dog, wild",
        "dropped in 10 % of training",
        "EulerDiscreteScheduler, trailing spacing",
        "v_prediction, 1,000 timesteps, linear betas from 0.0001 to 0.02",
        "1,500 of 2,000 steps, 64 images each, bf16 autocast over float32 weights",
        "weights power:0.1",
        "0.1325, 0.9731 at the start, 0.1413 without the condition",
        "structure accuracy, guidance 2: 97.3 %",
        "nats per image: 3.142",
        "model_index.json",
    ):
        assert any(part in line for line in lines), part
    # Columns: names, then what they stand for.
    facts = lines[: next(index for index, line in enumerate(lines) if line.startswith("files"))]
    assert all(line[15] == " " and line[16:].strip() for line in facts)
    assert str(tmp_path) not in summary.describe()
    record_training(tmp_path, mixed_precision="no")
    assert " images each, float32; weights power:0.1\n" in read_summary(tmp_path).describe()


@pytest.mark.parametrize(
    "probability, told", [(0.0, "there is no guidance"), (0.25, "dropped in 25 %"), (None, "is not recorded")]
)
def test_whether_guidance_works(probability, told, tmp_path):
    save_pipeline(tmp_path, class_dropout_prob=probability)
    assert told in read_summary(tmp_path).describe()


# -- refusals --------------------------------------------------------------------------------------------------------


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a pipeline, for it has no model_index.json"):
        read_summary(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(ValueError, match="holds a StableDiffusionPipeline, not a FreqGateDiTPipeline"):
        read_summary(tmp_path)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded") / "pipeline"
    save_pipeline(folder)
    record_training(folder)
    add_evaluation(folder, "demo", EVALUATION)
    return folder


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("model_index.json", "{", "model_index.json is no valid JSON"),
        ("scheduler/scheduler_config.json", None, "lacks scheduler/scheduler_config.json"),
        ("transformer/config.json", None, "lacks transformer/config.json"),
        ("training_config.yaml", "a: [", "training_config.yaml is no valid YAML"),
        ("training_config.yaml", "- a", "must hold `name: value` lines, but holds a list"),
        ("training_summary.json", "[1]", "training_summary.json must hold a dictionary"),
        ("training_summary.json", "{}", "training_summary.json lacks 'step'"),
        ("evaluation/demo.json", "{}", "demo.json lacks 'title'"),
    ],
)
def test_damaged_files_are_named(file, content, message, recorded, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(recorded, folder)
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_summary(folder)


def test_a_summary_of_training_is_whole_and_finite(recorded, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(recorded, folder)
    for part in ("data", "heldout"):
        for name in TRAINING[part]:
            values = {key: value for key, value in TRAINING[part].items() if key != name}
            (folder / "training_summary.json").write_text(json.dumps({**TRAINING, part: values}))
            with pytest.raises(ValueError, match=f"training_summary.json lacks '{part}.{name}'"):
                read_summary(folder)
    # Nothing was validated with weights that were averaged afterwards.
    (folder / "training_summary.json").write_text(json.dumps({**TRAINING, "heldout": None}))
    assert "held-out loss" not in read_summary(folder).describe()
    lost = {**TRAINING, "heldout": {**TRAINING["heldout"], "loss": float("nan")}}
    (folder / "training_summary.json").write_text(json.dumps(lost))
    with pytest.raises(ValueError, match="has 'loss' nan, which is no finite number"):
        read_summary(folder)


def test_a_transformer_of_a_newer_version_is_refused(recorded, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(recorded, folder)
    change_json(folder / "model_index.json", transformer=["transformer_freqgate_dit", "WaveletDiTTransformer2DModel"])
    with pytest.raises(ValueError, match="the class WaveletDiTTransformer2DModel, which freqgate_dit"):
        read_summary(folder)


# -- measurements ----------------------------------------------------------------------------------------------------


def test_evaluations_come_back(tmp_path):
    path = tmp_path / "evaluation" / "demo.json"
    for evaluation in (EVALUATION, replace(EVALUATION, notes=None)):
        evaluation.save(path)
        assert Evaluation.load(path) == evaluation
        assert json.loads(path.read_text()) == evaluation.to_dict()
    assert [file.name for file in path.parent.iterdir()] == ["demo.json"]
    # What a newer version adds is no reason to refuse the file.
    change_json(path, checkpoint="abc")
    assert Evaluation.load(path) == replace(EVALUATION, notes=None)


METRIC = EVALUATION.metrics[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"title": None}, "'title' None: expected str"),
        ({"dataset": {"name": "x", "hub_id": None}}, "`dataset` lacks 'split'"),
        ({"metrics": []}, "`metrics` is empty"),
        (
            {"metrics": ["accuracy"]},
            r"`metrics\[0\]` \('accuracy'\) must be a dictionary with name, type, value, format",
        ),
        ({"metrics": [METRIC, {"name": "x", "type": "x", "format": "number"}]}, r"`metrics\[1\]` lacks 'value'"),
        ({"metrics": [{**METRIC, "value": "58.45"}]}, r"`metrics\[0\]` has 'value' '58.45': expected int or float"),
        ({"metrics": [{**METRIC, "value": True}]}, "the value True, which is no finite number"),
        ({"metrics": [{**METRIC, "value": float("nan")}]}, "the value nan, which is no finite number"),
        ({"metrics": [{**METRIC, "value": float("inf")}]}, "the value inf, which is no finite number"),
        ({"metrics": [{**METRIC, "format": "%"}]}, "the format '%': choose 'percent' or 'number'"),
        ({"protocol": {"steps": [20]}}, r"`protocol` has 'steps' \[20\]: expected str or int or float or NoneType"),
        ({"protocol": {"steps": float("nan")}}, "`protocol` has 'steps' nan, which is no finite number"),
    ],
)
def test_evaluations_are_checked(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        replace(EVALUATION, **changes)
    # The same from a file, which is named.
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**EVALUATION.to_dict(), **changes}))
    with pytest.raises(ValueError, match=f"bad.json: .*{message}"):
        Evaluation.load(path)


def test_nothing_of_the_machine_is_saved(tmp_path):
    save_pipeline(tmp_path)
    for changes in (
        {"command": "python demo.py --pipeline /home/me/run"},
        {"command": "python demo.py --pipeline='/home/me/run'"},
        {"command": "python demo.py --pipeline ~/run"},
        {"notes": "Samples in C:\\runs\\mine."},
        {"protocol": {"reference": "/data/afhq"}},
    ):
        with pytest.raises(ValueError, match="absolute path"):
            add_evaluation(tmp_path, "bad", replace(EVALUATION, **changes))
    assert not (tmp_path / "evaluation").exists()
    fine = {"notes": "Half of the images and/or 12 images / s, at https://example.org/a/b, by a/b/c.py."}
    assert add_evaluation(tmp_path, "good", replace(EVALUATION, **fine)).is_file()


def test_where_an_evaluation_can_go(tmp_path):
    with pytest.raises(ValueError, match="no pipeline folder"):
        add_evaluation(tmp_path, "demo", EVALUATION)
    save_pipeline(tmp_path)
    for name in ("", "../demo", "a b", ".hidden"):
        with pytest.raises(ValueError, match="`name` .* becomes a file's name"):
            add_evaluation(tmp_path, name, EVALUATION)


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_numbers_as_text():
    assert [plain(value) for value in (0.132461, 58.45, 5100, 12345.6, 1.0, 0.00034, 3)] == [
        *("0.1325", "58.45", "5,100", "12,346", "1", "0.00034", "3")
    ]
    assert metric_text({"value": 0.97265625, "format": "percent"}) == "97.3 %"
    assert metric_text({"value": 1, "format": "percent"}) == "100.0 %"
    assert [bytes_text(size) for size in (0, 1023, 1024, 1536, 45328904, 2**30, 5 * 2**40)] == [
        *("0 B", "1023 B", "1.0 KiB", "1.5 KiB", "43.2 MiB", "1.0 GiB", "5120.0 GiB")
    ]
