"""Checkpoints that are complete or do not count.

A checkpoint is a folder `step_00001000` with safetensors and JSON. It is written under a temporary name, its manifest
(size and SHA-256 of every file) last, and renamed when it is complete; older ones are deleted only after that.
Whenever the process dies, what has the name of a checkpoint is one.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from freqgate_dit.files import left_behind, replace_folder


MANIFEST = "manifest.json"
STATE = "state.json"
NAME = re.compile(r"step_(\d{8})")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CheckpointError(OSError):
    """A checkpoint could not be written. Earlier ones are as they were, and so is the run in memory."""


@dataclass
class Checkpoint:
    """Content of a checkpoint: groups of named tensors (a file each) and a JSON state with the key "step"."""

    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict

    def save(self, folder: Path, keep: int, keep_every: int | None = None) -> Path:
        """Write into `folder`, then delete older checkpoints.

        Kept are this one, the `keep - 1` complete ones before it, and those whose step is a multiple of `keep_every`.

        Raises:
            CheckpointError: if it cannot be written, for want of space, say; nothing was deleted then.
        """
        target = folder / f"step_{self.state['step']:08d}"
        try:
            _clear_up(folder)
            replace_folder(target, self._write, MANIFEST)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"checkpoint {target.name} could not be written ({error}). Complete ones are untouched: "
                f"{[path.name for path in complete_checkpoints(folder)]}. Make room where `output_dir` lies"
            ) from error
        _rotate(folder, target, keep, keep_every)
        return target

    def _write(self, folder: Path):
        for name, group in self.tensors.items():
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}
            save_file(tensors, folder / f"{name}.safetensors")
        (folder / STATE).write_text(json.dumps(self.state, indent=2))
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in folder.iterdir()}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))


def _clear_up(folder: Path):
    """Delete what a killed save or rotation has left, of this step or of another."""
    _undo_unfinished_replacement(folder)
    for leftover in left_behind(folder, NAME.pattern):
        shutil.rmtree(leftover, ignore_errors=True)  # what stays is in nobody's way


def _undo_unfinished_replacement(folder: Path):
    """A run killed between the two renames of `replace_folder` has left its checkpoint under the other name."""
    for replaced in left_behind(folder, NAME.pattern):
        target = folder / replaced.name.split(".")[0]
        if replaced.suffix == ".replaced" and not target.exists():
            with suppress(FileNotFoundError):  # another process of the run was faster
                os.replace(replaced, target)


def _rotate(folder: Path, newest: Path, keep: int, keep_every: int | None):
    complete = complete_checkpoints(folder)
    place = complete.index(newest)
    # What lies beyond this step was left behind when the run was resumed from an earlier one.
    for old in complete[: max(0, place + 1 - keep)] + complete[place + 1 :]:
        step = step_of(old)
        if step > step_of(newest) or not keep_every or step % keep_every:
            _delete(old)


def _delete(checkpoint: Path):
    """Its name goes first: killed in the middle, this leaves no half checkpoint. The next save deletes the rest."""
    with suppress(OSError):  # a folder that cannot be deleted is no reason to lose the run
        doomed = checkpoint.with_name(f"{checkpoint.name}.{uuid.uuid4().hex[:8]}.tmp")
        os.replace(checkpoint, doomed)
        shutil.rmtree(doomed)


def step_of(folder: Path) -> int:
    return int(NAME.fullmatch(folder.name)[1])


def why_incomplete(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words; `None` if it is complete (by name and size)."""
    if not folder.is_dir():
        return "is not a folder"
    if not (folder / MANIFEST).is_file():
        return f"has no {MANIFEST}: it was not written to the end"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sizes = {name: int(entry["bytes"]) for name, entry in manifest.items()}
    except (ValueError, OSError, TypeError, KeyError, AttributeError):
        return f"has a damaged {MANIFEST}, or another program's"
    if STATE not in sizes:
        return f"has a {MANIFEST} without {STATE}: it is another program's"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size != size:
            return f"has {name} with {path.stat().st_size} bytes instead of {size}"
    return None


def why_damaged(folder: Path) -> str | None:
    """What is wrong with the content of a complete checkpoint, in words; `None` if all checksums agree."""
    manifest = json.loads((folder / MANIFEST).read_text())
    try:
        damaged = [name for name, entry in manifest.items() if sha256(folder / name) != entry.get("sha256")]
    except OSError as error:
        return f"cannot be read ({error})"
    return f"has a damaged {', '.join(damaged)} (another checksum)" if damaged else None


def checkpoint_folders(folder: Path) -> list[Path]:
    """Folders named like checkpoints, oldest step first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))


def complete_checkpoints(folder: Path) -> list[Path]:
    return [path for path in checkpoint_folders(folder) if why_incomplete(path) is None]


def find_checkpoint(resume: str, folder: Path, tell: Callable[[str], None] = print) -> Path | None:
    """The checkpoint that `resume` means: a path, or "latest" for the newest whole one in `folder`.

    "auto" is "latest" for jobs that are started again and again: `None` while there is no checkpoint whatever.
    Those that are passed over, because they are incomplete or damaged, are told to `tell`.

    Raises:
        ValueError: if there is none, or the one named is not whole; says what is wrong and which could be used.
    """
    _undo_unfinished_replacement(folder)
    if resume not in ("latest", "auto"):
        path = Path(resume)
        problem = why_incomplete(path) or why_damaged(path)
        if problem:
            usable = f"Complete checkpoints of this run: {[str(path) for path in complete_checkpoints(folder)]}."
            raise ValueError(f"`resume` ({resume}) {problem}. {usable} `--resume latest` takes the newest.")
        return path
    folders = checkpoint_folders(folder)
    if not folders:
        if resume == "auto":
            return None
        raise ValueError(
            f"`resume` is {resume!r}, but {folder} has no checkpoint yet: `--resume auto` starts at step 0 then."
        )
    for path in reversed(folders):
        problem = why_incomplete(path) or why_damaged(path)
        if problem is None:
            return path
        tell(f"skipping checkpoint {path.name}: it {problem}")
    raise ValueError(
        f"`resume` is {resume!r}, but {folder} has no complete checkpoint; the oldest, {path.name}, {problem}. Bring "
        "one back from a copy, or start anew in another `output_dir`."
    )


def load_checkpoint(folder: Path, device) -> Checkpoint:
    """Read a checkpoint that `find_checkpoint` has found to be whole."""
    device = torch.device(device)
    # safetensors knows no "cpu:0", which is the device of one CPU process among several.
    device = device.type if device.type == "cpu" else str(device)
    tensors = {path.stem: load_file(path, device=device) for path in folder.glob("*.safetensors")}
    return Checkpoint(tensors, json.loads((folder / STATE).read_text()))


def average_group(name: str) -> str:
    """Group, and so file, of the weight average `name`. (A colon is no part of a file name everywhere.)"""
    return "ema-" + name.replace(":", "-")


# -- AdamW by parameter name ---------------------------------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """State of an optimiser over `model.parameters()` as `{"<parameter>/<entry>": tensor}`."""
    return {
        f"{name}/{entry}": value
        for name, parameter in model.named_parameters()
        for entry, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: torch.nn.Module, tensors: dict[str, torch.Tensor]):
    """Inverse of `optimizer_tensors`."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, entry = key.rsplit("/", 1)
        # A copy: on a CPU the tensors of a checkpoint are its file mapped into memory, and rotation will delete it.
        optimizer.state[parameters[name]][entry] = value.clone()
