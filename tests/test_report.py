"""Cost, metrics, learning rate, threads."""

import json
import os
import platform
import resource
import sys

import pytest
import torch
from components import tiny_transformer
from tiny_runs import ROOT, run

from freqgate_dit.cost import count_parameters, flops_per_forward
from freqgate_dit.training.config import TrainConfig
from freqgate_dit.training.hardware import available_cores, use_all_cores
from freqgate_dit.training.logbook import JsonLines, tracker_arguments
from freqgate_dit.training.schedules import learning_rate


@pytest.mark.parametrize("arguments", [{}, {"num_classes": None}, {"num_classes": None, "pooled_projection_dim": 16}])
def test_flops_are_those_of_a_real_forward_pass(arguments):
    model = tiny_transformer(**arguments)
    config, tokens, width = model.config, 16, 32
    block = tokens * (4 * width**2 + 2 * 4 * width**2) + 2 * tokens**2 * width + 6 * width**2
    inputs = tokens * config.in_channels * 4 * width + (256 * width + width**2)
    inputs += 16 * width if config.pooled_projection_dim else 0
    output = 2 * width**2 + tokens * width * 16
    assert flops_per_forward(model) == 2 * (2 * block + inputs + output)
    assert count_parameters(model) == sum(value.numel() for value in model.state_dict().values())


def test_metrics_go_on_where_the_run_does(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = JsonLines(path, 0)
    for step in (0, 10, 20, 30):
        metrics.add(step, {"loss": float(step), **({"val": 1.0} if step % 20 == 0 else {})})
    # Killed in the middle of a line.
    with path.open("a") as file:
        file.write('{"step": 40, "lo')
    metrics = JsonLines(path, 20)
    metrics.add(30, {"loss": -1.0})
    assert metrics.series() == {"loss": [(0, 0.0), (10, 10.0), (20, 20.0), (30, -1.0)], "val": [(0, 1.0), (20, 1.0)]}
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 10, 20, 30]


# -- learning rate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate(schedule):
    config = TrainConfig(max_steps=100, learning_rate=2.0, warmup_steps=10, lr_schedule=schedule)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0
    if schedule == "constant":
        assert set(rates[10:]) == {2.0}
    else:
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.03


# -- hardware ---------------------------------------------------------------------------------------------------------


def test_threads_are_those_granted_and_shared_by_the_processes(monkeypatch):
    threads = torch.get_num_threads()
    try:
        # A batch system's grant on a larger machine; systems without affinity fall back to all cores.
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
        for processes, expected in ((1, 4), (2, 2), (8, 1)):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
            use_all_cores()
            assert torch.get_num_threads() == expected
        monkeypatch.delattr(os, "sched_getaffinity")
        assert available_cores() == os.cpu_count()
    finally:
        torch.set_num_threads(threads)


def test_freed_memory_is_kept(tmp_path):
    """Tensors of 64 MB, again and again: soon their pages are there, unless the environment says otherwise."""
    script = """
import resource, torch
from freqgate_dit.training.hardware import keep_freed_memory
torch.set_num_threads(1)
keep_freed_memory()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    for _ in range(5):
        torch.ones(2**24).add(1)
work()
before = faults()
work()
print(faults() - before)
"""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc is asked")
    kept = int(run(sys.executable, "-c", script, PYTHONPATH=str(ROOT)).stdout)
    given_back = int(run(sys.executable, "-c", script, PYTHONPATH=str(ROOT), MALLOC_MMAP_THRESHOLD_="65536").stdout)
    # Every page of ten tensors; and some, as the heap is cut differently and the kernel may reclaim what lies idle.
    assert given_back >= 10 * 2**26 // resource.getpagesize() and kept < given_back / 2


def test_a_tracker_goes_on_with_the_run_of_its_folder(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    first = tracker_arguments("wandb", folder, step=0)
    assert first["name"] == "mine" and first["resume"] == "allow"
    assert tracker_arguments("wandb", folder, step=5) == first
    assert tracker_arguments("wandb", folder, step=0)["id"] != first["id"]  # a new run in the same folder
    assert [tracker_arguments("trackio", folder, step)["resume"] for step in (0, 5)] == ["never", "allow"]
    assert tracker_arguments("tensorboard", folder, step=5) == {}
