"""What a run survives: kills in the middle of saving, a full disk, signals. Each ends with the bits of a straight run.

    python benchmarks/fault_injection.py --out results/fault_injection.json

The model is the demo's; options that this script does not know go to the trainer (`--num_layers 2`). It needs `fork`,
so a POSIX system. With root's rights on Linux the disk that fills up is a real one, a small tmpfs; a limit on the size
of files is tried in any case. Stops with an error at the first thing that is not as it should be.
"""

import argparse
import json
import os
import platform
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import accelerate
import safetensors
import torch
from output import write_result

from freqgate_dit.training.checkpoints import complete_checkpoints, find_checkpoint, load_checkpoint, step_of
from freqgate_dit.training.config import parse_config
from freqgate_dit.training.train import Trainer
from freqgate_dit.training.train import main as train


ROOT = Path(__file__).resolve().parents[1]
PRESET = ROOT / "training" / "configs" / "demo.yaml"
SETTINGS = {
    "lr_schedule": "constant",
    "warmup_steps": 0,
    "ema_snapshots": 0,
    "mixed_precision": "no",
    "report_to": "none",
    "cpu_threads": 1,
    "log_every": 1,
    "validate_every": 10**7,
    "preview_every": 10**7,
    "keep_checkpoints": 2,
}
FOREVER = 10**6
PATIENCE = 300  # seconds that anything here may take


class Runs:
    """Command lines of runs that differ in little, below one folder, with one cache."""

    def __init__(self, folder: Path, more: list[str]):
        self.folder = folder
        self.more = more

    def options(self, name: str, **changes) -> list[str]:
        values = {**SETTINGS, "cache_dir": self.folder / "cache", "output_dir": self.folder / name, **changes}
        return ["--config", str(PRESET), *(f"--{key}={value}" for key, value in values.items()), *self.more]

    def checkpoints(self, name: str) -> Path:
        return self.folder / name / "checkpoints"

    def log(self, name: str) -> Path:
        """What a run prints: beside the runs, not on a disk that is made full."""
        return self.folder / f"{name.replace('/', '_')}.log"

    def straight(self, steps: int) -> Path:
        """The checkpoint of an undisturbed run of `steps`."""
        name = f"straight_{steps}"
        if not self.checkpoints(name).is_dir():
            options = self.options(name, max_steps=steps, save_every=steps)
            check(finish(forked(train, options, log=self.log(name))) == 0, "the straight run failed")
        return self.checkpoints(name) / f"step_{steps:08d}"


def check(condition: bool, otherwise: str):
    if not condition:
        raise SystemExit(f"error: {otherwise}")


# -- processes -----------------------------------------------------------------------------------------------------
# This process never computes with torch: what is forked from one that has threads may wait for them forever.


def forked(function, *arguments, log: Path) -> int:
    """Process id of a child that calls `function(*arguments)` and prints to the end of `log`."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        function(*arguments)
        status = 0
    except SystemExit as stopped:
        print(stopped.code)
    except BaseException as error:  # a child never returns into the code of its parent
        print(repr(error))
    finally:
        sys.stdout.flush()
        os._exit(status)


def finish(child: int) -> int:
    """The exit code of a child; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(condition, alive, what: str):
    """Poll until `condition()`. An error if the process ends before, or nothing happens for minutes."""
    end = time.monotonic() + PATIENCE
    while not condition():
        check(alive(), f"the run ended before {what}")
        check(time.monotonic() < end, f"no {what} in {PATIENCE} s")
        time.sleep(0.002)


def same_bits(one: Path, other: Path):
    """Raise unless two checkpoints have the same weights, moments, averages and counters."""
    one, other = load_checkpoint(one, "cpu"), load_checkpoint(other, "cpu")
    check(one.tensors.keys() == other.tensors.keys(), "the groups of tensors differ")
    for group, tensors in one.tensors.items():
        check(tensors.keys() == other.tensors[group].keys(), f"the names in {group} differ")
        for name, tensor in tensors.items():
            check(torch.equal(tensor, other.tensors[group][name]), f"{group}/{name} differs from the straight run")
    for key in ("step", "averages"):
        check(one.state[key] == other.state[key], f"`{key}` of the state differs")


def require_same_bits(runs: Runs, name: str, steps: int):
    """The run `name` has ended as a straight one does."""
    log = runs.log("comparison")
    child = forked(same_bits, runs.checkpoints(name) / f"step_{steps:08d}", runs.straight(steps), log=log)
    check(finish(child) == 0, f"{name}: {log.read_text()}")


# -- SIGKILL -------------------------------------------------------------------------------------------------------


def kills(runs: Runs, count: int, seed: int) -> dict:
    """Kill a run that saves after every step, at random moments, and go on with it each time; until `count` kills have
    hit a save."""
    chance, checkpoints, known, rows = random.Random(seed), runs.checkpoints("killed"), 0, []
    while sum(row["unfinished_save"] for row in rows) < count:
        check(len(rows) < 10 * count, f"{len(rows)} kills, and hardly one has hit a save")
        row = killed_run(runs, known, chance, resume=bool(rows))
        row["newest_complete"] = known = verified(runs, row.pop("complete_before"))
        row["steps_lost"] = last_logged(runs.folder / "killed") - known
        rows.append(row)
    steps = known + 2
    options = runs.options("killed", max_steps=steps, save_every=1, resume="latest")
    log = runs.log("killed")
    check(finish(forked(train, options, log=log)) == 0, "the last resume failed")
    require_same_bits(runs, "killed", steps)
    left = sorted(path.name for path in checkpoints.iterdir())
    check(left == [f"step_{step:08d}" for step in (steps - 1, steps)], f"left over in the end: {left}")
    return {
        "kills": len(rows),
        "kills_during_a_save": count,
        "resumes": len(rows),
        "steps": steps,
        "most_steps_lost": max(row["steps_lost"] for row in rows),
        "bit_equal": True,
        "each": rows,
    }


def killed_run(runs: Runs, known: int, chance: random.Random, resume: bool) -> dict:
    """Start or resume the run, and kill it a random while after its second own checkpoint."""
    changes = {"max_steps": FOREVER, "save_every": 1, **({"resume": "latest"} if resume else {})}
    checkpoints, log = runs.checkpoints("killed"), runs.log("killed")
    child = forked(train, runs.options("killed", **changes), log=log)
    ended = []

    def alive() -> bool:
        ended.append(os.waitpid(child, os.WNOHANG)[0])
        return not ended[-1]

    wait_for(lambda: newest(checkpoints) > known, alive, f"its first checkpoint (see {log.name})")
    start, first = time.monotonic(), newest(checkpoints)
    wait_for(lambda: newest(checkpoints) > first, alive, "its second checkpoint")
    # Anywhere in the next two steps with their saves.
    time.sleep(2 * chance.random() * (time.monotonic() - start))
    before = newest(checkpoints)
    os.kill(child, signal.SIGKILL)
    check(finish(child) == -signal.SIGKILL, "the run ended before it was killed")
    unfinished = any(path.suffix for path in checkpoints.iterdir())
    return {"complete_before": before, "unfinished_save": unfinished}


def newest(checkpoints: Path) -> int:
    """Step of the newest complete checkpoint, 0 if there is none. (A rotation may delete while this looks.)"""
    try:
        return max(map(step_of, complete_checkpoints(checkpoints)), default=0)
    except FileNotFoundError:
        return newest(checkpoints)


def verified(runs: Runs, at_least: int) -> int:
    """Step of the checkpoint that `--resume latest` takes; its checksums hold, and it is not older than `at_least`."""
    folder = find_checkpoint("latest", runs.checkpoints("killed"))
    log = runs.log("verified")
    check(finish(forked(load_checkpoint, folder, "cpu", log=log)) == 0, f"{folder.name} is damaged")
    check(step_of(folder) >= at_least, f"{folder.name} is older than what was complete before, step {at_least}")
    return step_of(folder)


def last_logged(run: Path) -> int:
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]
    return json.loads(lines[-1])["step"]


# -- a full disk ---------------------------------------------------------------------------------------------------


@contextmanager
def file_limit(folder: Path):
    """No file can grow beyond 100 kB: the weights do not fit, metrics do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def no_space(folder: Path):
    """Not one byte is left on the disk of `folder`."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue
    yield
    filler.unlink()


def run_on_full_disk(options: list[str], full, first: int, last: int):
    """Train; the disk is full while steps `first` to `last` (from 1) are taken and saved."""
    trainer = Trainer(parse_config(options))
    draw, state = trainer.batches.draw, full(trainer.output_dir)

    def drawn(step):
        if step + 1 == first:
            state.__enter__()
        if step == last:
            state.__exit__(None, None, None)
        return draw(step)

    trainer.batches.draw = drawn
    trainer.train()


def full_disk(runs: Runs, name: str, full) -> dict:
    """A disk that is full for two saves, and one that stays full to the end of the run."""
    steps, log = 6, runs.log(name)
    options = runs.options(name, max_steps=steps, save_every=1, keep_checkpoints=6)
    check(finish(forked(run_on_full_disk, options, full, 3, 4, log=log)) == 0, f"{name}: {log.read_text()}")
    said = log.read_text()
    check("checkpoint step_00000003 could not be written" in said, f"{name}: no word about the checkpoint: {said}")
    complete = [step_of(path) for path in complete_checkpoints(runs.checkpoints(name))]
    check(complete == [1, 2, 5, 6], f"{name}: complete are {complete}")
    require_same_bits(runs, name, steps)

    ended = f"{name}_at_the_end"
    log = runs.log(ended)
    options = runs.options(ended, max_steps=steps, save_every=1, keep_checkpoints=6)
    code = finish(forked(run_on_full_disk, options, full, 5, FOREVER, log=log))
    check(code == 1 and "--resume latest" in log.read_text(), f"{ended}: exit code {code}, {log.read_text()}")
    (runs.folder / ended / "filler").unlink(missing_ok=True)
    complete = [step_of(path) for path in complete_checkpoints(runs.checkpoints(ended))]
    check(complete == [1, 2, 3, 4], f"{ended}: complete are {complete}")
    options = runs.options(ended, max_steps=steps, resume="latest")
    check(finish(forked(train, options, log=log)) == 0, f"{ended}: the resume failed: {log.read_text()}")
    require_same_bits(runs, ended, steps)
    return {
        "saves_failed": 2,
        "run_went_on": True,
        "bit_equal": True,
        "exit_code_if_the_last_save_fails": code,
        "bit_equal_after_resume": True,
    }


def tmpfs(runs: Runs, name: str) -> dict | None:
    """`full_disk` on a real file system of its own; `None` where none can be mounted."""
    folder = runs.folder / "tmpfs"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2g", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        return None
    try:
        return full_disk(runs, f"{folder.name}/{name}", no_space)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# -- signals -------------------------------------------------------------------------------------------------------


def signalled(runs: Runs, number: signal.Signals) -> dict:
    """Signal a command, then run the command that it prints, and compare."""
    name, steps = number.name, 40
    command = ["python", "training/train.py", *runs.options(name, max_steps=steps, save_every=FOREVER)]
    with started(command, runs.log(name)) as process:
        metrics = runs.folder / name / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and "train/mse" in metrics.read_text(), lambda: process.poll() is None, name)
        start = time.monotonic()
        process.send_signal(number)
        code = process.wait(PATIENCE)
        seconds = time.monotonic() - start
    printed = (runs.log(name)).read_text()
    check(code == 0 and "--resume latest" in printed, f"{name}: exit code {code}, {printed}")
    with started(shlex.split(printed.splitlines()[-1]), runs.log(f"{name}_resumed")) as process:
        check(process.wait(PATIENCE) == 0, f"{name}: the printed command failed")
    require_same_bits(runs, name, steps)
    stopped = int(printed.split("saved at step ")[1].split()[0])
    return {"exit_code": code, "stopped_at": stopped, "seconds_to_exit": round(seconds, 2), "bit_equal": True}


@contextmanager
def started(command: list[str], log: Path):
    """A command of this checkout, as a user types it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command[1:]], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


# -- the whole -----------------------------------------------------------------------------------------------------


def measure(runs: Runs, parts: list[str], count: int, seed: int) -> dict:
    all_parts = {
        "kills": partial(kills, runs, count, seed),
        "file_limit": partial(full_disk, runs, "limited", file_limit),
        "tmpfs": partial(tmpfs, runs, "full"),
        "SIGINT": partial(signalled, runs, signal.SIGINT),
        "SIGTERM": partial(signalled, runs, signal.SIGTERM),
    }
    results = {}
    for part in parts or all_parts:
        results[part] = all_parts[part]()
        for key, value in (results[part] or {"skipped": "needs root"}).items():
            if key != "each":
                print(f"{part:<11} {key:<33} {value}", flush=True)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", help="kills, file_limit, tmpfs, SIGINT, SIGTERM; by default all")
    parser.add_argument("--kills", type=int, default=20, help="that hit a save; those between saves come on top")
    parser.add_argument("--kill_seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments, more = parser.parse_known_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Runs(Path(folder), more), arguments.parts, arguments.kills, arguments.kill_seed)
    result = {
        "command": shlex.join(["python", "benchmarks/fault_injection.py", "--kills", str(arguments.kills), *more]),
        "preset": PRESET.name,
        "settings": SETTINGS,
        **results,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "safetensors": safetensors.__version__,
        "system": platform.system(),
    }
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
