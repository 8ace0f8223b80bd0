"""Ctrl-C, and signals of queues and of a lost terminal: finish the step, save, leave."""

import contextlib
import os
import signal
import stat
import threading
import time

import torch
from accelerate import Accelerator


def _leave_lost_terminal():
    """Write to nowhere what would go to a terminal that is lost, where every line is an error."""
    with open(os.devnull, "wb") as nowhere:
        for descriptor in (1, 2):
            is_device = stat.S_ISCHR(os.fstat(descriptor).st_mode)
            if is_device and not os.isatty(descriptor):
                os.dup2(nowhere.fileno(), descriptor)


class StopRequest:
    """A context inside which Ctrl-C, SIGTERM, SIGHUP (a dropped connection) and SIGUSR1 (what SLURM's `--signal` is
    usually set to) ask the run to stop instead of ending the process, which is said at once.

    A second Ctrl-C ends a single process at once. With several, the launcher repeats the terminal's signal to each of
    them, so a second one means nothing; nor does a second SIGTERM, which queues send again before they kill. Under
    `nohup`, where SIGHUP is ignored, it stays so.
    """

    SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    # How often processes ask each other whether one of them was signalled, which waits for the device. A launcher
    # kills what still runs 30 s after the signal: where steps are slow, a number of steps alone would be too late.
    MAX_STEPS, SECONDS = 200, 2.0

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received = False
        self._asked_at, self._asked_step, self._ask_step = time.monotonic(), None, 0

    def __enter__(self) -> "StopRequest":
        # Python allows handlers in the main thread only; a trainer run in another one is stopped by its owner.
        in_main_thread = threading.current_thread() is threading.main_thread()
        known = {name: getattr(signal, name) for name in self.SIGNALS if hasattr(signal, name)}  # Windows has two
        if "SIGHUP" in known and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            del known["SIGHUP"]
        numbers = known.values() if in_main_thread else ()
        self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame):
        is_first, self.received = not self.received, True
        alone = self.accelerator.num_processes == 1
        if is_first and self.accelerator.is_main_process:
            again = ", or at once on another Ctrl-C" * alone
            with contextlib.suppress(OSError):  # not `print`, which a signal may have interrupted
                os.write(2, f"\n{signal.Signals(number).name}: stopping and saving after this step{again}\n".encode())
        if signal.Signals(number).name == "SIGHUP":
            _leave_lost_terminal()
        if alone:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self, step: int) -> bool:
        """Whether the run stops after `step`. The same answer in every process, whichever was asked."""
        if self.accelerator.num_processes == 1:
            return self.received
        if step < self._ask_step:
            return False
        # The main process's clock alone counts, so that all ask again at the same step.
        seconds = time.monotonic() - self._asked_at if self.accelerator.is_main_process else 0.0
        answers = torch.tensor([float(self.received), seconds], device=self.accelerator.device)
        received, seconds = self.accelerator.reduce(answers, "sum").tolist()
        taken = 1 if self._asked_step is None else step - self._asked_step
        steps = int(taken * self.SECONDS / max(seconds, 1e-3))
        self._asked_at, self._asked_step = time.monotonic(), step
        self._ask_step = step + min(self.MAX_STEPS, max(1, steps))
        return received > 0
