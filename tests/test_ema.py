"""Averages of the weights."""

import json

import numpy as np
import pytest
import torch
from components import assert_same_tensors, tiny_transformer

from freqgate_dit.training.ema import EMAProfile, WeightAverages, gamma_to_sigma_rel, sigma_rel_to_gamma


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def copies(averages):
    return {name: {key: t.clone() for key, t in averages.tensors(name).items()} for name in averages.profiles}


@torch.no_grad()
def nudge(model, amount):
    for parameter in model.parameters():
        parameter.add_(amount)


@torch.no_grad()
def walk(model, averages, steps, seed=0):
    """Random steps of the weights, each followed by an update."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        averages.update()


# -- profiles ------------------------------------------------------------------------------------------------------


def test_gamma_and_sigma_rel_are_inverse():
    for gamma in (1e-3, 0.5, 6.94, 16.97, 300.0):
        assert sigma_rel_to_gamma(gamma_to_sigma_rel(gamma)) == pytest.approx(gamma, rel=1e-6)
    for sigma_rel in (0.002, 0.05, 0.1, 0.25, 0.2886):
        assert gamma_to_sigma_rel(sigma_rel_to_gamma(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-6)


def test_sigma_rel_is_the_standard_deviation_of_the_profile():
    gamma = sigma_rel_to_gamma(0.1)
    tau = (np.arange(100_000) + 0.5) / 100_000
    density = (gamma + 1) * tau**gamma / 100_000
    mean = (density * tau).sum()
    assert np.sqrt((density * (tau - mean) ** 2).sum()) == pytest.approx(0.1, rel=1e-6)


def test_profiles_are_read_into_one_spelling():
    constant, power = EMAProfile.parse("0.99990"), EMAProfile.parse("power:0.10")
    assert constant == EMAProfile("0.9999", decay=0.9999) and not constant.is_power
    assert power == EMAProfile("power:0.1", gamma=sigma_rel_to_gamma(0.1)) and power.is_power
    for profile in (constant, power, EMAProfile.parse("0")):
        assert EMAProfile.parse(profile.name) == profile


@pytest.mark.parametrize(
    "text",
    [
        "1",
        "-0.1",
        "nan",
        "",
        "fast",
        "power",
        "power:",
        ":0.5",
        "power:0",
        "power:0.2887",
        "linear:0.1",
        "power:power:0.1",
    ],
)
def test_bad_profile_is_refused(text):
    with pytest.raises(ValueError, match=r"^`ema` has '" + text + r"'.*\[0, 1\).*power:SIGMA_REL"):
        EMAProfile.parse(text)


def test_bad_sigma_rel_is_refused():
    for sigma_rel in (0.0, -0.1, 0.3, float("nan")):
        with pytest.raises(ValueError, match=f"`sigma_rel` \\({sigma_rel}\\)"):
            sigma_rel_to_gamma(sigma_rel)


@pytest.mark.parametrize("profiles", [[], ["0.9", "power:0.1", "0.90"]])
def test_no_profile_and_one_profile_twice_are_refused(profiles):
    with pytest.raises(ValueError, match="^`ema`.*(empty|twice)"):
        WeightAverages(tiny_transformer(), profiles)


# -- updates -------------------------------------------------------------------------------------------------------


def test_average_follows_its_formula():
    model = tiny_transformer()
    averages = WeightAverages(model, ["0.3"])
    expected = weights(model)
    for n in range(8):
        nudge(model, 0.01 * (n + 1))
        averages.update()
        decay = 0.0 if n == 0 else min(0.3, (1 + n) / (10 + n))
        assert averages.profiles["0.3"].beta(n + 1) == pytest.approx(decay)
        expected = {name: decay * value + (1 - decay) * weights(model)[name] for name, value in expected.items()}
        for name, value in averages.tensors("0.3").items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)
    assert averages.profiles["0.3"].beta(8) == 0.3


def test_power_function_average_is_the_weighted_sum_of_all_past_weights():
    model = torch.nn.Linear(5, 3)
    averages = WeightAverages(model, ["power:0.1"])
    gamma, past = sigma_rel_to_gamma(0.1), []
    for seed in range(30):
        walk(model, averages, 1, seed)
        past.append(weights(model))
    edges = (np.arange(31) / 30) ** (gamma + 1)
    shares = np.diff(edges)
    for name, value in averages.tensors("power:0.1").items():
        expected = sum(share * one[name].double() for share, one in zip(shares, past, strict=True))
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    # The mean age under the same shares: the last weights have age 0.
    assert averages.mean_age()["power:0.1"] == pytest.approx(float(shares @ np.arange(29, -1, -1)))


def test_mean_age_of_a_constant_decay():
    averages = WeightAverages(torch.nn.Linear(1, 1), ["0.9"])
    shares = np.array([])
    for n in range(1, 201):
        averages.update()
        beta = averages.profiles["0.9"].beta(n)
        shares = np.append(beta * shares, 1 - beta)
    assert averages.mean_age()["0.9"] == pytest.approx(float(shares @ np.arange(199, -1, -1)))
    # After warm-up: 0.9 + 0.9^2 + ... = 0.9 / (1 - 0.9).
    assert averages.mean_age()["0.9"] == pytest.approx(9, rel=1e-3)


def test_several_averages_equal_separate_ones():
    profiles = ["0.9", "power:0.05", "power:0.1"]
    model = tiny_transformer()
    together = WeightAverages(model, profiles)
    alone = {name: WeightAverages(model, [name]) for name in profiles}
    assert together.published == "0.9"
    for seed in range(5):
        walk(model, together, 1, seed)
        for averages in alone.values():
            averages.update()
    for name in profiles:
        assert_same_tensors(together.tensors(name), alone[name].tensors(name))
        assert together.mean_age()[name] == alone[name].mean_age()[name]
    assert not torch.equal(*(next(iter(together.tensors(name).values())) for name in profiles[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_is_float32_and_feels_small_changes(dtype):
    model = tiny_transformer()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model = model.to(dtype)
    averages = WeightAverages(model, ["0.999"])
    assert {tensor.dtype for tensor in averages.tensors("0.999").values()} == {torch.float32}
    # Long after warm-up: each update moves an average by 1e-7, far less than bfloat16 resolves at 0.01.
    averages.load(copies(averages), {"updates": 10**6, "mean_age": {"0.999": 999.0}})
    before = copies(averages)["0.999"]
    nudge(model, 1e-4)
    for _ in range(100):
        averages.update()
    for name, parameter in model.named_parameters():
        # 1 - 0.999^100 of the way, to the rounding of 100 float32 steps.
        way = (1 - 0.999**100) * (parameter.float() - before[name])
        assert way.min() > 0
        torch.testing.assert_close(averages.tensors("0.999")[name] - before[name], way, rtol=0.02, atol=0)


# -- state and swapping --------------------------------------------------------------------------------------------


def test_saved_in_the_middle_gives_the_same_bits():
    profiles = ["0.99", "power:0.1"]
    model = tiny_transformer()
    straight = WeightAverages(model, profiles)
    walk(model, straight, 5)
    state = json.loads(json.dumps(straight.state()))
    assert state["updates"] == 5
    resumed = WeightAverages(model, profiles[::-1])
    # The order of profiles and tensors does not matter.
    saved = {name: dict(reversed(list(tensors.items()))) for name, tensors in copies(straight).items()}
    resumed.load(saved, state)
    for seed in range(5):
        walk(model, straight, 1, seed)
        resumed.update()
    for name in profiles:
        assert_same_tensors(resumed.tensors(name), straight.tensors(name))
        assert resumed.tensors(name).keys() == dict(model.named_parameters()).keys() == model.state_dict().keys()
    assert resumed.state() == straight.state()


def test_other_profiles_are_not_loaded():
    model = tiny_transformer()
    saved, averages = WeightAverages(model, ["0.9", "power:0.1"]), WeightAverages(model, ["0.99", "power:0.1"])
    with pytest.raises(ValueError, match=r"^`ema` is \['0.99', 'power:0.1'\].*\['0.9', 'power:0.1'\].*same profiles"):
        averages.load(copies(saved), saved.state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapping_restores_the_weights_bit_for_bit(dtype):
    model = tiny_transformer().to(dtype)
    averages = WeightAverages(model, ["0.5", "power:0.1"])
    walk(model, averages, 3)
    own, before = weights(model), copies(averages)
    for name, expected in ((None, "0.5"), ("power:0.1", "power:0.1")):
        with averages.swapped_into(model, name) as swapped:
            assert swapped is model
            assert_same_tensors(weights(model), {key: value.to(dtype) for key, value in before[expected].items()})
        assert_same_tensors(weights(model), own)
    with pytest.raises(KeyboardInterrupt), averages.swapped_into(model):
        raise KeyboardInterrupt
    assert_same_tensors(weights(model), own)
    for name in before:
        assert_same_tensors(averages.tensors(name), before[name])


def test_unknown_name_is_refused():
    model = tiny_transformer()
    averages = WeightAverages(model, ["0.5"])
    with pytest.raises(ValueError, match=r"`name` \('0.9'\).*\['0.5'\]"):
        averages.tensors("0.9")
    with pytest.raises(ValueError, match=r"`name` \(''\)"), averages.swapped_into(model, ""):
        pass
