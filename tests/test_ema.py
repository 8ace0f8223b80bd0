"""Averages of the weights."""

import pytest
import torch
from components import assert_same_tensors, tiny_transformer

from freqgate_dit.training.ema import NamedEMA


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def nudge(model, amount):
    for parameter in model.parameters():
        parameter.add_(amount)


def test_swapping_restores_the_weights_bit_for_bit():
    model = tiny_transformer()
    ema = NamedEMA(model, decay=0.5)
    nudge(model, 0.1)
    own, average = weights(model), {name: tensor.clone() for name, tensor in ema.tensors().items()}
    with ema.swapped_into(model) as swapped:
        assert swapped is model
        assert_same_tensors(weights(model), average)
    assert_same_tensors(weights(model), own)
    with pytest.raises(KeyboardInterrupt), ema.swapped_into(model):
        raise KeyboardInterrupt
    assert_same_tensors(weights(model), own)
    assert_same_tensors(ema.tensors(), average)


def test_average_follows_its_formula():
    model = tiny_transformer()
    ema = NamedEMA(model, decay=0.3)
    expected = weights(model)
    for n in range(8):
        nudge(model, 0.01 * (n + 1))
        ema.step(model.parameters())
        decay = 0.0 if n == 0 else min(0.3, (1 + n) / (10 + n))
        assert ema.cur_decay_value == pytest.approx(decay)
        expected = {name: decay * value + (1 - decay) * weights(model)[name] for name, value in expected.items()}
        for name, value in ema.tensors().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)
    assert ema.cur_decay_value == pytest.approx(0.3)


def test_average_is_float32_and_feels_small_changes():
    model = tiny_transformer().to(torch.bfloat16)
    ema = NamedEMA(model, decay=0.9999)
    assert {tensor.dtype for tensor in ema.tensors().values()} == {torch.float32}
    model = tiny_transformer()
    ema = NamedEMA(model, decay=0.999)
    ema.optimization_step = 10**6
    before = {name: tensor.clone() for name, tensor in ema.tensors().items()}
    nudge(model, 1e-4)
    for _ in range(100):
        ema.step(model.parameters())
    moved = torch.cat([(ema.tensors()[name] - before[name]).flatten() for name in before])
    # 1 - 0.999^100 of the way, to the rounding of 100 float32 steps.
    assert (moved > 0).float().mean() > 0.99
    assert moved.mean().item() == pytest.approx(1e-4 * (1 - 0.999**100), rel=0.1)


def test_average_goes_out_and_in_by_name():
    model = tiny_transformer()
    ema = NamedEMA(model, decay=0.9)
    for _ in range(3):
        nudge(model, 0.1)
        ema.step(model.parameters())
    assert ema.tensors().keys() == dict(model.named_parameters()).keys() == model.state_dict().keys()
    other = NamedEMA(tiny_transformer(seed=1), decay=0.9)
    # The order of a file's tensors does not matter.
    other.load(dict(reversed(list(ema.tensors().items()))), ema.optimization_step)
    assert_same_tensors(other.tensors(), ema.tensors())
    nudge(model, 0.1)
    ema.step(model.parameters())
    other.step(model.parameters())
    assert_same_tensors(other.tensors(), ema.tensors())
