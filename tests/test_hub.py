"""Pipelines to a Hub and back, by the real client and a Hub on this machine."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from components import (
    LABELS,
    assert_same_tensors,
    build_pipeline,
    euler,
    make_pipeline,
    sample,
    spectral,
    tiny_transformer,
    tiny_vae_kl,
)
from diffusers import AutoencoderKL, AutoModel, DiffusionPipeline
from huggingface_hub import HfApi
from test_summary import EVALUATION
from tiny_runs import ROOT, fresh_environment, run

from freqgate_dit import VARIANTS, FreqGateDiTPipeline
from freqgate_dit.evaluations import add_evaluation
from freqgate_dit.hub import HubError, list_files, prepare_repository, push_folder


CODE = {
    "pipeline_freqgate_dit.py": ROOT / "pipelines" / "pipeline_freqgate_dit.py",
    "scheduler/scheduling_spectral_euler.py": ROOT / "freqgate_dit" / "scheduling_spectral_euler.py",
    "transformer/transformer_freqgate_dit.py": ROOT / "freqgate_dit" / "transformer_freqgate_dit.py",
}
# A process that cannot see the package: loads, samples, saves again.
BARE = """
import importlib.util, sys
import numpy as np
from diffusers import DiffusionPipeline
assert importlib.util.find_spec("freqgate_dit") is None
try:
    DiffusionPipeline.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("code of a repository ran without leave")
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
np.save("images.npy", pipe(["cat"], num_inference_steps=2, seed=0, output_type="np").images)
pipe.save_pretrained("again")
if len(sys.argv) > 2:
    print(pipe.push_to_hub(sys.argv[2]))
"""


# Another such process: samples every repository that it is told.
BARE_SAMPLES = """
import sys
import numpy as np
from diffusers import DiffusionPipeline
for name in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
    condition = {"prompt": "cat"} if pipe.text_encoder else {"class_labels": "cat"}
    np.save(name.split("/")[1], pipe(**condition, num_inference_steps=2, seed=0, output_type="np").images)
"""


def downloads(hub):
    """Paths that were asked for, with or without success."""
    return [
        request.path.split("/resolve/")[1].split("/", 1)[1] for request in hub.requests if "/resolve/" in request.path
    ]


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


def load(repo_id="ana/dit", **kwargs):
    pipe = FreqGateDiTPipeline.from_pretrained(repo_id, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- there and back ---------------------------------------------------------------------------------------------------

# With and without autoencoder and text encoder, and with a scheduler of the package's own.
KINDS = [
    *((variant, "kl", euler) for variant in VARIANTS),
    ("freq_gate", "text", euler),
    ("adaln_zero", "pixel", euler),
    ("freq_gate", "kl", spectral),
]


@pytest.mark.parametrize(("variant", "kind", "scheduler"), KINDS)
def test_pushed_and_loaded_with_the_package(variant, kind, scheduler, hub, tmp_path):
    pipe = build_pipeline(variant, kind, tmp_path, scheduler=scheduler())
    pipe.save_pretrained(tmp_path / "once")  # before a call: tokenizers keep the padding of their last one
    call = {"prompt" if kind == "text" else "class_labels": ["dog", "cat"], "output_type": "np", "seed": 0}
    assert pipe.push_to_hub("ana/dit") == f"{hub.url}/ana/dit"
    loaded = load()
    loaded.save_pretrained(tmp_path / "again")
    assert type(loaded.transformer) is VARIANTS[variant] and type(loaded.scheduler) is type(pipe.scheduler)
    assert np.array_equal(loaded(num_inference_steps=2, **call).images, pipe(num_inference_steps=2, **call).images)
    assert loaded.id2label == ({} if kind == "text" else LABELS)
    # No code of the repository was downloaded, let alone run.
    assert not [path for path in downloads(hub) if path.endswith(".py")]
    assert not [name for name in sys.modules if name.startswith("diffusers_modules")]
    # What was loaded saves as the same repository.
    files = hub.repos["ana/dit"].files()
    assert contents(tmp_path / "again") == contents(tmp_path / "once")
    assert contents(tmp_path / "once") == {
        name: files[name] for name in files.keys() - {"README.md", ".gitattributes"}
    }


def test_a_repository_holds_its_code_and_no_origin(hub, tmp_path):
    pipe = FreqGateDiTPipeline.from_pretrained(saved(tmp_path))
    pipe.scheduler = spectral()
    pipe.push_to_hub("ana/dit")
    files = hub.repos["ana/dit"].files()
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == ["pipeline_freqgate_dit", "FreqGateDiTPipeline"]
    assert index["transformer"] == ["transformer_freqgate_dit", "AdaLNZeroDiTTransformer2DModel"]
    assert index["scheduler"] == ["scheduling_spectral_euler", "SpectralEulerDiscreteScheduler"]
    for name, source in CODE.items():
        assert files[name] == source.read_bytes()
        assert f"`{name}`" in files["README.md"].decode()  # the card tells what runs without the package
    for name, content in files.items():
        assert str(tmp_path).encode() not in content and b"hf_ana" not in content, name


@pytest.mark.parametrize(("place", "scheduler"), [("folder", euler), ("folder", spectral), ("Hub", spectral)])
def test_a_process_without_the_package(place, scheduler, hub, tmp_path):
    pipe = make_pipeline(tiny_transformer("freq_gate"), scheduler(), vae=tiny_vae_kl())
    pipe.save_pretrained(tmp_path / "pipeline")
    source = tmp_path / "pipeline"
    if place == "Hub":
        pipe.push_to_hub("ana/dit", private=True)
        source = "ana/dit"
    python, _ = fresh_environment(tmp_path / "environment")
    target = ["ana/other"] if place == "Hub" else []
    variables = hub.environment(tmp_path / "home", token="hf_ana_write")
    done = run(python, "-c", BARE, source, *target, cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    expected = pipe(["cat"], num_inference_steps=2, seed=0, output_type="np").images
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), expected, rtol=0, atol=1e-5)
    assert contents(tmp_path / "again") == contents(tmp_path / "pipeline")
    if place == "Hub":
        first, second = (hub.repos[name].files() for name in ("ana/dit", "ana/other"))
        assert {**first, "README.md": b""} == {**second, "README.md": b""}


def test_a_process_without_the_package_loads_every_kind(hub, tmp_path):
    expected = {}
    for variant, kind, scheduler in KINDS:
        pipe = build_pipeline(variant, kind, tmp_path, scheduler=scheduler())
        name = f"ana/{variant}_{kind}_{scheduler.__name__}"
        pipe.push_to_hub(name)
        condition = {"prompt": "cat"} if kind == "text" else {"class_labels": "cat"}
        expected[name] = pipe(**condition, num_inference_steps=2, seed=0, output_type="np").images
    python, _ = fresh_environment(tmp_path / "environment")
    done = run(python, "-c", BARE_SAMPLES, *expected, cwd=tmp_path, **hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    for name, images in expected.items():
        found = np.load(tmp_path / f"{name.split('/')[1]}.npy")
        np.testing.assert_allclose(found, images, rtol=0, atol=1e-5, err_msg=name)


def test_repository_code_runs_only_where_it_is_asked_for(hub, tmp_path):
    """With the package, diffusers' own class runs the repository's copy, ours never does."""
    make_pipeline().push_to_hub("ana/dit")
    pipe = DiffusionPipeline.from_pretrained("ana/dit", trust_remote_code=True)
    assert type(pipe).__module__.startswith("diffusers_modules")
    pipe.save_pretrained(tmp_path / "again")
    make_pipeline().save_pretrained(tmp_path / "once")
    assert contents(tmp_path / "again") == contents(tmp_path / "once")
    assert type(load(trust_remote_code=True)) is FreqGateDiTPipeline


def test_the_model_alone(hub):
    pipe = make_pipeline(tiny_transformer("cross_attention"), vae=tiny_vae_kl())
    pipe.push_to_hub("ana/dit")
    for model_class in (AutoModel, VARIANTS["cross_attention"]):
        model = model_class.from_pretrained("ana/dit", subfolder="transformer")
        assert type(model) is VARIANTS["cross_attention"]
        assert_same_tensors(model.state_dict(), pipe.transformer.state_dict())
    vae = AutoencoderKL.from_pretrained("ana/dit", subfolder="vae")
    assert_same_tensors(vae.state_dict(), pipe.vae.state_dict())


def test_the_model_alone_with_its_code(hub, tmp_path, monkeypatch):
    """As of any custom model of diffusers; classes of the package never run it."""
    model = tiny_transformer("band_gate")
    monkeypatch.setattr(type(model), "_auto_class", None)  # puts it back afterwards
    type(model).register_for_auto_class()
    model.save_pretrained(tmp_path / "model")
    model.push_to_hub("ana/model")
    make_pipeline(model).save_pretrained(tmp_path / "pipeline")
    for loaded in (
        type(model).from_pretrained(tmp_path / "model"),
        type(model).from_pretrained("ana/model"),
        load(tmp_path / "pipeline").transformer,
    ):
        assert type(loaded) is type(model)
        assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert not [name for name in sys.modules if name.startswith("diffusers_modules")]
    type(model)._auto_class = None
    for source in (tmp_path / "model", "ana/model"):
        loaded = AutoModel.from_pretrained(str(source), trust_remote_code=True)
        assert type(loaded).__module__.startswith("diffusers_modules")
        assert_same_tensors(loaded.state_dict(), model.state_dict())
        loaded.save_pretrained(tmp_path / "again")
        again, once = contents(tmp_path / "again"), contents(tmp_path / "model")
        assert again["transformer_freqgate_dit.py"] == CODE["transformer/transformer_freqgate_dit.py"].read_bytes()
        assert again.keys() == once.keys()
    tiny_transformer("band_gate").save_pretrained(tmp_path / "plain")
    assert {*contents(tmp_path / "plain")} == {"config.json", "diffusion_pytorch_model.safetensors"}


# -- ways of loading --------------------------------------------------------------------------------------------------


def test_revision(hub):
    pipes = [make_pipeline(tiny_transformer(seed=seed)) for seed in range(3)]
    for number, pipe in enumerate(pipes):
        pipe.push_to_hub("ana/dit", commit_message=f"number {number}")
    shas = {message: sha for sha, message in hub.repos["ana/dit"].commits()}
    for number, pipe in enumerate(pipes):
        loaded = load(revision=shas[f"number {number}"])
        assert_same_tensors(loaded.transformer.state_dict(), pipe.transformer.state_dict())
    assert_same_tensors(load().transformer.state_dict(), pipes[-1].transformer.state_dict())


def test_tag_of_a_push(hub, tmp_path):
    for number in range(2):
        make_pipeline(tiny_transformer(seed=number)).save_pretrained(tmp_path / "pipeline")
        push_folder(tmp_path / "pipeline", "ana/dit", tag=f"v{number}")
    push_folder(tmp_path / "pipeline", "ana/dit", tag="v0")  # moved
    for revision in ("v0", "v1", "main"):
        assert_same_tensors(load(revision=revision).transformer.state_dict(), tiny_transformer(seed=1).state_dict())


def test_variant_and_dtype(hub):
    pipe = make_pipeline(vae=tiny_vae_kl())
    pipe.push_to_hub("ana/dit")
    pipe.transformer.half()  # the autoencoder has no half-precision copy
    pipe.transformer.push_to_hub("ana/dit", subfolder="transformer", variant="fp16")
    hub.requests.clear()
    loaded = load(variant="fp16", dtype={"transformer": torch.float16, "default": torch.float32})
    assert_same_tensors(loaded.transformer.state_dict(), pipe.transformer.state_dict())
    assert loaded.vae.dtype == torch.float32
    assert {path for path in downloads(hub) if path.endswith(".safetensors")} == {
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    hub.requests.clear()
    assert load(dtype=torch.bfloat16).transformer.dtype == torch.bfloat16
    assert [path for path in downloads(hub) if "fp16" in path] == []
    assert sample(load(), "cat").shape == (1, 4, 8, 8)


def test_a_variant_of_all_weights_in_pieces(hub, tmp_path):
    pipe = make_pipeline(vae=tiny_vae_kl()).to(torch.float16)
    pipe.save_pretrained(tmp_path / "pipeline", variant="fp16", max_shard_size="40KB")
    assert len([*(tmp_path / "pipeline" / "transformer").glob("*.fp16-*.safetensors")]) > 1
    push_folder(tmp_path / "pipeline", "ana/dit")
    assert_same_tensors(load(variant="fp16", dtype=torch.float16).vae.state_dict(), pipe.vae.state_dict())
    with pytest.raises(OSError, match="transformer.*'fp16'"):
        load()


def test_components_that_are_given_are_not_downloaded(hub):
    make_pipeline(vae=tiny_vae_kl()).push_to_hub("ana/dit")
    hub.requests.clear()
    loaded = load(vae=None)
    assert loaded.vae is None and sample(loaded, "cat").shape == (1, 4, 8, 8)
    assert not [path for path in downloads(hub) if path.startswith("vae/")]


def test_device_map_and_offload(hub):
    pipe = make_pipeline(vae=tiny_vae_kl())
    pipe.push_to_hub("ana/dit")
    loaded = load(device_map="cpu")
    assert torch.equal(sample(loaded, "cat"), sample(pipe, "cat"))
    loaded = load()
    loaded.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(sample(loaded, "cat"), sample(pipe, "cat"))


def test_private_repositories_token_and_cache_dir(hub, monkeypatch, tmp_path):
    make_pipeline().push_to_hub("ana/dit", private=True)
    assert hub.repos["ana/dit"].private
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(HubError, match="neither a folder here nor a repository.*hf auth login"):
        load()
    load(token="hf_ana_read", cache_dir=tmp_path / "cache")
    assert (tmp_path / "cache" / "models--ana--dit").is_dir()
    with pytest.raises(HubError, match="cache"):
        load(local_files_only=True)
    load(local_files_only=True, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("how", ["local_files_only", "HF_HUB_OFFLINE"])
def test_offline_makes_no_request(how, hub, monkeypatch, tmp_path):
    pipe = build_pipeline("freq_gate", "text", tmp_path)
    pipe.push_to_hub("ana/dit")
    load()
    hub.requests.clear()
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = load(local_files_only=how == "local_files_only")
    call = {"prompt": "cat", "num_inference_steps": 2, "seed": 0, "output_type": "np"}
    assert np.array_equal(offline(**call).images, pipe(**call).images)
    assert hub.requests == []


def test_without_a_connection_the_cache_is_taken_and_said(hub, caplog):
    make_pipeline().push_to_hub("ana/dit")
    load()
    hub.close()
    assert sample(load(), "cat").shape == (1, 4, 8, 8)
    assert "Using the copy in the cache" in caplog.text


# -- what goes wrong --------------------------------------------------------------------------------------------------


def saved(folder, **kwargs):
    make_pipeline(**kwargs).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def edit(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


def test_folders_that_are_no_pipeline(tmp_path):
    folder = saved(tmp_path)
    with pytest.raises(ValueError, match="'.*transformer' is not a pipeline.*model alone"):
        load(folder / "transformer")
    with pytest.raises(ValueError, match="model_index.json: name the folder"):
        load(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match=f"it is a run, whose pipeline is '{folder}'"):
        load(tmp_path)
    for name in ("state.json", "manifest.json"):
        (folder / "transformer" / name).touch()
    with pytest.raises(ValueError, match="it is a checkpoint, which training resumes from"):
        load(folder / "transformer")


@pytest.mark.parametrize(("place", "named"), [("folder", "pipeline"), ("Hub", "'ana/dit'")])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "StableDiffusionPipeline"},
            "holds a StableDiffusionPipeline.*DiffusionPipeline.from_pretrained",
        ),
        ({"_class_name": "DiTPipeline"}, "freqgate-dit convert"),
        (
            {"_freqgate_dit_version": "9.1", "transformer": ["transformer_freqgate_dit", "NextDiT"]},
            "the class NextDiT, which freqgate_dit .* does not have; it was made by version 9.1: `pip install --up",
        ),
        (
            {"_freqgate_dit_version": "9.1", "scheduler": ["scheduling_next", "NextScheduler"]},
            "the class NextScheduler, which freqgate_dit .* made by version 9.1: `pip install --up",
        ),
        ({"spectrum": [1.0]}, "the option `spectrum` of FreqGateDiTPipeline.*--upgrade"),
    ],
)
def test_pipelines_of_another_kind_or_time(place, named, changes, message, hub, tmp_path):
    folder = saved(tmp_path)
    edit(folder / "model_index.json", **changes)
    if place == "Hub":
        hub.create("ana/dit", files=contents(folder))
    with pytest.raises(ValueError, match=f"{named}.*{message}"):
        load("ana/dit" if place == "Hub" else folder)
    if place == "Hub":  # nothing but the index was downloaded
        assert {*downloads(hub)} == {"model_index.json"}


def test_an_option_of_the_transformer_from_a_newer_version(hub, tmp_path):
    folder = saved(tmp_path)
    edit(folder / "transformer" / "config.json", band_gate=3)
    hub.create("ana/dit", files=contents(folder))
    for source in (folder, "ana/dit"):
        with pytest.raises(ValueError, match="the option `band_gate` of AdaLNZeroDiTTransformer2DModel"):
            load(source)


def test_missing_and_damaged_files(hub, tmp_path):
    folder = saved(tmp_path, vae=tiny_vae_kl())
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for content, message in {
        whole[:-7]: "vae/diffusion_pytorch_model.safetensors are damaged or cut short",
        None: "lacks the weights of its vae .*none at all",
    }.items():
        weights.write_bytes(content) if content else weights.unlink()
        hub.create("ana/dit", files=contents(folder))
        for source in (folder, "ana/dit"):
            with pytest.raises(OSError, match=message):
                load(source)
        assert load(folder, vae=None).vae is None
    (folder / "scheduler" / "scheduler_config.json").unlink()
    hub.create("ana/dit", files=contents(folder))
    for source, named in ((folder, f"'{folder}'"), ("ana/dit", "'ana/dit'")):
        with pytest.raises(OSError, match=f"{named} lacks the configuration of its scheduler"):
            load(source, vae=None)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="model_index.json is no valid JSON"):
        load(folder)


def test_what_a_repository_lacks_is_known_before_anything_is_downloaded(hub, tmp_path):
    files = contents(saved(tmp_path, vae=tiny_vae_kl()))
    del files["vae/diffusion_pytorch_model.safetensors"]
    hub.create("ana/dit", files=files)
    with pytest.raises(OSError, match="the repository 'ana/dit' lacks the weights of its vae .* ask its author"):
        load()
    assert {*downloads(hub)} == {"model_index.json"}
    load(vae=None)
    with pytest.raises(HubError, match="ana/dit is not whole in the cache: .*load it once while online"):
        load(local_files_only=True)


def test_a_missing_piece_of_weights(hub, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "pipeline", max_shard_size="40KB")
    next((tmp_path / "pipeline" / "transformer").glob("*-00002-of-*")).unlink()
    hub.create("ana/dit", files=contents(tmp_path / "pipeline"))
    message = "lacks a piece of the weights of its transformer, transformer/diffusion_pytorch_model-00002-of-"
    for source in (tmp_path / "pipeline", "ana/dit"):
        with pytest.raises(OSError, match=message):
            load(source)
    assert {*downloads(hub)} == {"model_index.json"}
    with pytest.raises(OSError, match=message):
        push_folder(tmp_path / "pipeline", "ana/other")
    assert "ana/other" not in hub.repos


@pytest.mark.parametrize("repo_id", ["ana/", "/dit", "ana/d it", ""])
def test_names_that_cannot_be_repositories(repo_id, hub):
    with pytest.raises(ValueError, match="cannot be the name of a repository on the Hub.*'user/name'"):
        load(repo_id)
    for push in (prepare_repository, make_pipeline().push_to_hub):
        with pytest.raises(ValueError, match="cannot be the name of a repository on the Hub.*'user/name'"):
            push(repo_id or "-")


def test_missing_repository_revision_and_index(hub):
    with pytest.raises(HubError, match="'ana/nothing' is neither a folder here nor a repository on the Hub that this"):
        load("ana/nothing")
    hub.create("ana/empty")
    with pytest.raises(ValueError, match="'ana/empty' is not a pipeline, for it has no model_index.json"):
        load("ana/empty")
    make_pipeline().push_to_hub("ana/dit")
    with pytest.raises(HubError, match="ana/dit has no `revision` 'v9'"):
        load(revision="v9")


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "needs a token with write access.*hf auth login"),
        ("hf_ana_read", "may not write to ana/dit: use one with write access"),
        ("hf_bob_write", "may not write to ana/dit: use one with write access"),
        ("hf_invented", "does not accept the token"),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_tokens_that_may_not_write(token, message, exists, hub, monkeypatch, tmp_path):
    if exists:
        hub.create("ana/dit")
    before = set(hub.repos)
    monkeypatch.setenv("HF_TOKEN", token)
    folder = saved(tmp_path)
    for write in (prepare_repository, make_pipeline().push_to_hub, lambda repo_id: push_folder(folder, repo_id)):
        with pytest.raises(HubError, match=message):
            write("ana/dit")
    assert set(hub.repos) == before


def test_the_name_alone_is_a_repository_of_the_tokens_owner(hub):
    assert prepare_repository("dit", private=True) == "ana/dit"
    assert hub.repos["ana/dit"].private
    assert prepare_repository("lab/dit") == "lab/dit" and not hub.repos["lab/dit"].private
    assert make_pipeline().push_to_hub("dit") == f"{hub.url}/ana/dit"


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 429, "retry_after": 0}, {"drop": True}])
@pytest.mark.parametrize(
    "where",
    [
        "create",
        "preupload",
        "objects/batch",
        "PUT",
        "commit",
        "GET /api/models",
        "/revision/",
        "index.json",
        "safetensors",
    ],
)
def test_faults_that_pass(where, fault, hub):
    """Once each, on the way there or back."""
    pipe = make_pipeline()
    hub.fail(match=where, **fault)
    pipe.push_to_hub("ana/dit")
    assert_same_tensors(load().transformer.state_dict(), pipe.transformer.state_dict())
    assert len(hub.repos["ana/dit"].commits()) == 2  # its creation, and one push


def test_a_push_gives_up_after_its_last_try(hub, tmp_path):
    folder, told = saved(tmp_path), []
    hub.fail(match="preupload", status=503, times=100)
    with pytest.raises(HubError, match="the Hub answered 503 for ana/dit: try again later"):
        push_folder(folder, "ana/dit", tell=told.append)
    assert len(told) == 3 and all("Next try" in line for line in told)


def test_a_download_that_breaks_off_is_never_taken_for_whole(hub):
    pipe = make_pipeline()
    pipe.push_to_hub("ana/dit")
    hub.fail(match="GET.*safetensors", truncate=1000, times=100)
    with pytest.raises(HubError, match="for ana/dit, or the connection broke off .*: try again later"):
        load()
    hub._faults.clear()
    assert_same_tensors(load().transformer.state_dict(), pipe.transformer.state_dict())


def test_a_damaged_cache_is_repaired_as_its_error_says(hub, tmp_path):
    pipe = make_pipeline()
    pipe.push_to_hub("ana/dit")
    load()
    (weights,) = (tmp_path / "hub_home").rglob("transformer/*.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(OSError, match="damaged or cut short .*`force_download=True`"):
        load()
    for again in ({"force_download": True}, {}):
        assert_same_tensors(load(**again).transformer.state_dict(), pipe.transformer.state_dict())


# -- what is pushed ---------------------------------------------------------------------------------------------------


def test_only_what_a_pipeline_has_is_pushed(hub, tmp_path, capsys):
    folder = saved(tmp_path)
    push_folder(folder, "ana/alone")
    secrets = (
        ".env",
        ".netrc",
        "notes.ipynb",
        "transformer/.env.json",
        "transformer/key.pem",
        "figures/a.csv",
        "x.py",
    )
    for name in secrets:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    add_evaluation(folder, "fid", EVALUATION)
    (folder / "LICENSE").write_text("free")
    told = []
    push_folder(folder, "ana/dit", tell=told.append)
    pushed = set(hub.repos["ana/dit"].files())
    assert pushed == {*hub.repos["ana/alone"].files(), "LICENSE", "evaluation/fid.json"}
    assert all(name in told[0] for name in secrets) and "LICENSE" not in told[0] and len(told) == 1
    assert all((folder / name).read_text() == "secret" for name in secrets)


@pytest.mark.parametrize("name", ["transformer/config.json", "transformer", "figures"])
def test_no_link_out_of_a_folder_is_pushed(name, hub, tmp_path):
    folder, outside = saved(tmp_path), tmp_path / "outside"
    if (folder / name).exists():
        (folder / name).rename(outside)
    else:
        outside.mkdir()
    (folder / name).symlink_to(outside)
    with pytest.raises(ValueError, match=f"{name} .*is a link"):
        push_folder(folder, "ana/dit")
    assert "ana/dit" not in hub.repos


# -- the card ---------------------------------------------------------------------------------------------------------


def test_a_push_writes_a_card_and_keeps_one_that_is_there(hub, tmp_path):
    pipe = make_pipeline()
    pipe.push_to_hub("ana/dit")
    card = hub.repos["ana/dit"].files()["README.md"]
    assert b'FreqGateDiTPipeline.from_pretrained("ana/dit")' in card
    hub.create("ana/mine", files={"README.md": b"# mine"})
    pipe.push_to_hub("ana/mine")
    assert hub.repos["ana/mine"].files()["README.md"] == b"# mine"
    folder = saved(tmp_path)
    (folder / "README.md").write_text("# edited")
    push_folder(folder, "ana/edited")
    assert hub.repos["ana/edited"].files()["README.md"] == b"# edited"


def test_files_of_a_repository(hub):
    make_pipeline().push_to_hub("ana/dit")
    files = hub.repos["ana/dit"].files()
    assert list_files("ana/dit") == {name: len(content) for name, content in files.items()}


def test_generated_cards_are_renewed_and_edited_ones_kept(hub, tmp_path):
    folder = saved(tmp_path)
    for name in ("ana/one", "ana/two"):  # the card of the first is no card of the second
        push_folder(folder, name)
        assert f'from_pretrained("{name}")'.encode() in hub.repos[name].files()["README.md"]
    add_evaluation(folder, "fid", EVALUATION)
    push_folder(folder, "ana/one")
    assert EVALUATION.title.encode() in hub.repos["ana/one"].files()["README.md"]
    edited = hub.repos["ana/one"].files()["README.md"] + b"edited on the Hub"
    HfApi().upload_file(path_or_fileobj=edited, path_in_repo="README.md", repo_id="ana/one")
    push_folder(folder, "ana/one")
    assert hub.repos["ana/one"].files()["README.md"] == edited


def test_what_described_other_weights_goes(hub, tmp_path):
    folder = saved(tmp_path)
    add_evaluation(folder, "fid", EVALUATION)
    push_folder(folder, "ana/dit")
    load().push_to_hub("ana/dit")  # the same weights: what is known of them stays
    half = load(dtype=torch.float16)
    half.push_to_hub("ana/dit", variant="fp16")
    files = hub.repos["ana/dit"].files()
    assert "evaluation/fid.json" in files and EVALUATION.title.encode() in files["README.md"]
    make_pipeline(tiny_transformer("freq_gate")).push_to_hub("ana/dit")
    files = hub.repos["ana/dit"].files()
    assert "evaluation/fid.json" not in files and EVALUATION.title.encode() not in files["README.md"]
    assert b"FreqGateDiTTransformer2DModel" in files["README.md"]
    assert "transformer/diffusion_pytorch_model.fp16.safetensors" in files


@pytest.mark.parametrize("before", [{"max_shard_size": "40KB"}, {"safe_serialization": False}, {}])
@pytest.mark.parametrize("after", [{"max_shard_size": "40KB"}, {"safe_serialization": False}, {}])
def test_a_later_push_is_what_loads(before, after, hub):
    """Weights in another format must not stay behind and win."""
    make_pipeline(tiny_transformer(seed=1)).push_to_hub("ana/dit", **before)
    pipe = make_pipeline(tiny_transformer(seed=2))
    pipe.push_to_hub("ana/dit", **after)
    assert_same_tensors(load().transformer.state_dict(), pipe.transformer.state_dict())


def test_push_to_a_branch(hub, tmp_path):
    make_pipeline(tiny_transformer(seed=1)).push_to_hub("ana/dit")
    push_folder(saved(tmp_path), "ana/dit", branch="late")
    assert_same_tensors(load(revision="late").transformer.state_dict(), tiny_transformer().state_dict())
    assert_same_tensors(load().transformer.state_dict(), tiny_transformer(seed=1).state_dict())


def test_what_nobody_could_load_is_not_pushed(hub, tmp_path):
    folder = saved(tmp_path)
    (folder / "pipeline_freqgate_dit.py").unlink()
    with pytest.raises(ValueError, match="lacks its code, pipeline_freqgate_dit.py"):
        push_folder(folder, "ana/dit")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="lacks the weights of its transformer"):
        push_folder(folder, "ana/dit")
    with pytest.raises(ValueError, match="is not there"):
        push_folder(tmp_path / "nothing", "ana/dit")
    with pytest.raises(ValueError, match="`subfolder`"):
        make_pipeline().push_to_hub("ana/dit", subfolder="v1")
    assert hub.repos == {}


def test_private_does_not_mean_public(hub):
    hub.create("ana/dit")
    for push in (prepare_repository, make_pipeline().push_to_hub):
        with pytest.raises(HubError, match="ana/dit is public"):
            push("ana/dit", private=True)
    assert [*hub.repos["ana/dit"].files()] == [".gitattributes"]


def test_other_folders_are_left_as_they_are(tmp_path):
    for name in ("llama", "web"):
        (tmp_path / "pipeline" / name).mkdir(parents=True)
    ours = tmp_path / "pipeline" / "llama" / "config.json"
    ours.write_text('{"_name_or_path":   "x"}')
    (tmp_path / "pipeline" / "web" / "tsconfig.json").write_text("{ // comments }")
    saved(tmp_path)
    assert ours.read_text() == '{"_name_or_path":   "x"}'


def test_from_pipe():
    pipe = make_pipeline(vae=tiny_vae_kl())
    other = FreqGateDiTPipeline.from_pipe(pipe, scheduler=pipe.scheduler)
    assert other.transformer is pipe.transformer and other.vae is pipe.vae and other.id2label == LABELS


def test_from_pipe_keeps_the_types_of_numbers():
    pipe = make_pipeline(tiny_transformer("band_gate"), vae=tiny_vae_kl()).to(torch.float32)
    pipe.transformer.to(torch.bfloat16)
    before = {name: (tensor.dtype, tensor.clone()) for name, tensor in pipe.transformer.state_dict().items()}
    assert {dtype for dtype, _ in before.values()} == {torch.bfloat16, torch.float32}  # a spectrum stays precise
    other = FreqGateDiTPipeline.from_pipe(pipe)
    assert other.vae.dtype == torch.float32
    for name, tensor in other.transformer.state_dict().items():
        assert tensor.dtype == before[name][0] and torch.equal(tensor, before[name][1])
    assert FreqGateDiTPipeline.from_pipe(pipe, dtype=torch.float16).transformer.dtype == torch.float16


def test_a_subclass_loads_what_it_saved(tmp_path):
    class Mine(FreqGateDiTPipeline):
        pass

    Mine(**make_pipeline().components, id2label=LABELS).save_pretrained(tmp_path)
    assert type(Mine.from_pretrained(tmp_path)) is Mine


def test_retry_after_is_obeyed(hub, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr("freqgate_dit.hub.time.sleep", waits.append)
    hub.fail(match="POST /api/repos/create", status=429, retry_after=7)
    push_folder(saved(tmp_path), "ana/dit")
    assert waits == [7]


def test_one_error_does_not_bring_back_old_weights(hub):
    make_pipeline(tiny_transformer(seed=1)).push_to_hub("ana/dit")
    load()
    make_pipeline(tiny_transformer(seed=2)).push_to_hub("ana/dit")
    for match in ("GET /api/models", "model_index.json", "/revision/main"):
        hub.fail(match=match, status=503)
        assert_same_tensors(load().transformer.state_dict(), tiny_transformer(seed=2).state_dict())


def test_an_index_without_a_class(hub, tmp_path):
    folder = saved(tmp_path)
    (folder / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="names no class"):
        load(folder)


def test_tokens_that_are_passed_are_the_ones_that_are_spoken_of(hub, monkeypatch):
    make_pipeline().push_to_hub("ana/dit", private=True)
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(HubError, match="does not accept the token"):
        load(token="hf_invented")
    with pytest.raises(HubError, match="that this token may see"):
        load(token="hf_bob_write")
    with pytest.raises(HubError, match="open to everybody"):
        load(token=False)


def test_a_folder_that_is_not_there(tmp_path):
    for place in (tmp_path / "none" / "pipeline", str(tmp_path / "none" / "pipeline")):
        with pytest.raises(ValueError, match="neither a valid local path nor a valid repo id"):
            FreqGateDiTPipeline.from_pretrained(place)
