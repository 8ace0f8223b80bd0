"""The trainer's `--push_to_hub`, against a Hub on this machine."""

import json
import os
import re
import signal
import threading
import time

import pytest
import torch
from components import assert_same_tensors, tiny_vae_kl
from tiny_runs import photos, refusal, state, train

from freqgate_dit import FreqGateDiTPipeline, cli
from freqgate_dit.training.posthoc_ema import main as posthoc_ema
from freqgate_dit.training.pushes import Pushes


pytestmark = pytest.mark.usefixtures("unrendered")


PUSH = {"push_to_hub": True, "save_every": 2, "max_steps": 4, "validate_every": 2, "preview_every": 2}


def test_a_run_pushes_its_checkpoints_and_its_end(options, hub, tmp_path, capsys):
    train(options(**PUSH, hub_model_id="ana/dit", hub_private=True, license="mit", data_license="computed"))
    repo = hub.repos["ana/dit"]
    assert repo.private
    messages = [message for _, message in repo.commits()]
    assert messages[:2] == ["Step 4 of 4", "Step 2 of 4"]
    assert [*repo.tags] == ["step_00000002", "step_00000004"]
    assert f"pushed      {hub.url}/ana/dit" in capsys.readouterr().out
    # Each is the average of its checkpoint.
    for step in (2, 4):
        pipe = FreqGateDiTPipeline.from_pretrained("ana/dit", revision=f"step_{step:08d}")
        weights = state(tmp_path / "run", step)["ema-0.9"]
        assert_same_tensors(pipe.transformer.state_dict(), weights)
    assert_same_tensors(FreqGateDiTPipeline.from_pretrained("ana/dit").transformer.state_dict(), weights)
    # What was waiting is gone; what was pushed is the run's pipeline.
    assert [*(tmp_path / "run" / "pushing").iterdir()] == []
    files = repo.files()
    for path in (tmp_path / "run" / "pipeline").rglob("*.*"):
        assert files[path.relative_to(tmp_path / "run" / "pipeline").as_posix()] == path.read_bytes()
    # A checkpoint and the run are called what they are where a pipeline is expected.
    for place, named in (("run", "it is a run"), ("run/checkpoints/step_00000004", "it is a checkpoint")):
        with pytest.raises(ValueError, match=f"is not a pipeline, .* {named}"):
            FreqGateDiTPipeline.from_pretrained(tmp_path / place)


def test_a_pushed_repository_says_what_it_is_and_nothing_else(options, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a-key-of-another-service")
    tiny_vae_kl().save_pretrained(tmp_path / "parts" / "my vae")
    own = {"dataset": photos(tmp_path / "parts" / "my images"), "vae": tmp_path / "parts" / "my vae"}
    sizes = {"num_images": None, "resolution": 16, "heldout_per_class": 2, "patch_size": 2}
    train(options(**{**PUSH, **own, **sizes}, hub_model_id="lab/dit", license="mit"))
    files = hub.repos["lab/dit"].files()
    figures = {"preview.png", "loss.png", "validation.png", "gate.png"}
    assert {name for name in files if name.startswith("figures/")} == {f"figures/{name}" for name in figures}
    assert {"README.md", "training_config.yaml", "training_summary.json", "model_index.json"} < files.keys()
    card = files["README.md"].decode()
    assert 'FreqGateDiTPipeline.from_pretrained("lab/dit")' in card and "license: mit" in card
    summary = json.loads(files["training_summary.json"])
    assert (summary["step"], summary["images_seen"]) == (4, 32)
    lines = (tmp_path / "run" / "validation.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert summary["heldout"]["loss"] == records[-1]["ema"]["loss"]
    assert summary["heldout"]["loss_at_start"] == records[0]["ema"]["loss"]
    assert "give `--dataset`, `--vae` as on your machine" in card
    # No token, no path of this machine, no name of its user.
    for name, content in files.items():
        assert b"hf_ana" not in content and b"a-key-of-another-service" not in content, name
        for place in (tmp_path, tmp_path.home()):
            assert str(place).encode() not in content, name


def test_the_repository_is_named_after_the_run(options, hub, tmp_path):
    train(options(push_to_hub=True, max_steps=1, save_every=1, output_dir=tmp_path / "my-run"))
    assert "ana/my-run" in hub.repos


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("", "ana/dit", "needs a token with write access"),
        ("hf_ana_read", "ana/dit", "may not write to ana/dit"),
        ("hf_ana_write", "bob/dit", "may not write to bob/dit"),
        ("hf_ana_write", "ana/", "`hub_model_id` .'ana/'. cannot be the name of a repository"),
    ],
)
def test_refused_before_step_1(token, repo_id, message, options, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    assert re.search(message, refusal(options(**PUSH, hub_model_id=repo_id)))
    assert not (tmp_path / "run").exists() and repo_id not in hub.repos


def test_a_dry_run_asks_the_hub_for_nothing(options, hub):
    train(options(**PUSH, hub_model_id="ana/dit", dry_run=True))
    assert hub.requests == [] and hub.repos == {}


def test_a_failed_push_does_not_cost_the_run(options, hub, tmp_path, capsys, monkeypatch):
    train(options(max_steps=4, output_dir=tmp_path / "straight"))
    hub.fail(match="preupload|commit", status=500, times=10_000)
    train(options(**PUSH, hub_model_id="ana/dit"))
    out = capsys.readouterr()
    words = out.out + out.err
    assert "step 2: the pipeline was not pushed: the Hub answered 500" in words
    for name, group in state(tmp_path / "run", 4).items():
        assert_same_tensors(group, state(tmp_path / "straight", 4)[name])
    # The commands that it prints push later; what is newer stays on main.
    commands = re.findall(r"push it later with: freqgate-dit (push .*)", words)
    assert [command.split()[-1] for command in commands] == ["step_00000002", "ana/dit"]
    hub._faults.clear()
    for command in reversed(commands):
        assert cli.main(command.split()) == 0
    for revision, step in {"step_00000002": 2, "main": 4}.items():
        loaded = FreqGateDiTPipeline.from_pretrained("ana/dit", revision=revision).transformer.state_dict()
        assert_same_tensors(loaded, state(tmp_path / "run", step)["ema-0.9"])


def test_a_push_that_failed_can_still_be_made_after_others_went_well(options, hub, tmp_path, capsys):
    hub.fail(match="preupload", status=403)
    train(options(**PUSH, hub_model_id="ana/dit"))
    (command,) = re.findall(r"push it later with: freqgate-dit (push .*)", "".join(capsys.readouterr()))
    assert [*hub.repos["ana/dit"].tags] == ["step_00000004"]
    assert cli.main(command.split()) == 0
    for revision, step in {"step_00000002": 2, "main": 4}.items():
        loaded = FreqGateDiTPipeline.from_pretrained("ana/dit", revision=revision).transformer.state_dict()
        assert_same_tensors(loaded, state(tmp_path / "run", step)["ema-0.9"])


class SlowHub:
    """Holds the first upload until it is let go."""

    def __init__(self, hub):
        self.held, self.go, self.answer = threading.Event(), threading.Event(), hub.answer
        hub.answer = self

    def __call__(self, method, target, headers, body):
        if "preupload" in target and not self.held.is_set():
            self.held.set()
            self.released = self.go.wait(60)
        return self.answer(method, target, headers, body)


def when(condition, do):
    """In a thread: `do()` as soon as `condition()`."""

    def watch():
        while not condition():
            time.sleep(0.01)
        do()

    threading.Thread(target=watch, daemon=True).start()


def test_training_does_not_wait_for_the_hub(options, hub, tmp_path):
    slow = SlowHub(hub)
    last = tmp_path / "run" / "checkpoints" / "step_00000006"
    when(last.is_dir, slow.go.set)  # were a step to wait for the upload of step 2, this would never come
    train(options(**{**PUSH, "max_steps": 6}, hub_model_id="ana/dit"))
    assert slow.released
    # Step 4 waited behind step 2, and its checkpoint is kept.
    assert [*hub.repos["ana/dit"].tags] == ["step_00000002", "step_00000004", "step_00000006"]


def test_a_stopped_run_does_not_wait_either(options, hub, tmp_path, capsys):
    slow = SlowHub(hub)
    when(slow.held.is_set, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train(options(**{**PUSH, "max_steps": 5000}, hub_model_id="ana/dit"))
    words = "".join(capsys.readouterr())
    assert "stopped and saved at step" in words
    folder = tmp_path / "run" / "pushing" / "step_00000002"
    assert f"not pushed yet\n  push it later with: freqgate-dit push {folder} ana/dit --branch {folder.name}" in words
    assert hub.repos["ana/dit"].tags == {} and (folder / "README.md").is_file()
    slow.go.set()
    for thread in threading.enumerate():  # it would be on its way during the tests that follow
        if thread.name == "pushes":
            thread.join(30)


def test_what_waits_is_left_out_when_its_checkpoint_goes(tmp_path):
    pushes = Pushes("ana/dit", tmp_path, 10, print)
    pushes._thread = object()  # busy
    for step in (1, 2, 3):
        pushes.place(step).mkdir()
        pushes.add(step, kept=[step - 1, step])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]


def test_a_post_hoc_average_does_not_borrow_the_runs_numbers(options, tmp_path):
    train(options(max_steps=8, ema=["power:0.1", "power:0.05"], ema_snapshots=4, validate_every=4, preview_every=4))
    posthoc_ema(["--run", str(tmp_path / "run"), "--sigma_rel", "0.08"])
    folder = tmp_path / "run" / "pipeline_ema_0.08"
    summary = json.loads((folder / "training_summary.json").read_text())
    assert summary["heldout"] is None and summary["weights"] == "post-hoc EMA, sigma_rel 0.08"
    card = (folder / "README.md").read_text()
    assert "sigma_rel 0.08" in card and "preview.png" not in card and not (folder / "figures" / "preview.png").exists()
    assert "No measurement is recorded" in card
    assert torch.is_tensor(FreqGateDiTPipeline.from_pretrained(folder).transformer.proj_out.weight)
