"""Uploads while training goes on: in a thread of the main process, one after the other, and never at a run's cost."""

import shlex
import shutil
import threading
from collections.abc import Callable, Container
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from freqgate_dit.hub import push_folder


def push_command(folder: Path, repo_id: str, branch: str | None = None) -> str:
    """The command that uploads a pipeline folder later; to a branch, where `main` may be newer by then."""
    return f"freqgate-dit push {shlex.quote(str(folder))} {repo_id}" + (f" --branch {branch}" if branch else "")


class Pushes:
    """The pipelines of a run's checkpoints on their way to a repository.

    A pipeline lies in `FOLDER/step_00001000` until it is uploaded; it becomes a commit with the folder's name as tag.

    Args:
        repo_id: "user/name", which is there and can be written to.
        folder: where pipelines wait.
        total_steps: of the run, for the commits' messages.
        tell: prints a line.
    """

    def __init__(self, repo_id: str, folder: Path, total_steps: int, tell: Callable[[str], None]):
        self.repo_id = repo_id
        self.folder = folder
        self.total_steps = total_steps
        self.tell = tell
        self._lock = threading.Lock()
        self._waiting: list[int] = []
        self._current: int | None = None
        self._thread: threading.Thread | None = None

    def place(self, step: int) -> Path:
        """Where the pipeline of a step is written before `add`."""
        return self.folder / f"step_{step:08d}"

    def add(self, step: int, kept: Container[int]):
        """Have the pipeline of `step` uploaded. What still waits, but whose checkpoint is not kept, is left out."""
        with self._lock:
            for old in [old for old in self._waiting if old not in kept]:
                self._waiting.remove(old)
                shutil.rmtree(self.place(old), ignore_errors=True)
            self._waiting.append(step)
            if self._thread is None:
                disable_progress_bars()  # they would break the bar of the training
                # A thread that dies with the process: a commit is made whole by the Hub, or not at all.
                self._thread = threading.Thread(target=self._work, name="pushes", daemon=True)
                self._thread.start()

    def _work(self):
        while True:
            with self._lock:
                self._current = self._waiting.pop(0) if self._waiting else None
                if self._current is None:
                    self._thread = None
                    return
            place = self.place(self._current)
            if self.push(place, self._current, push_command(place, self.repo_id, place.name)):
                shutil.rmtree(place, ignore_errors=True)

    def push(self, folder: Path, step: int, later: str) -> str | None:
        """Upload now; the address, or `None` if it could not be done, which is told with the command for `later`."""
        message = f"Step {step} of {self.total_steps}"
        try:
            return push_folder(folder, self.repo_id, commit_message=message, tag=self.place(step).name, tell=self.tell)
        except Exception as error:  # whatever it is, training goes on
            self.tell(f"step {step}: the pipeline was not pushed: {error}\n  push it later with: {later}")
            return None

    def push_last(self, folder: Path, step: int) -> str | None:
        """Wait for what is under way, then upload the finished pipeline; Ctrl-C leaves with the commands for later."""
        later = push_command(folder, self.repo_id)
        try:
            self.wait()
            return self.push(folder, step, later)
        except KeyboardInterrupt:
            self.abandon()
            self.tell(f"step {step}: the finished pipeline is not pushed yet\n  push it later with: {later}")
            raise

    def wait(self):
        """Until everything is uploaded, or has failed."""
        thread = self._thread
        if thread is not None:
            self.tell("waiting for uploads that are under way")
            thread.join()
        enable_progress_bars()

    def abandon(self):
        """Say what is not uploaded yet, as the process ends now."""
        with self._lock:
            left = [*([self._current] if self._thread else []), *self._waiting]
            self._waiting = []
        for step in left:
            self.tell(
                f"step {step}: the pipeline is not pushed yet\n  push it later with: "
                f"{push_command(self.place(step), self.repo_id, self.place(step).name)}"
            )
