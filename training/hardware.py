"""What the machine can do."""

import ctypes
import os
import platform

import psutil
import torch

from freqgate_dit.devices import available_cores


def use_all_cores(threads: int | None = None):
    """Use `threads` CPU threads, by default all that it may use, shared by the processes of this machine.

    OMP_NUM_THREADS is obeyed unless it is 1: `accelerate launch` sets it to 1 when it is not told otherwise, which
    would leave the cores idle.
    """
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    asked_for = int(os.environ.get("OMP_NUM_THREADS", "1").split(",")[0] or 1)
    shared = max(1, available_cores() // local_processes)
    torch.set_num_threads(threads or (asked_for if asked_for > 1 else shared))


def keep_freed_memory():
    """Have the C library keep memory that is freed, instead of giving it back to the system.

    A training step frees the activations that the next one allocates again. Given back in between, every page of them
    is taken from the system anew, at the cost of a page fault (measured by benchmarks/freed_memory.py). Only glibc is
    asked, and not if the environment has settings of its own for it (`MALLOC_*`, `GLIBC_TUNABLES`).
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    # The constants of malloc.h: no trimming of the heap, no mappings of their own for large tensors.
    trim_threshold, mmap_max = -1, -4
    libc.mallopt(trim_threshold, -1)
    libc.mallopt(mmap_max, 0)


def memory_bytes(device: torch.device) -> int:
    """Most memory that tensors on a GPU have taken so far; on a CPU, what the process has in memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def wait_for(device: torch.device):
    """Return when the device has done what was asked of it. (A CPU has done it at once.)"""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
