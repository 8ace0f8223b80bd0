"""The `freqgate-dit` command: what it prints and writes, and the one sentence that a mistake gets."""

import json
import re
import shlex

import diffusers.utils.logging
import numpy as np
import pytest
import tiny_runs
import torch
import transformers.utils.logging
from components import build_pipeline, make_pipeline, tiny_transformer, tiny_vae_kl
from PIL import Image
from test_convert import dit_pipeline, official_weights
from tiny_runs import ROOT

from freqgate_dit import FreqGateDiTPipeline, FreqGateDiTTransformer2DModel, cli
from freqgate_dit.convert import from_dit_pipeline, load_official
from freqgate_dit.devices import choose_device, choose_dtype
from freqgate_dit.pipelines.pipeline_freqgate_dit import SOURCE_GUIDANCE_SCALE
from freqgate_dit.samplers import make_sampler
from freqgate_dit.sampling import BATCH_SIZE
from freqgate_dit.summary import read_summary


COMMANDS = ("info", "sample", "push", "convert", "doctor")


@pytest.fixture(autouse=True)
def progress_bars():
    yield
    diffusers.utils.logging.enable_progress_bar()
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "pipeline"


@pytest.fixture
def call(capsys):
    """Run a command; its exit code, and what it prints to stdout and stderr."""

    def call(*words):
        capsys.readouterr()
        code = cli.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(call):
    """Run a command that fails; the sentence that the user sees."""

    def refused(*words):
        code, out, err = call(*words)
        assert (code, out) == (1, "")
        assert err.startswith("error: ") and err.count("\n") == 1
        return err.removeprefix("error: ").strip()

    return refused


def saved(folder, variant="adaln_zero", kind="pixel", **kwargs):
    """A pipeline on images of 8 x 8 pixels with three classes, as it is loaded from `folder` in float32."""
    if kwargs:
        make_pipeline(tiny_transformer(variant, in_channels=3), **kwargs).save_pretrained(folder)
    else:
        build_pipeline(variant, kind, folder.parent).save_pretrained(folder)
    pipe = FreqGateDiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def contents(folder):
    """Path -> bytes of the files of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cells(picture, columns, side=64):
    """The images of a grid, row by row."""
    picture = np.asarray(picture)
    rows = picture.shape[0] // side
    assert picture.shape == (rows * side, columns * side, 3)
    return list(picture.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3))


def enlarged(images):
    return [np.kron(np.asarray(image), np.ones((8, 8, 1), np.uint8)) for image in images]


def assert_cells(path, columns, images):
    """The file is a grid of these images, of 8 px, at eight times their size; other places are white."""
    found = cells(Image.open(path), columns)
    for cell, image in zip(found, enlarged(images), strict=False):
        np.testing.assert_array_equal(cell, image)
    assert len(images) <= len(found) < len(images) + columns
    assert all((cell == 255).all() for cell in found[len(images) :])


FAST = ("--steps", 3, "--dtype", "float32")
CALL = {"num_inference_steps": 3, "guidance_scale": SOURCE_GUIDANCE_SCALE}


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_the_examples_of_the_help_are_commands(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    examples = re.findall(r"^  freqgate-dit (.*)$", text.split("examples:")[1], re.MULTILINE)
    assert examples
    for example in examples:
        options = cli.build_parser().parse_args(shlex.split(example))
        assert not command or options.run.__name__ == command[0]
    assert max(map(len, text.splitlines())) <= 85
    assert all(f"    {name} " in text for name in COMMANDS if not command)


@pytest.mark.parametrize(
    "words", [(), ("sampel",), ("sample", "x"), ("sample", "x", "--out", "y", "--label", "a", "--prompt", "b")]
)
def test_what_is_no_command_gets_the_usage(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("usage: freqgate-dit")


def test_help_needs_nothing_that_takes_long_to_import():
    code = (
        "import sys\nfrom freqgate_dit.cli import main\ntry: main(['sample', '--help'])\nexcept SystemExit: pass\n"
        "print(*sys.modules, sep='\\n')"
    )
    done = tiny_runs.run("python", "-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    modules = done.stdout.splitlines()
    assert "freqgate_dit.cli" in modules
    assert not {"torch", "diffusers", "transformers", "numpy", "huggingface_hub"} & set(modules)


def test_as_a_module():
    done = tiny_runs.run("python", "-m", "freqgate_dit.cli", "convert", "dit.pt", ".", cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: FOLDER (.) is there already: name a new or an empty folder.\n"


def test_the_interrupted_command_is_quiet(folder, tmp_path, monkeypatch, call):
    saved(folder)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupt)
    code, out, err = call("sample", folder, "--out", tmp_path / "a.png", *FAST)
    assert (code, out) == (130, "") and "Traceback" not in err and "error" not in err


# -- info -------------------------------------------------------------------------------------------------------------


def test_info_of_a_folder(folder, call):
    saved(folder)
    assert call("info", folder) == (0, read_summary(folder).describe() + "\n", "")


def test_info_of_a_repository_downloads_no_weights(folder, hub, call, tmp_path):
    saved(folder, kind="kl")
    files = contents(folder)
    hub.create("ana/dit", files=files)
    code, out, err = call("info", "ana/dit")
    assert (code, err) == (0, "")
    # The sizes are the repository's.
    for name, content in files.items():
        size = rf"{len(content)} B" if len(content) < 1024 else rf"{len(content) / 1024:.1f} KiB"
        assert re.search(rf"^ *{re.escape(size)}  {re.escape(name)}$", out, re.MULTILINE), name
    assert not any(request.path.endswith(".safetensors") for request in hub.requests)
    assert not list((tmp_path / "hub_home").rglob("*.safetensors"))

    hub.requests.clear()
    code, out, err = call("info", "ana/dit", "--offline")
    assert code == 0 and "3 classes: cat, dog, wild" in out
    assert hub.requests == []


def test_info_of_a_revision(folder, hub, call):
    saved(folder)
    call("push", folder, "ana/dit", "--tag", "v1")
    saved(folder, id2label={0: "owl", 1: "bat", 2: "fox"})
    call("push", folder, "ana/dit")
    assert "owl" in call("info", "ana/dit")[1]
    assert "cat" in call("info", "ana/dit", "--revision", "v1")[1]


# -- sample -----------------------------------------------------------------------------------------------------------


def test_one_image_is_written_as_it_is(folder, tmp_path, call):
    pipe = saved(folder)
    out = tmp_path / "new" / "folder" / "dog.png"
    code, text, _ = call("sample", folder, "--label", "dog", "--seed", 5, "--out", out, *FAST)
    (image,) = pipe("dog", seed=5, **CALL).images
    np.testing.assert_array_equal(Image.open(out), image)
    assert code == 0
    first, second, third = text.splitlines()
    assert (first, second) == (f"wrote {out}: an image of 8 x 8 px", "  dog  seed 5")
    assert re.fullmatch(r"3 steps of EulerDiscreteScheduler, guidance 2.5, float32 on \w+(:\d)?: \d+\.\d s", third)
    # Again, in place of the file; guidance is obeyed.
    call("sample", folder, "--label", "dog", "--seed", 5, "--guidance_scale", 1, "--out", out, *FAST)
    (unguided,) = pipe("dog", seed=5, **{**CALL, "guidance_scale": 1}).images
    np.testing.assert_array_equal(Image.open(out), unguided)
    assert (np.asarray(unguided) != np.asarray(image)).any()


def test_another_sampler(folder, tmp_path, call):
    pipe = saved(folder)
    out = tmp_path / "dog.png"
    _, text, _ = call("sample", folder, "--label", "dog", "--sampler", "dpm", "--out", out, *FAST)
    assert "3 steps of DPMSolverMultistepScheduler" in text
    pipe.scheduler = make_sampler("dpm", pipe.scheduler.config)
    np.testing.assert_array_equal(Image.open(out), pipe("dog", seed=0, **CALL).images[0])
    _, _, error = call("sample", folder, "--label", "dog", "--sampler", "dmp", "--out", out, *FAST)
    assert "did you mean dpm?" in error
    _, _, error = call("sample", folder, "--label", "dog", "--sampler", "spectral", "--out", out, *FAST)
    assert "needs the spectrum" in error


def test_several_images_of_labels_are_rows(folder, tmp_path, call):
    pipe, out = saved(folder), tmp_path / "grid.png"
    words = ("--label", "wild", "0", "dog", "--count", 2, "--seed", 7, "--out", out)
    _, text, _ = call("sample", folder, *words, *FAST)
    assert_cells(out, 2, pipe([2, 0, 1], num_images_per_label=2, seed=7, **CALL).images)
    assert text.splitlines()[:4] == [
        f"wrote {out}: 6 images of 8 x 8 px",
        "  wild  seeds 7 to 8",
        "  cat   seeds 9 to 10",
        "  dog   seeds 11 to 12",
    ]


def test_without_labels_each_class_has_an_image(folder, tmp_path, call):
    pipe, out = saved(folder), tmp_path / "grid.png"
    _, text, _ = call("sample", folder, "--out", out, *FAST)
    assert_cells(out, 2, pipe([0, 1, 2], seed=0, **CALL).images)
    assert text.splitlines()[1:4] == ["  cat   seed 0", "  dog   seed 1", "  wild  seed 2"]


def test_of_many_classes_without_names_sixteen_are_shown(folder, tmp_path, call):
    make_pipeline(tiny_transformer(in_channels=3, num_classes=40), id2label=None).save_pretrained(folder)
    _, text, _ = call("sample", folder, "--out", tmp_path / "grid.png", *FAST)
    lines = text.splitlines()[1:-1]
    assert [line.split()[:2] for line in lines] == [["class", str(40 * index // 16)] for index in range(16)]
    assert Image.open(tmp_path / "grid.png").size == (256, 256)


def test_digits_are_an_id_unless_a_class_has_that_name(folder, tmp_path, call):
    pipe, out = saved(folder, id2label={0: "7", 1: "0", 2: "cat"}), tmp_path / "grid.png"
    _, text, _ = call("sample", folder, "--label", "0", "2", "--out", out, *FAST)
    assert_cells(out, 2, pipe([1, 2], seed=0, **CALL).images)
    assert text.splitlines()[1:3] == ["  0    seed 0", "  cat  seed 1"]


def test_an_image_does_not_depend_on_how_many_are_sampled(folder, tmp_path, call):
    pipe, out = saved(folder), tmp_path / "grid.png"
    count = BATCH_SIZE + 2
    call("sample", folder, "--label", "cat", "--count", count, "--out", out, *FAST)
    found = cells(Image.open(out), 5)
    for seed in (0, BATCH_SIZE - 1, BATCH_SIZE, count - 1):
        expected = enlarged(pipe("cat", seed=seed, **CALL).images)[0]
        assert np.abs(found[seed].astype(int) - expected).max() <= 1, seed


def test_prompts(folder, tmp_path, call, refused):
    build_pipeline("adaln_zero", "text", tmp_path).save_pretrained(folder)
    pipe, out = FreqGateDiTPipeline.from_pretrained(folder), tmp_path / "grid.png"
    _, text, _ = call("sample", folder, "--prompt", "a cat", "--prompt", "a dog", "--out", out, *FAST)
    images = pipe(prompt=["a cat", "a dog"], seed=0, **CALL).images
    assert images[0].size == (16, 16)
    picture = Image.open(out)
    assert picture.size == (128, 64)
    for index, image in enumerate(images):
        found = picture.crop((64 * index, 0, 64 * (index + 1), 64))
        np.testing.assert_array_equal(found, image.resize((64, 64), Image.Resampling.NEAREST))
    assert text.splitlines()[1:3] == ["  a cat  seed 0", "  a dog  seed 1"]
    message = "this model is conditioned on text and got no condition: pass `--prompt` (or `pooled_prompt_embeds`)."
    assert refused("sample", folder, "--out", out) == message


def test_an_unconditional_model(folder, tmp_path, call):
    make_pipeline(tiny_transformer(in_channels=3, num_classes=None)).save_pretrained(folder)
    pipe, out = FreqGateDiTPipeline.from_pretrained(folder), tmp_path / "grid.png"
    _, text, _ = call("sample", folder, "--count", 4, "--out", out, *FAST)
    assert_cells(out, 2, pipe(num_images_per_label=4, seed=0, num_inference_steps=3).images)
    assert text.splitlines()[1] == "  images  seeds 0 to 3"
    assert ", guidance 1, " in text


def test_device_and_precision_are_what_is_fast_here(folder, tmp_path, call):
    saved(folder)
    _, text, _ = call("sample", folder, "--label", "cat", "--out", tmp_path / "a.png", "--steps", 3)
    device = choose_device()
    dtype = choose_dtype("auto", device)
    assert f"{str(dtype).removeprefix('torch.')} on {device}: " in text.splitlines()[-1]
    pictures = []
    for name in ("float32", "bfloat16"):
        words = ("--label", "cat", "--dtype", name, "--device", "cpu", "--steps", 3, "--out", tmp_path / "a.png")
        assert f", {name} on cpu: " in call("sample", folder, *words)[1]
        pipe = FreqGateDiTPipeline.from_pretrained(folder, dtype=getattr(torch, name))
        pictures.append(np.asarray(Image.open(tmp_path / "a.png")))
        np.testing.assert_array_equal(pictures[-1], pipe("cat", seed=0, **CALL).images[0])
    assert (pictures[0] != pictures[1]).any()


def test_a_repository_is_sampled(folder, tmp_path, hub, call):
    pipe, out = saved(folder), tmp_path / "cat.png"
    call("push", folder, "ana/dit")
    words = ("sample", "ana/dit", "--label", "cat", "--out", out, *FAST)
    assert call(*words)[0] == 0
    expected = pipe("cat", seed=0, **CALL).images[0]
    np.testing.assert_array_equal(Image.open(out), expected)
    out.unlink()
    hub.requests.clear()
    assert call(*words, "--offline")[0] == 0
    np.testing.assert_array_equal(Image.open(out), expected)
    assert hub.requests == []


def test_a_damaged_cache_is_repaired_as_its_error_says(folder, tmp_path, hub, call, refused):
    saved(folder)
    call("push", folder, "ana/dit")
    words = ("sample", "ana/dit", "--label", "cat", "--out", tmp_path / "cat.png", *FAST)
    call(*words)
    (weights,) = (tmp_path / "hub_home").rglob("transformer/*.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "are damaged or cut short" in (message := refused(*words)) and "again with `--force_download`" in message
    assert call(*words, "--force_download")[0] == call(*words, "--offline")[0] == 0


def test_weights_of_a_variant(folder, tmp_path, call, refused):
    pipe = make_pipeline(tiny_transformer(in_channels=3).to(torch.float16))
    pipe.save_pretrained(folder, variant="fp16")
    words = ("sample", folder, "--label", "cat", "--out", tmp_path / "cat.png")
    assert call(*words, "--variant", "fp16", *FAST)[0] == 0
    assert "`--variant`" in refused(*words, *FAST)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--out", "cat.gpj"), "`--out` (cat.gpj) has a suffix that Pillow cannot write ('.gpj'): use .png or .jpg."),
        (("--out", "cat"), "`--out` (cat) has a suffix that Pillow cannot write (''): use .png or .jpg."),
        (("--out", "cat.psd"), "`--out` (cat.psd) has a suffix that Pillow cannot write ('.psd'): use .png or .jpg."),
        (("--out", "cat.xbm"), "`--out` (cat.xbm) has a suffix that Pillow cannot write ('.xbm'): use .png or .jpg."),
        (("--out", "cat.h5"), "`--out` (cat.h5) has a suffix that Pillow cannot write ('.h5'): use .png or .jpg."),
        (("--out", "."), "`--out` (.) is a folder: name a file in it, such as samples.png."),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_else(words, message, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cat.xbm", "cat.h5"):
        (tmp_path / name).write_text("mine")
    assert refused("sample", "no/such/pipeline", *words) == message
    message = refused("sample", "no/such/pipeline", "--out", "cat.h5/new/cat.png")
    assert "`--out` (cat.h5/new/cat.png)" in message and f"{tmp_path / 'cat.h5'}, which is no folder" in message
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"cat.xbm": "mine", "cat.h5": "mine"}


def test_out_of_memory_is_a_sentence(folder, tmp_path, refused, monkeypatch):
    saved(folder)
    monkeypatch.setattr("freqgate_dit.sampling.sample_images", lambda *args, **kwargs: torch.empty(2**60))
    assert "out of memory" in refused("sample", folder, "--out", tmp_path / "cat.png")


def test_names_do_not_reach_the_terminal_as_commands(folder, tmp_path, call, refused):
    names = {0: "\x1b[2Jcat", 1: "dog\nerror: no dog", 2: "wild"}
    make_pipeline(tiny_transformer(in_channels=3), id2label=names).save_pretrained(folder)
    printed = [*call("info", folder), *call("sample", folder, "--out", tmp_path / "all.png", *FAST)]
    texts = [text for text in printed if isinstance(text, str)] + [
        refused("sample", folder, "--label", "cta", "--out", tmp_path / "a.png")
    ]
    assert not any("\x1b" in text.replace("\x1b[A", "") or "\nerror" in text for text in texts)
    assert sum("\\x1b[2Jcat" in text and "dog error: no dog" in text for text in texts[::2]) == 2


def test_black_images_are_not_written(folder, tmp_path, call):
    pipe = make_pipeline(tiny_transformer(in_channels=3))
    with torch.no_grad():
        pipe.transformer.proj_out.weight[0] = torch.nan
    pipe.save_pretrained(folder)
    code, out, err = call("sample", folder, "--label", "cat", "--out", tmp_path / "cat.png", *FAST)
    assert (code, out) == (1, "")
    assert "error: 1 of 1 images, the first of them of seed 0, have NaN or infinity" in err
    assert not (tmp_path / "cat.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--label", "cta"), "`--label` has the unknown label 'cta'. Did you mean 'cat'? This model knows 'cat', "),
        (("--label", "3"), "`--label` has 3; ids of this model are the integers from 0 to 2."),
        (("--prompt", "a cat"), "`--prompt` (['a cat']) needs a text encoder, which this pipeline does not have. Use"),
        (("--device", "tpu"), f"`--device` (tpu) is not there: torch {torch.__version__} finds cpu"),
    ],
)
def test_what_cannot_be_sampled_is_said_in_terms_of_the_command(words, message, folder, tmp_path, refused):
    saved(folder)
    assert refused("sample", folder, "--out", tmp_path / "a.png", *words, *FAST).startswith(message)
    assert not (tmp_path / "a.png").exists()


def test_guidance_that_the_model_does_not_have(folder, tmp_path, call, refused):
    saved(folder, class_dropout_prob=0)
    words = ("sample", folder, "--out", tmp_path / "a.png", *FAST)
    assert refused(*words, "--guidance_scale", 3).endswith("means nothing: use `--guidance_scale 1`.")
    assert ", guidance 1, " in call(*words)[1]


def test_latents_are_no_images(folder, tmp_path, refused):
    make_pipeline(tiny_transformer()).save_pretrained(folder)
    message = refused("sample", folder, "--out", tmp_path / "a.png", *FAST)
    assert message.startswith("the pipeline makes latents of 4 channels and no images")


def test_folders_that_are_no_pipeline(folder, tmp_path, refused):
    saved(tmp_path / "run" / "pipeline")
    (tmp_path / "run" / "config.yaml").write_text("seed: 0\n")
    for words in (("info",), ("sample", "--out", "a.png"), ("push", "ana/dit")):
        command, *rest = words
        assert f"it is a run, whose pipeline is {str(tmp_path / 'run' / 'pipeline')!r}" in refused(
            command, tmp_path / "run", *rest
        )


# -- push -------------------------------------------------------------------------------------------------------------


def test_push(folder, hub, call):
    saved(folder)
    code, out, err = call("push", folder, "ana/dit", "--private", "--message", "20,000 steps", "--tag", "v1")
    assert (code, out, err) == (0, f"{hub.url}/ana/dit\n", "")
    repo = hub.repos["ana/dit"]
    assert repo.private and repo.commits("v1")[0][1] == "20,000 steps"
    files = contents(folder)
    assert files and files.items() <= repo.files("v1").items()
    assert not call("push", folder, "ana/open")[0] and not hub.repos["ana/open"].private


def test_pushes_that_are_tried_again_say_so(folder, hub, call):
    saved(folder)
    hub.fail(times=1, match="POST .*/commit/", status=503)
    code, out, err = call("push", folder, "ana/dit")
    assert (code, out) == (0, f"{hub.url}/ana/dit\n")
    assert err.count("\n") == 1 and "Next try in" in err


def test_pushes_that_are_refused(folder, tmp_path, hub, refused, monkeypatch):
    assert refused("push", folder, "ana/dit").startswith(f"FOLDER ({folder}) is not a folder here")
    saved(folder)
    assert "cannot be the name of a repository" in refused("push", folder, "a/b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_bob_write")
    message = refused("push", folder, "ana/dit")
    assert message.startswith("the token that was sent may not write to ana/dit") and "hf_bob" not in message


# -- convert ----------------------------------------------------------------------------------------------------------


NAMES = {0: "tench, Tinca tinca", 1: "crane", 2: "crane"}


@pytest.fixture
def original(tmp_path):
    """Folder of a `DiTPipeline` whose index names the classes, as those on the Hub do."""
    folder = tmp_path / "original"
    dit_pipeline().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "id2label": NAMES}))
    return folder


def latents(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe([0, 2], seed=0, num_inference_steps=3, output_type="latent").images


def assert_tells_no_path(folder, tmp_path):
    for name, content in contents(folder).items():
        assert str(tmp_path).encode() not in content, name


@pytest.mark.parametrize("variant", ["adaln_zero", "freq_gate"])
def test_a_pipeline_of_diffusers_is_converted(variant, original, folder, tmp_path, call):
    code, out, _ = call("convert", original, folder / "new", "--variant", variant)
    assert code == 0
    pipe = FreqGateDiTPipeline.from_pretrained(folder / "new")
    expected = from_dit_pipeline(type(dit_pipeline()).from_pretrained(original))
    assert torch.equal(latents(pipe), latents(expected)) and latents(pipe).abs().max() > 0.1
    assert pipe.id2label == {0: "tench, Tinca tinca", 1: "crane (1)", 2: "crane (2)"}
    assert isinstance(pipe.transformer, FreqGateDiTTransformer2DModel) == (variant == "freq_gate")
    assert out == f"wrote {folder / 'new'}: {type(pipe.transformer).__name__}, 0.1 M parameters\n"
    assert_tells_no_path(folder / "new", tmp_path)
    # Nothing else is left.
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_a_repository_of_diffusers_is_converted(original, folder, hub, call):
    files = {
        path.relative_to(original).as_posix(): path.read_bytes() for path in original.rglob("*") if path.is_file()
    }
    hub.create("ana/theirs", files=files)
    assert call("convert", "ana/theirs", folder)[0] == 0
    expected = from_dit_pipeline(type(dit_pipeline()).from_pretrained(original))
    pipe = FreqGateDiTPipeline.from_pretrained(folder)
    assert torch.equal(latents(pipe), latents(expected)) and pipe.id2label == expected.id2label


def test_an_official_file_is_converted(folder, tmp_path, call):
    torch.save({"ema": official_weights()}, tmp_path / "dit.pt")
    vae = tiny_vae_kl()
    vae.save_pretrained(tmp_path / "vae")
    words = ("convert", tmp_path / "dit.pt", folder, "--num_attention_heads", 2)
    code, out, _ = call(*words, "--vae", tmp_path / "vae")
    assert code == 0 and out.count("\n") == 1
    pipe = FreqGateDiTPipeline.from_pretrained(folder)
    transformer = load_official(tmp_path / "dit.pt", num_attention_heads=2)
    for name, tensor in transformer.state_dict().items():
        assert torch.equal(pipe.transformer.state_dict()[name], tensor), name
    for name, tensor in vae.state_dict().items():
        assert torch.equal(pipe.vae.state_dict()[name], tensor), name
    assert pipe.has_null_condition and pipe.num_classes == 3
    # DDPM's, with which DiT is trained.
    betas = torch.linspace(1e-4, 0.02, 1000)
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod, (1 - betas).cumprod(0))
    assert (pipe.scheduler.config.prediction_type, pipe.scheduler.config.timestep_spacing) == ("epsilon", "trailing")
    assert_tells_no_path(folder, tmp_path)


def test_without_autoencoder_it_is_said_that_there_are_no_images(folder, tmp_path, call):
    torch.save(official_weights(), tmp_path / "dit.pt")
    code, out, _ = call("convert", tmp_path / "dit.pt", folder, "--num_attention_heads", 2)
    assert code == 0 and out.splitlines()[1].startswith("It has no autoencoder, so it makes latents and no images")


def test_what_is_not_converted(original, folder, tmp_path, refused):
    saved(folder)
    before = contents(folder)
    new = tmp_path / "new"
    for words, message in (
        ((original, folder), f"FOLDER ({folder}) is there already: name a new or an empty folder."),
        ((folder, new), f"SOURCE ({folder}) holds a FreqGateDiTPipeline, and no DiTPipeline of diffusers: name one."),
        ((folder / "transformer", new), f"{str(folder / 'transformer')!r} is not a pipeline"),
        ((original, new, "--vae", "a/b"), "`--vae` is for weights files of the official code"),
        ((original, new, "--num_attention_heads", 2), "`--num_attention_heads` is for weights files"),
        (("no.safetensors", new), "SOURCE (no.safetensors) is not a file here: check the spelling."),
        (("./no", new), "'./no' is no folder, and cannot be the name of a repository"),
    ):
        assert refused("convert", *words).startswith(message)
    torch.save(official_weights(), tmp_path / "dit.pt")
    assert "known only for the widths" in refused("convert", tmp_path / "dit.pt", new)
    message = refused("convert", tmp_path / "dit.pt", new, "--num_attention_heads", 2, "--vae", original)
    assert message.startswith(f"`--vae` ({original}) cannot be loaded as an autoencoder (")
    assert not new.exists()
    assert contents(folder) == before


def test_a_repository_that_is_not_there(folder, hub, refused):
    assert "neither a folder here nor a repository" in refused("convert", "ana/none", folder)
    assert "neither a folder here nor a repository" in refused("info", "ana/none")
    assert "neither a folder here nor a repository" in refused("sample", "ana/none", "--out", "a.png")
