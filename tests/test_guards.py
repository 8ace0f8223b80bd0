"""Skipped updates are as if they had never been; spikes are found, and only spikes."""

import itertools

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from freqgate_dit.training.guards import SpikeDetector, UpdateGuard


# -- UpdateGuard ------------------------------------------------------------------------------------------------------

BAD = (float("nan"), float("inf"), float("-inf"))


class Training:
    """A small model under the guard, trained on a batch per number; `prepare` as the trainer does."""

    def __init__(self, prepare: bool = False, patience: int = 10):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.GELU(), torch.nn.Linear(5, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, weight_decay=0.1, fused=True)
        self.guard = UpdateGuard(self.optimizer, torch.device("cpu"), patience)
        self.accelerator = Accelerator(cpu=True) if prepare else None
        self.stepper = self.accelerator.prepare(self.optimizer) if prepare else self.optimizer

    def step(self, number: int, bad: float | None = None) -> float:
        """Train on the batch `number`; `bad` replaces an element of the gradient. Returns whether it was skipped."""
        batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
        self.model(batch).square().mean().backward()
        if bad is not None:
            self.model[0].weight.grad[number % 5, number % 6] = bad
        clip = self.accelerator.clip_grad_norm_ if self.accelerator else torch.nn.utils.clip_grad_norm_
        skipped = self.guard.check(clip(self.model.parameters(), 1.0))
        self.stepper.step()
        self.stepper.zero_grad(set_to_none=True)
        return skipped.item()

    def state(self) -> list[torch.Tensor]:
        """Every weight and all of the optimiser's state."""
        parameters = list(self.model.parameters())
        entries = [entry for parameter in parameters for entry in self.optimizer.state[parameter].values()]
        return [tensor.detach().clone() for tensor in [*parameters, *entries]]


def assert_equal(one: list[torch.Tensor], other: list[torch.Tensor]):
    assert len(one) == len(other) and all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


@pytest.mark.parametrize("prepare", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize("bad", BAD)
def test_a_skipped_step_changes_no_bit(prepare, bad):
    training = Training(prepare)
    for number in range(3):
        assert training.step(number) == 0.0
    before = training.state()
    assert training.step(3, bad) == 1.0
    assert_equal(training.state(), before)
    # The next one is taken, whatever the bad gradient was.
    assert training.step(4) == 0.0
    assert not any(torch.equal(one, other) for one, other in zip(training.state(), before, strict=True))


@pytest.mark.parametrize("prepare", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize("seed", range(5))
def test_skipped_steps_are_counted_and_leave_the_run_of_the_others(prepare, seed):
    random = np.random.default_rng(seed)
    pattern = random.random(40) < 0.5  # also at the first step, before the optimiser has a state
    training, clean = Training(prepare), Training()
    for number, bad in enumerate(pattern):
        assert training.step(number, BAD[number % 3] if bad else None) == bad
        if not bad:
            clean.step(number)
        rows = [len(list(group)) if value else 0 for value, group in itertools.groupby(pattern[: number + 1])]
        assert training.guard.counts() == (pattern[: number + 1].sum(), rows[-1], max(rows))
    assert_equal(training.state(), clean.state())


def test_a_first_step_that_is_skipped_leaves_an_untouched_optimizer():
    training = Training()
    weights = [parameter.detach().clone() for parameter in training.model.parameters()]
    training.step(0, float("nan"))
    after = training.state()
    assert_equal(after[: len(weights)], weights)
    assert all((tensor == 0).all() for tensor in after[len(weights) :])


def test_patience_ends_the_run_and_says_what_to_do():
    training = Training(patience=3)
    for number, bad in enumerate([True, True, False, True, True]):  # four of five, but never three in a row
        training.step(number, float("nan") if bad else None)
    training.guard.stop_if_lost(5, 0.01)
    training.step(5, float("inf"))
    training.step(6)  # it is seen at the next report only, maybe after the row
    with pytest.raises(FloatingPointError) as stop:
        training.guard.stop_if_lost(7, 0.01)
    message = str(stop.value)
    assert "3 steps in a row" in message and "step 7" in message
    assert "`learning_rate` (0.01)" in message and "`--resume auto`" in message and "`qk_norm`" in message


# -- SpikeDetector ----------------------------------------------------------------------------------------------------


def losses(seed: int, count: int, noise: float = 0.05, level: float = 0.2) -> np.ndarray:
    return level * np.exp(noise * np.random.default_rng(seed).standard_normal(count))


def spikes(detector: SpikeDetector, values) -> list[int]:
    return [index for index, value in enumerate(values) if detector.add(value) is not None]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [0.03, 0.1, 0.3])
def test_a_falling_noisy_loss_has_no_spike(noise, seed):
    curve = 0.1 + 0.9 * np.exp(-np.arange(5000) / 300)
    assert spikes(SpikeDetector(), curve * losses(seed, 5000, noise, level=1.0)) == []
    # What single batches have: a skewed spread, here of 8 and of 30 degrees of freedom.
    for shape in (4, 15):
        assert spikes(SpikeDetector(), curve * np.random.default_rng(seed).gamma(shape, 1 / shape, 5000)) == []


@pytest.mark.parametrize("seed", range(4))
def test_a_jump_to_twice_the_loss_is_found_and_measured(seed):
    detector = SpikeDetector()
    values = losses(seed, 1000)
    jumps = [150, 151, 400, 999]
    values[jumps] *= 2
    reported = {index: times for index, value in enumerate(values) if (times := detector.add(value)) is not None}
    assert list(reported) == jumps
    assert all(1.6 < times < 2.4 for times in reported.values())


def test_nothing_is_reported_before_the_usual_is_known():
    values = losses(0, 100)
    values[50] *= 100
    detector = SpikeDetector(memory=100)
    assert spikes(detector, values) == []


def test_a_constant_loss_needs_half_as_much_again():
    detector = SpikeDetector()
    assert spikes(detector, [0.2] * 200) == []
    assert detector.add(0.29) is None
    assert detector.add(0.31) == pytest.approx(1.55, rel=0.02)


@pytest.mark.parametrize("jump", [2, 10, 1000])
def test_a_plateau_becomes_the_usual_loss(jump):
    detector = SpikeDetector()
    assert spikes(detector, losses(0, 500)) == []
    found = spikes(detector, jump * losses(1, 1000))
    # It is told, a few times, and then it is how things are.
    assert found[0] == 0 and len(found) < 30 and found[-1] < 30
    assert detector.add(jump * 0.2 * 10) is not None


@pytest.mark.parametrize("gap", [1, 10, 50])
@pytest.mark.parametrize("first", [2, 1000])
def test_a_spike_does_not_hide_the_next(first, gap):
    detector = SpikeDetector()
    values = losses(0, 500)
    values[400] *= first
    values[400 + gap] *= 2
    assert spikes(detector, values) == [400, 400 + gap]
