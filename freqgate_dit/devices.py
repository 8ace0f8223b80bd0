"""What there is to compute with, and which device and precision to choose."""

import os

import torch


# By the names that a user gives; "auto" leaves the choice to `choose_dtype`.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device has bf16 matrix units: CUDA since Ampere, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported()
    return False


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch has no memory left: of a GPU, or of the CPU, whose allocator has no exception of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def available_cores() -> int:
    """Cores that this process may run on: a batch system or a container often grants a part of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def accelerators() -> list[torch.device]:
    """GPUs and the like that torch can use, such as cuda:0, cuda:1, or mps:0."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if kind is not None else 0
    return [torch.device(kind.type, index) for index in range(count)]


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name ("cpu", "cuda", "cuda:1", "mps"); for "auto" the first accelerator, or else the CPU.

    Raises:
        ValueError: for a device that is not there; names those that are.
    """
    there = [torch.device("cpu"), *accelerators()]
    if name == "auto":
        return there[:2][-1]
    for device in there:
        if name in (device.type, str(device)):
            return device
    names = ", ".join(map(str, there))
    raise ValueError(f"`device` ({name}) is not there: torch {torch.__version__} finds {names} on this machine.")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name in `DTYPES`; for "auto" bfloat16 where it is fast, or else float32."""
    if name == "auto":
        return torch.bfloat16 if bf16_is_fast(device) else torch.float32
    return DTYPES[name]


def describe_machine() -> dict:
    """What torch finds, as JSON can hold it."""
    return {
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "instructions": "AMX" if torch.cpu._is_amx_tile_supported() else torch.backends.cpu.get_cpu_capability(),
        "cuda_build": torch.version.cuda,
        "fast_bf16": [str(device) for device in (torch.device("cpu"), *accelerators()) if bf16_is_fast(device)],
        "accelerators": {str(device): _describe(device) for device in accelerators()},
    }


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return "available"
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
        f"{properties.major}.{properties.minor}"
    )
