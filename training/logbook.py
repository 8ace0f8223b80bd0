"""What a run says while it goes on: console, metrics.jsonl, trackers, curves."""

import json
import math
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from tqdm.auto import tqdm

from freqgate_dit import plots
from freqgate_dit.files import read_json_lines, replace_file, write_text
from freqgate_dit.training.config import TrainingRun
from freqgate_dit.training.guards import SpikeDetector
from freqgate_dit.training.validation import ValidationResult


def check_tracker(name: str):
    """Raise if `report_to` is not installed. (Accelerate leaves such a tracker out without a word.)"""
    choices = ("none", *(tracker.value for tracker in get_available_trackers()))
    if name not in choices:
        raise ValueError(f"`report_to` ({name!r}) is not installed: choose from {choices}.")


def tracker_arguments(tracker: str, output_dir: Path, step: int) -> dict:
    """What wandb or trackio starts with, so that a run there has the name of this one's folder and goes on with it.

    Args:
        step: where the run stands; at 0 it is a new one.
    """
    name = output_dir.resolve().name
    if tracker == "trackio":
        return {"name": name, "resume": "allow" if step else "never"}
    if tracker != "wandb":
        return {}
    file = output_dir / "logs" / "wandb_id.txt"  # names are not unique there
    if not step or not file.is_file():
        file.parent.mkdir(exist_ok=True)
        write_text(file, uuid.uuid4().hex)
    return {"name": name, "id": file.read_text(encoding="utf-8"), "resume": "allow"}


class Logbook:
    """The reports of a run, from the main process.

    What cannot be written, on a full disk, say, is told and left out: no report is worth a run.

    Args:
        accelerator: its trackers are started here.
        config: the run's; its `output_dir` exists.
        step: where the run stands.
        total_steps: where it ends.
        terms: names of the loss terms, in the order of a report's columns.
        validated_on: of which images the validation is, "held-out" or "training".
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainingRun,
        step: int,
        total_steps: int,
        terms: tuple[str, ...],
        validated_on: str,
    ):
        self.accelerator = accelerator
        self.is_main = accelerator.is_main_process
        self.output_dir = Path(config.train.output_dir)
        self.total_steps = total_steps
        self.terms = terms
        self.validated_on = validated_on
        self.spikes = SpikeDetector()
        self.watch = Stopwatch()
        if self.is_main:
            # A run that starts anew reports its step 0 anew.
            newest = step if step > 0 else -1
            self.metrics = JsonLines(self.output_dir / "metrics.jsonl", newest, self.tell)
            self.validations = JsonLines(self.output_dir / "validation.jsonl", newest, self.tell)
        if config.train.report_to != "none":
            # Trackers take numbers, strings and booleans only.
            settings = {
                name: value if isinstance(value, (int, float, str)) else str(value)
                for name, value in config.shareable().to_dict().items()
            }
            arguments = tracker_arguments(config.train.report_to, self.output_dir, step) if self.is_main else {}
            accelerator.init_trackers("freqgate_dit", settings, {config.train.report_to: arguments})
        # A bar is for a terminal; log files get lines. (`disable=False` would overrule TQDM_DISABLE.)
        quiet = {"disable": True} if not self.is_main or not sys.stderr.isatty() else {}
        self.bar = tqdm(total=total_steps, initial=step, unit="step", smoothing=0.05, **quiet)

    def tell(self, line: str):
        """A line for the user that leaves the progress bar whole."""
        if self.is_main:
            with suppress(OSError):  # the log file may lie on a full disk, too
                tqdm.write(line)

    @contextmanager
    def spare(self, what: str, step: int):
        """Inside, failing to make or write `what`, for whatever reason, does not cost the run."""
        try:
            yield
        except Exception as error:
            self.tell(f"step {step}: could not write {what} ({type(error).__name__}: {error}); the run goes on")

    def log(self, step: int, values: dict[str, float]):
        """Numbers to metrics.jsonl and trackers; what is not finite is left out, as it is no JSON."""
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        if self.is_main:
            with self.spare("metrics.jsonl", step):
                self.metrics.add(step, values)
        with self._tracking(step):
            self.accelerator.log(values, step=step)

    @contextmanager
    def _tracking(self, step: int):
        """Inside, a tracker that fails, in whatever way of its own, is left out for the rest of the run."""
        try:
            yield
        except Exception as error:
            self.tell(f"step {step}: the tracker has failed ({error}) and is left out; metrics.jsonl goes on")
            self.accelerator.trackers = []

    def log_image(self, step: int, name: str, image):
        """A PIL image to the trackers that take images."""
        with self._tracking(step):
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":  # batches, height x width x channels
                    tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
                elif tracker.name == "wandb":
                    tracker.log_images({name: [image]}, step=step)

    def close(self, step: int):
        """End the trackers and leave the group of processes; what they still hold is written now, or lost."""
        with self._tracking(step):
            self.accelerator.end_training()

    def report(self, step: int, window: torch.Tensor, images_per_step: int, values: dict[str, float]):
        """The steps since the last report.

        Args:
            step: the last of them.
            window: `(steps, terms + 2)` on the CPU: loss terms, gradient norm, 1 where the step was skipped.
            images_per_step: size of the global batch.
            values: more numbers to log.
        """
        *terms, grad_norm, skipped = window.unbind(dim=1)
        taken = skipped == 0
        if taken.any():
            values |= {
                f"train/{name}": term[taken].mean().item() for name, term in zip(self.terms, terms, strict=True)
            }
            values["train/grad_norm"] = grad_norm[taken].mean().item()
        seconds, waiting = self.watch.restart()
        values |= {"images_per_second": len(window) * images_per_step / seconds, "data_wait": waiting / seconds}
        first = step - len(window) + 1
        jumps = [self._examine(first + offset, row[0], *row[-2:]) for offset, row in enumerate(window.tolist())]
        values["train/spikes"] = sum(jumps)
        self.log(step, values)
        line = progress_line(values, seconds / len(window) * (self.total_steps - step))
        if self.bar.disable:
            self.tell(f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}  {line}")
        else:
            self.bar.set_postfix_str(line)

    def _examine(self, step: int, loss: float, grad_norm: float, skipped: float) -> bool:
        """Tell a skipped step or a jump of the loss. Returns whether it is a jump."""
        if skipped:
            self.tell(f"step {step}: skipped, its gradient is {grad_norm}")
            return False
        times = self.spikes.add(loss)
        if times is None:
            return False
        self.tell(f"step {step}: the loss jumps to {loss:.4g}, {times:.1f} x the usual; gradient {grad_norm:.3g}")
        if self.is_main:
            # Not to trackers: some refuse a step before the last. From the step, its batch can be drawn again.
            with self.spare("metrics", step):
                self.metrics.add(step, {"spike/loss": loss, "spike/times_usual": times, "spike/grad_norm": grad_norm})
        return True

    def report_validation(self, step: int, raw: ValidationResult, averaged: ValidationResult):
        """Scalars to metrics.jsonl and trackers, the tables to validation.jsonl, a line to the console."""
        results = {"raw": raw, "ema": averaged}
        scalars = {name: result.scalars() for name, result in results.items()}
        self.log(step, {f"val_{name}/{key}": value for name in scalars for key, value in scalars[name].items()})
        if self.is_main:
            with self.spare("validation.jsonl", step):
                self.validations.add(step, {name: result.to_json() for name, result in results.items()})
        self.tell(validation_line(step, raw, averaged, self.validated_on))

    def draw(self, step: int):
        """loss.png, and validation.png of the newest validation."""
        if not self.is_main:
            return
        with self.spare("the curves", step):
            newest = self.validations.records()[-1:]
            entropy = newest[0]["ema"]["label_entropy"] if newest else None
            curves = plots.loss_curves(self.metrics.series(), entropy, self.validated_on)
            curves.savefig(self.output_dir / "loss.png")
            if newest:
                title = f"step {newest[0]['step']}, averaged weights, {self.validated_on} images"
                plots.validation_heatmap(newest[0]["ema"], title).savefig(self.output_dir / "validation.png")


def _step_of(line: bytes) -> int | None:
    """Of which step a line is; `None` for one that is no report's."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return None


class JsonLines:
    """A file with a line per report: `{"step": ..., name: value, ...}`.

    Args:
        path: the file; lines after `step` (from a run that went further before it was resumed) are dropped. Of one
            with damaged lines, the whole is kept under another name.
        step: where the run stands.
        tell: prints a line.
    """

    def __init__(self, path: Path, step: int, tell: Callable[[str], None] = print):
        self.path = path
        if path.is_file():
            # A last line without its end is what a killed run was writing.
            lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            steps = [_step_of(line) for line in lines]
            if None in steps:
                damaged = path.with_name(f"{path.name}.damaged_{datetime.now():%Y-%m-%dT%H-%M-%S}")
                shutil.copyfile(path, damaged)
                tell(f"{path.name} has {steps.count(None)} damaged lines, which are left out; as it was: {damaged}")
            kept = b"".join(line for line, at in zip(lines, steps) if at is not None and at <= step)
            replace_file(path, lambda temporary: temporary.write_bytes(kept))

    def add(self, step: int, values: dict):
        size = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError:
            os.truncate(self.path, size)  # half a line would spoil the next one
            raise

    def records(self) -> list[dict]:
        return read_json_lines(self.path)

    def series(self) -> dict[str, list[tuple[int, float]]]:
        """Each value as `[(step, value), ...]`."""
        series: dict[str, list[tuple[int, float]]] = {}
        for record in self.records():
            for name, value in record.items():
                if name != "step":
                    series.setdefault(name, []).append((record["step"], value))
        return series


class Stopwatch:
    """Time spent training since the last report, and how much of it was waiting for data."""

    def __init__(self):
        self.restart()

    def restart(self) -> tuple[float, float]:
        """Seconds of training and, of them, of waiting, since the last restart."""
        now = time.perf_counter()
        result = (now - self._start, self._waited) if hasattr(self, "_start") else (0.0, 0.0)
        self._start, self._waited = now, 0.0
        return result

    @contextmanager
    def waiting(self):
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def pause(self):
        """Validation, previews and saving do not count as training."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start


def progress_line(values: dict[str, float], seconds_left: float) -> str:
    """What a person wants to see of a report: loss, gradient, speed, and how long it will take."""
    parts = []
    if "train/mse" in values:
        parts += [f"loss {values['train/mse']:.4f}", f"gradient {values['train/grad_norm']:.2f}"]
    if values["train/skipped_steps"]:
        parts.append(f"skipped {values['train/skipped_steps']}")
    parts.append(f"{values['images_per_second']:.0f} img/s")
    if values["data_wait"] >= 0.01:
        parts.append(f"{values['data_wait']:.0%} waiting for data")
    parts += [f"{values['memory_gib']:.1f} GiB", f"{timedelta(seconds=round(seconds_left))} left"]
    return "  ".join(parts)


def validation_line(step: int, raw, averaged, validated_on: str = "held-out") -> str:
    """The validation loss of raw and averaged weights, and what the condition tells the averaged model."""
    name = "held-out loss" if validated_on == "held-out" else f"loss on {validated_on} images"
    line = f"step {step}: {name} {raw.loss:.4f}, averaged weights {averaged.loss:.4f}"
    if averaged.null_loss is not None:
        spread = f" +- {averaged.information_se:.1f}" if math.isfinite(averaged.information_se) else ""
        line += (
            f", without condition {averaged.null_loss:.4f}; information about the condition "
            f"{averaged.information:.1f}{spread} nats (its entropy: {averaged.label_entropy:.1f})"
        )
    return line
