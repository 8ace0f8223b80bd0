"""How the processes of a run are started, and how it is started again."""

import os
import shlex
import sys
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

from freqgate_dit.devices import bf16_is_fast
from freqgate_dit.training.config import TrainConfig
from freqgate_dit.training.hardware import keep_freed_memory, use_all_cores
from freqgate_dit.training.logbook import check_tracker
from freqgate_dit.training.preflight import refuse_launchers


# One process checks every image of a large set, or writes a large checkpoint, while the others wait.
PATIENCE = timedelta(hours=12)


def start_accelerator(config: TrainConfig) -> Accelerator:
    """The `Accelerator` of this process; precision and accumulation are the configuration's, not the launcher's.

    Raises:
        ValueError: for a tracker that is not installed, or processes that cannot train together.
    """
    refuse_launchers()
    check_tracker(config.report_to)
    if find_spec("matplotlib") is None:
        raise ValueError("the trainer draws its curves with matplotlib: pip install 'freqgate-dit[train]'.")
    accelerator = Accelerator(
        mixed_precision=_mixed_precision(config.mixed_precision),
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=str(Path(config.output_dir) / "logs"),
        # The trainer accumulates by itself; a number from the environment would divide the loss once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    use_all_cores(config.cpu_threads)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise ValueError(
            f"the launcher started {started} processes, but without a GPU each of them would train alone: set "
            "ACCELERATE_USE_CPU=true in the environment for processes on the CPU, or `--num_processes 1`."
        )
    supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in supported:
        raise ValueError(
            f"`accelerate launch` is set to {accelerator.distributed_type.value}, which this trainer does not support "
            "(the weight averages need whole parameters): use one process or plain --multi_gpu."
        )
    return accelerator


def _mixed_precision(choice: str) -> str:
    if choice != "auto":
        return choice
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return "bf16" if bf16_is_fast(device) else "no"


def resume_command(accelerator: Accelerator, output_dir: Path, resume: str) -> str:
    """The command that goes on with the run, launched as it was. (Of several machines, this one's part.)"""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    script = f"-m {module.name}" if module is not None else shlex.quote(sys.argv[0])
    processes = accelerator.num_processes
    launcher = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else "python"
    if processes > 1:
        launcher = f"accelerate launch --multi_gpu --num_processes {processes}"
        machines = processes // int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        if machines > 1:
            launcher += f" --num_machines {machines} --machine_rank RANK --main_process_ip ADDRESS"
        if accelerator.device.type == "cpu":
            launcher = f"ACCELERATE_USE_CPU=true {launcher}"
    return f"{launcher} {script} --config {shlex.quote(str(output_dir / 'config.yaml'))} --resume {resume}"
