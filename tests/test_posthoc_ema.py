"""Averages of any width, made afterwards of stored ones."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from components import assert_same_tensors, make_pipeline, sample, tiny_transformer, tiny_vae_kl
from test_ema import walk, weights
from tiny_runs import ROOT, run

from freqgate_dit import FreqGateDiTPipeline
from freqgate_dit.training.ema import WeightAverages, sigma_rel_to_gamma
from freqgate_dit.training.posthoc_ema import (
    find_snapshots,
    fit_snapshots,
    main,
    posthoc_average,
    posthoc_coefficients,
    profile_inner_product,
    read_snapshots,
    reconstruction_error,
    save_snapshot,
)


PROFILES = ["power:0.05", "power:0.1"]
GAMMAS = [sigma_rel_to_gamma(0.05), sigma_rel_to_gamma(0.1)]


def stored_profiles(count, end=8000):
    return [(end * (index + 1) // count, gamma) for index in range(count) for gamma in GAMMAS]


def make_snapshots(folder, model, steps, profiles=PROFILES, seed=0) -> WeightAverages:
    """Snapshots at `steps` of a random walk of the model's weights, one update per step."""
    averages = WeightAverages(model, profiles)
    for step in range(1, max(steps) + 1):
        walk(model, averages, 1, seed + step)
        if step in steps:
            save_snapshot(folder, averages, step)
    return averages


# -- coefficients --------------------------------------------------------------------------------------------------


def test_inner_products_equal_numeric_integrals():
    tau = (np.arange(200_000) + 0.5) / 200_000 * 10
    for (t1, gamma1), (t2, gamma2) in [
        ((10, 6.9), (10, 17)),
        ((4, 6.9), (10, 17)),
        ((10, 0.5), (7, 30)),
        ((3, 2), (3, 2)),
    ]:
        one, other = (
            np.where(tau <= t, (gamma + 1) * (tau / t) ** gamma / t, 0) for t, gamma in ((t1, gamma1), (t2, gamma2))
        )
        expected = (one * other).sum() * 10 / 200_000
        assert profile_inner_product(t1, gamma1, t2, gamma2) == pytest.approx(expected, rel=1e-4)


def test_inner_products_stay_finite_over_long_runs_and_narrow_profiles():
    assert 0 < profile_inner_product(10.0**9, 1000.0, 10.0**9 - 10**6, 1000.0) < np.inf


def test_a_stored_profile_is_taken_as_it_is():
    stored = stored_profiles(8)
    for index in (1, 14, 15):
        one_hot = np.eye(len(stored))[index]
        coefficients = posthoc_coefficients(stored, stored[index])
        np.testing.assert_allclose(coefficients, one_hot, atol=1e-9)
        assert reconstruction_error(stored, coefficients, stored[index]) < 1e-6


@pytest.mark.parametrize("sigma_rel", [0.05, 0.07, 0.15, 0.25])
def test_coefficients_add_up_to_one_and_no_others_that_do_come_nearer(sigma_rel):
    stored, target = stored_profiles(6), (8000, sigma_rel_to_gamma(sigma_rel))
    coefficients = posthoc_coefficients(stored, target)
    assert coefficients.sum() == pytest.approx(1, abs=1e-9)
    error = reconstruction_error(stored, coefficients, target)
    generator = np.random.default_rng(0)
    for _ in range(20):
        direction = generator.normal(size=len(stored))
        other = coefficients + 1e-2 * (direction - direction.mean())
        assert reconstruction_error(stored, other, target) > error
    # Time has no unit.
    longer = [(1000 * updates, gamma) for updates, gamma in stored]
    np.testing.assert_allclose(posthoc_coefficients(longer, (8_000_000, target[1])), coefficients, atol=1e-9)


def test_error_is_the_distance_of_the_profiles():
    stored, target = stored_profiles(3, end=300), (300, sigma_rel_to_gamma(0.15))
    coefficients = posthoc_coefficients(stored, target)
    tau = (np.arange(300_000) + 0.5) / 1000

    def profile(t, gamma):
        return np.where(tau <= t, (gamma + 1) * (tau / t) ** gamma / t, 0)

    wanted = profile(*target)
    made = sum(coefficient * profile(*one) for coefficient, one in zip(coefficients, stored, strict=True))
    expected = np.linalg.norm(made - wanted) / np.linalg.norm(wanted)
    assert reconstruction_error(stored, coefficients, target) == pytest.approx(expected, rel=1e-3)


def test_more_snapshots_make_the_error_smaller():
    target = (8000, sigma_rel_to_gamma(0.08))
    errors = []
    for count in (4, 8, 16, 32):
        stored = stored_profiles(count)
        errors.append(reconstruction_error(stored, posthoc_coefficients(stored, target), target))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3


# -- snapshots -----------------------------------------------------------------------------------------------------


def test_snapshot_round_trip(tmp_path):
    averages = make_snapshots(tmp_path, tiny_transformer(), (2, 4), ["0.9", *PROFILES])
    first, second = read_snapshots(tmp_path)
    assert (first.step, first.updates, second.step, second.updates) == (2, 2, 4, 4)
    assert first.profiles == second.profiles == tuple(PROFILES)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000002.safetensors",
        "step_00000004.safetensors",
    ]
    assert read_snapshots(tmp_path, 3) == read_snapshots(tmp_path, 2) == [first]
    for sigma_rel, name in ((0.05, "power:0.05"), (0.1, "power:0.1")):
        restored = posthoc_average(tmp_path, sigma_rel)
        assert restored.keys() == averages.tensors(name).keys()
        for key, value in averages.tensors(name).items():
            torch.testing.assert_close(restored[key], value, rtol=1e-5, atol=1e-6)


def test_unfinished_files_are_ignored_and_damaged_ones_named(tmp_path):
    averages = make_snapshots(tmp_path, torch.nn.Linear(9, 9), (1, 2))
    (tmp_path / "step_00000003.safetensors.0a1b2c3d.tmp").write_bytes(b"half")
    assert [snapshot.step for snapshot in read_snapshots(tmp_path)] == [1, 2]
    whole = (tmp_path / "step_00000001.safetensors").read_bytes()
    for damaged in (whole[:-10], whole[:100], b""):
        (tmp_path / "step_00000001.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="snapshot step_00000001.safetensors is damaged.*delete it"):
            read_snapshots(tmp_path)
    # What was left half written goes with the next snapshot.
    walk(torch.nn.Linear(9, 9), averages, 1)
    save_snapshot(tmp_path, averages, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step_0000000{step}.safetensors" for step in (1, 2, 4)
    ]


def test_snapshots_of_later_steps_go_when_an_earlier_one_is_saved_again(tmp_path):
    make_snapshots(tmp_path, torch.nn.Linear(2, 2), (2, 4, 6))
    make_snapshots(tmp_path, torch.nn.Linear(2, 2), (4,))
    assert [snapshot.step for snapshot in read_snapshots(tmp_path)] == [2, 4]


def test_snapshot_needs_a_power_function_profile(tmp_path):
    averages = WeightAverages(torch.nn.Linear(2, 2), ["0.9"])
    with pytest.raises(ValueError, match=r"^`ema` \(0.9\).*power:0.05"):
        save_snapshot(tmp_path, averages, 1)


# -- the average ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_rel", [0.07, 0.15])
def test_posthoc_average_equals_one_tracked_live(tmp_path, sigma_rel):
    steps, live = 320, f"power:{sigma_rel}"
    model = torch.nn.Linear(20, 20)
    averages = WeightAverages(model, [*PROFILES, live])
    stored_only = WeightAverages(model, PROFILES)
    squares = 0.0
    for step in range(1, steps + 1):
        walk(model, averages, 1, seed=step)
        stored_only.update()
        squares += sum(value.double().square().sum().item() for value in weights(model).values())
        if step % 20 == 0:
            save_snapshot(tmp_path, stored_only, step)
    snapshots = read_snapshots(tmp_path)
    _, error = fit_snapshots(snapshots, sigma_rel)
    assert len(snapshots) == 16 and error < 0.02

    def distance(one):
        return sum((one[key] - value).double().square().sum().item() for key, value in tracked.items()) ** 0.5

    tracked = averages.tensors(live)
    # Cauchy-Schwarz over the updates: the profiles' distance times the length of all the weights there ever were.
    gamma = sigma_rel_to_gamma(sigma_rel)
    bound = error * (gamma + 1) / ((2 * gamma + 1) * steps) ** 0.5 * squares**0.5
    assert distance(posthoc_average(tmp_path, sigma_rel)) < bound
    for name in PROFILES:
        assert distance(averages.tensors(name)) > bound


def test_posthoc_average_can_end_at_an_earlier_snapshot(tmp_path):
    model = torch.nn.Linear(4, 4)
    averages = make_snapshots(tmp_path / "short", model, (3, 6))
    tracked = {key: value.clone() for key, value in averages.tensors("power:0.1").items()}
    shutil.copytree(tmp_path / "short", tmp_path / "long")
    walk(model, averages, 3)
    save_snapshot(tmp_path / "long", averages, 9)
    earlier = posthoc_average(tmp_path / "long", 0.08, updates=6)
    assert_same_tensors(earlier, posthoc_average(tmp_path / "short", 0.08))
    for key, value in posthoc_average(tmp_path / "long", 0.1, updates=6).items():
        torch.testing.assert_close(value, tracked[key], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"`updates` \(7\).*\[3, 6, 9\]"):
        posthoc_average(tmp_path / "long", 0.1, updates=7)
    with pytest.raises(ValueError, match="`updates`.*none"):
        posthoc_average(tmp_path / "empty", 0.1)


# -- the script ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """A run with a pipeline folder on latents and three snapshots, steps 4, 8 and 12."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    model = tiny_transformer()
    make_snapshots(run / "ema_snapshots", model, (4, 8, 12))
    make_pipeline(model, vae=tiny_vae_kl()).save_pretrained(run / "pipeline")
    (run / "pipeline" / "training_config.yaml").write_text("seed: 0\n")
    return run


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_script_writes_whole_pipelines(tmp_path, finished_run, capsys):
    before = files(finished_run)
    main(["--run", str(finished_run), "--sigma_rel", "0.08", "0.15", "--out", str(tmp_path)])
    assert files(finished_run) == before
    printed = capsys.readouterr().out
    for sigma_rel in (0.08, 0.15):
        folder = tmp_path / f"pipeline_ema_{sigma_rel}"
        pipe = FreqGateDiTPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        average = posthoc_average(finished_run / "ema_snapshots", sigma_rel)
        assert_same_tensors(dict(pipe.transformer.state_dict()), average)
        assert torch.isfinite(sample(pipe, "cat", output_type="pt")).all()
        # All else is as the run has published it.
        written, published = files(folder), files(finished_run / "pipeline")
        about = json.loads(written.pop("posthoc_ema.json"))
        changed = {name for name in published if written[name] != published[name]}
        assert written.keys() == published.keys() and len(changed) == 1 and changed.pop().startswith("transformer/")
        assert about["sigma_rel"] == sigma_rel and about["step"] == 12 and about["snapshot_steps"] == [4, 8, 12]
        assert f"{about['relative_error_of_profile']:.2%}" in printed
    assert "3 snapshots" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"pipeline_ema_0.08", "pipeline_ema_0.15"}


def test_script_ends_at_a_step_and_writes_into_the_run(tmp_path, finished_run):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    main(["--run", str(run), "--sigma_rel", "0.1", "--step", "8"])
    pipe = FreqGateDiTPipeline.from_pretrained(run / "pipeline_ema_0.1")
    average = posthoc_average(run / "ema_snapshots", 0.1, updates=8)
    assert_same_tensors(dict(pipe.transformer.state_dict()), average)
    with pytest.raises(SystemExit, match="pipeline_ema_0.1 exists.*--out"):
        main(["--run", str(run), "--sigma_rel", "0.08", "0.1"])
    # Nothing was written before it was refused.
    assert not (run / "pipeline_ema_0.08").exists()


def test_script_says_what_is_missing(tmp_path, finished_run):
    def refused(*arguments, run=finished_run):
        with pytest.raises(SystemExit) as caught:
            main(["--run", str(run), "--out", str(tmp_path / "out"), *arguments])
        return str(caught.value)

    assert "`step` (5)" in (message := refused("--sigma_rel", "0.1", "--step", "5")) and "[4, 8, 12]" in message
    assert "`sigma_rel` (0.5)" in refused("--sigma_rel", "0.1", "0.5")
    assert "is not a folder" in refused("--sigma_rel", "0.1", run=tmp_path / "nowhere")
    (tmp_path / "stopped").mkdir()
    assert "--resume latest" in refused("--sigma_rel", "0.1", run=tmp_path / "stopped")
    (tmp_path / "stopped" / "pipeline").mkdir()
    assert "--ema_snapshots" in refused("--sigma_rel", "0.1", run=tmp_path / "stopped")
    assert not (tmp_path / "out").exists()
    assert [snapshot.step for snapshot in find_snapshots(finished_run, 8)] == [4, 8]


def test_script_starts_from_an_uninstalled_checkout(tmp_path):
    done = run("python", ROOT / "training" / "posthoc_ema.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "--sigma_rel" in done.stdout and "post-hoc EMA" in done.stdout, done.stderr
