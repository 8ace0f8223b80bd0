"""Figures: what is drawn are the numbers that went in."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from freqgate_dit.plots import (
    band_gain_curves,
    cell_maps,
    error_curves,
    gate_curves,
    image_grid,
    loss_curves,
    seed_curves,
    validation_heatmap,
)
from freqgate_dit.report_plots import decided_worlds, worlds_figure
from freqgate_dit.training.latents import CachedLatents
from freqgate_dit.training.validation import Validation


def validation_result(num_images=60, null_label=3, size=(8, 8), scale=0.3):
    data = CachedLatents(torch.randn(num_images, 1, 2, *size), None, torch.arange(num_images) % 3)
    checked = Validation(data, DDPMScheduler(), num_images, 20, null_label=null_label)
    return checked.summarise(checked(lambda noisy, timesteps, labels: noisy * scale * (1 + labels).view(-1, 1, 1, 1)))


def heatmap(result):
    return validation_heatmap(json.loads(json.dumps(result.to_json(), allow_nan=False)), title="step 0")


def panels(figure):
    """Axes without the colour bars."""
    return [axes for axes in figure.axes if not axes.get_label() == "<colorbar>"]


def save(figure, path) -> tuple[int, int]:
    """The size of the figure as a PNG, which must not be blank."""
    figure.savefig(path)
    with Image.open(path) as image:
        assert np.asarray(image.convert("L")).std() > 10
        return image.size


def metrics(null_label=3, steps=(0, 100, 200)):
    series = {"train/mse": [(50, 1.0), (150, 0.5)]}
    for index, step in enumerate(steps):
        for name in ("val_raw", "val_ema"):
            scalars = validation_result(null_label=null_label, scale=0.3 / (1 + index)).scalars()
            for key, value in scalars.items():
                series.setdefault(f"{name}/{key}", []).append((step, value))
    return series


def test_loss_curves_draw_every_series(tmp_path):
    series = metrics()
    figure = loss_curves(series, label_entropy=math.log(3))
    losses, timesteps, information = panels(figure)
    drawn = [list(zip(*line.get_data(), strict=True)) for line in losses.lines]
    assert drawn == [series[name] for name in ("train/mse", "val_raw/loss", "val_ema/loss", "val_ema/null_loss")]
    # In the order of the schedule, where "t10of10" does not follow "t1of10".
    drawn = [list(zip(*line.get_data(), strict=True)) for line in timesteps.lines]
    assert drawn == [series[f"val_ema/loss_t{index}of10"] for index in range(1, 11)]
    assert len({line.get_color() for line in timesteps.lines}) == 10 and timesteps.get_legend() is None
    data, ceiling = information.lines[0], information.lines[-1]
    assert list(zip(*data.get_data(), strict=True)) == series["val_ema/information_nats"]
    assert ceiling.get_ydata() == [math.log(3)] * 2
    width, height = save(figure, tmp_path / "loss.png")
    assert 1200 < width < 2000 and 300 < height < 600


def test_loss_curves_without_null_condition_or_validation(tmp_path):
    series = metrics(null_label=None)
    figure = loss_curves(series)
    assert len(panels(figure)) == 2 and len(panels(figure)[0].lines) == 3
    save(loss_curves({"train/mse": series["train/mse"]}), tmp_path / "train.png")
    # One image in a timestep bin gives J, but no standard error.
    informed = {name: values for name, values in metrics().items() if not name.endswith("_se")}
    assert len(panels(loss_curves(informed))) == 3


@pytest.mark.parametrize("size", [(1, 1), (6, 40)])
def test_heatmap_shows_both_tables(tmp_path, size):
    result = validation_result(size=size)
    figure = heatmap(result)
    errors, information = panels(figure)
    np.testing.assert_array_equal(errors.images[0].get_array(), result.table)
    np.testing.assert_array_equal(information.images[0].get_array(), result.information_table)
    # What is written in the cells adds up to J, up to its rounding.
    written = [float(text.get_text()) for text in information.texts]
    largest = result.information_table.abs().max().item()
    assert sum(written) == pytest.approx(result.information, abs=len(written) * 0.05 * largest)
    assert f"{result.information:.2f} ± {result.information_se:.2f} nats" in information.get_title()
    for axes in (errors, information):
        assert [label.get_text() for label in axes.get_xticklabels()] == result.bands
        assert [int(label.get_text()) for label in axes.get_yticklabels()] == list(range(0, 1001, 100))
        assert axes.get_ylim()[0] < axes.get_ylim()[1]  # noise at the top
    width, height = save(figure, tmp_path / "heatmap.png")
    assert 800 < width < 2000 and 400 < height < 800


def test_heatmap_without_null_condition_and_with_empty_bins(tmp_path):
    figure = heatmap(validation_result(num_images=4, null_label=None))
    (errors,) = panels(figure)
    assert len(errors.texts) == 4 * 3 and np.isnan(errors.images[0].get_array().data).sum() == 6 * 3
    save(figure, tmp_path / "heatmap.png")


def test_heatmap_of_losses_that_are_zero_or_not_finite(tmp_path):
    result = validation_result(scale=math.nan)
    assert not result.table.isfinite().any()
    save(heatmap(result), tmp_path / "not_finite.png")
    result.table[:] = result.information_table[:] = 0
    save(heatmap(result), tmp_path / "zero.png")


def test_gate_curves_and_image_grid(tmp_path):
    gates = np.linspace(0.2, 0.8, 5)[:, None, None] * np.ones((5, 3, 8))
    mean_of_blocks, channels = panels(gate_curves(range(5), gates))
    assert len(mean_of_blocks.lines) == 3 and len(channels.lines) == 8 + 1
    np.testing.assert_allclose(mean_of_blocks.lines[0].get_ydata(), gates[:, 0, 0])
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    figure = image_grid([[picture, None], [picture]], ["a", "b"], ["left", "right"], title="grid")
    assert [len(axes.images) for axes in figure.axes] == [1, 0, 1, 0]
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), picture)
    save(figure, tmp_path / "grid.png")


def test_band_gain_curves_are_decibel_of_low_over_high(tmp_path):
    low, high = np.full((5, 3, 2), 2.0), np.ones((5, 3, 2))
    high[:, 1, 1] = 20
    figure = band_gain_curves(range(5), low, high, "under the null condition")
    attention, mlp = panels(figure)
    np.testing.assert_allclose(attention.lines[1].get_ydata(), 20 * np.log10(2), rtol=1e-6)
    np.testing.assert_allclose(mlp.lines[1].get_ydata(), -20, rtol=1e-6)
    save(figure, tmp_path / "band_gains.png")
    assert figure.get_suptitle() == "Band gains under the null condition"
    all_zero = band_gain_curves(range(5), 0 * low, 0 * high, "without a condition")  # before training
    save(all_zero, tmp_path / "untrained.png")


@pytest.mark.parametrize("parts", [1, 6])
def test_curves_by_seed(parts, tmp_path):
    levels, curves = np.linspace(-8, 8, 5), np.random.default_rng(0).normal(size=(3, 5, parts))
    figure = seed_curves(levels, curves, ["a", "b", "c"], [f"block {i}" for i in range(parts)], "gate")
    assert len(figure.axes) == parts
    for part, axes in enumerate(figure.axes):
        drawn = np.array([line.get_ydata() for line in axes.lines])
        assert np.array_equal(drawn, curves[:, :, part])
    save(figure, tmp_path / "seeds.png")


def test_decisions_by_world_are_drawn_beside_those_of_the_data(tmp_path):
    def model(difference, half=0.5):
        return {"difference": difference, "low": half and difference - half, "high": half and difference + half}

    of_mod = {"swap": [model(2.9), model(2.6)], "insertion": [model(3.7)]}
    worlds = {
        "mod": {"of_data": 2.4, "models": {"freq_gate": of_mod, "band_gate": {"use": [model(1.2, None)]}}},
        "flat": {"of_data": None, "models": {"freq_gate": {"swap": [model(0.1)]}}},
    }
    figure = decided_worlds(worlds)
    dots = [[line for line in axes.lines if line.get_marker() == "o"] for axes in figure.axes]
    assert [axes.get_title() for axes in figure.axes] == ["freq_gate", "band_gate"]
    assert [[line.get_xdata()[0] for line in panel] for panel in dots] == [[2.9, 2.6, 3.7, 0.1], [1.2]]
    assert [[round(line.get_ydata()[0]) for line in panel] for panel in dots] == [[0, 0, 0, 1], [0]]
    assert {line.get_color() for line in dots[0]}.isdisjoint({line.get_color() for line in dots[1]})
    assert len(figure.axes[1].lines) == 3  # the data, one dot without an interval, zero
    names = [text.get_text() for text in figure.axes[1].get_legend().texts]
    assert names == ["the noisy data", "swap", "insertion", "use"]
    save(figure, tmp_path / "worlds.png")


def test_errors_of_arms_are_their_means_best_first():
    errors = {"a": np.array([[9.0, 3.0, 2.0], [9.0, 5.0, 4.0]]), "b": np.array([[9.0, 2.0, 1.0], [9.0, 2.0, 1.0]])}
    [axes] = error_curves([0, 5, 10], errors, "error of the noise").axes
    assert [line.get_label() for line in axes.lines] == ["b", "a"] and axes.get_ylabel() == "error of the noise"
    np.testing.assert_array_equal(axes.lines[1].get_xydata(), [[5, 4], [10, 3]])  # not the first step


def test_cells_show_their_means_and_mark_those_that_exclude_zero(tmp_path):
    def cell(mean, half):
        return {"mean": mean, "low": mean - half, "high": mean + half}

    table = [[cell(-3.0, 1.0), cell(0.5, 1.0)], [cell(1.0, 0.5), cell(0.0, 1.0)], [cell(0.0, 2.0), cell(2.0, 1.0)]]
    maps = {"a against b": table, "b against c": [[cell(0.0, 1.0)] * 2] * 3}
    figure = cell_maps([100.0, 500.0, 900.0], ["0-1", "1-2"], maps)
    first, second = panels(figure)
    np.testing.assert_array_equal(first.images[0].get_array(), [[-3, 1, 0], [0.5, 0, 2]])
    assert first.images[0].get_clim() == second.images[0].get_clim() == (-3, 3)
    assert set(map(tuple, first.lines[0].get_xydata())) == {(0, 0), (1, 0), (2, 1)}  # (timestep, band)
    assert len(second.lines[0].get_xydata()) == 0
    save(figure, tmp_path / "cells.png")
    save(cell_maps([500.0], ["0-1"], {"a": [[cell(0.0, 1.0)]]}), tmp_path / "one.png")


def test_worlds_have_a_panel_each():
    worlds = {
        name: {"nats": {"structure": [0, 1, 2], "texture": [0, 0, 0]}, "half": {"structure": 0.0, "texture": None}}
        for name in ("mod", "add", "same", "flat")
    }
    figure = worlds_figure([-1, 0, 1], worlds)
    assert [axes.get_title() for axes in figure.axes] == ["mod", "add", "same", "flat"]
    assert all(len(axes.lines) == 3 for axes in figure.axes)  # two curves, and the level that there is
