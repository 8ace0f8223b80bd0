"""The evaluation script from end to end: tiny pipelines, a tiny network for the features, real files."""

import json
import multiprocessing
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from components import build_pipeline, make_pipeline, tiny_transformer
from PIL import Image
from tiny_runs import ROOT, TINY, command_line, photos, reset_accelerate, run, train

from freqgate_dit import FreqGateDiTPipeline
from freqgate_dit.evaluations import Evaluation
from freqgate_dit.hub import push_folder
from freqgate_dit.image_folder import read_images
from freqgate_dit.metrics import FeatureStatistics, band_power, frechet_distance, kernel_distance, precision_recall
from freqgate_dit.summary import read_summary
from freqgate_dit.training.data import DataConfig, load_images
from freqgate_dit.training.evaluation import main
from freqgate_dit.training.generation import Sampler
from freqgate_dit.training.scores import counted, frechet_name


NETWORK = """
import torch

kernel = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(0))

def tiny_net(images):
    return torch.nn.functional.conv2d(images.float() / 127.5 - 1, kernel, stride=2).relu().mean(dim=(2, 3))

def broken_net(images):
    return tiny_net(images) / 0 * 0

def growing_net(images):
    return images.float().flatten(1)[:, : 10 + len(images)]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photos of 3 classes, a pipeline that was trained on them with 8 of each held out, and a feature network."""
    folder = tmp_path_factory.mktemp("evaluation")
    photos(folder / "photos", count=20)
    (folder / "net.py").write_text(NETWORK)
    data = {"dataset": folder / "photos", "num_images": None, "resolution": 16, "heldout_per_class": 8}
    places = {"output_dir": folder / "run", "cache_dir": folder / "cache"}
    threads = torch.get_num_threads()
    train(command_line({**TINY, **data, **places, "patch_size": 4, "max_steps": 2, "batch_size": None}))
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def pipeline(folder, tmp_path):
    """A copy of the trained pipeline, to write into."""
    return shutil.copytree(folder / "run" / "pipeline", tmp_path / "pipeline")


@pytest.fixture
def options(folder, tmp_path):
    """Command line of an evaluation of 30 images; keywords replace or add options, `None` leaves one out."""

    def build(*flags, **changes):
        values = {
            "pipeline": folder / "run" / "pipeline",
            "reference": folder / "photos",
            "features": f"{folder / 'net.py'}:tiny_net",
            "num_images": 30,
            "steps": 2,
            "batch_size": 8,
            "dtype": "float32",
            "features_dtype": "float32",
            "bootstrap": 0,
            "out": tmp_path / "out",
            "cache_dir": folder / "cache",
            "cpu_threads": 1,
        }
        return [*command_line({**values, **changes}), "--force", *(f"--{flag}" for flag in flags)]

    return build


def evaluate(arguments):
    """Run the script as a command of its own; what it wrote."""
    reset_accelerate()
    main(arguments)
    out = next(word.removeprefix("--out=") for word in arguments if word.startswith("--out="))
    return json.loads((ROOT / out / "evaluation.json").read_text())


def refusal(arguments):
    """The one sentence that a user sees."""
    reset_accelerate()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert str(stopped.value).startswith("error: ")
    return str(stopped.value)


def numbers(evaluation):
    return {metric["name"]: metric["value"] for metric in evaluation["metrics"]}


def samples(out):
    """Content of the files of images."""
    return {path.name: path.read_bytes() for path in sorted((out / "samples").glob("images_*"))}


def net(images):
    """What the feature network does with uint8 images."""
    scope = {}
    exec(NETWORK, scope)
    return scope["tiny_net"](images)


def frechet(real, fake):
    return frechet_distance(FeatureStatistics.of(net(real)), FeatureStatistics.of(net(fake)))


def real_images(folder):
    train, heldout = load_images(DataConfig(dataset=str(folder / "photos"), resolution=16, heldout_per_class=8))
    return [part.images(range(len(part))) for part in (train, heldout)]


# -- a whole evaluation -----------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_kept_images_and_all_is_said_about_them(folder, pipeline, options, tmp_path, capsys):
    flags = ("floors", "keep_images", "update_card", "train_reference")
    evaluation = evaluate(options(*flags, pipeline=pipeline, guidance_scale=2.0, seed=7, bootstrap=4))
    out, found = tmp_path / "out", numbers(evaluation)

    # Anyone who has the images gets the same numbers.
    kept = read_images(out / "images")
    fake, (real_train, real) = kept.images(range(30)), real_images(folder)
    assert found["fd_tiny_net_30_forced_vs_heldout"] == pytest.approx(frechet(real, fake), rel=1e-4)
    features = net(real), net(fake)
    assert found["kd_tiny_net_30_forced_vs_heldout"] == pytest.approx(kernel_distance(*features).value, rel=1e-3)
    assert found["recall_tiny_net_30_forced_vs_heldout"] == precision_recall(*features).recall
    mean = (real.float() / 127.5 - 1).mean(dim=0)
    powers = [band_power(images.float() / 127.5 - 1, mean).mean(dim=0).log() for images in (real, fake)]
    spectrum = (powers[0] - powers[1]).abs().mean().item()
    assert found["spectrum_30_forced_vs_heldout"] == pytest.approx(spectrum, rel=1e-4)
    # Floors: 30 of the 36 training images in place of samples.
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))[:30]
    floor = found["fd_tiny_net_30_forced_train_vs_heldout"]
    assert floor == pytest.approx(frechet(real, real_train[order]), rel=1e-4)
    assert floor < found["fd_tiny_net_30_forced_vs_heldout"]
    assert found["copied_tiny_net_30_forced"] <= 1 and "heldout_ratio_tiny_net_30_forced" in found

    # Image 4, again by hand: its class is in its name, its seed 7 + 4.
    pipe = FreqGateDiTPipeline.from_pretrained(pipeline)
    label = re.fullmatch(r"0000004_(\w+)\.png", kept.names[4])[1]
    again = np.asarray(pipe(label, seed=11, num_inference_steps=2, guidance_scale=2.0).images[0])
    assert np.abs(again.astype(int) - fake[4].permute(1, 2, 0).numpy()).max() <= 1
    assert evaluation["classes"] == {"cat": 10, "dog": 10, "wild": 10}
    counts = [sum(name.endswith(f"_{label}.png") for name in kept.names) for label in ("cat", "dog", "wild")]
    assert counts == [10, 10, 10]

    protocol, summary = evaluation["protocol"], read_summary(pipeline)
    expected = {
        "pipeline": "pipeline",
        "weights": "0.9",
        "training_steps": 2,
        "num_images": 30,
        "seeds": "7 to 36, one per image",
        "steps": 2,
        "guidance_scale": 2.0,
        "scheduler": "SpectralEulerDiscreteScheduler",
        "sampler": "SpectralEulerDiscreteScheduler, second order, spectral noise levels",
        "dtype": "float32",
        "resolution": 16,
        "reference": "photos",
        "reference_split": "heldout",
        "reference_images": 24,
        "features": "tiny_net",
        "device": "cpu",
    }
    assert expected.items() <= protocol.items() and 0 <= protocol["clipped_pixels"] <= 1
    assert evaluation["scheduler_config"]["beta_end"] == summary.scheduler["beta_end"]
    noise = evaluation["metrics"][0]["sampling_noise"]
    assert noise["standard_error"] > 0 and noise["resamples"] == 4 and noise["classes_fixed"] is True

    # The table, the grid, the card. Nothing says where it was made.
    table = (out / "evaluation.md").read_text()
    assert table in capsys.readouterr().out and "training images in place of samples" in table
    row = next(line for line in table.splitlines() if line.startswith("| fd_tiny_net_30_forced_vs_heldout"))
    assert f"{floor:.4g}" in row and f"± {noise['standard_error']:.4g}" in row
    assert Image.open(out / "samples.png").size == (6 * 64, 5 * 64)
    of_card = summary.evaluations["fd_tiny_net_30_forced_vs_heldout"]
    assert {metric["name"]: metric["value"] for metric in of_card.metrics} == found
    assert "fd_tiny_net_30_forced_vs_heldout" in (pipeline / "README.md").read_text()
    assert Evaluation.load(out / "evaluation.json").title == "Samples against held-out images of photos"
    for path in [*out.glob("*.json"), *out.glob("*.md"), *(pipeline / "evaluation").iterdir()]:
        assert str(tmp_path) not in path.read_text() and str(folder) not in path.read_text(), path

    # The images again, with other features: none is sampled.
    capsys.readouterr()
    again = evaluate(options("keep_images", pipeline=pipeline, guidance_scale=2.0, seed=7, batch_size=5))
    assert numbers(again).items() <= found.items()
    assert "30 of 30 images are there already" in capsys.readouterr().out


def test_a_folder_of_images_has_the_numbers_of_its_pipeline(folder, options, tmp_path):
    evaluation = evaluate(options("keep_images"))
    changes = dict.fromkeys(("pipeline", "num_images", "steps", "dtype"))
    config = folder / "run" / "config.yaml"
    out = tmp_path / "plain"
    plain = evaluate(options("floors", images=tmp_path / "out" / "images", reference=config, out=out, **changes))
    name = "fd_tiny_net_30_forced_vs_photos_heldout"
    assert numbers(plain)[name] == pytest.approx(numbers(evaluation)["fd_tiny_net_30_forced_vs_heldout"], rel=1e-9)
    assert plain["protocol"]["images"] == "images" and "steps" not in plain["protocol"]
    assert not (out / "samples").exists()
    other = options(images=folder / "photos", reference=config, out=out, **changes)
    assert "`out`" in (message := refusal(other)) and "another evaluation (images images, here photos" in message


def test_the_best_of_a_sweep_is_reported_on_the_other_half(folder, options, tmp_path):
    evaluation = evaluate(options("keep_images", sweep="guidance_scale=1,2,6"))
    chosen, sweep = evaluation["protocol"]["guidance_scale"], evaluation["sweep"]
    distances = {float(scale): value for scale, value in sweep["distances"].items()}
    assert list(distances) == [1, 2, 6] and chosen == sweep["chosen"] == min(distances, key=distances.get)
    assert sweep["name"] == "fd_tiny_net_30_forced_vs_heldout_half_a"
    (reported,) = [name for name in numbers(evaluation) if name.startswith("fd_")]
    assert reported == "fd_tiny_net_30_forced_vs_heldout_half_b" and evaluation["protocol"]["reference_images"] == 12
    assert f"The guidance scale {chosen:g} was chosen" in evaluation["notes"]
    table = (tmp_path / "out" / "evaluation.md").read_text()
    assert all(f"| {scale:g}" in table and f"{value:.4g}" in table for scale, value in distances.items())
    # Each of them is what an evaluation at that scale gives, and the two halves are the reference.
    alone = evaluate(options("keep_images", guidance_scale=2.0, out=tmp_path / "alone"))
    assert samples(tmp_path / "alone") == samples(tmp_path / "out" / "guidance_scale=2")
    fake = read_images(tmp_path / "alone" / "images").images(range(30))
    assert alone["sweep"] is None and abs(distances[2.0] - frechet(real_images(folder)[1], fake)) > 1e-6


def test_the_floor_of_the_autoencoder_and_images_of_latents(folder, options, tmp_path):
    build_pipeline("adaln_zero", "kl", tmp_path).save_pretrained(tmp_path / "pipe")
    evaluation = evaluate(options("floors", pipeline=tmp_path / "pipe"))
    found = numbers(evaluation)
    # Nothing is known of its data: one half of the reference is compared with the other.
    assert (
        "fd_tiny_net_60_forced_reconstructed_vs_photos" in found and evaluation["protocol"]["reference_images"] == 60
    )
    assert 0 < found["fd_tiny_net_30_forced_half_a_vs_photos_half_b"] < found["fd_tiny_net_30_forced_vs_photos"]
    assert evaluation["protocol"]["autoencoder"] and evaluation["protocol"]["weights"] == "not recorded"
    assert not (tmp_path / "out" / "samples").exists()  # no --keep_images


def test_nothing_of_others_is_deleted_or_replaced(folder, options, tmp_path):
    out = tmp_path / "out"
    for name in ("samples/mine.txt", "samples/references/mine.txt", "images/mine.png"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    assert "images would be replaced, but was not written by this package" in refusal(options("keep_images"))
    assert not (out / "protocol.json").exists()  # before anything was sampled
    evaluate(options())
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    made = {"evaluation.json", "evaluation.md", "protocol.json", "samples.png"}
    assert left == {"samples/mine.txt", "samples/references/mine.txt", "images/mine.png", *made}
    shutil.rmtree(out / "images")
    for _ in range(2):  # our own are replaced
        evaluate(options("keep_images"))
    assert (out / "images" / "protocol.json").is_file()


def test_the_built_in_data_and_a_pipeline_without_classes(options, tmp_path):
    make_pipeline(tiny_transformer(num_classes=None, in_channels=3, sample_size=32, patch_size=8)).save_pretrained(
        tmp_path / "pipe"
    )
    data = tmp_path / "data.yaml"
    data.write_text("dataset: shapes_textures\nnum_images: 96\n")
    evaluation = evaluate(options(pipeline=tmp_path / "pipe", reference=data, num_images=12))
    assert "fd_tiny_net_12_forced_vs_shapes_textures_heldout" in numbers(evaluation)
    assert evaluation["protocol"]["class_mix"] == "none" and evaluation["protocol"]["guidance_scale"] == 1


def test_a_pipeline_of_the_hub(folder, pipeline, options, hub, tmp_path):
    push_folder(pipeline, "ana/dit")
    evaluation = evaluate(options(pipeline="ana/dit"))
    local = evaluate(options(out=tmp_path / "local"))
    assert numbers(evaluation) == numbers(local)
    assert evaluation["protocol"]["pipeline"] == "ana/dit" and evaluation["protocol"]["weights"] == "0.9"
    assert evaluation["protocol"]["checkpoint"] == local["protocol"]["checkpoint"]
    assert "--pipeline ana/dit" in evaluation["command"]
    assert "`update_card` needs a pipeline folder" in refusal(options("update_card", pipeline="ana/dit"))


# -- processes, interruptions -----------------------------------------------------------------------------------------


def test_two_processes_give_the_images_and_numbers_of_one(options, tmp_path):
    """30 images in batches of 8, shared by 2: no image twice, none missing."""
    one = evaluate(options("keep_images", "floors", bootstrap=2))
    words = options("keep_images", "floors", bootstrap=2, out=tmp_path / "two", cache_dir=tmp_path / "cache")
    launch = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", ROOT / "training" / "evaluation.py"]
    done = run(*launch, *words, cwd=tmp_path, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert samples(tmp_path / "two") == samples(tmp_path / "out") and len(samples(tmp_path / "two")) == 4
    two = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert numbers(two) == numbers(one)
    assert two["protocol"].pop("processes") == 2 and one["protocol"].pop("processes") == 1
    assert two["protocol"] == one["protocol"]


def test_after_a_kill_in_the_middle_the_same_bytes(options, tmp_path, capsys):
    straight = evaluate(options("keep_images", out=tmp_path / "straight"))

    def killed():
        made, images = [], Sampler.images

        def kill_at_the_third(self, indices):
            made.append(indices)
            if len(made) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return images(self, indices)

        Sampler.images = kill_at_the_third
        main(options("keep_images"))

    reset_accelerate()
    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(samples(tmp_path / "out")) == 2
    # Nothing else may go on in its place.
    assert "guidance_scale 2.5, here 3.0" in refusal(options("keep_images", guidance_scale=3))
    capsys.readouterr()
    evaluation = evaluate(options("keep_images"))
    assert "16 of 30 images are there already" in capsys.readouterr().out
    assert samples(tmp_path / "out") == samples(tmp_path / "straight")
    assert evaluation == straight


def test_ctrl_c_keeps_what_was_sampled(options, tmp_path, monkeypatch):
    images = Sampler.images

    def interrupted(self, indices):
        if indices.start:
            signal.raise_signal(signal.SIGINT)
        return images(self, indices)

    monkeypatch.setattr(Sampler, "images", interrupted)
    with pytest.raises(SystemExit, match="^stopped; .*out keeps what was sampled: the same command goes on with it$"):
        main(options())
    assert len(samples(tmp_path / "out")) == 1


def test_processes_that_do_not_find_each_other_are_refused(options, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes" in (message := refusal(options())) and "ACCELERATE_USE_CPU=true" in message


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 32}, "`resolution` (32) is not that of the images that are evaluated, 16"),
        ({"features": "FOLDER/net.py:broken_net"}, "`features` (broken_net) returned NaN or infinity"),
        ({"features": "FOLDER/net.py:growing_net"}, "`features` (growing_net) returned 16 features per image, but 18"),
        ({"features": "FOLDER/net.py:other"}, "there is no function other"),
        ({"features": "inception"}, "inception"),  # nothing is downloaded here
        ({"features": "inception", "features_dtype": "bfloat16"}, "`features_dtype` bfloat16"),
        ({"pipeline": "FOLDER/photos"}, "has no model_index.json"),
        ({"reference": "FOLDER/nothing"}, "`reference` (FOLDER/nothing) cannot be used"),
        ({"split": "heldout", "reference": "shapes_textures"}, "too small for dataset='shapes_textures'"),
        ({"train_reference": "", "split": "train"}, "`train_reference` without a value"),
        ({"sweep": "guidance_scale=1"}, "`sweep` (guidance_scale=1) must be guidance_scale=A,B,..."),
        ({"sweep": "guidance_scale=1,1.0"}, "two different numbers"),
        ({"sweep": "steps=1,2"}, "`sweep` (steps=1,2) must be"),
        ({"sweep": "guidance_scale=1,2", "guidance_scale": 1}, "`sweep` and `guidance_scale` (1.0) were both given"),
        ({"sampler": "Euler"}, "`sampler` (Euler) must be one of spectral, "),
        ({"num_images": 0}, "`num_images` (0) must be at least 1"),
        ({"num_images": 3}, "3 image(s)"),
        ({"bootstrap": 1}, "`bootstrap` (1) must be 0, for none, or at least 2"),
        ({"images": "FOLDER/photos", "pipeline": None}, "`num_images` says how to sample a pipeline"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(changes, message, folder, options):
    changes = {
        name: value.replace("FOLDER", str(folder)) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    said = refusal(options(**changes))
    assert message.replace("FOLDER", str(folder)) in said and "\n" not in said


def test_few_images_need_force_and_the_names_carry_it(folder, options, tmp_path):
    def refused(*flags, **changes):
        return refusal([word for word in options(*flags, **changes) if word != "--force"])

    assert "`num_images` is 30, and a Frechet distance of fewer than 2,048 images" in refused()
    assert "`reference` holds 24, and a Frechet distance of fewer than 2,048" in refused(num_images=2048)
    changes = {**dict.fromkeys(("pipeline", "num_images", "steps", "dtype")), "images": folder / "photos" / "cat"}
    assert "`images` holds 20, and" in refused(**changes)
    assert not (tmp_path / "out").exists()
    assert [counted(5100, 5100), counted(5100, 1700), counted(2047, 5100, "train")] == [
        "5100",
        "5100_forced",
        "2047_forced_train",
    ]
    # Only clean-fid's Inception makes a FID.
    assert frechet_name("inception_clean", "5100", "heldout") == "fid_inception_clean_5100_vs_heldout"
    for features in ("inception_clean_12345678", "inception_mixed7"):
        assert frechet_name(features, "5100", "heldout") == f"fd_{features}_5100_vs_heldout"
    evaluation = evaluate(options())
    assert evaluation["notes"].startswith("Forced: 24 images are fewer than the 2,048")


def test_a_renamed_copy_of_the_data_is_compared_by_its_held_out_part(options, folder, tmp_path):
    """Not by all, of which the model has seen the most."""
    renamed = shutil.copytree(folder / "photos", tmp_path / "downloads")
    found = evaluate(options(reference=renamed))
    assert "fd_tiny_net_30_forced_vs_heldout" in numbers(found)
    assert found["protocol"]["reference_images"] == 24


def test_classes_that_are_absent_are_named(options, tmp_path):
    two = photos(tmp_path / "two", ("cat", "wild"), count=8)
    assert "has no image of classes of the pipeline (dog)" in refusal(options(reference=two))
    assert evaluate(options(reference=two, class_mix="uniform"))["classes"] == {"cat": 10, "dog": 10, "wild": 10}


def test_images_of_a_folder_are_checked(folder, options, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(folder / "photos" / "cat", images)
    changes = {**dict.fromkeys(("pipeline", "num_images", "steps", "dtype")), "images": images}
    damaged = (images / "3.png").read_bytes()
    (images / "3.png").write_bytes(damaged[:100])
    assert "`images`" in (message := refusal(options(**changes))) and "3.png cannot be read" in message
    Image.new("RGB", (20, 16)).save(images / "3.png")
    assert "3.png has 20 x 16 pixels" in refusal(options(**changes))
    (images / "3.png").unlink()
    Image.new("RGB", (16, 16)).save(images / "4.jpg")
    assert "4.jpg is a JPEG" in refusal([word for word in options(**changes) if word != "--force"])
    assert "`images` (nowhere) cannot be evaluated" in refusal(options(**{**changes, "images": "nowhere"}))


def test_guidance_that_was_not_trained_is_refused_and_the_folder_can_be_used(folder, options, tmp_path):
    pipe = make_pipeline(tiny_transformer(in_channels=3, sample_size=16), class_dropout_prob=0.0)
    pipe.save_pretrained(tmp_path / "pipe")
    assert "`guidance_scale` (2.0) needs a null condition" in refusal(
        options(pipeline=tmp_path / "pipe", guidance_scale=2.0)
    )
    assert evaluate(options(pipeline=tmp_path / "pipe"))["protocol"]["guidance_scale"] == 1


def test_the_help_shows_whole_commands_and_names_the_files(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    said = capsys.readouterr().out
    assert left.value.code == 0 and "--sweep guidance_scale=1,1.5,2,2.5" in said
    for told in ("fid_inception_clean_5100_vs_heldout", "evaluation.json", "ACCELERATE_USE_CPU=true"):
        assert told in said
