"""Band-Gate: its low-pass, its start as adaLN-Zero, its options and its size."""

import copy

import numpy as np
import pytest
import torch
from components import make_pipeline, randomize, tiny_transformer
from torch.nn import functional as F
from torch.testing import assert_close
from transformer_cases import SPECTRALDIT, TEXT, assert_differ, inputs, run, untrained

from freqgate_dit import VARIANTS
from freqgate_dit.analysis import band_gain_statistics, band_gain_table, band_visibility, usual_band_gains
from freqgate_dit.cost import count_parameters, flops_per_forward
from freqgate_dit.transformer_freqgate_dit import (
    apply_low_pass,
    binomial_low_pass,
    dct_low_pass,
    dct_matrix,
    low_pass_gains,
    radial_index,
    random_low_pass,
)


def basis_images(rows: int, columns: int) -> torch.Tensor:
    """All images of the DCT's basis as tokens of one channel, `(rows * columns, N, 1)`."""
    return torch.einsum("ui,vj->uvij", dct_matrix(rows), dct_matrix(columns)).reshape(rows * columns, -1, 1)


@pytest.mark.parametrize("grid", [(8, 8), (16, 16), (5, 12), (1, 7), (1, 1)])
def test_the_low_pass_scales_every_frequency_by_its_gain(grid):
    images = basis_images(*grid)
    gains = low_pass_gains(radial_index(*grid), 0.3125).flatten()
    assert_close(apply_low_pass(images, dct_low_pass(*grid, 0.3125)), gains[:, None, None] * images)
    assert gains[0] > 0.9999 and all(gain == 0 or gain >= 0.01 for gain in gains)


def test_half_the_amplitude_passes_at_the_cutoff():
    index = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert low_pass_gains(index, 0.5)[2] == 0.5 and low_pass_gains(index, 0.5)[3] == 0
    assert (low_pass_gains(index, 0.5).diff() < 0).all()


def test_the_random_projector_has_the_gains_of_the_low_pass_and_no_frequency():
    def matrix(low_pass):
        return apply_low_pass(torch.eye(64)[None], low_pass)[0]

    control, low = matrix((random_low_pass(8, 8, 0.3125),)), matrix(dct_low_pass(8, 8, 0.3125))
    assert_close(control, control.T)
    assert_close(torch.linalg.eigvalsh(control), torch.linalg.eigvalsh(low), rtol=1e-4, atol=1e-5)
    # Low frequencies pass the one, and are split by the other like anything else.
    wave = basis_images(8, 8)[1]
    assert (low @ wave).norm() > 0.9 and (control @ wave).norm() < 0.8


@pytest.mark.parametrize("grid", [(8, 8), (3, 5), (1, 2), (1, 1)])
def test_the_binomial_low_pass_is_a_convolution_past_whose_ends_the_last_value_goes_on(grid):
    images = torch.randn(4, 1, *grid, generator=torch.Generator().manual_seed(0))
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    expected = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), torch.outer(taps, taps)[None, None])
    tokens = apply_low_pass(images.flatten(2).transpose(1, 2), binomial_low_pass(*grid))
    assert_close(tokens.transpose(1, 2), expected.flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize(
    "options",
    [{}, SPECTRALDIT, {"band_basis": "random"}, {"band_adapters": False}, {"band_clock": False}],
    ids=["plain", "spectraldit", "random", "no views", "no clock"],
)
def test_with_the_weights_of_an_adaln_zero_model_it_is_that_model(rank, options):
    baseline = tiny_transformer("adaln_zero", modulation_rank=rank)
    model = untrained("band_gate", modulation_rank=rank, **options).eval()
    missing, unexpected = model.load_state_dict(baseline.state_dict(), strict=False)
    assert missing and not unexpected
    assert_close(run(model), run(baseline))
    for block in model.transformer_blocks:
        randomize(block.band_modulation, seed=1)
    assert_differ(run(model), run(baseline))


@torch.no_grad()
def test_a_band_gate_changes_the_low_band_of_a_residual_alone():
    """The attention branch adds d P_low r: the difference to d = 0 has no high frequency."""
    block = tiny_transformer("band_gate", band_branches="attention").transformer_blocks[0]
    plain = untrained("band_gate", band_branches="attention").transformer_blocks[0]
    plain.load_state_dict(block.state_dict())
    torch.nn.init.zeros_(plain.band_modulation.linear.weight)
    torch.nn.init.zeros_(plain.band_modulation.linear.bias)
    for one in (block, plain):
        one.ff = torch.nn.Module()
        one.ff.forward = torch.zeros_like
    x, t, y = torch.randn(2, 64, 32), torch.randn(2, 32), torch.randn(2, 32)
    low_pass = dct_low_pass(8, 8, 0.3125)
    difference = block(x, t, y, None, (0, 0), low_pass) - plain(x, t, y, None, (0, 0), low_pass)
    power = (basis_images(8, 8)[..., 0] @ difference).square().sum(dim=(0, 2))  # of every frequency
    passes = low_pass_gains(radial_index(8, 8), 0.3125).flatten() > 0
    assert power[passes].min() > 1e-6 and power[~passes].max() < 1e-8


@torch.no_grad()
@pytest.mark.parametrize("drive, moved_by", [("both", {"t", "y"}), ("time", {"t"}), ("class", {"y"})])
def test_what_drives_the_band_gates(drive, moved_by):
    block = tiny_transformer("band_gate", band_drive=drive).transformer_blocks[0]
    t, y, other = torch.randn(3, 1, 32)
    gates = block.band_modulation(block.drive_band(t, y))
    moved = {"t": block.drive_band(other, y), "y": block.drive_band(t, other)}
    assert {name for name, drive in moved.items() if not torch.equal(block.band_modulation(drive), gates)} == moved_by


@pytest.mark.parametrize("branches, vectors", [("both", 2), ("attention", 1), ("mlp", 1)])
def test_branches(branches, vectors):
    model = tiny_transformer("band_gate", band_branches=branches)
    with model.inspect("band") as recorder:
        run(model)
    assert len(recorder.records) == 2 and recorder.records[0].value.shape == (2, 1, vectors * 32)


@torch.no_grad()
def test_spectraldits_own_block():
    """The MLP's residual, two numbers from t + y: `r + a_low P r + a_high (r - P r)` of the gated branch r."""
    model = tiny_transformer("band_gate", **SPECTRALDIT)
    assert model.spectrum is None and model.clock_embed is None
    block, plain = model.transformer_blocks[0], tiny_transformer("adaln_zero").transformer_blocks[0]
    plain.load_state_dict(block.state_dict(), strict=False)
    x, t, y = torch.randn(2, 64, 32), torch.randn(2, 32), torch.randn(2, 32)
    clocks, low_pass = model.block_inputs(torch.zeros(2, 4, 16, 16), None)

    without_mlp = tiny_transformer("adaln_zero").transformer_blocks[0]
    without_mlp.load_state_dict(plain.state_dict())
    without_mlp.ff = torch.nn.Module()
    without_mlp.ff.forward = torch.zeros_like
    before = without_mlp(x, t, y)
    residual = plain(x, t, y) - before
    head = block.band_modulation
    numbers = F.linear(F.silu(F.linear(t + y, head.down.weight, head.down.bias)), head.linear.weight, head.linear.bias)
    assert head.down.weight.shape == (8, 32) and numbers.shape == (2, 2)
    at_low, at_high = (0.2 * numbers.tanh())[:, None].chunk(2, dim=-1)
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    grid = F.pad(residual.transpose(1, 2).unflatten(2, (8, 8)), (2, 2, 2, 2), mode="replicate")
    low = F.conv2d(grid, torch.outer(taps, taps).expand(32, 1, 5, 5), groups=32).flatten(2).transpose(1, 2)
    expected = before + residual + at_low * low + at_high * (residual - low)
    assert_close(block(x, t, y, None, clocks, low_pass), expected)


def test_without_band_gates_clock_and_view_are_left():
    """The control: of an adaLN-Zero model of the same rank it differs by these two."""
    model = tiny_transformer("band_gate", band_branches="none", modulation_rank=4)
    baseline = tiny_transformer("adaln_zero", modulation_rank=4)
    added = set(model.state_dict()) - set(baseline.state_dict())
    assert {name.split(".")[2] if "blocks" in name else name.split(".")[0] for name in added} == {
        "high",
        "clock_embed",
        "spectrum",
    }
    assert list(model.inspectable) == ["modulation"]
    with pytest.raises(ValueError, match="has no 'band' to inspect"), model.inspect("band"):
        pass
    output = run(model)
    for name in ("high.up.weight", "clock_embed.weight"):
        changed = {key: torch.zeros_like(value) if name in key else value for key, value in model.state_dict().items()}
        other = tiny_transformer("band_gate", band_branches="none", modulation_rank=4)
        other.load_state_dict(changed)
        assert_differ(run(other), output)


def test_the_clock_tells_which_band_is_visible():
    model = untrained("band_gate")
    power = torch.where(radial_index(8, 8) * 2 < 0.45, 100.0, 0.01).expand(4, 8, 8)
    alphas_cumprod = torch.linspace(0.999, 0.001, 1000)
    model.set_spectrum(torch.zeros(4, 8, 8), power, alphas_cumprod)
    noisy = torch.zeros(3, 4, 8, 8)
    clocks = model.band_clocks(model.known_of(noisy, torch.tensor([999.0, 500.0, 0.0])))
    assert clocks.shape == (3, 2)
    assert (clocks.diff(dim=0) > 0).all()  # from noise to data both bands appear
    assert clocks[1, 0] > 0.9 and clocks[1, 1] < 0.3  # the low one first


def test_statistics_and_directions_travel_with_the_weights(tmp_path):
    model = tiny_transformer("band_gate", band_basis="random")
    model.set_spectrum(torch.zeros(4, 8, 8), torch.rand(4, 8, 8) + 0.5, torch.linspace(0.99, 0.01, 1000))
    model.save_pretrained(tmp_path)
    assert torch.equal(run(type(model).from_pretrained(tmp_path)), run(model))
    for dtype in (torch.bfloat16, torch.float16):  # the directions are drawn, by way of QR, before weights are read
        loaded = type(model).from_pretrained(tmp_path, torch_dtype=dtype)
        assert loaded.dtype == dtype and torch.equal(run(loaded), run(copy.deepcopy(model).to(dtype)))


def test_the_band_gains_are_those_of_the_blocks():
    model = tiny_transformer("band_gate")
    timesteps, low, high = band_gain_table(model, num_timesteps=5)
    assert timesteps.shape == (5,) and low.shape == high.shape == (5, 2, 2)  # timesteps, blocks, branches
    null = torch.full((5,), model.config.num_classes)
    with model.inspect() as recorder:
        run(model, **inputs(model, 5) | {"timestep": torch.as_tensor(timesteps), "class_labels": null})
    modulation, band = (
        recorder.select(kind, block=1)[0].value.unflatten(2, (-1, 32)) for kind in ("modulation", "band")
    )
    gate = modulation[:, 0, [2, 5]]  # of attention and MLP
    assert_close(torch.as_tensor(high[:, 1]), gate.square().mean(-1).sqrt())
    assert_close(torch.as_tensor(low[:, 1]), (gate + band[:, 0]).square().mean(-1).sqrt())


def test_the_gains_of_a_class_are_its_own():
    model = tiny_transformer("band_gate")
    null, first, second = (band_gain_table(model, 5, label)[1] for label in (None, 0, 1))
    assert abs(first - second).max() > 1e-3 and abs(first - null).max() > 1e-3
    np.testing.assert_array_equal(null, band_gain_table(model, 5, model.config.num_classes)[1])
    for label in (-1, 4, "cat"):
        with pytest.raises(ValueError, match=f"`label` .{label!r}. is no class of this model: give one from 0 to 3"):
            band_gain_table(model, 5, label)
    with pytest.raises(ValueError, match="the model has no classes"):
        band_gain_table(tiny_transformer("band_gate", num_classes=None), 5, 0)


def test_a_null_condition_that_was_never_trained_is_not_drawn():
    model = tiny_transformer("band_gate")
    classes = zip(*(band_gain_table(model, label=label) for label in range(model.config.num_classes)))
    of_classes = [np.mean(values, axis=0) for values in classes]
    for probability, expected, condition in (
        (0.1, band_gain_table(model), "under the null condition"),
        (0.0, of_classes, "on average over classes"),
    ):
        *found, said = usual_band_gains(make_pipeline(model, class_dropout_prob=probability))
        assert said == condition
        for values, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(values, wanted)
    assert abs(of_classes[1] - band_gain_table(model)[1]).max() > 1e-3

    def said_of(probability=0.1, **options):
        return usual_band_gains(make_pipeline(tiny_transformer("band_gate", **options), None, probability))[3]

    assert said_of(num_classes=None) == "without a condition"
    assert said_of(**TEXT, num_layers=1) == "under a text embedding of zeros"
    assert said_of(0.0, num_classes=9) == "on average over the first 8 classes"


def test_a_branch_that_follows_the_visibility_of_the_bands_is_told_from_one_that_opposes_it():
    model = untrained("band_gate")
    power = torch.where(radial_index(8, 8) * 2 < 0.45, 100.0, 0.01).expand(4, 8, 8)
    model.set_spectrum(torch.zeros(4, 8, 8), power, torch.linspace(0.999, 0.001, 1000))
    timesteps = np.linspace(0, 999, 9, dtype=np.float32)
    visibility = band_visibility(model, timesteps)
    # In noise as their powers (80 dB as amplitudes, less what of the low band leaks into the high one), of clean data
    # alike.
    # Gains are factors of amplitudes: a branch with the gains of Wiener's filter has a slope of 1.
    assert (np.diff(visibility) > 0).all() and visibility[0] < 2 and 30 < visibility[-1] < 80
    known = model.known_of(torch.zeros(9, 4, 8, 8), torch.from_numpy(timesteps))
    low, high = model.band_clocks(known).detach().double().numpy().T
    np.testing.assert_allclose(visibility, 20 * np.log10(low / high))
    ratio = np.stack([2 * visibility + 1, -visibility], axis=-1)[:, None]  # (T, 1 block, 2 branches)
    by_class = np.stack([ratio - 3, ratio + 3])
    rows = band_gain_statistics(ratio, -timesteps, visibility, by_class)
    assert [(row["block"], row["branch"]) for row in rows] == [(0, "attention"), (0, "mlp")]
    assert [row["wiener_slope"] for row in rows] == pytest.approx([2, -1])
    assert [row["wiener_correlation"] for row in rows] == pytest.approx([1, -1])
    assert [row["class_std_dB"] for row in rows] == pytest.approx([3, 3])
    assert rows[0]["correlation"] < -0.8 and rows[0]["low_over_high_dB_in_noise"] == ratio[-1, 0, 0]
    assert band_visibility(tiny_transformer("band_gate", band_clock=False), timesteps) is None


def test_size_against_adaln_zero_of_the_same_depth():
    """At the source experiment's width and depth: fewer parameters and no more FLOPs than what it must beat."""
    common = {**TEXT, "num_layers": 14, "pooled_projection_dim": 256}
    with torch.device("meta"):
        model = VARIANTS["band_gate"](modulation_rank=128, mlp_ratio=3.96875, **common)
        wider = VARIANTS["band_gate"](modulation_rank=128, **common)  # the usual MLP: a few FLOPs more
        baseline = VARIANTS["adaln_zero"](**common)
    assert [count_parameters(m) for m in (model, wider, baseline)] == [57_862_960, 58_092_560, 67_235_856]
    assert [flops_per_forward(m) for m in (model, wider, baseline)] == [5_777_133_568, 5_806_493_696, 5_802_819_584]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"band_branches": "all"}, r"`band_branches` \('all'\) must be one of"),
        ({"band_drive": "noise"}, r"`band_drive` \('noise'\) must be one of"),
        ({"band_gates": "matrix"}, r"`band_gates` \('matrix'\) must be one of"),
        ({"band_basis": "haar"}, r"`band_basis` \('haar'\) must be one of"),
        ({"band_cutoff": 0.0}, r"`band_cutoff` \(0.0\) must be in \(0, 1\]"),
        ({"band_branches": "none", "band_drive": "time"}, r"`band_drive` \(time\) is of band gates, and .* 'none'"),
        ({"band_gates": "scalar"}, r"`band_gates` \('scalar'\) .*Low drive the high band too: set `band_adapters`"),
        ({"band_basis": "binomial", "band_cutoff": 0.5}, r"`band_cutoff` \(0.5\) does not apply to .*'binomial'"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_transformer("band_gate", **arguments)


def test_options_of_band_gate_do_not_apply_to_others():
    with pytest.raises(ValueError, match=r"`band_drive` \(time\) does not apply to AdaLNZero"):
        tiny_transformer("adaln_zero", band_drive="time")


def test_random_directions_have_one_grid():
    model = tiny_transformer("band_gate", band_basis="random")
    with pytest.raises(ValueError, match="4 x 6 tokens.*use 'dct' for other sizes"):
        run(model, **inputs(model, height=8, width=12))
