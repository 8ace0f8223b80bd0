"""What a run survives: kills, a full disk, damaged files, signals, several processes. It ends with the same bits."""

import fcntl
import json
import os
import pty
import re
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
from components import assert_same_tensors, tiny_vae_kl
from tiny_runs import (
    MODEL,
    ROOT,
    TINY,
    command,
    command_line,
    environment,
    last_words,
    metrics,
    photos,
    run,
    state,
    train,
)

from freqgate_dit import FreqGateDiTPipeline
from freqgate_dit.training import latents
from freqgate_dit.training.batches import Batches
from freqgate_dit.training.checkpoints import complete_checkpoints, step_of
from freqgate_dit.training.train import Trainer


pytestmark = pytest.mark.usefixtures("unrendered")


AVERAGES = ["0.9", "power:0.1", "power:0.05"]


@pytest.fixture
def options(options):
    return partial(options, max_steps=6, log_every=1, report_to="none")


def assert_same_state(one, other, step):
    one, other = state(one, step), state(other, step)
    assert one.keys() == other.keys() and one
    for group in one:
        assert_same_tensors(one[group], other[group])


def steps_kept(output_dir):
    return [step_of(path) for path in complete_checkpoints(Path(output_dir) / "checkpoints")]


# -- kills ------------------------------------------------------------------------------------------------------------


def test_a_run_killed_twenty_times_ends_as_a_straight_one(tmp_path):
    """The script stops with an error if a checkpoint is damaged, older than one before, or the last bits differ."""
    script = ROOT / "benchmarks" / "fault_injection.py"
    more = command_line({**MODEL, "prediction_type": "v_prediction", "ema": ["0.9", "power:0.1"]})
    done = run("python", script, "--parts", "kills", "--out", tmp_path / "kills.json", *more, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "kills.json").read_text())["kills"]
    assert result["kills"] >= result["kills_during_a_save"] == 20 and result["bit_equal"]
    # A step is saved after it is reported.
    assert result["most_steps_lost"] <= 1
    assert result["steps"] > result["each"][-1]["newest_complete"] > 20


# -- a full disk ------------------------------------------------------------------------------------------------------


@contextmanager
def full_disk(size, first, last):
    """From step `first` to step `last` (from 1) no file grows beyond `size` bytes: writing fails as on a full disk."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    draw = Batches.draw

    def drawn(self, step):
        if step + 1 == first:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
        if step == last:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        return draw(self, step)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Batches, "draw", drawn)
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


# The weights have 240 kB; metrics still fit.
ROOM = 100_000


def test_a_save_that_fails_does_not_end_the_run(tmp_path, options, capsys):
    train(options(output_dir=tmp_path / "straight"))
    with full_disk(ROOM, 3, 4):
        train(options(save_every=1, keep_checkpoints=3))
    said = capsys.readouterr().out
    assert "checkpoint step_00000003 could not be written" in said and "`output_dir`" in said
    assert "Complete ones are untouched: ['step_00000001', 'step_00000002']" in said
    # The two that failed have pushed nothing out.
    assert steps_kept(tmp_path / "run") == [2, 5, 6]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 3
    assert_same_state(tmp_path / "run", tmp_path / "straight", 6)
    assert isinstance(FreqGateDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline"), FreqGateDiTPipeline)


def test_a_last_save_that_fails_says_how_to_go_on(tmp_path, options):
    train(options(output_dir=tmp_path / "straight"))
    with full_disk(ROOM, 6, 1000):
        message = last_words(options(save_every=2))
    assert "checkpoint step_00000006 could not be written" in message and "--resume latest" in message
    assert steps_kept(tmp_path / "run") == [2, 4] and not (tmp_path / "run" / "pipeline").exists()
    train(options(resume="latest"))
    assert_same_state(tmp_path / "run", tmp_path / "straight", 6)


def test_a_pipeline_that_cannot_be_written_can_be_written_later(tmp_path, options, monkeypatch):
    finish = Trainer.finish

    def finish_on_full_disk(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        finish(self)

    with full_disk(ROOM, 1000, 1000), monkeypatch.context() as patch:  # for its end: the limit is taken back
        patch.setattr(Trainer, "finish", finish_on_full_disk)
        message = last_words(options())
    assert "the pipeline could not be written" in message and "--resume latest" in message
    train(options(resume="latest"))
    pipeline = FreqGateDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert_same_tensors(pipeline.transformer.state_dict(), state(tmp_path / "run", 6)["ema-0.9"])


def test_reports_that_cannot_be_written_do_not_end_the_run(tmp_path, options, capsys):
    changes = {"ema": AVERAGES, "ema_snapshots": 6, "validate_every": 1, "preview_every": 1}
    train(options(**changes, output_dir=tmp_path / "straight"))
    with full_disk(0, 3, 4):
        train(options(**changes))
    said = capsys.readouterr().out
    for what in ("metrics.jsonl", "validation.jsonl", "the preview", "a snapshot of the weight averages"):
        assert f"step 3: could not write {what} (" in said
    # Nothing half written is left among the lines.
    assert {line["step"] for line in metrics(tmp_path / "run")} == {0, 1, 2, 5, 6}
    assert_same_state(tmp_path / "run", tmp_path / "straight", 6)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_tracker_that_cannot_write_does_not_end_the_run(tmp_path, options):
    train(options(output_dir=tmp_path / "straight", report_to="tensorboard"))
    (events,) = (tmp_path / "straight" / "logs" / "freqgate_dit").glob("events.out.tfevents.*")
    metrics_size = (tmp_path / "straight" / "metrics.jsonl").stat().st_size
    assert events.stat().st_size > 2 * metrics_size
    with full_disk(2 * metrics_size, 3, 4):
        train(options(report_to="tensorboard", preview_every=1))
    assert_same_state(tmp_path / "run", tmp_path / "straight", 6)
    assert {line["step"] for line in metrics(tmp_path / "run")} == {0, 1, 2, 3, 4, 5, 6}


def test_half_a_line_is_taken_back(tmp_path, options):
    """Room for some bytes of a line: the next one must not be appended to them."""
    train(options(output_dir=tmp_path / "probe", max_steps=2))
    half = (tmp_path / "probe" / "metrics.jsonl").stat().st_size // 2
    with full_disk(half, 1, 3):
        train(options(max_steps=5))
    assert {4, 5} <= {line["step"] for line in metrics(tmp_path / "run")}


# -- damaged checkpoints ----------------------------------------------------------------------------------------------


def test_a_truncated_checkpoint_is_refused_by_name_and_passed_over_by_latest(tmp_path, options, capsys):
    train(options(save_every=2, keep_checkpoints=3))
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    damaged = tmp_path / "run" / "checkpoints" / "step_00000006"
    os.truncate(damaged / "optimizer.safetensors", 1000)
    message = last_words(options(resume=damaged))
    assert "`resume`" in message and str(damaged) in message and "optimizer.safetensors with 1000 bytes" in message
    assert "step_00000004" in message and "--resume latest" in message
    capsys.readouterr()
    train(options(resume="latest"))
    said = capsys.readouterr().out
    assert "skipping checkpoint step_00000006: it has optimizer.safetensors with 1000 bytes" in said
    assert "resuming from step_00000004" in said
    assert_same_state(tmp_path / "run", tmp_path / "whole", 6)


# -- two jobs in one folder -------------------------------------------------------------------------------------------


def test_a_second_job_is_refused_until_the_first_has_ended(tmp_path, options):
    """However it has ended."""
    folder, file = tmp_path / "run", tmp_path / "run" / "run.lock"
    train(options(max_steps=2))
    assert not file.exists()
    code = (
        "import pathlib, runpy, sys, time\n"
        "runpy.run_path(sys.argv[1])['lock'](pathlib.Path(sys.argv[2]))\n"
        "print('locked', flush=True)\n"
        "time.sleep(60)\n"
    )
    words = [sys.executable, "-c", code, str(ROOT / "training" / "lock.py"), str(folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "locked\n"
            before = file.read_text()
            message = last_words(options(max_steps=3, resume="auto"))
            assert f"`output_dir` ({folder}) is in use by process {other.pid}, since" in message
            assert steps_kept(folder) == [2] and file.read_text() == before
        finally:
            other.kill()
    assert file.exists()
    train(options(max_steps=3, resume="auto"))
    assert steps_kept(folder) == [2, 3] and not file.exists()


# -- resuming otherwise than before -----------------------------------------------------------------------------------


def test_two_resumes_over_epochs_with_other_intervals_change_no_bit(tmp_path, options):
    """Mirrored latents with posterior noise, accumulation, several averages; an epoch of 24 images is 2.4 batches."""
    tiny_vae_kl().save_pretrained(tmp_path / "vae")
    changes = {
        "dataset": photos(tmp_path / "photos", ("cat", "dog"), count=14),
        "num_images": None,
        "resolution": 16,
        "heldout_per_class": 2,
        "vae": tmp_path / "vae",
        "patch_size": 2,
        "horizontal_flip": "true",
        "dropout": 0.1,
        "ema": AVERAGES,
        "per_device_batch_size": 5,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
    }
    train(options(**changes, output_dir=tmp_path / "straight"))
    train(options(**{**changes, "max_steps": 4}, save_every=2, keep_every=2))
    train(options(**{**changes, "max_steps": 9}, save_every=3, keep_every=3, resume="latest", validate_every=2))
    train(options(**changes, save_every=5, resume="latest", preview_every=3, log_every=5))
    assert_same_state(tmp_path / "run", tmp_path / "straight", 12)
    losses = [
        [line["val_ema/loss"] for line in metrics(tmp_path / name) if line["step"] == 12 and "val_ema/loss" in line]
        for name in ("run", "straight")
    ]
    assert losses[0] == losses[1] != []


# -- signals ----------------------------------------------------------------------------------------------------------


def signal_in_step(monkeypatch, step, *numbers):
    draw = Batches.draw

    def drawn(self, now):
        if now + 1 == step:
            for number in numbers:
                signal.raise_signal(number)
        return draw(self, now)

    monkeypatch.setattr(Batches, "draw", drawn)


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path, options, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    signal_in_step(monkeypatch, 3, signal.SIGTERM, signal.SIGINT)
    message = last_words(options(save_every=1))
    assert message.startswith("stopped at once") and "\n" not in message
    assert steps_kept(tmp_path / "run") == [1, 2] and signal.getsignal(signal.SIGINT) is handler


def test_a_second_sigterm_changes_nothing(tmp_path, options, monkeypatch):
    """Queues send it again before they kill, and to every process of a job besides the one that passes it on."""
    signal_in_step(monkeypatch, 3, signal.SIGTERM, signal.SIGTERM)
    train(options(save_every=1))
    assert steps_kept(tmp_path / "run") == [2, 3]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_and_says_so_at_once(name, tmp_path, options, monkeypatch, capfd):
    number = getattr(signal, name)
    handler = signal.getsignal(number)
    signal_in_step(monkeypatch, 3, number)
    train(options())
    assert steps_kept(tmp_path / "run") == [3] and signal.getsignal(number) is handler
    assert (
        capfd.readouterr().err.count(f"{name}: stopping and saving after this step, or at once on another Ctrl-C") == 1
    )


def test_a_lost_terminal_costs_no_step(tmp_path):
    """The terminal is gone when its signal comes, and whatever is printed then is an error."""
    master, terminal = pty.openpty()
    words = command_line({**TINY, "output_dir": tmp_path / "run", "cache_dir": tmp_path, "max_steps": 100_000})
    script = [sys.executable, str(ROOT / "training" / "train.py"), *words]
    # A session of its own, whose terminal that is.
    process = subprocess.Popen(script, stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=own_terminal)
    os.close(terminal)
    text, end = b"", time.monotonic() + 60
    while b"step 0: held-out" not in text and time.monotonic() < end:
        if select.select([master], [], [], 1)[0]:
            text += os.read(master, 4096)
    os.close(master)
    try:
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert steps_kept(tmp_path / "run")[-1] >= 1


def own_terminal():
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path, options, monkeypatch):
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` has it
    try:
        signal_in_step(monkeypatch, 3, signal.SIGHUP)
        train(options())
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert steps_kept(tmp_path / "run") == [6]


def test_ctrl_c_while_images_are_encoded(tmp_path, options, monkeypatch):
    """What was encoded before is not encoded again. A run takes its shards in an order of its own, by chance."""
    encoded, encode = [], latents.encode

    def interrupted(images, indices, *arguments, **more):
        if len(encoded) == 1:
            encoded.append("interrupted")
            signal.raise_signal(signal.SIGINT)
        encoded.append((len(images), indices.start))  # the length tells training from held-out images
        return encode(images, indices, *arguments, **more)

    monkeypatch.setattr(latents, "encode", interrupted)
    monkeypatch.setattr(latents, "MAX_SHARD_IMAGES", 64)
    arguments = options(cache_dir=tmp_path / "cache", max_steps=1)
    assert last_words(arguments).startswith("stopped at once")
    assert encoded[1:] == ["interrupted"] and not (tmp_path / "run").exists()
    train(arguments)
    encoded.remove("interrupted")
    assert len(encoded) > 2 and len(set(encoded)) == len(encoded)
    assert steps_kept(tmp_path / "run") == [1]


@contextmanager
def started(*words, cwd, log, **more):
    """A command in a process group of its own, as a shell starts it."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command(*words),
            cwd=cwd,
            env=environment(**more),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def stopped_by(send, words, cwd, output_dir, codes=(0,), **more):
    """Start a run, `send(process)` a signal once it has got on by a step; the command that it prints in the end."""
    log, before = output_dir.with_suffix(".log"), last_step(output_dir)
    with started(*words, cwd=cwd, log=log, **more) as process:
        end = time.monotonic() + 200
        while last_step(output_dir) <= before:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.01)
        send(process)
        assert process.wait(120) in codes, log.read_text()
    said = log.read_text()
    assert re.search(r"stopped and saved at step \d+ of \d+; go on with:", said), said
    return shlex.split(next(line for line in said.splitlines() if "--resume latest" in line))


def last_step(output_dir):
    path = Path(output_dir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def test_the_printed_command_goes_on_after_ctrl_c_and_sigterm(tmp_path, options, checkout):
    # Steps long enough to be signalled in: many images in one.
    changes = {"max_steps": 60, "per_device_batch_size": 96, "ema": ["0.9", "power:0.1"]}
    words = ["python", "training/train.py", *options(**changes)]
    for number in (signal.SIGINT, signal.SIGTERM):
        words = stopped_by(
            lambda process, number=number: process.send_signal(number), words, checkout, tmp_path / "run"
        )
        assert words[:2] == ["python", "training/train.py"]
    done = run(*words, cwd=checkout)
    assert done.returncode == 0, done.stderr
    train(options(**changes, output_dir=tmp_path / "straight"))
    assert_same_state(tmp_path / "run", tmp_path / "straight", 60)


# -- two processes ----------------------------------------------------------------------------------------------------


def test_processes_that_do_not_find_each_other_are_refused(tmp_path, options, monkeypatch):
    """`accelerate launch --multi_gpu` without a GPU: each of two processes takes itself for the only one."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = last_words(options())
    assert "2 processes" in message and "ACCELERATE_USE_CPU=true" in message and not (tmp_path / "run").exists()


def workers(launcher):
    """Process ids of the trainers below a launcher."""
    return [child.pid for child in psutil.Process(launcher.pid).children() if "training/train.py" in child.cmdline()]


def test_one_and_two_processes_continue_each_other(tmp_path, options, checkout):
    """One process, two until one of them gets SIGTERM, two until Ctrl-C, one again: the losses of one alone."""
    run_dir, steps = tmp_path / "run", 240  # each of the two is heard within two seconds
    one = {"per_device_batch_size": 48, "gradient_accumulation_steps": 2, "ema": ["0.9", "power:0.1"]}
    two = options(**{**one, "per_device_batch_size": 24}, max_steps=steps, resume="latest")
    train(options(**one, max_steps=4))
    launch = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "training/train.py", *two]
    # Without a GPU, this is what makes `accelerate launch --multi_gpu` start processes on the CPU.
    cpu = {"ACCELERATE_USE_CPU": "true"}

    def to_one_worker(process):
        os.kill(workers(process)[-1], signal.SIGTERM)

    def to_the_group(process):
        os.killpg(process.pid, signal.SIGINT)

    variable, *printed = stopped_by(to_one_worker, launch, checkout, run_dir, **cpu)
    assert variable == "ACCELERATE_USE_CPU=true"
    assert printed[:5] == ["accelerate", "launch", "--multi_gpu", "--num_processes", "2"]
    stopped = last_step(run_dir)
    assert 4 < stopped < steps and steps_kept(run_dir)[-1] == stopped
    # The launcher itself ends with an error of its own when it is interrupted.
    stopped_by(to_the_group, printed, checkout, run_dir, codes=(0, 1), **dict([variable.split("=")]))
    assert stopped < last_step(run_dir) < steps
    train(options(**one, max_steps=steps, resume="latest"))

    train(options(**one, max_steps=steps, output_dir=tmp_path / "straight"))
    for key in ("train/mse", "val_raw/loss", "val_ema/loss"):
        resumed, straight = (
            {line["step"]: line[key] for line in metrics(folder) if key in line}
            for folder in (run_dir, tmp_path / "straight")
        )
        common = sorted(resumed.keys() & straight.keys())
        assert common[-1] == steps
        assert [resumed[step] for step in common] == pytest.approx([straight[step] for step in common], rel=1e-4)
