"""Checkpoints that are complete or do not count.

A checkpoint is a folder `step_00001000` with safetensors and JSON. It is written under a temporary name, its manifest
(size and SHA-256 of every file) last, and renamed when it is complete; older ones are deleted only after that.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


MANIFEST = "manifest.json"
NAME = re.compile(r"step_(\d{8})")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class Checkpoint:
    """Content of a checkpoint: groups of named tensors (a file each) and a JSON state with the key "step"."""

    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict

    def save(self, folder: Path, keep: int) -> Path:
        """Write into `folder`; of the complete checkpoints keep this one and the `keep - 1` before it."""
        target = folder / f"step_{self.state['step']:08d}"
        temporary = folder / f"{target.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, group in self.tensors.items():
            save_file(
                {key: tensor.detach().cpu().contiguous() for key, tensor in group.items()},
                temporary / f"{name}.safetensors",
            )
        (temporary / "state.json").write_text(json.dumps(self.state, indent=2))
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in temporary.iterdir()}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2))
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        complete = complete_checkpoints(folder)
        newest = complete.index(target)
        # What lies beyond this step was left behind when the run was resumed from an earlier one.
        for old in complete[: max(0, newest + 1 - keep)] + complete[newest + 1 :]:
            shutil.rmtree(old)
        return target


def why_incomplete(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words; `None` if it is complete (by name and size)."""
    if not folder.is_dir():
        return "is not a folder"
    if not (folder / MANIFEST).is_file():
        return f"has no {MANIFEST}: it was not written to the end"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except ValueError:
        return f"has a damaged {MANIFEST}"
    for name, entry in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size != entry["bytes"]:
            return f"has {name} with {path.stat().st_size} bytes instead of {entry['bytes']}"
    return None


def checkpoint_folders(folder: Path) -> list[Path]:
    """Folders named like checkpoints, oldest step first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))


def complete_checkpoints(folder: Path) -> list[Path]:
    return [path for path in checkpoint_folders(folder) if why_incomplete(path) is None]


def find_checkpoint(resume: str, folder: Path) -> Path:
    """The checkpoint that `resume` means: a path, or "latest" for the newest complete one in `folder`.

    Raises:
        ValueError: if there is none, or the one named is incomplete; says what is wrong and which could be used.
    """
    complete = complete_checkpoints(folder)
    usable = f"Complete checkpoints of this run: {[str(path) for path in complete]}."
    if resume != "latest":
        path = Path(resume)
        problem = why_incomplete(path)
        if problem:
            raise ValueError(f"`resume` ({resume}) {problem}. {usable} `--resume latest` takes the newest.")
        return path
    for path in checkpoint_folders(folder):
        problem = why_incomplete(path)
        if problem:
            print(f"skipping checkpoint {path.name}: it {problem}")
    if not complete:
        raise ValueError(
            f"`resume` is 'latest', but {folder} has no complete checkpoint: start without `--resume`, in a "
            "folder that holds no run."
        )
    return complete[-1]


def load_checkpoint(folder: Path, device) -> Checkpoint:
    """Read a checkpoint whole, its checksums verified.

    Raises:
        ValueError: if a file is damaged; names it.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, entry in manifest.items():
        if sha256(folder / name) != entry["sha256"]:
            raise ValueError(
                f"{folder.name}/{name} is damaged (its checksum differs): resume from another checkpoint."
            )
    tensors = {path.stem: load_file(path, device=str(device)) for path in folder.glob("*.safetensors")}
    return Checkpoint(tensors, json.loads((folder / "state.json").read_text()))


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
        optimizer.state[parameters[name]][entry] = value
