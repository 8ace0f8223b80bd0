"""Interventions: each one equals a call that can be made without it, and leaves nothing behind."""

import math
from contextlib import ExitStack

import pytest
import torch
from components import LABELS, make_pipeline, sample, tiny_transformer
from diffusers import DDPMScheduler
from diffusers.guiders import ClassifierFreeGuidance

from freqgate_dit.interventions import MEAN_OVER, changed_gate, gate_changes, labels_from, labels_in_path
from freqgate_dit.traces import log_snr


ALPHAS = DDPMScheduler().alphas_cumprod
NULL = len(LABELS)
BATCH = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
GIVEN, OTHER = torch.tensor([0, 1, 2, 0]), torch.tensor([2, 2, 0, 1])


@torch.no_grad()
def run(model, labels=GIVEN, timestep=400, batch=BATCH):
    return model(batch, timestep, class_labels=labels).sample


@pytest.mark.parametrize("variant", ["in_context", "cross_attention", "adaln_zero", "freq_gate", "band_gate"])
def test_labels_from_a_noise_level(variant):
    model = tiny_transformer(variant)
    before = run(model)
    level = log_snr(ALPHAS, torch.tensor(400)).item()
    levels = torch.tensor([level - 1, level, level + 0.1, -100.0], dtype=torch.float64)
    with labels_from(model, OTHER, levels, ALPHAS):
        mixed = run(model)
    assert torch.equal(mixed, run(model, torch.tensor([2, 2, 2, 1])))
    assert torch.equal(run(model), before)


@torch.no_grad()
def test_a_label_swap_in_the_pipeline_is_two_calls_in_one():
    pipe = make_pipeline(tiny_transformer("freq_gate"))
    first, second = sample(pipe, [0, 1], guidance_scale=2.5), sample(pipe, [2, 2], guidance_scale=2.5)
    alphas = pipe.scheduler.alphas_cumprod
    for level, expected in ((100.0, first), (-100.0, second)):
        with labels_from(pipe.transformer, torch.tensor([2, 2]), level, alphas):
            assert torch.equal(sample(pipe, [0, 1], guidance_scale=2.5), expected)
    with labels_from(pipe.transformer, 2, -3.0, alphas):
        swapped = sample(pipe, [0, 1], guidance_scale=2.5)
    assert not torch.equal(swapped, first) and not torch.equal(swapped, second)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("variant", ["freq_gate", "band_gate"])
@pytest.mark.parametrize("options", [{}, {"output_modulation": False}])
def test_all_paths_exchanged_are_another_label(variant, options, guided):
    model = tiny_transformer(variant, **options)
    null = torch.full((2,), NULL)
    given, other = (torch.cat([null, labels[:2]]) if guided else labels for labels in (GIVEN, OTHER))
    labels = OTHER[:2] if guided else OTHER
    paths = ["low", "high"] + ([] if options else ["output"])
    outputs = {}
    for path in paths:
        with labels_in_path(model, path, labels):
            outputs[path] = run(model, given)
    with labels_in_path(model, "low", labels), labels_in_path(model, "high", labels):
        if options:
            both = run(model, given)
        else:
            with labels_in_path(model, "output", labels):
                both = run(model, given)
    torch.testing.assert_close(both, run(model, other), rtol=1e-4, atol=1e-5)
    for output in outputs.values():  # one path alone is neither
        assert (output - run(model, given)).abs().max() > 1e-3 and (output - run(model, other)).abs().max() > 1e-3
        if guided:
            assert torch.equal(output[:2], run(model, given)[:2])


def test_gates_of_freq_gate_changed():
    model = tiny_transformer("freq_gate")
    plain = run(model)
    outputs = {}
    for change in gate_changes(model):
        with changed_gate(model, change), model.inspect("gate") as recorder:
            outputs[change] = run(model)
        assert (outputs[change] - plain).abs().max() > 1e-4
    assert torch.equal(run(model), plain)
    # A gate of one is a model that sees Low alone, and the two constants are exchanged with the paths.
    for block in model.transformer_blocks:
        low, high = block.low.state_dict(), block.high.state_dict()
        low, high = ({name: tensor.clone() for name, tensor in state.items()} for state in (low, high))
        block.low.load_state_dict(high)
        block.high.load_state_dict(low)
    with changed_gate(model, "zero"):
        torch.testing.assert_close(run(model), outputs["one"], rtol=1e-4, atol=1e-5)
    assert recorder.records


def test_the_reversed_gate_is_that_of_the_mirrored_timestep():
    model = tiny_transformer("freq_gate")

    def gates(timestep):
        with model.inspect("gate") as recorder:
            run(model, timestep=timestep)
        return torch.stack([record.value for record in recorder.records])

    seen = []
    with changed_gate(model, "reversed"):
        for block in model.transformer_blocks:
            block.gate.register_forward_hook(lambda module, args, output: seen.append(output))
        run(model, timestep=250)
    torch.testing.assert_close(torch.stack(seen), gates(749), rtol=1e-5, atol=1e-6)


def test_band_gate_without_its_band_gates():
    model = tiny_transformer("band_gate")
    with changed_gate(model, "zero"), model.inspect("band"):
        changed = run(model)
    for block in model.transformer_blocks:
        for parameter in block.band_modulation.parameters():
            parameter.data.zero_()
    assert torch.equal(changed, run(model)) and not torch.equal(changed, run(tiny_transformer("band_gate")))


def band_gates(model, timestep, *change):
    """What Band-Gate's gates are, `(blocks, B, 1, branches * D)`, and the output, with a change of them or without."""
    seen = []
    with ExitStack() as contexts:
        if change:
            contexts.enter_context(changed_gate(model, *change))
        for block in model.transformer_blocks:  # after the change's own
            handle = block.band_modulation.register_forward_hook(lambda *args: seen.append(args[2]))
            contexts.callback(handle.remove)
        output = run(model, timestep=timestep)
    return torch.stack(seen), output


@pytest.mark.parametrize("branches", ["both", "attention"])
def test_other_band_gates(branches):
    model = tiny_transformer("band_gate", band_branches=branches)
    plain, num_branches = run(model), len(model.transformer_blocks[0].branches)

    def gates(*change):
        found, changed = band_gates(model, 400, *change)
        assert not change or (changed - plain).abs().max() > 1e-4
        return found.unflatten(-1, (num_branches, -1))  # (blocks, B, 1, branches, D)

    own = gates()
    assert torch.allclose(gates("half"), own / 2)
    shuffled, random = gates("shuffled"), gates("random")
    assert torch.equal(shuffled.sort(dim=-1).values, own.sort(dim=-1).values) and not torch.equal(shuffled, own)
    # As large as its own on average, and the same direction for all samples.
    size = own.square().mean(-1, keepdim=True).sqrt()
    assert float(random.square().mean()) == pytest.approx(float(own.square().mean()), rel=0.5)
    assert torch.allclose((random / size)[:, :1].expand_as(own), random / size, atol=1e-5)
    assert torch.equal(random, gates("random")) and torch.equal(run(model), plain)


def test_the_random_gate_is_a_constant_per_channel():
    model, seen = tiny_transformer("freq_gate"), []
    with changed_gate(model, "random"):
        handle = model.transformer_blocks[0].gate.register_forward_hook(lambda *args: seen.append(args[2]))
        run(model, timestep=10)
        run(model, timestep=900)
        handle.remove()
    assert torch.equal(seen[0], seen[1]) and 0.3 < seen[0].mean() < 0.7 and seen[0][0].unique().numel() > 10


@pytest.mark.parametrize("variant", ["adaln_zero", "freq_gate", "band_gate"])
def test_a_learned_spectral_gate_as_it_was_before_training(variant):
    options = {"preconditioning": "learned", "prediction_type": "epsilon"}
    model, wiener = (
        tiny_transformer(variant, **options),
        tiny_transformer(variant, **{**options, "preconditioning": "wiener"}),
    )
    wiener.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        model.preconditioner.slope.fill_(0.2)
        model.preconditioner.offset.fill_(-1.0)
    plain = run(model)
    assert "wiener" in gate_changes(model) and "wiener" not in gate_changes(wiener)
    with changed_gate(model, "wiener"):
        torch.testing.assert_close(run(model), run(wiener))
    assert torch.equal(run(model), plain) and not torch.equal(plain, run(wiener))


@pytest.mark.parametrize("drive", ["both", "time"])
def test_band_gates_of_another_time_are_those_of_the_same_label_then(drive):
    model = tiny_transformer("band_gate", band_drive=drive)
    plain = run(model, timestep=250)

    def gates(timestep, *change):
        return band_gates(model, timestep, *change)[0]

    assert (gates(250) - gates(749)).abs().max() > 1e-3
    torch.testing.assert_close(gates(250, "reversed"), gates(749), rtol=1e-4, atol=1e-5)
    mean = torch.stack([gates(timestep) for timestep in torch.linspace(0, 999, MEAN_OVER)]).mean(0)
    for timestep in (10, 800):
        torch.testing.assert_close(gates(timestep, "mean"), mean, rtol=1e-4, atol=1e-5)
    assert torch.equal(run(model, timestep=250), plain)


def test_what_a_model_does_not_have():
    model = tiny_transformer("adaln_zero")
    with pytest.raises(ValueError, match="has no gate to change"), changed_gate(model, "zero"):
        pass
    with pytest.raises(ValueError, match=r"`path` \('low'\).*has no such path"), labels_in_path(model, "low", 0):
        pass
    with (
        pytest.raises(ValueError, match=r"`path` \('middle'\) must be one of low"),
        labels_in_path(model, "middle", 0),
    ):
        pass
    gated = tiny_transformer("band_gate", band_drive="time")
    with pytest.raises(ValueError, match="has no such path"), labels_in_path(gated, "low", 0):
        pass
    with pytest.raises(ValueError, match=r"`change` \('one'\): .* has zero, half, mean"), changed_gate(gated, "one"):
        pass
    of_class = tiny_transformer("band_gate", band_drive="class")
    assert gate_changes(of_class) == ("zero", "half", "shuffled", "random")
    unconditional = tiny_transformer("adaln_zero", num_classes=None)
    with pytest.raises(ValueError, match="not conditioned on classes"), labels_from(unconditional, 0, 0.0, ALPHAS):
        pass
    for labels, level in ((torch.tensor([0]), 0.0), (torch.tensor([0, 1, 2]), 0.0), (0, torch.zeros(3))):
        with (
            labels_from(model, labels, level, ALPHAS),
            pytest.raises(ValueError, match="entries, which do not fit a b"),
        ):
            run(model)


@pytest.mark.parametrize(
    "labels, message",
    [
        (99, r"`labels` has 99: give integers from 0 to 3, where 3 is the null"),
        (torch.tensor([0, -1, 0, 0]), "`labels` has -1"),
        ("cat", r"`labels` \('cat'\) are no numbers"),
        (1.5, r"`labels` \(1.5\) are no integers"),
        (lambda given: given + 3, "`labels` has"),
    ],
)
def test_labels_that_are_none(labels, message):
    model = tiny_transformer("freq_gate")
    contexts = labels_from(model, labels, 0.0, ALPHAS), labels_in_path(model, "low", labels)
    for context in contexts:
        with pytest.raises(ValueError, match=message), context:
            run(model, timestep=1)
    with pytest.raises(ValueError, match=r"`log_snr` \(nan\) is no number"), labels_from(model, 0, math.nan, ALPHAS):
        pass


def test_labels_may_be_made_of_the_given_ones():
    model = tiny_transformer("freq_gate")
    with labels_in_path(model, "low", (GIVEN + 1) % NULL):
        expected = run(model)
    with labels_in_path(model, "low", lambda given: (given + 1) % NULL):
        assert torch.equal(run(model), expected)


@pytest.mark.parametrize("guider", [None, ClassifierFreeGuidance(guidance_scale=2.5)])
def test_guidance_keeps_its_null_condition(guider):
    """Labels are exchanged in the conditional pass alone, whether guidance makes one batch of both passes or two."""
    pipe = make_pipeline(tiny_transformer("adaln_zero"))
    options = {"guider": guider} if guider else {"guidance_scale": 2.5}
    with labels_from(pipe.transformer, 2, -math.inf, pipe.scheduler.alphas_cumprod):
        exchanged = sample(pipe, [0, 1], **options)
    assert torch.equal(exchanged, sample(pipe, [2, 2], **options))


def test_insertion_and_arguments_by_place():
    model = tiny_transformer("adaln_zero")
    null = torch.full((4,), NULL)
    with labels_from(model, OTHER, -math.inf, ALPHAS), torch.no_grad():
        assert torch.equal(model(BATCH, 400, null).sample, run(model, null))
        assert torch.equal(model(BATCH, 400, GIVEN).sample, run(model, OTHER))
    with labels_from(model, OTHER, -math.inf, ALPHAS, from_null=True):
        inserted = run(model, null)
    assert torch.equal(inserted, run(model, OTHER))
