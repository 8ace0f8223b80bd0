"""One job per folder: two that train in one would delete each other's checkpoints."""

import atexit
import json
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import TextIO

import psutil


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


NAME = "run.lock"
# Locks of this process. The system takes them back when the process ends, in whatever way.
_held: dict[Path, TextIO] = {}


def lock(folder: Path):
    """Take `folder` for this process, until `unlock_all` or its end. (Again, for one that has it.)

    Whether a process of this machine has it is what the system knows of its file, so one that was killed is in
    nobody's way. A shared disk may keep such locks from other machines: there, what the file says counts.

    Raises:
        ValueError: if another process has it; names it and what to do.
    """
    path = folder.resolve() / NAME
    while path not in _held:
        file = path.open("a+", encoding="utf-8")
        is_free = _try_lock(file)
        owner = _read(file)
        host, process = (owner.get(name) for name in ("host", "process"))
        if host not in (None, socket.gethostname()):
            file.close()
            raise ValueError(
                f"`output_dir` ({folder}) is in use by process {process} on {host}, since {owner.get('since')}: let "
                f"it end, or choose another folder. If it is gone, which cannot be seen from here, delete {path}."
            )
        if is_free is None:  # a disk without locks
            is_free = process in (None, os.getpid()) or not psutil.pid_exists(process)
        if not is_free:
            file.close()
            raise ValueError(
                f"`output_dir` ({folder}) is in use by process {process} of this machine, since "
                f"{owner.get('since')}: let it end, or choose another folder."
            )
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.close()  # its owner has just deleted it, so that the next one would make another
            continue
        _held[path] = file
        file.truncate(0)
        json.dump({"host": socket.gethostname(), "process": os.getpid(), "since": f"{datetime.now():%F %T}"}, file)
        file.flush()


@atexit.register
def unlock_all():
    """Give back every folder that this process has."""
    while _held:
        path, file = _held.popitem()
        with file:
            path.unlink(missing_ok=True)


def _try_lock(file: TextIO) -> bool | None:
    """Whether the system's lock of an open file is ours now; `None` where it has none."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (OSError, AttributeError):
        return None
    return True


def _read(file: TextIO) -> dict:
    file.seek(0)
    try:
        owner = json.load(file)
    except ValueError:  # empty: free
        return {}
    return owner if isinstance(owner, dict) else {}


if hasattr(os, "register_at_fork"):  # a child has its parent's files, and none of its locks
    os.register_at_fork(after_in_child=_held.clear)
