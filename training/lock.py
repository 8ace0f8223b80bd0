"""One job per folder: two that train in one would delete each other's checkpoints."""

import atexit
import json
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TextIO

import psutil


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


NAME = "run.lock"
# Seconds after which an owner touches its file again, and for which that of another machine is watched.
BEAT, WATCH = 15, 90
# Locks of this process. The system takes them back when the process ends, in whatever way.
_held: dict[Path, TextIO] = {}


def lock(folder: Path):
    """Take `folder` for this process, until `unlock_all` or its end. (Again, for one that has it.)

    Whether a process of this machine has it is what the system knows of its file, so one that was killed is in
    nobody's way. A shared disk may keep such locks from other machines: a file that another one has written is
    watched, whether its owner still touches it.

    Raises:
        ValueError: if another process has it; names it and what to do.
    """
    path = folder.resolve() / NAME
    while path not in _held:
        file = path.open("a+", encoding="utf-8")
        is_free = _try_lock(file)
        host, process, since = (_read(file).get(name) for name in ("host", "process", "since"))
        is_here = host in (None, socket.gethostname())
        if is_here and is_free is None:  # a disk without locks
            is_free = process in (None, os.getpid()) or not psutil.pid_exists(process)
        elif not is_here and is_free is not False:
            print(f"{path} is of {host}: watching for {WATCH} s whether that is still at it", flush=True)
            is_free = not _is_touched(path)
        if not is_free:
            file.close()
            owner = f"process {process}, since {since}," if process else "another process"
            raise ValueError(
                f"`output_dir` ({folder}) is in use by {owner} of {'this machine' if is_here else host}: let it end, "
                f"or choose another folder. If it is gone, delete {path}."
            )
        if not _is_at(file, path):
            file.close()  # its owner has just deleted it, so that the next one would make another
            continue
        _held[path] = file
        file.truncate(0)
        json.dump({"host": socket.gethostname(), "process": os.getpid(), "since": f"{datetime.now():%F %T}"}, file)
        file.flush()
        threading.Thread(target=_keep_touching, args=(path, file), daemon=True).start()


@atexit.register
def unlock_all():
    """Give back every folder that this process has."""
    while _held:
        path, file = _held.popitem()
        is_ours = _is_at(file, path)  # not another one's, after somebody deleted it
        with suppress(OSError):  # a disk that can only be read by now
            if fcntl is None:  # no open file can be deleted there
                file.close()
            if is_ours:
                path.unlink()
        file.close()


def _try_lock(file: TextIO) -> bool | None:
    """Whether the system's lock of an open file is ours now; `None` where it has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (OSError, AttributeError):
        return None
    return True


def _read(file: TextIO) -> dict:
    file.seek(0)
    try:
        owner = json.load(file)
    except ValueError:  # empty: free, or just being written
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_at(file: TextIO, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _keep_touching(path: Path, file: TextIO):
    while True:
        time.sleep(BEAT)
        if _held.get(path) is not file:
            return
        with suppress(OSError):
            os.utime(path)


def _is_touched(path: Path) -> bool:
    before, end = path.stat().st_mtime_ns, time.monotonic() + WATCH
    while time.monotonic() < end:
        time.sleep(WATCH / 30)
        with suppress(OSError):
            path.read_bytes()  # what a shared disk keeps in memory is asked for anew with a file that is opened
            if path.stat().st_mtime_ns != before:
                return True
    return False


def _forget():
    while _held:
        _held.popitem()[1].close()


if hasattr(os, "register_at_fork"):  # a child would keep its parent's locks, for as long as it lives
    os.register_at_fork(after_in_child=_forget)
