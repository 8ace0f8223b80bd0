"""Freq-Grid: coarse views where noise hides the fine frequencies, the Wiener filter for what they do not see."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from components import SPECTRUM, assert_same_tensors, euler, make_pipeline, randomize, sample, tiny_transformer
from diffusers import DiffusionPipeline
from test_preconditioning import ALPHAS_CUMPROD, wiener_denoiser
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close
from transformer_cases import NO_CLASSES, TEXT, assert_differ, inputs, run, untrained

from freqgate_dit import VARIANTS, FreqGateDiTPipeline
from freqgate_dit.analysis import band_gain_table
from freqgate_dit.interventions import PATHS, changed_gate, gate_changes, labels_in_path
from freqgate_dit.samplers import make_sampler
from freqgate_dit.spectral import dct2, idct2
from freqgate_dit.transformer_freqgate_dit import (
    PREDICTION_TYPES,
    rotary_position_embedding,
    sincos_position_embedding,
    token_positions,
)


WIENER = {"preconditioning": "wiener", "prediction_type": "epsilon"}
VIEWS = range(3)  # of 8 x 8 samples: 4 x 4, 2 x 2 and 1 token
# Two samples on each view, unsorted.
TIMESTEPS = torch.tensor([900.5, 300.0, 30.25, 0.0, 999.0, 250.0])
VIEWS_OF_TIMESTEPS = [2, 1, 0, 0, 2, 1]
ALL_TIMESTEPS, LOG_SNR = torch.arange(1000.0), torch.logit(ALPHAS_CUMPROD)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def steep_spectrum():
    """Mean and power `(4, 8, 8)` float64: of cubic decay, so that both switches are inside the noise schedule."""
    index = torch.arange(8, dtype=torch.float64)
    power = (1 + torch.hypot(index[:, None], index)) ** -3 * torch.tensor([2.0, 1.0, 0.5, 4.0])[:, None, None]
    return torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64), power


def with_views(variant="adaln_zero", build=tiny_transformer, **kwargs):
    """A model with three views, by default with random weights."""
    model = build(variant, **{**WIENER, "grid_views": 3, "grid_tolerance": 0.05, **kwargs}).eval()
    model.set_spectrum(*steep_spectrum(), ALPHAS_CUMPROD)
    return model


def mixed(model, **kwargs) -> dict:
    """Inputs of samples on all views."""
    return {**inputs(model, len(TIMESTEPS), **kwargs), "timestep": TIMESTEPS}


def samples(given: dict, index) -> dict:
    return {name: tensor[index] for name, tensor in given.items()}


def all_on(view, batch_size=2) -> tuple[int, ...]:
    return tuple(batch_size * (view == other) for other in VIEWS)


def low_block(view) -> torch.Tensor:
    """Which of the DCT's coefficients `(8, 8)` a view sees."""
    return F.pad(torch.ones(8 >> view, 8 >> view), 2 * (0, 8 - (8 >> view))).bool()


def views_used(model) -> list[tuple[int, int]]:
    """`(view, samples)` of every pass through the blocks from now on."""
    used = []
    for view, embed in enumerate((model.patch_embed, *model.coarse_patch_embeds)):
        embed.register_forward_hook(lambda module, args, output, view=view: used.append((view, len(output))))
    return used


# -- the option off ---------------------------------------------------------------------------------------------------


def test_one_view_has_the_tensors_of_a_model_without_the_option(variant):
    options = {}, {"grid_views": 1}, {"grid_views": 3}
    without, one, three = (tiny_transformer(variant, **WIENER, **views) for views in options)
    assert_same_tensors(one.state_dict(), without.state_dict())
    parts = itertools.product(("coarse_patch_embeds", "coarse_proj_outs"), "01", ("weight", "bias"))
    added = {"spectrum.switches", *map(".".join, parts)}
    assert three.state_dict().keys() ^ one.state_dict().keys() == added


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (16, 16)])
def test_no_tolerance_is_the_full_grid(variant, size):
    model, plain = with_views(variant, grid_tolerance=0), with_views(variant, grid_views=1)
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    assert not model.views_of(ALL_TIMESTEPS).any()
    given = mixed(model, height=size[0], width=size[1])
    assert torch.equal(run(model, **given), run(plain, **given))
    assert_differ(run(with_views(variant), **given), run(plain, **given))


# -- what a view computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_an_untrained_model_is_the_wiener_denoiser_on_every_view(variant, prediction_type, view):
    model = with_views(variant, untrained, prediction_type=prediction_type)
    noisy, timestep = inputs(model)["hidden_states"].double(), torch.tensor([700, 100])
    expected = wiener_denoiser(noisy, timestep, *steep_spectrum())[prediction_type]
    for half_precision in (False, True):  # of the blocks: the filter stays exact
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half_precision):
            prediction = run(model, timestep=timestep, samples_per_view=all_on(view))
        assert (prediction - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("view", VIEWS)
def test_the_network_fills_the_low_block_and_sees_nothing_else(variant, view):
    model, wiener = with_views(variant), with_views(variant, untrained)
    seen, noisy, other = low_block(view), inputs(model)["hidden_states"], dct2(torch.randn(2, 4, 8, 8))

    def network(noisy):  # DCT of what it adds
        given = {"hidden_states": noisy, "samples_per_view": all_on(view)}
        return dct2((run(model, **given) - run(wiener, **given)).double())

    added = network(noisy)
    assert added[..., seen].std() > 0.01 and (added[..., ~seen].abs() < 1e-5).all()
    assert_close(network(noisy + idct2(other * ~seen)), added, rtol=1e-3, atol=1e-4)
    assert_differ(network(noisy + idct2(other * seen)), added)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("timestep", [0, 300, 999])
def test_the_networks_input_on_a_view_has_unit_power(timestep, view):
    model, (mean, power) = with_views(), steep_spectrum()
    x0, noise = idct2(mean + power.sqrt() * torch.randn(2048, 4, 8, 8)), torch.randn(2048, 4, 8, 8)
    noisy = (ALPHAS_CUMPROD[timestep].sqrt() * x0 + (1 - ALPHAS_CUMPROD[timestep]).sqrt() * noise).float()
    shown, _ = model.precondition(noisy, model.known_of(noisy, timestep), view)
    assert shown.shape == (2048, 4, 8 >> view, 8 >> view)
    assert shown.square().mean().item() == pytest.approx(1, rel=0.03)


# -- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, kwargs", [*((name, {}) for name in VARIANTS), ("in_context", TEXT), ("cross_attention", NO_CLASSES)]
)
def test_samples_of_a_mixed_batch_are_each_its_own(name, kwargs):
    model = with_views(name, use_rope=True, **kwargs)
    assert model.views_of(TIMESTEPS).tolist() == VIEWS_OF_TIMESTEPS
    given = mixed(model)
    together = run(model, **given)
    assert torch.equal(model(**given, return_dict=False)[0], together)
    for index in range(len(TIMESTEPS)):
        assert_close(run(model, **samples(given, [index])), together[[index]], **CLOSE)
    order = model.views_of(TIMESTEPS).argsort(stable=True)
    given, together = samples(given, order), together[order]
    assert torch.equal(run(model, **given), together)
    assert torch.equal(run(model, **given, samples_per_view=(2, 2, 2)), together)
    assert_differ(run(model, **given, samples_per_view=(1, 3, 2)), together)


def test_a_batch_on_one_view_is_one_pass():
    model = with_views()
    used = views_used(model)
    for timestep in (20.0, 300, [999.0, 900.0], [999, 0]):
        run(model, timestep=torch.tensor(timestep))
    assert used == [(0, 2), (1, 2), (2, 2), (0, 1), (2, 1)]


@pytest.mark.parametrize("views, counts", [(3, (2,)), (3, (1, 1, 1)), (3, (3, -1, 0)), (3, (1, 1, 0, 0)), (1, (1,))])
def test_samples_per_view_that_do_not_share_out_the_batch(views, counts):
    with pytest.raises(ValueError) as error:
        run(with_views(grid_views=views), samples_per_view=counts)
    assert all(word in str(error.value) for word in ("`samples_per_view`", str(counts), "2 samples", f"{views} views"))


# -- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full, count", [(4, 4), (4, 2), (4, 1), (12, 3), (6, 2)])
def test_a_token_is_at_the_mean_position_of_those_that_it_covers(full, count):
    assert torch.equal(token_positions(full), torch.arange(full, dtype=torch.float32))
    assert torch.equal(token_positions(count, full), token_positions(full).view(count, -1).mean(dim=1))


def test_both_kinds_of_positions_have_these_coordinates():
    for grid, full_grid in (((2, 3), (4, 12)), ((3, 2), (5, 3)), ((4, 6), (4, 6))):
        table = sincos_position_embedding(*grid, 16, full_grid=full_grid)
        column_sin, column_cos, row_sin, row_cos = table.chunk(4, dim=-1)
        cos, sin = rotary_position_embedding(*grid, 16, full_grid=full_grid)
        assert_close(cos[:, ::2], torch.cat([row_cos, column_cos], dim=-1))
        assert_close(sin[:, ::2], torch.cat([row_sin, column_sin], dim=-1))
    # A third of the tokens: each is at the place of the middle one of three.
    fine = sincos_position_embedding(6, 9, 16).view(6, 9, 16)
    assert_close(sincos_position_embedding(2, 3, 16, full_grid=(6, 9)).view(2, 3, 16), fine[1::3, 1::3])
    assert torch.equal(sincos_position_embedding(6, 9, 16, full_grid=(6, 9)), fine.flatten(0, 1))
    own, plain = (rotary_position_embedding(6, 9, 16, 2, **kwargs) for kwargs in ({"full_grid": (6, 9)}, {}))
    assert torch.equal(torch.stack(own), torch.stack(plain))


@pytest.mark.parametrize("view", VIEWS)
def test_the_tokens_of_a_view_have_their_places_in_the_image(view):
    model, seen = with_views("in_context", use_rope=True), {}
    block, embed = model.transformer_blocks[0], [model.patch_embed, *model.coarse_patch_embeds][view]
    embed.register_forward_hook(lambda module, args, output: seen.update(patches=output.flatten(2).transpose(1, 2)))
    block.register_forward_pre_hook(lambda module, args: seen.update(tokens=args[0][:, :-2]))
    processor = block.attn.processor
    block.attn.processor = lambda *args: seen.update(rotary=args[3]) or processor(*args)
    run(model, **inputs(model, height=8, width=16), samples_per_view=all_on(view))
    grid = {"height": 4 >> view, "width": 8 >> view, "full_grid": (4, 8)}
    positions = sincos_position_embedding(dim=32, **grid).expand_as(seen["tokens"])
    assert_close(seen["tokens"] - seen["patches"], positions, **CLOSE)
    rotary = rotary_position_embedding(head_dim=16, num_extra_tokens=2, **grid)
    assert torch.equal(torch.stack(seen["rotary"]), torch.stack(rotary))


def test_exported_for_fixed_views():
    model = with_views("band_gate", num_layers=1)
    given = inputs(model, 3)
    with pytest.raises(ValueError, match=r"`samples_per_view` \(None\)"):
        torch.export.export(model, (), given)
    given["samples_per_view"] = (1, 0, 2)
    exported = torch.export.export(model, (), given).module()
    assert_close(exported(**given).sample, run(model, **given))


class OnView(torch.nn.Module):
    def __init__(self, model, view):
        super().__init__()
        self.model, self.view = model, view

    def forward(self, hidden_states, timestep, class_labels):
        return self.model.denoise_on(self.view, hidden_states, timestep, class_labels, None)


def test_exported_on_one_view_for_any_batch_size():
    model = with_views("in_context", num_layers=1)
    dynamic_shapes = {name: {0: torch.export.Dim.DYNAMIC} for name in inputs(model)}
    exported = torch.export.export(OnView(model, 1), (), inputs(model, 3), dynamic_shapes=dynamic_shapes).module()
    for batch_size in (1, 5):
        given = inputs(model, batch_size)
        assert_close(exported(**given), run(model, **given, samples_per_view=all_on(1, batch_size)))


def offload_to_files(model, folder):
    model.enable_group_offload("cpu", offload_type="leaf_level", offload_to_disk_path=folder)


def offload_all(model, folder):
    cpu_offload(model, execution_device="cpu", offload_buffers=True)


@pytest.mark.parametrize("offload", [offload_to_files, offload_all])
def test_offloaded(offload, tmp_path):
    model = with_views("band_gate")
    given = mixed(model)
    expected = run(model, **given)
    offload(model, tmp_path)
    for _ in range(2):
        assert_close(run(model, **given), expected, **CLOSE)


# -- switches, other sizes --------------------------------------------------------------------------------------------


def largest_gain_beyond(power, log_snr, first):
    """Of the Wiener filter at log-SNRs `(T,)`, in float64, for the mean powers of the rings from `first` on."""
    radius = (torch.arange(8.0)[:, None] ** 2 + torch.arange(8.0) ** 2).sqrt().round()
    means = [power.double()[:, radius == ring].mean(dim=1) for ring in range(first, int(radius.max()) + 1)]
    return torch.sigmoid(log_snr.double() + torch.stack(means).max().log())


SPECTRA = {
    "steep": steep_spectrum()[1],
    "white": torch.ones(4, 8, 8),
    "any": 10 ** (6 * torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(5)) - 4),
    "floored": steep_spectrum()[1] * low_block(2),
}


@pytest.mark.parametrize("tolerance", [0.01, 0.05, 0.4])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_view_is_used_where_no_frequency_beyond_it_exceeds_the_tolerance(spectrum, tolerance):
    model = tiny_transformer(**WIENER, grid_views=3, grid_tolerance=tolerance)
    power = SPECTRA[spectrum]
    model.set_spectrum(torch.zeros(4, 8, 8), power, ALPHAS_CUMPROD)
    power = power.clamp(min=1e-3 * power.mean())
    switches = model.spectrum.switches
    assert switches.shape == (2,) and switches[1] <= switches[0]
    for view, switch in enumerate(switches, start=1):
        below, above = largest_gain_beyond(power, switch + torch.tensor([-1e-3, 1e-3]), 8 >> view)
        assert below <= tolerance < above
    gains = torch.stack([largest_gain_beyond(power, LOG_SNR, 8 >> view) for view in (1, 2)])
    decided = ((gains / tolerance).log().abs() > 1e-4).all(dim=0)
    views = model.views_of(ALL_TIMESTEPS)
    assert decided.sum() > 990 and torch.equal(views[decided], (gains <= tolerance).sum(dim=0)[decided])
    assert (views.diff() >= 0).all() and views[-1] == 2
    assert spectrum != "white" or set(views.tolist()) == {0, 2}


def test_one_strong_coefficient_does_not_keep_all_on_the_full_grid():
    model, (mean, power) = with_views(), steep_spectrum()
    before = model.spectrum.switches.clone()
    power[0, 7, 0] *= 10  # one of eleven of its ring, which the law lets fall by less than half from 4 to 7
    model.set_spectrum(mean, power, ALPHAS_CUMPROD)
    assert torch.equal(model.spectrum.switches, before)


def test_given_switches_are_kept(tmp_path):
    model = with_views()
    model.set_spectrum(*steep_spectrum(), ALPHAS_CUMPROD, switches=torch.tensor([-2.0, -math.inf]))
    model.save_pretrained(tmp_path)
    for one in (model, type(model).from_pretrained(tmp_path)):
        assert one.spectrum.switches.tolist() == [-2, -math.inf]
        assert torch.equal(one.views_of(ALL_TIMESTEPS), (LOG_SNR <= -2).long())
    model.set_spectrum(*steep_spectrum(), ALPHAS_CUMPROD)
    assert torch.equal(model.spectrum.switches, with_views().spectrum.switches)


def test_views_of_whole_timesteps():
    assert with_views().views_of(torch.tensor([999, 300, 0])).tolist() == [2, 1, 0]


@pytest.mark.parametrize("size", [(16, 16), (12, 20), (10, 6), (2, 4)])
def test_other_sizes_have_views_of_whole_patches(size):
    model, timestep, tokens = with_views(build=untrained), torch.tensor([700, 100]), []
    given = {**inputs(model, height=size[0], width=size[1]), "timestep": timestep}
    statistics = model.known_of(given["hidden_states"], timestep)[1:]
    expected = wiener_denoiser(given["hidden_states"].double(), timestep, *statistics)["epsilon"]
    model.transformer_blocks[0].register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[1]))
    for view in VIEWS:
        own = model.view_size(view, *size)
        assert all(side % 2 == 0 and 0 <= side - full / 2**view < 2 for side, full in zip(own, size))
        prediction = run(model, **given, samples_per_view=all_on(view))
        assert (prediction - expected).norm() <= 1e-5 * expected.norm()
        assert tokens[view] == own[0] * own[1] / 4
    assert run(randomize(model), **mixed(model, height=size[0], width=size[1])).isfinite().all()


@pytest.mark.parametrize("size", [(16, 16), (24, 8), (12, 20), (10, 6)])
def test_the_switches_hold_at_every_size(size):
    model = with_views()
    for view in (1, 2):
        own, other = (
            power[:, ~F.pad(torch.ones(rows, columns), (0, power.shape[2] - columns, 0, power.shape[1] - rows)).bool()]
            for power, (rows, columns) in (
                (model.spectrum(torch.zeros(1), *each)[2], model.view_size(view, *each)) for each in ((8, 8), size)
            )
        )
        # What a view lacks is what it lacks at the data's size, but for what rounding up adds to it.
        assert other.max() <= own.max() and (any(side % 8 for side in size) or other.max() == own.max())


@pytest.mark.parametrize("size", [(8, 8), (16, 32), (12, 20), (10, 6)])
def test_the_low_band_of_band_gate_is_the_same_cycles_per_image_on_every_view(size):
    model, noisy, gains = with_views("band_gate"), torch.zeros(1, 4, *size), []
    for view in VIEWS:
        rows, columns, kept = model.block_inputs(noisy, model.known_of(noisy, 0), view)[1]
        grid = rows.shape[1], columns.shape[1]
        assert grid == tuple(side // 2 for side in model.view_size(view, *size))
        gains.append(F.pad(kept, (0, grid[1] - kept.shape[1], 0, grid[0] - kept.shape[0])))
        assert_close(gains[view], gains[0][: grid[0], : grid[1]], rtol=1e-5, atol=1e-6)


# -- files ------------------------------------------------------------------------------------------------------------


def test_views_travel_with_the_weights(variant, tmp_path):
    model = with_views(variant)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (True, False):
        loaded = type(model).from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert_same_tensors(loaded.state_dict(), model.state_dict())
        assert torch.equal(run(loaded, **mixed(loaded)), run(model, **mixed(model)))
    half = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    for one in (half, model.to(torch.bfloat16)):
        assert {parameter.dtype for parameter in one.parameters()} == {torch.bfloat16}
        assert_same_tensors(dict(one.spectrum.named_buffers()), dict(with_views(variant).spectrum.named_buffers()))
        assert one.views_of(TIMESTEPS).tolist() == VIEWS_OF_TIMESTEPS
    given = mixed(model, dtype=model.dtype)
    assert torch.equal(run(half, **given), run(model, **given)) and run(half, **given).isfinite().all()


@pytest.mark.parametrize("saved, loaded", [(3, 1), (1, 3), (3, 2), (2, 3)])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_weights_of_other_views_are_refused(saved, loaded, low_cpu_mem_usage, tmp_path):
    model = tiny_transformer(**WIENER, grid_views=saved)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`grid_views` is {loaded}, .*a model with {saved}"):
        type(model).from_pretrained(tmp_path, grid_views=loaded, low_cpu_mem_usage=low_cpu_mem_usage)


def test_a_pipeline_with_views_is_pushed_and_loaded_with_and_without_the_package(hub):
    pipe = make_pipeline(with_views("band_gate"))
    used, call = views_used(pipe.transformer), {"class_labels": ["cat", "dog"], "num_inference_steps": 8}
    expected = sample(pipe, **call)
    pipe.push_to_hub("ana/dit")
    # By the repository's copy of the code, and by the package's.
    for loader, kwargs in ((DiffusionPipeline, {"trust_remote_code": True}), (FreqGateDiTPipeline, {})):
        loaded = loader.from_pretrained("ana/dit", **kwargs)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.transformer).__module__.startswith("diffusers_modules") == bool(kwargs)
        assert_same_tensors(loaded.transformer.state_dict(), pipe.transformer.state_dict())
        passes = views_used(loaded.transformer)
        assert (
            torch.equal(sample(loaded, **call), expected) and passes == used and {view for view, _ in used} >= {0, 2}
        )


# -- training, torch.compile ------------------------------------------------------------------------------------------


def gradients(model, **given) -> dict[str, torch.Tensor]:
    """Of a sum over samples, by parameter; those without one are left out."""
    model.zero_grad()
    model(**given).sample.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_of_a_mixed_batch(variant):
    model = with_views(variant)
    given = mixed(model)
    together = gradients(model, **given)
    assert together.keys() == dict(model.named_parameters()).keys()
    model.train().enable_gradient_checkpointing()
    assert_close(gradients(model, **given), together, rtol=0, atol=0)
    model.disable_gradient_checkpointing()
    total = {name: torch.zeros_like(gradient) for name, gradient in together.items()}
    for index in range(len(TIMESTEPS)):
        for name, gradient in gradients(model, **samples(given, [index])).items():
            total[name] += gradient
    assert_close(together, total, rtol=1e-3, atol=1e-5 * max(x.abs().max() for x in together.values()).item())
    # What belongs to a view is trained by it alone.
    own = {name for name in together if name.startswith(("patch_embed", "proj_out", "coarse")) and ".1." not in name}
    assert together.keys() - gradients(model, **inputs(model), samples_per_view=all_on(2)).keys() == own


def test_lora_on_every_view(variant):
    peft = pytest.importorskip("peft")
    model = with_views(variant)
    expected = [run(model, samples_per_view=all_on(view)) for view in VIEWS]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    for module in model.modules():
        randomize(getattr(module, "lora_B", torch.nn.Module()))
    for view in VIEWS:
        assert_differ(run(model, samples_per_view=all_on(view)), expected[view], by=1e-4)
    model.unload_lora()
    assert all(torch.equal(run(model, samples_per_view=all_on(view)), expected[view]) for view in VIEWS)


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_one_graph_per_view(variant, dynamo):
    model, counter = with_views(variant, num_layers=1, use_rope=True), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    divisions = [*(all_on(view) for view in VIEWS), (1, 0, 1)]
    for shift, counts in itertools.product((0, 0.5), divisions):
        given = {**inputs(model), "timestep": torch.tensor([20.0, 990.0]) + shift, "samples_per_view": counts}
        with torch.no_grad():
            assert_close(compiled(**given).sample, model(**given).sample, **CLOSE)
    assert counter.frame_count == len(divisions)  # none anew in the second round


def test_blocks_are_compiled_once_per_view(variant, dynamo):
    model, counter = with_views(variant, patch_size=1), CompileCounter()
    expected = run(model, **mixed(model))
    model.compile_repeated_blocks(backend=counter, fullgraph=True, dynamic=False)
    for _ in range(2):
        assert_close(run(model, **mixed(model)), expected, **CLOSE)
    assert counter.frame_count == len(VIEWS)


# -- sampling, looking inside -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["spectral", "dpm", "euler", "heun"])
def test_sampling_goes_from_the_coarsest_view_to_the_full_grid(name):
    pipe = make_pipeline(with_views("band_gate"), euler())
    pipe.scheduler = make_sampler(name, pipe.scheduler.config, SPECTRUM)
    used = views_used(pipe.transformer)
    latents = sample(pipe, ["cat", "dog"], guidance_scale=2.0, num_inference_steps=24)
    assert latents.shape == (2, 4, 8, 8) and latents.isfinite().all()
    # Both halves of guidance in one pass; never back to a coarser view.
    assert {count for _, count in used} == {4} and len(used) == (47 if name == "heun" else 24)
    assert used == sorted(used, reverse=True) and {view for view, _ in used} == set(VIEWS)


def test_inspect_records_the_groups_of_a_mixed_batch(variant):
    model = with_views(variant)
    given, kinds = mixed(model), (*model.inspectable, "attention")
    expected = run(model, **given)
    with model.inspect(*kinds) as recorder:
        assert torch.equal(run(model, **given), expected)
    groups = [[30.25, 0.0], [300.0, 250.0], [900.5, 999.0]]
    assert [(r.call, r.timestep.tolist()) for r in recorder.select("attention", 1)] == [(0, group) for group in groups]
    # What is recorded of a sample is what a pass of its own has.
    for index, timestep in enumerate(TIMESTEPS.tolist()):
        with model.inspect(*kinds) as alone:
            run(model, **samples(given, [index]))
        own = [r.value[r.timestep.tolist().index(timestep)] for r in recorder.records if timestep in r.timestep]
        assert_close([r.value[0] for r in alone.records], own, **CLOSE)


@pytest.mark.parametrize("variant", ["freq_gate", "band_gate"])
def test_interventions_reach_each_sample_of_a_mixed_batch(variant):
    """Two samples too, of which one is the first of its view: nothing may be spread over the other."""
    model = with_views(variant)
    for index in (range(len(TIMESTEPS)), [4, 2], [2, 4]):
        given = samples(mixed(model), list(index))
        labels = (given["class_labels"] + 1) % 3
        contexts = [lambda rows, path=path: labels_in_path(model, path, labels[rows]) for path in PATHS]
        contexts += [lambda rows, change=change: changed_gate(model, change) for change in gate_changes(model)]
        for context in contexts:
            with context(slice(None)):
                together = run(model, **given)
            for row in range(len(together)):
                with context([row]):
                    assert_close(run(model, **samples(given, [row])), together[[row]], **CLOSE)


def test_band_gains_do_not_depend_on_the_views():
    model, plain = with_views("band_gate"), with_views("band_gate", grid_views=1)
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    for own, expected in zip(band_gain_table(model), band_gain_table(plain)):
        assert_close(own, expected, **CLOSE)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"grid_views": 0}, ["`grid_views` (0)"]),
        ({"grid_views": 1.5}, ["`grid_views` (1.5)"]),
        ({"grid_tolerance": -0.1}, ["`grid_tolerance` (-0.1)"]),
        ({"grid_tolerance": 1}, ["`grid_tolerance` (1)"]),
        ({"grid_tolerance": math.nan, "grid_views": 1}, ["`grid_tolerance` (nan)"]),
        ({"sample_size": 12}, ["`grid_views` (3)", "samples of 12", "6, 3, 1.5 tokens", "`grid_views` 2"]),
        ({"patch_size": 4}, ["`grid_views` (3)", "2, 1, 0.5 tokens", "`grid_views` 2"]),
        ({"preconditioning": None}, ["`grid_views` (3)", "`preconditioning` (None)"]),
        ({"preconditioning": "scalar"}, ["`grid_views` (3)", "`preconditioning` ('scalar')"]),
        ({"preconditioning_at": "input"}, ["`grid_views` (3)", "`preconditioning_at` ('input')"]),
        ({"variant": "band_gate", "band_basis": "random"}, ["`band_basis` ('random')", "`grid_views`"]),
        ({"variant": "band_gate", "band_basis": "binomial"}, ["`band_basis` ('binomial')", "`grid_views`"]),
    ],
)
def test_views_that_make_no_sense(arguments, words):
    with pytest.raises(ValueError) as error:
        tiny_transformer(**{**WIENER, "grid_views": 3, **arguments})
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("views", "changes", "message"),
    [
        (3, {"switches": torch.zeros(3)}, r"`switches` has shape \(3,\); expected \(2,\)"),
        (3, {"switches": torch.tensor([-1.0, 0.0])}, r"`switches` \(\[-1.0, 0.0\]\).*do not rise"),
        (3, {"switches": torch.tensor([0.0, math.nan])}, r"`switches` \(\[0.0, nan\]\)"),
        (3, {"alphas_cumprod": torch.linspace(0.9, 0, 1000)}, "zero terminal SNR"),
        (1, {"switches": torch.zeros(0)}, "`switches`.*no views.*`grid_views`"),
    ],
)
def test_statistics_that_make_no_sense(views, changes, message):
    model, (mean, power) = with_views(grid_views=views), steep_spectrum()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.set_spectrum(**{"mean": mean + 1, "power": power, "alphas_cumprod": ALPHAS_CUMPROD, **changes})
    assert_same_tensors(model.state_dict(), before)


@pytest.mark.parametrize("timestep", [999, torch.tensor([999.0, 0.0])])
def test_a_model_with_views_must_know_its_spectrum(variant, timestep):
    with pytest.raises(ValueError, match="`grid_views` 3.*`set_spectrum`"):
        run(tiny_transformer(variant, **WIENER, grid_views=3), timestep=timestep)
