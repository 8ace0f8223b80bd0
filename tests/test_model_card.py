"""The card of a pipeline folder: every number is in a file, the code runs, and the Hub's client can read it."""

import ast
import functools
import importlib.util
import json
import re
import shutil
from dataclasses import replace
from urllib.parse import unquote

import jinja2
import pytest
import yaml
from components import make_pipeline, tiny_transformer, tiny_vae_kl
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from PIL import Image
from test_summary import EVALUATION, TRAINING, record_training, save_pipeline
from tiny_runs import ROOT

from freqgate_dit.evaluations import add_evaluation
from freqgate_dit.model_card import card_in_words, escape, render_card, write_card
from freqgate_dit.training.config import parse_config


KINDS = ["names", "ids", "text", "pooled", "unconditional"]


@pytest.fixture(autouse=True)
def no_undefined_names(monkeypatch):
    """A name that the template has and nothing fills is an error, not an empty place."""
    monkeypatch.setattr(jinja2, "Template", functools.partial(jinja2.Template, undefined=jinja2.StrictUndefined))


@pytest.fixture(scope="module", params=KINDS)
def bare(request, tmp_path_factory):
    """Name of a kind and a pipeline folder of it with nothing beside what `save_pretrained` writes."""
    folder = tmp_path_factory.mktemp(request.param) / "my pipeline"
    save_pipeline(folder, request.param)
    return request.param, folder


def add_pictures(folder, *names):
    (folder / "figures").mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", (4, 4)).save(folder / "figures" / name)


def record_all(folder, *options):
    """All that a run and a measurement can leave."""
    record_training(folder, *options)
    add_evaluation(folder, "demo", EVALUATION)
    fid = [{"name": "fid_cleanfid_clean_5100", "type": "fid", "value": 58.45321, "format": "number"}]
    add_evaluation(folder, "fid", replace(EVALUATION, title="FID", metrics=fid, notes=None))
    add_pictures(folder, "preview.png", "loss.png", "validation.png", "gate.png", "z [1].png")
    return folder


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded") / "pipeline"
    save_pipeline(folder)
    return record_all(folder)


def section(text: str, title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def snippets(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def check_form(card: ModelCard):
    """What holds for any card: it parses to itself, blocks are closed, tables have as many cells in every row."""
    again = ModelCard(str(card))
    assert str(again) == str(card) and again.data.to_dict() == card.data.to_dict()
    lines = card.text.splitlines()
    assert card.text.endswith("\n") and "\n\n\n" not in card.text and not any(line != line.rstrip() for line in lines)
    assert sum(line.startswith("```") for line in lines) % 2 == 0
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("| "):
            if not before.startswith("| "):
                assert before == ""
                cells = line.count("|")
            assert len(re.findall(r"(?<!\\)\|", line)) == cells
        if line.startswith(("#", "![", "- ")) and not before.startswith("- "):
            assert before == "", line
    for link in re.findall(r"\]\(([^)]*)\)", card.text):
        assert link.startswith("https://") or " " not in link


def numbers_of(value, percent=False):
    """All numbers in a file, also those in its texts; percentages as a reader sees them."""
    if isinstance(value, dict):
        percent = value.get("format") == "percent"
        return [number for item in value.values() for number in numbers_of(item, percent)]
    if isinstance(value, list):
        return [number for item in value for number in numbers_of(item)]
    if isinstance(value, str):
        return numbers_in(value)
    return [] if value is None or isinstance(value, bool) else [100 * value if percent else value]


def numbers_in(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]


def unbacked(card: ModelCard, folder) -> list[str]:
    """Numbers in the card's section of measurements that no file has, up to the digits that are shown."""
    text = section(card.text, "Measured").replace(",", "")
    files = [folder / "training_summary.json", *folder.glob("evaluation/*.json")]
    known = [number for file in files for number in numbers_of(json.loads(file.read_text()))]
    shown = re.findall(r"\d+(?:\.\d+)?", text)
    assert len(shown) > 15
    return [
        number
        for number in shown
        if not any(abs(float(number) - one) <= 0.501 * 10 ** -len(number.partition(".")[2]) for one in known)
    ]


# -- all kinds of pipelines ------------------------------------------------------------------------------------------


def test_card_of_a_bare_pipeline(bare, variant, tmp_path):
    kind, folder = bare
    if variant != "freq_gate":
        folder = tmp_path / "my pipeline"
        save_pipeline(folder, kind, variant)
    card = render_card(folder)
    check_form(card)
    data = card.data.to_dict()
    text = kind in ("text", "pooled")
    conditional = {"unconditional": "unconditional"}.get(kind, "text-conditional" if text else "class-conditional")
    assert data["tags"] == ["diffusion-transformer", conditional, variant, "freqgate_dit"]
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == ("text-to-image" if text else "unconditional-image-generation")
    assert not {"license", "datasets", "model-index", "base_model"} & data.keys() and data["model_name"]
    assert "Nothing is recorded about training" in section(card.text, "Training")
    assert "No measurement is recorded" in section(card.text, "Measured") and "## Figures" not in card.text
    assert "What the model was trained on is not recorded" in section(card.text, "Data and licence")
    assert "The author states no licence" in section(card.text, "Data and licence")
    assert "no FID" in section(card.text, "Limits") and "seed" not in section(card.text, "Limits")
    assert ("This model is unconditional" in card.text) == (kind == "unconditional")
    assert "2212.09748" in card.text and ("FreqGateDiTBlock" in card.text) == (variant == "freq_gate")
    assert str(folder.parent) not in str(card)


def test_snippets_run(bare, monkeypatch):
    kind, folder = bare
    card = render_card(folder)
    with_package, *without = snippets(card.text)
    assert 'from_pretrained("my pipeline")' in with_package
    monkeypatch.chdir(folder.parent)
    results = {}
    exec(with_package, results)
    assert Image.open("image.png").size == (8, 8)
    # One image of each of two classes, of a prompt or an embedding; two without a condition.
    assert len(results["images"]) == {"text": 1, "pooled": 1}.get(kind, 2)
    # The other one differs in how the pipeline is loaded alone.
    assert len(without) == 1 and "trust_remote_code=True" in without[0]
    assert ast.dump(ast.parse(without[0]).body[-1]) == ast.dump(ast.parse(with_package).body[-1])
    assert ("guidance_scale" in with_package) == (kind != "unconditional")


def test_recorded_pipelines_of_all_kinds(bare, tmp_path):
    kind, folder = bare
    shutil.copytree(folder, tmp_path / "run" / "pipeline")
    folder = record_all(
        tmp_path / "run" / "pipeline", "--guidance_scale=2.25", "--prompt_template=A sketch of {label}"
    )
    card = render_card(folder)
    check_form(card)
    assert unbacked(card, folder) == [] and str(tmp_path) not in str(card)
    for link in re.findall(r"\]\(([^)]*)\)", card.text):
        assert link.startswith("https://") or (folder / unquote(link)).is_file()
    snippet = snippets(card.text)[0]
    if kind in ("names", "ids", "text"):
        assert "guidance_scale=2.25" in snippet
    if kind == "text":
        assert 'prompt="your prompt"' in snippet
        named = json.loads((folder / "model_index.json").read_text()) | {"id2label": {"0": 'small "cat"'}}
        (folder / "model_index.json").write_text(json.dumps(named))
        assert r'prompt="A sketch of small \"cat\""' in snippets(render_card(folder).text)[0]


def test_guidance_only_where_the_null_condition_was_trained(tmp_path):
    for probability, told in (
        (0.0, "Training never dropped the condition, so there is no guidance."),
        (None, "Whether training ever dropped the condition is not recorded"),
    ):
        folder = tmp_path / str(probability)
        save_pipeline(folder, class_dropout_prob=probability)
        text = render_card(folder).text
        assert "guidance_scale" not in snippets(text)[0] and told in section(text, "Use")


def test_a_pipeline_without_its_code_needs_the_package(tmp_path):
    save_pipeline(tmp_path)
    assert "trust_remote_code" in render_card(tmp_path).text
    (tmp_path / "pipeline_freqgate_dit.py").unlink()
    text = render_card(tmp_path).text
    assert "trust_remote_code" not in text and "Apache-2.0" not in text and "the package is needed" in text


def test_latents_and_options_in_the_table(tmp_path):
    make_pipeline(tiny_transformer("cross_attention", num_condition_tokens=1), vae=tiny_vae_kl()).save_pretrained(
        tmp_path
    )
    text = render_card(tmp_path).text
    assert "| Images | 16 x 16 pixels, by latents of 4 x 8 x 8 and AutoencoderKL |" in text
    assert "| Other options | `num_condition_tokens` 1 |" in text and "one token, the sum of the embeddings" in text
    assert "Data and licences of the autoencoder come on top" in text
    make_pipeline().save_pretrained(tmp_path / "latents")
    assert "for latents of 4 x 8 x 8 from 3 classes" in render_card(tmp_path / "latents").text


# -- repositories and folders ----------------------------------------------------------------------------------------


def test_the_repository_is_what_the_snippets_load(recorded):
    card = render_card(recorded, "user/some-repo")
    package, remote = snippets(card.text)
    assert 'FreqGateDiTPipeline.from_pretrained("user/some-repo")' in package
    assert 'from_pretrained("user/some-repo", trust_remote_code=True, revision="...")' in remote
    assert card.data.model_name == "some-repo" and "from elsewhere give its path" not in card.text
    assert "the commit that you have read" in card.text


def test_a_folder_that_is_about_to_be_renamed(recorded):
    package, remote = snippets(render_card(recorded, name="final").text)
    assert 'from_pretrained("final")' in package and 'from_pretrained("final", trust_remote_code=True)' in remote
    assert "revision" not in remote


def test_a_card_that_lies_elsewhere_says_so(recorded):
    card = render_card(recorded, name="run/pipeline", beside="kept here/")
    check_form(card)
    assert "the folder of this card" in render_card(recorded).text and "the folder of this card" not in card.text
    assert "`run/pipeline` is the folder that the run wrote" in section(card.text, "Use")
    assert "](kept%20here/training_config.yaml)" in card.text
    assert "training/train.py --config 'kept here/training_config.yaml'\n" in card.text


def test_cards_are_written_whole_or_not_at_all(recorded, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(recorded, folder)
    assert write_card(folder, "user/repo")
    written = (folder / "README.md").read_text(encoding="utf-8")
    assert written == str(render_card(folder, "user/repo")) == str(ModelCard.load(folder / "README.md"))
    files = sorted(folder.rglob("*"))
    (folder / "training_summary.json").write_text("{")
    with pytest.raises(ValueError, match="training_summary.json is no valid JSON"):
        write_card(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == written and sorted(folder.rglob("*")) == files


def test_no_command_ends_its_block(recorded, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(recorded, folder)
    evaluation = replace(EVALUATION, command="python a.py\n```\n# Not a command\n````")
    add_evaluation(folder, "fid", evaluation)
    text = render_card(folder).text
    assert f"`````bash\n{evaluation.command}\n`````\n" in text


def test_a_card_that_was_edited_stays(recorded, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(recorded, folder)
    assert write_card(folder) and "is made anew" in card_in_words(folder)
    edited = (folder / "README.md").read_text(encoding="utf-8") + "\nmine\n"
    (folder / "README.md").write_text(edited, encoding="utf-8")
    assert not write_card(folder) and "was edited by hand, and stays" in card_in_words(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == edited


# -- numbers ---------------------------------------------------------------------------------------------------------


def leaves(value, path=()):
    """Places of the numbers in a file."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    numbers = [path] if isinstance(value, (int, float)) and not isinstance(value, bool) else []
    return numbers + [leaf for key, item in items for leaf in leaves(item, (*path, key))]


def test_numbers_change_with_their_files(recorded, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(recorded, folder)
    before = render_card(folder)
    changed = 0
    for file in [folder / "training_summary.json", *folder.glob("evaluation/*.json")]:
        content = file.read_text()
        for *path, name in leaves(json.loads(content)):
            values = json.loads(content)
            place = functools.reduce(lambda part, key: part[key], path, values)
            place[name] = place[name] * 3 + 1
            file.write_text(json.dumps(values))
            after = render_card(folder)
            assert after.text != before.text, (file.name, *path, name)
            assert unbacked(after, folder) == []
            if name == "value" or name in ("loss", "loss_null"):
                assert place[name] in [result.metric_value for result in after.data.eval_results]
                changed += 1
        file.write_text(content)
    assert changed == len(before.data.eval_results) == 5
    assert str(render_card(folder)) == str(before)


def test_model_index_holds_the_numbers_as_the_files_do(recorded):
    data = render_card(recorded, "user/repo").data
    name, results = model_index_to_eval_results(data.to_dict()["model-index"])
    assert name == "repo" and results == data.eval_results
    assert eval_results_to_model_index(name, results) == data.to_dict()["model-index"]
    values = {result.metric_name: (result.metric_type, result.metric_value) for result in results}
    assert values == {
        "held-out loss, epsilon": ("mse", 0.13246),
        "held-out loss, epsilon, without the condition": ("mse", 0.14128),
        "structure accuracy, guidance 2": ("accuracy", 0.97265625),
        "nats per image": ("nats", 3.14159),
        "fid_cleanfid_clean_5100": ("fid", 58.45321),
    }
    assert {(result.dataset_type, result.dataset_split) for result in results} == {
        ("shapes_textures", "held-out"),
        ("shapes_textures", "test"),
    }


def test_measured_table_and_protocols(recorded):
    text = section(render_card(recorded).text, "Measured")
    for line in (
        "| held-out loss, epsilon | 0.1325 | shapes_textures | held-out |",
        "| held-out loss, epsilon, at the start of training | 0.9731 | shapes_textures | held-out |",
        "| structure accuracy, guidance 2 | 97.3 % | shapes_textures | test |",
        "| fid_cleanfid_clean_5100 | 58.45 | shapes_textures | test |",
        "**structure and texture**, from [`evaluation/demo.json`](evaluation/demo.json): samples 512, scheduler "
        "EulerDiscreteScheduler, num steps 20, seeds 0..511. Read by a classifier of 3 layers.",
        "python training/demo.py --pipeline demo/run/pipeline",
    ):
        assert line in text.splitlines(), line
    assert "[`training_summary.json`](training_summary.json)" in text and "over 1,024 images" in text


def test_losses_that_are_not_known_are_left_out(recorded, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(recorded, folder)
    shutil.rmtree(folder / "evaluation")
    record_training(folder, heldout={**TRAINING["heldout"], "loss_null": None, "loss_at_start": None})
    card = render_card(folder)
    rows = [line for line in section(card.text, "Measured").splitlines() if line.startswith("| held-out")]
    assert rows == ["| held-out loss, epsilon | 0.1325 | shapes_textures | held-out |"]
    assert [result.metric_value for result in card.data.eval_results] == [0.13246]
    assert "No measurement of its samples is recorded" in section(card.text, "Limits")

    # Weights that were averaged after the run.
    record_training(folder, weights="post-hoc EMA, sigma_rel 0.08", heldout=None)
    card = render_card(folder)
    check_form(card)
    assert "No measurement is recorded" in section(card.text, "Measured") and not card.data.eval_results
    assert "| Published weights | post-hoc EMA, sigma_rel 0.08 |" in card.text


def test_a_distance_counts_as_one(recorded, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(recorded, folder)
    assert "FID" not in section(render_card(folder).text, "Limits")
    (folder / "evaluation" / "fid.json").unlink()
    assert "No FID or other distance" in section(render_card(folder).text, "Limits")


# -- training, data, licences ----------------------------------------------------------------------------------------


def test_training_is_told(recorded, tmp_path):
    text = section(render_card(recorded).text, "Training")
    for row in (
        "| Steps | 2,000 of 2,000 |",
        "| Images per step | 64 |",
        "| Images seen | 128,000 |",
        "| Data | shapes_textures: 1,800 training and 200 held-out images, 64 classes, 32 px |",
        "| Precision | bf16 autocast over float32 weights |",
        "| Versions | freqgate_dit 0.1.0, torch 2.13.0, diffusers 0.42.1 |",
        "| Optimiser | AdamW, learning rate 0.0001, constant schedule; seed 0 |",
    ):
        assert row in text.splitlines(), row
    assert "power-function average of relative width 0.1" in text
    assert "accelerate launch training/train.py --config training_config.yaml" in text
    assert "Of local paths" not in text
    limits = section(render_card(recorded).text, "Limits")
    assert "Trained for 2,000 steps, 128,000 images seen." in limits and "with seed 0" in limits

    folder = tmp_path / "pipeline"
    shutil.copytree(recorded, folder)
    record_training(folder, step=1200, weights="0.9999", total_steps=4000, images_seen=76800)
    text = render_card(folder).text
    assert "Trained for 1,200 steps of the 4,000 that were planned, 76,800 images seen." in text
    assert "average, decay 0.9999" in text


def test_a_loss_of_an_earlier_step_is_called_so(recorded, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(recorded, folder)
    for step, told in (
        (2000, "by the published weights over 1,024"),
        (1500, "by the averaged weights of step 1,500 over"),
    ):
        record_training(folder, heldout={**TRAINING["heldout"], "step": step})
        assert told in " ".join(render_card(folder).text.split())


def test_repeating_a_run_pushes_nothing(recorded, tmp_path):
    command = "accelerate launch training/train.py --config training_config.yaml"
    assert f"\n{command}\n" in render_card(recorded).text
    folder = tmp_path / "pipeline"
    shutil.copytree(recorded, folder)
    record_training(folder, "--push_to_hub", "--hub_model_id=user/repo")
    assert f"\n{command} --push_to_hub false\n" in render_card(folder).text
    assert not parse_config(
        ["--config", str(folder / "training_config.yaml"), "--push_to_hub", "false"]
    ).hub.push_to_hub


def test_a_configuration_alone(recorded, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(recorded, folder)
    (folder / "training_summary.json").unlink()
    card = render_card(folder)
    check_form(card)
    assert "What the run reached is not recorded" in section(card.text, "Training")
    assert "training_config.yaml" in section(card.text, "Training")
    assert "names `shapes_textures` as the data" in section(card.text, "Data and licence")


def test_what_is_not_the_run_s_own(recorded, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(recorded, folder)
    local = {**TRAINING["data"], "name": "cats", "built_in": False, "license": "CC BY-NC 4.0"}
    record_training(folder, "--dataset=/data/cats", "--vae=/models/taesd", f"--init_from={tmp_path}", data=local)
    card = render_card(folder)
    assert "give `--dataset`, `--vae`, `--init_from` as on your machine" in card.text
    assert "Trained on cats, which is not a data set of the Hub" in card.text
    assert "Licence of the data: CC BY-NC 4.0." in card.text and "model that training started from" in card.text
    assert f"| Started from | `{tmp_path.name}` |" in card.text and card.data.base_model is None
    assert str(tmp_path) not in str(card) and "/data/" not in str(card) and "/models/" not in str(card)

    hub = {**local, "name": "user/cats", "hub_id": "user/cats", "license": None}
    record_training(folder, "--dataset=user/cats", "--init_from=user/base", data=hub)
    card = render_card(folder)
    assert card.data.datasets == ["user/cats"] and card.data.base_model == "user/base"
    assert "[user/cats](https://huggingface.co/datasets/user/cats)" in card.text and "Of local paths" not in card.text
    assert {result.dataset_type for result in card.data.eval_results} == {"user/cats", "shapes_textures"}
    assert "The licence of the data is not recorded" in card.text


def test_prompts_of_text_training(tmp_path):
    folder = tmp_path / "pipeline"
    save_pipeline(folder, "text")
    record_training(folder, "--condition=text", "--text_encoder=openai/clip-vit-base-patch32")
    text = render_card(folder).text
    assert "Training used no other prompts than `A photo of {label}`, once per label." in text
    assert "Data and licences of the text encoder come on top" in text


@pytest.mark.parametrize(
    "stated, metadata",
    [
        ("apache-2.0", {"license": "apache-2.0"}),
        ("CC-BY-4.0", {"license": "cc-by-4.0"}),
        ("My own: [v1]", {"license": "other", "license_name": "my-own-v1"}),
        (None, {}),
    ],
)
def test_licences(stated, metadata, recorded, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(recorded, folder)
    record_training(folder, license=stated)
    card = render_card(folder)
    assert {name: value for name, value in card.data.to_dict().items() if "license" in name} == metadata
    told = f"Licence of the model: {escape(stated)}." if stated else "The author states no licence for the model"
    assert told in card.text


# -- figures ---------------------------------------------------------------------------------------------------------


def test_figures_that_are_there(recorded, tmp_path):
    text = render_card(recorded).text
    assert text.index("figures/preview.png") < text.index("## Use")
    shown = re.findall(r"!\[.*?\]\((.*?)\)", section(text, "Figures"))
    assert shown == ["figures/loss.png", "figures/validation.png", "figures/gate.png", "figures/z%20%5B1%5D.png"]
    assert "the curve proves nothing by itself" in text and "cycles per image" in text and r"z \[1\].png" in text

    folder = tmp_path / "pipeline"
    save_pipeline(folder)
    add_pictures(folder, "gate.png")
    text = render_card(folder).text
    assert re.findall(r"!\[.*?\]\((.*?)\)", text) == ["figures/gate.png"]


# -- names as they come ----------------------------------------------------------------------------------------------


def test_special_characters_break_nothing(tmp_path):
    labels = ["a|b", "tench: [x]", "#1", "*_~`<b>\\ &amp; $x$", "two\nlines", "---"]
    folder = tmp_path / "pipe # 1"
    make_pipeline(tiny_transformer(num_classes=6), id2label=dict(enumerate(labels))).save_pretrained(folder)
    name = "my: [set] #1 | x"
    record_training(folder, data={**TRAINING["data"], "name": name, "built_in": False}, license="'a': b | c")
    metrics = [{"name": label, "type": "accuracy", "value": 0.5, "format": "percent"} for label in labels]
    odd = {"title": labels[3], "dataset": {"name": name, "hub_id": None, "split": labels[0]}, "notes": "# 1. - x"}
    add_evaluation(folder, "odd", replace(EVALUATION, metrics=metrics, protocol={"a|b": "[c]"}, **odd))
    card = render_card(folder)
    check_form(card)
    assert [line for line in card.text.splitlines() if line.startswith(("# ", "- x", "1."))] == [
        f"# {escape(card.data.model_name)}"
    ]
    results = card.data.eval_results
    assert [result.metric_name for result in results][2:] == labels
    assert {result.dataset_name for result in results} == {name}
    assert all(re.fullmatch(r"([\w-]+/)?[\w.-]+", result.dataset_type, re.ASCII) for result in results)
    metadata = yaml.safe_load(str(card).split("\n---\n")[0].removeprefix("---\n"))
    assert metadata == card.data.to_dict() and name in metadata["model-index"][0]["name"]
    assert r"Classes: 0 a\|b, 1 tench: \[x\], 2 #1, 3 \*\_\~\`\<b\>\\ \&amp; \$x\$, 4 two lines, 5 ---." in card.text
    call = next(node for node in ast.walk(ast.parse(snippets(card.text)[0])) if isinstance(node, ast.List))
    assert ast.literal_eval(call) == labels[:2]


def test_the_gate_s_formula_is_the_model_s(tmp_path):
    for residual, formula in ((False, "`c = g * Low(y) +"), (True, "`c = y + g * Low(y) +")):
        folder = tmp_path / str(residual)
        make_pipeline(tiny_transformer("freq_gate", gate_residual=residual)).save_pretrained(folder)
        assert formula in render_card(folder).text


def test_many_classes_are_folded_up(tmp_path):
    labels = {index: f"class_{index}" for index in range(11)}
    make_pipeline(tiny_transformer(num_classes=11), id2label=labels).save_pretrained(tmp_path)
    card = render_card(tmp_path)
    check_form(card)
    assert "<summary>Names of 11 classes</summary>\n\n0 class_0, 1 class_1, 2 class_2" in card.text


@pytest.fixture(scope="module")
def demo_card():
    script = importlib.util.spec_from_file_location("demo_card", ROOT / "benchmarks" / "demo_card.py")
    module = importlib.util.module_from_spec(script)
    script.loader.exec_module(module)
    return module


def over(mean, half):
    return {"mean": mean, "low": mean - half, "high": mean + half}


@pytest.mark.parametrize(
    "function, mean, half, limits, verdict",
    [
        ("beyond", 2.0, 0.5, (1.0,), "supported"),
        ("beyond", 0.2, 0.5, (1.0,), "not supported"),
        ("beyond", 1.2, 0.5, (1.0,), "undecided"),
        ("near", 2.1, 0.1, (2.0, 0.25), "supported"),
        ("near", 3.0, 0.1, (2.0, 0.25), "not supported"),
        ("near", 2.2, 0.1, (2.0, 0.25), "undecided"),
        ("either_side", -0.3, 0.1, (0.1,), "supported"),
        ("either_side", 0.02, 0.05, (0.1,), "not supported"),
        ("either_side", 0.1, 0.05, (0.1,), "undecided"),
    ],
)
def test_what_holds_over_seeds(demo_card, function, mean, half, limits, verdict):
    assert getattr(demo_card, function)(over(mean, half), *limits).startswith(f"{verdict}: {mean:+.2f} [")


@pytest.mark.parametrize(
    "sign, mean, verdict",
    [(1, 2.0, "supported"), (1, -2.0, "not supported"), (-1, -2.0, "supported"), (-1, 2.0, "not supported")]
    + [(0, 0.0, "supported"), (0, 2.0, "not supported"), (0, 0.4, "undecided"), (1, 0.1, "undecided")],
)
def test_the_sign_of_a_world_over_seeds(demo_card, sign, mean, verdict):
    model = {"difference": mean, "low": mean - 0.3, "high": mean + 0.3}
    found = {"models": {"freq_gate": {"swap": [model]}}, "over_seeds": {"freq_gate": {}}}
    cell = demo_card.of_world(found, "freq_gate", sign)
    assert cell == f"{verdict}: {mean:+.2f} [{mean - 0.3:+.2f}, {mean + 0.3:+.2f}] (one model, over pairs)"
    assert demo_card.of_world(found, "band_gate", sign) == "-"
    found = {"models": {"freq_gate": {"swap": [model, model]}}, "over_seeds": {"freq_gate": {"swap": over(mean, 0.2)}}}
    assert demo_card.of_world(found, "freq_gate", sign).endswith(f"{mean + 0.2:+.2f}] (2 models)")


def test_directions_over_seeds(demo_card):
    assert demo_card.direction({"gates": {"correlation": [[0.9, -0.2], [0.3, -0.8]]}}).startswith(
        "not supported: 2 of 4"
    )
    assert demo_card.direction({"gains": {"correlation": [[-0.9, -0.2]]}}) == "supported: 0 of 2 rise as noise falls"


def test_the_projects_own_card_is_made_from_its_files(demo_card):
    """`python benchmarks/demo_card.py` has not been forgotten."""
    card = (ROOT / "model_card.md").read_text(encoding="utf-8")
    assert card == demo_card.render_demo_card()
    # The command is one for the root of a checkout.
    for path in re.findall(r"\]\((results/[^)]*)\)|--config (\S+)", card):
        assert (ROOT / "".join(path)).is_file(), path


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, None),
        ({"preconditioning": "wiener"}, "input, skip connection and output are scaled per spatial frequency"),
        ({"preconditioning": "learned", "preconditioning_at": "output"}, "skip connection and output are scaled per"),
        ({"preconditioning": "scalar", "preconditioning_at": "input"}, "input is scaled by the power"),
        ({"preconditioning": "mask"}, "input passes a low-pass"),
    ],
)
def test_preconditioning_is_told(options, words, tmp_path):
    transformer = tiny_transformer("adaln_zero", prediction_type="epsilon", **options)
    make_pipeline(transformer).save_pretrained(tmp_path)
    text = str(render_card(tmp_path))
    assert ("SpectralPreconditioner" in text) == bool(words)
    assert words is None or f"The network's {words}" in text and f", {options['preconditioning']})." in text


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "acts on the low frequencies of the token grid alone"),
        ({"band_basis": "random", "band_branches": "mlp"}, "acts on a fixed random projection P of the tokens"),
        ({}, "`x + g * r + d * P r`"),
        ({"band_gates": "scalar", "band_drive": "time"}, "`x + g * ((1 + a_high) r + (a_low - a_high) P r)`"),
        (
            {"band_clock": False, "band_adapters": False},
            "not given how visible each band of the data is at this "
            "noise level or views of the condition of their own",
        ),
    ],
)
def test_band_gate_is_described(options, words, tmp_path):
    make_pipeline(tiny_transformer("band_gate", **options)).save_pretrained(tmp_path)
    text = str(render_card(tmp_path))
    assert words in text and ("the mlp branch r" if "band_branches" in options else "both branches r") in text
    assert ("Unlike Band-Gate's" in text) == ("band_clock" in options)


def test_band_gate_without_band_gates_is_described_as_a_control(tmp_path):
    make_pipeline(tiny_transformer("band_gate", band_branches="none")).save_pretrained(tmp_path)
    text = str(render_card(tmp_path))
    assert "This model is a control: Band-Gate without its band gates.\nThe block is" in text and "P r" not in text
