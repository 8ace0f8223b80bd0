"""What can be known before step 1: a launcher that is not supported, a disk too small, a folder that is not free."""

import math
import shutil
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env

from freqgate_dit.files import refuse_to_replace
from freqgate_dit.pipeline_folder import INDEX
from freqgate_dit.training.checkpoints import checkpoint_folders, complete_checkpoints
from freqgate_dit.training.config import TrainConfig, TrainingRun, is_run_folder
from freqgate_dit.training.data import BUILT_IN
from freqgate_dit.training.ema import EMAProfile


# What `accelerate launch` sets for strategies that split the parameters or come with an engine of their own.
UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
# What a run writes that grows with the model, and all that it would replace or go on with.
LARGE_FOLDERS = ("checkpoints", "ema_snapshots", "pipeline", "pushing")
WRITTEN = (*LARGE_FOLDERS, "previews", "metrics.jsonl", "validation.jsonl", "loss.png", "validation.png")


def refuse_launchers():
    """Raise if `accelerate launch` was told to split the model over processes.

    Raises:
        ValueError: names the strategy and what to use instead.
    """
    for variable, name in UNSUPPORTED.items():
        if parse_flag_from_env(variable):
            raise ValueError(
                f"`accelerate launch` is set to {name}, which this trainer does not support, because its weight "
                "averages and checkpoints need whole parameters: use one process or plain --multi_gpu."
            )


def run_bytes(
    model: torch.nn.Module,
    total_steps: int,
    config: TrainConfig,
    *others: torch.nn.Module | None,
    pushed: bool = False,
) -> int:
    """Most bytes that a run has on disk at one time: checkpoints, snapshots of the averages, pipeline.

    `others` are the parts of the pipeline besides `model`: autoencoder, text encoder. With `pushed`, pipelines of the
    kept checkpoints wait to be uploaded. A tenth on top is for metrics and pictures.
    """
    weights = weight_bytes(model)
    # A checkpoint has weights, two moments of AdamW, and the averages.
    checkpoint = (3 + len(config.ema)) * weights
    kept = config.keep_checkpoints + (total_steps // config.keep_every if config.keep_every else 0)
    # One more is there while the next is written, or because the run was interrupted.
    checkpoints = min(kept, math.ceil(total_steps / config.save_every)) + 1
    snapshots = min(config.ema_snapshots, total_steps) * sum(EMAProfile.parse(name).is_power for name in config.ema)
    pipeline = weights + sum(weight_bytes(other) for other in others if other is not None)
    pipelines = 1 + checkpoints * pushed
    return int(1.1 * (checkpoints * checkpoint + snapshots * weights + pipelines * pipeline))


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def check_disk(output_dir: Path, needed: int):
    """Raise if the disk of `output_dir` has no room for the `needed` bytes of a whole run.

    What an earlier part of the run has written counts as paid; what else lies in `output_dir` does not.

    Raises:
        ValueError: names the folder, both numbers and what to do.
    """
    place = next(folder for folder in (output_dir.absolute(), *output_dir.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    files = [path for name in LARGE_FOLDERS for path in (output_dir / name).rglob("*") if path.is_file()]
    missing = needed - sum(path.stat().st_size for path in files)
    if missing > free:
        raise ValueError(
            f"`output_dir` ({output_dir}) needs up to {gib(missing)} more for checkpoints, snapshots of the weight "
            f"averages and the pipeline, but its disk has {gib(free)} free: choose another folder, make room, lower "
            "`keep_checkpoints`, `ema_snapshots` or the number of averages in `ema`, or unset or raise `keep_every`."
        )


def refuse_other_folder(output_dir: Path, resume: str | None):
    """Raise unless `output_dir` is free for a new run, or holds the one that is resumed.

    Raises:
        ValueError, FileExistsError: names the folder, what it holds and what to do.
    """
    checkpoints = output_dir / "checkpoints"
    is_run = is_run_folder(output_dir)
    is_inside = resume in ("latest", "auto") or checkpoints.resolve() in Path(resume or "").resolve().parents
    if is_run and not resume:
        remedy = (
            "go on with `--resume latest`"
            if checkpoint_folders(checkpoints)
            else "start it again with `--resume auto`, as it has no checkpoint yet"
        )
        raise ValueError(
            f"`output_dir` ({output_dir}) holds another run: choose another folder, delete it, or {remedy}."
        )
    if is_run and not is_inside:
        raise ValueError(
            f"`output_dir` ({output_dir}) holds a run, whose checkpoints would give way to what goes on from `resume` "
            f"({resume}): choose another folder, or, if it is of this run, copy it to {checkpoints}."
        )
    goes_on = is_inside and (is_run or complete_checkpoints(checkpoints))
    found = [name for name in ("config.yaml", *WRITTEN) if (output_dir / name).exists()]
    if found and not goes_on:
        raise ValueError(
            f"`output_dir` ({output_dir}) holds {', '.join(found)}, which a run would replace, and no config.yaml of "
            "a run, which every run has: choose another folder, or move that away."
        )
    refuse_to_replace(output_dir / "pipeline", INDEX)


def refuse_writing_into_data(config: TrainingRun):
    """Raise if the run would write below the folder of its images: its previews would be images of the next run.

    Raises:
        ValueError: names the option, both folders and what to do.
    """
    data = Path(config.data.dataset).expanduser()
    if config.data.dataset == BUILT_IN or not data.is_dir():
        return
    for name, place in (("output_dir", config.train.output_dir), ("cache_dir", config.latents.cache_dir)):
        folder = Path(place).expanduser().resolve()
        if data.resolve() in (folder, *folder.parents):
            raise ValueError(
                f"`{name}` ({place}) lies in the folder of the images (`dataset` {config.data.dataset}), where "
                "pictures of a run would count as images: name a folder elsewhere."
            )


def gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
