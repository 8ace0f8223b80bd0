"""One job per folder."""

import json
import multiprocessing
import os
import threading

import pytest

from freqgate_dit.training import lock as locking
from freqgate_dit.training.lock import lock, unlock_all


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(locking, "BEAT", 0.02)
    monkeypatch.setattr(locking, "WATCH", 0.3)
    yield
    unlock_all()


def write(folder, **owner):
    (folder / "run.lock").write_text(json.dumps({"host": None, "process": None, "since": "now", **owner}))


def owner(folder):
    return json.loads((folder / "run.lock").read_text())["process"]


def test_the_file_of_another_machine_counts_as_long_as_it_is_touched(tmp_path):
    """A container or node has another name after it was started again, and nobody is left to delete the file."""
    write(tmp_path, host="elsewhere", process=7)
    stop = threading.Event()

    def touch():
        while not stop.wait(0.02):
            os.utime(tmp_path / "run.lock")

    other = threading.Thread(target=touch)
    other.start()
    try:
        with pytest.raises(ValueError, match=r"process 7, since now, of elsewhere.*delete .*run.lock"):
            lock(tmp_path)
    finally:
        stop.set()
        other.join()
    lock(tmp_path)
    assert owner(tmp_path) == os.getpid()
    assert locking._is_touched(tmp_path / "run.lock")  # as its owner does from now on


def test_a_disk_without_locks(tmp_path, monkeypatch):
    """There the processes of this machine are known by their numbers."""
    monkeypatch.setattr(locking, "fcntl", None)
    write(tmp_path, process=os.getppid())
    with pytest.raises(ValueError, match=f"process {os.getppid()}, since now, of this machine"):
        lock(tmp_path)
    write(tmp_path, process=2**22 + 1)  # more than there can be
    lock(tmp_path)
    assert owner(tmp_path) == os.getpid()


def test_only_ones_own_file_is_deleted(tmp_path):
    lock(tmp_path)
    (tmp_path / "run.lock").read_text()  # whoever else reads it, it stays locked
    (tmp_path / "run.lock").unlink()
    write(tmp_path, process=7)
    unlock_all()
    assert owner(tmp_path) == 7


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_does_not_keep_the_lock(tmp_path):
    lock(tmp_path)
    release = multiprocessing.get_context("fork").Event()
    child = multiprocessing.get_context("fork").Process(target=release.wait)
    child.start()
    try:
        unlock_all()
        lock(tmp_path)
    finally:
        release.set()
        child.join()
